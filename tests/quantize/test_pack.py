"""pack_linears_: one storage, the same numbers, one product in a compiled model."""

import copy
import io
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fusionpass
from fusionpass import Arch, Config
from fusionpass.ops.quant import dequantize
from fusionpass.quantize import SCHEMES, QuantizedLinear, load_quantized_, pack_linears_, quantize_, save_quantized
from fusionpass.quantize.pack import PackedLinear
from tests.quantize.test_checkpoint import llama

KINDS = ["", *SCHEMES, "fp8_tensor", "fp8_static/fp8_token"]
"""Schemes; empty for plain linears."""
NAMES = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    def __init__(self, rows: tuple[int, int, int] = (256, 128, 144)) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(256, eps=1e-6)
        q, k, v = rows
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(256, q), nn.Linear(256, k, bias=False), nn.Linear(256, v)
        self.gate_proj, self.up_proj = (nn.Linear(256, 128, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = self.norm(x)
        y = nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
        # A rotation stands for what is done to queries and keys; values go to the attention as they are.
        return self.q_proj(h) * 1.5, self.k_proj(h) * 1.5, self.v_proj(h), y


X = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(5)).bfloat16()


def make(kind: str, seed: int = 0) -> Attention:
    torch.manual_seed(seed)
    model = Attention().bfloat16().eval()
    with torch.no_grad():
        model.k_proj.weight.mul_(1.37)
        model.up_proj.weight.mul_(0.7)
    if kind:
        quantize_(model, kind, [X] if kind.startswith(("fp8_static", "nvfp4")) else None)
    return model


def packed(kind: str, seed: int = 0) -> Attention:
    model = make(kind, seed)
    report = pack_linears_(model, unify_scales=True)
    assert len(report.packed) == 2, str(report)
    return model


def run(model: nn.Module) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return model(X)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(equal(a[name], b[name]) for name in a)


def one_storage(model: Attention) -> bool:
    """Whether the weights lie behind one another, and the whole on top of them."""
    weights = [getattr(model, name).weight for name in NAMES]
    starts = [weights[0].data_ptr()]
    for weight in weights:
        starts.append(starts[-1] + weight.numel() * weight.element_size())
    whole = model.q_proj.pack.layer.weight if model.q_proj.pack is not None else None
    there = whole is not None and whole.data_ptr() == starts[0]
    return there and [weight.data_ptr() for weight in weights] == starts[:-1]


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("fp8_static", "fp8_tensor", "nvfp4")])
def test_nothing_changes_in_eager_mode(kind: str) -> None:
    model = make(kind)
    before, expected = state(model), run(model)
    report = pack_linears_(model)
    assert [record.where for record in report.packed] == [NAMES, ("gate_proj", "up_proj")]
    assert report.packed[0].shape == (528, 256)
    assert not report.left
    assert one_storage(model)
    assert same(state(model), before)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in make(kind).named_modules()]
    assert all(map(equal, run(model), expected))


@pytest.mark.parametrize(("kind", "tokens"), [*((kind, 10) for kind in KINDS), ("fp8_token", 1)])
def test_a_compiled_model_has_one_product(kind: str, tokens: int) -> None:
    model = packed(kind)
    x = X.view(-1, 256)[:tokens]
    with torch.no_grad():
        report = fusionpass.explain(model, x, config=Config(target=Arch("sm_90")))
    text = report.graphs[0].snapshots[-1][1]
    products = [line for line in text.splitlines() if "_mm" in line.split("(")[0] and "=" in line]
    products += [line for line in text.splitlines() if " = aten.addmm" in line or " = aten.mm" in line]
    products += [line for line in text.splitlines() if " = torch.ops.fusionpass.linear.default" in line]
    made = [line for line in dict.fromkeys(products) if re.search("mm|linear", line.split("=")[1].split("(")[0])]
    assert len(made) == 2, "\n".join(made)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="Inductor's C++ keeps no bfloat16 roundings before torch 2.13")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_equals_eager(kind: str) -> None:
    model = packed(kind)
    expected = run(model)
    fusionpass.compile(model, numerics="eager", cache=False)
    for y, wanted in zip(run(model), expected, strict=True):
        assert y.shape == wanted.shape
        # The same codes and sums; a product of more columns may add them in another order.
        close = torch.isclose(y.float(), wanted.float(), rtol=2**-7, atol=2**-12)
        assert close.float().mean() > 0.995
        assert (y - wanted).float().norm() < 1e-2 * wanted.float().norm()


@pytest.mark.parametrize("kind", ["", "fp8_token", "fp8_static"])
def test_updates_reach_the_compiled_model(kind: str) -> None:
    model, other = packed(kind), packed(kind, seed=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert not equal(compiled(X)[1], run(other)[1])
        model.load_state_dict(other.state_dict())
        assert one_storage(model)
        assert all(map(torch.allclose, compiled(X), run(other)))
        assert all(map(equal, run(model), run(other)))
        model.k_proj.weight.view(torch.uint8).zero_()
        assert not compiled(X)[1].any()
        assert torch.allclose(compiled(X)[0], run(other)[0])


@pytest.mark.parametrize("kind", ["", "fp8_static", "fp8_token", "mxfp8"])
def test_moves_and_casts_keep_one_storage(kind: str) -> None:
    model = packed(kind)
    before = state(model)
    for move in (lambda m: m.half(), lambda m: m.to("cpu", torch.bfloat16), lambda m: m.eval(), lambda m: m.float()):
        move(model)
        assert one_storage(model)
    bias = model.q_proj.pack.layer.bias
    assert bias.dtype == torch.float32
    assert bias.shape == (528,)
    assert model.q_proj.bias.data_ptr() == bias.data_ptr()
    assert model.v_proj.bias.data_ptr() == bias[384:].data_ptr()
    assert not bias[256:384].any()
    if kind:
        assert all(
            equal(state(model)[name], before[name]) for name in before if "bias" not in name and "norm" not in name
        )
    empty = model.to("meta").to_empty(device="cpu")
    assert one_storage(empty)
    empty.load_state_dict(before)
    assert all(
        torch.allclose(a.float(), b.float(), atol=1e-2)
        for a, b in zip(run(empty.bfloat16()), run(packed(kind)), strict=True)
    )


def unpickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def assigned(model: Attention) -> Attention:
    model.load_state_dict(state(model), assign=True)
    return model


def rebound(model: Attention) -> Attention:
    for name in ("v_proj", "up_proj"):
        getattr(model, name).weight = nn.Parameter(getattr(model, name).weight.detach().clone(), requires_grad=False)
    return model


@pytest.mark.parametrize("kind", ["", "fp8_token", "fp8_static"])
@pytest.mark.parametrize("take_apart", [unpickled, assigned, rebound])
def test_what_takes_a_pack_apart(kind: str, take_apart: Callable) -> None:
    model = packed(kind)
    expected = run(model)
    other = take_apart(model)
    assert all(getattr(other, name).pack is None for name in (*NAMES, "gate_proj", "up_proj"))
    assert all(map(equal, run(other), expected))
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert all(map(equal, compiled(X), expected))
        other.k_proj.weight.view(torch.uint8).zero_()
        assert not compiled(X)[1].any()
    if other is not model:
        assert one_storage(model)
        assert all(map(equal, run(model), expected))


@pytest.mark.parametrize("kind", ["", "fp8_token", "fp8_static", "mxfp8"])
def test_a_copy_is_packed_by_itself(kind: str) -> None:
    model = packed(kind)
    expected = run(model)
    for other in (copy.deepcopy(model), copy.deepcopy(nn.Sequential(model))[0]):
        assert one_storage(other)
        assert other.q_proj.pack is other.v_proj.pack is not model.q_proj.pack
        assert other.q_proj.pack.shards == [getattr(other, name) for name in NAMES]
        assert same(state(other), state(model))
        with torch.no_grad():
            other.k_proj.weight.view(torch.uint8).zero_()
            compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
            assert not compiled(X)[1].any()
        assert all(map(equal, run(model), expected))
    alone = copy.deepcopy(model.k_proj)
    assert equal(alone(X), model.k_proj(X))


def test_a_compiled_model_notices_that_its_pack_is_gone() -> None:
    model = packed("fp8_token")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(X)
        codes = torch.zeros_like(model.k_proj.weight.view(torch.uint8)).view(torch.float8_e4m3fn)
        model.k_proj.weight = nn.Parameter(codes, requires_grad=False)
        assert not compiled(X)[1].any()


def test_gradients_of_plain_linears() -> None:
    """With gradients each linear is by itself, compiled too."""
    model = make("").float()
    reference = copy.deepcopy(model)
    pack_linears_(model)
    x = torch.randn(3, 256)
    for one in (torch.compile(model, backend="aot_eager"), reference):
        sum(y.square().sum() for y in one(x)).backward()
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    assert model.k_proj.weight.grad.any()


def test_scales_are_unified_on_request() -> None:
    model = make("fp8_static")
    with torch.no_grad():
        model.k_proj.input_scale = nn.Parameter(model.q_proj.input_scale * 1.7, requires_grad=False)
    before, expected = {n: values(getattr(model, n)) for n in NAMES}, run(model)
    left = pack_linears_(model)
    assert not left.packed
    assert {s.where: s.reason for s in left.left} == {
        **dict.fromkeys(NAMES, "they have different values of input_scale; unify_scales=True requantises them"),
        **dict.fromkeys(
            ("gate_proj", "up_proj"),
            "they have different values of weight_scale; unify_scales=True requantises them",
        ),
    }
    largest = max(getattr(model, n).weight_scale.item() for n in NAMES)
    input_scale = model.k_proj.input_scale.item()
    report = pack_linears_(model, unify_scales=True)
    assert report.packed[0].unified == ("input_scale", "weight_scale")
    assert "one input_scale and weight_scale" in str(report)
    for n in NAMES:
        layer = getattr(model, n)
        assert layer.weight_scale is model.q_proj.weight_scale
        assert layer.weight_scale.item() == largest
        assert layer.input_scale is model.q_proj.input_scale
        assert layer.input_scale.item() == input_scale
        moved = (values(layer) - before[n]).abs()
        bound = torch.maximum(before[n].abs() / 16, torch.tensor(largest * 2**-10))
        assert (moved <= bound * (1 + 1e-6)).all()
        # Half of it is not enough.
        assert not (moved <= bound / 2).all() or not moved.any()
    assert sum(bool((values(getattr(model, n)) != before[n]).any()) for n in NAMES) == 2
    for y, wanted in zip(run(model), expected, strict=True):
        assert (y - wanted).float().norm() < 0.06 * wanted.float().norm()


def test_global_scales_are_unified_on_request() -> None:
    """Codes stay; the scales of their groups are relative to the largest of the three then, and rounded anew."""
    model = make("nvfp4")
    before = {n: (values(getattr(model, n)), getattr(model, n).weight.clone()) for n in NAMES}
    told = "they have different values of weight_global_scale; unify_scales=True requantises them"
    assert {s.reason for s in pack_linears_(model).left} == {told}
    largest = max(getattr(model, n).weight_global_scale.item() for n in NAMES)
    assert pack_linears_(model, unify_scales=True).packed[0].unified == ("weight_global_scale",)
    for n in NAMES:
        layer, (old, codes) = getattr(model, n), before[n]
        assert layer.weight_global_scale is model.q_proj.weight_global_scale
        assert layer.weight_global_scale.item() == largest
        assert torch.equal(layer.weight, codes)
        moved = (values(layer) - old).abs()
        assert (moved <= torch.maximum(old.abs() / 16, torch.tensor(6 * largest * 2**-9)) * (1 + 1e-6)).all()
    assert sum(bool((values(getattr(model, n)) != before[n][0]).any()) for n in NAMES) == 2


def values(layer: QuantizedLinear) -> torch.Tensor:
    given = layer.weight_global_scale
    return dequantize(layer.weight, layer.weight_scale, layer.kind.weight, given).detach().double()


class Twice(nn.Linear):
    pass


def hooked(linear: nn.Module) -> nn.Module:
    linear.register_forward_hook(lambda *args: None)
    return linear


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.__setattr__("k_proj", m.q_proj), "one is registered under two names"),
        (
            lambda m: m.__setattr__("k_proj", Twice(256, 128)),
            "Twice is a subclass of nn.Linear and may do more than one",
        ),
        (lambda m: hooked(m.v_proj), "it carries forward hooks"),
        (lambda m: m.v_proj.register_forward_pre_hook(lambda *args: None), "it carries forward hooks"),
        (lambda m: m.k_proj.__setattr__("forward", m.q_proj.forward), "it carries forward hooks"),
        (lambda m: m.__setattr__("k_proj", nn.Linear(256, 128, device="meta")), "its weight is not loaded"),
        (lambda m: quantize_(m, "fp8_token", skip=["q_proj", "v_proj"]), "only some of them are quantised"),
        (lambda m: m.__setattr__("k_proj", nn.Linear(128, 128).bfloat16()), "they have different inputs"),
        (lambda m: m.__setattr__("k_proj", nn.Linear(256, 128)), "they have different dtypes"),
        (lambda m: m.k_proj.requires_grad_(False), "they have different dtypes"),
        (lambda m: m.v_proj.bias.__setattr__("data", m.v_proj.bias.data.float()), "their biases have different dtypes"),
    ],
)
@pytest.mark.filterwarnings("ignore::fusionpass.errors.ShardWarning")
def test_linears_that_are_left_alone(change: Callable, reason: str) -> None:
    model = make("")
    change(model)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    report = pack_linears_(model)
    assert {s.where: s.reason for s in report.left} == dict.fromkeys(NAMES, reason)
    assert all(p.data_ptr() == before[name] for name, p in model.named_parameters() if "_proj" in name[:6])


def test_linears_quantised_otherwise_are_left_alone() -> None:
    model = make("")
    with pytest.warns(fusionpass.errors.ShardWarning):
        quantize_(model, "fp8_token", skip="k_proj")
    quantize_(model, "int8_token")
    assert {s.reason for s in pack_linears_(model).left} == {"they have different schemes"}
    torch.manual_seed(0)
    blocks = Attention((144, 128, 128)).bfloat16()
    quantize_(blocks, "fp8_group128")
    reasons = {s.where: s.reason for s in pack_linears_(blocks).left}
    assert reasons == dict.fromkeys(NAMES, "their scales are of blocks of 128 rows, and one ends within a block")
    again = pack_linears_(packed("fp8_token"))
    assert {s.reason for s in again.left} == {"they are packed already"}
    assert {s.reason for s in pack_linears_(packed("")).left} == {
        "PackedLinear is a subclass of nn.Linear and may do more than one"
    }


class Cross(Attention):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q_proj(x), self.k_proj(x + 1), self.v_proj(x + 1), self.gate_proj(x) * self.up_proj(x)


@pytest.mark.parametrize("kind", ["", "fp8_token"])
def test_an_example_tells_what_reads_one_input(kind: str) -> None:
    model = Cross().bfloat16().eval()
    if kind:
        quantize_(model, kind)
    expected = run(model)
    report = pack_linears_(model, example=[X])
    assert {s.where: s.reason for s in report.left} == dict.fromkeys(NAMES, "they read different inputs")
    assert report.packed[0].where == ("gate_proj", "up_proj")
    # Without one they are packed, and still compute what they did.
    pack_linears_(model)
    assert one_storage(model)
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(X)
    assert all(torch.allclose(a, b, rtol=2**-7, atol=1e-2) for a, b in zip(found, expected, strict=True))


def test_names_of_ones_own_and_the_report() -> None:
    model = nn.ModuleDict({"a": nn.Linear(32, 16), "b": nn.Linear(32, 32), "c": nn.Linear(32, 16)})
    report = pack_linears_(model, names=[("a", "c")])
    assert isinstance(model["a"], PackedLinear)
    assert type(model["b"]) is nn.Linear
    assert str(report) == "1 packs of linears\n  a, c: 32 → 32"
    assert report.to_dict()["packed"][0]["where"] == ("a", "c")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind])
def test_a_packed_model_is_saved_as_it_was(kind: str, tmp_path) -> None:
    model = packed(kind)
    save_quantized(model, tmp_path)
    other = make("", seed=1)
    load_quantized_(other, tmp_path)
    assert same(state(other), state(model))


@pytest.mark.parametrize("tokens", [200, 3])
def test_a_language_model_has_a_product_less_for_each_shard(tokens: int) -> None:
    """With many rows, too, where no kernel of several weights applies; the rotation takes the columns as they lie."""
    model = llama().bfloat16()
    quantize_(model, "fp8_token", skip="lm_head")
    ids = torch.arange(tokens).remainder(64)[None]
    counts = []
    for _ in range(2):
        config = Config(target=Arch("sm_90"))
        report = fusionpass.explain(model, ids, use_cache=False, config=config)
        text = "\n".join(graph.snapshots[-1][1] for graph in report.graphs)
        ours = r"torch\.ops\.fusionpass\.(?:scaled_mms?|linear)"
        products = re.findall(rf"= (?:{ours}|aten\._scaled_mm|aten\.mm)\.default", text)
        counts.append((len(products), report.count("qk_rope"), report.count("silu_mul_quantize")))
        pack_linears_(model)
    layers, head = 2, 1
    assert counts[1] == (4 * layers + head, layers, layers)
    assert counts[0] == ((7 if tokens == 200 else 4) * layers + head, layers, layers)
