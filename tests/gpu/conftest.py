import pytest
import torch


def pytest_collection_modifyitems(items):
    missing = pytest.mark.skip(reason="no CUDA or ROCm device")
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(missing)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Instead of the CPU tests' fixture: deterministic mode changes Inductor's code; the kernels' tests poison."""
