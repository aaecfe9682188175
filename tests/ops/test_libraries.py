"""Products by other libraries: what each is handed, against the reference; and choices that cannot be."""

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fusionpass
from fusionpass import Config
from fusionpass.arch import Arch
from fusionpass.errors import ArgumentError, ConfigError
from fusionpass.launch import Launch, Plain
from fusionpass.ops import block_scaled_mm, dequantize, linear_bf16_fp32, scaled_mm
from fusionpass.ops.quant.layout import exponents_unpacked, shuffled, unshuffled, unswizzled
from tests.blocks import LIBRARIES, backend, operand, product_of
from tests.gemm import product_of as codes_of

POWERS = "fp8_group128,scale_dtype=float8_e8m0fnu"
SIZES = {"flashinfer_trtllm": (256, 512), "cublas": (144, 512)}


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make modules with such functions what is installed."""
    there = {"triton"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in there else None)

    def install(name: str, **functions: Any) -> None:
        there.add(name)
        module = types.ModuleType(name)
        module.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    return install


def arguments_of(
    kind: str, rows: int, columns: int, k: int, a_layout: str, b_layout: str, **changes: Any
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rows + columns + k)
    schemes = [f"{kind},layout={layout}" for layout in (a_layout, b_layout)]
    a, b = (operand(n, k, scheme, generator) for n, scheme in zip((rows, columns), schemes, strict=True))
    made = {"a": a[0], "b": b[0], "a_scale": a[1], "b_scale": b[1], "a_scheme": schemes[0], "b_scheme": schemes[1]}
    if len(a) > 2:
        made |= {"a_global_scale": a[2], "b_global_scale": b[2]}
    return block_scaled_mm.bind((), {**made, **changes})


def planned(name: str, arguments: dict[str, Any], algo: str = "auto") -> Plain:
    found, why = block_scaled_mm.plan(Arch(name), {**arguments, "algo": algo})
    assert isinstance(found, Plain), why
    return found


def mxfp8(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What flat swizzled scales make of codes."""
    rows, k = codes.shape
    down, across = -(-rows // 128) * 128, -(-(k // 32) // 4) * 4
    assert scales.dtype == torch.uint8
    assert scales.dim() == 1
    return dequantize(codes, scales.view(down, across), "mxfp8,layout=swizzled")


def nvfp4(codes: torch.Tensor, scales: torch.Tensor, unit: float) -> torch.Tensor:
    scales = scales.contiguous().view(torch.float8_e4m3fn)
    return dequantize(codes, scales, "nvfp4,layout=swizzled", torch.tensor(unit))


BACKENDS = {"flashinfer_trtllm": "trtllm", "flashinfer_cute_dsl": "cute-dsl", "flashinfer_cutlass": "cutlass"}


@pytest.mark.parametrize("rows", [1, 70, 130])
@pytest.mark.parametrize("a_layout", ["linear", "swizzled"])
@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        ("sm_100", "flashinfer_trtllm"),
        ("sm_100", "flashinfer_cute_dsl"),
        ("sm_120", "flashinfer_cutlass"),
        ("sm_103", "flashinfer_cutlass"),
    ],
)
def test_flashinfer_mxfp8(name: str, algorithm: str, a_layout: str, rows: int, packages: Callable[..., None]) -> None:
    def mm_mxfp8(
        a: torch.Tensor, b: torch.Tensor, a_scale: torch.Tensor, b_scale: torch.Tensor, *, out_dtype: Any, backend: str
    ) -> torch.Tensor:
        assert backend == BACKENDS[algorithm]
        assert b.stride(0) == 1
        w = mxfp8(b.t(), b_scale)
        w = unshuffled(w) if backend == "trtllm" else w
        return (mxfp8(a, a_scale) @ w.t()).to(out_dtype)

    packages("flashinfer", mm_mxfp8=mm_mxfp8)
    layout = "trtllm" if algorithm == "flashinfer_trtllm" else "swizzled"
    arguments = arguments_of("mxfp8", rows, 256, 512, a_layout, layout)
    call = planned(name, arguments, algorithm)
    assert not call.traced
    assert torch.equal(call.function(**arguments), block_scaled_mm.reference(**arguments))


@pytest.mark.parametrize("algorithm", BACKENDS)
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16"])
def test_flashinfer_nvfp4(algorithm: str, out_dtype: str, packages: Callable[..., None]) -> None:
    def mm_fp4(
        a: torch.Tensor, b: torch.Tensor, a_scale: torch.Tensor, b_scale: torch.Tensor, alpha: torch.Tensor,
        out_dtype: torch.dtype, *, block_size: int, use_8x4_sf_layout: bool, backend: str,
    ) -> torch.Tensor:  # fmt: skip
        assert (block_size, use_8x4_sf_layout, backend) == (16, False, BACKENDS[algorithm])
        assert (a.dtype, b.dtype, a_scale.dtype, b_scale.dtype) == (torch.uint8,) * 4
        assert (b.stride(0), b_scale.stride(0)) == (1, 1)
        w = nvfp4(b.t(), b_scale.t(), 1.0)
        w = unshuffled(w) if backend == "trtllm" else w
        return (nvfp4(a, a_scale, 1.0) @ w.t() * alpha).to(out_dtype)

    packages("flashinfer", mm_fp4=mm_fp4)
    layout = "trtllm" if algorithm == "flashinfer_trtllm" else "swizzled"
    arguments = arguments_of("nvfp4", 70, 256, 512, "linear", layout, out_dtype=out_dtype)
    if algorithm == "flashinfer_trtllm" and out_dtype == "float16":
        with pytest.raises(ArgumentError, match="flashinfer_trtllm cannot: it writes bfloat16, not float16"):
            planned("sm_100", arguments, algorithm)
        return
    got = planned("sm_100", arguments, algorithm).function(**arguments)
    torch.testing.assert_close(got, block_scaled_mm.reference(**arguments), rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("kind", ["mxfp8", "nvfp4"])
@pytest.mark.parametrize("a_layout", ["linear", "swizzled"])
def test_scaled_mm_of_torch(kind: str, a_layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own rules: recipes, swizzles and dtypes of scales; the scales of NVFP4 come in pairs."""
    kinds, order = F.ScalingType, F.SwizzleType

    def scaled_mm(
        a: torch.Tensor, b: torch.Tensor, a_scale: list[torch.Tensor], a_recipe: Any, b_scale: list[torch.Tensor],
        b_recipe: Any, a_swizzle: Any, b_swizzle: Any, *, output_dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        assert (a_recipe, a_swizzle) == (b_recipe, b_swizzle)
        assert b.stride(0) == 1
        if kind == "mxfp8":
            assert (a_recipe, a_swizzle) == (kinds.BlockWise1x32, order.SWIZZLE_32_4_4)
            assert a_scale[0].dtype == torch.float8_e8m0fnu
            x, w = (mxfp8(t, s.view(torch.uint8).reshape(-1)) for t, s in ((a, a_scale[0]), (b.t(), b_scale[0])))
        else:
            assert a_recipe == [kinds.BlockWise1x16, kinds.TensorWise]
            assert a_swizzle == [order.SWIZZLE_32_4_4, order.NO_SWIZZLE]
            assert (a.dtype, b.dtype) == (torch.float4_e2m1fn_x2,) * 2
            x, w = (nvfp4(t.view(torch.uint8), s, g.item()) for t, (s, g) in ((a, a_scale), (b.t(), b_scale)))
        return (x @ w.t()).to(output_dtype)

    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    arguments = arguments_of(kind, 70, 144, 512, a_layout, "swizzled")
    call = planned("sm_100", arguments, "cublas")
    assert call.traced
    torch.testing.assert_close(
        call.function(**arguments), block_scaled_mm.reference(**arguments), rtol=2**-7, atol=1e-5
    )


def test_scaled_mm_of_torch_is_as_it_is_called() -> None:
    """The names of its arguments and of what they are, in the torch that is installed."""
    given = arguments_of("mxfp8", 128, 128, 512, "linear", "swizzled")
    call = planned("sm_100", given, "cublas").function
    with torch.device("meta"):
        moved = {name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in given.items()}
    got = call(**moved)
    assert (tuple(got.shape), got.dtype) == ((128, 128), torch.bfloat16)


@pytest.mark.parametrize("a_layout", ["linear", "column_major"])
def test_deep_gemm_on_hopper(a_layout: str, packages: Callable[..., None]) -> None:
    def fp8_gemm_nt(a: Any, b: Any, out: torch.Tensor, disable_ue8m0_cast: bool) -> None:
        assert disable_ue8m0_cast
        out.copy_(dequantize(*a, "fp8_group128") @ dequantize(*b, "fp8_block128").t())

    packages("deep_gemm", fp8_gemm_nt=fp8_gemm_nt)
    arguments = product_of("fp8", 70, 192, 512)
    if a_layout == "column_major":
        columns = product_of("fp8_columns", 70, 192, 512)
        arguments |= {name: columns[name] for name in ("a", "a_scale", "a_scheme")}
    call = planned("sm_90", arguments, "deep_gemm")
    assert torch.equal(call.function(**arguments), block_scaled_mm.reference(**arguments))
    # It is for who names it.
    assert block_scaled_mm.plan(Arch("sm_90"), arguments)[1] == "cublas"


def test_deep_gemm_on_blackwell(packages: Callable[..., None]) -> None:
    def fp8_gemm_nt(a: Any, b: Any, out: torch.Tensor) -> None:
        values = []
        for codes, packed in (a, b):
            assert (packed.dtype, packed.stride(0)) == (torch.int32, 1)
            values.append(dequantize(codes, exponents_unpacked(packed, (codes.shape[0], 4)), POWERS))
        out.copy_(values[0] @ values[1].t())

    packages("deep_gemm", fp8_gemm_nt=fp8_gemm_nt)
    generator = torch.Generator().manual_seed(0)
    a, b = operand(70, 512, POWERS, generator), operand(192, 512, f"{POWERS},layout=deepgemm", generator)
    schemes = {"a_scheme": POWERS, "b_scheme": f"{POWERS},layout=deepgemm"}
    arguments = block_scaled_mm.bind((), {"a": a[0], "b": b[0], "a_scale": a[1], "b_scale": b[1], **schemes})
    call = planned("sm_100", arguments, "deep_gemm")
    assert torch.equal(call.function(**arguments), block_scaled_mm.reference(**arguments))
    # The package's own kernel does not read such a weight.
    assert block_scaled_mm.plan(Arch("sm_100"), arguments)[0] is None


def test_a_router_by_deep_gemm(packages: Callable[..., None]) -> None:
    packages("deep_gemm", bf16_gemm_nt=lambda x, w, out: out.copy_(x.float() @ w.float().t()))
    x, w = torch.randn(70, 512).bfloat16(), torch.randn(64, 512).bfloat16()
    arguments = {"x": x, "w": w, "algo": "deep_gemm"}
    found, why = linear_bf16_fp32.plan(Arch("sm_90"), arguments)
    assert isinstance(found, Plain), why
    assert torch.equal(found.function(**arguments), x.float() @ w.float().t())
    with pytest.raises(ArgumentError, match="DeepGEMM is for sm_90 and sm_100, not sm_120"):
        linear_bf16_fp32.plan(Arch("sm_120"), arguments)


@pytest.mark.parametrize(
    ("name", "algo", "changes", "message"),
    [
        ("sm_90", "flashinfer_cutlass", {}, "there is no algorithm 'flashinfer_cutlass'"),
        ("sm_90", "tritn", {}, r"there is no algorithm 'tritn'. Did you mean 'triton'\?"),
        ("sm_100", "cublas", {}, "cublas cannot: cuBLAS's product of blocks is for sm_90, not sm_100"),
        ("sm_90", "cublas", {"bias": torch.zeros(256)}, "cublas cannot: it adds no bias"),
        ("sm_90", "deep_gemm", {}, "deep_gemm cannot: the package deep_gemm is not installed"),
        ("sm_80", "triton", {}, "triton cannot: sm_80 has no float8_e4m3fn"),
    ],
)
def test_a_choice_that_cannot_be(
    name: str, algo: str, changes: dict[str, Any], message: str, packages: Callable[..., None]
) -> None:
    arguments = product_of("fp8", 70, 256, 512, **changes)
    with pytest.raises(ArgumentError, match=message):
        block_scaled_mm.plan(Arch(name), {**arguments, "algo": algo})


def test_operands_that_cannot_be_handed_over(packages: Callable[..., None]) -> None:
    packages("flashinfer")
    packages("deep_gemm")
    arguments = arguments_of("mxfp8", 70, 256, 512, "linear", "swizzled")
    wide = torch.zeros(70, 1024, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, :512]
    with pytest.raises(ArgumentError, match=r"flashinfer_cutlass cannot: a has strides \(1024, 1\)"):
        planned("sm_120", {**arguments, "a": wide}, "flashinfer_cutlass")
    with pytest.raises(ArgumentError, match="flashinfer_cutlass cannot: it adds no bias"):
        planned("sm_120", {**arguments, "bias": torch.zeros(256)}, "flashinfer_cutlass")
    weights = arguments_of("mxfp8", 128, 256, 512, "trtllm", "swizzled")
    with pytest.raises(ArgumentError, match="a lies as a weight does"):
        planned("sm_120", weights, "flashinfer_cutlass")
    powers = product_of("fp8_powers", 70, 256, 512)
    with pytest.raises(ArgumentError, match="on sm_90 it reads float32 scales, those of the weight in blocks of 128"):
        planned("sm_90", powers, "deep_gemm")
    mixed = {**product_of("fp8", 70, 256, 512), "b_scheme": f"{POWERS},layout=deepgemm"}
    with pytest.raises(ArgumentError, match="on sm_100 it reads exponents as scales"):
        planned("sm_100", mixed, "deep_gemm")
    codes = product_of("fp8", 70, 256, 512)
    other = {name: codes[name].float().div(2).to(torch.float8_e4m3fnuz) for name in "ab"}
    with pytest.raises(ArgumentError, match="it has no float8_e4m3fnuz"):
        planned("sm_90", {**codes, **other}, "deep_gemm")


def test_a_choice_for_codes_with_scales_of_rows() -> None:
    arguments = codes_of(8, 64, 64)
    assert isinstance(scaled_mm.plan(Arch("sm_90"), {**arguments, "algo": "triton"})[0], Launch)
    for algo in ("cublas", "reference"):
        told = f"triton: {algo} was asked for"
        assert scaled_mm.plan(Arch("sm_90"), {**arguments, "algo": algo}) == (None, told)
    for name, algo, message in (
        ("gfx950", "cublas", "cuBLAS is for NVIDIA GPUs, not gfx950"),
        ("sm_80", "cublas", "FP8 needs sm_89 or newer, not sm_80"),
        ("sm_90", "cubls", "Did you mean 'cublas'"),
    ):
        with pytest.raises(ArgumentError, match=message):
            scaled_mm.plan(Arch(name), {**arguments, "algo": algo})
    many = codes_of(65, 64, 64)
    with pytest.raises(ArgumentError, match="triton cannot: 65 rows are bound by their products"):
        scaled_mm.plan(Arch("sm_90"), {**many, "algo": "triton"})
    odd = torch.zeros(8, 72, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, :64]
    with pytest.raises(ArgumentError, match=r"triton cannot: a has strides \(72, 1\)"):
        scaled_mm.plan(Arch("sm_90"), {**arguments, "a": odd, "algo": "triton"})
    with pytest.raises(ArgumentError, match="triton cannot: the cpu has no Triton kernels"):
        scaled_mm(**{**arguments, "algo": "triton"})


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_says_nothing_of_what_it_is_not_for(name: str) -> None:
    kind = "mxfp8" if name == "deep_gemm" else "int8"
    told = backend(name)(Arch("sm_90"), **product_of(kind, 70, 256, 512))
    assert told == ("" if name != "cublas" else "it is of float8_e4m3fn with float32 scales, weights in blocks of 128")


def test_chosen_in_a_model(packages: Callable[..., None]) -> None:
    """`Config.gemm` names what computes every product of a kind; who cannot is an error, and a name that is none."""
    arguments = product_of("fp8", 68, 256, 512)
    names = ("a", "b", "a_scale", "b_scale")

    def model(*given: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = block_scaled_mm(*given)
        return made.relu()

    def explained(**changes: Any) -> Any:
        config = Config(target=Arch("sm_90"), **changes)
        return fusionpass.explain(model, *(arguments[name] for name in names), config=config)

    packages("deep_gemm", fp8_gemm_nt=None)
    for algorithm in ("auto", "cublas", "triton", "deep_gemm"):
        (record,) = explained(gemm={"fp8_block128": algorithm}).fused
        assert record.backend == ("cublas" if algorithm == "auto" else algorithm)
    report = explained(gemm={"fp8_block128": "deep_gemm"})
    assert "fusionpass.block_scaled_mm.default" in dict(report.graphs[0].snapshots)["lower"]
    (other,) = explained(gemm={"mxfp8": "triton"}).fused
    assert other.backend == "cublas"
    with pytest.raises(ConfigError, match="gemm names 'fp8_blocks', no kind of product"):
        Config(gemm={"fp8_blocks": "triton"})
    with pytest.raises(ConfigError, match=r"gemm names 'tritn', no algorithm of mxfp8. Did you mean 'triton'\?"):
        Config(gemm={"mxfp8": "tritn"})
    with pytest.raises(ConfigError, match="is not algorithms by kind"):
        Config(gemm="triton")  # type: ignore[arg-type]


def test_an_error_in_a_model(packages: Callable[..., None]) -> None:
    arguments = product_of("fp8", 68, 256, 512)
    names = ("a", "b", "a_scale", "b_scale")
    config = Config(target=Arch("sm_100"), gemm={"fp8_block128": "cublas"})
    with pytest.raises(Exception, match="cublas cannot: cuBLAS's product of blocks is for sm_90, not sm_100"):
        fusionpass.explain(block_scaled_mm, *(arguments[name] for name in names), config=config)


def test_shuffled_is_what_trtllm_gets() -> None:
    arguments = arguments_of("mxfp8", 4, 128, 256, "linear", "trtllm")
    plain = arguments_of("mxfp8", 4, 128, 256, "linear", "linear")
    assert torch.equal(arguments["b"].view(torch.uint8), shuffled(plain["b"].view(torch.uint8)))
    rows = unswizzled(arguments["b_scale"], (128, 8))
    assert torch.equal(rows, shuffled(plain["b_scale"]))
