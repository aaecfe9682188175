"""Which linears are left alone: one case for each reason."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fusionpass.quantize.select import select


class Lora(nn.Linear):
    pass


def with_forward(linear: nn.Linear) -> nn.Linear:
    forward = linear.forward
    linear.forward = lambda x: forward(x) + 1  # type: ignore[method-assign]
    return linear


def hooked(linear: nn.Linear, register: str) -> nn.Linear:
    getattr(linear, register)(lambda *args: None)
    return linear


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Lora(32, 32), "Lora is a subclass of nn.Linear and may do more than one"),
        (lambda: hooked(nn.Linear(32, 32), "register_forward_hook"), "it carries forward hooks, which a replacement"),
        (lambda: hooked(nn.Linear(32, 32), "register_forward_pre_hook"), "it carries forward hooks, which a repl"),
        (lambda: with_forward(nn.Linear(32, 32)), "it carries forward hooks, which a replacement would lose"),
        (lambda: nn.Linear(32, 32).double(), "its weight is torch.float64"),
        (lambda: nn.Linear(32, 32).to(torch.float8_e4m3fn), "its weight is torch.float8_e4m3fn"),
        (lambda: nn.Linear(40, 32), "in_features 40 is not a multiple of 32, which mxfp8 needs"),
        (lambda: nn.Linear(32, 40), "out_features 40 is not a multiple of 16, which mxfp8 needs"),
    ],
)
def test_a_linear_that_is_left_alone(make: Callable[[], nn.Linear], reason: str) -> None:
    model = nn.Sequential(nn.Linear(32, 32), make())
    chosen, reasons = select(model, (), False, "mxfp8")
    assert chosen == {"0": model[0]}
    assert reasons.keys() == {"1"}
    assert reasons["1"].startswith(reason)


def test_rules_ties_and_the_model_itself() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    model[2].weight = model[1].weight
    chosen, reasons = select(model, ["0"], False, "fp8_static")
    assert not chosen
    assert reasons == {
        "0": "skipped by the rule '0'",
        "1": "its weight is tied to 2",
        "2": "its weight is tied to 1",
    }
    assert select(model, ["0"], True, "fp8_static")[0].keys() == {"1", "2"}
    assert select(model[0], (), False, "fp8_static")[1] == {
        "": "it is the whole model, which cannot be replaced in place"
    }
