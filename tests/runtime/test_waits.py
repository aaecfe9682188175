"""What a capture refuses before it is invalid."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fusionpass.runtime.waits import NoWaits

WAITS = {
    "item": lambda gpu, cpu: gpu.sum().item(),
    "nonzero": lambda gpu, cpu: gpu.nonzero(),
    "mask": lambda gpu, cpu: gpu[gpu > 0],
    "repeats": lambda gpu, cpu: gpu.repeat_interleave(gpu[0].long(), 0),
    "to the device": lambda gpu, cpu: cpu.to("cuda"),
    "to the host": lambda gpu, cpu: gpu.cpu(),
    "copied in": lambda gpu, cpu: gpu.copy_(cpu, non_blocking=True),
    "copied out": lambda gpu, cpu: cpu.copy_(gpu),
}
RUNS = {
    "product": lambda gpu, cpu: gpu @ gpu,
    "rows": lambda gpu, cpu: gpu[gpu[0].long()],
    "repeats of a known size": lambda gpu, cpu: gpu.repeat_interleave(gpu[0].long(), 0, output_size=7),
    "cast": lambda gpu, cpu: gpu.to(torch.float16),
    "copy": lambda gpu, cpu: gpu.copy_(gpu.t()),
    "higher-order": lambda gpu, cpu: torch.ops.higher_order.cond(True, torch.sin, torch.cos, (gpu,)),
    "of the host": lambda gpu, cpu: (cpu.to(torch.int8), cpu.copy_(cpu.t())),
}


def tensors():
    return torch.empty(4, 4, device="cuda"), torch.empty(4, 4)


@pytest.mark.parametrize("what", WAITS)
def test_refused(what):
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = tensors()
        with NoWaits(), pytest.raises(RuntimeError, match="waits"):
            WAITS[what](*given)


@pytest.mark.parametrize("what", RUNS)
def test_runs(what):
    with FakeTensorMode():
        given = tensors()
        with NoWaits():
            RUNS[what](*given)


def test_the_host_may_wait_for_itself():
    with NoWaits():
        assert torch.ones(3).sum().item() == 3
        assert torch.tensor([0.0, 2.0]).nonzero().tolist() == [[1]]


@pytest.mark.parametrize(("into", "refused"), [(True, False), (False, True)])
def test_pinned_memory_is_copied(into, refused, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda t: not refused)
    with FakeTensorMode():
        gpu, cpu = tensors()
        with NoWaits():
            if refused:
                with pytest.raises(RuntimeError, match="not pinned"):
                    gpu.copy_(cpu)
            else:
                gpu.copy_(cpu)
                cpu.copy_(gpu)
