"""Running a dumped graph on random inputs: what the end of each dumped file calls."""

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, Node

from ..errors import FusionpassError
from ..graphs import hint

Input = tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | float | bool | None
"""Shape, strides and dtype of a tensor; a number; or None for what is neither."""


def main_of(graph: Graph) -> str:
    """Python source that makes a printed graph a program: its inputs, and a call of `run`."""
    inputs = [_input(node) for node in graph.nodes if node.op in ("placeholder", "get_attr")]
    symbols = {name: hint for node in graph.nodes for name, hint in _symbols(node.meta.get("val")).items()}
    vals = [node.meta.get("val") for node in graph.nodes]
    on_gpu = any(isinstance(val, torch.Tensor) and val.device.type == "cuda" for val in vals)
    lines = [f"{name} = {hint}" for name, hint in symbols.items()]
    lines += ["INPUTS = [", *(f"    {text}," for text in inputs), "]", "", 'if __name__ == "__main__":']
    lines += [
        "    from fusionpass.report.replay import run",
        "",
        f'    run(forward, INPUTS, "{"cuda" if on_gpu else "cpu"}")',
    ]
    return "\n".join(["", "", *lines, ""])


def program(text: str, main: str) -> str:
    """A printed graph and what `main_of` says of it as one file."""
    needed = ["import fusionpass"] if "torch.ops.fusionpass" in text else []
    # A graph for a GPU runs where there is none, too.
    text = _on(text, 'torch.device("cuda" if torch.cuda.is_available() else "cpu")')
    return "\n".join([*needed, text]) + main


def on_this_device(text: str, device: str) -> str:
    """A printed graph for `device`, whatever it was traced for."""
    return _on(text, f'torch.device("{device}")')


def _on(text: str, device: str) -> str:
    return text.replace("torch.device('cuda:0')", device).replace("torch.device('cuda')", device)


def random_inputs(inputs: Sequence[Input], device: str = "cpu", seed: int = 0) -> list[Any]:
    """Values for the inputs of a dumped graph, the same for the same seed.

    Floats are normal, single ones positive as scales are, integers 0 or 1, so that they may be indices.

    Raises:
        FusionpassError: an input is neither a tensor nor a number.
    """
    generator = torch.Generator().manual_seed(seed)
    return [_random(given, device, generator) for given in inputs]


def _random(given: Input, device: str, generator: torch.Generator) -> Any:
    if given is None:
        raise FusionpassError("an input of this graph is neither a tensor nor a number", "dump")
    if not isinstance(given, tuple):
        return given
    shape, stride, dtype = given
    real = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    if not (dtype.is_floating_point or dtype.is_complex):
        values = torch.randint(0, 2, shape, generator=generator)
    elif real.numel() == 1:
        values = torch.rand(shape, generator=generator).mul(0.1).add(1e-3)
    else:
        values = torch.randn(shape, generator=generator)
    if 0 in stride:
        # Elements that lie in one place have one value.
        real = torch.as_strided(real, [n if s else 1 for n, s in zip(shape, stride, strict=True)], stride)
        values = values[tuple(slice(None) if s else slice(0, 1) for s in stride)]
    real.copy_(values.to(dtype))
    return real.expand(shape)


def run(forward: Callable[..., Any], inputs: Sequence[Input], device: str) -> None:
    """The command line of a dumped graph: run it, print what it returns, compare it with another.

    Args:
        forward: the graph.
        inputs: what it takes.
        device: "cuda" or "cpu"; the CPU where there is no GPU.
    """
    parser = argparse.ArgumentParser(description="Run this graph on random inputs.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="a dumped graph of the same model, to compare with"
    )
    options = parser.parse_args()
    device = device if torch.cuda.is_available() else "cpu"
    results = results_of(forward, inputs, device, options.seed)
    for index, value in enumerate(results):
        print(f"{index}: {_told(value)}")
    if options.against:
        other = loaded(options.against)
        apart = differences(results, results_of(other.forward, other.INPUTS, device, options.seed))
        print("\n".join(apart) or f"the same as {options.against}")
        raise SystemExit(bool(apart))


def results_of(forward: Callable[..., Any], inputs: Sequence[Input], device: str = "cpu", seed: int = 0) -> list[Any]:
    """What a dumped graph returns for random inputs, as a flat list; behind it the inputs, which it may write to."""
    given = random_inputs(inputs, device, seed)
    with torch.no_grad():
        returned = forward(*given)
    return [*torch.utils._pytree.tree_leaves(returned), *given]


def loaded(path: Path) -> Any:
    """A dumped file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def differences(results: Sequence[Any], others: Sequence[Any]) -> list[str]:
    """One line for each value that is not, bit for bit or NaN for NaN, the same; empty where all are."""
    if len(results) != len(others):
        return [f"{len(results)} values, and {len(others)}"]
    lines = []
    for index, (one, other) in enumerate(zip(results, others, strict=True)):
        if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
            if one is not other and one != other:
                lines.append(f"{index}: {one}, and {other}")
        elif (one.shape, one.dtype, one.stride()) != (other.shape, other.dtype, other.stride()):
            lines.append(f"{index}: {_told(one)}, and {_told(other)}")
        else:
            apart = (one != other) & ~(one.isnan() & other.isnan())
            if apart.any():
                largest = (one.double() - other.double()).abs()[apart].max()
                lines.append(f"{index}: {int(apart.sum())} of {one.numel()} elements differ, by up to {largest:.3g}")
    return lines


def _told(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    text = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} strides {list(value.stride())}"
    if not value.numel():
        return text
    wide = value.double()
    return f"{text}, from {wide.min():.4g} to {wide.max():.4g}, mean {wide.mean():.4g}"


def _input(node: Node) -> str:
    val = node.meta.get("val")
    if val is None and node.op == "get_attr" and node.graph.owning_module is not None:
        val = getattr(node.graph.owning_module, str(node.target), None)
    if isinstance(val, torch.Tensor):
        return repr((_numbers(val.shape), _numbers(val.stride()), val.dtype))
    if isinstance(val, int | float | torch.SymInt):
        return repr(hint(val))
    return "None"


def _numbers(sizes: Any) -> tuple[int, ...]:
    return tuple(hint(size) for size in sizes)


def _symbols(val: Any) -> dict[str, int]:
    """The symbols in the sizes of a value, with the numbers that they were traced with."""
    sizes = (*val.shape, *val.stride()) if isinstance(val, torch.Tensor) else (val,)
    symbolic = [size for size in sizes if isinstance(size, torch.SymInt)]
    return {str(size): hint(size) for size in symbolic if size.node.expr.is_symbol}
