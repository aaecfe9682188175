"""A model with one layer that does not fuse, and what the report says of it.

The same from a shell: `fusionpass explain examples.why_not:model --target sm_90`.
"""

import torch
from torch import nn

import fusionpass


class Norm(nn.Module):
    """RMSNorm; with `bound`, what it normalised is clamped in front of the weight, which no rule knows."""

    def __init__(self, width: int, bound: float | None = None) -> None:
        super().__init__()
        self.weight, self.bound = nn.Parameter(torch.ones(width, dtype=torch.bfloat16)), bound

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.bound is not None:
            h = h.clamp(-self.bound, self.bound)
        return self.weight * h.to(x.dtype)


class Layer(nn.Module):
    def __init__(self, width: int, bound: float | None = None) -> None:
        super().__init__()
        self.norm = Norm(width, bound)
        self.linear = nn.Linear(width, width, bias=False, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.norm(x))


class Model(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(Layer(width), Layer(width, bound=4.0), Layer(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def model() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """The model, its linears quantised, and the arguments of a call."""
    torch.manual_seed(0)
    made = Model().eval()
    fusionpass.quantize_(made, "fp8_token")
    return made, (torch.randn(16, 64).bfloat16(),)


def main() -> None:
    made, arguments = model()
    # Traces only: no GPU is needed for what one would run.
    report = fusionpass.explain(made, *arguments, config=fusionpass.Config(target=fusionpass.Arch("sm_90")))
    print(report)
    (missed,) = report.missed
    assert missed.where == "layers.1.norm"
    assert "expected a cast to bfloat16 to read it, found aten.clamp_min" in missed.reason
    fusionpass.assert_fused(report, "rms_norm_quantize", 1, where="layers.0.*")
    fusionpass.assert_fused(report, "add_rms_norm_quantize", 1, where="layers.2.*")


if __name__ == "__main__":
    main()
