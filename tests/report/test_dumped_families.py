"""The graphs of the test families, dumped: every one runs as a file, and gives what the captured one gives.

By day every eighth family, others than those that tests/test_coverage.py looks at.
"""

import pytest
import torch

import fusionpass
from fusionpass import Arch, Config
from fusionpass.report.dump import write_graph
from fusionpass.report.replay import differences, loaded, results_of
from tests.families import FAMILIES
from tests.profiles import NIGHTLY

PASSES = ("captured", "normalize", "recognise", "fuse", "lower", "cleanup")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES if NIGHTLY else FAMILIES[1::8], ids=lambda family: family.name)
def test_every_dumped_graph_runs_and_equals_the_captured_one(family, tmp_path):
    pytest.importorskip(family.library)
    model, inputs = family.build()
    report = fusionpass.explain(model, config=Config(target=Arch("cpu")), **inputs)
    assert report.graphs
    assert report.fused
    for trace in report.graphs:
        files = sorted(write_graph(tmp_path, trace).glob("[0-9]*.py"))
        assert tuple(file.stem[3:] for file in files) == PASSES
        first, *others = (loaded(file) for file in files)
        expected = results_of(first.forward, first.INPUTS)
        assert any(isinstance(value, torch.Tensor) and value.isfinite().any() for value in expected)
        for file, other in zip(files[1:], others, strict=True):
            assert not differences(results_of(other.forward, first.INPUTS), expected), file.name
