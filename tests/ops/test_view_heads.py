import pytest
import torch

from fusionpass.arch import Arch
from fusionpass.errors import ArgumentError
from fusionpass.ops import view_heads

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
