"""An op of one's own: its meaning in plain PyTorch. It runs everywhere; a kernel may follow as a `Backend`."""

from typing import Any

import torch
from torch import nn

import fusionpass


def sample(tokens: int, width: int, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
    """Arguments for tests and benchmarks."""
    return {"x": torch.randn(tokens, width, generator=generator, device=device).to(dtype), "limit": 30.0}


@fusionpass.op(namespace="mine", outputs=("y",), sample=sample)
def softcap(x: torch.Tensor, limit: float) -> torch.Tensor:
    """`limit * tanh(x / limit)` in float32, as Gemma 2 caps its logits: [...] → [...], the same dtype."""
    return (limit * torch.tanh(x.float() / limit)).to(x.dtype)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 256, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return softcap(self.linear(x), 2.0)


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head, x = Head().to(device), torch.randn(4, 64, device=device) * 5
    expected = 2 * torch.tanh(head.linear(x) / 2)
    torch.testing.assert_close(head(x), expected)

    # It is a full operator: torch.ops.mine.softcap, with a fake for tracing and gradients through the reference.
    torch.library.opcheck(torch.ops.mine.softcap.default, (x, 2.0))
    gradient, wanted = (torch.autograd.grad(y.sum(), head.linear.weight)[0] for y in (head(x), expected))
    torch.testing.assert_close(gradient, wanted)

    with torch.no_grad():
        fusionpass.compile(head)
        torch.testing.assert_close(head(x), expected.detach())
    report = fusionpass.report(head)
    print(report)
    assert report.count("softcap") == 1


if __name__ == "__main__":
    main()
