"""What computes which product on which target: truth tables, on a machine that need not have any."""

import importlib.util
from typing import Any

import pytest

from fusionpass.arch import Arch
from fusionpass.errors import ArgumentError
from fusionpass.ops import block_scaled_mm, scaled_mm
from fusionpass.ops.gemm.dispatch import FEW, HALF, KINDS, SINGLE, Request, choose, why_not
from tests.blocks import product_of as blocks_of
from tests.gemm import INT8, product_of

TARGETS = (
    "cpu", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121", "gfx942",
    "gfx950",
)  # fmt: skip
FP8 = {"sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121", "gfx950"}
NOT_NVIDIA = ("cpu", "gfx942", "gfx950")
GPUS = {name for name in TARGETS if name not in ("cpu", "sm_75")}
CHOSEN_FOR_FEW = {
    # With more than one row measured on Hopper alone.
    "bf16": {**dict.fromkeys(TARGETS, "cublas"), "sm_90": "triton", **dict.fromkeys(NOT_NVIDIA, "reference")},
    "fp16": {**dict.fromkeys(TARGETS, "cublas"), "sm_90": "triton", **dict.fromkeys(NOT_NVIDIA, "reference")},
    "fp32": {**dict.fromkeys(TARGETS, "cublas"), **dict.fromkeys(NOT_NVIDIA, "reference")},
    "bf16_fp32": dict.fromkeys(GPUS, "triton"),
    "fp8_tensor": dict.fromkeys(FP8 | {"gfx942"}, "triton"),
    "fp8_row": dict.fromkeys(FP8 | {"gfx942"}, "triton"),
    "int8_row": dict.fromkeys(GPUS, "triton"),
    "fp8_block128": dict.fromkeys(FP8 | {"gfx942"}, "triton"),
    "int8_block128": dict.fromkeys(GPUS, "triton"),
    "mxfp8": dict.fromkeys(FP8, "triton"),
    "nvfp4": dict.fromkeys(FP8, "triton"),
}
LAST = {
    kind: next(name for name in ("upcast", "dequantize", "reference") if name in table) for kind, table in KINDS.items()
}


@pytest.fixture(autouse=True)
def only_triton(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The optional packages that are found."""
    there = {"triton"}

    def found(package: str) -> Any:
        return object() if package in there else None

    monkeypatch.setattr(importlib.util, "find_spec", found)
    return there


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TARGETS)
def test_few_rows(name: str, kind: str) -> None:
    chosen = choose(Arch(name), Request(kind, 8, 4096, 4096))
    assert chosen.algorithm == CHOSEN_FOR_FEW[kind].get(name, LAST[kind])
    table = list(KINDS[kind])
    assert list(chosen.rejected) == table[: table.index(chosen.algorithm)]
    assert all(chosen.rejected.values())


@pytest.mark.parametrize("name", TARGETS)
def test_many_rows(name: str) -> None:
    arch = Arch(name)
    for kind, least in (("bf16_fp32", 80), ("fp8_tensor", 89), ("fp8_row", 89), ("int8_row", 80)):
        most = SINGLE if kind == "fp8_tensor" else FEW
        chosen = choose(arch, Request(kind, most + 1, 4096, 4096))
        assert chosen.algorithm == ("cublas" if arch.is_cuda and arch.capability >= least else LAST[kind])
        if CHOSEN_FOR_FEW[kind].get(name) == "triton":
            assert chosen.rejected["triton"] == f"{most + 1} rows are bound by their products (at most {most})"
            assert choose(arch, Request(kind, most, 4096, 4096)).algorithm == "triton"
    for kind in ("bf16", "fp16"):
        assert (choose(arch, Request(kind, 1, 4096, 4096)).algorithm == "triton") == (name in GPUS)
        assert (choose(arch, Request(kind, None, 4096, 4096)).algorithm == "triton") == (name in GPUS)
        for rows, why in ((HALF, "was not measured on"), (HALF + 1, f"bound by their products (at most {HALF})")):
            chosen = choose(arch, Request(kind, rows, 4096, 4096))
            assert (chosen.algorithm == "triton") == (name == "sm_90" and rows == HALF)
            assert chosen.algorithm == "triton" or name not in GPUS or why in chosen.rejected["triton"]
    assert (choose(arch, Request("fp8_block128", FEW + 4, 4096, 4096)).algorithm == "cublas") == (name == "sm_90")
    for kind in ("fp8_block128", "int8_block128", "mxfp8", "nvfp4") if name != "sm_90" else ("mxfp8", "nvfp4"):
        assert choose(arch, Request(kind, 4096, 4096, 4096)) == choose(arch, Request(kind, 8, 4096, 4096))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kind", ["mxfp8", "nvfp4"])
def test_flashinfers_limits(kind: str, name: str, only_triton: set[str]) -> None:
    only_triton.add("flashinfer")
    arch = Arch(name)
    datacenter = name in ("sm_100", "sm_103")
    blackwell = datacenter or name in ("sm_110", "sm_120", "sm_121")

    def why(algorithm: str, columns: int = 4096, k: int = 4096, out_dtype: str = "bfloat16", layout: str = "") -> Any:
        lies = layout or ("trtllm" if algorithm == "flashinfer_trtllm" else "swizzled")
        return KINDS[kind][algorithm](arch, Request(kind, 8, columns, k, out_dtype, lies))

    def able(algorithm: str, **changes: Any) -> bool:
        return why(algorithm, **changes) is None

    assert able("flashinfer_cutlass") == blackwell
    assert able("flashinfer_trtllm") == able("flashinfer_cute_dsl") == datacenter
    assert not able("flashinfer_trtllm", k=4096 + 128)
    assert not able("flashinfer_trtllm", out_dtype="float16")
    assert able("flashinfer_cute_dsl", k=4096 + 128, out_dtype="float16") == datacenter
    assert not able("flashinfer_cutlass", out_dtype="float32")
    assert not any(
        able(algorithm, columns=96) or able(algorithm, k=96) for algorithm in KINDS[kind] if "flash" in algorithm
    )
    assert able("flashinfer_cutlass", columns=4096 + 16) == datacenter or name == "sm_110"
    # Each reads a weight that lies one way, and none a linear one.
    if datacenter:
        told = "w lies swizzled, not trtllm: repack_linears_ changes that"
        assert why("flashinfer_trtllm", layout="swizzled") == told
    for algorithm in ("flashinfer_trtllm", "flashinfer_cute_dsl", "flashinfer_cutlass"):
        assert not able(algorithm, layout="linear")
    only_triton.remove("flashinfer")
    if blackwell:
        assert why("flashinfer_cutlass") == "the package flashinfer is not installed"


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kind", ["mxfp8", "nvfp4"])
def test_the_layout_says_who_multiplies(kind: str, name: str, only_triton: set[str]) -> None:
    """FlashInfer where it is there and reads the weight, then cuBLAS, then the package's own kernel."""
    arch, datacenter = Arch(name), name in ("sm_100", "sm_103")
    blackwell = datacenter or name in ("sm_110", "sm_120", "sm_121")
    ours = CHOSEN_FOR_FEW[kind].get(name, "dequantize")
    for there in (False, True):
        only_triton -= {"flashinfer"}
        only_triton |= {"flashinfer"} if there else set()
        found = {
            layout: choose(arch, Request(kind, 512, 4096, 4096, layout=layout)).algorithm
            for layout in ("linear", "swizzled", "trtllm")
        }
        swizzled = "cublas" if blackwell else ours
        if there and blackwell:
            swizzled = "flashinfer_cute_dsl" if datacenter else "flashinfer_cutlass"
        trtllm = "flashinfer_trtllm" if there and datacenter else "dequantize"
        assert found == {"linear": ours, "swizzled": swizzled, "trtllm": trtllm}


@pytest.mark.parametrize("name", TARGETS)
def test_deep_gemms_limits(name: str, only_triton: set[str]) -> None:
    only_triton.add("deep_gemm")
    gate, there = KINDS["fp8_block128"]["deep_gemm"], name in ("sm_90", "sm_100")
    layout = "deepgemm" if name == "sm_100" else "linear"
    assert (gate(Arch(name), Request("fp8_block128", 8, 4096, 4096, layout=layout)) is None) == there
    if name == "sm_100":
        told = gate(Arch(name), Request("fp8_block128", 8, 4096, 4096))
        assert told == "w lies linear, not deepgemm: repack_linears_ changes that"
    if there:
        for changes, message in (
            ({"columns": 4096 + 32}, "N is 4128 and K 4096, not multiples of 64 and 128"),
            ({"k": 4096 + 64}, "N is 4096 and K 4160, not multiples of 64 and 128"),
            ({"out_dtype": "float32"}, "DeepGEMM writes bfloat16, not float32"),
        ):
            sizes: dict[str, Any] = {"columns": 4096, "k": 4096, **changes}
            assert gate(Arch(name), Request("fp8_block128", 8, layout=layout, **sizes)) == message


def test_cublas_knows_blocks_from_some_target_on() -> None:
    able = {
        kind: {
            name
            for name in TARGETS
            if KINDS[kind]["cublas"](Arch(name), Request(kind, 80, 4096, 4096, layout=layout)) is None
        }
        for kind, layout in (("fp8_block128", "linear"), ("mxfp8", "swizzled"), ("nvfp4", "swizzled"))
    }
    assert able["fp8_block128"] == {"sm_90"}
    packed = Request("fp8_block128", 80, 4096, 4096, layout="deepgemm")
    assert why_not(Arch("sm_90"), packed, "cublas") == "w lies deepgemm, not linear: repack_linears_ changes that"
    unknown = Request("fp8_block128", None, 4096, 4096)
    assert why_not(Arch("sm_90"), unknown, "cublas") == "the number of rows is symbolic"
    assert able["mxfp8"] == able["nvfp4"] == {name for name in FP8 if name not in ("sm_89", "sm_90", "gfx950")}


@pytest.mark.parametrize("name", TARGETS)
def test_deep_gemm_is_for_who_names_it(name: str, only_triton: set[str]) -> None:
    only_triton.add("deep_gemm")
    request = Request("fp8_block128", 512, 4096, 4096, layout="deepgemm" if name == "sm_100" else "linear")
    assert choose(Arch(name), request).algorithm != "deep_gemm"
    if name in ("sm_90", "sm_100"):
        assert choose(Arch(name), request, "deep_gemm").algorithm == "deep_gemm"
    else:
        with pytest.raises(ArgumentError, match=f"deep_gemm cannot: DeepGEMM is for sm_90 and sm_100, not {name}"):
            choose(Arch(name), request, "deep_gemm")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_dtype": "float16"}, "it is called for bfloat16 alone, not float16"),
        ({"columns": 4104}, "N is 4104 and K 4096, not multiples of 16 and 32"),
        ({"k": 4112}, "N is 4096 and K 4112, not multiples of 16 and 32"),
        ({"layout": "linear"}, "w lies linear, not swizzled: repack_linears_ changes that"),
        ({}, None),
    ],
    ids=str,
)
def test_cublas_limits_for_short_groups(changes: dict[str, Any], message: str | None) -> None:
    sizes: dict[str, Any] = {"columns": 4096, "k": 4096, "layout": "swizzled", **changes}
    assert why_not(Arch("sm_100"), Request("nvfp4", 8, **sizes), "cublas") == message


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(ArgumentError, match=r"there is no algorithm 'tritn'. Did you mean 'triton'\?"):
        choose(Arch("sm_90"), Request("mxfp8", 8, 4096, 4096), "tritn")


def test_without_triton(only_triton: set[str]) -> None:
    only_triton.clear()
    for kind in {*KINDS} - {"fp32"}:  # which has no kernel
        assert choose(Arch("sm_90"), Request(kind, 8, 4096, 4096)).rejected["triton"] == "triton is not installed here"


@pytest.mark.parametrize("name", [name for name in TARGETS if name.startswith("sm_")])
@pytest.mark.parametrize("rows", [1, SINGLE + 1, FEW + 1])
def test_plans_do_what_the_table_says(name: str, rows: int) -> None:
    arch = Arch(name)
    single = {key: blocks_of("fp8", 1, 1, 128)["a_scale"] for key in ("a_scale", "b_scale")}
    cases = [
        ("fp8_row", scaled_mm, product_of(rows, 48, 64)),
        ("fp8_tensor", scaled_mm, product_of(rows, 48, 64, **single)),
        ("int8_row", scaled_mm, product_of(rows, 48, 64, INT8)),
        ("fp8_block128", block_scaled_mm, blocks_of("fp8", rows, 48, 128)),
        ("int8_block128", block_scaled_mm, blocks_of("int8", rows, 48, 128)),
        ("mxfp8", block_scaled_mm, blocks_of("mxfp8", rows, 48, 128)),
        ("nvfp4", block_scaled_mm, blocks_of("nvfp4", rows, 48, 128)),
    ]
    for kind, op, arguments in cases:
        k = 64 if op is scaled_mm else 128
        chosen = choose(arch, Request(kind, rows, 48, k))
        launch, why = op.plan(arch, arguments)
        assert (launch is not None) == (chosen.algorithm == "triton"), (kind, why)
        if launch is None:
            assert why.endswith(f"triton: {chosen.rejected['triton']}")
