"""What the tests of products with scales along K share: arguments to draw, and the check against exact arithmetic."""

import dataclasses
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st

from fusionpass.arch import Arch
from fusionpass.launch import Launch
from fusionpass.ops import block_scaled_mm, dequantize, quantize
from fusionpass.ops.gemm import OUTPUTS
from fusionpass.ops.gemm.blocks import _dequantized, group_of
from fusionpass.ops.quant.scheme import Scheme
from tests.kernels import poisoned

KINDS = {
    "fp8": ("fp8_group128", "fp8_block128"),
    "fp8_columns": ("fp8_group128,layout=column_major", "fp8_group128"),
    "fp8_powers": ("fp8_group128,scale_dtype=float8_e8m0fnu", "fp8_group128,scale_dtype=float8_e8m0fnu"),
    "int8": ("int8_group128", "int8_block128"),
    "mxfp8": ("mxfp8", "mxfp8"),
    "mxfp8_swizzled": ("mxfp8,layout=swizzled", "mxfp8,layout=swizzled"),
    "nvfp4": ("nvfp4", "nvfp4"),
    "nvfp4_swizzled": ("nvfp4,layout=swizzled", "nvfp4,layout=swizzled"),
}
"""The schemes of both operands by a name."""
LIBRARIES = ("flashinfer_trtllm", "flashinfer_cute_dsl", "flashinfer_cutlass", "cublas", "deep_gemm")
KERNEL = frozenset(LIBRARIES)
"""Disabled: what is asked for is our kernel."""


def backend(name: str) -> Any:
    """The plan of a backend of the op."""
    return next(backend.plan for backend in block_scaled_mm.backends if backend.name == name)


def operand(rows: int, k: int, scheme: str, generator: torch.Generator, device: str = "cpu") -> list[torch.Tensor]:
    """Codes, scales and what these are relative to, if anything, of a random matrix."""
    kind = Scheme.parse(scheme)
    x = torch.randn(rows, k, generator=generator, device=device)
    given = [x.abs().amax() / (448 * 6)] if kind.takes_scale else []
    return [*quantize.reference(x, given[0] if given else None, scheme), *given]


def product_of(kind: str, rows: int, columns: int, k: int, device: str = "cpu", **changes: Any) -> dict[str, Any]:
    """Arguments of that size."""
    schemes, generator = KINDS[kind], torch.Generator(device).manual_seed(rows * columns + k)
    a, b = (operand(n, k, scheme, generator, device) for n, scheme in zip((rows, columns), schemes, strict=True))
    made = {"a": a[0], "b": b[0], "a_scale": a[1], "b_scale": b[1], "a_scheme": schemes[0], "b_scheme": schemes[1]}
    if len(a) > 2:
        made |= {"a_global_scale": a[2], "b_global_scale": b[2]}
    return block_scaled_mm.bind((), {**made, **changes})


@st.composite
def arguments_for_product(draw: Any, device: str, rows: int, columns: int, k: int) -> dict[str, Any]:
    """Of sizes up to those given; the rows of codes may be wider than K, what lies between them is poison."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    group = Scheme.parse(KINDS[kind][0]).group
    assert group is not None
    m, n = draw(st.integers(1, rows)), draw(st.integers(1, columns))
    made = product_of(kind, m, n, group * draw(st.integers(1, max(1, k // group))), device)
    for name in ("a", "b"):
        wide = torch.full((made[name].shape[0], made[name].shape[1] + draw(st.integers(0, 20))), 0x7F, device=device)
        wide = wide.to(torch.uint8)
        wide[:, : made[name].shape[1]] = made[name].view(torch.uint8)
        made[name] = wide.view(made[name].dtype)[:, : made[name].shape[1]]
    bias = torch.randn(n, device=device).to(draw(st.sampled_from([*OUTPUTS.values()])))
    return made | {"bias": draw(st.sampled_from([None, bias])), "out_dtype": draw(st.sampled_from([*OUTPUTS]))}


def exact(arguments: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The product of what the codes stand for in float64, and by how much roundings in float32 may change it."""
    x, w = (
        _dequantized(
            arguments[name], arguments[f"{name}_scale"], Scheme.parse(arguments[f"{name}_scheme"]), None
        ).double()
        for name in ("a", "b")
    )
    both = [arguments[f"{name}_global_scale"] for name in ("a", "b") if arguments[f"{name}_global_scale"] is not None]
    factor = 1.0 if not both else float(both[0].double() * both[1].double())
    result, terms = x @ w.t() * factor, x.abs() @ w.abs().t() * factor
    if arguments["bias"] is not None:
        result, terms = result + arguments["bias"].double(), terms + arguments["bias"].double().abs()
    # A rounding at each addition, two for each pair of scales, two for those of all, and one for the bias.
    allowed = (x.shape[1] + 8) * 2.0**-24 * terms
    if arguments["a"].is_cuda and torch.cuda.get_device_capability()[0] == 9 and x.shape[0] > 1:
        allowed = allowed + _dropped(arguments)
    return result, allowed


def _dropped(arguments: Mapping[str, Any]) -> torch.Tensor:
    """What Hopper's FP8 units may lose: of sums of 32 products, what lies more than 13 bits below the largest."""
    from tests.gemm import _dropped as of_codes

    kind = Scheme.parse(arguments["a_scheme"])
    if group_of(kind) != 128 or kind.dtype == torch.int8:
        # Those are multiplied in 16 bits, or in whole numbers.
        return torch.zeros((), device=arguments["a"].device)
    lost: Any = 0.0
    a, b = (arguments[name].double() for name in "ab")
    scaled = [
        _dequantized(
            torch.ones_like(arguments[n].float()).to(arguments[n].dtype),
            arguments[f"{n}_scale"],
            Scheme.parse(arguments[f"{n}_scheme"]),
            None,
        ).double()
        for n in "ab"
    ]
    for start in range(0, a.shape[1], 128):
        part = slice(start, start + 128)
        lost = lost + of_codes(a[:, part], b[:, part].t()) * scaled[0][:, start, None] * scaled[1][None, :, start]
    return lost


def check_product(arch: Arch, arguments: dict[str, Any], cut: Any = None, **changes: Any) -> torch.Tensor:
    """Run the kernels: within the roundings of float32 arithmetic, and one to the output's dtype, of what is exact.

    Args:
        arch: the target.
        arguments: of `block_scaled_mm`.
        cut: instead of the planned one.
        changes: of the launch's arguments.
    """
    planned = mock.patch("fusionpass.ops.gemm.blocks_triton.configure", return_value=cut)
    with planned if cut else mock.MagicMock():
        launch, reason = block_scaled_mm.plan(arch, arguments, KERNEL)
    assert isinstance(launch, Launch), reason
    if changes:
        before = tuple(dataclasses.replace(one, args={**one.args, **changes}) for one in launch.before)
        own = changes if not before else {}
        launch = dataclasses.replace(launch, args={**launch.args, **own}, before=before)
    with poisoned():
        (got,) = launch.run()
    expected, slack = exact(arguments)
    assert (got.shape, got.dtype, got.is_contiguous()) == (expected.shape, OUTPUTS[arguments["out_dtype"]], True)
    finest = torch.finfo(got.dtype)
    step = torch.maximum(expected.abs() * finest.eps, torch.tensor(finest.smallest_normal * finest.eps)) / 2
    wrong = ~((got.double() - expected).abs() <= slack * (1 + finest.eps) + step)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}, the first at {wrong.nonzero()[0].tolist()}"
    return got


__all__ = ["KINDS", "arguments_for_product", "check_product", "dequantize", "exact", "operand", "product_of"]
