"""What the kernels' tests share, in Triton's interpreter and on a GPU: arguments to draw, and the checks."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st

from fusionpass.arch import Arch
from fusionpass.launch import Empty
from fusionpass.op import EXACT, Op
from fusionpass.ops import (
    add_rms_norm,
    add_rms_norm_quantize,
    gelu_mul,
    gelu_mul_quantize,
    quantize,
    rms_norm,
    rms_norm_quantize,
    silu_mul,
    silu_mul_quantize,
)
from fusionpass.testing import difference, exact, relative_error

KERNEL_OPS = (
    quantize, rms_norm, add_rms_norm, rms_norm_quantize, add_rms_norm_quantize,
    silu_mul, gelu_mul, silu_mul_quantize, gelu_mul_quantize,
)  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
POISON = 0xA5
GUARD = 256


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every output starts as garbage between two guards, which must be intact at the end."""
    buffers: list[torch.Tensor] = []

    def new(empty: Empty, device: torch.device) -> torch.Tensor:
        size = math.prod(empty.shape) * empty.dtype.itemsize
        buffers.append(torch.full((GUARD + size + GUARD,), POISON, dtype=torch.uint8, device=device))
        return buffers[-1][GUARD : GUARD + size].view(empty.dtype).view(empty.shape)

    with mock.patch.object(Empty, "new", new):
        yield
    for buffer in buffers:
        assert (buffer[:GUARD] == POISON).all(), "written before the output"
        assert (buffer[-GUARD:] == POISON).all(), "written past the output"


def check(op: Op, arch: Arch, arguments: Mapping[str, Any], early: bool = False) -> list[torch.Tensor]:
    """Run the kernel of `op`: within the op's tolerance of the reference, and no further than it from float64."""
    launch, reason = op.plan(arch, arguments)
    assert launch is not None, reason
    with poisoned():
        outputs = (launch.reading_early() if early else launch).run()
    expected = [op.reference(**arguments)] if op.single else op.reference(**arguments)
    names = op.outputs(arguments)
    assert len(outputs) == len(names)
    for name, output, want in zip(names, outputs, expected, strict=True):
        # A wide weight makes the product float32, but the normalised value in it was rounded as x is.
        narrow = output.dtype == torch.float32 and name == "norm"
        kind = arguments["x"].dtype if narrow else output.dtype
        found = difference(output.to(kind), want.to(kind), op.tolerance.get(name, EXACT).floor)
        assert found.within(op.tolerance.get(name, EXACT)), f"{name}: {found}"
    compare_with_exact(op, arguments, outputs, expected)
    return outputs


def compare_with_exact(
    op: Op, arguments: Mapping[str, Any], outputs: list[torch.Tensor], expected: list[torch.Tensor]
) -> None:
    steps = 1.0
    for output, want, oracle in zip(outputs, expected, exact(op, arguments), strict=True):
        if not oracle.isfinite().all() or not want.double().isfinite().all() or not oracle.numel():
            continue
        # One element may land on its other neighbour, so a small tensor may be off by more than a twentieth.
        slack = steps * torch.finfo(output.dtype).eps / math.sqrt(oracle.numel()) + 1e-6
        assert relative_error(output, oracle) <= 1.05 * relative_error(want, oracle) + slack


@st.composite
def shapes(draw: st.DrawFn, most_rows: int, widths: st.SearchStrategy[int]) -> tuple[int, ...]:
    rows = draw(st.integers(0, most_rows))
    outer = draw(st.sampled_from([(), (1,), (2,)]))
    return (*outer, rows, draw(widths))


@st.composite
def values(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Random values with a row stride of their own, and now and then a zero row, an infinity or a NaN."""
    generator = torch.Generator(device).manual_seed(draw(st.integers(0, 2**31)))
    pad = draw(st.sampled_from([0, 0, 1, 8, 16]))
    wide = torch.randn((*shape[:-1], shape[-1] + pad), generator=generator, device=device)
    wide *= draw(st.sampled_from([1e-3, 1.0, 30.0]))
    made = wide.to(dtype)[..., : shape[-1]]
    odd = draw(st.sampled_from(["none", "none", "zero row", "inf", "nan", "large"]))
    if made.numel():
        rows = made.view(-1, shape[-1]) if not pad else made.flatten(0, -2) if made.dim() > 1 else made[None]
        row, column = draw(st.integers(0, rows.shape[0] - 1)), draw(st.integers(0, shape[-1] - 1))
        if odd == "zero row":
            rows[row] = 0
        elif odd != "none":
            rows[row, column] = {"inf": -math.inf, "nan": math.nan, "large": torch.finfo(dtype).max / 2}[odd]
    return made


@st.composite
def arguments_for(
    draw: st.DrawFn, op: Op, shape: tuple[int, ...], device: str, schemes: tuple[str, ...]
) -> dict[str, Any]:
    """Arguments of `op` by the names in its signature."""
    dtype = draw(st.sampled_from(DTYPES))
    wanted = op.signature.parameters
    activations = [name for name in ("x", "residual", "gate", "up") if name in wanted]
    made: dict[str, Any] = {name: draw(values(shape, dtype, device)) for name in activations}
    if "approximate" in wanted:
        made["approximate"] = draw(st.sampled_from(["none", "tanh"]))
    if "weight" in wanted:
        generator = torch.Generator(device).manual_seed(draw(st.integers(0, 2**31)))
        weight = torch.randn(shape[-1], generator=generator, device=device)
        made["weight"] = weight.to(draw(st.sampled_from([dtype, dtype, *DTYPES])))
        made["eps"] = draw(st.sampled_from([1e-6, 1e-5, 1e-12, 0.1]))
    if "scheme" in wanted:
        step = draw(st.sampled_from([0.01, 1.0, 7.3, 2.0**-9]))
        scale_shape = draw(st.sampled_from([(), (1,), (1, 1)]))
        scale_dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
        made["scale"] = torch.full(scale_shape, step, dtype=scale_dtype, device=device)
        made["scheme"] = draw(st.sampled_from(schemes))
    for option in op.options.values():
        made[option] = draw(st.booleans())
    return op.bind((), made)
