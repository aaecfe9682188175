"""Which ops each generated kernel computes."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._inductor import config
from torch._inductor.graph import GraphLowering

import fusionpass
from fusionpass.inductor.pieces import kernel_origins
from tests.fake_gpu import needs_cuda_build
from tests.report.stack import Stack, rows
from tests.test_inductor import generated


def _index(folder: Path) -> list[str]:
    return [line for line in (folder / "index.md").read_text().splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("numerics", ["fast", "eager"])
def test_every_op_is_in_some_kernel(tmp_path: Path, numerics: str) -> None:
    model = Stack(3)
    with torch.no_grad():
        fusionpass.compile(model, dump_dir=tmp_path, cuda_graphs="off", numerics=numerics)(rows())
    lines = _index(tmp_path)
    for record in fusionpass.report(model).fused:
        assert any(f"**{record.op}** in {record.where}" in line for line in lines), record
    assert any("_scaled_mm" in line for line in lines), "and what is no op of ours"


def test_a_warm_cache_of_inductor_makes_no_difference(tmp_path: Path) -> None:
    found = []
    for name in ("cold", "warm"):
        torch._dynamo.reset()
        model = Stack(2)
        with torch.no_grad():
            fusionpass.compile(model, dump_dir=tmp_path / name, cuda_graphs="off")(rows())
        found.append(_index(tmp_path / name))
    assert found[0] == found[1]
    assert found[0]


@needs_cuda_build
def test_our_own_kernels_on_a_gpu() -> None:
    found: list[dict[str, list[str]]] = []
    codegen = GraphLowering.codegen

    def spy(lowering: Any) -> Any:
        made = codegen(lowering)
        found.append(kernel_origins())
        return made

    with config.patch({"trace.provenance_tracking_level": 2}), mock.patch.object(GraphLowering, "codegen", spy):
        _, session = generated("sm_90")
    (origins,) = found
    names = {record.node for record in session.report.fused if record.backend == "triton"}
    assert set(origins["norm_kernel_0"]) == {name for name in names if "norm" in name}
