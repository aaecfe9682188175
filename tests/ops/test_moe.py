"""experts: what it computes, what its kernels refuse, and their code for targets that are not here."""

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fusionpass import Config
from fusionpass.aot import compile_launch
from fusionpass.arch import Arch
from fusionpass.errors import ArgumentError, TableWarning
from fusionpass.launch import Late, Launch
from fusionpass.ops import experts
from fusionpass.session import Session
from fusionpass.tuning.store import forget
from tests.fake_gpu import codegen, needs_cuda_build
from tests.moe import SCHEMES, coded, exact, mixture

pytest.importorskip("triton")
from fusionpass.ops.gemm.blocks_triton import Cut
from fusionpass.ops.moe.triton import CutWarning, blocks_of, configure, resolve

H100 = Arch("sm_90")
INSIDE = ["align", "block", "block", "combine"]
CODED = ["align", "block", "quantize", "block", "combine"]
QUANTISED = ["align", "quantize", "block", "quantize", "block", "combine"]


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("tokens", "top"), [(1, 2), (7, 3)])
def test_the_reference(tokens: int, top: int, scheme: str, activation: str) -> None:
    arguments = mixture(tokens, 256, 128, top=top, scheme=scheme, activation=activation)
    arguments["ids"][0, 0] = 99
    got = experts(**arguments)
    expected, terms = exact(arguments)
    assert (got.shape, got.dtype) == (arguments["x"].shape, torch.bfloat16)
    assert (got.double() - expected).norm() / expected.norm() < (0.02 if scheme else 5e-3)
    assert ((got.double() - expected).abs() <= (0.5 if scheme == "nvfp4" else 0.125 if scheme else 2**-7) * terms).all()


GPT_OSS: dict[str, Any] = {"bias": True, "activation": "clamped_swiglu", "interleaved": True}
"""What its experts have that others do not."""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_reference_with_biases_and_interleaved_rows(scheme: str) -> None:
    arguments = mixture(7, 256, 128, top=3, scheme=scheme, transposed=not scheme, **GPT_OSS, alpha=1.5, limit=1.25)
    arguments["ids"][0, 0] = 99
    got, (expected, terms) = experts(**arguments), exact(arguments)
    assert (got.double() - expected).norm() / expected.norm() < (0.02 if scheme else 5e-3)
    assert ((got.double() - expected).abs() <= (0.5 if scheme == "nvfp4" else 0.125 if scheme else 2**-7) * terms).all()
    for name, other in (("alpha", 1.0), ("limit", 7.0), ("interleaved", False), ("up_bias", None), ("down_bias", None)):
        wrong = experts(**{**arguments, name: other}).double()
        assert (wrong - expected).norm() / expected.norm() > 0.02, name


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_codes(scheme: str) -> None:
    arguments = mixture(7, 256, 128, top=3, scheme=scheme)
    assert torch.equal(experts(**coded(arguments)), experts(**arguments))
    launches = plan(coded(arguments))[0].all
    assert [part.kernel.fn.__name__ for part in launches] == [f"{name}_kernel" for name in CODED]
    with pytest.raises(ArgumentError, match=r"Pass one of .*bfloat16.* with codes, and else none"):
        experts(**{**coded(arguments), "out_dtype": ""})
    with pytest.raises(ArgumentError, match=r"x_scales is .* Pass .* here|x_scales is"):
        experts(**{**coded(arguments), "x_scales": torch.ones(7, 99)})
    with pytest.raises(ArgumentError, match="out_dtype 'bfloat16'"):
        experts(**{**arguments, "out_dtype": "bfloat16"})


@pytest.mark.parametrize("scheme", ["mxfp8,layout=swizzled", "fp8_group128,layout=column_major"])
def test_scales_in_another_order(scheme: str) -> None:
    with pytest.raises(ArgumentError, match="Pass a scheme with linear ones"):
        experts(**{**mixture(7, 256, 128, scheme=scheme.partition(",")[0]), "x_scheme": scheme})


def test_another_rounding() -> None:
    arguments = mixture(7, 256, 128, scheme="fp8_group128")
    divided = {**arguments, "x_scheme": "fp8_group128,rounding=divide"}
    expected = exact(divided)[0]
    assert (experts(**divided).double() - expected).norm() < 0.02 * expected.norm()
    assert isinstance(plan(divided)[0], Launch)


def test_no_token_and_no_expert_of_any() -> None:
    arguments = mixture(3, 64, 32)
    nothing = experts(**{**arguments, **{name: arguments[name][:0] for name in ("x", "ids", "weights")}})
    assert nothing.shape == (0, 64)
    assert (experts(**{**arguments, "ids": torch.full_like(arguments["ids"], -1)}) == 0).all()


def test_as_transformers_computes_it() -> None:
    moe = pytest.importorskip("transformers.integrations.moe")
    arguments = mixture(9, 64, 32, dtype=torch.float32)

    class Layer(torch.nn.Module):
        num_experts, has_gate, has_bias, is_transposed, has_post_expert_norm = 6, True, False, False, False
        _is_expert_parallel = False
        gate_up_proj, down_proj = arguments["up"], arguments["down"]

        def _apply_gate(self, given: torch.Tensor) -> torch.Tensor:
            gate, up = given.chunk(2, dim=-1)
            return torch.nn.functional.silu(gate) * up

    theirs = moe.grouped_mm_experts_forward(Layer(), arguments["x"], arguments["ids"], arguments["weights"])
    torch.testing.assert_close(experts(**arguments), theirs)


def test_compiled_whole() -> None:
    arguments = mixture(5, 64, 32)
    compiled = torch.compile(lambda given: experts(**given) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(arguments), experts(**arguments) * 2)


@pytest.mark.parametrize(
    ("scheme", "changes", "message"),
    [
        ("", {"activation": "sylu"}, r"there is no activation 'sylu'. Did you mean 'silu'\?"),
        ("", {"x_scheme": "mxfp4"}, r"there is no scheme 'mxfp4' for experts. Did you mean 'mxfp8'"),
        ("", {"x": torch.zeros(3)}, "Pass matrices, and stacks"),
        ("", {"x": torch.zeros(3, 32).bfloat16()}, r"Pass \[T, H\], \[E, 2·I, H\] and \[E, H, I\]"),
        ("", {"down": torch.zeros(6, 128, 64).bfloat16()}, r"Pass \[T, H\]"),
        ("", {"up": torch.zeros(6, 256, 128)}, "up torch.float32, down torch.bfloat16"),
        ("", {"ids": torch.zeros(3, 2)}, r"ids are torch.float32 \(3, 2\)"),
        ("", {"weights": torch.zeros(3, 3)}, r"weights \(3, 3\)"),
        ("", {"x_scale": torch.ones(())}, "there are scales and no scheme"),
        ("", {"up_bias": torch.zeros(6, 128)}, r"up_bias is torch.float32 \(6, 128\).*each of \[6, 256\]"),
        ("", {"down_bias": torch.zeros(6, 128).int()}, "down_bias is torch.int32"),
        ("mxfp8", {"up_scale": None}, r"up_scale is None.*has \[6, 256, 4\]"),
        ("fp8_group128", {"down_scale": torch.ones(6, 1)}, r"down_scale is \(6, 1\).*has \[6, 1, 1\]"),
        ("fp8_static", {"hidden_scale": None}, "hidden_scale does not fit.*takes one element"),
        ("mxfp8", {"x_scale": torch.ones(())}, "x_scale does not fit.*takes none"),
        ("nvfp4", {"up_global_scale": None}, r"up_global_scale does not fit.*takes \[E\]"),
    ],
)
def test_mistakes_are_named(scheme: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"(?s){message}"):
        experts(**{**mixture(3, 128, 128, scheme=scheme), **changes})


def plan(arguments: dict[str, Any], name: str = "sm_90") -> tuple[Any, str]:
    return experts.plan(Arch(name), arguments)


def test_what_the_kernels_refuse() -> None:
    arguments = mixture(3, 64, 32)
    assert plan(arguments, "cpu")[1] == "triton: the cpu has no Triton kernels"
    assert isinstance(plan(arguments, "sm_80")[0], Launch)
    assert plan(mixture(3, 128, 128, scheme="mxfp8"), "sm_80")[1] == "triton: sm_80 has no float8_e4m3fn"
    assert isinstance(plan(mixture(3, 128, 128, scheme="int8_group128"), "sm_80")[0], Launch)
    assert plan(mixture(3, 64, 32, dtype=torch.float32))[1] == "triton: x is torch.float32"
    assert plan({**arguments, "ids": arguments["ids"].to("meta")})[1] == "triton: ids is on meta, x on cpu"
    assert plan(mixture(3, 60, 32))[1] == "triton: up has 60 columns, not a multiple of 8"
    assert plan(mixture(3, 64, 28))[1] == "triton: down has 28 columns, not a multiple of 8"
    grouped = mixture(3, 128, 128, scheme="fp8_group128")
    odd = {"x": torch.zeros(3, 192).bfloat16(), "up": torch.zeros(6, 256, 192).to(torch.float8_e4m3fn)}
    assert "192" in plan({**grouped, **odd})[1]
    odd = {"up": torch.zeros(6, 384, 128).to(torch.float8_e4m3fn), "down": odd["up"][:, :128]}
    assert "192" in plan({**grouped, **odd})[1]
    apart = torch.zeros(6, 64, 128).bfloat16()[:, :, ::2]
    assert plan({**arguments, "up": apart})[1] == "triton: up has strides (8192, 128, 2)"
    turned = mixture(3, 64, 32, transposed=True)
    assert isinstance(plan(turned)[0], Launch)
    assert plan(mixture(3, 64, 36, transposed=True))[1] == "triton: down has 36 columns, not a multiple of 8"
    odd = {"up": torch.zeros(6, 64, 60).bfloat16().transpose(1, 2), "down": torch.zeros(6, 64, 30).bfloat16()}
    assert plan({**arguments, **odd})[1] == "triton: up is transposed and has 60 rows, not a multiple of 8"
    codes = torch.zeros(6, 128, 256).to(torch.float8_e4m3fn).transpose(1, 2)
    assert plan({**mixture(3, 128, 128, scheme="mxfp8"), "up": codes})[1] == (
        "triton: up is transposed, and the matrix units take codes by the row"
    )
    assert plan({**mixture(3, 64, 32, bias=True), "up_bias": torch.zeros(6, 128).bfloat16()[:, ::2]})[1] == (
        "triton: up_bias has strides (128, 2)"
    )
    assert plan({**arguments, "x": torch.zeros(3, 128).bfloat16()[:, ::2]})[1] == "triton: x has strides (128, 2)"


def test_symbolic_sizes() -> None:
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    arguments = mixture(6, 64, 32)

    def fake(name: str, *symbolic: int) -> torch.Tensor:
        given = arguments[name].clone()
        dims = [DimDynamic.DYNAMIC if d in symbolic else DimDynamic.STATIC for d in range(given.dim())]
        made: torch.Tensor = mode.from_tensor(given, symbolic_context=StatelessSymbolicContext(dims))
        return made

    weights = {name: fake(name) for name in ("up", "down")}
    tokens = {name: fake(name, 0) for name in ("x", "ids", "weights")}
    assert isinstance(plan({**weights, **arguments, **weights, **tokens})[0], Late)
    assert plan({**arguments, "up": fake("up", 0)})[1] == "triton: the size of up is symbolic"
    assert not environment.guards


def test_one_order_for_both_products() -> None:
    up, down = Cut(16, 64, 64), Cut(64, 128, 64, warps=8)
    with pytest.warns(CutWarning, match="the second product takes 16 rows a block, as the first, not 64"):
        made = resolve(up, down)
    assert (made.up, made.down) == (up, Cut(16, 128, 64, warps=8))
    assert made.reason == "the second product takes 16 rows a block, as the first, not 64"
    assert down == Cut(64, 128, 64, warps=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(up, Cut(16, 32, 64)).reason == ""


def table(folder: Path, name: str, **entry: int) -> None:
    (folder / name).write_text(json.dumps({"40": entry}))
    forget()


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Tables of the user's, which nothing else sees."""
    monkeypatch.setenv("FUSIONPASS_CONFIG_DIR", str(tmp_path))
    yield tmp_path
    forget()


def test_the_override_reaches_the_launches(tables: Path) -> None:
    """The order is padded for the rows of the first product; a second with others would read beside it."""
    device = "device_name=NVIDIA_H100_80GB_HBM3"
    table(tables, f"E=6,N=32,{device}.json", BLOCK_SIZE_M=32, BLOCK_SIZE_N=16, BLOCK_SIZE_K=64, num_warps=2)
    launch, _ = plan(mixture(40, 64, 32))
    assert [(one.args["ROWS"], one.args["COLUMNS"]) for one in launch.before if "COLUMNS" in one.args] == [
        (32, 16),
        (32, 32),
    ]
    assert launch.note == ""
    table(tables, f"E=6,N=32,{device}_down.json", BLOCK_SIZE_M=64, BLOCK_SIZE_N=64, BLOCK_SIZE_K=32, num_warps=8)
    with pytest.warns(CutWarning):
        launch, _ = plan(mixture(40, 64, 32))
    align, up, down = launch.before
    assert [one.args["ROWS"] for one in launch.before] == [32, 32, 32]
    assert align.args["order"].shape == (32 * align.args["blocks"],)
    assert up.args["order"] is down.args["order"] is align.args["order"]
    assert (up.num_warps, down.num_warps, down.args["COLUMNS"], down.args["DEPTH"]) == (2, 8, 64, 32)
    assert launch.note == "the second product takes 32 rows a block, as the first, not 64"


@pytest.mark.parametrize("which", ["", "_down"])
def test_null_leaves_a_mixture_to_pytorch(tables: Path, which: str) -> None:
    name = f"E=6,N=32,device_name=NVIDIA_H100_80GB_HBM3{which}.json"
    (tables / name).write_text('{"40": null}')
    forget()
    launch, why = plan(mixture(40, 64, 32))
    assert launch is None
    assert "something else was measured faster at 40 rows, E=6,N=32" in why
    assert isinstance(plan(mixture(1, 64, 32))[0], Launch), "that is more than four times fewer"


def test_what_the_products_cannot_be_cut_as(tables: Path) -> None:
    device = "device_name=NVIDIA_H100_80GB_HBM3"
    for name, entry, reason in (
        ("", {"BLOCK_SIZE_M": 1}, "tile: mixtures have no program for single rows"),
        ("", {"BLOCK_SIZE_M": 16, "SPLITS": 2}, "SPLITS: mixtures are not split along K, 2 ways"),
        (",dtype=fp8_w8a8,block_shape=[128, 128]", {"BLOCK_SIZE_K": 256}, "BLOCK_SIZE_K: 128 bytes share a scale"),
        (",dtype=mxfp8", {"BLOCK_SIZE_K": 16}, "the matrix units take"),
    ):
        scheme = {"": "", ",dtype=mxfp8": "mxfp8"}.get(name, "fp8_group128")
        table(tables, f"E=6,N=128,{device}{name}.json", **entry)
        with pytest.warns(TableWarning, match=reason):
            launch, _ = plan(mixture(40, 128, 128, scheme=scheme))
        up = next(one for one in launch.before if "WIDE" in one.args)
        assert up.args["ROWS"] == configure(H100, 80, 6, 128, 1 if scheme else 2).rows


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize(("pairs", "count"), [(1, 128), (8, 128), (100, 3), (4096, 128)])
def test_there_are_enough_blocks(pairs: int, count: int, rows: int) -> None:
    """For pairs spread over the experts so that as many as can be leave a block almost empty."""
    each = [1] * min(pairs, count)
    each[0] += pairs - len(each)
    assert sum(-(-n // rows) for n in each) <= blocks_of(pairs, count, rows)
    even = [pairs // count + (i < pairs % count) for i in range(count)]
    assert sum(-(-n // rows) for n in even) <= blocks_of(pairs, count, rows)


def test_rows_follow_the_pairs_of_an_expert() -> None:
    rows = [configure(H100, pairs, 128, 768, 2).rows for pairs in (8, 2048, 4096, 65536)]
    assert rows == [16, 16, 32, 64]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("name", ["sm_89", "sm_90", "sm_100", "sm_120", "gfx950"])
def test_compiles(name: str, tokens: int, scheme: str) -> None:
    launch, why = plan(mixture(tokens, 256, 128, 8, scheme=scheme), name)
    assert launch is not None, why
    made = [compile_launch(part, Arch(name)) for part in launch.all]
    texts = [one.get("ptx") or one["amdgcn"] for one in made]
    products = [text for part, text in zip(launch.all, texts, strict=True) if "WIDE" in part.args]
    assert len(products) == 2
    for text in products:
        assert re.search("wgmma|mma.sync|tcgen05.mma|v_mfma", text)
    if name != "gfx950":
        assert not any(re.search(r"(ld|st)\.local", text) for text in texts)
        assert all(("griddepcontrol.wait" in text) == (name != "sm_89") for text in texts)


@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_compiles_with_biases_and_interleaved_rows(name: str, tokens: int) -> None:
    launch, why = plan(mixture(tokens, 256, 128, 8, transposed=True, **GPT_OSS), name)
    assert launch is not None, why
    up, down = (compile_launch(part, Arch(name)) for part in launch.all if "WIDE" in part.args)
    for made in (up, down):
        text = made.get("ptx") or made["amdgcn"]
        assert re.search("wgmma|mma.sync|tcgen05.mma|v_mfma", text)
        if name != "gfx942":
            assert "cp.async.cg" in text, "the weights do not come in whole 16 bytes"
            assert not re.search(r"(ld|st)\.local", text)


@needs_cuda_build
@pytest.mark.parametrize(("scheme", "kernels"), [("", INSIDE), ("fp8_group128", QUANTISED), ("nvfp4", QUANTISED)])
def test_in_inductors_wrapper(scheme: str, kernels: list[str]) -> None:
    arguments = mixture(4, 256, 128, scheme=scheme)
    tensors = {name: given for name, given in arguments.items() if isinstance(given, torch.Tensor)}

    def make() -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(given, device="cuda") for given in tensors.values())

    def function(*given: torch.Tensor) -> torch.Tensor:
        return experts(**{**arguments, **dict(zip(tensors, given, strict=True))}).relu()

    session = Session(Config(target=H100))
    (source,) = codegen(function, make, "sm_90", session)
    assert session.report.count("experts") == 1
    assert re.findall(r"(\w+)_kernel_\d+\.run\(", source) == kernels


@needs_cuda_build
def test_transposed_weights_are_not_copied() -> None:
    arguments = mixture(4, 256, 128, transposed=True, **GPT_OSS)
    tensors = {name: given for name, given in arguments.items() if isinstance(given, torch.Tensor)}
    stored = {**tensors, **{name: tensors[name].transpose(1, 2) for name in ("up", "down")}}

    def make() -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(given, device="cuda") for given in stored.values())

    def function(*given: torch.Tensor) -> torch.Tensor:
        named = dict(zip(stored, given, strict=True))
        return experts(**{**arguments, **named, **{n: named[n].transpose(1, 2) for n in ("up", "down")}})

    (source,) = codegen(function, make, "sm_90", Session(Config(target=H100)))
    assert re.findall(r"(\w+)_kernel_\d+\.run\(", source) == INSIDE
    assert "triton_" not in source.partition("def call(")[2]
