"""What the tests of attention share: arguments to draw, and the check against float64."""

import contextlib
import math
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusionpass.arch import Arch
from fusionpass.ops import attention, attention_quantize, quantize
from fusionpass.ops.attention import decode_triton
from fusionpass.ops.attention.decode import widened
from fusionpass.ops.quant import sample_scale
from fusionpass.ops.quant.scheme import Scheme
from fusionpass.testing import difference
from tests.kernels import _DividingAsCuda, alike_strides, poisoned

WIDTHS = (64, 64, 80, 96, 128, 192, 256, 8, 40)
GROUPS = (1, 2, 3, 4, 7, 8, 16)
SCHEMES = (
    "fp8_static", "fp8_static,rounding=divide", "fp8_token", "fp8_token,eps=0.0,rounding=divide,zero=one",
    "fp8_token,amax_dtype=input,rounding=divide", "int8_token", "fp8_group128", "int8_group128", "mxfp8", "nvfp4",
)  # fmt: skip
KINDS = ("none", "causal", "random", "lengths", "window", "hidden", "hidden rows", "added", "least", "full")


def _generator(draw: st.DrawFn, device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(draw(st.integers(0, 2**31)))


@dataclass(frozen=True)
class Family:
    """What a kernel is compiled for: one for many draws, since that takes a GPU's compiler its time."""

    dtype: torch.dtype
    width: int
    v_width: int
    group: int
    tokens: int
    pads: tuple[int, ...] = (0, 0, 8, 3)
    """Columns that a row of the cache may have more."""
    cache: torch.dtype | None = None
    """Of the codes that it holds; None: as the queries."""


@st.composite
def families(draw: st.DrawFn) -> Family:
    """Any of them."""
    group, width = draw(st.sampled_from(GROUPS)), draw(st.sampled_from(WIDTHS))
    tokens = draw(st.sampled_from([1, 1, 1, *range(1, min(5, 32 // group) + 1)]))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16]))
    cache = draw(st.sampled_from([None, None, torch.float8_e4m3fn]))
    return Family(dtype, width, draw(st.sampled_from([width, width, width, 64])), group, tokens, cache=cache)


@st.composite
def heads(
    draw: st.DrawFn,
    shape: tuple[int, ...],
    family: Family,
    device: str,
    spread: float,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Numbers of this shape in any memory order of the first three dimensions, a slice of a larger tensor at times."""
    order = draw(st.sampled_from([(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0)]))
    pads = [draw(st.sampled_from([0, 0, 1, 5])) for _ in order] + [draw(st.sampled_from(family.pads))]
    stored = [shape[axis] for axis in order] + [shape[3]]
    whole = [size + pad for size, pad in zip(stored, pads, strict=True)]
    made = torch.randn(whole, generator=_generator(draw, device), device=device) * spread
    start = draw(st.booleans())
    slices = tuple(slice(pad * start, size + pad * start) for size, pad in zip(stored, pads, strict=True))
    return made.to(dtype or family.dtype)[slices].permute(*(order.index(axis) for axis in range(3)), 3)


@st.composite
def masks(draw: st.DrawFn, kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """A mask of this kind that broadcasts to `shape`, [batch, heads, tokens, positions]."""
    batch, _, tokens, positions = shape
    generator = _generator(draw, device)
    some = [draw(st.sampled_from([1, size, size])) for size in shape]
    position = torch.arange(positions, device=device)
    token = torch.arange(tokens, device=device)[:, None] + draw(st.integers(0, positions))
    if kind == "lengths":
        lengths = torch.randint(0, positions + 1, (batch, 1, 1, 1), generator=generator, device=device)
        seen = position < lengths
    elif kind == "window":
        seen = ((position <= token) & (position > token - draw(st.integers(1, 40))))[None, None]
    elif kind == "hidden":
        seen = torch.zeros(some, dtype=torch.bool, device=device)
    elif kind == "full":
        seen = torch.ones(some, dtype=torch.bool, device=device)
    else:
        share = draw(st.sampled_from([0.02, 0.5, 0.98]))
        seen = torch.rand(some, generator=generator, device=device) < share
        if kind == "hidden rows":
            seen &= torch.rand((*some[:3], 1), generator=generator, device=device) < 0.5
    if kind in ("added", "least"):
        wide = draw(st.sampled_from([dtype, torch.float32]))
        bias = torch.randn(seen.shape, generator=generator, device=device) * 3
        hidden = -math.inf if kind == "added" else torch.finfo(wide).min
        seen = torch.where(seen, bias, hidden).to(wide)
    layout = draw(st.sampled_from(["dense", "dense", "expanded", "slice", "transposed", "fewer"]))
    if layout == "expanded":
        return seen.expand(shape)
    if layout == "slice":
        room = seen.new_zeros((*seen.shape[:3], seen.shape[3] + 7))
        room[..., 3:-4] = seen
        return room[..., 3:-4]
    if layout == "transposed":
        return seen.transpose(2, 3).contiguous().transpose(2, 3)
    return seen[0] if layout == "fewer" and seen.shape[0] == 1 else seen


@st.composite
def arguments_for_attention(draw: st.DrawFn, family: Family, device: str, most: int) -> dict[str, Any]:
    """Arguments of `attention` that the kernel takes, with up to `most` positions."""
    batch, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    positions = draw(st.one_of(st.integers(0, 9), st.integers(0, most), st.sampled_from([16, 64, 128])))
    spread = draw(st.sampled_from([0.1, 1.0, 1.0, 4.0]))
    shape = (batch, family.group * kv_heads, family.tokens, positions)
    made: dict[str, Any] = {
        "q": draw(heads((*shape[:3], family.width), family, device, spread)),
        "k": draw(heads((batch, kv_heads, positions, family.width), family, device, spread, family.cache)),
        "v": draw(heads((batch, kv_heads, positions, family.v_width), family, device, 1.0, family.cache)),
    }
    for name in ("k_scale", "v_scale") if family.cache else ():
        if draw(st.booleans()):
            shape_of_scale = draw(st.sampled_from([(), (1,), (1, 1)]))
            made[name] = torch.full(shape_of_scale, draw(st.sampled_from([0.037, 1.3])), device=device)
    kind = draw(st.sampled_from(KINDS))
    if kind == "causal":
        made["causal"] = True
    elif kind != "none":
        made["mask"] = draw(masks(kind, shape, family.dtype, device))
    if draw(st.booleans()):
        made["scale"] = draw(st.sampled_from([1.0, 0.05]))
    return attention.bind((), made)


@st.composite
def cuts(draw: st.DrawFn) -> decode_triton.Cut | None:
    """Another cut than the plan's, so that few positions make many parts; None: the plan's own."""
    if draw(st.booleans()):
        return None
    return decode_triton.Cut(draw(st.sampled_from([16, 32, 64])), draw(st.integers(1, 9)), 4)


def visible(arguments: dict[str, Any]) -> torch.Tensor:
    """[batch, heads, tokens, positions]: what each row may see."""
    q, k, mask = (arguments[name] for name in ("q", "k", "mask"))
    shape = (*q.shape[:3], k.shape[2])
    if mask is not None:
        seen: torch.Tensor = mask if mask.dtype == torch.bool else mask != -math.inf
        return seen.expand(shape)
    seen = torch.ones(shape, dtype=torch.bool, device=q.device)
    return seen.tril() if arguments["causal"] else seen


def oracle(arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """What `attention` gives in float64, and how far a result may be from it that rounds as the kernel does.

    The weights are rounded to the dtype of the values, the result to its own: half a step each, relative. A score is a
    sum in float32 of which a GPU's matrix units keep two bits fewer, and a weight is off by its exponential.
    """
    q, k, v = (plain(arguments)[name].double() for name in ("q", "k", "v"))
    mask, seen = arguments["mask"], visible(arguments)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = arguments["scale"] or 1 / math.sqrt(q.shape[-1])
    score, size = q @ k.mT * scale, q.abs() @ k.abs().mT * scale
    if mask is not None and mask.dtype != torch.bool:
        # A float32 sum: beside the least finite number a score vanishes.
        score = (score.float() + mask.float()).double()
    score = score.masked_fill(~seen, -math.inf)
    weight = torch.softmax(score, -1).nan_to_num(0.0)
    size = (size + score.abs()).masked_fill(~seen | (score.abs() > 1e30), 0.0)
    eps, fp32 = torch.finfo(arguments["q"].dtype).eps, 2.0**-22
    most = size.amax(-1, keepdim=True) if k.shape[2] else size.new_zeros(*size.shape[:3], 1)
    rounded = eps / 2 + torch.expm1(2 * (q.shape[-1] + 8) * fp32 * most) + (k.shape[2] + 8) * fp32
    # Weights and results below the least normal number are rounded to its steps.
    least = torch.finfo(arguments["q"].dtype).smallest_normal * eps
    result = weight @ v
    return result, eps / 2 * result.abs() + rounded * (weight @ v.abs()) + least * (1 + v.abs().sum(2, keepdim=True))


def plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same over a cache in the dtype of the queries, which rounds as the codes' product with their scale is."""
    made = {name: widened(arguments[name], arguments[f"{name}_scale"], arguments["q"].dtype) for name in ("k", "v")}
    return {**arguments, **made, "k_scale": None, "v_scale": None}


def unreadable(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same, with NaN in the keys and values that no row may see."""
    k = arguments["k"]
    read = visible(arguments).unflatten(1, (k.shape[1], -1)).any(2).any(2)[..., None]
    made = {}
    for name in ("k", "v"):
        t = arguments[name]
        made[name] = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
        made[name].copy_(t.float().masked_fill(~read, math.nan))
    return {**arguments, **made}


def check_attention(arch: Arch, arguments: dict[str, Any], cut: decode_triton.Cut | None = None) -> torch.Tensor:
    """Run the kernel: within its own roundings of float64, the op's tolerance of the reference, with its strides."""
    other = mock.patch.object(decode_triton, "configure", return_value=cut) if cut else contextlib.nullcontext()
    with other:
        launch, reason = attention.plan(arch, unreadable(arguments))
    assert launch is not None, reason
    with poisoned():
        (output,) = launch.run()
    exact, allowed = oracle(arguments)
    apart = (output.double() - exact).abs()
    assert (apart <= allowed).all(), f"{(apart - allowed).max()} too far"
    assert (output[~visible(arguments).any(-1)] == 0).all()
    # Of PyTorch 2.11's kernels on a GPU one faults where a mask is broadcast over the positions, on a float32 mask for
    # half a query and on rows that are not whole 16 bytes apart.
    with sdpa_kernel(SDPBackend.MATH):
        expected = attention.reference(**arguments)
    assert alike_strides(output, expected), f"strides {output.stride()}, not {expected.stride()}"
    # What PyTorch gives where nothing is seen is not for this to say.
    expected = torch.where(visible(arguments).any(-1, keepdim=True), expected, 0)
    found = difference(output, expected, attention.tolerance["attended"])
    assert found.within(attention.tolerance["attended"]), str(found)
    return output


@st.composite
def schemes(draw: st.DrawFn, v_width: int) -> str:
    """One by which the kernels can quantise heads of so many columns."""
    return draw(st.sampled_from([one for one in SCHEMES if v_width % (Scheme.parse(one).group or 1) == 0]))


def check_attention_quantize(
    arch: Arch, arguments: dict[str, Any], scheme: str, attended_out: bool, cut: decode_triton.Cut | None = None
) -> list[torch.Tensor]:
    """Run the kernel: the codes and scales are, bit for bit, those of what attention's kernel gives with this cut."""
    other = mock.patch.object(decode_triton, "configure", return_value=cut) if cut else contextlib.nullcontext()
    given = unreadable(arguments)
    scale = sample_scale(scheme, arguments["q"].device)
    own = {"softmax_scale" if k == "scale" else k: v for k, v in given.items() if k != "joined"}
    asked = attention_quantize.bind((), {**own, "scale": scale, "scheme": scheme, "attended_out": attended_out})
    with other:
        alone, _ = attention.plan(arch, {**given, "joined": True})
        launch, reason = attention_quantize.plan(arch, asked)
    assert alone is not None
    (attended,) = alone.run()
    if launch is None:
        assert reason == "triton: its positions are not split: a program has some of the heads that have one scale"
        assert len(alone.all) == 1
        return []
    with poisoned():
        outputs = launch.run()
    with _DividingAsCuda():
        expected = [*quantize.reference(attended, scale, scheme), *([attended] if attended_out else [])]
    names = attention_quantize.outputs(asked)
    for name, output, want in zip(names, outputs, expected, strict=True):
        assert alike_strides(output, want), f"{name}: strides {output.stride()}, not {want.stride()}"
        same = output.view(torch.uint8) == want.view(torch.uint8)
        assert same.all(), f"{name}: {(~same).sum()} of {same.numel()} bytes differ"
    return outputs
