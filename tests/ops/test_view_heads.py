import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from fusionpass.aot import compile_launch
from fusionpass.arch import Arch
from fusionpass.config import Config
from fusionpass.errors import ArgumentError
from fusionpass.ops import qk_norm, view_heads
from fusionpass.pipeline import early, late
from fusionpass.report.trace import GraphTrace

HEAD = 16
KEEPS = [None, Arch("cpu"), Arch("sm_80"), Arch("sm_90"), Arch("sm_100")]
COPIES = [Arch("gfx942"), Arch("gfx950")]


def _packed(*leading, q=4, kv=1):
    """The q, k and v slices of a packed row, as a fused QKV projection gives them."""
    width = (q + 2 * kv) * HEAD
    qkv = torch.arange(1.0, 1 + torch.Size(leading).numel() * width)
    return qkv.view(*leading, width).split([q * HEAD, kv * HEAD, kv * HEAD], dim=-1)


@pytest.mark.parametrize("arch", KEEPS, ids=str)
@pytest.mark.parametrize("leading", [(5,), (2, 5), (1,), (0,)])
def test_a_strided_slice_is_not_copied(arch, leading):
    for x in _packed(*leading):
        heads = view_heads(x, HEAD, arch)
        assert heads.shape == (*leading, x.shape[-1] // HEAD, HEAD)
        # A dimension of one element has no step.
        steps = zip(leading, heads.stride(), x.stride(), strict=False)
        assert all(found == old for size, found, old in steps if size > 1)
        assert heads.stride()[-2:] == (HEAD, 1)
        assert heads.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert heads.storage_offset() == x.storage_offset()
        assert torch.equal(heads.flatten(-2), x)


def test_writing_through_the_view():
    q, k, _ = _packed(3)
    view_heads(q, HEAD)[1, 2, 3] = -7
    assert q[1, 2 * HEAD + 3] == -7
    assert (k > 0).all()


@pytest.mark.parametrize("arch", COPIES, ids=str)
@pytest.mark.parametrize("leading", [(5,), (2, 5), (1,), (0,)])
def test_rocm_gets_contiguous_rows(arch, leading):
    # One KV head: reshape alone would hand back the strided slice.
    for x in _packed(*leading, kv=1):
        heads = view_heads(x, HEAD, arch)
        assert heads.shape == (x.numel() // HEAD, HEAD)
        assert heads.is_contiguous()
        assert torch.equal(heads.reshape(x.shape), x)


@pytest.mark.parametrize("arch", COPIES, ids=str)
def test_rocm_leaves_the_packed_rows_alone(arch):
    q, _, _ = _packed(5)
    before = q.clone()
    view_heads(q, HEAD, arch).zero_()
    assert torch.equal(q, before)


@pytest.mark.parametrize("arch", [*KEEPS, *COPIES], ids=str)
@pytest.mark.parametrize("head_dim", [0, -16, 24, 7])
def test_bad_head_dim(arch, head_dim):
    with pytest.raises(ArgumentError, match=f"not a multiple of head_dim {head_dim}"):
        view_heads(torch.zeros(5, 64), head_dim, arch)


def test_no_dimensions():
    with pytest.raises(ArgumentError, match=r"x has shape \(\)"):
        view_heads(torch.zeros(()), 1)


def test_it_compiles_without_a_copy():
    q, _, _ = _packed(5)
    heads = torch.compile(lambda x: view_heads(x, HEAD), backend="aot_eager", fullgraph=True)(q)
    assert heads.stride() == (6 * HEAD, HEAD, 1)
    assert heads.data_ptr() == q.data_ptr()


@pytest.mark.parametrize("arch", [*KEEPS, *COPIES], ids=str)
def test_a_copy_can_be_asked_for_and_turned_off(arch):
    q, k, _ = _packed(5)
    kept, copied = view_heads(q, HEAD, arch, copy=False), view_heads(k, HEAD, arch, copy=True)
    assert kept.data_ptr() == q.data_ptr()
    assert kept.stride() == (6 * HEAD, HEAD, 1)
    assert copied.shape == (5, HEAD)
    assert copied.data_ptr() != k.data_ptr()
    assert copied.is_contiguous()


def _graph(arch, copy=None):
    """The graph, after the passes, of a norm of heads that lie in a packed row; and its ops."""

    def model(qkv, weight):
        q, k, _ = qkv.split([4 * HEAD, HEAD, HEAD], -1)
        q, k = (view_heads(x, HEAD, arch, copy) for x in (q, k))
        wide = [x.float() for x in (q, k)]
        return [weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(qkv.dtype) for x in wide]

    trace, config = GraphTrace(0), Config(target=arch)
    traced = make_fx(model, select_decomp_table(), "fake")(
        *(torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((5, 6 * HEAD), (HEAD,)))
    )
    for _, function in (*early(config, trace), *late(config, trace)):
        function(traced.graph)
    return traced.graph, trace


VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default)


@pytest.mark.parametrize("arch", COPIES, ids=str)
def test_the_graph_for_rocm_holds_the_copies_and_no_view_of_a_strided_tensor(arch):
    graph, trace = _graph(arch)
    copies = [node for node in graph.nodes if node.target is torch.ops.aten.clone.default]
    assert len(copies) == 2, "one of q, one of k"
    assert all(not node.args[0].meta["val"].is_contiguous() for node in copies)
    assert all(node.meta["val"].is_contiguous() for node in copies)
    views = [node for node in graph.nodes if node.target in VIEWS]
    assert all(node.args[0].meta["val"].is_contiguous() for node in views)
    assert [record.backend for record in trace.fused] == ["triton", "triton"]


@pytest.mark.parametrize("arch", [Arch("sm_90"), Arch("sm_100")], ids=str)
def test_the_graph_for_cuda_holds_none(arch):
    graph, _ = _graph(arch)
    assert not [node for node in graph.nodes if node.target is torch.ops.aten.clone.default]


@pytest.mark.parametrize("arch", COPIES, ids=str)
def test_on_rocm_a_kernel_follows_the_strides_where_no_copy_is_wanted(arch):
    qkv = torch.zeros(5, 6 * HEAD, dtype=torch.bfloat16)
    q, k, _ = qkv.split([4 * HEAD, HEAD, HEAD], -1)
    q, k = (view_heads(x, HEAD, arch, copy=False) for x in (q, k))
    launch, reason = qk_norm.plan(arch, qk_norm.bind((q, k), {}))
    assert launch is not None, reason
    assert launch.args["q"] is q
    assert launch.args["k"] is k
    pytest.importorskip("triton")
    assert "amdgcn" in compile_launch(launch, arch)
