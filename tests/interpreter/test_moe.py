"""The kernels of mixtures of experts through Triton's interpreter."""

from typing import Any

import pytest
import torch
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from fusionpass.arch import Arch
from fusionpass.launch import Empty, Launch
from fusionpass.ops import experts
from fusionpass.ops.gemm.blocks_triton import Cut
from tests.moe import SCHEMES, check_mixture, coded, mixture
from tests.profiles import share

# No programmatic dependent launch in these: the interpreter has no grids to wait for.
ARCH = Arch("sm_89")


def check(arguments: dict[str, Any], cuts: Any = None) -> torch.Tensor:
    # The interpreter multiplies matrices of bfloat16 as if they were integers.
    wide = {"WIDE": tl.float16} if arguments["x_scheme"] == "mxfp8" else {}
    return check_mixture(ARCH, arguments, cuts, **wide)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("tokens", "top"), [(1, 2), (5, 3), (40, 2)])
def test_as_planned(tokens: int, top: int, scheme: str) -> None:
    check(mixture(tokens, 256, 128, top=top, scheme=scheme, dtype=torch.float16))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_biases_and_interleaved_rows(scheme: str) -> None:
    given = {"activation": "clamped_swiglu", "interleaved": True, "bias": True, "limit": 1.25, "alpha": 1.5}
    check(mixture(9, 256, 128, top=3, scheme=scheme, dtype=torch.float16, transposed=not scheme, **given))


@pytest.mark.parametrize("scheme", SCHEMES[1:])
@pytest.mark.parametrize("tokens", [1, 9])
def test_codes(tokens: int, scheme: str) -> None:
    check(coded(mixture(tokens, 256, 128, top=3, scheme=scheme, dtype=torch.float16)))


@share(100)
@given(data=st.data())
def test_drawn_sizes_and_cuts(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 9))
    arguments = mixture(
        data.draw(st.integers(1, 30)),
        8 * data.draw(st.integers(1, 12)),
        8 * data.draw(st.integers(1, 12)),
        count,
        data.draw(st.integers(1, min(count, 4))),
        dtype=torch.float16,
        activation=data.draw(st.sampled_from(["silu", "gelu", "clamped_swiglu"])),
        bias=data.draw(st.booleans()),
        transposed=data.draw(st.booleans()),
        interleaved=data.draw(st.booleans()),
    )
    if data.draw(st.booleans()):
        arguments["weights"] = arguments["weights"].float()
    rows = data.draw(st.sampled_from([16, 32]))
    cuts = [Cut(rows, data.draw(st.sampled_from([16, 32])), data.draw(st.sampled_from([16, 32]))) for _ in range(2)]
    check(arguments, cuts)


@pytest.mark.parametrize("scheme", ["", "fp8_group128"])
def test_all_tokens_for_one_expert_and_those_for_none(scheme: str) -> None:
    arguments = mixture(9, 128, 128, count=5, top=2, scheme=scheme, dtype=torch.float16)
    ids = torch.full_like(arguments["ids"], 3)
    check({**arguments, "ids": ids})
    ids[2], ids[4, 1], ids[5, 0] = torch.tensor([-1, 5]), 7, -2
    got = check({**arguments, "ids": ids})
    assert (got[2] == 0).all()
    assert (check({**arguments, "ids": torch.full_like(ids, -1)}) == 0).all()
    check({**arguments, "ids": ids.int()})


@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize(("pairs", "count"), [(1, 1), (7, 3), (100, 3), (100, 40), (1000, 200)])
def test_every_pair_has_a_place(pairs: int, count: int, rows: int) -> None:
    """In a block of its expert's, once; the rest is empty."""
    from fusionpass.ops.moe.triton import blocks_of

    arguments = mixture(pairs, 16, 16, count, 1, dtype=torch.float16)
    ids = arguments["ids"] = torch.randint(-1, count + 1, (pairs, 1), generator=torch.Generator().manual_seed(pairs))
    launch, why = experts.plan(ARCH, arguments)
    assert isinstance(launch, Launch), why
    align = launch.before[0]
    blocks = blocks_of(pairs, count, rows)
    order, owners = torch.full((blocks * rows,), -9, dtype=torch.int32), torch.full((blocks,), -9, dtype=torch.int32)
    places = torch.empty(count, dtype=torch.int32)
    given = {"order": order, "experts": owners, "places": places, "blocks": blocks, "ROWS": rows}
    assert all(isinstance(align.args[name], Empty) for name in ("order", "experts", "places"))
    align.kernel[(1,)](**{**align.args, **given})
    found = order.view(blocks, rows)
    for block in range(blocks):
        there = found[block][found[block] != pairs]
        assert (ids[there.long(), 0] == owners[block]).all()
        assert owners[block] == -1 or 0 <= owners[block] < count
        assert owners[block] >= 0 or there.numel() == 0
    inside = ((ids[:, 0] >= 0) & (ids[:, 0] < count)).nonzero()[:, 0]
    assert torch.equal(order[order != pairs].sort().values.long(), inside)
