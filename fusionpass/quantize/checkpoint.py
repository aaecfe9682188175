"""Saving and loading quantised models as compressed-tensors stores them, in safetensors files."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..errors import CheckpointError
from .compressed import read_linear, read_scheme, stored_names, written_linear, written_scheme
from .experts import QuantizedExperts
from .linear import QuantizedLinear, share_input_scales
from .report import LoweredRecord, LowerReport, SkippedRecord
from .scheme import LinearScheme
from .select import replace

_INDEX = "model.safetensors.index.json"
_OURS = "fusionpass"
"""Key in the quantisation config of what compressed-tensors has no words for, and ignores."""


def save_quantized(model: nn.Module, folder: str | Path, max_shard_size: int | str = "5GB") -> None:
    """Write a model whose linears are quantised as compressed-tensors does: safetensors files and config.json.

    transformers, compressed-tensors and engines that read its format load the folder; `load_quantized_` reads it back
    bit for bit, rounding included, which stands in config.json next to what compressed-tensors knows. A tensor goes to
    its file from where it is, without a copy of the model.

    Args:
        model: one that `quantize_` or `lower_linears_` worked on; where it is a Hugging Face model, its config is
            written, too.
        folder: made if it does not exist.
        max_shard_size: of a file, in bytes or as "5GB".

    Raises:
        CheckpointError: no linear is quantised, or experts are.
        SchemeError: compressed-tensors' config has no words for how one is.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    layers = {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    if not layers:
        raise CheckpointError("none of its linears is quantised", type(model).__name__, "Call quantize_ first")
    packed = [path for path, module in model.named_modules() if isinstance(module, QuantizedExperts)]
    if packed:
        fix = "Pass skip to quantize_ for them, or save the model before"
        raise CheckpointError("compressed-tensors has no format for experts in one tensor", packed[0], fix)
    config = _written_config(model, layers)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _stored(model, layers)
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for name, keys in split.filename_to_tensors.items():
        save_file({key: tensors[key] for key in keys}, folder / name, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for part in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        if callable(write := getattr(part, "save_pretrained", None)):
            write(folder)
    file = folder / "config.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    known.setdefault("architectures", None)
    known |= {"architectures": known["architectures"] or [type(model).__name__], "quantization_config": config}
    file.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


def _stored(model: nn.Module, layers: Mapping[str, QuantizedLinear]) -> dict[str, torch.Tensor]:
    """The tensors of a model by their names in a checkpoint; of those that are one tensor, the first name alone."""
    everywhere = model.named_modules(remove_duplicate=False)
    quantised = [(path, module) for path, module in everywhere if isinstance(module, QuantizedLinear)]
    own = {f"{path}.{name}" for path, layer in quantised for name in layer._parameters if name != "bias"}
    found: dict[str, torch.Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in model.state_dict().items():
        if name not in own:
            key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
            if key not in seen or tensor.numel() == 0:
                found[name] = tensor.contiguous()
            seen.add(key)
    for path, layer in layers.items():
        for name, tensor in written_linear(layer).items():
            # Several linears may hold one scale.
            found[f"{path}.{name}"] = tensor.clone() if tensor.numel() == 1 else tensor
    return found


def _written_config(model: nn.Module, layers: Mapping[str, QuantizedLinear]) -> dict[str, Any]:
    by_scheme: dict[LinearScheme, list[str]] = defaultdict(list)
    for path, layer in layers.items():
        by_scheme[layer.kind].append(path)
    groups, schemes = {}, {}
    for index, (kind, paths) in enumerate(by_scheme.items()):
        targets = ["Linear"] if len(by_scheme) == 1 else paths
        groups[f"group_{index}"] = {"targets": targets, **written_scheme(kind)}
        schemes[f"group_{index}"] = str(kind)
    formats = {group["format"] for group in groups.values()}
    exact = {
        f"{path}.{name}": scale.item().hex()
        for path, layer in layers.items()
        for name in ("input_scale", "weight_global_scale")
        if getattr(layer.kind, name.split("_")[0]).packed
        and (scale := getattr(layer, name)) is not None
        and scale.reciprocal().reciprocal() != scale
    }
    return {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": [path for path, module in model.named_modules() if isinstance(module, nn.Linear)],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        _OURS: {"schemes": schemes, "exact": exact},
    }


@torch.no_grad()
def load_quantized_(model: nn.Module, folder: str | Path) -> LowerReport:
    """Load a folder of compressed-tensors' format into a model of plain linears, in place.

    Each `nn.Linear` that the config says is quantised becomes a `QuantizedLinear`; everything else is copied into the
    model's own tensors, or takes their place where they are on the meta device. The folder may be another's than
    `save_quantized`'s: the input is then quantised as compressed-tensors itself does it. Linears side by side in one
    module whose static input scales are equal get the same Parameter, so that the quantisation can be done once.

    Everything is checked before anything is changed; after that each linear is read and its old weight freed in turn.

    Args:
        model: as the config describes it, not quantised yet. Buffers that no checkpoint has must not be on the meta
            device.
        folder: with config.json and the safetensors files.

    Returns:
        For each linear to which scheme, or that it is not quantised.

    Raises:
        CheckpointError: there is no such checkpoint, it is quantised otherwise, or it is not one of this model.
        SchemeError, ScaleError: the tensors do not fit the config.
    """
    folder = Path(folder)
    config = _read_config(folder)
    files = _read_index(folder)
    kinds, left = _schemes(model, config)
    wanted = {path: {name: f"{path}.{name}" for name in stored_names(kind)} for path, kind in kinds.items()}
    _check_keys(model, files, wanted, folder)
    exact = config.get(_OURS, {}).get("exact", {})
    records = []
    with ExitStack() as opened:
        read = _reader(files, opened)
        for path, kind in kinds.items():
            linear = cast(nn.Linear, model.get_submodule(path))
            device = "cpu" if linear.weight.is_meta else linear.weight.device
            made = read_linear({n: read(key).to(device) for n, key in wanted[path].items()}, kind, linear.bias)
            for name, scale in made.named_parameters():
                if f"{path}.{name}" in exact:
                    scale.fill_(float.fromhex(exact[f"{path}.{name}"]))
            replace(model, linear, made.train(linear.training))
            records.append(LoweredRecord(path, (made.out_features, made.in_features), folder.name, made.scheme))
        quantised = {key for names in wanted.values() for key in names.values()}
        for name, tensor in list(model.state_dict(keep_vars=True).items()):
            if name in files and name not in quantised:
                _fill(model, tensor, read(name))
    share_input_scales(model)
    return LowerReport(tuple(records), tuple(left))


def _fill(model: nn.Module, tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Give a tensor of the model its value, in place; one on the meta device is replaced wherever it is registered."""
    if not tensor.is_meta:
        tensor.copy_(value)
        return
    new = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    for module in model.modules():
        for known in (module._parameters, module._buffers):
            for name in [name for name, one in known.items() if one is tensor]:
                setattr(module, name, new)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.exists():
        raise CheckpointError("there is no config.json", str(folder), "Pass the folder of a quantised model")
    config: dict[str, Any] = json.loads(file.read_text()).get("quantization_config", {})
    method, status = config.get("quant_method"), config.get("quantization_status", "compressed")
    if method != "compressed-tensors" or status != "compressed":
        what = f"it is quantised by {method!r}, {status}" if method else "its config says nothing of a quantisation"
        raise CheckpointError(what, str(file), "Load it with its own library and call lower_linears_ or quantize_")
    if config.get("kv_cache_scheme"):
        raise CheckpointError("its cache is quantised, too", str(file), "Load it with its own library")
    return config


def _read_index(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    from safetensors import safe_open

    if (folder / _INDEX).exists():
        found: dict[str, str] = json.loads((folder / _INDEX).read_text())["weight_map"]
        return {key: folder / name for key, name in found.items()}
    file = folder / "model.safetensors"
    if not file.exists():
        raise CheckpointError("there is neither model.safetensors nor an index", str(folder), "Pass the right folder")
    with safe_open(file, "pt") as opened:
        return dict.fromkeys(opened.keys(), file)


def _schemes(model: nn.Module, config: Mapping[str, Any]) -> tuple[dict[str, LinearScheme], list[SkippedRecord]]:
    """How each linear is quantised, and those that are not."""
    kinds, left = {}, []
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            raise CheckpointError("it is quantised already", path, "Pass the model that the config describes")
        if not isinstance(module, nn.Linear):
            continue
        ignored = _targets(path, module, config.get("ignore") or ())
        groups = config["config_groups"].items()
        name = next((n for n, g in groups if not ignored and _targets(path, module, g["targets"])), None)
        if name is None:
            left.append(SkippedRecord(path, "the checkpoint holds it unquantised"))
            continue
        ours = config.get(_OURS, {}).get("schemes", {}).get(name)
        kind = LinearScheme.parse(ours) if ours is not None else read_scheme(config["config_groups"][name])
        if isinstance(kind, str):
            raise CheckpointError(kind, path, "Load it with its own library")
        kinds[path] = kind
    return kinds, left


def _targets(path: str, module: nn.Module, targets: Iterable[str]) -> bool:
    """Whether one of compressed-tensors' targets names the module: its path, `re:` and its beginning, or its class."""
    classes = {cls.__name__ for cls in type(module).__mro__}
    return any(
        re.match(target.removeprefix("re:"), path) is not None
        if target.startswith("re:")
        else target == path or target in classes
        for target in targets
    )


def _check_keys(
    model: nn.Module, files: Mapping[str, Path], wanted: Mapping[str, Mapping[str, str]], folder: Path
) -> None:
    state = model.state_dict(keep_vars=True)
    replaced = {f"{path}.weight" for path in wanted}
    quantised = {key for names in wanted.values() for key in names.values()}
    plain = state.keys() - replaced
    # A tensor with two names is stored once.
    there = {id(state[key]) for key in replaced | (plain & files.keys())}
    missing = [key for key in plain - files.keys() if id(state[key]) not in there] + list(quantised - files.keys())
    unknown = files.keys() - plain - quantised
    for what, keys in (("the checkpoint lacks", missing), ("the model has no place for", unknown)):
        if keys:
            listed = ", ".join(sorted(keys)[:4]) + (", …" if len(keys) > 4 else "")
            raise CheckpointError(f"{what} {len(keys)} tensors: {listed}", str(folder), "Pass its own model")


def _reader(files: Mapping[str, Path], opened: ExitStack) -> Any:
    """`read(key)`, from files that stay open as long as `opened`."""
    from safetensors import safe_open

    handles: dict[Path, Any] = {}

    def read(key: str) -> torch.Tensor:
        file = files[key]
        if file not in handles:
            handles[file] = opened.enter_context(safe_open(file, "pt"))
        tensor: torch.Tensor = handles[file].get_tensor(key)
        return tensor

    return read
