import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="no Triton")
def test_kernels_in_the_interpreter():
    # Triton picks the interpreter when a kernel is decorated, so it needs a process of its own.
    command = [sys.executable, "-m", "pytest", "tests/interpreter", "-q", "-x", "-p", "no:cacheprovider", "-n", "0"]
    if not _has_xdist():
        command = command[:-2]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def _has_xdist() -> bool:
    from importlib.util import find_spec

    return find_spec("xdist") is not None
