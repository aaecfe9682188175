"""Every plan asks the store, and what a table says that a kernel cannot do has a reason."""

import dataclasses
from unittest import mock

import pytest
import torch

from fusionpass.arch import Arch
from fusionpass.op import Op
from fusionpass.ops import (
    attention,
    block_scaled_mm,
    gated_rms_norm,
    linear,
    quantize,
    rms_norm,
    rope,
    scaled_mm,
    silu_mul,
)

pytest.importorskip("triton")
from fusionpass.ops.attention import decode_triton
from fusionpass.ops.gemm import blocks_triton, stream
from fusionpass.tuning.names import no_power_of_two
from fusionpass.tuning.rows import Cut, choose_rows, row_key
from fusionpass.tuning.store import imposing

H100 = Arch("sm_90")
ASKED = {
    silu_mul: "activation.triton.choose_rows",
    rms_norm: "norm.triton.choose_rows",
    gated_rms_norm: "norm.gated_triton.choose_rows",
    quantize: "quant.triton.choose_rows",
    attention: "attention.decode_triton.choose",
    rope: "rope.triton.choose",
    scaled_mm: "gemm.stream.choose",
    linear: "gemm.stream.choose",
    block_scaled_mm: "gemm.blocks_triton.choose",
}


@pytest.mark.parametrize(("op", "name"), ASKED.items(), ids=str)
def test_a_plan_leaves_it_where_something_else_is_faster(op: Op, name: str) -> None:
    arguments = op.bind((), op.sample(1, 128, torch.bfloat16, "cpu", torch.Generator()))
    assert op.plan(H100, arguments)[0] is not None
    with mock.patch(f"fusionpass.ops.{name}", return_value="inductor: measured faster"):
        planned, why = op.plan(H100, arguments)
    assert planned is None
    assert why.endswith("triton: inductor: measured faster")


def test_sizes_of_triton_are_powers_of_two() -> None:
    assert no_power_of_two(Cut(1, 4096, 4), "rows", "columns", "warps") is None
    assert no_power_of_two(Cut(1, 96, 4), "rows", "columns") == "BLOCK_SIZE_N: 96 is no power of two"
    assert no_power_of_two(Cut(0, 96, 4), "rows") == "BLOCK_SIZE_M: 0 is no power of two"


def test_what_the_kernels_cannot_be_cut_as() -> None:
    blocks = blocks_triton.Cut(16, 64, 128)
    assert blocks_triton.refuse_cut(blocks, 128, True) is None
    assert str(blocks_triton.refuse_cut(blocks_triton.Cut(16, 8, 128), 128, True)).startswith("tile: ")
    too_deep = blocks_triton.refuse_cut(blocks_triton.Cut(16, 64, 256), 128, True)
    assert too_deep == "BLOCK_SIZE_K: 128 bytes share a scale, and 256 would be summed"
    assert blocks_triton.refuse_cut(blocks_triton.Cut(1, 8, 256), 128, True) is None
    too_short = blocks_triton.refuse_cut(blocks_triton.Cut(1, 4, 16), 32, False)
    assert too_short == "BLOCK_SIZE_K: 32 bytes share a scale, more than 16"
    assert stream.refuse_cut(stream.Cut(64, 128), 8, 1) is None
    assert str(stream.refuse_cut(stream.Cut(8, 128), 8, 1)).startswith("tile: ")
    assert stream.refuse_cut(stream.Cut(8, 128), 1, 1) is None
    assert stream.refuse_cut(stream.Cut(8, 128, parts=2), 8, 1) is None
    assert str(stream.refuse_cut(stream.Cut(4, 1024, parts=2), 1, 1)).startswith("PARTS: ")
    assert stream.refuse_cut(stream.Cut(8, 1), 1, 2) == "BLOCK_SIZE_K: 1 bytes hold no element"


def test_attentions_blocks_fit_the_matrix_units() -> None:
    rule = decode_triton.configure(H100, 8, 4096, 128)
    assert decode_triton.refuse_cut(rule) is None
    few = decode_triton.refuse_cut(dataclasses.replace(rule, block=8))
    assert few == "BLOCK: the matrix units take 16 positions, not 8"


def test_a_part_of_a_row_holds_a_group() -> None:
    with imposing("quantize", row_key("mxfp8", 4096, 2), Cut(1, 16, 1)):
        asked = choose_rows(Cut(1, 1024, 4), "quantize", "mxfp8", H100, 64, 4096, 2, whole=False, fewest=32)
    assert asked == "columns: a program needs 32, a whole group, not 16"
