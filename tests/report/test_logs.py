"""TORCH_LOGS="fusionpass", "+fusionpass" and tlparse's artifacts, as a program of a user's sees them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import torch
import fusionpass
from tests.report.stack import Stack, rows
model = fusionpass.compile(Stack(3, odd=(1,)), cache=False, cuda_graphs="off")
with torch.no_grad():
    model(rows())
    model(rows(5))
"""


def _run(**environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TORCH_LOGS", "TORCH_TRACE"))}
    env |= {"PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def _lines(text: str) -> list[str]:
    return [line.split("] ", 1)[1] for line in text.splitlines() if "fusionpass/session.py" in line]


def test_nothing_is_logged_unless_it_is_asked_for() -> None:
    assert _lines(_run()) == []


@pytest.mark.parametrize("level", ["fusionpass", "+fusionpass"])
def test_one_line_for_each_graph_and_with_a_plus_one_for_each_site(level: str) -> None:
    lines = _lines(_run(TORCH_LOGS=level))
    graphs = [line for line in lines if "Stack, graph " in line]
    assert [re.search(r"graph \d+", line)[0] for line in graphs] == ["graph 0", "graph 1"]  # type: ignore[index]
    assert ", 1 missed, " in graphs[0]
    sites = [line for line in lines if line not in graphs]
    if level == "fusionpass":
        assert sites == []
    else:
        assert any("missed: layers.1: rms_norm [norm.llama]" in line for line in sites)
        assert any("fused: layers.0.norm: rms_norm_quantize" in line for line in sites)


def test_artifacts_for_tlparse(tmp_path: Path) -> None:
    _run(TORCH_TRACE=str(tmp_path))
    (log,) = tmp_path.glob("*.log")
    found: dict[str, str] = {}
    name = ""
    for line in log.read_text().splitlines():
        if line.startswith("\t"):
            found[name] = f"{found.get(name, '')}{line[1:]}\n"
        else:
            entry = json.loads(line[line.index("{") :])
            name = entry.get("artifact", {}).get("name", "")
    assert "missed:\n  layers.1: rms_norm [norm.llama]" in found["fusionpass_report"]
    before, after = found["fusionpass_graph_0_before"], found["fusionpass_graph_0_after"]
    assert "aten.rsqrt.default(" in before
    assert "torch.ops.fusionpass" not in before
    assert "torch.ops.fusionpass.rms_norm_quantize.default(" in after
    assert "layers.0.norm" in after
