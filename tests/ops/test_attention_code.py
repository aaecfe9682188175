"""The code of attention's kernels for targets that this machine does not have, and in Inductor's wrapper."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fusionpass import Config
from fusionpass.aot import compile_launch
from fusionpass.arch import Arch
from fusionpass.graphs import same_strides
from fusionpass.ops import attention, attention_quantize
from fusionpass.ops.quant.scheme import Scheme
from fusionpass.session import Session

pytest.importorskip("triton")
from tests.fake_gpu import codegen, needs_cuda_build

H100 = Arch("sm_90")
BF16, F32 = torch.bfloat16, torch.float32


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def compiled(
    name: str, width: int, kind: str = "bool", rows: int = 4, positions: int = 4096, dtype: torch.dtype = BF16
) -> list[str]:
    """The code of each launch, for a static cache."""
    kinds = {"bool": torch.bool, "rows": torch.bool, "added": dtype, "wide": F32}
    mask = meta(1, rows if kind == "rows" else 1, 1, positions, dtype=kinds[kind]) if kind in kinds else None
    k = meta(1, 1, positions, width, dtype=dtype)
    launch, why = attention.plan(Arch(name), attention.bind((meta(1, rows, 1, width, dtype=dtype), k, k, mask), {}))
    assert launch is not None, why
    made = [compile_launch(part, Arch(name)) for part in launch.all]
    return [asm["ptx"] if "ptx" in asm else asm["amdgcn"] for asm in made]


@pytest.mark.parametrize("name", ["sm_90", "sm_100", "sm_120", "gfx942", "gfx950"])
@pytest.mark.parametrize("width", [64, 80, 96, 128, 192, 256])
def test_compiles(name: str, width: int) -> None:
    decode, combine = compiled(name, width)
    if name.startswith("sm"):
        assert "mma.sync.aligned.m16n8k16" in decode
        # Whole rows of 80 too come 16 bytes a thread.
        assert re.search(r"ld\.global[\w.:]*\.v4\.b32", decode)
        assert "griddepcontrol.wait" in decode
        assert "griddepcontrol.wait" in combine
    else:
        assert re.search(r"v_mfma_f32_(16x16x|32x32x)\d+_?bf16", decode)


CACHES = {"sm_90": torch.float8_e4m3fn, "gfx942": torch.float8_e4m3fnuz}


def quantising(name: str, scheme: str, codes: bool = False, width: int = 128, positions: int = 4096) -> list[str]:
    """The code of each launch, with one KV head for four of queries, over a cache of codes or not."""
    dtype = CACHES.get(name, torch.float8_e4m3fn)
    k = meta(1, 1, positions, width, dtype=dtype if codes else BF16)
    scales = dict.fromkeys(("k_scale", "v_scale"), meta(1, dtype=F32)) if codes else {}
    if name == "gfx942" and scheme.startswith("fp8"):
        scheme += ",dtype=float8_e4m3fnuz"
    given = {"scale": meta(1, dtype=F32) if Scheme.parse(scheme).takes_scale else None, "scheme": scheme, **scales}
    asked = attention_quantize.bind((meta(1, 4, 1, width), k, k), given)
    launch, why = attention_quantize.plan(Arch(name), asked)
    assert launch is not None, why
    made = [compile_launch(part, Arch(name)) for part in launch.all]
    return [asm["ptx"] if "ptx" in asm else asm["amdgcn"] for asm in made]


@pytest.mark.parametrize("name", ["sm_90", "sm_100", "sm_120", "gfx942", "gfx950"])
@pytest.mark.parametrize(("scheme", "codes"), [("fp8_static", False), ("fp8_token", True), ("int8_token", False)])
def test_quantisation_compiles(name: str, scheme: str, codes: bool) -> None:
    decode, combine = quantising(name, scheme, codes)
    if name.startswith("sm"):
        assert "mma.sync.aligned.m16n8k16" in decode
        assert ("cvt.rn.f16x2.e4m3x2" in decode) == codes
        assert ("cvt.rn.satfinite.e4m3x2.f32" in combine) == scheme.startswith("fp8")
        assert ("atom.global.gpu.acq_rel" in combine or "atom.acq_rel.gpu.global" in combine) == ("token" in scheme)
        assert not re.search(r"(ld|st)\.local", decode + combine)


@pytest.mark.parametrize("positions", [32, 4096])
@pytest.mark.parametrize("scheme", ["fp8_group128", "mxfp8", "nvfp4", "int8_group128"])
def test_quantisation_by_group_compiles(scheme: str, positions: int) -> None:
    *_, last = quantising("sm_90", scheme, positions=positions)
    assert not re.search(r"(ld|st)\.local", last)


def test_a_whole_token_is_stored_before_it_is_counted_and_read_past_the_nearest_cache() -> None:
    combine = quantising("sm_90", "fp8_token")[1]
    counted = re.search(r"atom\.[\w.]*acq_rel[\w.]*", combine)
    assert counted is not None
    barrier, head = combine.rindex("bar.sync", 0, counted.start()), combine.index("st.global")
    assert head < barrier < counted.start()
    read = [m.start() for m in re.finditer(r"ld\.global\.cg", combine)]
    launch = combine.index("griddepcontrol.launch_dependents")
    assert counted.start() < read[0] <= read[-1] < launch
    assert not re.search(r"ld\.global", combine[launch:])
    assert combine.count("griddepcontrol.launch_dependents") == 1


@pytest.mark.parametrize("rows", [1, 16, 32])
@pytest.mark.parametrize("kind", ["none", "bool", "rows", "added", "wide"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_nothing_spills(dtype: torch.dtype, kind: str, rows: int) -> None:
    for width in (64, 128, 256):
        for text in compiled("sm_90", width, kind, rows, dtype=dtype):
            assert not re.search(r"(ld|st)\.local", text)


@pytest.mark.parametrize("positions", [64, 4096])
@pytest.mark.parametrize("kind", ["none", "bool", "added"])
def test_waits_and_loads_before_it_launches_its_dependents(kind: str, positions: int) -> None:
    for text in compiled("sm_90", 128, kind, positions=positions):
        wait, launch = text.index("griddepcontrol.wait"), text.index("griddepcontrol.launch_dependents")
        assert wait < text.index("ld.global") <= text.rindex("ld.global") < launch < text.index("st.global")


def test_keys_and_values_are_behind_the_branch_and_both_asked_for_before_one_is_waited_for() -> None:
    decode = compiled("sm_90", 128)[0]
    loads = [m.start() for m in re.finditer(r"ld\.global[\w.:]*\.v4\.b32", decode)]
    queries, mask, rest = loads[:2], loads[2], loads[3:]
    assert queries[-1] < mask < decode.index("bar.sync")  # 2048 positions at once
    assert len(rest) == 8  # 32 rows of 256 bytes, twice, over 128 threads
    assert re.search(r"@%p\d+ bra", decode[queries[-1] : rest[0]])
    assert "bar.sync" not in decode[rest[0] : rest[-1]]


@needs_cuda_build
@pytest.mark.parametrize("kind", ["none", "bool", "added", "causal"])
@pytest.mark.parametrize("shape", [(1, 32, 8, 1, 128), (2, 8, 8, 3, 64), (3, 8, 2, 4, 80)], ids=str)
def test_the_layout_is_that_of_the_reference_on_a_gpu(shape: tuple[int, ...], kind: str) -> None:
    batch, heads, kv_heads, tokens, width = shape
    with FakeTensorMode():
        q = torch.empty(batch, tokens, heads, width, dtype=BF16, device="cuda").transpose(1, 2)
        k = torch.empty(batch, kv_heads, 100, width, dtype=BF16, device="cuda")
        dtype = torch.bool if kind == "bool" else BF16
        mask = torch.empty(batch, 1, tokens, 100, dtype=dtype, device="cuda") if kind in ("bool", "added") else None
        expected = attention.reference(q, k, k, mask, kind == "causal")
    launch, why = attention.plan(H100, attention.bind((q, k, k, mask, kind == "causal"), {}))
    assert launch is not None, why
    out = launch.args["out"]
    assert (tuple(out.shape), out.dtype) == (tuple(expected.shape), expected.dtype)
    assert same_strides(out.shape, out.stride, expected.stride())


@needs_cuda_build
@pytest.mark.parametrize("dynamic", [False, True])
def test_in_inductors_wrapper(dynamic: bool) -> None:
    """Both kernels, the parts in buffers of their own, and the heads joined into rows without a copy."""

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, mask).transpose(1, 2).reshape(2, 1, 512)

    def make() -> tuple[torch.Tensor, ...]:
        k, v = (torch.empty(2, 2, 999, 64, dtype=BF16, device="cuda") for _ in range(2))
        mask = torch.empty(2, 1, 1, 999, dtype=torch.bool, device="cuda")
        for tensor, dim in ((k, 2), (v, 2), (mask, 3)) if dynamic else ():
            torch._dynamo.mark_dynamic(tensor, dim)
        return torch.empty(2, 8, 1, 64, dtype=BF16, device="cuda"), k, v, mask

    session = Session(Config(target=H100))
    (source,) = codegen(function, make, "sm_90", session)
    assert session.report.count("attention") == 1
    calls = re.findall(r"(\w+)\.run\(", source)
    assert ["decode" in calls[0], "combine" in calls[1], len(calls)] == [True, True, 2]
    assert source.count("empty_strided_cuda(") - source.count("def empty_strided_cuda(") == 4
