"""Which linears are left alone: one case for each reason."""

import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fusionpass.errors import ShardWarning, SkipError
from fusionpass.quantize import quantize_
from fusionpass.quantize.select import matches, packs, select, skip_rules


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
    chosen, reasons = select(model, skip_rules(model, ()), False, "mxfp8")
    assert chosen == {"0": model[0]}
    assert reasons.keys() == {"1"}
    assert reasons["1"].startswith(reason)


def test_rules_ties_and_the_model_itself() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    model[2].weight = model[1].weight
    chosen, reasons = select(model, skip_rules(model, ["0"]), False, "fp8_static")
    assert not chosen
    assert reasons == {
        "0": "skipped by the rule '0'",
        "1": "its weight is tied to 2",
        "2": "its weight is tied to 1",
    }
    assert select(model, skip_rules(model, ["0"]), True, "fp8_static")[0].keys() == {"1", "2"}
    assert select(model[0], skip_rules(model[0], ()), False, "fp8_static")[1] == {
        "": "it is the whole model, which cannot be replaced in place"
    }


@pytest.mark.parametrize(
    ("rule", "path", "expected"),
    [
        ("re:.*gate", "layers.0.mlp.gate_proj", True),
        ("re:layers.0", "layers.0.mlp.gate", True),
        ("re:mlp", "layers.0.mlp.gate", False),
        ("re:.*mlp$", "layers.0.mlp.gate", False),
        ("re:.*mlp$", "layers.0.mlp", True),
        ("re:.*[.](q|k)_proj$", "layers.1.k_proj", True),
    ],
)
def test_regular_expressions_start_at_the_beginning(rule: str, path: str, expected: bool) -> None:
    assert matches(path, rule) is expected


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(32, 32) for _ in range(4))
        self.gate_proj, self.up_proj, self.gate = (nn.Linear(32, 32) for _ in range(3))


class Stack(nn.Module):
    def __init__(self, config: object = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.lm_head = nn.Linear(32, 32)
        self.config = SimpleNamespace(quantization_config=config) if config is not None else None


CONFIGS = [
    {"modules_to_not_convert": ["lm_head", "layers.0.gate", "not.there"], "ignore": None},
    SimpleNamespace(to_dict=lambda: {"ignore": ["lm_head", "re:.*0[.]gate$", "re:vision.*"]}),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["dict", "object"])
def test_what_the_config_of_a_model_leaves_alone(config: object) -> None:
    """A rule there that matches nothing is no mistake: such lists name parts that a model may lack."""
    model = Stack(config)
    chosen, reasons = select(model, skip_rules(model, "o_proj"), False, "fp8_token")
    assert reasons.keys() == {"lm_head", "layers.0.gate", "layers.0.o_proj", "layers.1.o_proj"}
    assert reasons["lm_head"] == "skipped by 'lm_head' in the model's quantization_config"
    assert reasons["layers.1.o_proj"] == "skipped by the rule 'o_proj'"
    assert {"layers.0.gate_proj", "layers.1.gate"} < chosen.keys()


def test_a_rule_of_ones_own_that_matches_nothing() -> None:
    with pytest.raises(SkipError, match=r"'re:vision\.\*' matches no module"):
        skip_rules(Stack(), "re:vision.*")


def test_shards_of_a_packed_layer_must_agree() -> None:
    listed = "layers.0.v_proj beside q_proj, k_proj; layers.1.up_proj beside gate_proj"
    with pytest.warns(ShardWarning, match=listed) as caught:
        report = quantize_(Stack(), "fp8_token", skip=["layers.0.v_proj", "layers.1.up_proj"])
    assert caught[0].filename == __file__
    assert "layers.0.q_proj" in {record.where for record in report.quantized}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(Stack(), "fp8_token", skip=["layers.0", "layers.1.gate", "o_proj", "re:.*1[.](gate|up)_proj"])


def test_every_pack_is_found() -> None:
    assert list(packs(Stack())) == [
        [f"layers.{i}.{name}" for name in names]
        for i in range(2)
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    ]
    assert not list(packs(nn.ModuleDict({"q_proj": nn.Linear(2, 2), "k_proj": nn.Linear(2, 2)})))
