"""Counters of layers: read and advanced at once, and left alone where that would give another number."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import fusionpass
from fusionpass import Arch, Config
from fusionpass.passes.counters import counters
from fusionpass.session import Session
from tests.fake_gpu import codegen, needs_cuda_build

DONE = "3 layers' counters are read and advanced at once"


def layer(cache: Tensor, counter: Tensor, x: Tensor) -> Tensor:
    """Writes x to the cache behind what the counter says is there, and reads all of it."""
    at = torch.arange(x.shape[0], device=x.device) + counter
    counter.add_(x.shape[0])
    cache.index_copy_(0, at, x)
    return x + cache.sum(0)


def layers(x: Tensor, caches: Sequence[Tensor], numbers: Sequence[Tensor]) -> Tensor:
    """As transformers does, what comes in front of the layers asks the first for its position."""
    x = x * (torch.arange(x.shape[0], device=x.device) + numbers[0])[:, None]
    for cache, counter in zip(caches, numbers, strict=True):
        x = layer(cache, counter, x)
    return x


def drawn(rows: int = 2, device: str = "cpu") -> tuple[Any, ...]:
    caches = [torch.zeros(16, 4, device=device) for _ in range(3)]
    return torch.randn(rows, 4, device=device), caches, [torch.tensor(i, device=device) for i in range(3)]


def found(
    model: Callable[..., Any],
    make: Callable[[], tuple[Any, ...]] = drawn,
    disable: Sequence[str] = (),
    dynamic: bool = False,
) -> list[str]:
    """What the pass says of a model; its result and all that it writes to are as they were without."""
    lines: list[str] = []

    def backend(gm: GraphModule, inputs: Any) -> Callable[..., Any]:
        lines.extend(counters(gm, disable))
        gm.graph.lint()
        assert bool(gm.graph.find_nodes(op="call_function", target=torch._foreach_add_)) == bool(lines)
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    for seed in range(2):
        torch.manual_seed(seed)
        given = make()
        torch.manual_seed(seed)
        expected = make()
        torch.testing.assert_close(compiled(*given), model(*expected), rtol=0, atol=0)
        torch.testing.assert_close(given, expected, rtol=0, atol=0)
    return lines


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dynamic", [False, True])
def test_at_once(rows: int, dynamic: bool) -> None:
    assert found(layers, lambda: drawn(rows), dynamic=dynamic) == [DONE]
    assert found(layers, lambda: drawn(rows), disable=["counters"]) == []


def test_other_spellings() -> None:
    def model(x: Tensor, caches: Sequence[Tensor], numbers: Sequence[Tensor]) -> Tensor:
        for cache, counter in zip(caches, numbers, strict=True):
            at = torch.add(counter, torch.arange(2))
            counter.add_(2)
            cache.index_copy_(0, at, x)
            x = x + cache.sum(0)
        return x

    assert found(model) == [DONE]


def read_behind(x: Tensor, caches: Sequence[Tensor], numbers: Sequence[Tensor]) -> Tensor:
    return layers(x, caches, numbers) + sum(numbers)


def written_twice(x: Tensor, caches: Sequence[Tensor], numbers: Sequence[Tensor]) -> Tensor:
    x = layers(x, caches, numbers)
    for counter in numbers:
        counter.mul_(2)
    return x


def read_between(x: Tensor, caches: Sequence[Tensor], numbers: Sequence[Tensor]) -> Tensor:
    for cache, counter in zip(caches, numbers, strict=True):
        x = layer(cache, counter, x * counter)
    return x


def read_under_another_name(x: Tensor, caches: Sequence[Tensor], numbers: Sequence[Tensor]) -> Tensor:
    for cache, counter in zip(caches, numbers, strict=True):
        same = counter.view(1)
        x = layer(cache, counter, x) + same
    return x


def result_is_used(x: Tensor, caches: Sequence[Tensor], numbers: Sequence[Tensor]) -> Tensor:
    for cache, counter in zip(caches, numbers, strict=True):
        cache.index_copy_(0, torch.arange(2) + counter, x)
        x = x + cache.sum(0) + counter.add_(2)
    return x


def scaled(x: Tensor, caches: Sequence[Tensor], numbers: Sequence[Tensor]) -> Tensor:
    for cache, counter in zip(caches, numbers, strict=True):
        cache.index_copy_(0, torch.arange(2) + counter, x)
        counter.add_(2, alpha=2)
        x = x + cache.sum(0)
    return x


def advanced_by_tensors(x: Tensor, caches: Sequence[Tensor], numbers: Sequence[Tensor]) -> Tensor:
    for cache, counter in zip(caches, numbers, strict=True):
        cache.index_copy_(0, torch.arange(2) + counter, x)
        counter.add_(cache.count_nonzero())
        x = x + cache.sum(0)
    return x


def multiplied(x: Tensor, caches: Sequence[Tensor], numbers: Sequence[Tensor]) -> Tensor:
    for cache, counter in zip(caches, numbers, strict=True):
        cache.index_copy_(0, torch.arange(2) + counter, x)
        counter.mul_(2)
        x = x + cache.sum(0)
    return x


def written_as_a_view(x: Tensor, caches: Sequence[Tensor], numbers: Sequence[Tensor]) -> Tensor:
    for cache, counter in zip(caches, numbers, strict=True):
        cache.index_copy_(0, torch.arange(2) + counter, x)
        counter.view(1).add_(2)
        x = x + cache.sum(0)
    return x


def only_one(x: Tensor, caches: Sequence[Tensor], numbers: Sequence[Tensor]) -> Tensor:
    return layer(caches[0], numbers[0], x)


def given_back_as_views(x: Tensor, caches: Sequence[Tensor], numbers: Sequence[Tensor]) -> tuple[Any, ...]:
    return layers(x, caches, numbers), *(counter.view(1) for counter in numbers)


@pytest.mark.parametrize(
    "model",
    [
        read_behind, written_twice, read_between, read_under_another_name, result_is_used, scaled, advanced_by_tensors,
        multiplied, written_as_a_view, only_one, given_back_as_views,
    ],
)  # fmt: skip
def test_left_alone(model: Callable[..., Any]) -> None:
    assert found(model) == []


def test_numbers_that_share_memory_are_left_alone() -> None:
    """A third of them is written to under another name."""

    def make() -> tuple[Any, ...]:
        x, caches, _ = drawn()
        return x, caches, torch.arange(3).unbind(0)

    assert found(layers, make) == []


def test_only_single_numbers() -> None:
    def model(x: Tensor, numbers: Sequence[Tensor]) -> Tensor:
        for counter in numbers:
            x = x + (torch.arange(2) + counter)[:, None]
            counter.add_(2)
        return x

    assert found(model, lambda: (torch.randn(2, 4), [torch.tensor([i]) for i in range(3)])) == []
    assert found(model, lambda: (torch.randn(2, 4), [torch.tensor(i) for i in range(3)])) == [DONE]


def test_lengths_that_differ() -> None:
    """Each amount is a list of its own."""

    def model(x: Tensor, caches: Sequence[Tensor], numbers: Sequence[Tensor]) -> Tensor:
        for i, (cache, counter) in enumerate(zip(caches, numbers, strict=True)):
            part = x[: 1 + i % 2]
            x = x + layer(cache, counter, part).sum()
        return x

    assert found(model) == [DONE]


@needs_cuda_build
def test_one_kernel_for_all_layers() -> None:
    """One token: where the layers write and what they have written since is one launch."""

    def flat(x: Tensor, *more: Tensor) -> Tensor:
        return layers(x, more[:3], more[3:])

    def made() -> tuple[Any, ...]:
        x, caches, numbers = drawn(1, "cuda")
        return x, *caches, *numbers

    session = Session(Config(target=Arch("sm_90")))
    (source,) = codegen(flat, made, "sm_90", session)
    assert session.report.model_graphs[0].rewrites == [DONE]
    (launch,) = re.findall(r"triton_for\w*\.run\((.*)\)", source[source.index("def call(") :])
    assert len(re.findall(r"\barg\d+_1\b", launch)) == 6  # each counter read, and written


def test_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    caches = [transformers.StaticCache(config=config, max_cache_len=16) for _ in range(2)]
    compiled = fusionpass.compile(transformers.LlamaForCausalLM(config).eval(), cache=False, numerics="eager")
    compiled.load_state_dict(model.state_dict())
    with torch.no_grad():
        for tokens in (5, 1, 1):
            ids = torch.randint(0, 50, (1, tokens))
            ours, eager = (m(ids, past_key_values=c).logits for m, c in zip((compiled, model), caches, strict=True))
            torch.testing.assert_close(ours, eager)
    numbers = [[layer.cumulative_length.item() for layer in cache.layers] for cache in caches]
    assert numbers == [[7, 7, 7]] * 2
    graphs = fusionpass.report(compiled).model_graphs
    assert [DONE in graph.rewrites for graph in graphs] == [False, *[True] * (len(graphs) - 1)]
