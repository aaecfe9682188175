"""Small models in the spellings that real ones use."""

from typing import Any

import torch
from torch import nn

FP8 = torch.float8_e4m3fn


class LlamaNorm(nn.Module):
    """The RMSNorm of Llama, Qwen and Mistral, as transformers writes it."""

    def __init__(self, width: int, eps: float = 1e-6, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.rand(width) + 0.5).to(dtype), requires_grad=False)
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


def static(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Static FP8, multiplied by the reciprocal."""
    return (x.float() * scale.reciprocal()).clamp(-448, 448).to(FP8)


class Block(nn.Module):
    """Residual add, norm, and the quantised inputs of `readers` linears that share a scale."""

    def __init__(self, width: int, eps: float = 1e-6, dtype: torch.dtype = torch.bfloat16, scale: Any = 0.02) -> None:
        super().__init__()
        self.norm = LlamaNorm(width, eps, dtype)
        self.scale = nn.Parameter(torch.as_tensor(scale, dtype=torch.float32), requires_grad=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        residual = x + residual
        norm = self.norm(residual)
        return tuple(static(norm, self.scale).view(torch.uint8) + i for i in range(3)), residual
