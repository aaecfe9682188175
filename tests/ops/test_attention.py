"""Attention: its reference against float64, its errors, its plans, and its kernels' code. No GPU is needed."""

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fusionpass.aot import compile_launch
from fusionpass.arch import Arch
from fusionpass.errors import ArgumentError, ScaleError
from fusionpass.graphs import same_strides
from fusionpass.ops import attention, attention_quantize, quantize
from fusionpass.ops.quant import sample_scale

pytest.importorskip("triton")
from fusionpass.ops.attention.decode_triton import Cut, configure
from tests.attention import SCHEMES, arguments_for_attention, families, oracle, plain

H100 = Arch("sm_90")
BF16 = torch.bfloat16


def zeros(*shape: int, dtype: torch.dtype = BF16, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


def marks(*shape: int) -> torch.Tensor:
    return zeros(*shape, dtype=torch.bool)


def inputs(tokens: int = 1, device: str = "cpu", **changes: Any) -> dict[str, Any]:
    """Two requests, eight heads of 64 over two KV heads, 100 positions."""
    made = {"q": zeros(2, 8, tokens, 64, device=device), "k": zeros(2, 2, 100, 64, device=device)}
    return attention.bind((), {**made, "v": made["k"], **changes})


@settings(max_examples=300)
@given(data=st.data())
def test_the_reference_against_float64(data: st.DataObject) -> None:
    arguments = data.draw(arguments_for_attention(data.draw(families()), "cpu", 200))
    # In float64 as well, which the tests of other kernels take as their oracle.
    wide = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in plain(arguments).items()
    }
    exact, allowed = oracle(arguments)
    result = attention.reference(**arguments)
    assert result.dtype == arguments["q"].dtype
    assert result.transpose(1, 2).is_contiguous()
    assert ((result.double() - exact).abs() <= allowed).all()
    if arguments["mask"] is None or arguments["mask"].dtype == torch.bool:
        assert torch.allclose(attention.reference(**wide), exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("added", [False, True])
def test_a_row_that_sees_nothing_gives_zeros(dtype: torch.dtype, added: bool) -> None:
    q, k, v = (torch.randn(2, heads, rows, 64).to(dtype) for heads, rows in ((4, 3), (2, 5), (2, 5)))
    mask = torch.ones(2, 1, 3, 5, dtype=torch.bool)
    mask[1, 0, 1] = False
    result = attention(q, k, v, torch.where(mask, 0.0, -math.inf).to(dtype) if added else mask)
    assert (result[1, :, 1] == 0).all()
    assert (result[1, :, 0] != 0).all()
    assert (result[0] != 0).all()


def test_an_empty_cache_gives_zeros() -> None:
    empty = zeros(2, 2, 0, 64)
    for mask in (None, marks(1, 1, 1, 0)):
        assert torch.equal(attention(**inputs(k=empty, v=empty, mask=mask)), zeros(2, 8, 1, 64))


def test_query_heads_share_the_keys_that_repeating_gives_them() -> None:
    q, k, v = (torch.randn(1, heads, 3, 64) for heads in (6, 2, 2))
    repeated = attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
    assert torch.allclose(attention(q, k, v), repeated, atol=1e-6)
    assert torch.allclose(attention(q, k, v, torch.ones(3, 3, dtype=torch.bool)), repeated, atol=1e-6)


def test_it_has_a_gradient() -> None:
    q, k, v = (torch.randn(1, heads, 3, 64, requires_grad=True) for heads in (4, 2, 2))
    attention(q, k, v, causal=True).square().sum().backward()
    found = [t.grad for t in (q, k, v)]
    for t in (q, k, v):
        t.grad = None
    attention.reference(q, k, v, causal=True).square().sum().backward()
    for t, grad in zip((q, k, v), found, strict=True):
        assert torch.equal(t.grad, grad)


K = zeros(2, 2, 100, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": zeros(8, 1, 64)}, "q is (8, 1, 64), k (2, 2, 100, 64)"),
        ({"k": K.half()}, "k torch.float16"),
        ({"q": K.int(), "k": K.int(), "v": K.int()}, "one floating point dtype"),
        ({"q": zeros(3, 8, 1, 64)}, "one batch, one width"),
        ({"q": zeros(2, 8, 1, 32)}, "one batch, one width"),
        ({"v": zeros(2, 2, 99, 64)}, "as many positions"),
        ({"v": zeros(2, 1, 100, 64)}, "as many positions"),
        ({"q": zeros(2, 3, 1, 64)}, "a multiple of those of k"),
        ({"k": zeros(2, 0, 100, 64), "v": zeros(2, 0, 100, 64)}, "a multiple of those of k"),
        ({"mask": marks(1, 100), "causal": True}, "a mask and causal=True"),
        ({"mask": zeros(1, 100, dtype=torch.int64)}, "the mask is torch.int64"),
        ({"mask": zeros(1, 100, dtype=torch.float16)}, "the mask is torch.float16"),
        ({"mask": marks(100)}, "two dimensions or more of (2, 8, 1, 100)"),
        ({"mask": marks(1, 99)}, "the mask is (1, 99)"),
        ({"mask": marks(1, 2, 1, 1, 100)}, "the mask is (1, 2, 1, 1, 100)"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        attention(**inputs(**changes))


F32 = torch.float32


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"q": zeros(2, 8, 1, 64, dtype=F32), "k": K.float(), "v": K.float()}, "q is torch.float32: the products are"),
        ({"v": K.to("meta")}, "v is on meta, q on cpu"),
        ({"mask": zeros(1, 100, dtype=torch.bool, device="meta")}, "mask is on meta, q on cpu"),
        ({"v": zeros(2, 2, 100, 320)}, "v has heads of 320 columns, not a multiple of 8 up to 256"),
        ({"v": zeros(2, 2, 100, 36)}, "v has heads of 36 columns"),
        ({"v": zeros(2, 2, 100, 0)}, "v has heads of 0 columns"),
        ({"k": zeros(2, 2, 64, 100).mT}, "k has stride 100 in its last dimension, not 1"),
        ({"q": zeros(2, 8, 1, 128)[..., ::2]}, "q has stride 2 in its last dimension, not 1"),
        ({"q": zeros(2, 8, 9, 64)}, "36 rows a KV head (at most 32): SDPA's own kernels are for many tokens"),
        ({"q": zeros(2, 66, 1, 64)}, "33 rows a KV head"),
        ({"q": zeros(2, 8, 0, 64)}, "there is nothing to attend"),
    ],
)
def test_what_the_kernel_refuses(changes: dict[str, Any], reason: str) -> None:
    launch, why = attention.plan(H100, inputs(**changes))
    assert launch is None
    assert why.startswith(f"triton: {reason}")


CODES, STEP = torch.float8_e4m3fn, torch.tensor(0.5)


def test_codes_are_widened_and_rounded() -> None:
    q, k, v = torch.randn(1, 4, 3, 64).bfloat16(), *torch.randn(2, 1, 2, 9, 64).to(CODES)
    scales = {"k_scale": torch.tensor(0.037), "v_scale": torch.tensor([[1.3]])}
    wide = [(t.float() * scales[name]).reshape(t.shape).bfloat16() for name, t in (("k_scale", k), ("v_scale", v))]
    assert torch.equal(attention(q, k, v, **scales), attention(q, *wide))
    assert torch.equal(attention(q, k, v), attention(q, k.bfloat16(), v.bfloat16()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_scale": STEP}, "k is torch.bfloat16, and has a scale"),
        ({"v_scale": STEP}, "v is torch.bfloat16, and has a scale"),
        ({"k": K.to(CODES), "k_scale": torch.ones(2)}, "the scale of k is (2,)"),
        ({"k": K.to(CODES), "k_scale": torch.ones(1, dtype=torch.int64)}, "(1,) torch.int64"),
        ({"q": zeros(2, 8, 1, 64).to(CODES), "k": K.to(CODES), "v": K.to(CODES)}, "q is torch.float8_e4m3fn"),
    ],
)
def test_codes_and_scales_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ArgumentError, ScaleError), match=re.escape(message)):
        attention(**inputs(**changes))


@pytest.mark.parametrize(
    ("arch", "changes", "reason"),
    [
        ("sm_80", {"k": K.to(CODES)}, "k: Triton cannot convert to float8_e4m3fn on sm_80"),
        ("sm_90", {"v": K.to(torch.float8_e4m3fnuz)}, "v: sm_90 does not convert to float8_e4m3fnuz"),
        ("sm_90", {"k": K.to(CODES), "k_scale": STEP.to("meta")}, "k_scale is on meta, q on cpu"),
        ("sm_90", {"v": K.to(CODES), "v_scale": STEP.to("meta")}, "v_scale is on meta, q on cpu"),
    ],
)
def test_codes_that_the_kernel_refuses(arch: str, changes: dict[str, Any], reason: str) -> None:
    assert attention.plan(Arch(arch), inputs(**changes)) == (None, f"triton: {reason}")


def quantised(**changes: Any) -> str:
    """Why the kernels do not take this."""
    made = {"softmax_scale" if k == "scale" else k: v for k, v in inputs().items() if k != "joined"}
    launch, why = attention_quantize.plan(H100, attention_quantize.bind((), {**made, "scale": STEP, **changes}))
    assert launch is None
    return why


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scale_2": STEP}, "there are several scales"),
        ({"scale": None, "scheme": "mxfp8,layout=swizzled"}, "scales that are swizzled lie across tokens"),
        ({"scale": None, "scheme": "fp8_group128"}, "groups of 128 columns are no part of a head of 64"),
        ({"scale": None, "scheme": "fp8_token", "q": zeros(1, 600, 1, 64), "k": K[:1], "v": K[:1]}, "600 heads"),
        ({"scale": None, "scheme": "fp8_token", "k": K[:, :, :9], "v": K[:, :, :9]}, "its positions are not split"),
        ({"scheme": "fp8_static,dtype=float8_e4m3fnuz"}, "sm_90 does not convert to float8_e4m3fnuz"),
        ({"scale": STEP.to("meta")}, "the scale is torch.float32 on meta"),
        ({"q": zeros(2, 8, 9, 64)}, "36 rows a KV head"),
    ],
)
def test_quantisations_that_the_kernel_refuses(changes: dict[str, Any], reason: str) -> None:
    assert quantised(**changes).startswith(f"triton: {reason}")


def test_symbolic_heads_have_no_scale_in_common() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    q = symbolic(mode, zeros(2, 8, 1, 64), 1)
    assert "None heads of 64 columns" in quantised(q=q, scale=None, scheme="fp8_token")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_it_is_both(scheme: str) -> None:
    q, k, v = (torch.randn(2, heads, rows, 128).bfloat16() for heads, rows in ((4, 3), (2, 9), (2, 9)))
    scale = sample_scale(scheme, "cpu")
    attended = attention(q, k, v, scale=0.1, joined=True)
    assert torch.equal(attended, attention(q, k, v, scale=0.1).transpose(1, 2).flatten(2))
    expected = [*quantize.reference(attended, scale, scheme), attended]
    for form in (attention_quantize, attention_quantize.parts):
        arguments = attention_quantize.bind(
            (q, k, v), {"softmax_scale": 0.1, "scale": scale, "scheme": scheme, "attended_out": True}
        )
        for made, want in zip(form(**arguments), expected, strict=True):
            assert torch.equal(made.view(torch.uint8), want.view(torch.uint8))


def test_several_scales_in_parts() -> None:
    q = torch.randn(1, 2, 3, 64).bfloat16()
    arguments = attention_quantize.bind((q, q, q), {"scale": STEP, "scale_3": STEP * 2})
    first, second = attention_quantize.parts(**arguments)
    expected = attention_quantize.reference(**arguments)
    assert torch.equal(first.float(), expected[0].float())
    assert torch.equal(second.float(), expected[1].float())
    assert not torch.equal(first.float(), second.float())


def test_codes_come_in_twice_the_positions() -> None:
    assert configure(H100, 8, 4096, 128, 1) == Cut(64, 64, 4)
    launch, _ = attention.plan(H100, inputs(k=K.to(CODES), v=K.to(CODES)))
    assert launch is not None
    assert launch.all[0].args["BLOCK"] == 128


def symbolic(mode: FakeTensorMode, tensor: torch.Tensor, *dims: int) -> torch.Tensor:
    kinds = [DimDynamic.DYNAMIC if i in dims else DimDynamic.STATIC for i in range(tensor.dim())]
    return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(kinds))


def test_symbolic_sizes() -> None:
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)

    def reason(**changes: Any) -> Any:
        return attention.plan(H100, inputs(**changes))[1]

    apart = "triton: the number of heads or of tokens is symbolic: then SDPA's own kernels, which are for many tokens"
    assert reason(q=symbolic(mode, zeros(2, 8, 5, 64), 2)) == apart
    assert reason(q=symbolic(mode, zeros(2, 8, 5, 64), 1)) == apart
    assert reason(k=symbolic(mode, zeros(2, 2, 100, 64), 1)) == apart
    assert "not a multiple of 8" in reason(q=symbolic(mode, zeros(2, 8, 5, 64), 3))
    mask = symbolic(mode, marks(2, 1, 1, 100), 3)
    assert "and may be broadcast" in reason(mask=mask)
    assert not environment.guards


@pytest.mark.parametrize("dims", [(0,), (2,), (0, 2)], ids=str)
def test_symbolic_batch_and_positions(dims: tuple[int, ...]) -> None:
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    k = symbolic(mode, K, *dims)
    with mode:
        q = torch.empty(k.shape[0], 8, 1, 64, dtype=BF16)
        mask = torch.empty(k.shape[0], 1, 1, k.shape[2], dtype=torch.bool)
        seen = mode.from_tensor(marks(1, 1, 1, 100)) if dims == (0,) else mask
        expected = attention.reference(q, k, k, mask)
    guards = len(environment.guards)
    for given_mask in (None, mask, seen):
        launch, why = attention.plan(H100, inputs(q=q, k=k, v=k, mask=given_mask))
        assert launch is not None, why
        assert len(environment.guards) == guards
        splits = {(0,): 2, (2,): 32, (0, 2): 8}[dims]
        assert launch.args["SPLITS"] == splits
        out = launch.args["out"]
        assert tuple(out.shape) == tuple(expected.shape)
        assert same_strides(out.shape, out.stride, expected.stride())
        for part in launch.all:
            assert "mma.sync" in compile_launch(part, H100)["ptx"] or part is launch


@pytest.mark.parametrize(
    ("heads", "positions", "width", "cut"),
    [
        (8, 4096, 128, Cut(32, 64, 4)),  # 128 blocks, of which two each take as long as if the 66th helped
        (8, 4096, 64, Cut(64, 64, 4)),
        (8, 4096, 256, Cut(16, 64, 4)),
        (8, 4096, 80, Cut(32, 64, 4)),
        (8, 100, 128, Cut(32, 4, 4)),
        (8, 64, 128, Cut(32, 2, 4)),
        (8, 0, 128, Cut(32, 1, 4)),
        (256, 4096, 128, Cut(32, 2, 4)),
        (1000, 131072, 128, Cut(32, 1, 4)),
        (1, 131072, 128, Cut(32, 512, 4)),
        (0, 4096, 128, Cut(32, 128, 4)),
        (8, None, 128, Cut(32, 32, 4)),
        (64, None, 128, Cut(32, 8, 4)),
        (None, 4096, 128, Cut(32, 8, 4)),
        (None, None, 128, Cut(32, 8, 4)),
    ],
)
def test_how_positions_are_split(heads: int | None, positions: int | None, width: int, cut: Cut) -> None:
    assert configure(H100, heads, positions, width) == cut


@given(
    name=st.sampled_from(["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"]),
    heads=st.integers(1, 2000),
    positions=st.integers(1, 300_000),
    width=st.integers(8, 256),
)
def test_splits_are_no_more_than_blocks_nor_than_keep_the_gpu_busy(
    name: str, heads: int, positions: int, width: int
) -> None:
    cut = configure(Arch(name), heads, positions, width)
    blocks = math.ceil(positions / cut.block)
    assert 1 <= cut.splits <= blocks
    assert cut.splits * heads <= max(heads, 4 * Arch(name).multiprocessors)
    # One split fewer would make the longest longer.
    assert cut.splits == 1 or math.ceil(blocks / (cut.splits - 1)) > math.ceil(blocks / cut.splits)


def test_one_split_has_one_launch_and_more_have_a_second_that_shares_their_buffers() -> None:
    alone, _ = attention.plan(H100, inputs(k=zeros(2, 2, 32, 64), v=zeros(2, 2, 32, 64)))
    assert alone is not None
    assert not alone.before
    assert alone.args["sums"] is None
    launch, _ = attention.plan(H100, inputs(k=zeros(2, 2, 999, 64), v=zeros(2, 2, 999, 64)))
    assert launch is not None
    (first,) = launch.before
    assert first.args["out"] is None
    assert all(first.args[name] is launch.args[name] for name in ("sums", "peaks", "totals"))
    assert (first.grid, launch.grid) == ((4, 16), (16,))


@pytest.mark.parametrize(
    ("mask", "strides", "rows"),
    [
        (marks(1, 100), (0, 0, 0, 1), 1),
        (marks(2, 1, 1, 100), (100, 0, 0, 1), 1),
        (marks(1, 100).expand(2, 8, 3, 100), (0, 0, 0, 1), 1),
        (marks(3, 100), (0, 0, 100, 1), 16),
        (marks(8, 1, 100), (0, 100, 0, 1), 16),
        (marks(1, 1, 3, 1), (0, 0, 1, 0), 16),
        (marks(1, 1, 3, 128)[..., 5:105], (0, 0, 128, 1), 16),
    ],
)
def test_how_a_mask_is_followed(mask: torch.Tensor, strides: tuple[int, ...], rows: int) -> None:
    launch, _ = attention.plan(H100, inputs(tokens=3, mask=mask))
    assert launch is not None
    first = launch.all[0]
    assert tuple(first.args[f"mask_{d}"] for d in ("batch", "head", "token", "position")) == strides
    assert first.args["MASK_ROWS"] == rows
