"""The decode kernels on the device: against float64, the reference, and under programmatic dependent launch."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusionpass.arch import Arch
from fusionpass.launch import Launch
from fusionpass.ops import attention, attention_quantize
from fusionpass.ops.quant.scheme import Scheme

pytest.importorskip("triton")
from fusionpass.ops.attention.decode_triton import Cut
from tests.attention import (
    SCHEMES,
    Family,
    arguments_for_attention,
    check_attention,
    check_attention_quantize,
    cuts,
    families,
)

DEVICE = torch.device("cuda")
BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
# Rows of whole 16 bytes mostly: each other kind of stride is another kernel to compile.
PADS = (0, 0, 0, 0, 0, 16, 16, 8, 3)
FAMILIES = [
    (Family(BF16, 128, 128, 4, 1, PADS), None),
    (Family(BF16, 128, 128, 4, 1, PADS), Cut(64, 5, 4)),
    (Family(BF16, 128, 128, 8, 1, PADS), Cut(32, 3, 4)),
    (Family(BF16, 128, 128, 16, 2, PADS), Cut(64, 4, 4)),
    (Family(BF16, 128, 128, 1, 1, PADS), Cut(16, 7, 4)),
    (Family(BF16, 64, 64, 3, 1, PADS), Cut(128, 2, 4)),
    (Family(BF16, 64, 64, 8, 1, PADS), None),
    (Family(BF16, 80, 80, 1, 2, PADS), Cut(64, 3, 4)),
    (Family(BF16, 96, 96, 4, 5, PADS), Cut(64, 1, 4)),
    (Family(BF16, 192, 128, 1, 4, PADS), Cut(32, 6, 4)),
    (Family(BF16, 256, 256, 2, 1, PADS), Cut(32, 4, 4)),
    (Family(BF16, 256, 256, 8, 4, PADS), Cut(32, 2, 4)),
    (Family(FP16, 128, 128, 4, 1, PADS), Cut(64, 5, 4)),
    (Family(FP16, 128, 128, 7, 3, PADS), Cut(64, 1, 4)),
    (Family(FP16, 64, 64, 1, 1, PADS), Cut(128, 3, 4)),
    (Family(FP16, 64, 64, 4, 8, PADS), Cut(64, 9, 4)),
    (Family(FP16, 80, 80, 2, 1, PADS), None),
    (Family(FP16, 256, 256, 1, 1, PADS), Cut(32, 8, 4)),
    (Family(FP16, 8, 8, 2, 2, PADS), Cut(16, 2, 4)),
    (Family(FP16, 40, 64, 3, 2, PADS), Cut(32, 2, 4)),
    (Family(BF16, 128, 128, 4, 1, PADS, FP8), None),
    (Family(BF16, 128, 128, 8, 2, PADS, FP8), Cut(64, 5, 4)),
    (Family(BF16, 64, 64, 4, 1, PADS, FP8), Cut(128, 3, 4)),
    (Family(FP16, 80, 80, 2, 1, PADS, FP8), Cut(32, 2, 4)),
    (Family(BF16, 256, 256, 2, 4, PADS, FP8), Cut(32, 4, 4)),
]
QUANTISED = [
    (Family(BF16, 128, 128, 4, 1, PADS), None),
    (Family(BF16, 128, 128, 4, 2, PADS), Cut(64, 5, 4)),
    (Family(BF16, 128, 128, 2, 1, PADS, FP8), Cut(64, 1, 4)),
    (Family(FP16, 80, 80, 2, 1, PADS), Cut(32, 3, 4)),
    (Family(BF16, 64, 64, 7, 4, PADS), Cut(64, 4, 4)),
]
quiet = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def arch() -> Arch:
    return Arch.of(DEVICE)


@pytest.mark.parametrize(("family", "cut"), FAMILIES, ids=lambda v: "" if v is None else str(v))
@settings(max_examples=95, **quiet)
@given(data=st.data())
def test_drawn_arguments(family: Family, cut: Cut | None, data: st.DataObject) -> None:
    check_attention(Arch.of(DEVICE), data.draw(arguments_for_attention(family, "cuda", 1500)), cut)


@settings(max_examples=100, **quiet)
@given(data=st.data())
def test_drawn_kernels(data: st.DataObject) -> None:
    arguments = data.draw(arguments_for_attention(data.draw(families()), "cuda", 1500))
    check_attention(Arch.of(DEVICE), arguments, data.draw(cuts()))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("family", "cut"), QUANTISED, ids=lambda v: "" if v is None else str(v))
@settings(max_examples=20, **quiet)
@given(data=st.data())
def test_drawn_quantisations(family: Family, cut: Cut | None, scheme: str, data: st.DataObject) -> None:
    if family.v_width % (Scheme.parse(scheme).group or 1):
        pytest.skip("the heads are no whole groups")
    arguments = data.draw(arguments_for_attention(family, "cuda", 1500))
    check_attention_quantize(Arch.of(DEVICE), arguments, scheme, data.draw(st.booleans()), cut)


def sample(batch: int, heads: int, kv_heads: int, positions: int, width: int, tokens: int = 1, **more: Any) -> Any:
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(count: int, rows: int) -> torch.Tensor:
        return torch.randn(batch, count, rows, width, generator=generator, device=DEVICE).to(BF16)

    made = {"q": drawn(heads, tokens), "k": drawn(kv_heads, positions), "v": drawn(kv_heads, positions)}
    return attention.bind((), {**made, **more})


@pytest.mark.parametrize("filled", [1, 100, 4095, 4096])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "width"),
    [(1, 32, 8, 128), (8, 32, 8, 128), (1, 9, 3, 64), (1, 64, 8, 64), (2, 16, 1, 256), (4, 8, 8, 80)],
)
@pytest.mark.parametrize("added", [False, True])
def test_static_caches_of_models(
    batch: int, heads: int, kv_heads: int, width: int, filled: int, added: bool, arch: Arch
) -> None:
    mask = (torch.arange(4096, device=DEVICE) < filled).expand(batch, 1, 1, 4096)
    if added:
        mask = torch.where(mask, 0.0, -torch.inf).to(BF16)
    check_attention(arch, sample(batch, heads, kv_heads, 4096, width, mask=mask))


@pytest.mark.parametrize("scheme", ["fp8_static", "fp8_token", "int8_token", "mxfp8"])
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("codes", [False, True])
def test_static_caches_of_models_quantised(batch: int, codes: bool, scheme: str, arch: Arch) -> None:
    """Many programs share a token's scale: whoever is last must see what all others wrote, each time."""
    mask = (torch.arange(4096, device=DEVICE) < 1000).expand(batch, 1, 1, 4096)
    arguments = sample(batch, 32, 8, 4096, 128, mask=mask)
    if codes:
        step = torch.full((), 0.01, device=DEVICE)
        # What is out of range would become NaN.
        arguments |= {name: (arguments[name] / step).clamp(-448, 448).to(FP8) for name in ("k", "v")}
        arguments |= {"k_scale": step, "v_scale": step}
        check_attention(arch, arguments)
    for _ in range(50):
        check_attention_quantize(arch, arguments, scheme, False)


def test_past_32_bit_offsets(arch: Arch) -> None:
    heads, width = 8, 128
    positions = 2**31 // (heads * width) + 4096
    k, v = (torch.zeros(1, positions, heads, width, dtype=BF16, device=DEVICE).transpose(1, 2) for _ in range(2))
    last = sample(1, 32, heads, 300, width)
    for whole, few in ((k, last["k"]), (v, last["v"])):
        whole[:, :, -300:] = few
    seen = torch.zeros(1, 1, 1, positions, dtype=torch.bool, device=DEVICE)
    seen[..., -300:] = True
    launch, why = attention.plan(arch, {**last, "k": k, "v": v, "mask": seen})
    assert launch is not None, why
    (result,) = launch.run()
    expected = check_attention(arch, last)
    assert (result.double() - expected.double()).abs().max() <= 2 * torch.finfo(BF16).eps * expected.abs().max()


def plainly(launch: Launch) -> Launch:
    """Without programmatic dependent launch."""
    before = tuple(plainly(part) for part in launch.before)
    return dataclasses.replace(launch, pdl=False, args={**launch.args, "PDL": False}, before=before)


@pytest.mark.parametrize("positions", [64, 1024])
def test_chain_under_dependent_launch(positions: int, arch: Arch) -> None:
    """Each kernel reads what the one before it wrote: launching early must not let it read too early."""
    mask = (torch.arange(positions, device=DEVICE) < positions - 9)[None, None, None]
    first = sample(2, 32, 8, positions, 128, mask=mask)

    def chain(dependent: bool) -> torch.Tensor:
        q = first["q"]
        for _ in range(40):
            launch, why = attention.plan(arch, {**first, "q": q})
            assert launch is not None, why
            (attended,) = (launch if dependent else plainly(launch)).run()
            q = attended
        return q

    expected = chain(False)
    torch.cuda.synchronize()
    chain(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(True)
    for _ in range(5):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, expected)


@pytest.mark.parametrize("scheme", ["fp8_static", "fp8_token"])
def test_quantised_under_dependent_launch(scheme: str, arch: Arch) -> None:
    """A chain in a CUDA graph, in which each step's counts must start from zero again."""
    first = sample(4, 32, 8, 1024, 128)
    first = {"softmax_scale" if k == "scale" else k: v for k, v in first.items() if k != "joined"}
    scale = torch.full((), 0.01, device=DEVICE) if scheme == "fp8_static" else None
    asked = attention_quantize.bind((), {**first, "scheme": scheme, "scale": scale, "attended_out": True})

    def chain(dependent: bool) -> list[torch.Tensor]:
        q, made = asked["q"], []
        for _ in range(20):
            launch, why = attention_quantize.plan(arch, {**asked, "q": q})
            assert launch is not None, why
            made = (launch if dependent else plainly(launch)).run()
            q = made[-1].view(4, 1, 32, 128).transpose(1, 2)
        return made

    expected = chain(False)
    torch.cuda.synchronize()
    chain(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(True)
    for _ in range(5):
        for one in captured:
            one.view(torch.uint8).fill_(0xA5)
        graph.replay()
        assert all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(captured, expected, strict=True)
        )


def test_called_as_an_op_it_runs_the_kernel(arch: Arch) -> None:
    arguments = sample(2, 8, 2, 700, 64, tokens=2, causal=True)
    launch, why = attention.plan(arch, arguments)
    assert launch is not None, why
    assert torch.equal(attention(**arguments), launch.run()[0])


def test_many_tokens_run_the_reference(arch: Arch) -> None:
    arguments = sample(1, 8, 2, 300, 64, tokens=300, causal=True)
    assert attention.plan(arch, arguments)[0] is None
    assert torch.equal(attention(**arguments), attention.reference(**arguments))
