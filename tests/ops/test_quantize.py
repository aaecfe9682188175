"""Every scheme against its own definition, against float64, and against the libraries that spell it."""

import math

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fusionpass.errors import ArgumentError, ScaleError
from fusionpass.ops import quantize
from fusionpass.ops.quant import Scheme, dequantize, quantized, quantized_outputs, sample_scale
from fusionpass.ops.quant.arithmetic import biased_exponent
from fusionpass.ops.quant.layout import column_major_stride
from fusionpass.ops.quant.scheme import SCHEMES
from tests.schemes import combinations, expected, table, written

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
E2M1 = np.concatenate([table("e2m1"), -table("e2m1")])
TORCHAO_INT8 = "int8_token,amax_dtype=input,eps=1.1920928955078125e-07,divisor=127.5"


def rows_of(dtype, shape=(7, 256), seed=0):
    """Normal rows of many magnitudes; then zeros, an infinity, a NaN, a tiny row, ties, and a zero group."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 2.0 ** torch.arange(-3, shape[0] - 3).view(
        -1, *[1] * (len(shape) - 1)
    )
    odd = torch.randn(6, shape[1], generator=generator)
    odd[0] = 0
    odd[1, 3] = -math.inf
    odd[2, 5] = math.nan
    odd[3] *= 1e-37 if dtype != torch.float16 else 1e-7
    odd[4] = torch.arange(shape[1]) % 65 / 8 - 2
    odd[5, :128] = 0
    return torch.cat([x, odd]).to(dtype)


def given_scale(name):
    return sample_scale(name, "cpu")


def values_of(kind, q):
    """Codes as numbers, by the definition of their format."""
    if kind.packed:
        pairs = np.stack([q.numpy() & 15, q.numpy() >> 4], -1)
        return E2M1[pairs.reshape(*q.shape[:-1], -1)]
    return q.double().numpy()


def by_group(kind, x):
    """[groups, n]: rows of elements that share a scale."""
    width = x.shape[-1] if kind.group is None else kind.group
    return x.reshape(-1, width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in SCHEMES if "block128" not in name])
def test_codes_and_scales_are_the_definitions(name, dtype):
    x = rows_of(dtype)
    given = given_scale(name)
    for choice in combinations(name):
        text = written(name, choice)
        kind = Scheme.parse(text)
        results = quantize.reference(x, given, text)
        narrow = str(dtype).removeprefix("torch.")
        number = None if given is None else given.item()
        q, scales, _ = expected(by_group(kind, x.float()).numpy(), narrow, name, choice, number)
        np.testing.assert_array_equal(values_of(kind, results[0]).reshape(q.shape), q, err_msg=text)
        if scales is not None and choice.get("layout") != "swizzled":
            np.testing.assert_array_equal(results[1].double().numpy().reshape(scales.shape), scales, err_msg=text)
        assert len(results) == len(quantized_outputs({"scheme": text}))


@pytest.mark.parametrize("number", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_a_matrix(dtype, number):
    x = torch.cat([rows_of(dtype, (200, 300)), rows_of(dtype, (100, 300), seed=1)])[:300]
    for choice in combinations(f"{number}_block128"):
        text = written(f"{number}_block128", choice)
        q, scale = quantize.reference(x, None, text)
        assert scale.shape == (3, 3)
        for i in range(3):
            for j in range(3):
                block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
                flat = x[block].float().reshape(1, -1).numpy()
                codes, step, _ = expected(flat, str(dtype).removeprefix("torch."), f"{number}_token", choice, None)
                np.testing.assert_array_equal(q[block].double().numpy().reshape(codes.shape), codes, err_msg=text)
                np.testing.assert_array_equal(scale[i, j].double().numpy(), step[0, 0], err_msg=text)
        spread = torch.kron(scale, torch.ones(128, 128))[:300, :300]
        assert torch.equal(dequantize(q, scale, text).nan_to_num(-1), (q.float() * spread).nan_to_num(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_the_error_is_at_most_half_a_step(name, dtype):
    """In float64. "floor" and a given scale saturate; everything else holds the largest magnitude."""
    x = torch.randn(9, 384, generator=torch.Generator().manual_seed(3)).mul(5).to(dtype)
    given = torch.tensor(x.abs().max().item() / 2688) if name == "nvfp4" else given_scale(name)
    for choice in combinations(name):
        if choice.get("eps") == "0.001" or choice.get("layout") == "swizzled":
            continue
        text = written(name, choice)
        kind = Scheme.parse(text)
        results = quantize.reference(x, given, text)
        scale = results[1] if kind.returns_scale else given
        back = dequantize(results[0], scale, text, given if kind.returns_scale else None).double()
        one = torch.full(results[0].shape, 0x22 if kind.packed else 1.0).to(results[0].dtype)
        step = dequantize(one, scale, text, given if kind.returns_scale else None).double()
        wanted = x.double() / step
        # Saturation: a scale rounded down (to bfloat16, to e4m3, to a power of two) leaves the largest just outside.
        wanted = wanted.clamp(kind.min, kind.max)
        if kind.dtype == torch.int8:
            spacing = torch.ones_like(wanted)
        else:
            bits, least = (1, 0) if kind.packed else (3, -6 if kind.dtype == torch.float8_e4m3fn else -7)
            spacing = 2.0 ** (wanted.abs().log2().floor().clamp(min=least) - bits)
        error = (back / step - wanted).abs()
        assert (error <= spacing * (0.5 + 1e-5)).all(), (text, (error / spacing).max())


@pytest.mark.parametrize("lead", [(), (1,), (3,), (4,), (5,), (2, 3), (0,), (2, 1, 5)])
@pytest.mark.parametrize(("text", "unit"), [("fp8_group128", 4), ("fp8_group128,scale_dtype=float8_e8m0fnu", 16)])
def test_column_major_scales(lead, text, unit):
    x = torch.randn(*lead, 384)
    q, linear = quantize.reference(x, None, text)
    codes, scale = quantize.reference(x, None, text + ",layout=column_major")
    assert torch.equal(q.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(scale, linear)
    rows = math.prod(lead)
    stride = column_major_stride(tuple(scale.shape), scale.element_size())
    assert stride[-1] == max(1, -(-rows // unit) * unit)
    if rows:
        assert all(n == 1 or a == b for n, a, b in zip(scale.shape, scale.stride(), stride, strict=True))
        assert scale.untyped_storage().nbytes() >= scale.stride(-1) * 3 * scale.element_size()


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
@pytest.mark.parametrize(("lead", "groups"), [((1,), 4), ((128,), 4), ((130,), 6), ((2, 77), 9), ((31,), 1)])
def test_swizzled_scales_lie_where_cublas_looks(name, lead, groups):
    kind = Scheme.parse(name)
    x = torch.randn(*lead, groups * kind.group) * torch.logspace(-3, 3, groups * kind.group)
    given = given_scale(name)
    q, linear = quantize.reference(x, given, name)
    codes, scale = quantize.reference(x, given, name + ",layout=swizzled")
    assert torch.equal(q.view(torch.uint8), codes.view(torch.uint8))
    rows = math.prod(lead)
    assert scale.shape == (-(-rows // 128) * 128, -(-groups // 4) * 4)
    assert scale.is_contiguous()
    flat, want = scale.view(torch.uint8).flatten(), torch.zeros(scale.numel(), dtype=torch.uint8)
    for row in range(rows):
        for group in range(groups):
            tile = row // 128 * -(-groups // 4) + group // 4
            inside = row % 32 * 16 + row % 128 // 32 * 4 + group % 4
            want[tile * 512 + inside] = linear.view(torch.uint8).reshape(rows, groups)[row, group]
    assert torch.equal(flat, want)
    both = [dequantize(a, b, t, given) for a, b, t in ((q, linear, name), (codes, scale, name + ",layout=swizzled"))]
    assert torch.equal(*both)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("text", "kind_of_row", "scale", "codes"),
    [
        ("fp8_token", "zero", 1e-12, (0.0, 0.0)),
        ("fp8_token", "inf", INF, (NAN, 0.0)),
        ("fp8_token", "nan", NAN, (NAN, NAN)),
        ("fp8_token,eps=0.0", "zero", 0.0, (NAN, NAN)),
        ("fp8_token,eps=0.0,zero=one,rounding=divide", "zero", 1 / 448, (0.0, 0.0)),
        ("fp8_token,eps=0.0,zero=one,rounding=divide", "nan", 1 / 448, (NAN, 448.0)),
        ("fp8_group128", "zero", 1e-12, (0.0, 0.0)),
        ("fp8_group128,scale_rounding=ceil", "inf", INF, (NAN, 0.0)),
        ("fp8_group128,scale_rounding=ceil", "nan", NAN, (NAN, NAN)),
        ("fp8_group128,scale_rounding=ceil,eps=0.0", "zero", 2.0**-126, (0.0, 0.0)),
        ("fp8_group128,scale_dtype=float8_e8m0fnu", "zero", 127 - 39, (0.0, 0.0)),
        ("mxfp8", "zero", 0, (0.0, 0.0)),
        ("mxfp8", "inf", 254, (448.0, 0.0)),
        ("mxfp8", "nan", 255, (NAN, NAN)),
        ("nvfp4", "zero", 2.0**-6, (0.0, 0.0)),
        ("nvfp4", "inf", 448.0, (6.0, 1.5)),
        ("nvfp4", "nan", NAN, (6.0, 6.0)),
        ("int8_token", "zero", 1e-12, (0.0, 0.0)),
        ("int8_token", "inf", INF, (0.0, 0.0)),
        ("int8_token", "nan", NAN, (0.0, 0.0)),
        (TORCHAO_INT8, "zero", 2.0**-23, (0.0, 0.0)),
    ],
)
def test_special_values(text, kind_of_row, scale, codes):
    """Of the special element, and of a 1.0 beside it."""
    x = torch.zeros(2, 128)
    if kind_of_row != "zero":
        x[0, 0], x[0, 1] = float(kind_of_row), 1.0
    kind = Scheme.parse(text)
    # 1.0 is 1.5 steps of a block scale of 448.
    given = torch.tensor(1 / 448 / 1.5) if kind.takes_scale else None
    q, got = quantize.reference(x, given, text)
    want = torch.tensor(scale, dtype=torch.float64).float().double()
    assert torch.equal(got[0, 0].double().nan_to_num(-1), want.nan_to_num(-1))
    pair = torch.from_numpy(values_of(kind, q))[0, :2]
    assert torch.equal(pair.nan_to_num(-1), torch.tensor(codes, dtype=torch.float64).nan_to_num(-1))


def test_e2m1_rounds_to_even_and_keeps_the_sign():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    above, below = torch.nextafter(ties, torch.tensor(9.0)), torch.nextafter(ties, torch.tensor(0.0))
    x = torch.cat([ties, above, below, torch.tensor([6.0] * 8)])
    x = torch.stack([x, -x])
    # amax is 6 in both blocks but for the first: its scale is 1 too.
    q, scale = quantize.reference(torch.cat([x, x], 1)[:, :32], torch.tensor(1.0), "nvfp4")
    assert (scale.float() == 1).all()
    rounded = [0, 1, 1, 2, 2, 4, 4, 6, 0.5, 1, 1.5, 2, 3, 4, 6, 6, 0, 0.5, 1, 1.5, 2, 3, 4, 6, *[6] * 8]
    got = values_of(Scheme.parse("nvfp4"), q)
    np.testing.assert_array_equal(got[0], rounded)
    np.testing.assert_array_equal(got[1], -np.array(rounded))
    assert np.signbit(got[1]).all()


def test_a_logarithm_rounded_to_float32_takes_values_just_above_a_power_down_to_it():
    powers = torch.arange(-126, 127, dtype=torch.int32).repeat_interleave(81) + 127
    values = ((powers << 23) + torch.arange(-40, 41, dtype=torch.int32).repeat(253)).view(torch.float32)
    got = biased_exponent(values, "log2_ceil")
    assert torch.equal(got, (values.double().log2().float().ceil() + 127).clamp(0, 254).int())
    ceil = biased_exponent(values, "ceil")
    assert torch.equal(ceil, (values.double().log2().ceil() + 127).clamp(0, 254).int())
    assert (got != ceil).sum() > 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_the_libraries_quantise(dtype):
    """Bit for bit; imports only what is installed."""
    x = rows_of(dtype)
    finite = ~x.isnan().any(-1)

    def same(text, q, scale, given=None, where=slice(None)):
        ours = quantize.reference(x, given, text)
        for a, b in zip(ours, (q, scale), strict=True):
            a, b = (t.view(torch.uint8) if t.element_size() == 1 else t.view(torch.int32) for t in (a, b.contiguous()))
            assert torch.equal(a[where], b.reshape(a.shape)[where]), text

    torchao = pytest.importorskip("torchao.quantization.quant_primitives")
    scale = torchao._choose_scale_float8(x, [1, x.shape[-1]])
    # A zero row gives NaN, whose sign is anybody's.
    nonzero = finite & (x != 0).any(-1) & x.isfinite().all(-1)
    codes = torchao._quantize_affine_float8(x, scale)
    same("fp8_token,amax_dtype=input,eps=0.0,rounding=divide", codes, scale, where=nonzero)
    transformers = pytest.importorskip("transformers.integrations.compressed_tensors")
    same("fp8_token,eps=0.0,rounding=divide,zero=one", *transformers.quantize_fp8_per_row(x), where=nonzero)
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    for mode, text in (("RCEIL", "mxfp8,scale_rounding=log2_ceil"), ("FLOOR", "mxfp8,scale_rounding=floor")):
        scale, codes = mx.to_mx(x, torch.float8_e4m3fn, 32, mx.ScaleCalculationMode[mode])
        # Theirs divides by 2**-126 where the byte says 2**-127.
        tiny = (x.abs().amax(-1) < 2.0**-118) & (mode == "FLOOR")
        same(text, codes, scale, where=x.isfinite().all(-1) & ~tiny)
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    given = sample_scale("nvfp4", "cpu")
    scale, codes = nv.nvfp4_quantize(x, 16, given)
    same("nvfp4", codes, scale, given, where=finite)


@pytest.mark.parametrize("text", [*SCHEMES, "mxfp8,layout=swizzled", "fp8_group128,layout=column_major", TORCHAO_INT8])
def test_it_traces(text):
    """With a symbolic number of rows, under make_fx and Dynamo, to the same codes."""
    kind, given = Scheme.parse(text), given_scale(text)
    x = rows_of(torch.bfloat16)
    want = quantized(x, given, kind)

    def call(x, given):
        return quantized(x, given, kind)

    graph = make_fx(call, tracing_mode="symbolic")(torch.randn(5, 256).bfloat16(), given)
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for got in (graph(x, given), compiled(x, given)):
        for a, b in zip(got, want, strict=True):
            assert a.stride() == b.stride()
            assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_the_op_returns_what_its_reference_does():
    x = rows_of(torch.bfloat16)
    for text in ("fp8_token", "mxfp8", TORCHAO_INT8):
        for a, b in zip(quantize(x, None, text), quantize.reference(x, None, text), strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize(
    ("x", "scale", "text", "error", "message"),
    [
        (torch.ones(2, 130), None, "fp8_group128", ArgumentError, "the width 130 is not a multiple of 128. Pad it, or"),
        (torch.ones(2, 8), torch.ones(()), "nvfp4", ArgumentError, "the width 8 is not a multiple of 16"),
        (torch.ones(2, 8), torch.ones(()), "fp8_token", ScaleError, "computes its scale. Leave scale out"),
        (torch.ones(2, 16), None, "nvfp4", ScaleError, "'nvfp4' needs a scale. Pass scale"),
        (torch.ones(2, 16), torch.ones(2), "nvfp4", ScaleError, "takes one scale"),
        (torch.ones(2, 0), None, "fp8_token", ArgumentError, "nothing to take a maximum of"),
        (torch.ones(()), None, "int8_token", ArgumentError, "nothing to take a maximum of"),
        (torch.ones(2, 2, 8), None, "fp8_block128", ArgumentError, "'fp8_block128' takes a matrix"),
        (torch.ones(2, 8, dtype=torch.int32), None, "fp8_token", ArgumentError, "x has dtype torch.int32"),
    ],
)
def test_errors(x, scale, text, error, message):
    with pytest.raises(error, match=message):
        quantize(x, scale, text)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_a_given_scale_takes_no_maximum(shape):
    (codes,) = quantize.reference(torch.ones(shape), torch.ones(()), "fp8_static")
    assert codes.shape == shape
