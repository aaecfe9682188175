"""Compiled models on a GPU: kernels launched from Inductor's wrapper, eager's numbers, CUDA-graph capture."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import fusionpass
from fusionpass.ops.norm import NORM
from fusionpass.ops.quant import CODES
from fusionpass.testing import difference
from tests.models import FP8, Block, LlamaNorm, static

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


class Layer(nn.Module):
    """Add, norm, quantise, FP8 GEMM: what one half of a transformer layer does around its linears."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LlamaNorm(width)
        self.scale = nn.Parameter(torch.tensor(0.02), requires_grad=False)
        weight = (torch.randn(width, width) / math.sqrt(width) * 64).to(FP8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.tensor(1 / 64), requires_grad=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        residual = x + residual
        codes = static(self.norm(residual), self.scale)
        rows = codes.reshape(-1, codes.shape[-1])
        out = torch._scaled_mm(rows, self.weight.t(), self.scale, self.weight_scale, out_dtype=torch.bfloat16)
        return out.view(x.shape), residual


class Stack(nn.Module):
    """Layers in a row, as a model has them."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in self.layers:
            x, residual = layer(x, residual)
        return x, residual


@pytest.fixture(autouse=True)
def _inference() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def launches(model: Any, *args: Any) -> list[str]:
    """Names of the kernels that one call runs."""
    model(*args)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        model(*args)
        torch.cuda.synchronize()
    return [e.key for e in profile.key_averages() for _ in range(e.count) if e.device_type.name == "CUDA"]


@pytest.mark.parametrize("tokens", [1, 7, 64, 1024])
@pytest.mark.parametrize("width", [576, 2880, 4096])
def test_one_kernel_and_eagers_numbers(tokens: int, width: int) -> None:
    model = Block(width).cuda()
    x, residual = (torch.randn(2, tokens, width, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    expected = model(x, residual)
    compiled = fusionpass.compile(copy.deepcopy(model))
    got = compiled(x, residual)
    assert torch.equal(expected[1], got[1]), "the residual sum is exact"
    codes = [out[0][0].view(FP8) for out in (expected, got)]
    found = difference(codes[1], codes[0])
    assert found.within(CODES), found
    report = fusionpass.report(compiled)
    assert report.count("add_rms_norm_quantize", scheme="fp8_static") == 1
    assert report.fused[0].backend in ("triton", "inductor")


def test_the_kernel_runs_and_nothing_is_copied() -> None:
    model = fusionpass.compile(Stack(2048, 3).cuda(), cuda_graphs="off")
    x, residual = (torch.randn(8, 2048, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    names = launches(model, x, residual)
    report = fusionpass.report(model)
    assert report.count("add_rms_norm_quantize") == 3
    assert {r.backend for r in report.fused} == {"triton"}
    assert not [name for name in names if "copy" in name.lower() or "Memcpy" in name], names
    others = [name for name in names if "norm" in name]
    assert len(others) == 3, names


def test_full_width_of_the_output_is_written() -> None:
    """A symbolic token count, run at sizes that it was not traced with."""
    model = Block(1536).cuda()
    compiled = fusionpass.compile(copy.deepcopy(model))
    for tokens in (16, 5, 1, 300):
        x, residual = (torch.randn(tokens, 1536, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(residual, 0)
        expected, got = model(x, residual), compiled(x, residual)
        assert torch.equal(expected[1], got[1])
        found = difference(got[0][0].view(FP8), expected[0][0].view(FP8))
        assert found.within(CODES), (tokens, found)
    assert len(fusionpass.report(compiled).graphs) <= 2, "one symbolic graph, and one for a single token"


def test_a_strided_row_is_read_in_place() -> None:
    norm = LlamaNorm(1024).cuda()
    compiled = fusionpass.compile(lambda x: norm(x))
    packed = torch.randn(33, 3072, dtype=torch.bfloat16, device="cuda")
    for start in (0, 1024, 2048):
        x = packed[:, start : start + 1024]
        found = difference(compiled(x), norm(x))
        assert found.within(NORM), found


def test_pdl_chains_do_not_race() -> None:
    """Few tokens launch with PDL: each kernel reads what the one before has just written."""
    model = Stack(4096, 6).cuda()
    compiled = fusionpass.compile(copy.deepcopy(model), numerics="eager")
    x, residual = (torch.randn(1, 4096, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    expected = [t.clone() for t in compiled(x, residual)]
    for _ in range(200):
        got = compiled(x, residual)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    eager = model(x, residual)
    assert torch.allclose(eager[0].float(), expected[0].float(), rtol=0.05, atol=0.05 * eager[0].abs().max().item())


def test_under_a_cuda_graph() -> None:
    compiled = fusionpass.compile(Stack(2048, 4).cuda())
    x, residual = (torch.randn(16, 2048, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    expected = [t.clone() for t in compiled(x, residual)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        compiled(x, residual)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = compiled(x, residual)
    for t in outputs:
        t.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs, strict=True))


def test_quantised_llama_generates_alike() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=1024, max_position_embeddings=256,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    ids = torch.randint(0, 1024, (1, 24), device="cuda")
    fusionpass.quantize_(model, "fp8_static", calibration=[{"input_ids": ids}], skip=("lm_head",))
    expected = model(input_ids=ids, use_cache=False).logits
    fusionpass.compile(model, numerics="eager")
    got = model(input_ids=ids, use_cache=False).logits
    report = fusionpass.report(model)
    assert report.count("rms_norm_quantize") == 1
    assert report.count("add_rms_norm_quantize") == 5
    assert {r.backend for r in report.fused if "norm" in r.op} == {"triton"}
    error = (got.float() - expected.float()).norm() / expected.float().norm()
    assert error < 0.02, f"{error}: bf16 rounding alone gives about 0.005"
