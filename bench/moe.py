"""Time mixtures of experts beside PyTorch's grouped products and a copy: `python -m bench.moe --help`.

Beside them stands the function of transformers that calls `torch._grouped_mm`, compiled by Inductor; and, in
16 bits, vLLM's `fused_experts`, sort and two Triton products, where vLLM is importable. Tokens choose
their experts at random, others in each call. What bounds few tokens is the copy of the weights of the experts that any
of them chose; what bounds many, the matrix units.
"""

import argparse
import importlib
import importlib.util
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fusionpass.arch import Arch
from fusionpass.launch import Launch
from fusionpass.ops import experts
from fusionpass.ops.moe import SCHEMES
from fusionpass.ops.moe.triton import table_key
from fusionpass.tuning.families import TUNABLES
from fusionpass.tuning.timing import launch_call, time_calls, warm_up

from .machine import require_gpu, results_folder, save

SHAPES = {
    "qwen3_30b_a3b": (2048, 768, 128, 8),
    "deepseek_v3_tp8": (7168, 256, 256, 8),
    "mixtral_8x7b_tp8": (4096, 1792, 8, 2),
}
"""Hidden columns, those between the products, experts, and how many of these a token chooses."""
SETS = 4


def sets_of(tokens: int, shape: tuple[int, int, int, int], scheme: str, device: str = "cuda") -> list[dict[str, Any]]:
    """Arguments of calls that share their weights, and choose others of them."""
    hidden, inner, count, top = shape
    key = {**table_key(scheme, count, inner, False), "hidden": hidden, "top": top}
    weights = TUNABLES["experts"].arguments(key, 1, torch.bfloat16, device, None)
    made = []
    for _ in range(SETS):
        scores = torch.randn(tokens, count, device=device).softmax(-1).topk(top)
        x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
        given = {"x": x, "ids": scores.indices, "weights": scores.values.to(torch.bfloat16)}
        made.append(experts.bind((), {**weights, **given}))
    return made


def grouped(given: dict[str, Any]) -> Callable[[dict[str, Any]], torch.Tensor]:
    """transformers' function over `torch._grouped_mm` with these weights, compiled."""
    from transformers.integrations import moe

    class Layer(torch.nn.Module):
        gate_up_proj, down_proj, num_experts = given["up"], given["down"], given["up"].shape[0]
        has_gate, has_bias, is_transposed, has_post_expert_norm, _is_expert_parallel = True, False, False, False, False

        def _apply_gate(self, made: torch.Tensor) -> torch.Tensor:
            gate, up = made.chunk(2, dim=-1)
            return torch.nn.functional.silu(gate) * up

    layer = Layer()
    compiled = torch.compile(lambda x, ids, w: moe.grouped_mm_experts_forward(layer, x, ids, w), dynamic=False)
    return lambda one: compiled(one["x"], one["ids"], one["weights"])


def vllm(given: dict[str, Any]) -> Callable[[dict[str, Any]], torch.Tensor] | None:
    """vLLM's function with these weights; None where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        return None
    fused = importlib.import_module("vllm.model_executor.layers.fused_moe.fused_moe").fused_experts
    up, down = given["up"], given["down"]
    # It sorts int32, and weighs by float32.
    return lambda one: fused(one["x"], up, down, one["weights"].float(), one["ids"].int())  # type: ignore[no-any-return]


def measure(tokens: int, name: str, scheme: str) -> dict[str, Any]:
    """Microseconds of each way to compute such a mixture."""
    shape = SHAPES[name]
    sets = sets_of(tokens, shape, scheme)
    chosen = statistics.mean(float(one["ids"].unique().numel()) for one in sets)
    each = sum(one.nbytes // shape[2] for key, one in sets[0].items() if key in ("up", "down"))
    cell: dict[str, Any] = {"shape": name, "tokens": tokens, "scheme": scheme or "bfloat16"}
    cell["megabytes"] = chosen * each / 1e6

    def timed(call: Callable[[int], Any]) -> float:
        return statistics.median(time_calls(call, SETS))

    source = torch.empty(2, SETS, int(chosen * each) // 2, dtype=torch.uint8, device="cuda")
    cell["copy"] = timed(lambda i: source[0, i].copy_(source[1, i]))
    if not scheme:
        rival = grouped(sets[0])
        close(rival(sets[0]), sets[0], 5e-3)
        cell["grouped_mm"] = timed(lambda i: rival(sets[i]))
        if (other := vllm(sets[0])) is not None:
            close(other(sets[0]), sets[0], 5e-3)
            cell["vllm"] = timed(lambda i: other(sets[i]))
    arch = Arch.of(torch.device("cuda"))
    launches = []
    for one in sets:
        launch, why = experts.plan(arch, one)
        if not isinstance(launch, Launch):
            raise RuntimeError(why)
        launches.append(launch.reading_early().launching_early())
    call = launch_call(launches)
    close(call(0)[0], sets[0], 0.05 if scheme else 5e-3)
    cell["fusionpass"] = timed(call)
    hidden, inner, _, top = shape
    cell["tflops"] = 6e-6 * tokens * top * hidden * inner / cell["fusionpass"]
    return {key: round(v, 3) if isinstance(v, float) else v for key, v in cell.items()}


def close(got: torch.Tensor, given: dict[str, Any], error: float) -> None:
    """Require `got` to be within a relative error of the reference's result.

    Raises:
        AssertionError: it is not.
    """
    expected = experts.reference(**given).double()
    assert (got.double() - expected).norm() <= error * expected.norm()


def main() -> None:
    """Parse the options, time every cell, write the JSON and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.moe", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES], default=["qwen3_30b_a3b", "deepseek_v3_tp8"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512, 4096])
    parser.add_argument("--scheme", nargs="+", choices=["bfloat16", *SCHEMES], default=["bfloat16", "fp8_group128"])
    parser.add_argument("--out", type=Path, help="folder; default bench/results/<device>")
    parser.add_argument("--commit", help="where the checkout cannot say it")
    options = parser.parse_args()
    require_gpu()
    warm_up()
    cells, rivals = [], {}
    for name, scheme, tokens in itertools.product(options.shapes, options.scheme, options.tokens):
        cells.append(measure(tokens, name, "" if scheme == "bfloat16" else scheme))
        rivals |= {(name, tokens): cells[-1]["grouped_mm"]} if "grouped_mm" in cells[-1] else {}
        torch.cuda.empty_cache()
    save(results_folder(options.out) / "moe.json", options, cells=cells)
    made = Table(
        "shape", "scheme", "tokens", "MB", "copy", "grouped_mm", "vllm", "fusionpass", "times", "% of copy", "TFLOP/s"
    )
    for cell in cells:
        rival, own = rivals.get((cell["shape"], cell["tokens"])), cell["fusionpass"]
        made.add_row(
            cell["shape"], cell["scheme"], str(cell["tokens"]), f"{cell['megabytes']:.0f}", f"{cell['copy']:.1f}",
            f"{rival:.1f}" if rival else "", f"{cell['vllm']:.1f}" if "vllm" in cell else "", f"{own:.1f}",
            f"{rival / own:.2f}" if rival else "",
            f"{100 * cell['copy'] / own:.0f}", f"{cell['tflops']:.0f}",
        )  # fmt: skip
    Console().print(made)


if __name__ == "__main__":
    main()
