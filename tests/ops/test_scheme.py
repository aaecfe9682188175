import dataclasses
import itertools

import pytest
import torch

from fusionpass.errors import SchemeError
from fusionpass.ops import Scheme, quantize
from fusionpass.ops.quant.scheme import SCHEMES

DTYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e4m3fnuz": torch.float8_e4m3fnuz}
ROUNDINGS = ("reciprocal", "divide")


@pytest.mark.parametrize("name", SCHEMES)
def test_a_name_comes_back(name):
    assert str(Scheme.parse(name)) == name
    assert Scheme.parse(name) is SCHEMES[name]


def test_fp8_static():
    scheme = Scheme.parse("fp8_static")
    assert (scheme.dtype, scheme.granularity, scheme.scale_dtype) == (torch.float8_e4m3fn, "tensor", torch.float32)
    assert (scheme.static, scheme.max, scheme.rounding) == (True, 448.0, "reciprocal")


@pytest.mark.parametrize(("dtype", "rounding"), [*itertools.product(DTYPES, ROUNDINGS)])
@pytest.mark.parametrize("name", SCHEMES)
def test_overrides_come_back(name, dtype, rounding):
    scheme = dataclasses.replace(SCHEMES[name], dtype=DTYPES[dtype], rounding=rounding)
    assert Scheme.parse(f"{name},dtype={dtype},rounding={rounding}") == scheme
    assert Scheme.parse(f"{name},rounding={rounding},dtype={dtype}") == scheme
    assert Scheme.parse(str(scheme)) == scheme
    assert str(Scheme.parse(str(scheme))) == str(scheme)


def test_what_differs_is_named_and_nothing_else():
    assert str(Scheme.parse("fp8_static,rounding=divide")) == "fp8_static,rounding=divide"
    assert str(Scheme.parse("fp8_static,rounding=reciprocal")) == "fp8_static"


def test_fnuz_saturates_at_240():
    assert Scheme.parse("fp8_static,dtype=float8_e4m3fnuz").max == 240.0


def test_different_rounding_is_a_different_scheme():
    assert Scheme.parse("fp8_static") != Scheme.parse("fp8_static,rounding=divide")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fp8_statik", "'fp8_statik' is not a quantisation scheme. Did you mean 'fp8_static'"),
        ("", "'' is not a quantisation scheme. Known: fp8_static"),
        ("FP8_STATIC", "is not a quantisation scheme"),
        ("fp8_static,rounding=divid", "'rounding=divid' is not an override.*Did you mean 'rounding=divide'"),
        ("fp8_static,rounding", "'rounding' is not an override"),
        ("fp8_static,", "'' is not an override"),
        ("fp8_static,granularity=token", "'granularity=token' is not an override"),
        ("fp8_static rounding=divide", "is not a quantisation scheme"),
    ],
)
def test_errors(text, message):
    with pytest.raises(SchemeError, match=message):
        Scheme.parse(text)
    with pytest.raises(SchemeError, match=message):
        quantize(torch.ones(2), torch.ones(()), text)


@pytest.mark.parametrize(
    "change", [{"dtype": torch.float8_e5m2}, {"granularity": "token"}, {"eps": 1e-9}, {"amax_dtype": torch.float32}]
)
def test_a_scheme_that_cannot_be_written_has_no_name(change):
    with pytest.raises(SchemeError, match="has no name"):
        str(dataclasses.replace(SCHEMES["fp8_static"], **change))
