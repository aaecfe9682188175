"""What an op returns for the values that its argument nodes stand for."""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher

from .errors import FusionpassError
from .graphs import values
from .op import Op

_Layout = tuple[Any, Any, torch.dtype, torch.device]


class Inference:
    """Runs ops' references on fake tensors; alike calls are asked once. The state of one run of a pass."""

    def __init__(self) -> None:
        self._known: dict[Any, list[_Layout] | str] = {}

    def __call__(self, op: Op, arguments: Mapping[str, Any]) -> list[torch.Tensor] | str:
        """The fake results, or why the op does not take these arguments."""
        vals = values(dict(arguments))
        mode = next((v.fake_mode for v in vals.values() if hasattr(v, "fake_mode")), contextlib.nullcontext())
        key = (op.overload, *(str(_layout(v)) if isinstance(v, torch.Tensor) else repr(v) for v in vals.values()))
        with mode, torch.no_grad():
            known = self._known.get(key)
            if known is None:
                try:
                    # Without it a pad by a symbolic size has no meta function.
                    with enable_python_dispatcher():
                        results = op.reference(**vals)
                    known = [_layout(t) for t in ([results] if op.single else results)]
                except FusionpassError as error:
                    known = str(error)
                self._known[key] = known
            if isinstance(known, str):
                return known
            # New tensors each time: two nodes never stand for one memory.
            return [torch.empty_strided(s, t, dtype=dtype, device=device) for s, t, dtype, device in known]


def _layout(tensor: torch.Tensor) -> _Layout:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
