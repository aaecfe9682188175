"""A call in eager mode on a GPU: a kernel runs only what the op's reference takes. No GPU is needed to see that."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fusionpass.arch import Arch
from fusionpass.errors import ArgumentError
from fusionpass.launch import Launch
from fusionpass.op import OPS, Backend, Op
from fusionpass.ops import gelu_mul, layer_norm, quantize, rms_norm, rms_norm_quantize

pytest.importorskip("triton")
from tests.fake_gpu import fake_gpu

GROUPS = {"x": torch.zeros(4, 100), "scale": None, "scheme": "fp8_group128"}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """What would be launched on an H100."""
    found: list[Launch] = []

    def run(self: Launch) -> list[str]:
        found.append(self)
        return [*self.returns]

    monkeypatch.setattr(Launch, "run", run)
    with fake_gpu("sm_90"):
        yield found


def sample(op: Op, **changed: Any) -> dict[str, Any]:
    return {**op.sample(4, 256, torch.bfloat16, "cpu", torch.Generator().manual_seed(0)), **changed}


def run(op: Op, arguments: dict[str, Any]) -> Any:
    """What the op does with such tensors of a GPU."""
    mode = FakeTensorMode()

    def there(value: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")

    return op._run(**{k: there(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})


@pytest.mark.parametrize(
    ("op", "wrong"),
    [
        (rms_norm, {"rounding": "never"}),
        (layer_norm, {"rounding": "never"}),
        (layer_norm, {"mod_shift": None}),
        (layer_norm, {"mod_scale": None}),
        (gelu_mul, {"approximate": "x"}),
        (quantize, GROUPS),
        (rms_norm_quantize, {**GROUPS, "weight": torch.zeros(100)}),
    ],
    ids=lambda value: str(value) if isinstance(value, Op) else " ".join(value),
)
def test_what_the_reference_refuses_is_not_launched(launched: list[Launch], op: Op, wrong: dict[str, Any]) -> None:
    for _ in range(2):
        with pytest.raises(ArgumentError) as there:
            run(op, sample(op, **wrong))
    with pytest.raises(ArgumentError) as here:
        op.reference(**sample(op, **wrong))
    assert str(there.value) == str(here.value)
    assert not launched


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.backends and op.namespace == "fusionpass"], ids=str)
def test_what_it_takes_is_asked_once(launched: list[Launch], monkeypatch: pytest.MonkeyPatch, op: Op) -> None:
    asked: list[torch.device] = []
    reference = op.reference

    def asking(*args: Any, **kwargs: Any) -> Any:
        asked.append(next(v.device for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)))
        return reference(*args, **kwargs)

    monkeypatch.setattr(op, "reference", asking)
    monkeypatch.setattr(op, "_taken", {})
    arguments = sample(op)
    for _ in range(3):
        run(op, arguments)
    assert len(launched) == 3
    assert asked == [torch.device("meta")]


def test_each_signature_is_asked_of(launched: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(arch: Arch, **arguments: Any) -> Launch:
        return Launch(None, (1,), arguments, ("y",))

    asked: list[tuple[Any, ...]] = []

    def sampled(tokens: int, width: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, Any]:
        return {"x": torch.zeros(tokens, width, dtype=dtype, device=device)}

    def counted(x: torch.Tensor, times: float = 1.0) -> torch.Tensor:
        """A product."""
        asked.append((tuple(x.shape), x.dtype, times))
        return x * times

    op = Op("counted", "fusionpass_eager", counted, lambda _: ("y",), sampled, {}, {}, [Backend("test", plan)])
    calls: list[Callable[[], Any]] = [
        lambda: run(op, {"x": torch.zeros(4, 8)}),
        lambda: run(op, {"x": torch.zeros(5, 8)}),
        lambda: run(op, {"x": torch.zeros(4, 8).half()}),
        lambda: run(op, {"x": torch.zeros(4, 8), "times": 2.0}),
        lambda: run(op, {"x": torch.zeros(4, 8), "times": True}),
    ]
    for call in calls * 3:
        call()
    assert len(asked) == len(calls)
    assert len(launched) == 3 * len(calls)
    monkeypatch.setattr(importlib.import_module("fusionpass.op"), "_REMEMBERED", 2)
    run(op, {"x": torch.zeros(6, 8)})
    assert len(op._taken) == 1, "there is a bound to what is kept"


def test_what_no_one_can_ask_of_the_reference_is_run_by_it(launched: list[Launch]) -> None:
    """It reads a value, which only its arguments have."""

    def peeking(x: torch.Tensor) -> torch.Tensor:
        """Zero where the first is."""
        return x if x.flatten()[0].item() else torch.zeros_like(x)

    def plan(arch: Arch, **arguments: Any) -> Launch:
        return Launch(None, (1,), arguments, ("y",))

    op = Op("peeking", "fusionpass_eager", peeking, lambda _: ("y",), lambda *a: {}, {}, {}, [Backend("test", plan)])
    assert not op._takes({"x": torch.zeros(4)})
    assert op(torch.ones(4)).equal(torch.ones(4))
