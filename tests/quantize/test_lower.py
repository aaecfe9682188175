"""lower_linears_: what each library's linear becomes, against float64 and against the library where it can run."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fusionpass
from fusionpass.quantize import QuantizedLinear, lower_linears_, quantize_
from fusionpass.quantize.converters import CONVERTERS, source
from fusionpass.quantize.scheme import LinearScheme
from tests.quantize.sources import PRESETS, SOURCES, WIDTH, Source, compressed, finegrained, torchao
from tests.quantize.test_schemes import HALF_STEP

each = pytest.mark.parametrize("given", SOURCES.values(), ids=SOURCES)


def lowered(module: nn.Module) -> QuantizedLinear:
    model = nn.Sequential(module).eval()
    report = lower_linears_(model)
    assert not report.left, str(report)
    assert isinstance(model[0], QuantizedLinear)
    return model[0]


def inputs(*lead: int, dtype: torch.dtype = torch.bfloat16, zeros: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*lead, WIDTH, generator=generator) * 10 ** torch.empty(*lead, 1).uniform_(
        -2, 2, generator=generator
    )
    if zeros:
        x.view(-1, WIDTH)[-1] = 0
        x.view(-1, WIDTH)[0, :128] = 0
    return x.to(dtype)


def bound(x: torch.Tensor, a: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | float, grouped: bool) -> torch.Tensor:
    """How far rounding may take a result: sums in float32, one rounding, and of both operands where grouped."""
    size, half = a.abs() @ w.abs().T + abs(torch.as_tensor(bias)), HALF_STEP[x.dtype]
    found = (a @ w.T + bias).abs() * half * 2 + size * (WIDTH + 8) * 2**-24
    return found + (size * half * 2.1 if grouped else 0)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_matches_float64(given: Source, dtype: torch.dtype) -> None:
    module = given.make()
    zeros = "eps=0.0" not in given.scheme or "zero=one" in given.scheme
    x = inputs(6, dtype=dtype, zeros=zeros)
    a, w = given.input(module, x), given.weight(module)
    bias = 0.0 if module.bias is None else module.bias.detach().double()
    layer = lowered(module)
    assert layer.scheme == given.scheme
    grouped = not {layer.kind.input.granularity, layer.kind.weight.granularity} <= {"tensor", "token"}
    y = layer(x)
    assert y.dtype == dtype
    assert ((y.double() - (a @ w.T + bias)).abs() <= bound(x, a, w, bias, grouped)).all()


@pytest.mark.parametrize("name", [name for name, given in SOURCES.items() if given.exact is not None])
def test_against_the_library(name: str) -> None:
    if name.endswith("_row") and torch.__version__ < "2.12":
        pytest.skip("torch has no products with scales of rows on a CPU before 2.12")
    given = SOURCES[name]
    module = given.make()
    x = inputs(2, 5, zeros=False) if name != "torchao_static" else inputs(6, zeros=False)
    with torch.no_grad():
        expected = copy.deepcopy(module)(x)
        y = lowered(module)(x)
    if given.exact:
        assert torch.equal(y, expected)
        return
    # torchao's INT8 rounds to bfloat16 between the two scales; a product of rows rounds before it adds the bias.
    assert not torch.equal(y, expected)
    rows = x.view(-1, WIDTH)
    exact = given.input(module, rows) @ given.weight(module).T + module.bias.detach().double()
    assert (y.view(exact.shape) - exact).norm() <= (expected.view(exact.shape) - exact).norm()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("compress", [True, False])
def test_compressed_tensors_in_float32(preset: str, compress: bool) -> None:
    """In float32 compressed-tensors' simulation has the same codes; in bfloat16 it rounds them twice."""
    from compressed_tensors.compressors.base import decompress_module

    module = compressed(preset, torch.float32, compress)
    simulated = copy.deepcopy(module)
    if compress:
        decompress_module(simulated)
        # It makes bfloat16 of some.
        simulated.to(torch.float32)
    x = inputs(2, 5, dtype=torch.float32)
    x[..., -16:] = x[..., -16:].abs().clamp(min=1e-2)
    with torch.no_grad():
        expected, y = simulated(x), lowered(module)(x)
    loose = 2**-8 if preset == "NVFP4" and compress else 2e-6
    assert ((y - expected).abs() <= loose * expected.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("preset", ["FP8", "FP8_DYNAMIC", "FP8_BLOCK", "INT8"])
def test_compressed_tensors_in_bfloat16_is_no_closer(preset: str) -> None:
    from compressed_tensors.compressors.base import decompress_module

    module = compressed(preset, torch.bfloat16)
    simulated = copy.deepcopy(module)
    decompress_module(simulated)
    x, given = inputs(2, 32, zeros=False), SOURCES[preset]
    exact = given.input(module, x.view(-1, WIDTH)) @ given.weight(module).T + module.bias.detach().double()
    with torch.no_grad():
        theirs, ours = simulated(x).view(exact.shape) - exact, lowered(module)(x).view(exact.shape) - exact
    assert ours.norm() < 0.5 * theirs.norm()


def test_codes_are_not_copied() -> None:
    module = SOURCES["transformers_row"].make()
    layer = lowered(module)
    assert layer.weight.data_ptr() == module.weight.data_ptr()
    assert layer.bias is module.bias
    packed = torchao("torchao_row")
    assert lowered(packed).weight.data_ptr() == packed.weight.qdata.data_ptr()


def test_equal_scales_side_by_side_become_one() -> None:
    model = nn.ModuleDict({name: finegrained(True, True) for name in "abcd"})
    model["inner"] = nn.ModuleDict({"e": finegrained(True, True)})
    model["c"].activation_scale.data.mul_(1.5)
    lower_linears_(model)
    assert model["a"].input_scale is model["b"].input_scale is model["d"].input_scale
    assert model["a"].input_scale is not model["c"].input_scale
    assert model["a"].input_scale is not model["inner"]["e"].input_scale
    assert model["c"].input_scale == torch.tensor(0.01) * 1.5


class Special(nn.Parameter):
    pass


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.plain = finegrained(False, True), nn.Linear(WIDTH, 16)
        self.again = self.a
        self.norm = nn.LayerNorm(WIDTH)


def test_the_report_and_the_modules_that_are_left() -> None:
    model = Model().train()
    model.add_module("hooked", torchao("torchao_row"))
    model.hooked.register_forward_hook(lambda *args: None)
    model.add_module("hooked_before", torchao("torchao_row"))
    model.hooked_before.register_forward_pre_hook(lambda *args: None)
    model.add_module("other", nn.Linear(WIDTH, 16).requires_grad_(False).to(torch.float8_e5m2))
    model.add_module("meta", finegrained(False, True).to("meta"))
    narrow = finegrained(False, True)
    narrow.weight = nn.Parameter(narrow.weight[:, :192].contiguous(), requires_grad=False)
    model.add_module("narrow", narrow)
    zero = SOURCES["diffusers"].make()
    zero.weight_scale[3] = 0
    model.add_module("zero", zero)
    quantised = nn.Sequential(nn.Linear(WIDTH, 16))
    quantize_(quantised, "fp8_token")
    model.add_module("ours", quantised)
    experts = nn.Module()
    experts.up_proj = nn.Parameter(torch.zeros(2, 16, 16, dtype=torch.int8), requires_grad=False)
    model.add_module("experts", experts)
    table = nn.Module()
    table.weight = torchao("torchao_row").weight
    model.add_module("table", table)
    special = nn.Linear(WIDTH, 16)
    special.weight = Special(torch.zeros(16, WIDTH))
    model.add_module("special", special)
    report = lower_linears_(model)
    assert [r.where for r in report.lowered] == ["a"]
    assert model.a is model.again
    assert model.a.training
    assert report.lowered[0].source == "transformers.FP8Linear"
    reasons = {r.where: r.reason for r in report.left}
    assert reasons == {
        "plain": "it is not quantised",
        "hooked": "it carries forward hooks, which a replacement would lose",
        "hooked_before": "it carries forward hooks, which a replacement would lose",
        "experts": "there is no converter for torch.Module with torch.int8",
        "table": "it is a Module, not a linear",
        "special": "there is no converter for torch.Linear with tests.Special",
        "other": "there is no converter for torch.Linear with torch.float8_e5m2",
        "meta": "its weight is not loaded",
        "narrow": "in_features 192 is not a multiple of 128, which fp8_group128,rounding=divide needs",
        "zero": "QuantizedLinear.weight_scale: 1 of 144 scales are not positive and finite",
        "ours.0": "it is quantised by 'fp8_token' already",
    }
    assert all(where in str(report) for where in (*reasons, "transformers.FP8Linear → fp8_group128"))
    assert report.to_dict()["left"][0] == {"where": "plain", "reason": "it is not quantised"}
    again = lower_linears_(model)
    assert not again.lowered
    assert lower_linears_(finegrained(False, True)).left[0].reason.startswith("it is the whole model")


def changed(name: str, **fields: object) -> object:
    """A torchao linear whose weight says something else."""
    module = torchao(name)
    for field, value in fields.items():
        target, _, key = field.rpartition("__")
        setattr(getattr(module.weight, target) if target else module.weight, key, value)
    return module


def finegrained_with(**fields: object) -> nn.Module:
    module = finegrained(False, True)
    for field, value in fields.items():
        setattr(module, field, value)
    return module


ASYMMETRIC = SimpleNamespace(name="ASYMMETRIC")
PER_TENSOR = type("PerTensor", (), {"__repr__": lambda self: "PerTensor()"})()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: changed("torchao_row", act_quant_kwargs=None), "its weight alone is quantised"),
        (lambda: changed("torchao_int8", act_quant_kwargs=None), "its weight alone is quantised"),
        (lambda: changed("torchao_mxfp8", act_quant_kwargs=None), "its weight alone is quantised"),
        (lambda: changed("torchao_nvfp4", act_quant_kwargs=None), "its weight alone is quantised"),
        (lambda: changed("torchao_row", act_quant_kwargs__float8_dtype=torch.float8_e5m2), "its codes are torch.flo"),
        (
            lambda: changed("torchao_row", qdata=torch.zeros(128, 256).to(torch.float8_e5m2)),
            "its codes are torch.float8_e5m2, those of its input torch.float8_e4m3fn",
        ),
        (lambda: changed("torchao_row", act_quant_kwargs__hp_value_ub=3.0), "the range of its input is bounded"),
        (lambda: changed("torchao_row", act_quant_kwargs__hp_value_lb=3.0), "the range of its input is bounded"),
        (lambda: changed("torchao_row", block_size=[2, 256]), "its weight has a scale for each 2 × 256"),
        (lambda: changed("torchao_static", output_act_quant_scale=torch.ones(())), "its output is quantised, too"),
        (lambda: changed("torchao_static", act_quant_scale=torch.ones(6, 1)), "the scales of its input are given"),
        (lambda: changed("torchao_int8", act_quant_scale=torch.ones(())), "its input is quantised to INT8 by a scale"),
        (lambda: changed("torchao_int8", act_pre_scale=torch.ones(())), "its input is multiplied by another scale"),
        (lambda: changed("torchao_int8", act_quant_kwargs__mapping_type=ASYMMETRIC), "it is quantised asymmetrically"),
        (lambda: changed("torchao_int8", zero_point=torch.ones(128, 1)), "it is quantised asymmetrically"),
        (lambda: changed("torchao_int8", act_quant_kwargs__reduce_range=True), "its input is quantised to 7 bits"),
        (lambda: changed("torchao_int8", act_quant_kwargs__granularity=PER_TENSOR), "its input is quantised by PerT"),
        (lambda: changed("torchao_int8", block_size=[2, 256]), "its weight has a scale for each 2 × 256"),
        (lambda: changed("torchao_mxfp8", elem_dtype=torch.float8_e5m2), "its codes are torch.float8_e5m2 in groups"),
        (lambda: changed("torchao_mxfp8", block_size=16), "its codes are torch.float8_e4m3fn in groups of 16"),
        (lambda: changed("torchao_mxfp8", act_quant_kwargs__elem_dtype=torch.float8_e5m2), "its codes are torch.float"),
        (lambda: changed("torchao_mxfp8", act_quant_kwargs__block_size=16), "its codes are torch.float8_e4m3fn in gro"),
        (
            lambda: changed("torchao_mxfp8", act_quant_kwargs__scaling_mode=SimpleNamespace(name="EVEN")),
            "the scales of its input are rounded by EVEN",
        ),
        (lambda: finegrained(False, False), "its weight has one scale, and how its input is quantised"),
        (lambda: finegrained_with(block_size=(64, 128)), "its blocks are 64 × 128"),
        (lambda: finegrained_with(weight=nn.Parameter(torch.ones(144, 128))), "its weight is torch.float32"),
    ],
)
def test_a_linear_that_cannot_be_taken_over(make, reason: str) -> None:
    module = make()
    model = nn.Sequential(module)
    report = lower_linears_(model)
    assert not report.lowered
    assert report.left[0].reason.startswith(reason)
    assert model[0] is module


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"output_activations": "input_activations"}, "its output is quantised, too"),
        ({"weights": None}, "its weights are not quantised"),
        ({"input_activations": None}, "its input activations are not quantised"),
        ({"input_activations__symmetric": False}, "its input activations are quantised asymmetrically"),
        ({"weights__num_bits": 6}, "its weights are quantised as float6 channel static"),
        ({"input_activations__dynamic": False}, "its input activations are quantised as float8 token static"),
        ({"weights__type": "int", "weights__num_bits": 8}, "multiplies"),
    ],
)
def test_a_compressed_linear_that_cannot_be_taken_over(change: dict, reason: str) -> None:
    module = compressed("FP8_DYNAMIC", torch.bfloat16)
    scheme = module.quantization_scheme
    for field, value in change.items():
        target, _, key = field.rpartition("__")
        value = getattr(scheme, value) if isinstance(value, str) and hasattr(scheme, value) else value
        object.__setattr__(getattr(scheme, target) if target else scheme, key, value)
    report = lower_linears_(nn.Sequential(module))
    assert not report.lowered
    assert reason in report.left[0].reason


def test_every_converter_is_tested() -> None:
    # Experts have their tests in test_experts.py.
    assert {source(given.make()) for given in SOURCES.values()} == CONVERTERS.keys() - {"transformers.FP8Experts"}


def test_the_hook_that_decompresses_goes_with_the_last_linear() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor

    for extra in (False, True):
        model = nn.Sequential(compressed("FP8_DYNAMIC", torch.bfloat16))
        if extra:
            model.append(compressed("FP8_DYNAMIC", torch.bfloat16))
            model[1].register_forward_hook(lambda *args: None)
        ModelCompressor().add_decompress_hook(model)
        lower_linears_(model)
        assert bool(model._forward_pre_hooks) == extra


@pytest.mark.parametrize("name", ["torchao_tensor", "torchao_nvfp4", "finegrained_static"])
def test_the_compiled_model_is_the_same(name: str) -> None:
    layer = lowered(SOURCES[name].make())
    x = inputs(4, zeros=False)
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
        assert torch.equal(compiled(x), expected)
        assert compiled(x[:0]).shape == (0, expected.shape[1])


@pytest.mark.parametrize("name", SOURCES)
def test_a_lowered_model_fuses(name: str) -> None:
    """The quantisation is recognised as the scheme that it is, and folded into the norm in front of it."""
    layer = lowered(SOURCES[name].make())
    model = nn.Sequential(nn.RMSNorm(WIDTH, eps=1e-6, dtype=torch.bfloat16), layer)
    report = fusionpass.explain(model, inputs(4), config=fusionpass.Config(target=fusionpass.Arch("sm_100")))
    whole = layer.kind.amax_dtype is not None
    assert report.count("quantize" if whole else "rms_norm_quantize", scheme=str(layer.kind.input)) == 1, str(report)


SCHEMES = [
    *(given.scheme for given in SOURCES.values()),
    "fp8_static/fp8_token",
    "fp8_token/fp8_static",
    "nvfp4_tensor,rounding=divide",
    "fp8_tensor,amax_dtype=input/fp8_token,eps=0.001",
    "mxfp8/nvfp4",
]


@pytest.mark.parametrize("text", SCHEMES)
def test_a_scheme_is_what_its_string_says(text: str) -> None:
    kind = LinearScheme.parse(text)
    assert str(kind) == text
    assert LinearScheme.parse(str(kind)) == kind
