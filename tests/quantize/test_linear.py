"""QuantizedLinear against an fp64 oracle, and what moving, casting, saving and loading must keep."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fusionpass.errors import ScaleError, SchemeError
from fusionpass.quantize import QuantizedLinear

FP8 = torch.float8_e4m3fn
HALF_STEP = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}


def nearest_codes(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest e4m3fn value, ties to even codes, by looking at all of them."""
    codes = torch.arange(0, 127, dtype=torch.uint8).view(FP8).double()
    magnitude = x.double().abs().clamp(max=448)
    upper = torch.searchsorted(codes, magnitude).clamp(max=126)
    lower = (upper - 1).clamp(min=0)
    up, down = codes[upper] - magnitude, magnitude - codes[lower]
    take_upper = (up < down) | ((up == down) & (upper % 2 == 0))
    return torch.where(take_upper, codes[upper], codes[lower]) * x.double().sign()


def oracle(x: torch.Tensor, layer: QuantizedLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in fp64, and how large its sum of absolute terms is."""
    codes = nearest_codes(x.float() * (1 / layer.input_scale))
    a, w = codes * layer.input_scale.double(), layer.weight.double() * layer.weight_scale.double()
    bias = 0 if layer.bias is None else layer.bias.double()
    return a @ w.T + bias, a.abs() @ w.abs().T + abs(bias)


def make(k: int, n: int, bias: bool, dtype: torch.dtype, seed: int = 0) -> QuantizedLinear:
    torch.manual_seed(seed)
    return QuantizedLinear.from_linear(nn.Linear(k, n, bias=bias, dtype=dtype), 3.0 / 448)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    lead=st.sampled_from([(), (1,), (0,), (7,), (2, 3), (2, 0, 3), (2, 1, 4)]),
    k=st.sampled_from([16, 48, 576]),
    n=st.sampled_from([16, 80]),
    bias=st.booleans(),
    magnitude=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_matches_fp64(dtype, lead, k, n, bias, magnitude, seed):
    layer = make(k, n, bias, dtype, seed)
    x = (torch.randn(*lead, k) * magnitude).to(dtype)
    y = layer(x)
    expected, size = oracle(x, layer)
    assert y.shape == (*lead, n)
    assert y.dtype == dtype
    # One rounding to the output's dtype, one more where the bias is added apart, and k fp32 additions.
    bound = expected.abs() * HALF_STEP[dtype] * 2 + size * k * 2**-24 + 2**-24
    assert ((y.double() - expected).abs() <= bound).all()


def test_weight_codes_are_the_nearest():
    linear = nn.Linear(64, 32)
    layer = QuantizedLinear.from_linear(linear, 1.0)
    assert layer.weight_scale == linear.weight.abs().max() / 448
    assert torch.equal(layer.weight.double(), nearest_codes(linear.weight.detach() * (1 / layer.weight_scale)))
    assert layer.weight.double().abs().max() == 448


def test_values_past_the_calibrated_range_saturate():
    layer = QuantizedLinear(torch.eye(16).to(FP8), 1.0, 1.0)
    x = torch.full((1, 16), 1e6)
    x[0, 0] = -float("inf")
    assert layer(x).tolist() == [[-448.0] + [448.0] * 15]


@pytest.mark.parametrize("transposed", [True, False])
def test_strided_inputs(transposed):
    layer = make(32, 16, True, torch.bfloat16)
    wide = torch.randn(32, 12).bfloat16().t() if transposed else torch.randn(12, 96).bfloat16()[:, 32:64]
    assert not wide.is_contiguous()
    assert torch.equal(layer(wide), layer(wide.contiguous()))


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.type(torch.float16),
        lambda m: m.to("cpu", torch.float16),
    ],
)
def test_a_cast_reaches_the_bias_alone(cast):
    layer = make(32, 16, True, torch.float32)
    before = copy.deepcopy(layer)
    cast(layer)
    assert layer.bias.dtype != torch.float32
    for name in ("weight", "weight_scale", "input_scale"):
        new, old = getattr(layer, name), getattr(before, name)
        assert new.dtype == old.dtype
        assert torch.equal(new.float(), old.float())


def test_a_move_takes_everything_along():
    layer = make(32, 16, True, torch.float32).to("meta", torch.bfloat16)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert [layer.weight.dtype, layer.input_scale.dtype, layer.bias.dtype] == [FP8, torch.float32, torch.bfloat16]
    assert layer.to_empty(device="cpu").weight.dtype == FP8


def tied_pair() -> nn.ModuleDict:
    first = make(32, 16, False, torch.bfloat16)
    second = QuantizedLinear.from_linear(nn.Linear(32, 16, dtype=torch.bfloat16), first.input_scale)
    return nn.ModuleDict({"q": first, "k": second})


def test_a_shared_scale_stays_shared():
    pair = tied_pair()
    assert pair["q"].input_scale is pair["k"].input_scale
    other = tied_pair()
    with torch.no_grad():
        other["q"].input_scale.fill_(0.5)
    for changed in (pair.half(), copy.deepcopy(pair), pair.to(torch.bfloat16)):
        assert changed["q"].input_scale is changed["k"].input_scale
    for assign in (False, True):
        pair.load_state_dict(other.state_dict(), assign=assign)
        assert pair["q"].input_scale is pair["k"].input_scale
        assert pair["k"].input_scale == 0.5


def test_state_dict_round_trip():
    pair, other = tied_pair(), tied_pair()
    with torch.no_grad():
        pair["q"].input_scale.mul_(3)
        pair["k"].weight_scale.mul_(2)
    buffer = io.BytesIO()
    torch.save(pair.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    x = torch.randn(3, 32).bfloat16()
    for name in ("q", "k"):
        assert torch.equal(other[name](x), pair[name](x))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e-42, torch.ones(2)])
@pytest.mark.parametrize("which", ["weight_scale", "input_scale"])
def test_a_bad_scale_is_refused(which, scale):
    scales = {"weight_scale": 1.0, "input_scale": 1.0} | {which: scale}
    with pytest.raises(ScaleError, match=which):
        QuantizedLinear(torch.eye(16).to(FP8), **scales)
    layer = QuantizedLinear(torch.eye(16).to(FP8), 1.0, 1.0)
    state = layer.state_dict() | {which: torch.as_tensor(scale)}
    with pytest.raises(ScaleError, match=which):
        layer.load_state_dict(state)
    assert layer.weight_scale == layer.input_scale == 1.0


def test_an_unquantised_checkpoint_is_refused():
    layer = make(32, 16, False, torch.bfloat16)
    before = layer.weight.detach().clone()
    with pytest.raises(SchemeError, match="bfloat16 weight"):
        layer.load_state_dict(nn.Linear(32, 16, bias=False, dtype=torch.bfloat16).state_dict(), strict=False)
    assert torch.equal(layer.weight.float(), before.float())


@pytest.mark.parametrize("weight", [torch.ones(16, 16), torch.ones(16).to(FP8), torch.ones(16, 32).to(FP8).t()])
def test_a_weight_of_another_kind_is_refused(weight):
    with pytest.raises(SchemeError, match="contiguous"):
        QuantizedLinear(weight, 1.0, 1.0)


def test_a_bias_of_the_wrong_length_is_refused():
    with pytest.raises(SchemeError, match="16 elements"):
        QuantizedLinear(torch.eye(16).to(FP8), 1.0, 1.0, torch.ones(8))


def test_plain_torch_compile_needs_no_graph_break():
    layer = make(64, 32, True, torch.bfloat16)
    x = torch.randn(4, 64).bfloat16()
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x))
