"""Decoder families of transformers and transformers of diffusers, tiny and random, with inputs to run them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

BATCH, TOKENS, VOCABULARY = 2, 12, 128

# Two layers; widths are multiples of 128, so that every scheme's groups divide them.
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        name: as people write it.
        kind: transformers' `model_type`, or the class in diffusers.
        config: what its tiny configuration changes in the common one; for diffusers, all of it.
        inputs: makes the inputs of a diffusers model; None: token ids for a decoder.
        skip: what is not to be quantised.
    """

    name: str
    kind: str
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[], dict[str, Any]] | None = None
    skip: tuple[str, ...] = ()

    @property
    def library(self) -> str:
        """The library whose model it is."""
        return "transformers" if self.inputs is None else "diffusers"

    def build(self) -> tuple[nn.Module, dict[str, Any]]:
        """The model in bfloat16 for inference, and the keyword arguments of one call."""
        torch.manual_seed(0)
        with torch.device("cpu"):
            if self.inputs is not None:
                import diffusers

                model = getattr(diffusers, self.kind)(**self.config)
                return _bfloat16(model).eval(), self.inputs()
            from transformers import AutoConfig, AutoModelForCausalLM

            config = AutoConfig.for_model(self.kind, **_COMMON | dict(self.config))
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            return model.eval(), {"input_ids": torch.randint(VOCABULARY, (BATCH, TOKENS)), "use_cache": False}


def _bfloat16(model: nn.Module) -> nn.Module:
    """As diffusers loads it: what the class names stays in float32."""
    kept = set(model._keep_in_fp32_modules or ())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not kept & set(name.split(".")):
            tensor.data = tensor.data.to(torch.bfloat16)
    return model


def _floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16)


def _steps() -> torch.Tensor:
    return torch.full((BATCH,), 500.0, dtype=torch.bfloat16)


def _flux() -> dict[str, Any]:
    return {
        "hidden_states": _floats(BATCH, 16, 64),
        "encoder_hidden_states": _floats(BATCH, 8, 128),
        "pooled_projections": _floats(BATCH, 64),
        "timestep": _steps() / 1000,
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
        "guidance": torch.ones(BATCH),
        "return_dict": False,
    }


def _sd3() -> dict[str, Any]:
    return {
        "hidden_states": _floats(BATCH, 16, 8, 8),
        "encoder_hidden_states": _floats(BATCH, 8, 128),
        "pooled_projections": _floats(BATCH, 64),
        "timestep": _steps(),
        "return_dict": False,
    }


def _wan() -> dict[str, Any]:
    return {
        "hidden_states": _floats(BATCH, 16, 2, 8, 8),
        "timestep": _steps(),
        "encoder_hidden_states": _floats(BATCH, 8, 128),
        "return_dict": False,
    }


def _ltx() -> dict[str, Any]:
    return {
        "hidden_states": _floats(BATCH, 16, 128),
        "encoder_hidden_states": _floats(BATCH, 8, 128),
        "timestep": _steps(),
        "encoder_attention_mask": torch.ones(BATCH, 8, dtype=torch.bfloat16),
        "num_frames": 1,
        "height": 4,
        "width": 4,
        "return_dict": False,
    }


_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_HEAD = {"head_dim": 64}

FAMILIES = (
    Family("Llama", "llama"),
    Family("Mistral", "mistral", {"sliding_window": None}),
    Family("SmolLM3", "smollm3"),
    Family("Qwen2", "qwen2"),
    Family("Qwen3", "qwen3", _HEAD),
    Family("Qwen3-MoE", "qwen3_moe", _HEAD | _MOE),
    Family("Qwen3-Next", "qwen3_next", {
        **_HEAD, **_MOE, "shared_expert_intermediate_size": 256, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
    }),
    Family("Apertus", "apertus"),
    Family("EXAONE 4", "exaone4", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    Family("HunYuan dense", "hunyuan_v1_dense", _HEAD),
    Family("NanoChat", "nanochat"),
    Family("OLMo", "olmo"),
    Family("OLMo2", "olmo2"),
    Family("OLMo3", "olmo3"),
    Family("OLMoE", "olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    Family("MiniMax-M2", "minimax_m2", {**_HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 32}),
    Family("Gemma", "gemma", _HEAD),
    Family("Gemma2", "gemma2", _HEAD),
    Family("Gemma3", "gemma3_text", _HEAD),
    Family("GLM", "glm", _HEAD),
    Family("GLM-4", "glm4", _HEAD),
    Family("Phi", "phi"),
    Family("Phi-3", "phi3"),
    Family("Granite", "granite"),
    Family("Cohere", "cohere"),
    Family("Cohere2", "cohere2", {"sliding_window": 8}),
    Family("DeepSeek-V2", "deepseek_v2", _LATENT),
    Family("DeepSeek-V3", "deepseek_v3", _LATENT),
    Family("GPT-OSS", "gpt_oss", {**_HEAD, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Family("Falcon-H1", "falcon_h1", {
        "mamba_d_ssm": 256, "mamba_n_heads": 16, "mamba_d_head": 16, "mamba_d_state": 32, "mamba_rms_norm": True,
        "ssm_in_multiplier": 1.25, "mlp_multipliers": [0.88, 0.58],
    }),
    Family("Nemotron", "nemotron"),
    Family("StableLM", "stablelm"),
    Family("Helium", "helium", _HEAD),
    Family("Flux", "FluxTransformer2DModel", {
        "in_channels": 64, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 64, "num_attention_heads": 4,
        "joint_attention_dim": 128, "pooled_projection_dim": 64, "guidance_embeds": True,
        "axes_dims_rope": (16, 24, 24),
    }, _flux, ("x_embedder", "context_embedder", "time_text_embed")),
    Family("Stable Diffusion 3", "SD3Transformer2DModel", {
        "sample_size": 8, "num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 4, "pos_embed_max_size": 8,
        "joint_attention_dim": 128, "caption_projection_dim": 256, "pooled_projection_dim": 64,
        "qk_norm": "rms_norm",
    }, _sd3, ("context_embedder", "time_text_embed")),
    Family("Wan", "WanTransformer3DModel", {
        "num_attention_heads": 4, "attention_head_dim": 64, "text_dim": 128, "freq_dim": 64, "ffn_dim": 512,
        "num_layers": 2, "rope_max_seq_len": 16,
    }, _wan, ("condition_embedder",)),
    Family("LTX-Video", "LTXVideoTransformer3DModel", {
        "num_attention_heads": 4, "attention_head_dim": 64, "cross_attention_dim": 256, "num_layers": 2,
        "caption_channels": 128,
    }, _ltx, ("time_embed", "caption_projection", "proj_in")),
)  # fmt: skip
"""Every family that the coverage table has, in its order."""
