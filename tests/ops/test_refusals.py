"""What the kernels' plans refuse: one case for each reason, on tensors that are never read."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fusionpass.arch import Arch
from fusionpass.op import Op
from fusionpass.ops import (
    gated_rms_norm,
    gated_rms_norm_quantize,
    layer_norm,
    quantize,
    rms_norm,
    rms_norm_quantize,
    silu_mul,
    silu_mul_quantize,
)
from fusionpass.tuning import store
from fusionpass.tuning.files import Name, merge
from fusionpass.tuning.rows import row_key

pytest.importorskip("triton")

H100 = Arch("sm_90")
WIDTH = 64
BF16 = torch.bfloat16


def planned(op: Op, **changes: Any) -> Any:
    made = op.bind((), op.sample(6, WIDTH, BF16, "cpu", torch.Generator()))
    return op.plan(H100, {**made, **changes})


def zeros(*shape: int, dtype: torch.dtype = BF16, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


def modulated(op: Op, scale: torch.Tensor, shift: torch.Tensor) -> Any:
    return planned(op, x=zeros(2, 3, WIDTH), weight=None, bias=None, mod_scale=scale, mod_shift=shift)


F64 = zeros(6, WIDTH, dtype=torch.float64)
TURNED = zeros(2, 3, WIDTH).transpose(0, 1)
ONE = zeros(WIDTH)
PER_BATCH = zeros(2, 1, WIDTH)


@pytest.mark.parametrize(
    ("op", "changes", "reason"),
    [
        (silu_mul, {"gate": F64, "up": F64}, "gate is torch.float64 (6, 64), up is torch.float64 (6, 64)"),
        (silu_mul, {"gate": TURNED, "up": TURNED}, "gate has strides (64, 192, 1): its rows are not evenly spaced"),
        (silu_mul, dict.fromkeys(("gate", "up"), zeros(6, 129)[:, :128:2]), "odd row strides"),
        (silu_mul_quantize, {"scale_3": torch.ones(2)}, "the scale is not one element"),
        (quantize, {"x": zeros(6, 128)[:, ::2]}, "x has stride 2 in its last dimension, not 1"),
        (quantize, {"x": zeros(6, WIDTH)[0, 0]}, "x has no dimensions"),
        (rms_norm, {"x": zeros(6, WIDTH)[0, 0]}, "the rows are empty"),
        (rms_norm, {"weight": ONE.double()}, "the weight is torch.float64 (64,) on cpu, not a dense vector of 64"),
        (rms_norm, {"weight": ONE.to("meta")}, "the weight is torch.bfloat16 (64,) on meta, not a dense vector of 64"),
        (layer_norm, {"bias": ONE.double()}, "the bias is torch.float64 (64,) on cpu, not a dense vector of 64"),
        (rms_norm_quantize, {"scale": None}, "the scale is not one element"),
        (rms_norm_quantize, {"scale_2": torch.ones(2)}, "the scale is not one element"),
        (gated_rms_norm, {"gate": F64}, "the gate is torch.float64 (6, 64) on cpu"),
        (gated_rms_norm, {"gate": zeros(6, WIDTH, device="meta")}, "the gate is torch.bfloat16 (6, 64) on meta"),
        (gated_rms_norm_quantize, {"scale": None}, "the scale is not one element"),
        (gated_rms_norm_quantize, {"scale_5": torch.ones(2)}, "the scale is not one element"),
    ],
)
def test_inputs(op: Op, changes: dict[str, Any], reason: str) -> None:
    assert planned(op, **changes) == (None, f"triton: {reason}")


@pytest.mark.parametrize(
    ("by", "reason"),
    [
        (ONE.double(), "is torch.float64 (64,) with strides (1,) on cpu"),
        (ONE.to("meta"), "is torch.bfloat16 (64,) with strides (1,) on meta"),
        (zeros(2 * WIDTH)[::2], "is torch.bfloat16 (64,) with strides (2,) on cpu"),
        (zeros(2, 3, 1), "is torch.bfloat16 (2, 3, 1) with strides (3, 1, 1) on cpu"),
        (zeros(1)[0], "is torch.bfloat16 () with strides () on cpu"),
        (zeros(3, 2, WIDTH).transpose(0, 1), "has strides (64, 128, 1): its rows are not evenly spaced"),
        (zeros(3, WIDTH), "has shape (3, 64) for x of (2, 3, 64)"),
        (zeros(3, 1, WIDTH), "has shape (3, 1, 64) for x of (2, 3, 64)"),
        (zeros(1, 3, WIDTH), "has shape (1, 3, 64) for x of (2, 3, 64)"),
    ],
)
def test_modulations(by: torch.Tensor, reason: str) -> None:
    for scale, shift in ((by, ONE), (ONE, by), (by, PER_BATCH), (PER_BATCH, by)):
        assert modulated(layer_norm, scale, shift) == (None, f"triton: the modulation {reason}")


@pytest.mark.parametrize(
    ("scale", "shift", "expected"),
    [
        (ONE, ONE, (1, 0, 0)),
        (PER_BATCH, PER_BATCH, (3, WIDTH, WIDTH)),
        (PER_BATCH, ONE, (3, WIDTH, 0)),
        (ONE, PER_BATCH, (3, 0, WIDTH)),
        (zeros(2, 3, 80)[..., :WIDTH], zeros(2, 3, WIDTH), (1, 80, WIDTH)),
        (zeros(2, 3, WIDTH), zeros(1, 1, WIDTH), (1, WIDTH, 0)),
    ],
)
def test_how_rows_share_a_modulation(scale: torch.Tensor, shift: torch.Tensor, expected: tuple[int, int, int]) -> None:
    launch, why = modulated(rms_norm, scale, shift)
    assert launch is not None, why
    assert tuple(launch.args[name] for name in ("per_modulation", "scale_row", "shift_row")) == expected


def test_modulations_that_rows_share_differently() -> None:
    reason = "triton: mod_scale and mod_shift are shared by different numbers of rows"
    for scale, shift in ((PER_BATCH, zeros(2, 3, WIDTH)), (zeros(2, 3, WIDTH), PER_BATCH)):
        assert modulated(rms_norm, scale, shift) == (None, reason)


@pytest.mark.parametrize(
    ("op", "names", "scheme"),
    [
        (quantize, ("x",), "fp8_static"),
        (quantize, ("x",), "fp8_token"),
        (quantize, ("x",), "mxfp8"),
        (rms_norm, ("x",), None),
        (gated_rms_norm, ("x", "gate"), None),
        (silu_mul, ("gate", "up"), None),
    ],
)
def test_a_symbolic_width_is_refused_and_adds_no_guard(op: Op, names: tuple[str, ...], scheme: str | None) -> None:
    environment = ShapeEnv()
    dims = StatelessSymbolicContext([DimDynamic.STATIC, DimDynamic.DYNAMIC])
    x = FakeTensorMode(shape_env=environment).from_tensor(zeros(6, WIDTH), symbolic_context=dims)
    changes: dict[str, Any] = dict.fromkeys(names, x)
    if scheme is not None:
        changes |= {"scheme": scheme, "scale": torch.ones(()) if scheme == "fp8_static" else None}
    assert planned(op, **changes) == (None, "triton: the width is symbolic")
    assert not environment.guards


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert planned(rms_norm) == (None, "triton: triton is not installed here")


def test_a_cell_that_was_measured_faster_without_a_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSIONPASS_CONFIG_DIR", str(tmp_path))
    name = Name.of("rms_norm", row_key(None, WIDTH, 2), store.STAND_IN["sm_90"])
    merge(tmp_path, name, {4: None}, {4: {"us": 3.0, "beside_us": {"inductor": 2.5}}})
    where = "at 4 rows, width=64,bytes=2, on NVIDIA_H100_80GB_HBM3"
    reason = f"triton: inductor: measured faster (2.50 against 3.00 µs {where})"
    assert planned(rms_norm) == (None, reason)
    assert planned(rms_norm, x=zeros(9, WIDTH))[0] is not None
