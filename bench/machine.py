"""What a result must say about where it was measured."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def require_gpu() -> None:
    """Exit with a clear message where there is nothing to measure on."""
    if not torch.cuda.is_available():
        sys.exit("bench: this needs a CUDA or ROCm GPU, and torch sees none here (torch.cuda.is_available() is False)")


def device_slug() -> str:
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def facts(commit: str | None = None) -> dict[str, str]:
    """Device, versions and commit ("-dirty" where files differ from it)."""
    import triton

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or _commit(),
    }


def results_folder(chosen: Path | None) -> Path:
    """The folder that was chosen, or this device's in bench/results; it is there then."""
    folder = chosen or ROOT / "bench" / "results" / device_slug()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save(path: Path, options: argparse.Namespace, **found: Any) -> None:
    """Write what was found, behind the facts and the options that say what was measured."""
    said = {k: v for k, v in vars(options).items() if k not in ("out", "child", "commit")}
    path.write_text(json.dumps({**said, **facts(options.commit), **found}, indent=1) + "\n")


def _commit() -> str:
    try:
        described = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
        return subprocess.run(described, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
