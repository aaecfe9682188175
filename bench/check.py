"""Whether what an implementation returns is what the op means: beside float64, as close as the op's own reference."""

from collections.abc import Callable, Sequence

import torch

from fusionpass.op import Op
from fusionpass.ops.quant import Scheme, dequantize
from fusionpass.testing import exact, relative_error

from .implementations import Arguments

Check = Callable[[Sequence[torch.Tensor]], float]


def checker(op: Op, arguments: Arguments) -> Check:
    """The largest error of some outputs, relative to what float64 gives; computed once for all who are checked.

    Returns:
        A function that raises AssertionError where an output is further from float64 than twice what the reference's
        is, or there are not as many.
    """
    reference = op.reference(**arguments)
    wanted = [reference] if op.single else list(reference)
    kind = Scheme.parse(arguments["scheme"]) if "scheme" in arguments else None
    # A code means nothing without its scale: both against what was to be quantised.
    scaled = kind is not None and kind.returns_scale
    unscaled = {"scheme": "fp8_static", "scale": torch.ones((), device=wanted[0].device)} if scaled else {}
    oracle = exact(op, {**arguments, **unscaled})

    def meant(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if kind is None or not scaled:
            return list(outputs)
        return [dequantize(outputs[0], outputs[1], kind, arguments.get("scale")), *outputs[2:]]

    allowed = [2 * relative_error(v, truth) + 1e-6 for v, truth in zip(meant(wanted), oracle, strict=True)]

    def check(outputs: Sequence[torch.Tensor]) -> float:
        assert len(outputs) == len(wanted), f"{len(outputs)} outputs, not {len(wanted)}"
        errors = [relative_error(v, truth) for v, truth in zip(meant(outputs), oracle, strict=True)]
        for error, limit in zip(errors, allowed, strict=True):
            assert error <= limit, f"{error:.2e} from float64, more than {limit:.2e}"
        return max(errors)

    return check
