"""From `compile` to the first output: fusionpass and torch.compile, cold and warm, each in a process of its own.

`python -m bench.start --layers 36 --out FILE`; a CPU takes `--device cpu --width 128 --layers 24`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.machine import save

VARIANTS = ("fusionpass", "torch.compile")


def model(layers: int, width: int, scheme: str, device: str, vocabulary: int = 32768) -> Any:
    """A Qwen3 with Qwen3-8B's proportions and random weights, its linears quantised."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    import fusionpass

    heads = max(1, width // 128)
    config = Qwen3Config(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=128,
        vocab_size=vocabulary,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        made = Qwen3ForCausalLM(config).eval()
    torch.set_default_dtype(before)
    fusionpass.quantize_(made, scheme, skip=("lm_head",))
    return made


def child(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """One start, in this process."""
    import fusionpass

    torch.manual_seed(0)
    made = model(options.layers, options.width, options.scheme, options.device)
    ids = torch.randint(0, 32768, (1, options.tokens), device=options.device)
    found: dict[str, Any] = {"variant": variant}
    with torch.inference_mode():
        made(input_ids=ids, use_cache=False)  # eager: libraries are loaded, memory is there
        _wait(options.device)
        start, worked = time.perf_counter(), time.process_time()
        if variant == "fusionpass":
            fusionpass.compile(made, traces=True, cache_dir=os.environ["BENCH_START_CACHE"])
        else:
            made.compile()
        made(input_ids=ids, use_cache=False)
        _wait(options.device)
        found["seconds"] = round(time.perf_counter() - start, 2)
        found["cpu_seconds"] = round(time.process_time() - worked, 2)
    from torch._dynamo.utils import compilation_time_metrics

    metrics = {key.rsplit(".", 1)[-1]: sum(values) for key, values in compilation_time_metrics.items()}
    found["phases"] = {key: round(value, 2) for key, value in metrics.items() if value > 0.3}
    if variant == "fusionpass":
        report = fusionpass.report(made)
        found |= {
            "pieces": len(report.pieces),
            "distinct": report.distinct_pieces,
            "cached": sum(graph.cached for graph in report.graphs),
            "traced": sum(not graph.cached for graph in report.model_graphs),
            "trace": [graph.trace for graph in report.model_graphs if graph.trace],
            "fused": len(report.fused),
        }
    return found


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Run every start in a process of its own and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.start", description=__doc__)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--scheme", default="fp8_token")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="where the checkout cannot say it")
    parser.add_argument("--child", choices=VARIANTS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options)))
        return
    runs = []
    for _ in range(options.repeats):
        for variant in options.variants:
            with tempfile.TemporaryDirectory() as folder:
                for start in ("cold", "warm"):
                    runs.append({"start": start, **_run(variant, folder)})
                    print(json.dumps(runs[-1]), flush=True)
    for start in ("cold", "warm"):
        seconds = {
            variant: statistics.median(r["seconds"] for r in runs if (r["variant"], r["start"]) == (variant, start))
            for variant in options.variants
        }
        ratio = f", {seconds['torch.compile'] / seconds['fusionpass']:.2f}x" if len(seconds) == 2 else ""
        print(f"{start}: {', '.join(f'{name} {value:.1f} s' for name, value in seconds.items())}{ratio}")
    if options.out:
        save(options.out, options, runs=runs)


def _run(variant: str, folder: str) -> dict[str, Any]:
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "BENCH_START_CACHE": f"{folder}/fusionpass"}
    command = [sys.executable, "-m", "bench.start", *sys.argv[1:], "--child", variant]
    done = subprocess.run(command, env={**os.environ, **caches}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
