"""What the kernels' tests share, in Triton's interpreter and on a GPU: arguments to draw, and the checks."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from fusionpass.arch import Arch
from fusionpass.launch import Empty
from fusionpass.op import EXACT, OPS, Op
from fusionpass.ops import quantize
from fusionpass.ops.derive import MORE
from fusionpass.ops.norm import AFTER, BEFORE, LAST, NORM
from fusionpass.ops.quant import Scheme, dequantize
from fusionpass.testing import activation_dtype, difference, exact, relative_error

KERNEL_OPS = tuple(
    op
    for op in OPS.values()
    if op.backends and op.namespace == "fusionpass" and not {"q", "cos", "a", "w", "ids"} & {*op.signature.parameters}
)
"""Those that take rows; `tests/heads.py` and `tests/gemm.py` have what draws for those that take heads or matrices."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
POISON = 0xA5
GUARD = 256


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every output starts as garbage between two guards, which must be intact at the end."""
    buffers: list[torch.Tensor] = []

    def new(empty: Empty, device: torch.device) -> torch.Tensor:
        layout = torch.empty(empty.shape, device="meta")
        stride = empty.stride or layout.stride()
        last = sum((size - 1) * step for size, step in zip(empty.shape, stride, strict=True))
        size = (last + 1) * empty.dtype.itemsize if math.prod(empty.shape) else 0
        buffers.append(torch.full((GUARD + size + GUARD,), POISON, dtype=torch.uint8, device=device))
        return buffers[-1][GUARD : GUARD + size].view(empty.dtype).as_strided(empty.shape, stride)

    with mock.patch.object(Empty, "new", new):
        yield
    for buffer in buffers:
        assert (buffer[:GUARD] == POISON).all(), "written before the output"
        assert (buffer[-GUARD:] == POISON).all(), "written past the output"


class _DividingAsCuda(TorchFunctionMode):
    """torch's CUDA kernels multiply by the float32 reciprocal of a Python number, where those of a CPU divide by it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func in (torch.Tensor.div, torch.Tensor.__truediv__)
            and isinstance(args[1], int | float)
            and args[0].is_floating_point()
        ):
            return args[0] * torch.tensor(float(args[1])).reciprocal().item()
        return func(*args, **(kwargs or {}))


def reference(op: Op, arguments: Mapping[str, Any]) -> list[torch.Tensor]:
    """What `op` gives where its kernels run: on a GPU."""
    with _DividingAsCuda():
        results = op.reference(**arguments)
    return [results] if op.single else results


def check(op: Op, arch: Arch, arguments: Mapping[str, Any], early: bool = False) -> list[torch.Tensor]:
    """Run the kernel of `op`: within the op's tolerance of the reference, and no further than it from float64."""
    launch, reason = op.plan(arch, arguments)
    assert launch is not None, reason
    with poisoned():
        outputs = (launch.reading_early() if early else launch).run()
    expected = reference(op, arguments)
    names = op.outputs(arguments)
    assert len(outputs) == len(names)
    kind = Scheme.parse(arguments["scheme"]) if "scheme" in arguments else None
    given = arguments.get("scale")
    if kind is not None and kind.returns_scale:
        compare_moved(kind, given, outputs, expected)
        expected = [keep_moved(kind, given, outputs, expected), *expected[1:]]
    for name, output, want in zip(names, outputs, expected, strict=True):
        tolerance = op.tolerance.get(name, EXACT)
        if arguments.get("inner_weight") is None:
            # What an op allows for a norm behind a norm is not for one alone.
            if name == "residual":
                tolerance = EXACT
            if name == "norm" and "rounding" in arguments and arguments.get("mod_scale") is None:
                tolerance = op.tolerance["norm"] if {"bias", "gate"} & set(arguments) else NORM
        if "approximate" in arguments and output.dtype == torch.float32:
            # 1 + erf(x) and 1 + tanh(x) have an error of one step of 1.0 in the reference too.
            near = (output.double() - want.double()).abs() <= 2.0**-22 * terms(arguments)
            output = torch.where(near, want, output)
        assert alike_strides(output, want), f"{name}: strides {output.stride()}, not {want.stride()}"
        # A wide weight makes the product float32, but the normalised value in it was rounded as x is; so were the
        # values that a scale is of.
        narrow = output.dtype == torch.float32 and (name == "norm" or (name == "scale" and op is not quantize))
        rounded = activation_dtype(arguments) if narrow else None
        found = difference(ordered(output, name), ordered(want, name), tolerance, rounded)
        assert found.within(tolerance), f"{name}: {found}"
    compare_with_exact(op, arguments, outputs, expected)
    return outputs


def terms(arguments: Mapping[str, Any]) -> torch.Tensor:
    """What a GELU multiplies its factor between 0 and 1 by, in magnitude."""
    product: Any = math.prod(arguments[k].double() for k in ("gate", "up", "x") if k in arguments)
    return torch.as_tensor(product).abs()


def alike_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and all(
        n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True) if a.numel()
    )


def ordered(values: torch.Tensor, name: str) -> torch.Tensor:
    """Codes and exponents that are integers, as integers from 0 that count steps; floats as they are."""
    if values.dtype == torch.int8:
        return values.int() + 128
    if values.dtype == torch.uint8 and name.startswith("q"):
        code = torch.stack([values & 15, values >> 4], -1).int()
        return 8 + torch.where(code > 7, 8 - code, code)
    return values.int() if values.dtype == torch.uint8 else values


def steps(kind: Scheme, given: torch.Tensor | None, q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What a code of 1.0 stands for, per element."""
    one = torch.full(q.shape, 0x22 if kind.packed else 1.0, device=q.device).to(q.dtype)
    return dequantize(one, scale, kind, given)


def keep_moved(
    kind: Scheme, given: torch.Tensor | None, outputs: list[torch.Tensor], expected: list[torch.Tensor]
) -> torch.Tensor:
    """The expected codes, with ours where the scale is another: `compare_moved` is what looks at those."""
    if not expected[0].numel():
        return expected[0]
    same = steps(kind, given, *outputs[:2]) == steps(kind, given, *expected[:2])
    same |= steps(kind, given, *outputs[:2]).isnan() & steps(kind, given, *expected[:2]).isnan()
    if kind.packed:
        same = same.unflatten(-1, (-1, 2)).any(-1)
    ours, theirs = outputs[0].view(torch.uint8), expected[0].view(torch.uint8)
    return torch.where(same, theirs, ours).view(expected[0].dtype)


def compare_moved(
    kind: Scheme, given: torch.Tensor | None, outputs: list[torch.Tensor], expected: list[torch.Tensor]
) -> None:
    """Where the scales differ, the codes stand for the same values to within a step of each."""
    if not expected[0].numel():
        return
    step, other = steps(kind, given, *outputs[:2]).double(), steps(kind, given, *expected[:2]).double()
    ours, theirs = (dequantize(*pair[:2], kind, given).double() for pair in (outputs, expected))
    finite = ours.isfinite() & theirs.isfinite() & (step != other)
    relative = 0.0 if kind.dtype == torch.int8 else 0.25 if kind.packed else 0.0625
    allowed = relative * (ours.abs() + theirs.abs()) + 0.51 * (step + other)
    assert ((ours - theirs).abs() <= allowed)[finite].all()


def compare_with_exact(
    op: Op, arguments: Mapping[str, Any], outputs: list[torch.Tensor], expected: list[torch.Tensor]
) -> None:
    names, scheme = op.outputs(arguments), arguments.get("scheme")
    # Computed scales have rounded codes in float64 too: their bounds are in tests/ops/test_quantize.py.
    computed = ("q", "scale") if scheme is not None and Scheme.parse(scheme).returns_scale else ()
    for name, output, want, oracle in zip(names, outputs, expected, exact(op, arguments), strict=True):
        if name in computed:
            continue
        if not oracle.isfinite().all() or not want.double().isfinite().all() or not oracle.numel():
            continue
        # One element may land on its other neighbour, so a small tensor may be off by more than a twentieth.
        slack = torch.finfo(output.dtype).eps / math.sqrt(oracle.numel()) + 1e-6
        if "approximate" in arguments:
            # As in `check`: a step of 1.0, which the reference may have the luck to miss.
            slack += float(2.0**-22 * terms(arguments).norm() / oracle.norm().clamp(min=1e-300))
        assert relative_error(output, oracle) <= 1.05 * relative_error(want, oracle) + slack


@st.composite
def shapes(draw: st.DrawFn, most_rows: int, widths: st.SearchStrategy[int]) -> tuple[int, ...]:
    rows = draw(st.integers(0, most_rows))
    outer = draw(st.sampled_from([(), (1,), (2,)]))
    return (*outer, rows, draw(widths))


@st.composite
def values(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Random values with a row stride of their own, and now and then a zero row, an infinity or a NaN."""
    generator = torch.Generator(device).manual_seed(draw(st.integers(0, 2**31)))
    pad = draw(st.sampled_from([0, 0, 1, 8, 16]))
    wide = torch.randn((*shape[:-1], shape[-1] + pad), generator=generator, device=device)
    wide *= draw(st.sampled_from([1e-3, 1.0, 30.0]))
    made = wide.to(dtype)[..., : shape[-1]]
    odd = draw(st.sampled_from(["none", "none", "zero row", "inf", "nan", "large"]))
    if made.numel():
        rows = made.view(-1, shape[-1]) if not pad else made.flatten(0, -2) if made.dim() > 1 else made[None]
        row, column = draw(st.integers(0, rows.shape[0] - 1)), draw(st.integers(0, shape[-1] - 1))
        if odd == "zero row":
            rows[row] = 0
        elif odd != "none":
            rows[row, column] = {"inf": -math.inf, "nan": math.nan, "large": torch.finfo(dtype).max / 2}[odd]
    return made


@st.composite
def arguments_for(
    draw: st.DrawFn, op: Op, shape: tuple[int, ...], device: str, schemes: tuple[str, ...]
) -> dict[str, Any]:
    """Arguments of `op` by the names in its signature."""
    dtype = draw(st.sampled_from(DTYPES))
    wanted = op.signature.parameters
    scheme = draw(st.sampled_from(schemes))
    kind = Scheme.parse(scheme)
    if "scheme" in wanted and kind.returns_scale:
        group = kind.group or 1
        shape = (*shape[:-1], -(-shape[-1] // group) * group)

    def vector(kind: torch.dtype) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(draw(st.integers(0, 2**31)))
        return torch.randn(shape[-1], generator=generator, device=device).to(kind)

    def sometimes(make: Any) -> Any:
        return make() if draw(st.booleans()) else None

    activations = [name for name in ("x", "residual", "gate", "up") if name in wanted]
    made: dict[str, Any] = {name: draw(values(shape, dtype, device)) for name in activations}
    if "approximate" in wanted and "scheme" in wanted:
        # Further down no code is certain, as the reference's own digits are not: `check` looks there unquantised.
        made[next(iter(made))].clamp_(min=-2.5)
    if "up" in wanted and draw(st.booleans()):
        packed = torch.stack([made["gate"], made["up"]], -1).flatten(-2)
        made |= {"gate": packed[..., ::2], "up": packed[..., 1::2]}
    if "approximate" in wanted:
        made["approximate"] = draw(st.sampled_from(["none", "tanh"]))
    if "limit" in wanted:
        made |= {"alpha": draw(st.sampled_from([1.702, 1.0])), "limit": draw(st.sampled_from([7.0, 0.5]))}
    weight_dtype = draw(st.sampled_from([dtype, dtype, *DTYPES]))
    if "weight" in wanted:
        made["weight"] = draw(st.sampled_from([vector, vector, lambda kind: None]))(weight_dtype)
    if "eps" in wanted:
        made["eps"] = draw(st.sampled_from([1e-6, 1e-5, 1e-12, 0.1]))
    if "rounding" in wanted:
        offered = [BEFORE, AFTER, *([] if "gate" in wanted else [LAST])]
        made["rounding"] = draw(st.sampled_from(offered[1:] if "bias" in wanted else offered))
    if "weight_offset" in wanted and "rounding" in wanted:
        made["weight_offset"] = draw(st.sampled_from([0.0, 1.0])) if made["rounding"] != BEFORE else 0.0
    if "gating" in wanted:
        made["gate"] = made["gate"].to(draw(st.sampled_from([dtype, *DTYPES])))
        made["gating"] = draw(st.sampled_from(["before", "after"]))
        made["activation"] = draw(st.sampled_from(["silu", "sigmoid"]))
        powers = [2**i for i in range(15) if shape[-1] % 2**i == 0]
        made["group_size"] = draw(st.sampled_from([None, shape[-1], *powers]))
    if "bias" in wanted:
        made |= {"bias": sometimes(lambda: vector(weight_dtype)), "weight_offset": draw(st.sampled_from([0.0, 1.0]))}
        made["moments"] = draw(st.sampled_from(["var_mean", "by_hand"]))
    if "mod_scale" in wanted and draw(st.booleans()):
        ahead = (shape[0], *(1 for _ in shape[1:-1])) if len(shape) > 2 else ()
        made |= {name: torch.ones((*ahead, 1), device=device) * vector(dtype) for name in ("mod_scale", "mod_shift")}
        made |= {name: made[name].to(dtype) for name in ("mod_scale", "mod_shift")}
    if "second" in wanted:
        made["alpha"] = draw(st.sampled_from([1.0, 1.0, 0.22]))
        made["second"] = sometimes(lambda: draw(values(shape, dtype, device)))
    if "bias" in wanted:
        most = min(1e15, torch.finfo(dtype).max)
        for name in ("x", "residual", "second"):
            if made.get(name) is not None:
                made[name].clamp_(-most, most)  # torch's own LayerNorm overflows where the square of a value does
    if "inner_weight" in wanted:
        made["inner_weight"] = sometimes(lambda: vector(dtype))
    if "scheme" in wanted:
        step = draw(st.sampled_from([0.01, 1.0, 7.3, 2.0**-9]))
        scale_shape = draw(st.sampled_from([(), (1,), (1, 1)]))
        scale_dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
        scale = torch.full(scale_shape, step, dtype=scale_dtype, device=device)
        made["scale"] = scale if kind.takes_scale else None
        made["scheme"] = scheme
        if kind.static and MORE[0] in wanted:
            made |= {name: scale * (i + 2) for i, name in enumerate(MORE[: draw(st.integers(0, 4))])}
    for option in op.options.values():
        made[option] = draw(st.booleans())
    return op.bind((), made)
