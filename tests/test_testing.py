import math

import pytest
import torch

from fusionpass.op import Tolerance
from fusionpass.ops import add_rms_norm_quantize, qk_norm_rope, quantize, rms_norm
from fusionpass.testing import difference, disagreement, exact, ordered, relative_error, ulp_distance

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz], ids=str)
def test_ordered_counts_through_every_code(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    codes = codes[~codes.float().isnan()]
    by_value = codes[codes.float().argsort(stable=True).tolist()]
    steps = ordered(by_value).diff()
    assert set(steps.tolist()) <= {0, 1}
    assert (steps == 0).sum() == (1 if dtype == torch.float8_e4m3fn else 0)


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
def test_neighbours_are_one_apart(dtype):
    # Not torch.nextafter: it has no float16 on some versions.
    one = torch.ones(1, dtype=dtype)
    above = one + torch.finfo(dtype).eps
    assert ulp_distance(one, above).item() == 1
    assert ulp_distance(-one, one).item() == 2 * ordered(one).item()
    assert ulp_distance(torch.zeros(1, dtype=dtype), -torch.zeros(1, dtype=dtype)).item() == 0


def test_nan_is_near_nan_alone():
    nan, one = torch.tensor([math.nan]), torch.ones(1)
    assert ulp_distance(nan, nan).item() == 0
    assert ulp_distance(nan, one).item() == torch.iinfo(torch.int64).max


def test_tolerances():
    same = torch.ones(1000, dtype=torch.bfloat16)
    other = same.clone()
    other[:2] += torch.finfo(torch.bfloat16).eps
    found = difference(other, same)
    assert (found.ulp, found.different, found.elements) == (1, 2, 1000)
    assert found.within(Tolerance(ulp=1, fraction=2e-3))
    assert not found.within(Tolerance(ulp=1, fraction=1e-3))
    assert not found.within(Tolerance())
    assert not difference(other.float(), same.float()).within(Tolerance(ulp=1, fraction=1.0))
    with pytest.raises(AssertionError):
        difference(same, same.half())


def test_steps_of_what_was_rounded_on_the_way():
    one = torch.ones(1000)
    other = one.clone()
    other[0] += torch.finfo(torch.bfloat16).eps
    tolerance = Tolerance(ulp=1, fraction=1e-3, fp32_ulp=64)
    assert not difference(other, one, tolerance).within(tolerance)
    found = difference(other, one, tolerance, torch.bfloat16)
    assert (found.ulp, found.different, found.dtype) == (1, 1, torch.bfloat16)
    assert found.within(tolerance)
    assert difference(other.bfloat16(), one.bfloat16(), tolerance, torch.float32).dtype == torch.bfloat16
    assert difference(other.int(), one.int(), tolerance, torch.bfloat16).ulp == 0


def test_disagreement_names_the_output():
    generator = torch.Generator().manual_seed(0)
    arguments = quantize.bind((), quantize.sample(5, 64, torch.bfloat16, "cpu", generator))
    expected = quantize.reference(**arguments)
    codes = expected[0].clone()
    codes.view(torch.uint8)[2, 3] ^= 3
    assert disagreement(quantize, arguments, expected, expected) is None
    told = disagreement(quantize, arguments, [codes, *expected[1:]], expected)
    assert "q differs in 1 of 320 elements, by up to " in str(told)
    assert disagreement(quantize, arguments, [codes], [expected[0]], ["q"]) == told


def test_a_step_of_a_norm_is_no_disagreement_where_angles_are_wide():
    generator = torch.Generator().manual_seed(0)
    arguments = qk_norm_rope.bind((), qk_norm_rope.sample(2, 256, torch.bfloat16, "cpu", generator))
    arguments |= {"cos": arguments["cos"].float(), "sin": arguments["sin"].float()}
    expected = list(qk_norm_rope.reference(**arguments))
    assert expected[0].dtype == torch.float32
    moved = [expected[0].clone(), expected[1]]
    moved[0][0, 0, 0, 0] *= 1 + torch.finfo(torch.bfloat16).eps
    assert disagreement(qk_norm_rope, arguments, moved, expected) is None
    moved[0][0, 0, 0, 0] *= 1.5
    assert "q_rotated differs in 1 of" in str(disagreement(qk_norm_rope, arguments, moved, expected))


def test_exact_rounds_nothing():
    generator = torch.Generator().manual_seed(0)
    arguments = rms_norm.bind((), rms_norm.sample(3, 64, torch.bfloat16, "cpu", generator))
    x, weight = arguments["x"].double(), arguments["weight"].double()
    by_hand = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    assert relative_error(exact(rms_norm, arguments)[0], by_hand) < 1e-14
    arguments = add_rms_norm_quantize.bind((), add_rms_norm_quantize.sample(3, 64, torch.bfloat16, "cpu", generator))
    codes, total = exact(add_rms_norm_quantize, arguments)
    assert codes.dtype == total.dtype == torch.float64
    assert torch.equal(total, arguments["x"].double() + arguments["residual"].double())
    for output, oracle in zip(add_rms_norm_quantize(**arguments), (codes, total), strict=True):
        assert 1e-4 < relative_error(output, oracle) < 0.05
