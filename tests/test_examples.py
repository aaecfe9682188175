"""The examples run as a user runs them: programs of their own, the package on the path and not installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = {
    "backend_string": "Block: 2 fused, 0 refused, 0 missed; 1 graphs",
    "diffusers_transformer": "FluxTransformer2DModel: 10 fused, 1 refused, 0 missed; 1 graphs",
    "dump_and_diff": "Block: 1 fused, 0 refused, 0 missed; 1 graphs",
    "fp8_cache": "Qwen3ForCausalLM: 5 fused, 0 refused, 0 missed; 2 graphs",
    "hf_generate": "LlamaForCausalLM: 6 fused, 0 refused, 0 missed; 2 graphs",
    "own_model": "Model: 2 fused, 0 refused, 0 missed; 1 graphs",
    "own_rule": "Norm: 1 fused, 0 refused, 0 missed; 1 graphs",
    "own_op": "Head: 1 fused, 0 refused, 0 missed; 1 graphs",
    "torchao_model": "MLP: 2 fused, 0 refused, 0 missed; 1 graphs",
    "why_not": "Model: 6 fused, 0 refused, 1 missed; 1 graphs",
}
NEEDS = {
    "fp8_cache": "transformers",
    "hf_generate": "transformers",
    "diffusers_transformer": "diffusers",
    "torchao_model": "torchao",
}


def _run(name, **environment):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    env = {k: v for k, v in os.environ.items() if not k.startswith("FUSIONPASS_")}
    env |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


def test_every_example_is_run():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == EXAMPLES.keys()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("fp8_cache", "hf_generate") else n for n in EXAMPLES]
)
def test_example(name):
    done = _run(name)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert EXAMPLES[name] in done.stdout


def test_an_example_fails_where_nothing_fuses():
    done = _run("backend_string", FUSIONPASS_DISABLE="norm.llama")
    assert done.returncode != 0
    assert "norm.llama is disabled by Config.disable" in done.stderr
