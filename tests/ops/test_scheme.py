import dataclasses
import itertools

import pytest
import torch

from fusionpass.errors import SchemeError
from fusionpass.ops import Scheme, quantize
from fusionpass.ops.quant.scheme import SCHEMES

DTYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e4m3fnuz": torch.float8_e4m3fnuz}
FP8 = ("fp8_static", "fp8_token", "fp8_group128", "fp8_block128")
ROUNDINGS = ("reciprocal", "divide")


@pytest.mark.parametrize("name", SCHEMES)
def test_a_name_comes_back(name):
    assert str(Scheme.parse(name)) == name
    assert Scheme.parse(name) is SCHEMES[name]


def test_fp8_static():
    scheme = Scheme.parse("fp8_static")
    assert (scheme.dtype, scheme.granularity, scheme.scale_dtype) == (torch.float8_e4m3fn, "tensor", torch.float32)
    assert (scheme.static, scheme.max, scheme.rounding) == (True, 448.0, "reciprocal")
    assert (scheme.takes_scale, scheme.returns_scale, scheme.group) == (True, False, None)


@pytest.mark.parametrize(
    ("name", "group", "takes_scale", "codes", "scales"),
    [
        ("fp8_token", None, False, torch.float8_e4m3fn, torch.float32),
        ("fp8_group128", 128, False, torch.float8_e4m3fn, torch.float32),
        ("fp8_group128,scale_dtype=float8_e8m0fnu", 128, False, torch.float8_e4m3fn, torch.uint8),
        ("fp8_block128", None, False, torch.float8_e4m3fn, torch.float32),
        ("mxfp8", 32, False, torch.float8_e4m3fn, torch.uint8),
        ("nvfp4", 16, True, torch.uint8, torch.float8_e4m3fn),
        ("int8_token", None, False, torch.int8, torch.float32),
    ],
)
def test_computed_scales(name, group, takes_scale, codes, scales):
    scheme = Scheme.parse(name)
    assert (scheme.static, scheme.returns_scale) == (False, True)
    assert (scheme.group, scheme.takes_scale) == (group, takes_scale)
    assert (scheme.code_dtype, scheme.stored_scale_dtype) == (codes, scales)


@pytest.mark.parametrize(
    ("name", "limit", "low", "denominator"),
    [
        ("fp8_token", 448.0, -448.0, 448.0),
        ("fp8_token,dtype=float8_e4m3fnuz", 240.0, -240.0, 240.0),
        ("mxfp8", 448.0, -448.0, 448.0),
        ("mxfp8,scale_rounding=floor", 448.0, -448.0, 256.0),
        ("nvfp4", 6.0, -6.0, 6.0),
        ("int8_token", 127.0, -127.0, 127.0),
        ("int8_token,divisor=127.5", 127.0, -128.0, 127.5),
    ],
)
def test_limits(name, limit, low, denominator):
    scheme = Scheme.parse(name)
    assert (scheme.max, scheme.min, scheme.denominator) == (limit, low, denominator)


@pytest.mark.parametrize(("dtype", "rounding"), [*itertools.product(DTYPES, ROUNDINGS)])
@pytest.mark.parametrize("name", FP8)
def test_overrides_come_back(name, dtype, rounding):
    scheme = dataclasses.replace(SCHEMES[name], dtype=DTYPES[dtype], rounding=rounding)
    assert Scheme.parse(f"{name},dtype={dtype},rounding={rounding}") == scheme
    assert Scheme.parse(f"{name},rounding={rounding},dtype={dtype}") == scheme
    assert Scheme.parse(str(scheme)) == scheme
    assert str(Scheme.parse(str(scheme))) == str(scheme)


@pytest.mark.parametrize(
    "text",
    [
        "fp8_token,amax_dtype=input,eps=0.0,rounding=divide",
        "fp8_token,eps=0.0,rounding=divide,zero=one",
        "fp8_group128,layout=column_major,eps=1e-10,scale_rounding=ceil",
        "fp8_group128,scale_dtype=float8_e8m0fnu,layout=column_major,scale_rounding=log2_ceil",
        "mxfp8,layout=swizzled,scale_rounding=floor",
        "nvfp4,layout=swizzled,rounding=divide",
        "int8_token,amax_dtype=input,eps=1.1920928955078125e-07,divisor=127.5",
    ],
)
def test_a_canonical_string_comes_back(text):
    assert str(Scheme.parse(text)) == text


def test_numbers_are_compared_as_numbers():
    assert Scheme.parse("fp8_token,eps=0.000000000001") is not None
    assert str(Scheme.parse("fp8_token,eps=0.000000000001")) == "fp8_token"
    assert Scheme.parse("fp8_token,eps=1e-10").eps == 1e-10


def test_an_exponent_byte_implies_a_power_of_two():
    assert Scheme.parse("fp8_group128,scale_dtype=float8_e8m0fnu").scale_rounding == "ceil"


def test_what_differs_is_named_and_nothing_else():
    assert str(Scheme.parse("fp8_static,rounding=divide")) == "fp8_static,rounding=divide"
    assert str(Scheme.parse("fp8_static,rounding=reciprocal")) == "fp8_static"


def test_different_rounding_is_a_different_scheme():
    assert Scheme.parse("fp8_static") != Scheme.parse("fp8_static,rounding=divide")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fp8_statik", "'fp8_statik' is not a quantisation scheme. Did you mean 'fp8_static'"),
        ("", "'' is not a quantisation scheme. Known: fp8_block128, fp8_group128, fp8_static"),
        ("FP8_STATIC", "is not a quantisation scheme"),
        ("fp8_static,rounding=divid", "'rounding=divid' is not an override.*Did you mean 'rounding=divide'"),
        ("fp8_static,rounding", "'rounding' is not an override"),
        ("fp8_static,", "'' is not an override"),
        ("fp8_static,granularity=token", "'granularity=token' is not an override"),
        ("fp8_static rounding=divide", "is not a quantisation scheme"),
        ("fp8_static,eps=1e-12", "'eps=1e-12' is not an override of fp8_static"),
        ("fp8_token,layout=swizzled", "'layout=swizzled' is not an override of fp8_token"),
        ("mxfp8,scale_rounding=none", "'scale_rounding=none' is not an override of mxfp8"),
        ("nvfp4,dtype=float8_e4m3fnuz", "is not an override of nvfp4"),
        ("fp8_token,eps=-1.0", "'eps=-1.0' is not an override"),
        ("fp8_token,eps=inf", "'eps=inf' is not an override"),
        ("fp8_token,eps=nan", "'eps=nan' is not an override"),
        ("fp8_token,eps=small", "'eps=small' is not an override"),
    ],
)
def test_errors(text, message):
    with pytest.raises(SchemeError, match=message):
        Scheme.parse(text)
    with pytest.raises(SchemeError, match=message):
        quantize(torch.ones(2), torch.ones(()), text)


@pytest.mark.parametrize(
    "change", [{"dtype": torch.float8_e5m2}, {"granularity": "token"}, {"eps": 1e-9}, {"amax_dtype": "float32"}]
)
def test_a_scheme_that_cannot_be_written_has_no_name(change):
    with pytest.raises(SchemeError, match="has no name"):
        str(dataclasses.replace(SCHEMES["fp8_static"], **change))
