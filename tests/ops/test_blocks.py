"""block_scaled_mm: what it computes, what its kernel refuses, and the code of that for targets that are not here."""

import inspect
import re
from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import fusionpass
from fusionpass import Config
from fusionpass.aot import compile_launch
from fusionpass.arch import Arch
from fusionpass.errors import ArgumentError, SchemeError
from fusionpass.launch import Late, Launch, Plain
from fusionpass.ops import block_scaled_mm, dequantize
from fusionpass.ops.gemm.blocks_kernel import _e2m1_times
from fusionpass.session import Session
from tests.blocks import KERNEL, KINDS, LIBRARIES, backend, exact, product_of
from tests.fake_gpu import codegen, needs_cuda_build

H100 = Arch("sm_90")
NVIDIA = ("sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121")


@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_codes_stand_for_is_multiplied(kind: str, rows: int, out_dtype: str) -> None:
    arguments = product_of(kind, max(rows, 1), 24, 256, out_dtype=out_dtype, bias=torch.randn(24))
    if rows == 0:
        arguments["a"] = arguments["a"][:0]
        arguments["a_scale"] = arguments["a_scale"][:0]
    got = block_scaled_mm(**arguments)
    assert (got.shape, got.dtype, got.is_contiguous()) == ((rows, 24), getattr(torch, out_dtype), True)
    if rows:
        expected, slack = exact(arguments)
        step = expected.abs() * torch.finfo(got.dtype).eps / 2
        assert ((got.double() - expected).abs() <= slack * 1.01 + step).all()


def test_a_last_group_that_is_not_whole() -> None:
    arguments = product_of("fp8", 5, 20, 384, out_dtype="float32")
    whole = {
        name: dequantize(arguments[name], arguments[f"{name}_scale"], arguments[f"{name}_scheme"]) for name in "ab"
    }
    arguments |= {name: arguments[name][:, :300] for name in "ab"}
    expected = whole["a"][:, :300] @ whole["b"][:, :300].t()
    torch.testing.assert_close(block_scaled_mm(**arguments), expected)


def test_compiled_whole() -> None:
    arguments = product_of("mxfp8", 5, 24, 128)
    compiled = torch.compile(lambda given: block_scaled_mm(**given) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(arguments), block_scaled_mm(**arguments) * 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a_scheme": "fp8_token"}, "the schemes are fp8_token and fp8_block128"),
        ({"a_scheme": "fp8_block128"}, "Both need groups of one length; a has no blocks"),
        ({"b_scheme": "mxfp8"}, "the schemes are fp8_group128 and mxfp8"),
        ({"b_scheme": "fp8_group128,scale_dtype=float8_e8m0fnu"}, "codes of one dtype, and scales of one"),
        ({"a": torch.zeros(3, 128).to(torch.float8_e4m3fn)}, r"a is \(3, 128\), b \(24, 256\)"),
        ({"a": torch.zeros(3, 256)}, "a is torch.float32.*fp8_group128 has torch.float8_e4m3fn"),
        ({"a_scale": torch.ones(3, 1)}, r"a_scale is torch.float32, shape \(3, 1\).*has torch.float32 \[3, 2\]"),
        ({"b_scale": torch.ones(24, 2)}, r"b_scale is torch.float32, shape \(24, 2\).*\[1, 2\]"),
        ({"b_scale": torch.ones(1, 2).double()}, "b_scale is torch.float64"),
        ({"a_global_scale": torch.ones(())}, r"a_global_scale is of shape \(\).*takes none"),
        ({"bias": torch.zeros(3)}, r"bias is torch.float32, shape \(3,\)"),
        ({"out_dtype": "bfloat61"}, "Did you mean 'bfloat16'?"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"(?s){message}"):
        block_scaled_mm(**product_of("fp8", 3, 24, 256, **changes))


def test_a_layout_that_is_not_the_schemes() -> None:
    arguments = product_of("mxfp8", 3, 24, 256)
    with pytest.raises(ArgumentError, match=r"a_scale is torch.uint8, shape \(3, 8\).*has torch.uint8 \[128, 8\]"):
        block_scaled_mm(**{**arguments, "a_scheme": "mxfp8,layout=swizzled"})
    with pytest.raises(ArgumentError, match=r"a_global_scale is missing.*nvfp4 takes one"):
        block_scaled_mm(**product_of("nvfp4", 3, 24, 256, a_global_scale=None))
    with pytest.raises(SchemeError, match=r"Did you mean 'mxfp8'\?"):
        block_scaled_mm(**{**arguments, "a_scheme": "mxfp"})


def plan(name: str, arguments: dict[str, Any]) -> tuple[Any, str]:
    """What our kernel says."""
    planned, why = block_scaled_mm.plan(Arch(name), arguments, KERNEL)
    return planned, why.removeprefix("".join(f"{name}: disabled; " for name in LIBRARIES))


def test_what_the_kernel_refuses() -> None:
    arguments = product_of("fp8", 3, 24, 256)
    assert plan("sm_80", arguments)[1] == "triton: sm_80 has no float8_e4m3fn"
    assert plan("sm_80", product_of("nvfp4", 3, 24, 256))[1] == "triton: sm_80 has no float8_e4m3fn"
    assert plan("gfx942", arguments)[1] == "triton: gfx942 has no float8_e4m3fn"
    wide = torch.zeros(3, 512).to(torch.float8_e4m3fn)[:, ::2]
    assert plan("sm_90", {**arguments, "a": wide})[1] == "triton: a has strides (512, 2), not contiguous rows"
    other = arguments["b_scale"].to("meta")
    assert plan("sm_90", {**arguments, "b_scale": other})[1] == "triton: b_scale is on meta, a on cpu"
    shuffled = {**product_of("mxfp8", 128, 128, 256), "a_scheme": "mxfp8,layout=trtllm"}
    assert plan("sm_90", shuffled)[1] == "triton: a lies as trtllm wants it"
    empty = {name: arguments[name][:, :0] for name in ("a", "b", "a_scale", "b_scale")}
    assert plan("sm_90", {**arguments, **empty})[1] == "triton: K is 0"


def test_fnuz_codes_are_for_gfx942() -> None:
    scheme = "fp8_group128,dtype=float8_e4m3fnuz"
    arguments = product_of("fp8", 3, 24, 256)
    codes = {name: arguments[name].float().div(2).to(torch.float8_e4m3fnuz) for name in "ab"}
    arguments |= {**codes, "a_scheme": scheme, "b_scheme": "fp8_block128,dtype=float8_e4m3fnuz"}
    assert isinstance(plan("gfx942", arguments)[0], Launch)
    assert plan("sm_90", arguments)[1] == "triton: sm_90 has no float8_e4m3fnuz"


def test_symbolic_sizes() -> None:
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    arguments = product_of("fp8", 6, 24, 256)

    def fake(name: str, *symbolic: int) -> torch.Tensor:
        dims = [DimDynamic.DYNAMIC if d in symbolic else DimDynamic.STATIC for d in range(2)]
        given, context = arguments[name].clone(), StatelessSymbolicContext(dims)
        made: torch.Tensor = mode.from_tensor(given, symbolic_context=context)
        return made

    weight = {name: fake(name) for name in ("b", "b_scale")}
    few = {name: fake(name, 0) for name in ("a", "a_scale")}
    assert isinstance(plan("sm_90", {**arguments, **weight, **few})[0], Late)
    for dim in (0, 1):
        assert plan("sm_90", {**arguments, "b": fake("b", dim)})[1] == "triton: the size of the weight is symbolic"
        cublas = backend("cublas")(H100, **{**arguments, "b": fake("b", dim)})
        assert cublas == "the size of the weight is symbolic"
        library = backend("flashinfer_cutlass")(H100, **{**arguments, "b": fake("b", dim)})
        assert library == "the size of the weight is symbolic"
    assert not environment.guards


def compiled(name: str, kind: str, rows: int, columns: int = 4096) -> str:
    launch, why = plan(name, product_of(kind, rows, columns, 512))
    assert launch is not None, why
    made = [compile_launch(part, Arch(name)) for part in launch.all]
    return made[0].get("ptx") or made[0]["amdgcn"]


@pytest.mark.parametrize("rows", [1, 8, 512])
@pytest.mark.parametrize("kind", ["fp8", "mxfp8_swizzled", "nvfp4"])
@pytest.mark.parametrize("name", NVIDIA)
def test_compiles_and_does_not_spill(name: str, kind: str, rows: int) -> None:
    text = compiled(name, kind, rows, 4096 if rows < 512 else 512)
    assert not re.search(r"(ld|st)\.local", text)
    assert ("griddepcontrol.wait" in text) == (name != "sm_89")
    if rows == 1:
        assert "mma" not in text
        assert re.search(r"ld\.global[\w.:]*\.v4\.b32", text)
    elif name == "sm_90":
        codes = {"fp8": "f32.e4m3.e4m3", "mxfp8_swizzled": "f32.bf16.bf16", "nvfp4": "f32.f16.f16"}[kind]
        tall = 16 if rows <= 64 else 64 if kind == "fp8" else 128
        assert re.search(rf"wgmma\.mma_async\.sync\.aligned\.m64n{tall}k\d+\.{codes}", text)


def run_ptx(text: str, registers: dict[str, int]) -> None:
    """The few instructions that unpacking has, on 32-bit registers."""

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    def half(bits: int) -> np.float16:
        return np.array(bits & 0xFFFF, np.uint16).view(np.float16)[()]

    for line in re.findall(r"^\s*((?:prmt|shl|and|lop3|mul)[^;]*);", text, re.MULTILINE):
        name, _, rest = line.partition(" ")
        into, *given = (part.strip() for part in rest.split(","))
        numbers = [value(part) for part in given]
        if name == "prmt.b32":
            source = numbers[0].to_bytes(4, "little") + numbers[1].to_bytes(4, "little")
            chosen = [source[numbers[2] >> 4 * i & 7] for i in range(4)]
            registers[into] = int.from_bytes(chosen, "little")
        elif name == "shl.b32":
            registers[into] = numbers[0] << numbers[1] & 0xFFFFFFFF
        elif name == "and.b32":
            registers[into] = numbers[0] & numbers[1]
        elif name == "lop3.b32":
            assert numbers[3] == (0xF0 & 0xCC | 0xAA)
            registers[into] = numbers[0] & numbers[1] | numbers[2]
        else:
            assert name == "mul.rn.f16x2"
            products = [half(numbers[0] >> s) * half(numbers[1] >> s) for s in (0, 16)]
            both = [int(np.float16(product).view(np.uint16)) for product in products]
            registers[into] = both[0] | both[1] << 16


def test_packed_codes_by_words() -> None:
    """Every byte with every scale: what the PTX makes of it, exactly."""
    (text,) = re.findall(r'"""\n(\s*\{.*?)"""', inspect.getsource(_e2m1_times.fn), re.DOTALL)
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table = [*magnitudes, *(-m for m in magnitudes)]
    scales = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    for scale in [*scales[1:9].tolist(), *scales[9::13].tolist(), 448.0]:
        by = int(np.float16(scale * 128).view(np.uint16)) * 0x10001
        for first in range(0, 256, 4):
            registers = {"$4": int.from_bytes(bytes(range(first, first + 4)), "little"), "$5": by, "$6": by}
            run_ptx(text, registers)
            for name, shift in (("$0", 0), ("$2", 4)):
                packed = [registers[name], registers["$1" if name == "$0" else "$3"]]
                got = np.array(packed, np.uint32).view(np.float16).astype(np.float64)
                wanted = [table[byte >> shift & 15] * scale / 128 for byte in range(first, first + 4)]
                assert got.tolist() == wanted
                assert [np.signbit(x) for x in got] == [byte >> shift >> 3 & 1 for byte in range(first, first + 4)]


def test_who_unpacks_by_words() -> None:
    """Where PTX is written and the matrix units do not take the codes themselves."""
    found = {
        (name, kind, rows): plan(name, product_of(kind, rows, 512, 512))[0].all[0].args["WORDS"]
        for name in NVIDIA
        for kind in ("nvfp4", "mxfp8")
        for rows in (1, 8, 512)
    }
    wanted = {("sm_90", rows) for rows in (1, 8, 512)} | {(name, 1) for name in NVIDIA} | {
        ("sm_100", 8), ("sm_103", 8),
    }  # fmt: skip
    newer = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 8)
    wanted |= set() if newer else {("sm_121", 8), ("sm_121", 512)}
    wanted -= {("sm_89", 1)}
    assert {(name, rows) for (name, kind, rows), words in found.items() if words} == wanted
    assert not any(words for (_, kind, _), words in found.items() if kind == "mxfp8")


@pytest.mark.parametrize(
    ("name", "kind", "rows", "instruction"),
    [
        ("sm_100", "mxfp8", 512, r"tcgen05\.mma\.cta_group::1\.kind::mxf8f6f4\.block_scale"),
        ("sm_100", "nvfp4", 512, r"tcgen05\.mma\.cta_group::1\.kind::mxf4nvf4\.block_scale"),
        ("sm_100", "mxfp8", 8, r"tcgen05\.mma\.cta_group::1\.kind::f16"),
        ("sm_120", "mxfp8", 8, r"mma\.sync\.aligned\.m16n8k32\.row\.col\.kind::mxf8f6f4\.block_scale"),
        ("sm_120", "nvfp4", 512, r"mma\.sync\.aligned\.m16n8k64\.row\.col\.kind::mxf4nvf4\.block_scale"),
        ("gfx950", "fp8", 512, "v_mfma_f32_32x32x64_f8f6f4"),
        ("gfx950", "mxfp8", 8, "v_mfma_scale_f32_16x16x128_f8f6f4"),
        ("gfx950", "nvfp4", 512, "v_mfma_f32_32x32x16_f16"),
    ],
)
def test_the_matrix_units_own_scales(name: str, kind: str, rows: int, instruction: str) -> None:
    assert re.search(instruction, compiled(name, kind, rows, 512))


@needs_cuda_build
@pytest.mark.parametrize(("rows", "kernels"), [(1, ["block"]), (8, ["block", "split"]), (65, ["block"])])
@pytest.mark.parametrize("kind", ["fp8", "mxfp8", "nvfp4_swizzled"])
def test_in_inductors_wrapper(kind: str, rows: int, kernels: list[str]) -> None:
    arguments = product_of(kind, rows, 256, 1024)
    tensors = {name: given for name, given in arguments.items() if isinstance(given, torch.Tensor)}

    def make() -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(given, device="cuda") for given in tensors.values())

    def function(*given: torch.Tensor) -> torch.Tensor:
        return block_scaled_mm(**{**arguments, **dict(zip(tensors, given, strict=True))}).relu()

    session = Session(Config(target=H100, disable=KERNEL))
    (source,) = codegen(function, make, "sm_90", session)
    assert session.report.count("block_scaled_mm") == 1
    assert re.findall(r"(\w+)_kernel_\d+\.run\(", source) == kernels


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"rows": 64}, "64 rows are bound by reading the weight"),
        ({"rows": 65}, None),
        ({"name": "sm_100"}, "cuBLAS's product of blocks is for sm_90, not sm_100"),
        ({"k": 640}, "N is 512 and K 640, not multiples of 16 and 512"),
        ({"columns": 520}, "N is 520 and K 512, not multiples of 16 and 512"),
        ({"out_dtype": "float32"}, "it writes bfloat16, not float32"),
        ({"bias": torch.zeros(512)}, "it adds no bias"),
        ({"kind": "int8"}, "it is of float8_e4m3fn with float32 scales, weights in blocks of 128"),
        ({"kind": "fp8_powers"}, "it is of float8_e4m3fn with float32 scales, weights in blocks of 128"),
        ({"kind": "fp8_columns"}, "it is of float8_e4m3fn with float32 scales, weights in blocks of 128"),
    ],
    ids=str,
)
def test_hoppers_many_rows_are_cublas(changes: dict[str, Any], reason: str | None) -> None:
    sizes = {"kind": "fp8", "rows": 68, "columns": 512, "k": 512, **changes}
    name = sizes.pop("name", "sm_90")
    planned, why = block_scaled_mm.plan(Arch(name), product_of(**sizes))
    if reason is None:
        assert isinstance(planned, Plain)
        assert why == "cublas"
    else:
        assert isinstance(planned, Launch)
        assert backend("cublas")(Arch(name), **product_of(**sizes)) == reason


def test_cublas_wants_dense_operands() -> None:
    arguments = product_of("fp8", 68, 512, 1024)
    cublas = backend("cublas")
    wide = torch.empty(4, 12)[:, :8].copy_(arguments["b_scale"])
    assert "b_scale" in cublas(H100, **{**arguments, "b_scale": wide})
    across = arguments["a"].view(torch.uint8).t().contiguous().t().view(torch.float8_e4m3fn)
    assert "'a'" in cublas(H100, **{**arguments, "a": across})
    powers = {**arguments, "a_scheme": "fp8_group128,scale_dtype=float8_e8m0fnu"}
    assert "with float32 scales" in cublas(H100, **powers)


@pytest.mark.parametrize("kind", ["fp8", "fp8_columns"])
@pytest.mark.parametrize("rows", [65, 66, 67, 68])
def test_rows_for_cublas_are_padded(rows: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It wants multiples of 4, and the scales of a group side by side; what is there already is not copied."""
    arguments = {**product_of(kind, rows, 48, 512), "b_scheme": "fp8_block128"}
    arguments["b_scale"] = product_of("fp8", rows, 48, 512)["b_scale"]
    seen: list[torch.Tensor] = []

    def scaled_mm(a: torch.Tensor, b: torch.Tensor, a_scale: torch.Tensor, b_scale: torch.Tensor, **_: Any) -> Any:
        seen.extend((a, a_scale))
        whole = -(-rows // 4) * 4
        assert (tuple(a.shape), a.stride()) == ((whole, 512), (512, 1))
        assert (tuple(a_scale.shape), a_scale.stride()) == ((whole, 4), (1, whole))
        assert (b.stride(), b_scale.stride()) == ((1, 512), (1, 4))
        x = dequantize(a, a_scale, "fp8_group128")
        return (x @ dequantize(b.t(), b_scale.t(), "fp8_block128").t()).to(torch.bfloat16)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    planned, _ = block_scaled_mm.plan(H100, arguments)
    assert isinstance(planned, Plain)
    got = planned.function(**arguments)
    assert got.is_contiguous()
    assert torch.equal(got, block_scaled_mm.reference(**arguments))
    assert (seen[0].data_ptr() == arguments["a"].data_ptr()) == (rows % 4 == 0)
    as_wanted = rows % 4 == 0 and kind == "fp8_columns"
    assert (seen[1].data_ptr() == arguments["a_scale"].data_ptr()) == as_wanted


def test_old_cuda_has_no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    cublas = backend("cublas")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert cublas(H100, **product_of("fp8", 68, 512, 512)) == "it needs CUDA 12.9, not 12.8"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert isinstance(cublas(H100, **product_of("fp8", 68, 512, 512)), Plain)


@needs_cuda_build
def test_cublas_in_a_graph() -> None:
    """Its call stands in the graph, and the report names it; disabled, our kernel runs."""
    arguments = product_of("fp8", 68, 512, 512)
    names = ("a", "b", "a_scale", "b_scale")

    def model(*given: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = block_scaled_mm(*given)
        return made.relu()

    for disable, wanted in ((set(), "cublas"), ({"cublas"}, "triton")):
        config = Config(target=H100, disable=disable)
        report = fusionpass.explain(model, *(arguments[name] for name in names), config=config)
        (record,) = report.fused
        assert record.backend == wanted
        lowered = dict(report.graphs[0].snapshots)["lower"]
        assert ("aten._scaled_mm.default" in lowered) == (wanted == "cublas")
