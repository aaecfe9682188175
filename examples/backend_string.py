"""torch.compile with fusionpass as a backend by name: no other call in the program changes.

The name "fusionpass" exists once the package is installed; without that (`PYTHONPATH=.`) the function behind it does.
"""

import torch
from torch import nn

import fusionpass

BACKEND = "fusionpass" if "fusionpass" in torch.compiler.list_backends() else fusionpass.dynamo_backend


class Block(nn.Module):
    """Norm, residual add, norm: what stands around every layer of a transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.rand(width) + 0.5) for _ in range(2))

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        h = x.float()
        return weight * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.norm(x, self.first).relu(), self.second)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    block = Block(128).to(device)
    x = torch.randn(8, 128, device=device)

    compiled = torch.compile(block, backend=BACKEND, options={"numerics": "eager", "on_miss": "error"})
    torch.testing.assert_close(compiled(x), block(x))

    # A backend by name has no model to ask for a report; explain tells the same without running anything.
    report = fusionpass.explain(block, x)
    print(report)
    assert [record.op for record in report.fused] == ["rms_norm", "add_rms_norm"]


if __name__ == "__main__":
    main()
