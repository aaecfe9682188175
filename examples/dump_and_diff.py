"""Dump a model's graphs before and after each pass, compare them, and run one as a program of its own."""

import difflib
import subprocess
import sys
import tempfile

import torch
from torch import nn

import fusionpass


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        residual = residual + x
        h = residual.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(x.dtype), residual


@torch.no_grad()
def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        with fusionpass.dump(name) as folder:
            model = fusionpass.compile(Block())
            model(torch.randn(16, 64).bfloat16(), torch.randn(16, 64).bfloat16())
        print((folder / "index.md").read_text())
        (graph,) = folder.glob("graph_*")
        before, after = graph / "01_normalize.py", graph / "03_fuse.py"
        sides = [path.read_text().splitlines() for path in (before, after)]
        print("\n".join(difflib.unified_diff(*sides, before.name, after.name, lineterm="", n=0)))
        # Each file is a program: it runs its graph on random inputs, and compares itself with another.
        command = [sys.executable, str(after), "--against", str(before)]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        print(told.replace(str(folder), "."))
    report = fusionpass.report(model)
    print(report)
    assert report.count("add_rms_norm") == 1


if __name__ == "__main__":
    main()
