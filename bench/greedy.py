"""Whether greedy text stays the same: `python -m bench.greedy`, 20 prompts of 100 tokens each; needs no GPU.

The demo's model, or `--model DIR`, answers in eager mode and compiled with `numerics="eager"`, token for token;
then the perplexity of Python's language reference, in eager mode and compiled with `numerics="fast"`, over the same
windows.
"""

import argparse
import contextlib
import importlib
import json
import math
import statistics
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from unittest import mock

import torch
from rich.progress import track

import fusionpass
from fusionpass.demo import CALIBRATION, PROMPTS, load
from fusionpass.demo.measure import Runner

MORE = (
    "Name five rivers in Europe.",
    "What is the difference between a list and a tuple in Python?",
    "Write a haiku about autumn.",
    "Why do leaves change colour?",
    "Give me a recipe for pancakes.",
    "Who wrote 'Pride and Prejudice', and when?",
    "Explain recursion to a child.",
    "What does the heart do?",
    "Convert 100 degrees Fahrenheit to Celsius.",
    "Describe the water cycle in three steps.",
)


def runner(options: argparse.Namespace, device: torch.device) -> Runner:
    """The model, quantised as asked."""
    model, tokenizer, _ = load(options.model, device)
    made = Runner(model, tokenizer, options.window, options.tokens)
    if options.scheme:
        head = next(path for path, module in model.named_modules() if module is model.get_output_embeddings())
        fusionpass.quantize_(model, options.scheme, [made.encode(prompt) for prompt in CALIBRATION], skip=[head])
    return made


@contextlib.contextmanager
def as_traced() -> Iterator[None]:
    """Eager mode of the program that a compiler is shown.

    transformers 5.23 (5.17 does not) packs the queries of shared heads unless it is traced, where PyTorch's
    kernel for CPUs rounds one element in some ten thousand otherwise.
    """
    asked = "transformers.integrations.sdpa_attention.is_torchdynamo_compiling"
    module, _, name = asked.rpartition(".")
    with mock.patch(asked, return_value=True) if hasattr(importlib.import_module(module), name) else nullcontext():
        yield


def main() -> None:
    """Compare, print and write; exits with 1 where a text differs."""
    parser = argparse.ArgumentParser(prog="python -m bench.greedy", description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of a Hugging Face model; default: the demo's")
    parser.add_argument("--scheme", default="", help="quantise first: fp8_static, …")
    parser.add_argument("--tokens", type=int, default=100, help="of each answer")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--window", type=int, default=96, help="tokens of context")
    parser.add_argument("--windows", type=int, default=64, help="of the perplexity")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    options = parser.parse_args()
    made = runner(options, torch.device(options.device))
    prompts = (*PROMPTS, *CALIBRATION, *MORE)[: options.prompts]
    windows = made.windows("\n".join(topics[name] for name in sorted(topics)))[: options.windows]

    def answers(title: str) -> list[tuple[int, ...]]:
        return [made.generate(prompt, lambda: None)[0] for prompt in track(prompts, title)]

    with torch.inference_mode():
        with as_traced():
            expected, losses = answers("eager"), made.losses(windows, lambda: None)
        fusionpass.compile(made.model, numerics="eager")
        got = answers("compiled, eager numerics")
        fusionpass.compile(made.model, numerics="fast")
        fast = made.losses(windows, lambda: None)
    equal = [a == b for a, b in zip(expected, got, strict=True)]
    change = [after - before for after, before in zip(fast, losses, strict=True)]
    found: dict[str, Any] = {
        "prompts": len(prompts),
        "tokens": sum(map(len, expected)),
        "equal": sum(equal),
        "perplexity, eager": math.exp(statistics.fmean(losses)),
        "perplexity, fast": math.exp(statistics.fmean(fast)),
        "change": math.expm1(statistics.fmean(change)),
        "standard error": statistics.stdev(change) / math.sqrt(len(change)),
        "scored": windows.numel() - len(windows),
    }
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps({**found, "torch": torch.__version__, "scheme": options.scheme}) + "\n")
    if other := [prompt for prompt, same in zip(prompts, equal, strict=True) if not same]:
        sys.exit(f"the text differs after prompts {other}")


if __name__ == "__main__":
    main()
