"""What tests and benchmarks measure a kernel by: distances in units in the last place, and a float64 oracle."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .op import EXACT, Op, Tolerance

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def ordered(values: torch.Tensor) -> torch.Tensor:
    """Integers that count through the representable values: neighbours differ by one, and both zeros are 0.

    Args:
        values: any shape and floating dtype, without NaN.

    Returns:
        The same shape, int64.
    """
    bits = values.contiguous().view(_INTEGERS[values.element_size()]).long()
    magnitude = bits & ((1 << (8 * values.element_size() - 1)) - 1)
    return torch.where(bits < 0, -magnitude, magnitude)


def ulp_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Per element, how many representable values lie between `a` and `b`, one of them counted.

    NaN is at distance 0 from NaN and at the largest int64 from everything else.

    Args:
        a: any shape and floating dtype.
        b: the shape and dtype of `a`.

    Returns:
        The same shape, int64.
    """
    nan_a, nan_b = a.float().isnan(), b.float().isnan()
    distance = (ordered(a) - ordered(b)).abs()
    distance = torch.where(nan_a | nan_b, torch.iinfo(torch.int64).max, distance)
    return torch.where(nan_a & nan_b, 0, distance)


@dataclass(frozen=True)
class Difference:
    """How far two tensors are apart.

    Args:
        ulp: the largest distance.
        different: how many elements differ.
        elements: of how many.
        dtype: of both.
    """

    ulp: int
    different: int
    elements: int
    dtype: torch.dtype

    def within(self, tolerance: Tolerance) -> bool:
        """Whether `tolerance` allows it. Where any element may differ, one may: a share of few is less than one."""
        if self.dtype == torch.float32:
            return self.ulp <= tolerance.fp32_ulp
        allowed = max(1.0, tolerance.fraction * self.elements) if tolerance.fraction else 0.0
        return self.ulp <= tolerance.ulp and self.different <= allowed


def difference(
    actual: torch.Tensor,
    expected: torch.Tensor,
    tolerance: Tolerance = EXACT,
    rounded: torch.dtype | None = None,
) -> Difference:
    """How far `actual` is from `expected`, where `tolerance.floor` and `tolerance.cancels` leave a difference.

    Integers differ by their values. Where values on the way were `rounded` to a dtype that is narrower than the
    results', distances are counted in its steps: a wide table of angles makes the result float32, while the
    normalised value that it turns was rounded to bfloat16, and one step of that is thousands of the result's.

    Raises:
        AssertionError: their shapes or dtypes are not the same.
    """
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    if rounded is not None and actual.is_floating_point() and torch.finfo(rounded).eps > torch.finfo(actual.dtype).eps:
        actual, expected = actual.to(rounded), expected.to(rounded)
    if not actual.is_floating_point():
        distance = (actual.long() - expected.long()).abs()
    else:
        distance = ulp_distance(actual, expected)
    if (tolerance.floor or tolerance.cancels) and distance.numel():
        largest = expected.double().nan_to_num(0, 0, 0).abs().max()
        apart = (actual.double() - expected.double()).abs()
        distance = torch.where(apart <= tolerance.floor * largest, 0, distance)
        # Of 8 bits, where they are integers.
        eps = torch.finfo(expected.dtype).eps if expected.is_floating_point() else 2.0**-4
        step = tolerance.cancels * eps * largest
        distance = torch.where(apart <= step, distance.clamp(max=1), distance)
    return Difference(
        int(distance.max()) if distance.numel() else 0, int((distance > 0).sum()), distance.numel(), actual.dtype
    )


def activation_dtype(arguments: Mapping[str, Any]) -> torch.dtype | None:
    """What an op rounds values on the way to: the dtype of its first argument of 16 bits or more that is no scale."""
    tensors = (v for k, v in arguments.items() if isinstance(v, torch.Tensor) and "scale" not in k)
    return next((v.dtype for v in tensors if v.is_floating_point() and v.dtype.itemsize > 1), None)


def disagreement(
    op: Op,
    arguments: Mapping[str, Any],
    actual: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    names: Sequence[str] | None = None,
) -> str | None:
    """The first output of `op` that is further from what is expected than the op's tolerance allows.

    Args:
        op: what was run.
        arguments: of the run, by name; tensors may be fake.
        actual: what it gave.
        expected: what it is to give.
        names: which of the op's outputs these are; default: all of them, in order.

    Returns:
        A sentence; None where all agree.
    """
    rounded = activation_dtype(arguments)
    for name, got, wanted in zip(names or op.outputs(arguments), actual, expected, strict=True):
        tolerance = op.tolerance.get(name, EXACT)
        if not (found := difference(got, wanted, tolerance, rounded)).within(tolerance):
            return f"{name} differs in {found.different} of {found.elements} elements, by up to {found.ulp} ulp"
    return None


def exact(op: Op, arguments: Mapping[str, Any]) -> list[torch.Tensor]:
    """The outputs of `op` in float64, with no rounding on the way: the reference run on widened inputs.

    Codes come back as the float64 values that were about to be rounded to codes.
    """
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    with _Widened():
        results = op.reference(**wide)
    return [results] if op.single else list(results)


class _Widened(TorchFunctionMode):
    """Leaves out every cast to a narrower float."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        narrowing = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)
        if func in narrowing and args[0].dtype == torch.float64:
            return args[0]
        if func is torch.Tensor.to and args[0].dtype == torch.float64:
            dtypes = [v for v in (*args[1:], *kwargs.values()) if isinstance(v, torch.dtype)]
            if all(dtype.is_floating_point for dtype in dtypes):
                return args[0]
        return func(*args, **kwargs)


def relative_error(actual: torch.Tensor, oracle: torch.Tensor) -> float:
    """‖actual − oracle‖ / ‖oracle‖ in float64; NaN where `actual` holds one."""
    norm = oracle.norm()
    return float((actual.double() - oracle).norm() / norm) if norm > 0 else float(actual.double().norm())
