"""The heads' kernel on the device, alone and in compiled models, where it writes to the cache itself."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fusionpass
from fusionpass.arch import Arch
from fusionpass.ops import qk_norm_rope
from fusionpass.ops.rope import NORMED
from fusionpass.testing import difference
from tests.heads import HEAD_OPS, arguments_for_heads, check_heads

DEVICE = torch.device("cuda")
many = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("op", HEAD_OPS, ids=lambda op: op.name)
@many
@given(data=st.data())
def test_drawn_arguments(op, data):
    check_heads(op, Arch.of(DEVICE), data.draw(arguments_for_heads(op, "cuda", most=40)))


@pytest.mark.parametrize("op", HEAD_OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 64, 4097])
def test_sizes_of_models(op, dtype, tokens):
    generator = torch.Generator("cuda").manual_seed(0)
    check_heads(op, Arch.of(DEVICE), op.bind((), op.sample(tokens, 4096, dtype, "cuda", generator)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 64, 4097])
@pytest.mark.parametrize(("q_heads", "k_heads", "width"), [(32, 8, 128), (16, 16, 128), (12, 3, 80)])
def test_norms_of_whole_tokens_at_sizes_of_models(q_heads, k_heads, width, tokens, dtype):
    """As OLMo2 and OLMoE have it."""
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    q, k = (drawn(2, tokens, n, width).transpose(1, 2) for n in (q_heads, k_heads))
    table = {name: drawn(1, 1, tokens, width) for name in ("cos", "sin")}
    weights = {"q_weight": drawn(q_heads * width), "k_weight": drawn(k_heads * width)}
    check_heads(qk_norm_rope, Arch.of(DEVICE), qk_norm_rope.bind((q, k), {**table, **weights, "heads_dim": 1}))


class Attention(torch.nn.Module):
    """What stands in front of attention in Qwen3, over a cache of its own."""

    def __init__(self, slots: int) -> None:
        super().__init__()
        for name in ("q", "k"):
            weight = torch.rand(128, device=DEVICE).add(0.5).bfloat16()
            setattr(self, f"{name}_weight", torch.nn.Parameter(weight, requires_grad=False))
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(2, 2, slots, 128, device=DEVICE, dtype=torch.bfloat16))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        def turned(x: Tensor, weight: Tensor) -> Tensor:
            h = x.unflatten(-1, (-1, 128)).float()
            h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
            y = (weight * h).transpose(1, 2)
            half = torch.cat((-y[..., 64:], y[..., :64]), -1)
            return y * cos.unsqueeze(1) + half * sin.unsqueeze(1)

        self.keys.index_copy_(2, at, turned(k, self.k_weight))
        self.values.index_copy_(2, at, v.unflatten(-1, (-1, 128)).transpose(1, 2))
        return turned(q, self.q_weight), self.keys.float().sum(2)


@pytest.mark.parametrize("graphs", ["off", "auto"])
def test_compiled_over_a_cache(graphs):
    torch.manual_seed(0)
    eager, compiled = Attention(64), Attention(64)
    compiled.load_state_dict(eager.state_dict())
    fusionpass.compile(compiled, cuda_graphs=graphs)
    where = compiled.keys.data_ptr()
    for step in range(12):
        tokens = 5 if step == 0 else 1
        q, k, v = (torch.randn(2, tokens, n * 128, device=DEVICE).bfloat16() for n in (8, 2, 2))
        angles = torch.rand(1, tokens, 128, device=DEVICE) * 6.3
        at = torch.arange(tokens, device=DEVICE) + (0 if step == 0 else 4 + step)
        given_: Any = (q, k, v, angles.cos().bfloat16(), angles.sin().bfloat16(), at)
        with torch.no_grad():
            expected, got = eager(*given_), compiled(*given_)
        assert difference(got[0], expected[0], NORMED).within(NORMED)
        assert difference(compiled.keys, eager.keys, NORMED).within(NORMED)
        assert torch.equal(compiled.values, eager.values)
        assert compiled.keys.data_ptr() == where
    report = fusionpass.report(compiled)
    records = [record for record in report.fused if record.op == "qk_norm_rope_cache"]
    assert records
    assert {(record.backend, record.reason) for record in records} == {("triton", "")}, "in place"
