"""What folds behind attention."""

from typing import Any

from ..ops.attention import attention, attention_quantize
from ..ops.quant import quantize
from ..rule import Fold


def _quantised(given: dict[str, Any], asked: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]] | str:
    if not given["joined"]:
        return "its heads are not joined to rows"
    own = {"softmax_scale" if name == "scale" else name: value for name, value in given.items() if name != "joined"}
    return {**own, **asked}, {}


FOLDS = (Fold("attention.quantize", attention, quantize, attention_quantize, "attended", (), _quantised),)
