"""What the tests of products share: arguments to draw, and the check against exact arithmetic."""

from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st

from fusionpass.arch import Arch
from fusionpass.launch import Launch
from fusionpass.ops import scaled_mm, scaled_mms
from fusionpass.ops.gemm import OUTPUTS
from fusionpass.ops.gemm.dispatch import KINDS, SINGLE
from fusionpass.ops.gemm.several import WEIGHTS
from tests.kernels import poisoned

FP8, INT8 = torch.float8_e4m3fn, torch.int8


def codes(rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator, device: str = "cpu") -> torch.Tensor:
    if dtype == INT8:
        return torch.randint(-128, 128, (rows, columns), generator=generator, device=device, dtype=INT8)
    return torch.randn(rows, columns, generator=generator, device=device).mul(64).clamp(-448, 448).to(dtype)


def product_of(
    rows: int, columns: int, k: int, dtype: torch.dtype = FP8, device: str = "cpu", **changes: Any
) -> dict[str, Any]:
    """Arguments of that size, with a scale for each row and column."""
    generator = torch.Generator(device).manual_seed(0)
    given = {
        "a": codes(rows, k, dtype, generator, device),
        "b": codes(columns, k, dtype, generator, device).t(),
        "a_scale": torch.rand(rows, 1, generator=generator, device=device).add(0.5),
        "b_scale": torch.rand(1, columns, generator=generator, device=device).add(0.5),
    }
    return scaled_mm.bind((), {**given, **changes})


@st.composite
def arguments_for_product(
    draw: Any,
    device: str,
    rows: int,
    columns: int,
    k: int,
    dtypes: tuple[torch.dtype, ...] = (FP8, INT8),
    least: int = 1,
) -> dict[str, Any]:
    """Of sizes up to those given; the rows and columns may be wider than K, what lies between them is poison."""
    m, n = draw(st.integers(1, rows)), draw(st.integers(least, columns))
    k = 16 * draw(st.integers(1, k // 16))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator(device).manual_seed(draw(st.integers(0, 2**31)))

    def operand(size: int) -> torch.Tensor:
        wide = codes(size, k + 16 * draw(st.integers(0, 2)), dtype, generator, device)
        wide.view(torch.uint8)[:, k:] = 0x7F
        return wide[:, :k]

    def scale(*shape: int) -> torch.Tensor:
        # With one scale for each matrix, more than a few rows are not the kernel's.
        shapes = [shape] if m > SINGLE else [(), shape]
        return torch.rand(draw(st.sampled_from(shapes)), generator=generator, device=device).add(0.5).div(64)

    bias = torch.randn(n, generator=generator, device=device).to(draw(st.sampled_from([*OUTPUTS.values()])))
    return {
        "a": operand(m),
        "b": operand(n).t(),
        "a_scale": scale(m, 1),
        "b_scale": scale(1, n),
        "bias": draw(st.sampled_from([None, bias])),
        "out_dtype": draw(st.sampled_from([*OUTPUTS])),
        "fast_accum": False,
    }


def exact(arguments: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The product in float64, and by how much the order of a float32 sum may change it."""
    a, b, *scales = (arguments[name].double() for name in ("a", "b", "a_scale", "b_scale"))
    k = a.shape[1]
    result, terms = (x @ y * scales[0] * scales[1] for x, y in ((a, b), (a.abs(), b.abs())))
    sums = 0 if arguments["a"].dtype == INT8 else k
    if arguments["bias"] is not None:
        result = result + arguments["bias"].double()
        terms = terms + arguments["bias"].double().abs()
    # A rounding at each addition, two for the scales, and one for the bias.
    allowed = (sums + 4) * 2.0**-24
    if sums and arguments["a"].is_cuda and arguments["a"].shape[0] > 1 and torch.cuda.get_device_capability()[0] == 9:
        return result, allowed * terms + _dropped(a, b) * scales[0] * scales[1]
    return result, allowed * terms


def _dropped(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What Hopper's matrix units may lose of `a @ b`.

    They add 32 products at a time to what they summed before, at most 128, and of each drop what lies more than 13 bits
    below the largest.
    """
    lost = a.new_zeros(a.shape[0], b.shape[1])
    for start in range(0, a.shape[1], 128):
        summed = torch.zeros_like(lost)
        for x, y in zip(a[:, start : start + 128].split(32, 1), b[start : start + 128].split(32), strict=True):
            largest = (x.abs()[:, :, None] * y.abs()[None]).amax(1)
            lost += (x.shape[1] + 1) * 2.0**-13 * torch.maximum(largest, summed.abs())
            summed += x @ y
    return lost


def check_linear(
    arch: Arch,
    rows: int,
    columns: int,
    k: int,
    cut: Any = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Run the kernels of `linear_bf16_fp32`: within the roundings of a float32 sum of what is exact.

    Those of `linear` too: rounded once, with a bias and without.
    """
    from fusionpass.ops.gemm.stream import plan_linear, plan_router

    generator = torch.Generator(device).manual_seed(rows * columns + k)
    x, w, bias = (
        torch.randn(shape, generator=generator, device=device).to(dtype)
        for shape in ((rows, k), (columns, k), (columns,))
    )
    a, b = x.double(), w.double().t()
    anywhere = mock.patch.dict(KINDS["bf16"], triton=KINDS["bf16_fp32"]["triton"])  # not only where it was measured
    for added in ("router", None, bias):
        patch = mock.patch("fusionpass.ops.gemm.stream.configure", return_value=cut) if cut else mock.MagicMock()
        with patch, anywhere:
            launch = plan_router(arch, x, w) if isinstance(added, str) else plan_linear(arch, x, w, added)
        assert isinstance(launch, Launch), launch
        with poisoned():
            (got,) = launch.run()
        to = torch.float32 if isinstance(added, str) else dtype
        assert (got.shape, got.dtype, got.is_contiguous()) == ((rows, columns), to, True)
        terms, exact = a.abs() @ b.abs(), a @ b
        if isinstance(added, torch.Tensor):
            terms, exact = terms + added.double().abs(), exact + added.double()
        rounding = 0 if isinstance(added, str) else torch.finfo(dtype).eps / 2 * exact.abs() * 1.01
        assert ((got.double() - exact).abs() <= (k + 2) * 2.0**-24 * terms + rounding).all()


def each_of(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`scaled_mms`'s arguments as several of `scaled_mm`."""
    common = {name: arguments[name] for name in ("a", "a_scale", "out_dtype", "fast_accum")}
    return [
        common | {name: arguments[f"{name}{which}"] for name in ("b", "b_scale", "bias")}
        for which in WEIGHTS
        if arguments.get(f"b{which}") is not None
    ]


@st.composite
def arguments_for_products(draw: Any, device: str, rows: int, columns: int, k: int) -> dict[str, Any]:
    """Two or three weights of the same kinds, each with as many columns as it likes."""
    first = draw(arguments_for_product(device, rows, columns, k, least=2))
    generator = torch.Generator(device).manual_seed(draw(st.integers(0, 2**31)))
    made = dict(first)
    for which in WEIGHTS[1 : draw(st.integers(2, 3))]:
        n = draw(st.integers(2, columns))
        made[f"b{which}"] = codes(n, first["b"].shape[0], first["b"].dtype, generator, device).t()
        one = first["b_scale"].dim() == 0
        made[f"b_scale{which}"] = torch.rand(() if one else (1, n), generator=generator, device=device).add(0.5).div(64)
        if first["bias"] is not None:
            bias = torch.randn(n, generator=generator, device=device)
            made[f"bias{which}"] = bias.to(first["bias"].dtype)
    return scaled_mms.bind((), made)


def check_product(arch: Arch, arguments: dict[str, Any], cut: Any = None) -> torch.Tensor:
    """Run the kernels: within the roundings of float32 arithmetic, and one to the output's dtype, of what is exact.

    With arguments of `scaled_mms`, all of its products; the first is returned.
    """
    op = scaled_mms if "b_2" in arguments else scaled_mm
    with mock.patch("fusionpass.ops.gemm.stream.configure", return_value=cut) if cut else mock.MagicMock():
        launch, reason = op.plan(arch, arguments)
    assert isinstance(launch, Launch), reason
    with poisoned():
        results = launch.run()
    for got, given in zip(results, each_of(arguments), strict=True):
        expected, slack = exact(given)
        assert (got.shape, got.dtype, got.is_contiguous()) == (expected.shape, OUTPUTS[given["out_dtype"]], True)
        finest = torch.finfo(got.dtype)
        step = torch.maximum(expected.abs() * finest.eps, torch.tensor(finest.smallest_normal * finest.eps)) / 2
        wrong = ~((got.double() - expected).abs() <= slack * (1 + finest.eps) + step)
        assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}, the first at {wrong.nonzero()[0].tolist()}"
    return results[0]
