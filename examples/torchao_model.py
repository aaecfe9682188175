"""A model that torchao quantised: its linears are taken over, codes and scales as they are, and fuse like our own.

torchao's FP8 needs a GPU to be quantised, so these are 8-bit integers; the rest is the same.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

import fusionpass


class MLP(nn.Module):
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, dtype=torch.bfloat16)
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False, dtype=torch.bfloat16) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, x = MLP().to(device).eval(), torch.randn(16, 128, device=device).bfloat16()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    theirs = model(x)

    print(fusionpass.lower_linears_(model))
    ours = model(x)
    error = ((ours - theirs).float().norm() / theirs.float().norm()).item()
    # torchao rounds to bfloat16 once more, between the two scales.
    print(f"our linears against torchao's: {error:.2e}")
    assert error < 0.01

    fusionpass.compile(model, numerics="eager")
    compiled = model(x)
    assert compiled.equal(ours) or ((compiled - ours).float().norm() / ours.float().norm()).item() < 0.03
    report = fusionpass.report(model)
    print(report)
    assert report.count("rms_norm_quantize") == 1, "gate and up read one quantisation"
    assert report.count("silu_mul_quantize") == 1


if __name__ == "__main__":
    main()
