"""What exists: every op, with its plain PyTorch reference and its kernels."""

from .activation import (
    clamped_swiglu,
    clamped_swiglu_quantize,
    gelu,
    gelu_mul,
    gelu_mul_quantize,
    gelu_quantize,
    relu_squared,
    relu_squared_quantize,
    silu,
    silu_mul,
    silu_mul_quantize,
    silu_quantize,
)
from .attention import attention, attention_quantize, view_heads
from .gemm import scaled_mm
from .gemm.blocks import block_scaled_mm
from .gemm.linear import linear, linear_bf16_fp32
from .gemm.several import scaled_mms
from .moe import experts
from .norm import (
    add,
    add_layer_norm,
    add_layer_norm_quantize,
    add_quantize,
    add_rms_norm,
    add_rms_norm_quantize,
    layer_norm,
    layer_norm_quantize,
    rms_norm,
    rms_norm_quantize,
)
from .norm.gated import gated_rms_norm, gated_rms_norm_quantize
from .quant import dequantize, quantize
from .quant.scheme import Scheme
from .rope import norm_heads, norm_rope, rope
from .rope.pair import cache_write, qk_norm, qk_norm_rope, qk_norm_rope_cache, qk_rope, qk_rope_cache

__all__ = [
    "Scheme", "add", "add_layer_norm", "add_layer_norm_quantize", "add_quantize", "add_rms_norm",
    "add_rms_norm_quantize", "attention", "attention_quantize", "block_scaled_mm", "cache_write", "clamped_swiglu",
    "clamped_swiglu_quantize", "dequantize", "experts",
    "gated_rms_norm", "gated_rms_norm_quantize", "gelu", "gelu_mul", "gelu_mul_quantize", "gelu_quantize",
    "layer_norm", "layer_norm_quantize", "linear", "linear_bf16_fp32", "norm_heads", "norm_rope", "qk_norm",
    "qk_norm_rope", "qk_norm_rope_cache", "qk_rope", "qk_rope_cache", "quantize", "relu_squared",
    "relu_squared_quantize", "rms_norm", "rms_norm_quantize", "rope", "scaled_mm", "scaled_mms", "silu", "silu_mul",
    "silu_mul_quantize", "silu_quantize", "view_heads",
]  # fmt: skip
