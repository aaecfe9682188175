"""quantize_: what is quantised with which scales, what is left alone and why, and that no error changes the model."""

import copy

import pytest
import torch
from torch import nn

from fusionpass.errors import CalibrationError, NothingToQuantizeError, ScaleError, SchemeError, SkipError
from fusionpass.quantize import QuantizedLinear, quantize_
from fusionpass.quantize.select import matches


class Layer(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, 16, bias=bias) for bias in (True, False, False))
        self.o = nn.Linear(16, width, bias=False)
        self.gate, self.gate_proj = nn.Linear(width, 48), nn.Linear(width, 48)
        self.odd = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        h = self.norm(x) * scale
        x = x + self.o(self.q(h) * self.k(h).sigmoid() + self.v(input=h))
        # The same values in another tensor: not the same input.
        return x + (self.gate(x) * self.gate_proj(x.clone())).mean(-1, keepdim=True) + self.odd(x).sum()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.drop = nn.Dropout(0.5)
        self.count = nn.BatchNorm1d(32)
        self.lm_head = nn.Linear(32, 64, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, scale)
        return self.lm_head(self.count(self.drop(x).mT).mT)


IDS = torch.arange(12).view(2, 6)


def make(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model()


def snapshot(model: nn.Module) -> tuple:
    state = {name: value.clone() for name, value in model.state_dict(keep_vars=False).items()}
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    return [id(m) for m in model.modules()], [m.training for m in model.modules()], hooks, state


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def assert_unchanged(model: nn.Module, before: tuple) -> None:
    after = snapshot(model)
    assert after[:3] == before[:3]
    assert all(same_bits(after[3][name], value) for name, value in before[3].items())


def test_scales_are_the_calibrated_ranges():
    model = make()
    reference = copy.deepcopy(model).eval()
    seen: dict[str, float] = {}
    for name, module in reference.named_modules():
        if isinstance(module, nn.Linear):

            def hook(m, args, kwargs, name=name):
                seen[name] = max(seen.get(name, 0.0), (args or (kwargs["input"],))[0].abs().max().item())

            module.register_forward_pre_hook(hook, with_kwargs=True)
    batches = [IDS, {"ids": IDS + 20, "scale": 2.0}, (IDS + 40, 0.5)]
    with torch.no_grad():
        reference(IDS), reference(IDS + 20, 2.0), reference(IDS + 40, 0.5)

    report = quantize_(model, "fp8_static", iter(batches))
    assert [r.where for r in report.quantized] == [
        f"layers.{i}.{n}" for i in range(2) for n in ("q", "k", "v", "o", "gate", "gate_proj")
    ]
    for record in report.quantized:
        layer = model.get_submodule(record.where)
        assert isinstance(layer, QuantizedLinear)
        assert layer.input_scale.item() == record.input_scale == (torch.tensor(seen[record.where]) / 448).item()
        linear = reference.get_submodule(record.where)
        assert layer.weight_scale.item() == record.weight_scale == (linear.weight.abs().max() / 448).item()
        assert layer.bias is None or torch.equal(layer.bias, linear.bias)


def test_linears_that_read_one_tensor_share_one_scale():
    model = make()
    report = quantize_(model, "fp8_static", lambda m: [m(IDS), m(IDS + 9)])
    for layer in model.layers:
        assert layer.q.input_scale is layer.k.input_scale is layer.v.input_scale
        assert len({id(m.input_scale) for m in (layer.q, layer.o, layer.gate, layer.gate_proj)}) == 4
    assert model.layers[0].q.input_scale is not model.layers[1].q.input_scale
    assert {r.where: r.shares for r in report.quantized}["layers.1.v"] == "layers.1.q"
    assert "8 input scales between them" in str(report)


@pytest.mark.parametrize("percentile", [100.0, 99.9, 99.0, 50.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_percentile_of_the_magnitudes(percentile, dtype):
    model = nn.Sequential(nn.Linear(48, 16, dtype=dtype))
    batches = [torch.randn(7, 3, 48).to(dtype), torch.randn(5, 48).to(dtype) * 2, torch.zeros(0, 48, dtype=dtype)]
    quantize_(model, "fp8_static", batches, percentile=percentile)
    largest = []
    for x in batches[:2]:
        ordered = sorted(x.abs().flatten().tolist())
        below = [v for i, v in enumerate(ordered) if (i + 1) * 100 >= percentile * len(ordered) - 1e-6]
        largest.append(below[0])
    assert model[0].input_scale.item() == (torch.tensor(max(largest)) / 448).item()


def test_a_percentile_hides_no_nan_and_no_infinity():
    for value in (float("nan"), float("inf")):
        x = torch.randn(64, 16)
        x[3, 5] = value
        with pytest.raises(ScaleError, match=f"value is {value}"):
            quantize_(nn.Sequential(nn.Linear(16, 16)), "fp8_static", [x], percentile=50.0)


class Sometimes(nn.Module):
    """b reads a's input only while `together`; c reads it after an in-place change."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor, together: bool = True) -> torch.Tensor:
        h = x * 2
        y = self.a(h) + self.b(h if together else h + 1)
        return y + self.c(h.mul_(2))


def test_sharing_must_hold_in_every_forward_and_stops_at_a_mutation():
    x = torch.randn(3, 16)
    for calibration, shared in (([x, x], True), ([x, (x, False)], False)):
        model = Sometimes()
        quantize_(model, "fp8_static", calibration)
        assert (model.a.input_scale is model.b.input_scale) == shared
        assert model.c.input_scale is not model.a.input_scale
        assert model.c.input_scale.item() == pytest.approx(2 * model.a.input_scale.item(), rel=1e-6)


def test_views_of_one_tensor_share_and_slices_of_it_do_not():
    class Views(Sometimes):
        def forward(self, x):
            return self.a(x.view(x.shape)[:, :16]) + self.b(x[:, :16]) + self.c(x[:, 16:])

    model = Views()
    quantize_(model, "fp8_static", [torch.randn(3, 32)])
    assert model.a.input_scale is model.b.input_scale
    assert model.a.input_scale is not model.c.input_scale


def test_calibration_under_inference_mode():
    model = make()
    with torch.inference_mode():
        ids = IDS.clone()
    quantize_(model, "fp8_static", lambda m: torch.inference_mode()(m)(ids))
    assert model.layers[0].q.input_scale is model.layers[0].v.input_scale


def test_one_linear_under_two_names_is_replaced_at_both():
    model = nn.ModuleDict({"a": nn.Linear(16, 16)})
    model["b"] = model["a"]
    quantize_(model, "fp8_static", lambda m: m["b"](torch.ones(1, 16)))
    assert isinstance(model["a"], QuantizedLinear)
    assert model["a"] is model["b"]


@pytest.mark.parametrize(
    ("rule", "path", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("gate", "layers.0.mlp.gate", True),
        ("gate", "layers.0.mlp.gate_proj", False),
        ("layers.1", "layers.1.mlp.up", True),
        ("layers.1", "layers.10.mlp.up", False),
        ("mlp.up", "layers.1.mlp.up", True),
        ("layers.up", "layers.1.mlp.up", False),
        ("layers.*.mlp", "layers.1.mlp.up", True),
        ("*_proj", "layers.1.mlp.up_proj", True),
        ("a.b.c", "b.c", False),
    ],
)
def test_skip_rules_take_whole_segments(rule, path, expected):
    assert matches(path, rule) is expected


def test_what_is_left_alone_says_why():
    model = make()
    model.layers[1].v = type("Lora", (nn.Linear,), {})(32, 16, bias=False)
    model.layers[1].o.register_forward_hook(lambda *args: None)
    linear = model.layers[1].k
    linear.forward = lambda x: nn.functional.linear(x, linear.weight)
    report = quantize_(model, "fp8_static", [IDS], skip=["gate", "layers.0.q"])
    reasons = {r.where: r.reason for r in report.skipped}
    assert reasons["layers.0.gate"] == "skipped by the rule 'gate'"
    assert reasons["layers.0.q"] == "skipped by the rule 'layers.0.q'"
    assert "10 is not a multiple of 16" in reasons["layers.0.odd"]
    assert "tied to embed" in reasons["lm_head"]
    assert "Lora is a subclass" in reasons["layers.1.v"]
    assert "hooks" in reasons["layers.1.o"]
    assert "hooks" in reasons["layers.1.k"]
    assert isinstance(model.layers[0].gate_proj, QuantizedLinear)
    assert all(f"{where}" in str(report) for where in reasons)
    assert report.to_dict()["skipped"][0]["reason"]


def test_a_tied_weight_on_request():
    model = make()
    embedding = model.embed.weight.detach().clone()
    report = quantize_(model, "fp8_static", [IDS], tied=True)
    assert "lm_head" in {r.where for r in report.quantized}
    assert torch.equal(model.embed.weight, embedding)


def test_output_stays_close_and_modes_are_kept():
    model = make().eval()
    model.layers[0].train()
    with torch.no_grad():
        before = model(IDS)
        quantize_(model, "fp8_static", [IDS])
        after = model(IDS)
    assert model.layers[0].q.training
    assert not model.layers[1].q.training
    # e4m3 has three bits of mantissa: a relative step of 2**-4 per operand, averaged over the sums.
    assert (after - before).norm() < 0.06 * before.norm()


def never_runs(model: Model) -> None:
    model.layers[0].forward = lambda x, scale: x


def zero_weight(model: Model) -> None:
    nn.init.zeros_(model.layers[1].o.weight)


def nan_weight(model: Model) -> None:
    with torch.no_grad():
        model.layers[1].o.weight[3, 5] = float("nan")


def zero_input(model: Model) -> None:
    nn.init.zeros_(model.layers[0].norm.weight)


def infinite_input(model: Model) -> None:
    with torch.no_grad():
        model.embed.weight[3, 5] = float("inf")


def broken_forward(model: Model) -> None:
    def fail(*args):
        raise RuntimeError("user's own")

    model.layers[1].forward = fail


@pytest.mark.parametrize(
    ("prepare", "arguments", "error", "message"),
    [
        (None, {"scheme": "fp8_statik"}, SchemeError, "Did you mean 'fp8_static'"),
        (None, {"scheme": "fp8_block128"}, SchemeError, "no scheme 'fp8_block128'"),
        (None, {"scheme": "fp8_token"}, CalibrationError, "'fp8_token' computes the scales of its inputs"),
        (nan_weight, {"scheme": "int8_token", "calibration": None}, ScaleError, "layers.1.o.weight: .* is nan"),
        (zero_input, {"scheme": "nvfp4"}, ScaleError, r"layers.0.q \(its input\): its largest absolute value is 0"),
        (None, {"calibration": None}, CalibrationError, "need calibration data"),
        (None, {"percentile": 0.0}, CalibrationError, "the percentile is 0.0"),
        (None, {"percentile": 100.1}, CalibrationError, "up to 100"),
        (None, {"percentile": float("nan")}, CalibrationError, "the percentile is nan"),
        (None, {"scheme": "fp8_token", "calibration": None, "percentile": 99.0}, CalibrationError, "Leave percentile"),
        (None, {"calibration": []}, CalibrationError, "empty"),
        (None, {"calibration": IDS}, CalibrationError, "single Tensor"),
        (None, {"calibration": {"ids": IDS}}, CalibrationError, "single dict"),
        (None, {"calibration": 3}, CalibrationError, "single int"),
        (None, {"calibration": [IDS, 7]}, CalibrationError, r"calibration\[1\]: the item is a int"),
        (None, {"calibration": lambda m: None}, CalibrationError, "12 of 12 linears never ran"),
        (None, {"skip": "lm_haed"}, SkipError, "Did you mean 'lm_head'"),
        (None, {"skip": ["layers", "lm_head"]}, NothingToQuantizeError, "skipped by the rule 'layers'"),
        (never_runs, {}, CalibrationError, "layers.0.q, layers.0.k"),
        (zero_weight, {}, ScaleError, r"layers.1.o.weight: its largest absolute value is 0"),
        (nan_weight, {}, ScaleError, r"layers.1.o.weight: its largest absolute value is nan"),
        (zero_input, {}, ScaleError, r"layers.0.q \(its input\): its largest absolute value is 0"),
        (infinite_input, {}, ScaleError, r"its input"),
        (broken_forward, {}, RuntimeError, "user's own"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(prepare, arguments, error, message):
    model = make()
    model.layers[0].eval()
    if prepare:
        prepare(model)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        quantize_(model, **({"scheme": "fp8_static", "calibration": [IDS]} | arguments))
    assert_unchanged(model, before)


def test_nothing_to_quantise():
    for model, message in (
        (nn.Sequential(nn.ReLU()), "holds no nn.Linear"),
        (nn.Linear(16, 16), "cannot be replaced in place"),
        (nn.Sequential(nn.Linear(8, 16)), "in_features 8 is not a multiple of 16"),
    ):
        with pytest.raises(NothingToQuantizeError, match=message):
            quantize_(model, "fp8_static", [torch.ones(1, 16)])
    model = nn.Sequential(nn.Linear(16, 16))
    quantize_(model, "fp8_static", [torch.ones(1, 16)])
    with pytest.raises(NothingToQuantizeError, match="quantised already"):
        quantize_(model, "fp8_static", [torch.ones(1, 16)])


def test_the_failing_input_is_named():
    with pytest.raises(IndexError) as caught:
        quantize_(make(), "fp8_static", [IDS, IDS + 1000])
    assert caught.value.__notes__ == ["while running the model on calibration[1]"]


def test_state_dict_moves_between_two_quantised_models():
    first, second = make(), make(1)
    quantize_(first, "fp8_static", [IDS])
    quantize_(second, "fp8_static", [IDS + 30])
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        assert torch.equal(first.eval()(IDS), second.eval()(IDS))


def test_a_compiled_model_is_calibrated_too():
    model = make().eval()
    model.compile(backend="eager")
    with torch.no_grad():
        model(IDS)
        quantize_(model, "fp8_static", [IDS])
        assert torch.equal(model(IDS), model.forward(IDS))
    assert isinstance(model.layers[0].q, QuantizedLinear)
