"""The kernels of mixtures of experts on the device: against float64, beside PyTorch's grouped products, in a graph."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fusionpass
from fusionpass.arch import Arch
from fusionpass.ops import experts

pytest.importorskip("triton")
from fusionpass.ops.gemm.blocks_triton import Cut
from tests.families import FAMILIES
from tests.moe import SCHEMES, check_mixture, coded, mixture

DEVICE = torch.device("cuda")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_drawn_sizes_and_cuts(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    scheme = data.draw(st.sampled_from(SCHEMES))
    unit = 128 if scheme else 8
    sizes = [unit * data.draw(st.integers(1, 400 // unit)) for _ in range(2)]
    choices = data.draw(st.integers(1, min(count, 8)))
    more = {name: data.draw(st.booleans()) for name in ("bias", "transposed", "interleaved")}
    more["activation"] = data.draw(st.sampled_from(["silu", "gelu", "clamped_swiglu"]))
    arguments = mixture(data.draw(st.integers(1, 60)), *sizes, count, choices, scheme, device="cuda", **more)
    ids = arguments["ids"]
    ids[torch.rand(ids.shape, device="cuda") < data.draw(st.sampled_from([0.0, 0.2]))] = -1
    cuts = None
    if data.draw(st.booleans()):
        rows = data.draw(st.sampled_from([16, 32, 64, 128]))
        depth = data.draw(st.sampled_from([32, 64]))
        cuts = [Cut(rows, data.draw(st.sampled_from([32, 64])), depth, grouped=4, stages=3) for _ in range(2)]
    check_mixture(Arch.of(DEVICE), arguments, cuts)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tokens", [1, 33, 600])
@pytest.mark.parametrize("shape", [(2048, 768, 128, 8), (7168, 256, 64, 8)], ids=["qwen3_30b", "deepseek_v3_tp8"])
def test_shapes_of_models(shape: tuple[int, int, int, int], tokens: int, scheme: str) -> None:
    hidden, inner, count, top = shape
    arguments = mixture(tokens, hidden, inner, count, top, scheme, device="cuda")
    got = check_mixture(Arch.of(DEVICE), arguments).double()
    if scheme != "nvfp4":
        # PyTorch's products are of bfloat16, to which weights of nvfp4 have to be rounded: other codes come of that.
        expected = experts.reference(**arguments).double()
        assert (got - expected).norm() / expected.norm() < (0.02 if scheme else 5e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tokens", [1, 33, 600])
def test_shapes_of_gpt_oss(tokens: int, scheme: str) -> None:
    """Biases, and gate and up side by side; 2944 columns where there are groups, of which 2880 is no multiple."""
    wide = 2944 if scheme else 2880
    given = {"bias": True, "transposed": True, "interleaved": True, "activation": "clamped_swiglu"}
    check_mixture(Arch.of(DEVICE), mixture(tokens, wide, wide, 32, 4, scheme, device="cuda", **given))


@pytest.mark.parametrize("scheme", SCHEMES[1:])
@pytest.mark.parametrize("tokens", [1, 33, 600])
def test_codes(tokens: int, scheme: str) -> None:
    check_mixture(Arch.of(DEVICE), coded(mixture(tokens, 2048, 768, 64, 8, scheme, device="cuda")))


def test_the_same_each_time() -> None:
    """Though pairs of one expert come in any order."""
    arguments = mixture(700, 256, 128, 8, 2, device="cuda")
    first = experts(**arguments)
    assert all(torch.equal(experts(**arguments), first) for _ in range(20))


def test_in_a_graph_with_other_choices() -> None:
    """The kernels read who was chosen: nothing of it is in the graph."""
    given = [mixture(20, 256, 128, 16, 4, device="cuda", **more) for more in ({}, {})]
    generator = torch.Generator("cuda").manual_seed(7)
    static: dict[str, Any] = {**given[0], "ids": given[0]["ids"].clone()}
    experts(**static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts(**static)
    for _ in range(20):
        static["ids"].copy_(torch.randint(-1, 16, (20, 4), generator=generator, device="cuda"))
        graph.replay()
        assert torch.equal(out, experts(**static))


@pytest.mark.parametrize("name", ["Qwen3-MoE", "GPT-OSS"])
def test_a_model_of_transformers(name: str) -> None:
    """Its experts become the kernels, and the logits are eager's but for roundings that sums in another order move."""
    pytest.importorskip("transformers")
    (family,) = [one for one in FAMILIES if one.name == name]
    model, inputs = family.build()
    model, inputs = model.cuda().eval(), {**inputs, "input_ids": inputs["input_ids"].cuda()}
    compiled = fusionpass.compile(model, cache=False)
    with torch.no_grad():
        expected, got = model(**inputs), compiled(**inputs)
    found = [record for record in fusionpass.report(compiled).fused if record.op == "experts"]
    assert [record.backend for record in found] == ["triton"] * 2
    difference = (got.logits.double() - expected.logits.double()).norm()
    assert difference <= 0.03 * expected.logits.double().norm()


def logits_of_moved(model: torch.nn.Module, inputs: dict[str, Any], seed: int) -> torch.Tensor:
    """The logits in eager mode where two of three of the embedding's elements are a step of bfloat16 away."""
    other = copy.deepcopy(model)
    weight = other.get_input_embeddings().weight
    generator = torch.Generator("cuda").manual_seed(seed)
    step = torch.randint(-1, 2, weight.shape, generator=generator, device="cuda") * 2.0**-8
    with torch.no_grad():
        weight.mul_(1 + step)
        logits: torch.Tensor = other(**inputs).logits
    return logits.double()


@pytest.mark.parametrize("scheme", ["fp8_static", "fp8_group128", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("name", ["Qwen3-MoE", "GPT-OSS"])
def test_a_quantised_model(name: str, scheme: str) -> None:
    """Compiled, it computes what it does in eager mode: experts' codes come from the norm, and go to the kernels."""
    pytest.importorskip("transformers")
    (family,) = [one for one in FAMILIES if one.name == name]
    model, inputs = family.build()
    model, inputs = model.cuda().eval(), {**inputs, "input_ids": inputs["input_ids"].cuda()}
    data = [inputs] if scheme in ("fp8_static", "nvfp4") else None
    fusionpass.quantize_(model, scheme, data, skip="lm_head")
    with torch.no_grad():
        expected = model(**inputs).logits.double()
        # Codes on either side of a rounding are a step apart, and so are experts chosen by nearly equal scores: what
        # that does to a model is what a step of bfloat16 in its embedding does.
        moved = max((logits_of_moved(model, inputs, seed) - expected).norm() for seed in range(4))
        compiled = fusionpass.compile(model, cache=False)
        got = compiled(**inputs).logits.double()
    found = [record for record in fusionpass.report(compiled).fused if record.op == "experts"]
    assert [record.backend for record in found] == ["triton"] * 2
    assert moved <= 0.5 * expected.norm()
    assert (got - expected).norm() <= 1.5 * moved + 0.01 * expected.norm()
