"""QuantizedLinear and quantize_ under every scheme, against explicit arithmetic in float64."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fusionpass
from fusionpass import Arch, Config
from fusionpass.errors import ScaleError, SchemeError
from fusionpass.quantize import SCHEMES, QuantizedLinear, quantize_

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
HALF_STEP = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}
E4M3 = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
DYNAMIC = [name for name, scheme in SCHEMES.items() if not scheme.calibrated]
SCALED = ("fp8_static", "fp8_token", "int8_token")
"""Whose products are of the codes themselves."""


def nearest(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The nearest of `values` and their negatives, ties to the one at an even place."""
    magnitude = x.double().abs().clamp(max=values[-1])
    upper = torch.searchsorted(values, magnitude).clamp(max=len(values) - 1)
    lower = (upper - 1).clamp(min=0)
    up, down = values[upper] - magnitude, magnitude - values[lower]
    take_upper = (up < down) | ((up == down) & (upper % 2 == 0))
    return torch.where(take_upper, values[upper], values[lower]) * torch.where(x < 0, -1.0, 1.0)


def meaning(x: torch.Tensor, name: str, scale: float | None = None) -> torch.Tensor:
    """What `x` [rows, columns] becomes, in float64; scales in float32, as the schemes have them."""
    x = x.detach().float()
    if name == "fp8_static":
        step = torch.tensor(scale)
        return nearest(x * (1 / step), E4M3) * step.double()
    if name == "fp8_block128":
        blocks = [part.split(128, 1) for part in x.split(128)]
        return torch.cat([torch.cat([per_group(b, E4M3, b.abs().max()) for b in row], 1) for row in blocks])
    size = {"fp8_group128": 128, "mxfp8": 32, "nvfp4": 16}.get(name, x.shape[1])
    groups = x.view(x.shape[0], x.shape[1] // size, size)
    amax = groups.abs().amax(-1, keepdim=True)
    if name == "mxfp8":
        mantissa, exponent = torch.frexp(amax / 448)
        step = torch.exp2((exponent - (mantissa == 0.5).int()).clamp(min=-127).double())
        found = torch.where(amax > 0, nearest(groups / step, E4M3) * step, 0.0)
    elif name == "nvfp4":
        whole = torch.tensor(scale)
        step = nearest((amax / 6 / whole).clamp(2**-6, 448), E4M3).float()
        found = nearest(groups * ((1 / whole) / step), E2M1) * step.double() * whole.double()
    else:
        codes = torch.arange(128, dtype=torch.float64) if name == "int8_token" else E4M3
        found = per_group(groups, codes, amax)
    return found.view(x.shape)


def per_group(x: torch.Tensor, codes: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    step = (amax / float(codes[-1])).clamp(min=1e-12)
    return nearest(x * (1 / step), codes) * step.double()


def make(name: str, k: int = 256, n: int = 80, bias: bool = True, dtype=torch.bfloat16, seed: int = 0):
    torch.manual_seed(seed)
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    scale = {"fp8_static": 3 / 448, "nvfp4": 4 / 2688}.get(name)
    return linear, QuantizedLinear.from_linear(linear, scale, scheme=name)


def oracle(x: torch.Tensor, linear: nn.Linear, layer: QuantizedLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in float64, and how far rounding may take it."""
    name, k = layer.scheme, layer.in_features
    a = meaning(x.reshape(-1, k), name, None if layer.input_scale is None else layer.input_scale.item())
    weight_name, amax = {"fp8_group128": "fp8_block128"}.get(name, name), linear.weight.detach().float().abs().max()
    w = meaning(linear.weight, weight_name, {"fp8_static": amax / 448, "nvfp4": amax / 2688}.get(name, amax).item())
    bias = torch.zeros(w.shape[0]) if linear.bias is None else linear.bias.detach()
    expected, size = a @ w.T + bias.double(), a.abs() @ w.abs().T + bias.double().abs()
    half = HALF_STEP[x.dtype]
    bound = expected.abs() * half * 2 + size * (k + 4) * 2**-24 + 2**-24
    if name not in SCALED:
        # Both operands are rounded; float16 has subnormal numbers in steps of 2**-24.
        bound += size * half * 2.1 + k * 2**-24 * (a.abs().max() + w.abs().max() if a.numel() else 0)
    shape = (*x.shape[:-1], w.shape[0])
    return expected.view(shape), bound.view(shape)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(SCHEMES)),
    dtype=st.sampled_from(FLOATS),
    lead=st.sampled_from([(), (1,), (0,), (7,), (2, 3), (2, 0, 3), (17,)]),
    k=st.sampled_from([128, 384]),
    n=st.sampled_from([16, 80, 144]),
    bias=st.booleans(),
    magnitude=st.sampled_from([1e-2, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_matches_fp64(name, dtype, lead, k, n, bias, magnitude, seed):
    linear, layer = make(name, k, n, bias, dtype, seed)
    x = (torch.randn(*lead, k) * magnitude).to(dtype)
    if x.numel():
        x.view(-1, k)[-1, : k // 2] = 0
    y = layer(x)
    expected, bound = oracle(x, linear, layer)
    assert y.shape == expected.shape
    assert y.dtype == dtype
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("tokens", [1, 16, 17, 33])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_matches_fp64_on_a_gpu(name, dtype, tokens):
    linear, layer = make(name, 256, 144, True, dtype)
    x = torch.randn(tokens, 256).to(dtype)
    expected, bound = oracle(x, linear, layer)
    y = layer.to("cuda")(x.cuda()).cpu()
    # Tensor cores add products of FP8 in fewer bits than float32 has.
    assert ((y.double() - expected).abs() <= bound + expected.abs().max() * 2**-10).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "text",
    ["fp8_static/fp8_token", "fp8_token/fp8_static", "fp8_static/fp8_block128", "fp8_group128/fp8_token",
     "mxfp8/fp8_static", "fp8_tensor", "fp8_tensor/fp8_token", "nvfp4_tensor"],
)  # fmt: skip
def test_two_schemes_match_fp64(text, dtype):
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 144, dtype=dtype), (torch.randn(2, 5, 256) * 3).to(dtype)
    x[0, 0] = 0
    layer = QuantizedLinear.from_linear(linear, 9 / 448 if text.startswith("fp8_static") else None, scheme=text)
    input_name, _, weight_name = text.replace("_tensor", "").partition("/")
    names = {"fp8": "fp8_static", "": {"fp8": "fp8_static"}.get(input_name, input_name)}
    input_name, weight_name = names.get(input_name, input_name), names.get(weight_name, weight_name)
    steps = {"fp8_static": 448, "nvfp4": 2688}
    whole = [
        t.detach().float().abs().max() / steps.get(n, 1) for t, n in ((x, input_name), (linear.weight, weight_name))
    ]
    given = 9 / 448 if layer.input_scale is not None else whole[0].item()
    a, w = meaning(x.view(-1, 256), input_name, given), meaning(linear.weight, weight_name, whole[1].item())
    expected, size = a @ w.T + linear.bias.detach().double(), a.abs() @ w.abs().T + linear.bias.detach().double().abs()
    half, tiny = HALF_STEP[dtype], 256 * 2**-24 * (a.abs().max() + w.abs().max())
    assert layer.scheme == text
    y = layer(x).view(-1, 144)
    assert ((y.double() - expected).abs() <= expected.abs() * half * 2 + size * (half * 2.1 + 2**-15) + tiny).all()
    if not {layer.kind.input.granularity, layer.kind.weight.granularity} - {"tensor", "token"}:
        assert ((y.double() - expected).abs() <= expected.abs() * half * 2 + size * 260 * 2**-24 + 2**-24).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fp8_block128", "there is no scheme 'fp8_block128'"),
        ("fp8_token/int8_token", "multiplies torch.float8_e4m3fn by torch.int8"),
        ("int8_token/fp8_token", "multiplies torch.int8 by torch.float8_e4m3fn"),
        ("fp8_tensor,amax_dtype=half", "is not an override"),
        ("fp8_token/fp9", "'fp9' is not a quantisation scheme"),
    ],
)
def test_two_schemes_that_do_not_go_together(text, message):
    with pytest.raises(SchemeError, match=message):
        QuantizedLinear.from_linear(nn.Linear(32, 16), scheme=text)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_weight_means_what_the_oracle_says(name):
    linear, layer = make(name, 256, 144)
    with torch.no_grad():
        layer.bias.zero_()
    x = torch.zeros(256, 256)
    x.fill_diagonal_(1.0)
    if layer.input_scale is not None:
        # 1.0 is a code then, and what one of the sixteen is relative to.
        layer.input_scale.fill_(1.0 if name == "fp8_static" else 1 / 2688)
    weight_name, amax = {"fp8_group128": "fp8_block128"}.get(name, name), linear.weight.detach().float().abs().max()
    w = meaning(linear.weight, weight_name, {"fp8_static": amax / 448, "nvfp4": amax / 2688}.get(name, amax).item())
    torch.testing.assert_close(layer(x).T.double(), w, rtol=1e-6, atol=1e-9)


def test_a_large_weight_is_quantised_in_parts(monkeypatch):
    linear, layer = make("fp8_group128", 256, 304)
    monkeypatch.setattr("fusionpass.quantize.scheme._ELEMENTS", 1)
    for name in SCHEMES:
        _, whole = make(name, 256, 304)
        scale = None if whole.input_scale is None else whole.input_scale
        parts = QuantizedLinear.from_linear(linear, scale, scheme=name)
        assert whole.weight_scale.shape == parts.weight_scale.shape
    monkeypatch.undo()
    for key, value in layer.state_dict().items():
        again = QuantizedLinear.from_linear(linear, scheme="fp8_group128").state_dict()[key]
        assert torch.equal(value.float(), again.float())


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("transposed", [True, False])
def test_strided_inputs(name, transposed):
    _, layer = make(name)
    wide = torch.randn(256, 12).bfloat16().t() if transposed else torch.randn(12, 768).bfloat16()[:, 256:512]
    assert not wide.is_contiguous()
    assert torch.equal(layer(wide), layer(wide.contiguous()))


@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_spoils_no_other(name, value):
    _, layer = make(name)
    x = torch.randn(5, 256).bfloat16()
    before = layer(x)
    x[2, 7] = value
    after = layer(x)
    others = [0, 1, 3, 4]
    assert torch.equal(after[others], before[others])
    assert not after[2].isfinite().any()


@pytest.mark.parametrize("name", SCHEMES)
def test_zero_tokens_give_the_bias(name):
    _, layer = make(name)
    assert torch.equal(layer(torch.zeros(3, 256).bfloat16()), layer.bias.expand(3, -1))


@pytest.mark.parametrize("name", SCHEMES)
def test_casts_copies_moves_and_checkpoints_keep_every_bit(name):
    _, layer = make(name)
    _, other = make(name, seed=1)
    x = torch.randn(3, 256).bfloat16()
    expected, state = layer(x), layer.state_dict()
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    for cast in (lambda m: m.half(), lambda m: m.double(), lambda m: m.to("cpu", torch.bfloat16)):
        moved = cast(copy.deepcopy(layer)).state_dict()
        for key in state:
            assert key == "bias" or moved[key].dtype == state[key].dtype
            assert torch.equal(moved[key].float(), state[key].float())
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(x), expected)
    empty = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    empty.load_state_dict(state)
    assert torch.equal(empty(x), expected)


@pytest.mark.parametrize("name", SCHEMES)
def test_wrong_checkpoints_are_refused(name):
    _, layer = make(name)
    state = layer.state_dict()
    for other in SCHEMES:
        if other != name:
            with pytest.raises((SchemeError, ScaleError, RuntimeError)):
                layer.load_state_dict(make(other)[1].state_dict())
    scale = state["weight_scale"]
    bad = torch.full_like(scale, 255) if scale.dtype == torch.uint8 else torch.full_like(scale, float("nan"))
    with pytest.raises(ScaleError, match="weight_scale"):
        layer.load_state_dict(state | {"weight_scale": bad})
    assert torch.equal(layer.weight_scale.float(), scale.float())


@pytest.mark.parametrize("name", SCHEMES)
def test_wrong_arguments_are_refused(name):
    linear, layer = make(name)
    given = layer.input_scale
    with pytest.raises(ScaleError, match="input_scale"):
        QuantizedLinear.from_linear(linear, None if given is not None else 1.0, scheme=name)
    whole = layer.weight_global_scale
    with pytest.raises(ScaleError, match="weight_global_scale"):
        QuantizedLinear(layer.weight, layer.weight_scale, given, None, name, 1.0 if whole is None else None)
    with pytest.raises(ScaleError, match="weight_scale"):
        QuantizedLinear(layer.weight, layer.weight_scale.float().reshape(-1).repeat(2), given, None, name, whole)
    with pytest.raises(SchemeError, match="contiguous"):
        QuantizedLinear(layer.weight.float(), layer.weight_scale, given, None, name, whole)
    if name in DYNAMIC:
        with pytest.raises(ScaleError, match="computes its scales"):
            QuantizedLinear.from_linear(linear, None, 1.0, name)
        with torch.no_grad():
            linear.weight[3, 5] = float("inf")
        with pytest.raises(ScaleError, match="largest absolute value is inf"):
            QuantizedLinear.from_linear(linear, scheme=name)


def test_a_scheme_that_does_not_exist():
    with pytest.raises(SchemeError, match="Did you mean 'mxfp8'"):
        QuantizedLinear.from_linear(nn.Linear(32, 16), scheme="mxfp")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(256)
        self.gate, self.up, self.down = nn.Linear(256, 384), nn.Linear(256, 384), nn.Linear(384, 256)
        self.narrow = nn.Linear(48, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h)) + self.narrow(h[..., :48]).sum()


@pytest.mark.parametrize(
    ("name", "close"),
    [("fp8_static", 0.04), ("fp8_token", 0.04), ("fp8_group128", 0.04), ("mxfp8", 0.05), ("nvfp4", 0.2),
     ("int8_token", 0.02)],
)  # fmt: skip
def test_a_model(name, close):
    torch.manual_seed(0)
    model, x = Block().bfloat16().eval(), torch.randn(2, 5, 256).bfloat16()
    with torch.no_grad():
        before = model(x)
        report = quantize_(model, name, [x] if SCHEMES[name].calibrated else None)
        after = model(x)
    quantised = {r.where: r for r in report.quantized}
    assert (after - before).norm() < close * (before - x).norm()
    assert not torch.equal(after, before)
    assert ("narrow" in quantised) == (SCHEMES[name].multiple == 16)
    if "narrow" not in quantised:
        assert f"in_features 48 is not a multiple of {SCHEMES[name].multiple}, which {name} needs" in str(report)
    shared = model.gate.input_scale is not None
    assert shared == SCHEMES[name].calibrated
    assert model.gate.input_scale is model.up.input_scale
    assert quantised["up"].shares == ("gate" if shared else "up")
    assert (quantised["up"].input_scale is not None) == shared
    assert f"{name}: {len(quantised)} linears quantised" in str(report)
    assert ("input scale" in str(report)) == shared


def test_nvfp4_is_calibrated():
    model, x = nn.Sequential(nn.Linear(32, 16)), torch.randn(3, 32)
    quantize_(model, "nvfp4", [x])
    assert model[0].input_scale.item() == (x.abs().max() / 2688).item()


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_weight_of_zeros_is_no_mistake_where_its_scales_are_computed(name):
    model = nn.Sequential(nn.Linear(128, 16))
    nn.init.zeros_(model[0].weight)
    quantize_(model, name)
    x = torch.randn(3, 128)
    assert torch.equal(model(x), model[0].bias.expand(3, -1))


@pytest.mark.parametrize("name", SCHEMES)
def test_plain_torch_compile_needs_no_graph_break(name):
    _, layer = make(name)
    x = torch.randn(4, 256).bfloat16()
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
        for tokens in (x, x[:3], torch.randn(21, 256).bfloat16()):
            assert torch.equal(compiled(tokens), layer(tokens))


def graph(name: str, tokens: int, dtype: torch.dtype) -> str:
    """What is traced for an H100."""
    layer = make(name, dtype=dtype)[1]
    config = Config(target=Arch("sm_90"), disable=frozenset({"recognise", "fuse"}))
    report = fusionpass.explain(layer, torch.randn(tokens, 256).to(dtype), config=config)
    return report.graphs[0].snapshots[0][1]


@pytest.mark.parametrize(("tokens", "padded"), [(1, True), (16, True), (17, False)])
def test_a_gpu_multiplies_at_least_seventeen_rows_of_int8(tokens, padded):
    text = graph("int8_token", tokens, torch.bfloat16)
    assert "aten._int_mm.default" in text
    assert ("aten.constant_pad_nd.default" in text) == padded


def test_a_gpu_scales_rows_in_the_product_where_it_can():
    assert "aten.mul.Tensor(_scaled_mm" not in graph("fp8_token", 4, torch.bfloat16)
    assert "aten.mul.Tensor(_scaled_mm" in graph("fp8_token", 4, torch.float16)
