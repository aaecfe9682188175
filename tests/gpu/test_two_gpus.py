"""Models on several GPUs in one process: graphs, current devices, threads and kernels of each its own."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import fusionpass
from fusionpass.ops import block_scaled_mm, rms_norm
from tests.blocks import product_of
from tests.models import Block

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"),
]
DEVICES = ("cuda:0", "cuda:1")
WIDTH = 2048


@pytest.fixture(autouse=True)
def _inference() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch.cuda.set_device(0)


def inputs(device: str, rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    x, residual = (torch.randn(2, rows, WIDTH, dtype=torch.bfloat16).to(device) for _ in range(2))
    return x, residual


def results(found: Any) -> list[torch.Tensor]:
    """All tensors of a block's result: the output, its codes and scales, and the residual sum."""
    return [t.float() for part in found for t in (part if isinstance(part, tuple | list) else [part])]


def notes(model: Any) -> list[Any]:
    """How its programs are run."""
    return [graph.replay for graph in fusionpass.report(model).model_graphs]


def check(got: Any, expected: Any, device: str) -> None:
    for a, b in zip(results(got), results(expected), strict=True):
        assert a.device == torch.device(device)
        assert torch.equal(a, b)


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("mode", ["off", "full", "piecewise"])
def test_a_model_on_each(mode: str, current: int) -> None:
    """In turns, through captures and replays, whatever device is the current one."""
    torch.cuda.set_device(current)
    models = {device: Block(WIDTH).to(device) for device in DEVICES}
    plain = {device: fusionpass.compile(copy.deepcopy(model), cuda_graphs="off") for device, model in models.items()}
    compiled = {device: fusionpass.compile(model, cuda_graphs=mode) for device, model in models.items()}
    kept = []
    for _ in range(5):
        for device in DEVICES:
            given = inputs(device)
            expected, got = plain[device](*given), compiled[device](*given)
            kept.append((got, copy.deepcopy(got), device))
            check(got, expected, device)
    for got, before, device in kept:
        check(got, before, device)
    for model in compiled.values():
        replays = sum(graph.replays for note in notes(model) for graph in note.graphs)
        assert (replays > 0) == (mode != "off")
        fusionpass.release(model)


def test_one_compiled_model_that_moves() -> None:
    model = fusionpass.compile(Block(WIDTH).to(DEVICES[0]), cuda_graphs="full")
    reference = fusionpass.compile(copy.deepcopy(model), cuda_graphs="off")
    for device in (DEVICES[0], DEVICES[1], DEVICES[0]):
        model.to(device)
        reference.to(device)
        for _ in range(4):
            given = inputs(device)
            check(model(*given), reference(*given), device)


def test_a_model_in_two_halves() -> None:
    """Its tensors are on two devices, which no graph holds: it runs without, and the report says why."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16, device=d) for d in DEVICES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).to(DEVICES[1]))

    model = Halves()
    compiled = fusionpass.compile(copy.deepcopy(model))
    for _ in range(4):
        x = inputs(DEVICES[0])[0]
        torch.testing.assert_close(compiled(x), model(x))
    assert any("cuda:0, cuda:1" in note.why for note in notes(compiled))


def test_a_thread_for_each() -> None:
    models = {device: Block(WIDTH).to(device) for device in DEVICES}
    plain = {device: fusionpass.compile(copy.deepcopy(model), cuda_graphs="off") for device, model in models.items()}
    compiled = {device: fusionpass.compile(model, cuda_graphs="full") for device, model in models.items()}
    work = {device: [inputs(device, rows) for rows in (1, 8, 8, 8, 1, 1)] for device in DEVICES}
    expected = {device: [plain[device](*given) for given in work[device]] for device in DEVICES}

    def run(device: str) -> None:
        with torch.no_grad(), torch.cuda.device(device):
            for given, want in zip(work[device] * 5, expected[device] * 5, strict=True):
                check(compiled[device](*given), want, device)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, DEVICES))


@pytest.mark.parametrize("current", [0, 1])
def test_ops_run_where_their_tensors_are(current: int) -> None:
    torch.cuda.set_device(current)
    for device in DEVICES:
        x, weight = torch.randn(7, WIDTH, device=device), torch.rand(WIDTH, device=device)
        got = rms_norm(x, weight, 1e-6)
        assert got.device == x.device
        torch.testing.assert_close(got, rms_norm.reference(x, weight, 1e-6))
        for rows in (3, 256):
            arguments = product_of("fp8", rows, 512, 1024, device)
            wide = block_scaled_mm.reference(**{**arguments, "out_dtype": "float32"})
            assert float((block_scaled_mm(**arguments).float() - wide).norm() / wide.norm()) < 5e-3
