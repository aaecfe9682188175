"""Finding the model that a command is told about: a folder, a saved program, or a function that makes it."""

import importlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import Config
from ..errors import ModelError
from ..quantize import SCHEMES, quantize_
from ..report.explain import explain
from ..report.trace import Report


@dataclass
class Program:
    """A model and a call of it.

    Attributes:
        model: a module or a function of tensors; on the meta device where only its configuration is known.
        args: of the call.
        kwargs: of the call.
        name: as people write it.
        notes: what was assumed.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    notes: list[str] = field(default_factory=list)

    def quantize(self, scheme: str, skip: list[str] | None = None) -> None:
        """Quantise the linears in place; a scheme that is calibrated sees the arguments of the call.

        Raises:
            ModelError: it is no module, or it has no weights and the scheme is calibrated.
            FusionpassError: as `quantize_`.
        """
        if not isinstance(self.model, nn.Module):
            raise ModelError("only a module can be quantised", self.name, "Leave out --scheme")
        calibrated = scheme in SCHEMES and SCHEMES[scheme].calibrated
        if calibrated and any(p.is_meta for p in self.model.parameters()):
            raise ModelError(
                f"{scheme!r} measures its scales on data, and a configuration has neither weights nor data",
                self.name,
                "Pass --scheme fp8_token, or module:factory that returns a quantised model",
            )
        if skip is None:
            skip = ["lm_head"] if any(name == "lm_head" for name, _ in self.model.named_modules()) else []

        def call(model: nn.Module) -> None:
            model(*self.args, **self.kwargs)

        with torch.no_grad():
            quantize_(self.model, scheme, call if calibrated else None, skip, progress=False)
        self.notes.append(f"its linears quantised as {scheme}{f', but {chr(44).join(skip)}' if skip else ''}")

    def explain(self, config: Config) -> Report:
        """The report of a trace, without what torch says on the way."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return explain(self.model, *self.args, config=config, **self.kwargs)


def load(text: str, tokens: int, *, weights: bool = False) -> Program:
    """The model that `text` names.

    Args:
        text: a folder with a config.json; a file that `torch.export.save` wrote; or "module:factory", with the working
            folder on the path.
        tokens: of the input, where nothing else gives one.
        weights: for a folder: load the weights, or draw them where there are none. Else its parameters have no memory.

    Raises:
        ModelError: there is no such model, or it cannot be called with token ids alone.
    """
    path = Path(text)
    if path.is_dir():
        return _folder(path, tokens, weights)
    if path.is_file():
        return _exported(path)
    module, colon, factory = text.partition(":")
    if not colon:
        raise ModelError("there is no such folder or file", text, "Name one, or pass module:factory")
    return _made(module, factory, tokens)


def _folder(folder: Path, tokens: int, weights: bool) -> Program:
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            f"{error.name} is not installed", str(folder), "Run `pip install 'fusionpass[demo]'`"
        ) from error
    if not (folder / "config.json").is_file():
        raise ModelError("there is no config.json", str(folder), "Pass the folder of a Hugging Face model")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    names = [name for name in getattr(config, "architectures", None) or () if hasattr(transformers, name)]
    kind = getattr(transformers, names[0]) if names else transformers.AutoModelForCausalLM
    dtype = getattr(config, "dtype", None) or torch.bfloat16
    notes = [f"{tokens} tokens"]
    if weights and any(folder.glob("*.safetensors")):
        model = kind.from_pretrained(folder, local_files_only=True, dtype=dtype)
    else:
        if getattr(config, "quantization_config", None):
            notes.append("not quantised, since its own quantisation needs its weights: see --scheme")
            del config.quantization_config
        make = getattr(kind, "_from_config", None) or kind.from_config
        with torch.device("cpu" if weights else "meta"):
            model = make(config, dtype=dtype)
        notes.append("weights at random" if weights else "no weights")
    return _called(model.eval(), folder.resolve().name, tokens, notes)


def _called(model: nn.Module, name: str, tokens: int, notes: list[str]) -> Program:
    """A Hugging Face model with token ids to call it with."""
    config: Any = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) != "input_ids" or config is None:
        raise ModelError(
            f"{type(model).__name__} is not called with token ids alone",
            name,
            "Pass module:factory whose factory() returns (model, args) or (model, args, kwargs)",
        )
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    kwargs = {"use_cache": False} if hasattr(config, "use_cache") else {}
    return Program(model, (ids,), kwargs, name, notes)


def _exported(file: Path) -> Program:
    try:
        program = torch.export.load(file)
    except Exception as error:  # whatever torch raises for a file that is something else
        raise ModelError(
            f"torch.export cannot load it: {error}", str(file), "Pass a file of torch.export.save"
        ) from error
    if program.example_inputs is None:
        raise ModelError("it was saved without its example inputs", str(file), "Pass module:factory that loads it")
    args, kwargs = program.example_inputs
    # They compare the device with that of the export, and a target may be another.
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        program.graph.erase_node(node)
    # Its modules are modules again, so that the report can say where a site is.
    model = torch.export.unflatten(program)
    model.check_input_constraints = False  # Dynamo would break the graph there
    return Program(model, tuple(args), dict(kwargs), file.stem, ["as exported"])


def _made(module: str, factory: str, tokens: int) -> Program:
    sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise ModelError(str(error), f"{module}:{factory}", "Name a module on the path and a function in it") from error
    finally:
        sys.path.remove("")
    made = function()
    model, *rest = made if isinstance(made, tuple) else (made,)
    name = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", factory)
    if not rest:
        return _called(model, name, tokens, [f"{tokens} tokens"])
    if len(rest) > 2 or not callable(model) or not isinstance(rest[0], list | tuple):
        raise ModelError(
            f"{factory}() returned neither a model, nor (model, args), nor (model, args, kwargs)",
            f"{module}:{factory}",
            "Return (model, (x, y)), say",
        )
    return Program(model, tuple(rest[0]), dict(rest[1]) if len(rest) == 2 else {}, name)
