"""A rule of one's own: this model's spelling of RMSNorm is the package's op, and fuses like any other."""

import torch
from torch import nn

import fusionpass
from fusionpass.ops import rms_norm


def written_out(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As the model below has it: with the reciprocal of a root, which is one rounding away from `rsqrt`."""
    h = x.float()
    return weight * (h * torch.sqrt(h.pow(2).mean(-1, keepdim=True) + eps).reciprocal()).to(x.dtype)


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width).bfloat16(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return written_out(x, self.weight, 1e-5)


def main() -> None:
    torch.manual_seed(0)
    norm, x = Norm(64), torch.randn(4, 64).bfloat16()
    rule = fusionpass.Spelling("mine.norm", rms_norm, written_out)
    assert not fusionpass.explain(norm, x).fused, "the package does not know this spelling"
    expected = norm(x)
    fusionpass.compile(norm, rules=(rule,))
    torch.testing.assert_close(norm(x), expected)
    print(fusionpass.report(norm))
    assert fusionpass.report(norm).count("rms_norm", rule="mine.norm") == 1


if __name__ == "__main__":
    main()
