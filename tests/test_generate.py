"""Hugging Face's `generate` through a compiled model: the same tokens, and few graphs for many lengths."""

import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

import fusionpass
from fusionpass.errors import RecompileWarning
from tests.profiles import NIGHTLY

transformers = pytest.importorskip("transformers")
HOW: dict[str, Any] = {"max_new_tokens": 4, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _without_a_compiler() -> Iterator[None]:
    """Graphs are made, and every node in them calls ATen: what is asked here is how many graphs, and which tokens.

    Not those over lists of tensors: a call in place returns nothing, where Inductor expects what was written.
    """
    from torch._inductor import config, graph

    def falls_back(node: torch.fx.Node) -> bool:
        return "_foreach" not in str(node.target) and real(node)

    real = graph.should_fallback_by_default
    with config.patch(fallback_by_default=True), mock.patch.object(graph, "should_fallback_by_default", falls_back):
        yield


def tiny() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=128,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = transformers.Qwen3ForCausalLM(config).eval()  # float32: in bfloat16 two tokens may be one ulp apart
    fusionpass.quantize_(model, "fp8_token", skip=("lm_head",))
    return model


@pytest.mark.filterwarnings("error", category=RecompileWarning)
def test_a_static_cache() -> None:
    model = tiny()
    shapes = [(1, 5), (1, 9), (1, 1), (3, 7), (2, 12), (1, 40)] if NIGHTLY else [(1, 5), (1, 1), (3, 7), (1, 40)]
    prompts = [torch.randint(3, 128, shape) for shape in shapes]
    several = prompts[shapes.index((3, 7))]
    how = HOW | {"cache_implementation": "static", "do_sample": False}
    expected = [model.generate(prompt, **how) for prompt in prompts]
    torch.manual_seed(1)
    drawn = model.generate(several, **(how | {"do_sample": True}))
    fusionpass.compile(model, numerics="eager")
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert torch.equal(model.generate(prompt, **how), tokens), prompt.shape
    model.generate(torch.randint(3, 128, (1, 60)), **how)  # a larger cache than any so far: its length is a symbol now
    report = fusionpass.report(model)
    known = len(report.model_graphs)
    assert known <= 8, report.recompiles
    for length in (3, 17, 70, 121) if NIGHTLY else (3, 17, 121):
        model.generate(torch.randint(3, 128, (1, length)), **how)
    torch.manual_seed(1)
    assert torch.equal(model.generate(several, **(how | {"do_sample": True})), drawn)
    assert len(report.model_graphs) == known, "no further length is compiled again"
    assert report.count("add_rms_norm_quantize") == 5


def test_a_dynamic_cache() -> None:
    model = tiny()
    prompt = torch.randint(3, 128, (1, 6))
    expected = model.generate(prompt, do_sample=False, **HOW)
    fusionpass.compile(model, numerics="eager")
    assert torch.equal(model.generate(prompt, do_sample=False, **HOW), expected)
    known = len(fusionpass.report(model).model_graphs)
    model.generate(prompt, do_sample=False, **(HOW | {"max_new_tokens": 12}))
    assert len(fusionpass.report(model).model_graphs) == known, "a growing cache is a symbol"


def test_generate_does_not_compile_around_it() -> None:
    model = fusionpass.compile(tiny())
    assert model.get_compiled_call(None) == model.__call__
    other = copy.deepcopy(model)
    assert other.get_compiled_call.__self__ is other
    assert "get_compiled_call" not in model.state_dict()
