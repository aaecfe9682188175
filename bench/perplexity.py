"""Perplexity of a language model under each quantisation scheme: `python -m bench.perplexity`; needs no GPU.

The model is the demo's unless `--model DIR` names another. The text is the language reference that Python ships for
`help()`; `--text demo` takes the demo's, which the demo's model knows by heart, and `--text FILE` any. All schemes see
the same windows, so that what is told of one is the change of each window's loss, and the standard error of its mean.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fusionpass
from fusionpass.demo import CALIBRATION, bundled_text, load
from fusionpass.demo.measure import Runner
from fusionpass.quantize import SCHEMES

BASE = "bf16"


class Padded(nn.Module):
    """A linear whose input is padded with zeros to a whole number of groups, the last of which is a short one then."""

    def __init__(self, linear: nn.Linear, multiple: int) -> None:
        super().__init__()
        self.pad = -linear.in_features % multiple
        self.linear = nn.Linear(1, 1, linear.bias is not None, "meta")
        self.linear.in_features, self.linear.out_features = linear.in_features + self.pad, linear.out_features
        self.linear.weight, self.linear.bias = nn.Parameter(F.pad(linear.weight.detach(), (0, self.pad))), linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(F.pad(x, (0, self.pad)))


def pad_linears(model: nn.Module, multiple: int, skip: str) -> int:
    """Make linears whose input is no whole number of groups `Padded`; returns how many."""
    short = [
        (path, module)
        for path, module in model.named_modules()
        if type(module) is nn.Linear and module.in_features % multiple and path != skip
    ]
    for path, linear in short:
        model.set_submodule(path, Padded(linear, multiple))
    return len(short)


def measure(
    folder: Path | None, text: str, scheme: str, window: int, limit: int, skip: Sequence[str] = ()
) -> dict[str, Any]:
    """The loss of each window of `text` under `scheme`, but for the head and what `skip` names."""
    started = time.perf_counter()
    model, tokenizer, name = load(folder, torch.device("cpu"))
    runner = Runner(model, tokenizer, window, 1)
    windows = runner.windows(text)[:limit]
    found = {"model": name, "scheme": scheme, "quantized": 0, "padded": 0}
    if scheme != BASE:
        kind = SCHEMES[scheme]
        head = next(path for path, module in model.named_modules() if module is model.get_output_embeddings())
        found["padded"] = pad_linears(model, kind.multiple, head)
        data = [runner.encode(prompt) for prompt in CALIBRATION] if kind.calibrated else None
        found["quantized"] = len(fusionpass.quantize_(model, scheme, data, skip=[head, *skip]).quantized)
    losses = runner.losses(windows, lambda: None)
    scored = windows.numel() - len(windows)
    return found | {"losses": losses, "tokens": scored, "seconds": time.perf_counter() - started}


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown: perplexity of each scheme, and its change against the first row."""
    lines = ["| scheme | linears | perplexity | change | standard error |", "|---|---|---|---|---|"]
    base: tuple[float, ...] | None = None
    for row in rows:
        base = base or row["losses"]
        change = [after - before for after, before in zip(row["losses"], base, strict=True)]
        error = statistics.stdev(change) / math.sqrt(len(change)) if len(change) > 1 else math.nan
        padded = f", {row['padded']} of them padded" if row["padded"] else ""
        linears = f"{row['quantized']}{padded}" if row["quantized"] else "–"
        told = f"{math.expm1(statistics.fmean(change)):+.2%} | {error:.2%}" if row["losses"] != base else "– | –"
        perplexity = math.exp(statistics.fmean(row["losses"]))
        lines.append(f"| {row['scheme']} | {linears} | {perplexity:.3f} | {told} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES), metavar="SCHEME")
    parser.add_argument("--model", type=Path, help="folder of a Hugging Face model; default: the demo's")
    parser.add_argument("--text", default="python", help="'python', 'demo' or a file")
    parser.add_argument("--window", type=int, default=256, help="tokens of context")
    parser.add_argument("--limit", type=int, default=48, help="windows at most")
    parser.add_argument("--skip", nargs="+", default=[], metavar="RULE", help="linears to leave alone")
    parser.add_argument("--json", type=Path, help="where to write every window's loss")
    given = parser.parse_args()
    texts = {"python": lambda: "\n".join(topics[name] for name in sorted(topics)), "demo": lambda: bundled_text()[0]}
    text = texts.get(given.text, lambda: Path(given.text).read_text())()
    rows = []
    for scheme in [BASE, *given.schemes]:
        rows.append(measure(given.model, text, scheme, given.window, given.limit, given.skip))
        if given.json:
            given.json.write_text(json.dumps(rows))
    print(f"{rows[0]['model']}, {rows[0]['tokens']} tokens in windows of {given.window}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
