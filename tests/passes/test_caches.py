"""Caches in blocks: written as rows by our kernels, in place, and as blocks where PyTorch writes."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import fusionpass
from fusionpass import Arch, Config
from fusionpass.passes.caches import blocks_of_slots, slots_of_blocks
from fusionpass.passes.normalize import normalize
from tests.test_inductor import call_of, generated

HEADS, WIDTH, BLOCKS, SIZE = 2, 64, 6, 16


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding of [tokens, heads, WIDTH]."""
    half = torch.cat([-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]], -1)
    return x * cos[:, None] + half * sin[:, None]


def rows(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    keys.view(-1, HEADS, WIDTH)[slots] = k
    values.view(-1, HEADS, WIDTH).index_copy_(0, slots, v)


def blocks(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    keys[slots // SIZE, slots % SIZE] = k
    values[slots // SIZE, slots % SIZE] = v


def blocks_alone(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, block: Tensor, offset: Tensor) -> None:
    keys[block, offset] = k
    values[block, offset] = v


def step(write: Callable[..., None], packed: bool) -> Callable[..., Tensor]:
    """Rotates queries and keys, writes keys and values where told, and reads both caches."""

    def model(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, caches: Any, *at: Tensor) -> Tensor:
        keys, values = caches.unbind(0) if packed else caches
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        write(keys, values, k, v, *at)
        return q.sum((0, 1)) + keys.sum((0, 1, 2)) + values[1:].sum((0, 1, 2))

    return model


WRITES = [(rows, False), (rows, True), (blocks, False), (blocks, True), (blocks_alone, False), (blocks_alone, True)]
AT = [3, 40, 17, 95, 0]


def inputs(write: Callable[..., None], packed: bool, device: str = "cpu") -> tuple[Any, ...]:
    tokens = len(AT)
    q, k, v = (torch.randn(tokens, n, WIDTH, device=device).bfloat16() for n in (4, HEADS, HEADS))
    cos, sin = (torch.rand(tokens, WIDTH, device=device).bfloat16() for _ in range(2))
    caches = torch.randn(2, BLOCKS, SIZE, HEADS, WIDTH, device=device).bfloat16()
    slots = torch.tensor(AT, device=device)
    at = (slots // SIZE, slots % SIZE) if write is blocks_alone else (slots,)
    return q, k, v, cos, sin, caches if packed else tuple(caches.clone().unbind(0)), *at


@pytest.mark.parametrize(("write", "packed"), WRITES, ids=lambda value: getattr(value, "__name__", value))
def test_a_kernel_writes_in_place(write: Callable[..., None], packed: bool) -> None:
    def flat(*args: Any) -> Tensor:
        return step(write, packed)(*args[:5], args[5] if packed else args[5:7], *args[6 if packed else 7 :])

    def made() -> tuple[Any, ...]:
        given = inputs(write, packed, "cuda")
        return (*given[:5], *(given[5:6] if packed else given[5]), *given[6:])

    source, session = generated("sm_90", made, flat)
    (record,) = session.report.fused
    assert (record.op, record.backend, record.reason) == ("qk_rope_cache", "triton", "")
    call = call_of(source)
    (launch,) = re.finditer(r"heads_kernel\w*\.run\(", call)
    readers = [found.start() for found in re.finditer(r"\w*_sum_\w*\.run\(", call)]
    assert readers
    assert launch.start() < max(readers)
    whole = BLOCKS * SIZE * HEADS * WIDTH
    for shape in re.findall(r"empty_strided_cuda\(\(([\d, ]+)\)", call):
        assert torch.Size(int(n) for n in shape.split(",") if n.strip()).numel() < whole, "no cache is copied"


@pytest.mark.parametrize(("write", "packed"), WRITES, ids=lambda value: getattr(value, "__name__", value))
def test_the_same_numbers(write: Callable[..., None], packed: bool) -> None:
    torch.manual_seed(0)
    model, given = step(write, packed), inputs(write, packed)
    other = torch.utils._pytree.tree_map(torch.clone, given)
    with torch.no_grad():
        expected = model(*given)
        compiled = fusionpass.compile(model, numerics="eager")
        assert torch.equal(compiled(*other), expected)
    for ours, theirs in zip(
        torch.utils._pytree.tree_leaves(other), torch.utils._pytree.tree_leaves(given), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert fusionpass.report(compiled).count("qk_rope_cache") == 1


SM90 = Config(target=Arch("sm_90"))


def reason_of(write: Callable[..., Any], packed: bool = False) -> str:
    """Why the caches are copied before `write(caches, k, v, slots)`, if they are; what it returns is read."""

    def model(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, *caches: Tensor) -> Any:
        return turned(q, cos, sin), write(caches, turned(k, cos, sin), v, slots)

    q, k, v, cos, sin, caches, slots = inputs(rows, packed)
    given = (caches,) if packed else caches
    report = fusionpass.explain(model, q, k, v, cos, sin, slots, *given, config=SM90)
    return "; ".join(record.reason for record in report.fused if "cache" in record.op)


def flat(cache: Tensor) -> Tensor:
    return cache.view(-1, HEADS, WIDTH)


def test_a_cache_that_is_computed_is_none_of_the_inputs() -> None:
    def write(caches: Any, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        return flat(caches[0] + 1).index_copy(0, slots, k)

    assert "it is no input of the graph" in reason_of(write)


def test_blocks_of_any_number() -> None:
    def write(cache: Tensor, x: Tensor, slots: Tensor) -> Tensor:
        return cache.view(cache.shape[0] * SIZE, HEADS, WIDTH).index_put((slots,), x)

    given = torch.zeros(BLOCKS, SIZE, HEADS, WIDTH), torch.ones(2, HEADS, WIDTH), torch.tensor([1, 40])
    graph = make_fx(write, tracing_mode="symbolic")(*given)
    slots_of_blocks(graph.graph)
    graph.graph.lint()
    graph.recompile()
    assert torch.equal(graph(*given), write(*given))


def test_rows_that_a_mask_chooses_stay_as_they_are() -> None:
    def write(cache: Tensor, x: Tensor, chosen: Tensor) -> Tensor:
        return flat(cache).index_put((chosen,), x).view(BLOCKS, SIZE, HEADS, WIDTH)

    chosen = torch.zeros(BLOCKS * SIZE, dtype=torch.bool)
    chosen[[3, 40]] = True
    given = torch.zeros(BLOCKS, SIZE, HEADS, WIDTH), torch.ones(HEADS, WIDTH), chosen
    graph = make_fx(write, tracing_mode="fake")(*given)
    blocks_of_slots(graph.graph)
    graph.recompile()
    assert torch.equal(graph(*given), write(*given))


def test_rows_that_slots_choose_are_blocks_again() -> None:
    def write(cache: Tensor, x: Tensor, slots: Tensor) -> Tensor:
        return flat(cache).index_put((slots,), x).view(BLOCKS, SIZE, HEADS, WIDTH)

    given = torch.zeros(BLOCKS, SIZE, HEADS, WIDTH), torch.ones(HEADS, WIDTH), torch.tensor([3, -1, 40])
    graph = make_fx(write, tracing_mode="fake")(*given)
    blocks_of_slots(graph.graph)
    graph.recompile()
    assert ".view." not in graph.code
    assert torch.equal(graph(*given), write(*given))


def test_a_view_of_the_old_value_is_read() -> None:
    def write(caches: Any, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        before = flat(caches[0]).sum()
        flat(caches[0])[slots] = k
        return before

    assert "reads the old value" in reason_of(write)


def test_the_old_value_is_read() -> None:
    def write(caches: Any, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        before = caches[0].sum()
        flat(caches[0])[slots] = k
        return before

    assert "reads the old value" in reason_of(write)


def test_what_is_changed_again_is_another_value() -> None:
    def write(caches: Any, k: Tensor, v: Tensor, slots: Tensor) -> None:
        flat(caches[0])[slots] = k
        caches[0].mul_(2)

    assert "the result is not its new value" in reason_of(write)


def test_one_of_two_parts_is_not_kept() -> None:
    def write(caches: Any, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        keys, values = caches[0].unbind(0)
        other = flat(values).index_copy(0, slots, v)
        flat(keys)[slots] = k
        return other

    assert "the result is not its new value" in reason_of(write, packed=True)


def test_all_of_a_packed_cache_is_read() -> None:
    def write(caches: Any, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        flat(caches[0][0])[slots] = k
        return caches[0].sum()

    assert "reads all of" in reason_of(write, packed=True)


def test_parts_of_what_was_set_in_parts() -> None:
    def model(x: Tensor, part: Tensor) -> Any:
        y = torch.select_scatter(x, part.t(), 0, 0)
        alike = torch.select_scatter(x, part, 0, 0)
        return torch.select(y, 0, 2) + 0, torch.select(y, 0, 0).view(-1) + 0, torch.select(alike, 0, -1) + 0

    given = torch.randn(3, 4, 4), torch.randn(4, 4)
    graph = make_fx(model, tracing_mode="fake")(*given)
    normalize(graph.graph)
    graph.recompile()
    for ours, theirs in zip(graph(*given), model(*given), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("offset", [-1, -SIZE, SIZE - 1])
@pytest.mark.parametrize("block", [-1, -BLOCKS, 0])
def test_indices_from_the_end(block: int, offset: int) -> None:
    """The row that is written to is the one of the block, whatever kernel or library writes."""
    keys = torch.zeros(BLOCKS, SIZE, HEADS, WIDTH)
    at = torch.tensor([block], dtype=torch.int32), torch.tensor([offset])
    graph = make_fx(lambda c, x, b, o: c.index_put((b, o), x), tracing_mode="fake")(keys, torch.ones(1, 2, 64), *at)
    slots_of_blocks(graph.graph)
    graph.recompile()
    assert "torch.int64" in graph.code
    assert ".view.default" in graph.code
    expected = keys.clone()
    expected[block, offset] = 1
    assert torch.equal(graph(keys, torch.ones(1, 2, 64), *at), expected)


@pytest.mark.parametrize("offset", [SIZE, -SIZE - 1])
def test_an_offset_of_another_block_is_an_error(offset: int) -> None:
    keys, at = torch.zeros(BLOCKS, SIZE, HEADS, WIDTH), (torch.tensor([1]), torch.tensor([offset]))
    graph = make_fx(lambda c, x, b, o: c.index_put((b, o), x), tracing_mode="fake")(keys, torch.ones(1, 2, 64), *at)
    slots_of_blocks(graph.graph)
    graph.recompile()
    with pytest.raises(IndexError):
        graph(keys, torch.ones(1, 2, 64), *at)
