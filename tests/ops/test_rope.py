"""Rotations and their kernel's plans: what the ops refuse, what the kernel does, and the layouts that it keeps."""

import re
from typing import Any

import pytest
import torch

from fusionpass.aot import compile_launch
from fusionpass.arch import Arch
from fusionpass.errors import ArgumentError
from fusionpass.launch import Launch
from fusionpass.ops import (
    cache_write,
    norm_heads,
    norm_rope,
    qk_norm,
    qk_norm_rope,
    qk_norm_rope_cache,
    qk_rope,
    qk_rope_cache,
    quantize,
    rms_norm,
    rope,
)
from fusionpass.ops.norm import AFTER
from tests.heads import HEAD_OPS

pytest.importorskip("triton")
H100 = Arch("sm_90")
F32, F16 = torch.float32, torch.float16


def arguments(op: Any, tokens: int = 3, width: int = 256, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    return dict(op.bind((), op.sample(tokens, width, dtype, "cpu", torch.Generator())))


def reason(op: Any, **changes: Any) -> str:
    launch, why = op.plan(H100, arguments(op) | changes)
    assert launch is None, "there is a launch"
    return str(why)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, with every second column of memory."""
    return torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]


BASE = arguments(rope)
ONE, CODES = torch.tensor(1.0), torch.zeros(1, 1, 11, 128).to(torch.float8_e4m3fn)
X, COS, SIN = BASE["x"], BASE["cos"], BASE["sin"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, F16, F32], ids=str)
def test_against_complex_numbers(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    angle = torch.rand(5, 4, dtype=torch.float64)
    turned = torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angle), angle)
    )
    cos, sin = angle.cos(), angle.sin()
    assert torch.allclose(rope.reference(x, cos, sin, "interleaved", True), turned.flatten(-2))
    halves = turned.transpose(-1, -2).flatten(-2)
    assert torch.allclose(rope.reference(x, cos, sin, "deinterleaved", True), halves)
    apart = x.unflatten(-1, (4, 2)).transpose(-1, -2).flatten(-2)
    assert torch.allclose(rope.reference(apart, cos, sin, "half", True), halves)
    twice = [torch.cat([t, t], -1) for t in (cos, sin)]
    assert torch.allclose(rope.reference(apart, *twice), halves)
    rounded = rope.reference(apart.to(dtype), *(t.to(dtype) for t in twice), rounding="last")
    assert rounded.dtype == dtype
    assert torch.allclose(rounded.double(), halves, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"style": "spiral"}, "style='spiral' does not exist"),
        ({"rounding": "never"}, "rounding='never' does not exist"),
        ({"x": X.long()}, "must be floating point"),
        ({"cos": COS.float()}, "They must be alike"),
        ({"cos": COS[..., :64]}, "cos has 64 columns, sin 128"),
        ({"cos": COS[..., :63], "sin": SIN[..., :63]}, "must be even"),
        ({"paired": True}, "no more than x has"),
        ({"cos": COS[..., :2, :], "sin": SIN[..., :2, :]}, "must broadcast"),
        ({"cos": COS[None], "sin": SIN[None]}, "must broadcast"),
        ({"sin": SIN[None]}, r"sin is .* must broadcast"),
    ],
)
def test_what_a_rotation_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        rope(**{**BASE, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(1, 2, 3, 128)}, "float32"),
        ({"x": torch.zeros(2, 3, 128, dtype=torch.bfloat16)}, r"x is \(2, 3, 128\)"),
        ({"dim": 4}, "cache_write"),
        ({"positions": torch.zeros(3, 1, dtype=torch.int64)}, "positions"),
        ({"dim": 1}, "positions"),
    ],
)
def test_what_a_cache_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        cache_write(**{**arguments(cache_write), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": ONE}, r"x is .* torch.float8_e4m3fn.*The cache is .* torch.bfloat16"),
        ({"scale": ONE, "cache": CODES, "code_scheme": "fp8_token"}, "'fp8_token' computes its scale"),
        ({"cache": CODES}, "The cache is .* torch.float8_e4m3fn"),
    ],
)
def test_codes_that_a_cache_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        cache_write(**{**arguments(cache_write), **changes})


@pytest.mark.parametrize("scheme", ["fp8_static", "fp8_static,rounding=divide"])
@pytest.mark.parametrize("op", [qk_rope_cache, qk_norm_rope_cache], ids=str)
def test_codes_are_those_of_the_results(op: Any, scheme: str) -> None:
    given, scales = arguments(op), {"q_scale": ONE / 33, "k_scale": ONE / 44, "v_scale": ONE / 55}
    caches = {name: torch.zeros_like(given[name]).to(CODES.dtype) for name in ("k_cache", "v_cache")}
    found = op(**{**given, **scales, **caches, "code_scheme": scheme, "k_out": True})
    q, k_cache, v_cache, k = op(**{**given, "k_out": True})
    expected = (q, k_cache[:, :, 3:6], v_cache[:, :, 3:6])
    made = (found[0], found[1][:, :, 3:6], found[2][:, :, 3:6])
    for codes, values, scale in zip(made, expected, scales.values(), strict=True):
        assert torch.equal(codes.float(), quantize(values, scale, scheme).float())
    assert torch.equal(found[3], k)


@pytest.mark.parametrize("name", ["sm_90", "sm_100", "sm_120", "gfx942", "gfx950"])
@pytest.mark.parametrize("op", [qk_rope_cache, qk_norm_rope_cache], ids=str)
def test_codes_compile(op: Any, name: str) -> None:
    dtype = torch.float8_e4m3fnuz if name == "gfx942" else CODES.dtype
    given = arguments(op, 64, 2048)
    caches = {cache: torch.zeros_like(given[cache]).to(dtype) for cache in ("k_cache", "v_cache")}
    scheme = f"fp8_static,dtype={str(dtype).removeprefix('torch.')}"
    scales = dict.fromkeys(("q_scale", "k_scale", "v_scale"), ONE)
    launch, why = op.plan(Arch(name), {**given, **caches, **scales, "code_scheme": scheme})
    assert launch is not None, why
    asm = compile_launch(launch, Arch(name))
    if name.startswith("sm"):
        assert "cvt.rn.satfinite.e4m3x2.f32" in asm["ptx"]
        assert "bar.sync" not in asm["ptx"]


@pytest.mark.parametrize("name", ["sm_90", "sm_100", "sm_120", "gfx942", "gfx950"])
@pytest.mark.parametrize(("heads", "width"), [(16, 64), (32, 128), (64, 128)])
def test_norms_of_whole_tokens_compile(heads: int, width: int, name: str) -> None:
    q, k = (torch.zeros(1, n, 64, width).bfloat16() for n in (heads, heads // 4))
    weights = {"q_weight": torch.ones(heads * width).bfloat16(), "k_weight": torch.ones(heads // 4 * width).bfloat16()}
    table = {n: torch.zeros(1, 1, 64, width).bfloat16() for n in ("cos", "sin")}
    launch, why = qk_norm_rope.plan(Arch(name), qk_norm_rope.bind((q, k), {**table, **weights, "heads_dim": 1}))
    assert launch is not None, why
    assert launch.grid == (64, 2), "a program has all heads of a token"
    asm = compile_launch(launch, Arch(name))
    if name.startswith("sm"):
        assert not re.search(r"(ld|st)\.local", asm["ptx"])


def test_norms_of_whole_tokens_are_rms_norms_of_rows() -> None:
    rows, weight = torch.randn(2, 5, 12).bfloat16(), torch.randn(12).bfloat16()
    expected = rms_norm(rows, weight, 1e-5).view(2, 5, 3, 4)
    assert torch.equal(norm_heads(rows.view(2, 5, 3, 4), 2, weight, 1e-5), expected)
    moved = norm_heads(rows.view(2, 5, 3, 4).transpose(1, 2), 1, weight, 1e-5)
    assert torch.equal(moved, expected.transpose(1, 2))
    assert moved.stride() == expected.transpose(1, 2).stride()
    table = {"cos": torch.rand(5, 4).bfloat16(), "sin": torch.rand(5, 4).bfloat16()}
    turned = norm_rope(rows.view(2, 5, 3, 4).transpose(1, 2), **table, weight=weight, eps=1e-5, heads_dim=1)
    assert torch.equal(turned, rope(moved, **table))


@pytest.mark.parametrize("dim", [-2, 0, 3])
def test_heads_are_the_last_dimension_but_one_or_two(dim: int) -> None:
    with pytest.raises(ArgumentError, match=f"heads_dim={dim} for x of"):
        norm_heads(torch.zeros(2, 5, 3, 4), dim)


def test_whole_tokens_that_the_kernel_refuses() -> None:
    q = torch.zeros(1, 128, 3, 256).bfloat16()
    table = {name: torch.zeros(1, 1, 3, 256).bfloat16() for name in ("cos", "sin")}
    launch, why = norm_rope.plan(H100, norm_rope.bind((q,), {**table, "heads_dim": 1}))
    assert (launch, why) == (None, "triton: 128 heads of 256 columns do not fit in registers (at most 16384 columns)")
    # One dimension is the heads for the norm, another one for the angles.
    launch, why = norm_rope.plan(H100, norm_rope.bind((q,), {**table, "heads_dim": 2}))
    assert launch is None
    assert "each head has its own angles" in why


def test_values_need_their_cache() -> None:
    with pytest.raises(ArgumentError, match="only one of v and v_cache"):
        qk_rope_cache(**{**arguments(qk_rope_cache), "v_cache": None})


@pytest.mark.parametrize("op", [qk_rope, qk_norm, qk_norm_rope], ids=str)
def test_a_pair_is_both(op: Any) -> None:
    given = arguments(op)
    single = {qk_rope: rope, qk_norm: rms_norm, qk_norm_rope: norm_rope}[op]
    for which, result in zip("qk", op(**given), strict=True):
        own = {"x": given[which]}
        if op is not qk_rope:
            own |= {"weight": given[f"{which}_weight"]}
        if op is not qk_norm:
            own |= {"cos": given["cos"], "sin": given["sin"]}
        assert torch.equal(result, single(**own))


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        (rope, {"x": X[0, 0], "cos": COS[0, 0], "sin": SIN[0, 0]}, "x has 2 dimensions"),
        (rope, {"cos": COS.expand(1, 2, 3, 128), "sin": SIN}, "each head has its own angles"),
        (rope, {"x": strided(X)}, "q has stride 2 in its last dimension"),
        (rope, {"cos": strided(COS)}, "cos has stride 2 in its last dimension"),
        (rope, {"x": X.double()}, "x is torch.float64"),
        (rope, {"sin": SIN.float()}, "cos and sin are"),
        (rope, {"cos": COS.to("meta"), "sin": SIN.to("meta")}, "on cpu or not"),
        (rope, {"cos": COS.half(), "sin": SIN.half()}, "steps are rounded to neither"),
        (rope, {"x": torch.zeros(1, 2, 3, 640).bfloat16()}, "heads of 640 columns"),
        (rope, {"cos": COS[..., :63], "sin": SIN[..., :63]}, "63 of them rotated"),
        (rope, {"cos": COS[..., :2], "sin": SIN[..., :2]}, "two rotated columns"),
        (rope, {"cos": torch.zeros(5, 1, 3, 128).bfloat16()}, r"cos is \(5, 1, 3, 128\) for x"),
        (qk_rope, {"k": arguments(qk_rope)["k"].float()}, "k is torch.float32"),
        (qk_norm, {"q_weight": torch.ones(128, dtype=torch.int64), "norm_rounding": AFTER}, "torch.int64 on cpu"),
        (qk_norm, {"k_weight": torch.ones(128, device="meta").bfloat16()}, "k_weight is torch.bfloat16 on meta"),
        (qk_norm, {"k_weight": torch.ones(256)[::2].bfloat16().repeat(2)[::2]}, "with strides"),
        (qk_norm, {"k_weight": torch.ones(128)}, "would have another dtype than x"),
        (norm_rope, {"cos": COS.float(), "sin": SIN.float(), "norm_first": False}, "which is wider"),
        (qk_rope_cache, {"cos": COS.float(), "sin": SIN.float()}, "the rotated keys are wider"),
        (qk_rope, {"q_scale": torch.ones(2)}, "the scale is not one element"),
        (qk_rope, {"q_scale": ONE, "code_scheme": "fp8_static,dtype=float8_e4m3fnuz"}, "does not convert to"),
        (qk_rope_cache, {"k_scale": ONE, "k_cache": CODES, "v_scale": ONE.to("meta")}, "the scale is torch.float32 on"),
        (qk_rope_cache, {"v_scale": ONE}, "v_cache is torch.bfloat16, not torch.float8_e4m3fn"),
        (qk_rope_cache, {"k_scale": ONE, "k_cache": CODES.to("meta")}, "k_cache is .* on meta, not cpu"),
        (qk_norm, {"q": X[..., :63], "k": X[..., :63], "q_weight": None, "k_weight": None}, "an even number"),
    ],
)
def test_what_the_kernel_refuses(op: Any, changes: dict[str, Any], message: str) -> None:
    assert re.search(message, reason(op, **changes)), reason(op, **changes)


@pytest.mark.parametrize("which", ["heads", "keys", "width", "rotated"])
def test_symbolic_sizes_that_the_kernel_refuses(which: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    given = arguments(qk_rope)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    name, dim = {"heads": ("q", 1), "keys": ("k", 1), "width": ("q", 3), "rotated": ("cos", 3)}[which]
    value = given[name].repeat(*(5 if i == dim and dim == 1 else 1 for i in range(4)))
    sizes = [DimDynamic.DYNAMIC if i == dim else DimDynamic.STATIC for i in range(4)]
    symbolic = mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(sizes))
    fakes = {k: mode.from_tensor(v, static_shapes=True) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    why = reason(qk_rope, **{**fakes, name: symbolic})
    assert ("symbolic" if dim == 1 else "columns") in why


@pytest.mark.parametrize("op", HEAD_OPS, ids=str)
def test_few_and_many_tokens(op: Any) -> None:
    for tokens in (1, 5, 9000):
        given = arguments(op, tokens, 1024)
        launch, why = op.plan(H100, given)
        assert isinstance(launch, Launch), why
        assert launch.grid[0] * launch.args["TOKENS"] >= tokens
        assert launch.mutates == tuple(name for name in ("k_cache", "v_cache") if name in given)


def test_a_cache_written_along_other_dimensions_than_the_tokens() -> None:
    given = arguments(qk_norm_rope_cache)
    assert "each head has its own angles" in reason(qk_norm_rope_cache, **{**given, "dim": 3})
