"""A second process on a GPU: no trace, the same numbers, under CUDA graphs."""

from pathlib import Path

import pytest
import torch

from tests.runtime.test_traces import run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

QWEN = """
    from transformers import Qwen3Config, Qwen3ForCausalLM, StaticCache
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=128, vocab_size=512, pad_token_id=0, dtype=torch.bfloat16,
    )
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    fusionpass.quantize_(model, "fp8_token", skip=("lm_head",))
    fusionpass.compile(model, cache=True, traces=True, cache_dir=sys.argv[1], cuda_graphs=sys.argv[2])
    results = []
    with torch.inference_mode():
        cache = StaticCache(config=config, max_cache_len=64)
        ids = torch.randint(1, 512, (1, 8), generator=torch.Generator().manual_seed(1)).cuda()
        results.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1])
        for _ in range(5):
            ids = results[-1].argmax(-1)[:, None]
            results.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1])
    replays = sum(g.replays for graph in fusionpass.report(model).model_graphs for g in graph.replay.graphs)
    assert replays >= 2, str(fusionpass.report(model))
    tell(model, [result.cpu() for result in results])
"""


@pytest.mark.parametrize("mode", ["full", "piecewise"])
def test_a_second_process_replays_without_a_trace(mode: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    cold = run(tmp_path, QWEN, tmp_path / "cache", mode)
    warm = run(tmp_path, QWEN, tmp_path / "cache", mode)
    assert [graph["trace"] for graph in cold["report"]["model_graphs"]] == [""] * cold["traced"]
    assert warm["traced"] == 0
    assert warm["results"] == cold["results"]
    for kind in ("fused", "refused", "missed"):
        assert warm["report"][kind] == cold["report"][kind]
