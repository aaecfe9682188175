"""The main job end to end: a real language model, quantised, compiled, measured and compared."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ..compile import compile as compile_model
from ..compile import report as report_of
from ..quantize import QuantizeReport, quantize_
from ..report import Report
from . import show
from .checks import Check, judge, norms_in_front
from .load import load
from .measure import Measured, Runner

__all__ = ["CALIBRATION", "PROMPTS", "Check", "Options", "Result", "bundled_text", "load", "run"]

PROMPTS = ("What is the capital of France, and what is it known for?", "Explain in one sentence why the sky is blue.")
CALIBRATION = (
    "Write a short poem about the sea.",
    "List three prime numbers and say why they are prime.",
    "def quicksort(items): complete this Python function.",
    "Translate 'good morning' into French, German and Spanish.",
    "Summarise the plot of Romeo and Juliet in two sentences.",
    "How do vaccines work?",
    "What were the main causes of the First World War?",
    "A train travels 120 km in 1.5 hours. What is its average speed?",
)


@dataclass(frozen=True)
class Options:
    """What a run can be told.

    Attributes:
        prompts: what to answer.
        text: the text whose perplexity is measured; None: the bundled one.
        window: tokens of context, for prompts and for the perplexity.
        new_tokens: tokens to generate after each prompt.
        numerics, cuda_graphs: as in `fusionpass.Config`.
        dump_dir: folder for graphs and generated code; None: a new one under `fusionpass-dump`.
    """

    prompts: tuple[str, ...] = PROMPTS
    text: str | None = None
    window: int = 256
    new_tokens: int = 24
    numerics: str = "eager"
    cuda_graphs: str = "auto"
    dump_dir: Path | None = None


@dataclass(frozen=True)
class Result:
    """What a run found. `variants` are "bf16", "FP8 eager" and "FP8 compiled"; `seconds` is by phase."""

    variants: dict[str, Measured]
    kernels_per_token: dict[str, str]
    quantized: QuantizeReport
    report: Report
    checks: list[Check]
    dump_dir: Path
    seconds: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as for JSON."""
        return {
            "variants": {name: asdict(m) | {"perplexity": m.perplexity} for name, m in self.variants.items()},
            "kernels_per_token": self.kernels_per_token,
            "quantized": self.quantized.to_dict(),
            "report": self.report.to_dict(),
            "checks": [asdict(check) for check in self.checks],
            "dump_dir": str(self.dump_dir),
            "seconds": self.seconds,
        }


def bundled_text() -> tuple[str, str]:
    """The text for the perplexity, and its title; where it comes from stands at the head of the file."""
    head, _, text = files(__package__).joinpath("constitution.txt").read_text().partition("\n----\n")
    return text, head.partition(",")[0]


def run(model: Any, tokenizer: Any, options: Options | None = None, console: Console | None = None) -> Result:
    """Measure `model` in its own dtype, quantise its linears but the head in place, compile it in place, and compare.

    Args:
        model: a causal language model of transformers, on its device.
        tokenizer: its tokenizer.
        options: see `Options`.
        console: where to print.

    Raises:
        FusionpassError: of `quantize_` and `fusionpass.compile`.
    """
    options, console = options or Options(), console or Console()
    text, title = (options.text, "the given text") if options.text is not None else bundled_text()
    folder = options.dump_dir or Path("fusionpass-dump") / datetime.now().strftime("%Y%m%d-%H%M%S")
    runner = Runner(model, tokenizer, options.window, options.new_tokens)
    windows = runner.windows(text)
    variants: dict[str, Measured] = {}
    seconds: dict[str, float] = {}
    where = torch.cuda.get_device_name() if model.device.type == "cuda" else "the CPU"
    console.print(f"on {where}; perplexity on {title}, {windows.numel()} tokens", highlight=False, soft_wrap=True)

    columns = (TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def measure(name: str) -> None:
            task = progress.add_task(name, total=runner.ticks(options.prompts, windows))
            with _timed(seconds, name):
                variants[name] = runner.measure(options.prompts, windows, lambda: progress.advance(task))
            progress.update(task, total=progress.tasks[task].completed)

        measure(str(model.dtype).removeprefix("torch.").replace("bfloat16", "bf16"))
        calibration = [runner.encode(prompt) for prompt in CALIBRATION]
        task = progress.add_task("quantising", total=len(calibration))
        with _timed(seconds, "quantising"):
            quantized = quantize_(model, "fp8_static", _ticking(calibration, progress, task), skip=_head(model))
        norms = norms_in_front(model, calibration[0])
        measure("FP8 eager")
        kernels = {"FP8 eager": str(runner.operators_per_token())}

        task = progress.add_task("compiling", total=2)
        with _timed(seconds, "compiling"):
            compile_model(model, numerics=options.numerics, cuda_graphs=options.cuda_graphs, dump_dir=folder)
            runner.losses(windows[:1], lambda: progress.advance(task))
            report = report_of(model)
            before = len(report.graphs)
            runner.generate(options.prompts[0], lambda: None, new_tokens=2)
            progress.advance(task)
        kernels["FP8 compiled"] = _launches(report, before)
        measure("FP8 compiled")

    # Before torch 2.13 Inductor's C++ keeps no bfloat16 roundings, whatever it is asked.
    exact = options.numerics == "eager" and model.device.type == "cpu" and torch.__version__ >= "2.13"
    checks = judge(variants["FP8 eager"], variants["FP8 compiled"], norms, quantized, report, exact)
    show.answers(console, options.prompts, variants)
    show.fusions(console, report)
    show.figures(console, variants, kernels)
    if model.device.type == "cpu":
        console.print("A CPU has no FP8 matrix units: its FP8 products are emulated, so FP8 is slower than bf16 here.")
    console.print(f"graphs before and after each pass, generated code: {folder}", highlight=False, soft_wrap=True)
    show.verdicts(console, checks)
    return Result(variants, kernels, quantized, report, checks, folder, seconds)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def _ticking(items: list[Any], progress: Progress, task: TaskID) -> Iterator[Any]:
    for item in items:
        yield item
        progress.advance(task)


def _head(model: Any) -> list[str]:
    head = model.get_output_embeddings()
    return [path for path, module in model.named_modules() if module is head]


_LIBRARY_CALL = re.compile(r"extern_kernels\.\w+\(|= torch\.ops\.[\w.]+\(")


def _launches(report: Report, first: int) -> str:
    """Kernels and library calls of the graphs from number `first` on."""
    graphs = report.graphs[first:]
    calls = [source[source.find("def call(") :] for graph in graphs for source in graph.sources]
    library = sum(len(_LIBRARY_CALL.findall(call)) for call in calls)
    return f"{sum(graph.kernels for graph in graphs)} + {library} library"
