import copy
from unittest import mock

import pytest
import torch
from torch import nn

import fusionpass
from fusionpass import Arch, Config, explain, inductor
from fusionpass.errors import BuildError
from fusionpass.inductor import Compiled
from tests.models import FP8, Block, LlamaNorm, static

SM90 = Config(target=Arch("sm_90"))


def _pair(tokens=3, width=16, dtype=torch.bfloat16):
    return torch.randn(tokens, width).to(dtype), torch.randn(tokens, width).to(dtype)


@pytest.fixture(autouse=True)
def _no_code():
    """Nothing here may generate code, let alone run a kernel."""
    with mock.patch("torch._inductor.graph.GraphLowering.codegen", side_effect=AssertionError("code was generated")):
        yield


@pytest.mark.parametrize(
    ("target", "backend", "reason"),
    [
        (None, "inductor", "a CPU target: Inductor writes C++"),
        (Arch("cpu"), "inductor", "a CPU target: Inductor writes C++"),
        (Arch("sm_90"), "triton", ""),
        (Arch("sm_100"), "triton", ""),
        (Arch("sm_80"), "inductor", "triton: "),
        (Arch("gfx942"), "inductor", "triton: "),
        (Arch("gfx950"), "triton", ""),
    ],
    ids=str,
)
def test_any_target_on_any_machine(target, backend, reason):
    report = explain(Block(16), *_pair(), config=Config(target=target))
    (record,) = report.fused
    assert (record.op, record.scheme, record.where) == ("add_rms_norm_quantize", "fp8_static", "norm")
    assert record.rules == ("norm.llama", "norm.add", "quant.fp8_static", "norm.add_quantize")
    assert record.backend == backend
    assert reason in record.reason
    assert record.source.startswith(f"{__file__.replace('test_explain', 'models')}:")
    assert (report.title, len(report.graphs), report.kernels) == ("Block", 1, 0)
    assert not report.refused
    assert not report.missed


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head, self.norm = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False), LlamaNorm(16)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.zeros(16))
        self.to(torch.bfloat16)

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids) + self.shift))


@pytest.mark.parametrize("config", [None, SM90])
def test_the_model_is_untouched(config):
    model = _Tied().train()
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    before = {name: (id(t), t.data_ptr(), t.device, t.requires_grad, t.clone()) for name, t in tensors.items()}
    attributes = {id(m): set(vars(m)) for m in model.modules()}
    ids = torch.zeros(1, 4, dtype=torch.int64)
    report = explain(model, ids, config=config)
    assert report.count("rms_norm") == 1
    after = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    assert before.keys() == after.keys()
    for name, (identity, pointer, device, gradient, copied) in before.items():
        t = after[name]
        assert (id(t), t.data_ptr(), t.device, t.requires_grad) == (identity, pointer, device, gradient), name
        assert type(t) in (torch.Tensor, nn.Parameter), name
        assert torch.equal(t, copied), name
    assert {id(m): set(vars(m)) for m in model.modules()} == attributes
    assert model.training
    assert type(ids) is torch.Tensor
    assert model(ids).shape == (1, 4, 32)


@pytest.mark.parametrize("config", [None, SM90])
def test_a_table_that_is_a_view_of_another_dtype(config):
    model = _Tied()
    model.shift = torch.zeros(4, 16).unsqueeze(0)
    model.shift.data = model.shift.data.bfloat16()
    assert model.shift._base.dtype == torch.float32
    report = explain(model, torch.zeros(1, 4, dtype=torch.int64), config=config)
    assert [record.op for record in report.fused] == ["add_rms_norm", *(["linear"] if config is not None else [])]


def test_no_memory_for_the_model():
    with torch.device("meta"):
        norm = LlamaNorm(1 << 40)
    report = explain(norm.to(torch.bfloat16), torch.empty(4, 1 << 40, dtype=torch.bfloat16, device="meta"), config=SM90)
    assert report.count("rms_norm") == 1


def test_a_function():
    def attention_input(x, weight, scale):
        norm = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
        return static(weight * norm.to(x.dtype), scale)

    x, _ = _pair()
    report = explain(attention_input, x, scale=torch.tensor(0.1), weight=torch.ones(16).bfloat16(), config=SM90)
    assert report.title == "attention_input"
    assert [(r.op, r.backend) for r in report.fused] == [("rms_norm_quantize", "triton")]


def test_refused_and_missed_have_reasons_and_lines():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = LlamaNorm(16), LlamaNorm(16)

        def forward(self, x, gamma):
            h = x.float() + 1
            missed = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6).tanh()
            return self.a(x), self.b(gamma), missed

    report = explain(Odd(), *_pair(), config=Config(disable={"rms_norm"}))
    assert [(r.op, r.where, r.reason) for r in report.refused] == [
        ("rms_norm", name, "rms_norm is disabled by Config.disable") for name in ("a", "b")
    ]
    (missed,) = report.missed
    assert (missed.op, missed.rule) == ("rms_norm", "norm.llama")
    assert missed.reason.startswith("matched 4 of 8 nodes, then at add: expected a cast to float32, found aten.add")
    assert "torch.rsqrt(" in missed.source
    assert missed.source.startswith(f"{__file__}:")


def test_a_refused_addition_is_told_although_the_quantisation_fused():
    report = explain(Block(16), *_pair(), config=Config(disable={"norm.add"}))
    assert report.count("rms_norm_quantize") == 1
    assert [r.rule for r in report.refused] == ["norm.add"]


def test_graph_breaks_are_reported():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = LlamaNorm(16), LlamaNorm(16)

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    report = explain(Broken(), _pair()[0])
    assert len(report.graphs) == 2
    assert [r.where for r in report.fused] == ["first", "second"]
    (reason,) = report.graph_breaks
    assert "graph_break" in reason
    assert f"graph break: {reason}" in str(report)


def test_a_compiled_model_keeps_what_it_has():
    block, inputs = Block(16), _pair()
    with mock.patch.object(inductor, "compile_graph", side_effect=lambda gm, *_, **__: Compiled(gm)):
        fusionpass.compile(block)
        with torch.no_grad():
            block(*inputs)
            own = fusionpass.report(block)
            assert len(own.graphs) == 1
            assert explain(block, *inputs, config=SM90).count("add_rms_norm_quantize") == 1
            block(*inputs)
    assert len(own.graphs) == 1
    # Up to torch 2.13 a trace cannot be kept apart from the compiled code: the model is traced once more, and has it.
    isolated = "isolate_recompiles" in torch.compile.__code__.co_varnames
    assert len(own.model_graphs) == (1 if isolated else 2)
    assert fusionpass.report(block) is own


def test_as_often_as_one_likes():
    # Dynamo compiles one function eight times and then runs it eagerly, without a word.
    block, inputs = Block(16), _pair()
    for _ in range(10):
        assert explain(block, *inputs).count("add_rms_norm_quantize") == 1
        assert explain(copy.deepcopy(block), *inputs).count("add_rms_norm_quantize") == 1


def test_in_the_middle_of_inference():
    with torch.inference_mode():
        x, residual = _pair()
        assert explain(Block(16), x, residual).count("add_rms_norm_quantize") == 1


def test_a_mistake_in_the_model_is_its_own():
    with pytest.raises(Exception, match=r"(?s)shape|broadcast|size"):
        explain(Block(16), *_pair(width=15))


LAYERS = 3


def _llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


@pytest.mark.parametrize(("config", "backend"), [(None, "inductor"), (SM90, "triton")])
def test_llama(config, backend):
    model, ids = _llama(), torch.randint(3, 64, (1, 7))
    plain = explain(model, ids, use_cache=False, config=config)
    assert (plain.count("rms_norm"), plain.count("add_rms_norm"), plain.count("silu_mul")) == (1, 2 * LAYERS, LAYERS)
    assert plain.count("qk_rope") == LAYERS
    kernels = LAYERS if config is not None else 0
    assert plain.count("attention") == kernels, "on a CPU the call stays"
    assert plain.count("linear") == (7 * LAYERS + 1 if config is not None else 0), "so do products"
    assert len(plain.fused) == 4 * LAYERS + 1 + kernels + plain.count("linear")

    fusionpass.quantize_(model, "fp8_static", calibration=[ids], skip=("lm_head",), progress=False)
    report = explain(model, ids, use_cache=False, config=config)
    assert report.count("rms_norm_quantize", scheme="fp8_static") == 1
    assert report.count("add_rms_norm_quantize", scheme="fp8_static") == 2 * LAYERS - 1
    assert report.count("add_rms_norm") == 1
    assert report.count("silu_mul_quantize", scheme="fp8_static") == LAYERS, "what down_proj reads"
    attended = "quantize" if config is None else "attention_quantize"
    assert report.count(attended) == LAYERS, "what o_proj reads"
    assert {r.backend for r in report.fused} == {backend}
    norms = [r.where for r in report.fused if "norm" in r.op]
    assert norms == [
        *(
            f"model.layers.{i}.{name}"
            for i in range(LAYERS)
            for name in ("input_layernorm", "post_attention_layernorm")
        ),
        "model.norm",
    ]
    assert not report.refused
    assert not report.missed
    assert not report.graph_breaks
    assert next(model.parameters()).device.type == "cpu"
    assert FP8 in {p.dtype for p in model.parameters()}


def test_an_op_that_a_module_calls_says_where():
    """No rule made it, so that only the call itself tells."""

    class Attention(nn.Module):
        def forward(self, x):
            q = x.view(1, 4, 3, 64)
            return nn.functional.scaled_dot_product_attention(q, q, q).reshape(3, 256)

    model = nn.Sequential(Attention(), nn.Linear(256, 128)).bfloat16()
    fusionpass.quantize_(model, "mxfp8")
    report = explain(model, torch.randn(3, 256).bfloat16(), config=SM90)
    found = {record.op: (record.where, record.source) for record in report.fused}
    assert found["attention"][0] == "0"
    assert "scaled_dot_product_attention" in found["attention"][1]
    assert found["block_scaled_mm"][0] == "1"
    assert "block_scaled_mm(" in found["block_scaled_mm"][1]


def test_a_build_of_torch_without_gpus_says_so(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(BuildError, match=r"sm_90: this build of torch has no GPUs, .* Install one for CUDA or ROCm"):
        fusionpass.explain(Block(16), torch.randn(3, 16), torch.randn(3, 16), config=Config(target=Arch("sm_90")))
