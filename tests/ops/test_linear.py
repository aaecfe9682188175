"""linear and linear_bf16_fp32: what they compute, and what computes them where."""

import importlib.util
import re
from typing import Any

import pytest
import torch

from fusionpass import Config
from fusionpass.arch import Arch
from fusionpass.errors import ArgumentError
from fusionpass.launch import Late, Launch
from fusionpass.ops import linear, linear_bf16_fp32
from fusionpass.ops.gemm.dispatch import KINDS, Request, choose
from fusionpass.ops.gemm.stream import Cut, configure, refuse_cut
from fusionpass.session import Session
from tests.fake_gpu import codegen, needs_cuda_build

TARGETS = (
    "sm_80",
    "sm_86",
    "sm_89",
    "sm_90",
    "sm_100",
    "sm_103",
    "sm_120",
    "sm_121",
    "gfx942",
    "gfx950",
    "cpu",
    "sm_75",
)
KIND = "bf16_fp32"
ALGORITHMS = KINDS[KIND]
ROUTERS = [(768, 6144), (384, 3072), (256, 7168)]


def operands(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(m * n + k)
    x, w = (torch.randn(rows, k, generator=generator).bfloat16() for rows in (m, n))
    return x, w


@pytest.mark.parametrize("algo", ["auto", "upcast"])
@pytest.mark.parametrize("m", [0, 1, 7, 512])
def test_float32_sums_of_exact_products(m: int, algo: str) -> None:
    x, w = operands(m, 24, 3072)
    got = linear_bf16_fp32(x, w, algo)
    assert (got.shape, got.dtype) == ((m, 24), torch.float32)
    terms = x.double().abs() @ w.double().abs().t()
    assert ((got.double() - x.double() @ w.double().t()).abs() <= 3072 * 2.0**-24 * terms).all()


def test_strides() -> None:
    x, w = operands(6, 24, 128)
    wide = torch.zeros(12, 200).bfloat16()
    wide[::2, 8:136] = x
    expected = x.float() @ w.float().t()
    torch.testing.assert_close(linear_bf16_fp32(wide[::2, 8:136], w), expected)
    torch.testing.assert_close(linear_bf16_fp32(x, w.t().contiguous().t()), expected)


def test_compiled_whole() -> None:
    x, w = operands(6, 24, 128)
    compiled = torch.compile(lambda x, w: linear_bf16_fp32(x, w) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(x, w), linear_bf16_fp32(x, w) * 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algo": "cubls"}, "there is no algorithm 'cubls'. Did you mean 'cublas'?"),
        ({"algo": "cublas"}, "cublas cannot: cuBLAS is for NVIDIA GPUs, not cpu"),
        ({"algo": "triton"}, "triton cannot: the cpu has no Triton kernels"),
        ({"algo": "deep_gemm"}, "deep_gemm cannot: DeepGEMM is for sm_90 and sm_100, not cpu"),
        ({"x": torch.zeros(2, 3, 64).bfloat16()}, r"x is \(2, 3, 64\), w \(8, 64\)"),
        ({"x": torch.zeros(2, 32).bfloat16()}, r"x is \(2, 32\), w \(8, 64\)"),
        ({"x": torch.zeros(2, 64)}, "x is torch.float32, w torch.bfloat16"),
        ({"w": torch.zeros(8, 64).half()}, "x is torch.bfloat16, w torch.float16"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    x, w = operands(2, 8, 64)
    with pytest.raises(ArgumentError, match=message):
        linear_bf16_fp32(**{"x": x, "w": w, **changes})


@pytest.mark.parametrize("shape", ROUTERS, ids=str)
@pytest.mark.parametrize("name", TARGETS)
def test_the_choice_by_target(name: str, shape: tuple[int, int]) -> None:
    few, many = (choose(Arch(name), Request(KIND, rows, *shape)) for rows in (64, 65))
    gpu, nvidia = name not in ("cpu", "sm_75"), name.startswith("sm_") and name != "sm_75"
    assert few.algorithm == ("triton" if gpu else "upcast")
    assert many.algorithm == ("cublas" if nvidia else "upcast")
    if gpu:
        assert many.rejected["triton"] == "65 rows are bound by their products (at most 64)"
    reasons = {
        "cpu": {"triton": "the cpu has no Triton kernels", "cublas": "cuBLAS is for NVIDIA GPUs, not cpu"},
        "sm_75": {
            "triton": "Triton's kernels need sm_80 or newer, not sm_75",
            "cublas": "bfloat16 needs sm_80 or newer, not sm_75",
        },
    }
    if not gpu:
        assert few.rejected == reasons[name]
    for algo in ALGORITHMS:
        reason = ALGORITHMS[algo](Arch(name), Request(KIND, 64, *shape))
        if reason is None:
            assert choose(Arch(name), Request(KIND, 64, *shape), algo).algorithm == algo
        else:
            with pytest.raises(ArgumentError, match=f"{algo} cannot: "):
                choose(Arch(name), Request(KIND, 64, *shape), algo)


def test_what_each_algorithm_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    h100 = Arch("sm_90")

    def found(package: str) -> Any:
        return object() if package in there else None

    there = {"triton"}
    monkeypatch.setattr(importlib.util, "find_spec", found)
    assert ALGORITHMS["deep_gemm"](h100, Request(KIND, 8, 256, 7168)) == "the package deep_gemm is not installed"
    there.add("deep_gemm")
    assert ALGORITHMS["deep_gemm"](h100, Request(KIND, 8, 256, 7168)) is None
    assert ALGORITHMS["deep_gemm"](h100, Request(KIND, 8, 250, 7168)) == "N is 250 and K 7168, not multiples of 8 and 8"
    assert ALGORITHMS["deep_gemm"](h100, Request(KIND, 8, 256, 7172)) == "N is 256 and K 7172, not multiples of 8 and 8"
    assert ALGORITHMS["deep_gemm"](Arch("sm_120"), Request(KIND, 8, 256, 7168)) is not None
    assert ALGORITHMS["triton"](h100, Request(KIND, 8, 256, 100)) == "K is 100, not a multiple of 8"
    there.remove("triton")
    assert ALGORITHMS["triton"](h100, Request(KIND, 8, 256, 7168)) == "triton is not installed here"
    assert choose(h100, Request(KIND, 8, 256, 7168)).algorithm == "cublas"
    assert choose(h100, Request(KIND, None, 256, 7168)).rejected == {"triton": "triton is not installed here"}


def planned(name: str = "sm_90", **changes: Any) -> tuple[Any, str]:
    x, w = operands(8, 256, 512)
    return linear_bf16_fp32.plan(Arch(name), linear_bf16_fp32.bind((), {"x": x, "w": w, **changes}))


def test_what_is_planned() -> None:
    launch, why = planned()
    assert (why, isinstance(launch, Launch)) == ("triton", True)
    assert launch.all[0].args["a_scale"] is None
    assert launch.all[0].args["SUMMED"] == 0
    assert launch.all[0].args["DEPTH"] * 2 in (128, 256)
    assert planned(algo="cublas") == (None, "triton: cublas was asked for")
    assert planned(algo="upcast") == (None, "triton: upcast was asked for")
    x, _ = operands(65, 8, 512)
    assert planned(x=x) == (None, "triton: 65 rows are bound by their products (at most 64)")
    with pytest.raises(ArgumentError, match="triton cannot: 65 rows"):
        planned(x=x, algo="triton")
    with pytest.raises(ArgumentError, match="cublas cannot: cuBLAS is for NVIDIA GPUs, not gfx942"):
        planned("gfx942", algo="cublas")
    odd = torch.zeros(8, 516).bfloat16()[:, :512]
    assert planned(x=odd)[1] == "triton: a has strides (516, 1), not rows of 16 bytes each"


def test_symbolic_sizes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    _, w = operands(8, 256, 512)

    def fake(t: torch.Tensor, *symbolic: int) -> torch.Tensor:
        dims = [DimDynamic.DYNAMIC if d in symbolic else DimDynamic.STATIC for d in range(2)]
        made: torch.Tensor = mode.from_tensor(t, symbolic_context=StatelessSymbolicContext(dims))
        return made

    assert isinstance(planned(x=fake(torch.zeros(8, 512).bfloat16(), 0), w=fake(w))[0], Late)
    for dim in (0, 1):
        x = fake(torch.zeros(8, 512).bfloat16(), *(d for d in (1,) if dim == 1))
        assert planned(x=x, w=fake(w, dim))[1] == "triton: the size of the weight is symbolic"
        with pytest.raises(ArgumentError, match="deep_gemm cannot: the size of the weight is symbolic"):
            planned(x=x, w=fake(w, dim), algo="deep_gemm")
    assert not environment.guards


@needs_cuda_build
@pytest.mark.parametrize(("rows", "kernels"), [(8, ["stream", "split"]), (65, [])])
def test_a_router_in_inductors_wrapper(rows: int, kernels: list[str]) -> None:
    def make() -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty(n, 2048, dtype=torch.bfloat16, device="cuda") for n in (rows, 128))

    session = Session(Config(target=Arch("sm_90")))
    (source,) = codegen(lambda x, w: (x.float() @ w.float().t()).softmax(-1), make, "sm_90", session)
    assert session.report.count("linear_bf16_fp32") == 1
    calls = [name for name in re.findall(r"(\w+)\.run\(", source) if "softmax" not in name]
    assert [name for name in kernels for call in calls if name in call] == kernels
    assert ("extern_kernels.mm_dtype" in source) == (not kernels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("m", [0, 1, 7])
def test_linear_is_pytorchs(m: int, dtype: torch.dtype) -> None:
    x, w = (t.to(dtype) for t in operands(m, 24, 128))
    bias = torch.randn(24).to(dtype)
    for algo in ("auto", "reference"):
        assert torch.equal(linear(x, w, algo=algo), torch.nn.functional.linear(x, w))
        assert torch.equal(linear(x, w, bias, algo), torch.nn.functional.linear(x, w, bias))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algo": "tritn"}, "there is no algorithm 'tritn'. Did you mean 'triton'?"),
        ({"algo": "cublas"}, "cublas cannot: cuBLAS is for NVIDIA GPUs, not cpu"),
        ({"algo": "triton"}, "triton cannot: the cpu has no Triton kernels"),
        ({"x": torch.zeros(2, 3, 64).bfloat16()}, r"x is \(2, 3, 64\), w \(8, 64\)"),
        ({"x": torch.zeros(2, 64)}, "x is torch.float32, w torch.bfloat16"),
        ({"x": torch.zeros(2, 64).double(), "w": torch.zeros(8, 64).double()}, "x is torch.float64"),
        ({"bias": torch.zeros(7).bfloat16()}, r"bias is torch.bfloat16, shape \(7,\)"),
        ({"bias": torch.zeros(8)}, "bias is torch.float32"),
    ],
)
def test_mistakes_with_linear_are_named(changes: dict[str, Any], message: str) -> None:
    x, w = operands(2, 8, 64)
    with pytest.raises(ArgumentError, match=message):
        linear(**{"x": x, "w": w, **changes})


def linear_planned(rows: int, name: str = "sm_90", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    x, w = (t.to(dtype) for t in operands(rows, 256, 512))
    return linear.plan(Arch(name), linear.bind((), {"x": x, "w": w, **changes}))


def test_what_is_planned_of_linear() -> None:
    for rows in (1, 8, 32):
        for dtype in (torch.bfloat16, torch.float16):
            launch, why = linear_planned(rows, dtype=dtype)
            out = launch.all[-1].args["out"]
            assert (why, out.dtype, out.shape) == ("triton", dtype, (rows, 256))
    assert linear_planned(33) == (None, "triton: 33 rows are bound by their products (at most 32)")
    assert linear_planned(8, "sm_80") == (None, "triton: with 8 rows it was not measured on sm_80")
    assert linear_planned(1, "sm_80")[1] == linear_planned(1, "gfx942")[1] == "triton"
    assert (
        linear_planned(8, dtype=torch.float32)[1] == "triton: the kernels multiply 16-bit floats and codes, not float32"
    )
    assert linear_planned(8, algo="cublas") == (None, "triton: cublas was asked for")
    with pytest.raises(ArgumentError, match="triton cannot: 33 rows"):
        linear_planned(33, algo="triton")


def test_how_16_bits_are_cut() -> None:
    """Each branch of the rule, by a size that takes it."""
    h100, others = Arch("sm_90"), Arch("sm_89")
    of = {
        (1, 4096): Cut(4, 4096, stages=1),
        (8, 1024): configure(h100, 8, 1024, 4096),
        (8, 4096): Cut(32, 256, stages=6, parts=2),
        (8, 6144): Cut(32, 256, warps=2, stages=6),
        (32, 6144): Cut(64, 256),
        (8, 24576): Cut(64, 256, stages=3),
        (32, 24576): Cut(64, 256, stages=3),
        (8, 151936): Cut(64, 256, stages=3),
        (32, 151936): Cut(128, 256, warps=8),
    }
    for (rows, columns), cut in of.items():
        assert configure(h100, rows, columns, 4096, 2) == cut, (rows, columns)
    assert configure(others, 8, 4096, 4096, 2) == configure(others, 8, 4096, 4096)
    assert configure(others, 1, 4096, 4096, 2) == of[1, 4096]


def test_how_codes_are_cut() -> None:
    of = {
        (1, 4096, 4096): Cut(4, 1024, warps=2, stages=1),
        (1, 6144, 4096): Cut(8, 512, stages=1),
        (1, 24576, 4096): Cut(8, 512, stages=1),
        (8, 1024, 4096): Cut(64, 256, 8, stages=3),
        (8, 4096, 4096): Cut(32, 128, stages=6, parts=2),
        (32, 4096, 4096): Cut(32, 128, stages=6, parts=2),
        (64, 4096, 4096): Cut(64, 128, 2, stages=6),
        (8, 4096, 12288): Cut(64, 256, 4, stages=3),
        (8, 6144, 4096): Cut(32, 128, stages=6, parts=2),
        (32, 6144, 4096): Cut(64, 128, 2, stages=6),
        (64, 6144, 4096): Cut(64, 128, stages=6),
        (8, 24576, 4096): Cut(64, 256, stages=3),
        (64, 24576, 4096): Cut(64, 128, stages=6),
    }
    for (rows, columns, k), cut in of.items():
        assert configure(Arch("sm_90"), rows, columns, k) == cut, (rows, columns, k)
        assert refuse_cut(cut, rows, 1) is None


@needs_cuda_build
@pytest.mark.parametrize(("numerics", "rows", "kernels"), [("fast", 8, ["stream"]), ("eager", 8, []), ("fast", 33, [])])
def test_a_head_in_inductors_wrapper(numerics: str, rows: int, kernels: list[str]) -> None:
    def make() -> tuple[torch.Tensor, ...]:
        shapes = ((1, rows, 512), (32000, 512), (32000,))
        return tuple(torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes)

    session = Session(Config(target=Arch("sm_90"), numerics=numerics))
    (source,) = codegen(lambda x, w, b: torch.nn.functional.linear(x, w, b), make, "sm_90", session)
    assert session.report.count("linear") == len(kernels)
    assert [name for name in kernels for call in re.findall(r"(\w+)\.run\(", source) if name in call] == kernels
    assert ("extern_kernels.addmm" in source) == (not kernels)
