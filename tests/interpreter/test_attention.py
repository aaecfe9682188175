"""The decode kernels through Triton's interpreter."""

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusionpass.arch import Arch
from fusionpass.ops import attention
from fusionpass.ops.attention import decode_triton
from fusionpass.ops.attention.decode_triton import Cut
from tests.attention import (
    SCHEMES,
    arguments_for_attention,
    check_attention,
    check_attention_quantize,
    cuts,
    families,
    schemes,
)
from tests.profiles import share

# No programmatic dependent launch in these: the interpreter has no grids to wait for.
ARCH = Arch("sm_89")
slow = share(30)


@pytest.fixture(scope="module", autouse=True)
def exact_products() -> Any:
    """The interpreter multiplies the bits of bfloat16 numbers, as if they were integers."""
    import triton.language as tl
    from triton.runtime import interpreter

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def product(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return theirs(self, widened(a), widened(b), *others)

    theirs = interpreter.InterpreterBuilder.create_dot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", product)
        yield


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def cache(positions: int, **changes: Any) -> dict[str, Any]:
    """Four query heads of 64 over two KV heads."""
    k, v = drawn(2, 1, 2, positions, 64)
    return attention.bind((), {"q": drawn(1, 4, 1, 64), "k": k, "v": v, **changes})


@slow
@given(data=st.data())
def test_drawn_arguments(data: st.DataObject) -> None:
    arguments = data.draw(arguments_for_attention(data.draw(families()), "cpu", 300))
    scans = {"SCAN": data.draw(st.sampled_from([16, 128, 2048])), "SCANS": data.draw(st.sampled_from([0, 4, 100]))}
    with mock.patch.multiple(decode_triton, **scans):
        check_attention(ARCH, arguments, data.draw(cuts()))


@slow
@given(data=st.data())
def test_drawn_quantisations(data: st.DataObject) -> None:
    family = data.draw(families())
    arguments = data.draw(arguments_for_attention(family, "cpu", 120))
    scheme, out = data.draw(schemes(family.v_width)), data.draw(st.booleans())
    check_attention_quantize(ARCH, arguments, scheme, out, data.draw(cuts()))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_scheme(scheme: str, splits: int) -> None:
    k, v = drawn(2, 2, 2, 100, 128)
    arguments = attention.bind((drawn(2, 6, 3, 128), k, v), {})
    made = check_attention_quantize(ARCH, arguments, scheme, True, Cut(16, splits, 4))
    assert made or (splits == 1 and scheme in SCHEMES[2:6])


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many elements of 16 bits each load reads."""
    import triton.language as tl
    from triton.runtime import interpreter

    def load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        if pointers.get_element_ty() in (tl.float16, tl.bfloat16):
            found.append(int(mask.data.sum()))
        return theirs(self, pointers, mask, *others)

    found: list[int] = []
    theirs = interpreter.InterpreterBuilder.create_masked_load
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", load)
    return found


@pytest.mark.parametrize(("filled", "blocks"), [(0, 0), (1, 1), (64, 1), (100, 2), (128, 2), (129, 3), (1000, 16)])
def test_a_static_cache_costs_what_it_holds(loaded: list[int], filled: int, blocks: int) -> None:
    arguments = cache(1000, mask=(torch.arange(1000) < filled)[None, None, None])
    check_attention(ARCH, arguments)
    queries, rest = [n for n in loaded if n == 2 * 64], [n for n in loaded if n != 2 * 64]
    assert len(queries) == 2 * 16, "of two KV heads, sixteen splits each"
    assert sum(rest) == 2 * 2 * filled * 64
    assert len(rest) == 2 * 2 * blocks


def test_a_part_that_saw_nothing_is_zero() -> None:
    launch, _ = attention.plan(ARCH, cache(1000, mask=(torch.arange(1000) < 100)[None, None, None]))
    assert launch is not None
    assert launch.before
    # New buffers hold NaN here: what is multiplied by zero is seen too.
    assert launch.run()[0].isfinite().all()


def test_causal_reads_no_further_than_its_tokens(loaded: list[int]) -> None:
    check_attention(ARCH, cache(1000, q=drawn(1, 4, 3, 64), causal=True))
    assert sum(loaded) == 2 * 16 * 6 * 64 + 2 * 2 * 3 * 64


@pytest.mark.parametrize("splits", [1, 3])
def test_rows_that_see_nothing_are_zero_beside_others(splits: int) -> None:
    mask = torch.ones(1, 4, 1, 100, dtype=torch.bool)
    mask[0, 1] = False
    result = check_attention(ARCH, cache(100, mask=mask), Cut(16, splits, 4))
    assert result.abs().amax(-1).flatten().bool().tolist() == [True, False, True, True]
    assert not check_attention(ARCH, cache(100, mask=torch.zeros_like(mask)), Cut(16, splits, 4)).any()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_nan_that_is_seen_is_not_lost(name: str, splits: int) -> None:
    """Nor does it reach the heads beside it."""
    arguments = cache(100)
    arguments[name][0, 0, -1, 5] = float("nan")
    heads = 1 if name == "q" else 2
    launch, _ = attention.plan(ARCH, arguments)
    assert launch is not None
    (result,) = launch.run()
    expected = attention.reference(**arguments)
    assert torch.equal(result.isnan(), expected.isnan())
    assert result[:, :heads].isnan().any()
    assert not result[:, heads:].isnan().any()


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_the_least_number_is_an_average(wide: torch.dtype) -> None:
    """As models spell a mask at times: the score vanishes beside it, and all weights are alike."""
    arguments = cache(100, mask=torch.full((1, 1, 1, 100), torch.finfo(wide).min, dtype=wide))
    result = check_attention(ARCH, arguments, Cut(32, 2, 4))
    mean = arguments["v"].double().mean(2, keepdim=True).repeat_interleave(2, 1)
    assert (result.double() - mean).abs().max() <= 2.0**-8
