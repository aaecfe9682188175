"""Masks that are computed from sizes alone: which are proven to be causal, and that nothing else is taken for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention as sdpa

import fusionpass
from fusionpass import Config
from fusionpass.passes.masks import masks

CAUSAL = "1 x attention: the mask is causal, and is left out"
NOTHING = "1 x attention: the mask hides nothing, and is left out"


def drawn(tokens: int, batch: int = 2, keys: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(batch, 3, tokens, 8, generator=generator)
    return q, torch.randn(batch, 3, keys or tokens, 8, generator=generator)


def found(
    mask: Callable[..., Any], *more: torch.Tensor, tokens: int = 7, keys: int | None = None, dynamic: bool = False
) -> list[str]:
    """What the pass says of attention with `mask(q, k, *more)`; the graph gives what it gave before."""
    lines: list[str] = []

    def backend(gm: GraphModule, inputs: Any) -> Callable[..., Any]:
        lines.extend(masks(gm))
        gm.graph.lint()
        calls = gm.graph.find_nodes(op="call_function", target=sdpa)
        left = [node.kwargs.get("attn_mask") is not None for node in calls]
        assert left == ["stays" in line for line in lines]
        return gm.forward

    def call(q: torch.Tensor, k: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        return sdpa(q, k, k, attn_mask=mask(q, k, *more))

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=backend, dynamic=dynamic)
    sizes = (tokens, tokens + 4) if dynamic else (tokens,)
    for size in sizes:
        q, k = drawn(size, keys=keys)
        torch.testing.assert_close(compiled(q, k, *more), call(q, k, *more))
    return lines


def places(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = torch.arange(q.shape[-2]), torch.arange(k.shape[-2])
    return rows[:, None], columns[None, :]


def causal(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    rows, columns = places(q, k)
    return columns <= rows


def packed(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """As transformers has it where it looks for sequences in the positions."""
    positions = (torch.arange(q.shape[-2]) + 0).unsqueeze(0)
    sequence = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    batch = torch.arange(1)[:, None, None, None]
    rows = torch.arange(q.shape[-2])[None, None, :, None]
    columns = torch.arange(k.shape[-2])[None, None, None, :]
    seen = rows.new_ones((), dtype=torch.bool)
    seen = seen & (sequence[batch, rows] == sequence[batch, columns]).to(q.device)
    seen = seen & (positions.expand(1, -1)[batch, columns] <= positions.expand(1, -1)[batch, rows])
    return seen.expand(q.shape[0], -1, -1, -1)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "mask",
    [
        causal,
        packed,
        lambda q, k: places(q, k)[0] >= places(q, k)[1],
        lambda q, k: places(q, k)[1] < places(q, k)[0] + 1,
        lambda q, k: places(q, k)[0] + 5 > places(q, k)[1] + 4,
        lambda q, k: (torch.arange(2, q.shape[-2] + 2)[:, None] - 2 >= torch.arange(k.shape[-2])).clone(),
        lambda q, k: torch.arange(q.shape[-2] + 3)[3:, None] >= torch.arange(3, k.shape[-2] + 3),
    ],
    ids=["le", "packed", "ge", "lt", "gt", "from two", "slice"],
)
def test_causal(mask: Callable[..., Any], dynamic: bool) -> None:
    assert found(mask, dynamic=dynamic) == [CAUSAL]


def test_hides_nothing() -> None:
    assert found(lambda q, k: places(q, k)[0].new_ones((q.shape[-2], k.shape[-2]), dtype=torch.bool)) == [NOTHING]
    assert found(lambda q, k: torch.arange(9)[2:].unsqueeze(1).expand(7, 7) - 1 > places(q, k)[1] - 8) != [CAUSAL]
    assert found(lambda q, k: (places(q, k)[0] == places(q, k)[0]) & (places(q, k)[1] >= 0), dynamic=True) == [NOTHING]


def stays(reason: str) -> list[str]:
    return [f"1 x attention: the mask stays: {reason}"]


def test_what_is_not_causal_stays() -> None:
    assert found(lambda q, k: places(q, k)[1] <= places(q, k)[0] + 1) == stays("it shows key <= query + 1")
    assert found(lambda q, k: places(q, k)[1] < places(q, k)[0] + 2) == stays("it shows key < query + 2")
    assert found(lambda q, k: places(q, k)[0] <= places(q, k)[1]) == stays("it shows query <= key")
    window = found(lambda q, k: causal(q, k) & (places(q, k)[0] - places(q, k)[1] < 4))
    assert window[0].startswith("1 x attention: the mask stays: it shows (key <= query)")
    assert found(lambda q, k: causal(q, k) | (places(q, k)[1] == 0))[0].startswith("1 x attention: the mask stays")


def test_what_depends_on_an_input_stays_and_says_on_which() -> None:
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]).bool()
    lines = found(lambda q, k, padding: causal(q, k) & (padding[:, None, None, :] | causal(k, q)[None]), padding)
    assert lines == stays("it depends on l_more_0_, which is given")
    positions = torch.tensor([0, 1, 2, 0, 1, 2, 3])
    lines = found(lambda q, k, at: (at[:, None] >= at[None]) & (at[:, None] - at[None] <= places(q, k)[0]), positions)
    assert lines == stays("it depends on l_more_0_, which is given")


def test_more_keys_than_queries_are_no_reason_for_is_causal() -> None:
    assert found(causal, keys=9) == stays("it is causal, but there are 7 queries and 9 keys")
    offset = found(lambda q, k: places(q, k)[1] <= places(q, k)[0] + 2, keys=9)
    assert offset == stays("it shows key <= query + 2")


def test_additive_masks_and_other_arithmetic_are_unknown() -> None:
    def added(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.zeros(q.shape[-2], k.shape[-2]).masked_fill(causal(q, k), float("-inf"))

    assert found(added) == stays("nothing is known of zeros (zeros)")
    assert found(lambda q, k: causal(q, k).flip(0)) == stays("nothing is known of flip (flip)")
    assert found(lambda q, k: causal(q, k)[[0, 2, 1, 3, 4, 5, 6]])[0].startswith("1 x attention: the mask stays")
    gaps = found(lambda q, k: torch.arange(0, 14, 2)[:, None] >= torch.arange(7))
    assert gaps[0] in (*stays("it shows key <= 2*query"), *stays("it shows 2*query >= key"))
    assert found(lambda q, k: torch.arange(7.0)[:, None] >= torch.arange(7.0)) == stays("arange_1 is torch.float32")


def test_positions_that_jump_are_no_one_sequence() -> None:
    def mask(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(7).unsqueeze(0)
        sequence = (torch.diff(positions, prepend=positions[:, :1] - 3, dim=-1) != 1).cumsum(-1)[0]
        return causal(q, k) & (sequence[:, None] == sequence[None])

    assert found(mask) == stays("differences that are not all the same")


def test_what_is_written_to_is_not_what_its_formula_says() -> None:
    def mask(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(7)
        rows[2:3].add_(3)
        return rows[:, None] >= torch.arange(7)

    assert found(mask)[0].endswith("may be written to")

    def whole(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        seen = causal(q, k).clone()
        seen[:, 0] = True
        return seen

    assert found(whole)[0].endswith("may be written to")


def test_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=50,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config).eval()
    ids = torch.randint(0, 50, (1, 12))
    padding = torch.ones_like(ids)
    padding[:, :3] = 0
    with torch.no_grad():
        expected, padded = model(input_ids=ids).logits, model(input_ids=ids, attention_mask=padding).logits
        report = fusionpass.explain(model, input_ids=ids, use_cache=False)
        assert "2 x attention: the mask is causal, and is left out" in str(report)
        assert report.to_dict()["model_graphs"][0]["rewrites"] == report.model_graphs[0].rewrites
        kept = fusionpass.explain(model, input_ids=ids, use_cache=False, config=Config(disable={"masks"}))
        assert kept.model_graphs[0].rewrites == []
        fusionpass.compile(model, numerics="eager", cache=False)
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)
        torch.testing.assert_close(
            model(input_ids=ids, attention_mask=padding, use_cache=False).logits[:, 3:], padded[:, 3:]
        )
    first, second = fusionpass.report(model).model_graphs
    assert first.rewrites == ["2 x attention: the mask is causal, and is left out"]
    assert second.rewrites == ["2 x attention: the mask stays: it depends on l_kwargs_attention_mask_, which is given"]
