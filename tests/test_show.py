"""The printer: what it prints is Python that computes the same."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fusionpass import ops
from fusionpass.report.show import show


def _graph(function, *args, mode="fake"):
    return make_fx(function, tracing_mode=mode)(*args).graph


def _run(text, *args):
    """What the printed function returns."""
    scope = {}
    exec(compile(text, "<shown>", "exec"), scope)
    return scope["forward"](*args)


def _norm(x, weight):
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _mixed(x, weight):
    low, high = x.split([2, 6], dim=-1)
    masked = torch.where(high > 0, high, float("-inf")).amax(-1, keepdim=True)
    filled = torch.full((4, 1), float("nan")).nan_to_num(3.0)
    steps = torch.arange(4, device="cpu", dtype=torch.int64)[:, None]
    return torch.cat([low, masked.clamp(max=float("inf")), filled], 1) + steps, weight[None, ::2].sum()


def _fused(x, weight):
    return ops.add_rms_norm_quantize(
        x, x, weight, scale=torch.full((), 0.02), scheme="fp8_static,rounding=divide", norm_out=True
    )


X, W = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.rand(8) + 0.5


@pytest.mark.parametrize("rename", [False, True])
@pytest.mark.parametrize("function", [_norm, _mixed, _fused])
def test_the_text_computes_what_the_graph_does(function, rename):
    found = _run(show(_graph(function, X, W), rename), X, W)
    expected = function(X, W)
    found, expected = (r if isinstance(r, tuple | list) else [r] for r in (found, expected))
    assert len(found) == len(expected)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(found, expected, strict=True))


def test_symbolic_sizes_compute_too():
    def function(x):
        return x.new_zeros(x.shape[0] * 2, x.shape[1] + 1), x.reshape(-1)[: x.shape[0] // 2]

    graph = _graph(function, torch.randn(6, 5), mode="symbolic")
    assert any(getattr(node.target, "__module__", "") == "_operator" for node in graph.nodes), "sizes are computed"
    other = torch.randn(10, 3)
    found = _run(show(graph), other)
    assert [tuple(t.shape) for t in found] == [(20, 4), (5,)]


def test_each_value_has_its_type_beside_it():
    lines = show(_graph(lambda x: x[:, ::2].to(torch.bfloat16).t(), X)).splitlines()
    assert "    x_1,  # f32[4, 8]" in lines
    assert any(line.endswith("# f32[4, 4] strides (8, 2)") for line in lines)
    assert any(line.endswith("# bf16[4, 4] strides (1, 4)") for line in lines)


def test_lists_of_results_have_all_their_types():
    (line,) = [line for line in show(_graph(_fused, X, W)).splitlines() if "add_rms_norm_quantize.default(" in line]
    assert line.endswith("# e4m3[4, 8], f32[4, 8], f32[4, 8]")
    assert "'fp8_static,rounding=divide', None" in line


def test_renaming_forgets_names_alone():
    def one(x, weight):
        return _norm(x, weight)

    def two(hidden, gamma):
        return _norm(hidden, gamma)

    a, b = _graph(one, X, W), _graph(two, X, W)
    for node in b.nodes:
        if node.op == "call_function":
            node._rename(f"other_{node.name}")
    assert show(a) != show(b)
    assert show(a, rename=True) == show(b, rename=True)


@pytest.mark.parametrize(
    "other",
    [
        lambda x, w: w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype),
        lambda x, w: _norm(x, w) + 0,
        lambda x, w: _norm(x.bfloat16(), w),
        lambda w, x: _norm(x, w),
    ],
    ids=["eps", "one more", "dtype", "order"],
)
def test_renaming_keeps_every_difference(other):
    args = (W, X) if other.__code__.co_varnames[0] == "w" else (X, W)
    assert show(_graph(other, *args), rename=True) != show(_graph(_norm, X, W), rename=True)


def test_graphs_without_inputs_and_without_types():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.aten.neg.default, (x,)),))
    assert _run(show(graph), X)[0].equal(-X)
    empty = torch.fx.Graph()
    empty.output(())
    assert _run(show(empty)) == ()
