"""repack_linears_: another layout of the same weight, there and back; what is copied, what is rebound; and reloads."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fusionpass
from fusionpass.errors import ArgumentError, LayoutError, ScaleError, SchemeError
from fusionpass.ops import dequantize, quantize
from fusionpass.ops.quant.layout import (
    exponents_packed,
    laid_out,
    linear,
    refuse_layout,
    shuffled,
    stored_shape,
    swizzled,
    unshuffled,
)
from fusionpass.quantize import QuantizedLinear, pack_linears_, quantize_, repack_linears_

POWERS = "fp8_group128,scale_dtype=float8_e8m0fnu"
SCHEMES = {
    "swizzled": ("mxfp8", "nvfp4_tensor"),
    "trtllm": ("mxfp8", "nvfp4_tensor"),
    "deepgemm": (f"{POWERS}/{POWERS}",),
}
CASES = [(layout, scheme) for layout, schemes in SCHEMES.items() for scheme in schemes]


def codes(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, columns), dtype=torch.uint8)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 300),
    groups=st.integers(1, 13),
    layout=st.sampled_from(["linear", "column_major", "swizzled", "trtllm", "deepgemm"]),
)
def test_layouts_have_inverses(rows: int, groups: int, layout: str) -> None:
    if refuse_layout(rows, layout) is not None:
        rows = -(-rows // 128) * 128
    matrix, scales = codes(rows, 6), codes(rows, groups)
    stored = laid_out(matrix, scales, layout)
    assert tuple(stored[1].shape) == stored_shape((rows, groups), layout)
    for actual, expected in zip(linear(*stored, layout, (rows, groups)), (matrix, scales), strict=True):
        assert torch.equal(actual, expected)


def test_the_shuffle_has_order_five() -> None:
    """Row by row as TensorRT-LLM's table says, which is why shuffling twice is no way back."""
    rows = torch.arange(64)[:, None]
    table = [8 * (row % 4) + row // 4 for row in range(32)]
    found = shuffled(rows).flatten().tolist()
    assert [found[block + table[row]] for block in (0, 32) for row in range(32)] == list(range(64))
    again = rows
    for times in range(1, 6):
        again = shuffled(again)
        assert torch.equal(again, rows) == (times == 5)
    assert torch.equal(unshuffled(shuffled(rows)), rows)


def test_exponents_are_packed_from_the_lowest_byte() -> None:
    packed = exponents_packed(torch.tensor([[1, 2, 3, 4, 5]] * 3, dtype=torch.uint8))
    assert packed.stride() == (1, 4)
    assert packed.tolist() == [[0x04030201, 5]] * 3


@pytest.mark.parametrize("scheme", ["mxfp8", "nvfp4", POWERS])
@pytest.mark.parametrize("layout", ["swizzled", "trtllm", "deepgemm"])
def test_codes_stand_for_the_same_in_any_layout(layout: str, scheme: str) -> None:
    if (layout == "deepgemm") != (scheme == POWERS):
        with pytest.raises(SchemeError, match="is not an override"):
            quantize(torch.ones(2, 128), scheme=f"{scheme},layout={'deepgemm' if scheme != POWERS else layout}")
        return
    w, given = torch.randn(256, 384), torch.tensor(4 / 2688) if scheme == "nvfp4" else None
    plain, other = (quantize.reference(w, given, text) for text in (scheme, f"{scheme},layout={layout}"))
    assert torch.equal(dequantize(*plain, scheme, given), dequantize(*other, f"{scheme},layout={layout}", given))
    assert torch.equal(bits(other[0]), bits(plain[0])) == (layout != "trtllm")


def test_layouts_that_do_not_fit() -> None:
    with pytest.raises(ArgumentError, match="130 rows, and TensorRT-LLM's kernels take blocks of 128"):
        quantize(torch.ones(130, 32), scheme="mxfp8,layout=trtllm")
    with pytest.raises(SchemeError, match=r"packs exponents\. Add scale_dtype=float8_e8m0fnu"):
        quantize(torch.ones(2, 128), scheme="fp8_group128,layout=deepgemm")
    arguments = quantize.bind((torch.ones(128, 32), None, "mxfp8,layout=trtllm"), {})
    told = "triton: the layout 'trtllm' is for weights, which no kernel quantises"
    assert quantize.plan(fusionpass.Arch("sm_90"), arguments) == (None, told)
    w, s = quantize(torch.ones(130, 32), scheme="mxfp8,layout=swizzled")
    with pytest.raises(SchemeError, match="it has 130 rows"):
        QuantizedLinear(w, s, scheme="mxfp8/mxfp8,layout=trtllm")


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.detach().reshape(-1).view(torch.uint8)


def model_of(scheme: str, *sizes: int) -> nn.Sequential:
    torch.manual_seed(sum(sizes))
    made = nn.Sequential(*(nn.Linear(256, n, bias=bool(i)) for i, n in enumerate(sizes)))
    quantize_(made, scheme)
    return made


@pytest.mark.parametrize(("layout", "scheme"), CASES)
@pytest.mark.parametrize("rows", [128, 272])
def test_there_and_back(layout: str, scheme: str, rows: int) -> None:
    model = model_of(scheme, rows)
    layer: Any = model[0]
    before, x = copy.deepcopy(model), torch.randn(5, 256)
    expected = model(x)
    report = repack_linears_(model, layout)
    if layout == "trtllm" and rows % 128:
        assert report.left[0].reason == "it has 272 rows, and TensorRT-LLM's kernels take blocks of 128"
        return
    assert layer.kind.weight.layout == layout
    assert f"layout={layout}" in layer.scheme
    assert torch.equal(model(x), expected)
    # A state dict is what it was, and so is a copy.
    for name, value in before.state_dict().items():
        assert torch.equal(bits(model.state_dict()[name]), bits(value))
    assert torch.equal(copy.deepcopy(model)(x), expected)
    # Twice is once.
    again = repack_linears_(model, layout)
    assert not again.repacked
    assert again.left[0].reason == f"it is {layout} already"
    assert torch.equal(model(x), expected)
    assert repack_linears_(model, "linear").repacked[0].before == layout
    for name, value in before.named_parameters():
        assert torch.equal(bits(dict(model.named_parameters())[name]), bits(value))


def test_from_one_layout_to_another() -> None:
    model, x = model_of("mxfp8", 256), torch.randn(3, 256)
    expected = model(x)
    for layout in ("swizzled", "trtllm", "swizzled", "linear", "trtllm"):
        assert repack_linears_(model, layout).repacked[0].after == layout
        assert torch.equal(model(x), expected)


def test_copied_or_rebound() -> None:
    """Of whole blocks of 128 rows and 4 groups the new tensors are as large as the old."""
    model = model_of("mxfp8", 128, 144)
    places = [p.data_ptr() for p in model.parameters()]
    report = repack_linears_(model, "swizzled")
    assert [record.rebound for record in report.repacked] == [(), ("weight_scale",)]
    text = str(report)
    assert "0  linear → swizzled, copied in place" in text
    assert "1  linear → swizzled, weight_scale rebound" in text
    moved = [p.data_ptr() != place for p, place in zip(model.parameters(), places, strict=True)]
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, there in zip(names, moved, strict=True) if there] == ["1.weight_scale"]
    assert report.to_dict()["repacked"][1]["rebound"] == ("weight_scale",)


def test_a_pointer_that_must_not_move() -> None:
    model = model_of("mxfp8", 128, 144)
    before = copy.deepcopy(model).state_dict()
    wanted = r"1: weight_scale would be bound to new memory: \[144, 8\] becomes \[256, 8\]"
    with pytest.raises(LayoutError, match=wanted):
        repack_linears_(model, "swizzled", keep_pointers=True)
    assert [layer.kind.weight.layout for layer in model] == ["linear", "linear"]  # type: ignore[union-attr]
    for name, value in before.items():
        assert torch.equal(bits(model.state_dict()[name]), bits(value))
    aligned = model_of("mxfp8", 128, 256)
    places = [p.data_ptr() for p in aligned.parameters()]
    for layout in ("trtllm", "swizzled", "linear"):
        repack_linears_(aligned, layout, keep_pointers=True)
        assert [p.data_ptr() for p in aligned.parameters()] == places


@pytest.mark.parametrize(
    ("scheme", "layout", "reason"),
    [
        ("fp8_token", "swizzled", "'fp8_token' can be linear alone"),
        ("fp8_group128", "deepgemm", "'fp8_block128' can be linear alone"),
        ("mxfp8", "deepgemm", "'mxfp8' can be linear or swizzled or trtllm alone"),
        (f"{POWERS}/{POWERS}", "swizzled", f"'{POWERS},scale_rounding=ceil' can be linear or deepgemm alone"),
    ],
)
def test_what_stays_says_why(scheme: str, layout: str, reason: str) -> None:
    report = repack_linears_(model_of(scheme, 128), layout)
    assert [record.reason for record in report.left] == [reason]
    assert not report.repacked


def test_mistakes_are_named() -> None:
    model = model_of("mxfp8", 128)
    with pytest.raises(LayoutError, match=r"there is no layout 'swizzle'\. Did you mean 'swizzled'\?"):
        repack_linears_(model, "swizzle")
    repack_linears_(model, "swizzled")
    with pytest.raises(LayoutError, match=r"holds 0\.weight alone\. Load the weight with its scales"):
        model.load_state_dict({"0.weight": model.state_dict()["0.weight"]}, strict=False)
    with pytest.raises(LayoutError, match=r"holds 0\.weight_scale alone"):
        model.load_state_dict({"0.weight_scale": model.state_dict()["0.weight_scale"]}, strict=False)
    stored = model[0].weight_scale.detach()
    given = {**model.state_dict(), "0.weight_scale": stored.repeat(2, 1)}
    with pytest.raises(ScaleError, match=r"shape \[256, 8\].*Pass torch.uint8 \[128, 8\]"):
        model.load_state_dict(given)
    meta = model_of("mxfp8", 128).to("meta")
    assert repack_linears_(meta, "swizzled").left[0].reason == "its weight is not loaded"
    with pytest.raises(SchemeError, match=r'Call repack_linears_\(model, "linear"\)'):
        fusionpass.save_quantized(model, "/nowhere")


def test_packs() -> None:
    """Packed behind repacking, where each has whole blocks of rows; not before."""

    class Attention(nn.Module):
        def __init__(self, *sizes: int) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(256, n, bias=False) for n in sizes)

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]

    x, made = torch.randn(4, 256), Attention(256, 128, 128)
    quantize_(made, "mxfp8")
    expected = made(x)
    repack_linears_(made, "swizzled")
    assert len(pack_linears_(made).packed) == 1
    pack = made.q_proj.pack
    whole = pack.layer(x).split([256, 128, 128], 1)  # type: ignore[union-attr]
    for actual, wanted in zip([*made(x), *whole], expected * 2, strict=True):
        assert torch.equal(actual, wanted)
    left = repack_linears_(made, "linear").left
    assert [record.reason for record in left] == ["it shares its storage with others: repack first, then pack"] * 3
    ragged = Attention(256, 144, 128)
    quantize_(ragged, "mxfp8")
    repack_linears_(ragged, "swizzled")
    reason = "they lie swizzled in blocks of 128 rows, and one ends within a block"
    assert [record.reason for record in pack_linears_(ragged).left] == [reason] * 3


@pytest.mark.parametrize(("layout", "scheme"), CASES)
@pytest.mark.parametrize("rows", [128, 272])
def test_three_reloads_into_what_a_graph_holds(layout: str, scheme: str, rows: int) -> None:
    """A captured graph reads addresses: what was there when it was captured is where each new weight arrives."""
    if refuse_layout(rows, layout) is not None:
        rows = 256
    model, x = model_of(scheme, rows), torch.randn(5, 256)
    repack_linears_(model, layout)
    layer: Any = model[0]
    held = {name: p.detach() for name, p in model.named_parameters()}
    places = {name: t.data_ptr() for name, t in held.items()}
    for seed in range(3):
        torch.manual_seed(seed)
        fresh = nn.Sequential(nn.Linear(256, rows, bias=False))
        quantize_(fresh, scheme)
        model.load_state_dict(fresh.state_dict())
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
        assert torch.equal(model(x), fresh(x))
        # As a replay computes it: from the tensors that were there at first.
        scale = linear(
            held["0.weight"], held["0.weight_scale"], layout, (rows, fresh.state_dict()["0.weight_scale"].shape[1])
        )
        assert torch.equal(bits(scale[0]), bits(fresh[0].weight))
        assert torch.equal(bits(scale[1]), bits(fresh[0].weight_scale))
        # And back again into a linear that lies otherwise.
        other = model_of(scheme, rows)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), fresh(x))
    assert layer.kind.weight.layout == layout


def test_the_padding_of_a_layout_is_no_scale() -> None:
    assert swizzled(torch.full((130, 5), 7, dtype=torch.uint8)).count_nonzero() == 650
    repack_linears_(model := model_of("nvfp4_tensor", 144), "swizzled")
    copied = copy.deepcopy(model)
    copied.load_state_dict(model.state_dict())
    assert torch.equal(bits(copied[0].weight_scale), bits(model[0].weight_scale))
