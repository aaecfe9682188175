"""beside: what a rule of a user's may get wrong is refused, with the reason."""

from typing import Any

import pytest
import torch

import fusionpass
from fusionpass import Beside, Config
from fusionpass.errors import ConfigError
from fusionpass.ops import qk_rope, rope
from fusionpass.rules.rope import _both
from tests.test_rope import CACHES, COS, SIN, K, Q, V, heads, llama


def reasons(join: Any, verify: bool = False) -> list[str]:
    """Why the rule with this `join` is refused; what it refuses stays apart."""
    rule = Beside("test.pair", rope, rope, qk_rope, ("cos", "sin"), join)
    config = Config(rules=(rule,), disable={"qk_rope.pair"}, verify=verify)

    def model(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return llama(heads(q), cos, sin), llama(heads(k), cos, sin)

    report = fusionpass.explain(model, Q, K, COS, SIN, config=config)
    assert report.count("qk_rope") == (not report.refused)
    return [record.reason for record in report.refused if record.rule == "test.pair"]


def changed(**changes: Any) -> Any:
    def join(q: dict[str, Any], k: dict[str, Any]) -> Any:
        arguments, *renamed = _both(q, k)
        return {**arguments, **changes}, *renamed  # type: ignore[dict-item]

    return join


def test_what_fits_is_made() -> None:
    assert not reasons(_both)


def test_arguments_that_the_op_does_not_take() -> None:
    (reason,) = reasons(changed(paired=True))
    assert "no more than x has" in reason


def test_another_layout() -> None:
    (reason,) = reasons(changed(style="deinterleaved"))
    assert "strides" in reason


def test_another_meaning_is_seen_on_numbers() -> None:
    assert not reasons(changed(style="interleaved")), "nobody looks"
    (reason,) = reasons(changed(style="interleaved"), verify=True)
    assert "q_rotated differs" in reason


def test_what_reads_the_results_may_be_behind_other_writes() -> None:
    """Of a layer's piece, whose attention is the next one's, only the copies back at the end read the caches."""

    def model(q: Any, k: Any, v: Any, cos: Any, sin: Any, count: Any, keys: Any, values: Any) -> Any:
        at = torch.arange(q.shape[1]) + count
        count.add_(q.shape[1])
        keys.index_copy_(2, at, llama(heads(k), cos, sin))
        values.index_copy_(2, at, heads(v))
        return llama(heads(q), cos, sin)

    caches = [cache.clone() for cache in CACHES]
    report = fusionpass.explain(model, Q, K, V, COS, SIN, torch.zeros((), dtype=torch.int64), *caches)
    assert [record.op for record in report.fused] == ["qk_rope_cache"]
    assert report.refused == []


def test_a_disabled_rule() -> None:
    report = fusionpass.explain(
        lambda q, k, cos, sin: (llama(heads(q), cos, sin), llama(heads(k), cos, sin)),
        *(Q, K, COS, SIN),
        config=Config(disable={"qk_rope.pair"}),
    )
    assert [record.reason for record in report.refused] == ["qk_rope.pair is disabled by Config.disable"]


def test_only_rules_are_rules() -> None:
    with pytest.raises(ConfigError, match="not a collection of rules"):
        Config(rules=(rope,))  # type: ignore[arg-type]
