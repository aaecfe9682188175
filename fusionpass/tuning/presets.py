"""Sizes that are worth tuning for everybody: `fusionpass tune --preset shipped`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .models import Model

_HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
_LARGE = {**_HEADS, "num_attention_heads": 64}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "Qwen3-8B": {"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, **_HEADS},
    "Qwen3-32B": {"model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600, **_LARGE},
    "Llama-3-8B": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, **_HEADS},
    "Llama-3-70B": {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, **_LARGE},
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, **_HEADS, "num_key_value_heads": 4,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_attention_heads": 128,
        "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 256, "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048, "n_shared_experts": 1, "first_k_dense_replace": 3,
    },
}  # fmt: skip
"""What the `config.json` of models says of their sizes."""


@dataclass(frozen=True)
class Part:
    """Kernels of models, in one scheme and at some numbers of rows.

    Attributes:
        ops: as `--op` calls them.
        scheme: of the inputs; "bf16" for none.
        rows: numbers of rows, or of tokens.
        models: keys of `CONFIGURATIONS`, and how many GPUs share each layer.
    """

    ops: tuple[str, ...]
    scheme: str
    rows: tuple[int, ...]
    models: tuple[tuple[str, int], ...]

    def sizes(self) -> Iterator[Model]:
        """What one GPU has of each model."""
        return (Model.of(CONFIGURATIONS[name], tp) for name, tp in self.models)


_MIXTURES = (("Qwen3-30B-A3B", 1), ("DeepSeek-V3", 8))
_DENSE = (("Qwen3-8B", 1), ("Qwen3-32B", 1), ("Llama-3-8B", 1), ("Llama-3-70B", 1))
PRESETS = {
    "shipped": (
        # Nothing else computes mixtures; more than 64 rows of blocks of FP8 are cuBLAS's on Hopper.
        Part(("experts",), "fp8_group128", (64, 8, 512, 1, 4096), _MIXTURES),
        Part(("block_scaled_mm",), "fp8_group128", (8, 64, 1), _DENSE),
        Part(("experts",), "bf16", (4096, 512, 64, 8, 1), _MIXTURES),
        Part(("block_scaled_mm",), "fp8_group128", (8, 64, 1), _MIXTURES),
        Part(("scaled_mm",), "fp8_token", (8, 1, 64), _DENSE),
        Part(("attention",), "bf16", (8, 1, 32), _DENSE),
    ),
    "down": (Part(("experts_down",), "fp8_group128", (64, 512, 4096, 8, 1), _MIXTURES),),
}
"""By name, the most valuable first. "down" goes behind "shipped": second products follow the first ones' tables."""
