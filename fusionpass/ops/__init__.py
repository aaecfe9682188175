"""What exists: every op, with its plain PyTorch reference and its kernels."""

from .activation import gelu_mul, gelu_mul_quantize, silu_mul, silu_mul_quantize
from .attention import view_heads
from .norm import add_rms_norm, add_rms_norm_quantize, rms_norm, rms_norm_quantize
from .quant import quantize
from .quant.scheme import Scheme

__all__ = [
    "Scheme", "add_rms_norm", "add_rms_norm_quantize", "gelu_mul", "gelu_mul_quantize", "quantize", "rms_norm",
    "rms_norm_quantize", "silu_mul", "silu_mul_quantize", "view_heads",
]  # fmt: skip
