"""The ops' plain PyTorch bodies: against float64, against the spellings of models bit for bit, and as operators."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionpass.errors import ArgumentError, ScaleError, SchemeError
from fusionpass.ops import add_rms_norm, add_rms_norm_quantize, quantize, rms_norm, rms_norm_quantize

F32, F16, BF16, E4M3 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn
DTYPES = (F32, F16, BF16)
OPS = (rms_norm, add_rms_norm, quantize, rms_norm_quantize, add_rms_norm_quantize)
DIVIDE = "fp8_static,rounding=divide"


def _rows(shape, dtype, seed, pad=0, spread=1.0):
    """Normal values in rows that are `pad` elements further apart than they are wide."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn((*shape[:-1], shape[-1] + pad), generator=generator) * spread
    return wide.to(dtype)[..., : shape[-1]]


def _llama_norm(x, weight, eps):
    """LlamaRMSNorm.forward as transformers writes it."""
    input_dtype = x.dtype
    hidden_states = x.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + eps)
    return weight * hidden_states.to(input_dtype)


def _codes(x, scale, divide):
    """The e4m3fn value nearest to x / scale, ties to the even code, from the format's own definition."""
    table = [math.ldexp(8 * (e > 0) + m, max(e, 1) - 10) for e in range(16) for m in range(8)][:-1]
    values = np.array(table)
    assert values[-1] == 448
    x32, s32 = x.double().numpy().astype(np.float32), np.float32(scale)
    scaled = x32 / s32 if divide else x32 * (np.float32(1) / s32)
    magnitude = np.minimum(np.abs(scaled.astype(np.float64)), 448)
    above = np.clip(np.searchsorted(values, magnitude), 1, len(values) - 1)
    up, down = values[above] - magnitude, magnitude - values[above - 1]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, above - 1)
    return torch.from_numpy(np.copysign(values[code], scaled))


shapes = st.tuples(st.sampled_from([(), (3,), (2, 4)]), st.integers(1, 70)).map(lambda s: (*s[0], s[1]))


@settings(max_examples=80)
@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from(DTYPES),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
    pad=st.sampled_from([0, 1, 8]),
    spread=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_norm_is_near_float64(shape, dtype, weight_dtype, eps, pad, spread, seed):
    x, weight = _rows(shape, dtype, seed, pad, spread), _rows(shape[-1:], weight_dtype, seed + 1)
    norm = rms_norm(x, weight, eps)
    assert norm.dtype == torch.promote_types(dtype, weight_dtype)
    assert norm.shape == shape
    wide = x.double()
    exact = wide / ((wide**2).sum(-1, keepdim=True) / shape[-1] + eps).sqrt() * weight.double()
    # One rounding to x's dtype, one to the result's, and float32 arithmetic in front of them.
    share = (torch.finfo(dtype).eps + torch.finfo(norm.dtype).eps) / 2 + 16 * torch.finfo(F32).eps
    floor = weight.double().abs() * torch.finfo(dtype).smallest_normal + torch.finfo(norm.dtype).smallest_normal
    assert ((norm.double() - exact).abs() <= 1.01 * share * exact.abs() + floor * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_llamas_bit_for_bit(dtype, weight_dtype):
    x, weight = _rows((5, 7, 129), dtype, 0), _rows((129,), weight_dtype, 1)
    assert torch.equal(rms_norm(x, weight, 1e-5), _llama_norm(x, weight, 1e-5))


def test_norm_rounds_before_the_weight():
    x, weight = _rows((64, 128), BF16, 0), _rows((128,), BF16, 1)
    wide = x.float()
    gemma = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.float()).to(BF16)
    different = (rms_norm(x, weight) != gemma).float().mean()
    assert 0.05 < different < 0.5, "one rounding less is another norm"


@settings(max_examples=80)
@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.01, 0.0085, 1.0, 7.3, 2.0**-9]),
    scheme=st.sampled_from(["fp8_static", DIVIDE]),
    pad=st.sampled_from([0, 1, 8]),
    spread=st.sampled_from([1e-4, 1.0, 300.0]),
    seed=st.integers(0, 2**31),
)
def test_codes_are_the_nearest(shape, dtype, scale, scheme, pad, spread, seed):
    x = _rows(shape, dtype, seed, pad, spread)
    codes = quantize(x, torch.tensor(scale), scheme)
    assert codes.dtype == E4M3
    assert torch.equal(codes.double(), _codes(x, scale, divide=scheme == DIVIDE))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_comes_back(dtype):
    values = torch.arange(256, dtype=torch.uint8).view(E4M3)
    values = values[~values.float().isnan()].to(dtype)
    assert torch.equal(quantize(values, torch.ones(())).view(torch.uint8), values.to(E4M3).view(torch.uint8))


def test_a_tie_goes_to_the_even_code():
    # Between 16 (even) and 18 (odd), and between 18 and 20.
    assert quantize(torch.tensor([17.0, 19.0, -17.0]), torch.ones(())).float().tolist() == [16, 20, -16]


def _bits(codes):
    return codes.view(torch.uint8)


@pytest.mark.parametrize("scheme", ["fp8_static", DIVIDE])
def test_a_scale_is_one_number_whatever_its_shape_and_dtype(scheme):
    x, scale = _rows((64, 33), BF16, 0), torch.tensor(0.0123, dtype=BF16)
    expected = _bits(quantize(x, scale.float(), scheme))
    for shape in ((), (1,), (1, 1)):
        for dtype in (F32, BF16):
            assert torch.equal(_bits(quantize(x, scale.reshape(shape).to(dtype), scheme)), expected)


def test_the_product_is_in_float32_where_pytorch_would_keep_bfloat16():
    x, scale = _rows((64, 128), BF16, 0), torch.tensor(0.0123)
    # A 0-dim float32 does not widen a bfloat16 tensor, one of shape (1,) does: the same codes need explicit float32.
    narrow, wide = ((x * s.reciprocal()).clamp(-448, 448).to(E4M3) for s in (scale, scale.reshape(1)))
    assert torch.equal(_bits(quantize(x, scale)), _bits(wide))
    assert (_bits(narrow) != _bits(wide)).any()


def test_divide_and_reciprocal_differ():
    # 17 lies between two codes: a product that is one ulp above goes up to 18, the exact quotient down to 16.
    scales = torch.arange(1, 1000) / 1000
    by_division = [quantize(17 * s, s, DIVIDE).item() for s in scales]
    by_reciprocal = [quantize(17 * s, s).item() for s in scales]
    assert set(by_reciprocal) == {16.0, 18.0}
    assert by_division.count(18.0) < by_reciprocal.count(18.0)


@pytest.mark.parametrize("scheme", ["fp8_static", DIVIDE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_saturate_and_nan_stays(dtype, scheme):
    largest = torch.finfo(dtype).max
    x = torch.tensor([math.inf, -math.inf, math.nan, largest, -largest, 0.0, -0.0], dtype=dtype)
    codes = quantize(x, torch.tensor(0.5), scheme).float()
    assert codes[[0, 1, 3, 4]].tolist() == [448, -448, 448, -448]
    assert codes[2].isnan()
    assert codes[5:].tolist() == [0, 0]


def test_fnuz_codes_saturate_at_240():
    x = torch.tensor([1e9, -math.inf, 101.0])
    codes = quantize(x, torch.ones(()), "fp8_static,dtype=float8_e4m3fnuz")
    assert codes.dtype == torch.float8_e4m3fnuz
    assert codes.float().tolist() == [240, -240, 104]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_zeros_stays_zero(dtype):
    x = _rows((3, 16), dtype, 0)
    x[1] = 0
    q, norm, total = add_rms_norm_quantize(
        x, torch.zeros_like(x), torch.ones(16, dtype=dtype), scale=torch.ones(()), norm_out=True
    )
    for result in (q.float(), norm, total):
        assert (result[1] == 0).all()
        assert (result[0] != 0).any()


@settings(max_examples=40)
@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from(DTYPES),
    scheme=st.sampled_from(["fp8_static", DIVIDE]),
    norm_out=st.booleans(),
    residual_out=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_fused_op_is_its_parts(shape, dtype, weight_dtype, scheme, norm_out, residual_out, seed):
    x, residual = _rows(shape, dtype, seed), _rows(shape, dtype, seed + 1, pad=3, spread=4.0)
    weight, scale, eps = _rows(shape[-1:], weight_dtype, seed + 2), torch.tensor(0.011), 1e-5
    total = x + residual
    norm = rms_norm(total, weight, eps)
    q = quantize(norm, scale, scheme)

    def same(found, expected):
        found = found if isinstance(found, list) else [found]
        assert [r.dtype for r in found] == [e.dtype for e in expected]
        assert all(torch.equal(r.float(), e.float()) for r, e in zip(found, expected, strict=True))

    sums = [total] if residual_out else []
    same(add_rms_norm(x, residual, weight, eps, residual_out=residual_out), [norm, *sums])
    quantised = {"scale": scale, "scheme": scheme, "norm_out": norm_out}
    same(rms_norm_quantize(total, weight, eps, **quantised), [q, *([norm] if norm_out else [])])
    same(
        add_rms_norm_quantize(x, residual, weight, eps, residual_out=residual_out, **quantised),
        [q, *([norm] if norm_out else []), *sums],
    )


@pytest.mark.parametrize("op", OPS, ids=str)
def test_outputs_are_named(op):
    expected = {
        "fusionpass.rms_norm": ("norm",),
        "fusionpass.add_rms_norm": ("norm", "residual"),
        "fusionpass.quantize": ("q",),
        "fusionpass.rms_norm_quantize": ("q",),
        "fusionpass.add_rms_norm_quantize": ("q", "residual"),
    }
    arguments = op.bind((), op.sample(4, 9, BF16, "cpu", torch.Generator()))
    assert op.outputs(arguments) == expected[str(op)]
    every = {**arguments, **dict.fromkeys(op.options.values(), True)}
    none = {**arguments, **dict.fromkeys(op.options.values(), False)}
    assert set(op.outputs(every)) == {*expected[str(op)], *op.options}
    assert len(op.outputs(none)) == len(op.outputs(every)) - len(op.options)
    for chosen in (every, none):
        results = op.reference(**chosen)
        assert len(op.outputs(chosen)) == (1 if op.single else len(results))


X, W, S = torch.ones(2, 8), torch.ones(8), torch.ones(())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rms_norm(X, torch.ones(7)), ArgumentError, r"rms_norm: weight has shape \(7,\), x has width 8"),
        (lambda: rms_norm(X, torch.ones(1, 8)), ArgumentError, r"weight has shape \(1, 8\)"),
        (lambda: rms_norm(X.int(), W), ArgumentError, r"dtypes torch.int32 and torch.float32.*floating point"),
        (lambda: rms_norm(X[0, 0], W), ArgumentError, "x has no dimensions"),
        (lambda: add_rms_norm(X, X[:1], W), ArgumentError, r"x is \(2, 8\).*residual is \(1, 8\).*must be alike"),
        (lambda: add_rms_norm(X, X.half(), W), ArgumentError, r"residual is \(2, 8\) torch.float16"),
        (lambda: rms_norm_quantize(X, torch.ones(7), scale=S), ArgumentError, r"weight has shape \(7,\)"),
        (lambda: quantize(X.int(), S), ArgumentError, "quantize: x has dtype torch.int32"),
        (lambda: quantize(X), ScaleError, "the scheme 'fp8_static' needs a scale. Pass scale"),
        (lambda: quantize(X, torch.ones(2)), ScaleError, r"takes one scale, not \(2,\)"),
        (lambda: quantize(X, torch.ones(0)), ScaleError, r"takes one scale, not \(0,\)"),
        (lambda: quantize(X, S, "fp8_statik"), SchemeError, "'fp8_statik' is not.*Did you mean 'fp8_static'"),
        (lambda: add_rms_norm_quantize(X, X, W), ScaleError, "needs a scale"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
