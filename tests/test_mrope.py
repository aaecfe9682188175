"""Rotary embedding of three positions a token (mrope), as models of images and video have it."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fusionpass
from fusionpass import Arch, Config
from tests.test_rope import COS, DIM, K, Q, fused, half, heads

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
SECTIONS = [2, 3, 3]


def by_section(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """As transformers had it in each layer: sections of the columns have their angles from positions in turn."""
    sections = SECTIONS * 2
    cos, sin = (
        torch.cat([m[i % 3] for i, m in enumerate(t.split(sections, dim=-1))], dim=-1).unsqueeze(1) for t in (cos, sin)
    )
    q, k = heads(q), heads(k)
    return q * cos + half(q) * sin, k * cos + half(k) * sin


def test_angles_of_sections() -> None:
    assert sum(SECTIONS) * 2 == DIM
    angles = torch.rand(3, *COS.shape) * 6.3
    names, trace, _ = fused(by_section, Q, K, angles.cos().bfloat16(), angles.sin().bfloat16())
    assert names == ["qk_rope"], [str(record) for record in trace.refused]


@pytest.mark.parametrize(
    ("name", "op"), [("Qwen2VL", "qk_rope"), ("Qwen2_5_VL", "qk_rope"), ("Qwen3VL", "qk_norm_rope")]
)
def test_models(name: str, op: str) -> None:
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": SECTIONS}
    made = getattr(transformers, f"{name}TextConfig")(**SIZES, head_dim=DIM, rope_parameters=rope)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}TextModel")._from_config(made, dtype=torch.bfloat16).eval()
    positions = torch.stack([torch.arange(6), torch.arange(6) // 2, torch.arange(6) % 3])[:, None].expand(-1, 2, -1)
    inputs = {"inputs_embeds": torch.randn(2, 6, 64).bfloat16(), "position_ids": positions, "use_cache": False}
    report = fusionpass.explain(model, config=Config(target=Arch("sm_90")), **inputs)
    fusionpass.assert_fused(report, op, SIZES["num_hidden_layers"])
