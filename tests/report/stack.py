"""A stack of layers to report on: norm, static FP8, product, residual; one layer of the stack may be odd."""

import torch
from torch import nn

from tests.models import FP8, LlamaNorm, static

WIDTH = 32


class Layer(nn.Module):
    def __init__(self, odd: bool = False) -> None:
        super().__init__()
        self.norm, self.odd = LlamaNorm(WIDTH), odd
        self.scale = nn.Parameter(torch.tensor(0.03), requires_grad=False)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH).to(FP8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        if self.odd:
            h = x.float() + 1
            # Near a norm, and none: what a report has to say something about.
            y = y + (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6).tanh()).to(y.dtype)
        codes = static(y, self.scale)
        product = torch._scaled_mm(codes, self.weight.t(), self.scale, self.scale, out_dtype=torch.bfloat16)
        return x + product


class Stack(nn.Module):
    """`layers` layers and a norm; the layers with the numbers `odd` have a norm that no rule knows."""

    def __init__(self, layers: int, odd: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(i in odd) for i in range(layers))
        self.norm = LlamaNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def rows(tokens: int = 16) -> torch.Tensor:
    return torch.randn(tokens, WIDTH).bfloat16()
