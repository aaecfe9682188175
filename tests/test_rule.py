"""Rules: what they are made of, what they refuse to be, and rules of one's own."""

from typing import Any

import pytest
import torch

import fusionpass
from fusionpass import Config, Fold, Spelling
from fusionpass.errors import RuleError
from fusionpass.ops import add_rms_norm, rms_norm
from fusionpass.rules import FOLDS, SPELLINGS
from tests.fake_gpu import needs_cuda_build
from tests.models import LlamaNorm

X = torch.zeros(4, 32, dtype=torch.bfloat16)


def by_root(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    h = x.float()
    return weight * (h * torch.sqrt(h.pow(2).mean(-1, keepdim=True) + eps).reciprocal()).to(x.dtype)


def test_names_are_unique_and_have_a_family() -> None:
    names = [rule.name for rule in (*SPELLINGS, *FOLDS)]
    assert len(set(names)) == len(names)
    assert all(name.count(".") == 1 for name in names)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda_build)])
def test_every_spelling_finds_itself(spelling: Spelling, device: str) -> None:
    first = spelling.patterns(device, set())
    for pattern in spelling.patterns(device):
        assert any(one.links <= pattern.links for one in first), "where the first cannot be, no other is looked for"
        (match,) = pattern.search(pattern.anchor)
        assert list(match.outputs) == pattern.outputs
        assert len(match.interior()) == pattern.size
        assert set(match.arguments) == {*pattern.names, *pattern.scalars}


def test_a_number_that_the_graph_does_not_hold() -> None:
    def fixed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return by_root(x, weight, 1e-5)

    with pytest.raises(RuleError, match="Spelling mine: the number 'eps' does not appear"):
        Spelling("mine", rms_norm, fixed).patterns("cpu")


def test_a_fold_must_have_all_arguments() -> None:
    with pytest.raises(RuleError, match=r"Fold mine: nothing gives the arguments \['residual', 'x'\]"):
        Fold("mine", (lambda a, b: a + b,), rms_norm, add_rms_norm, "residual")
    with pytest.raises(RuleError, match=r"nothing gives the arguments \['residual'\] of fusionpass.add_rms_norm"):
        Fold("mine", rms_norm, rms_norm, add_rms_norm, "norm")
    assert Fold("mine", rms_norm, rms_norm, add_rms_norm, "norm", join=lambda given, asked: "never").join is not None


def test_a_spelling_of_ones_own() -> None:
    weight = torch.ones(32, dtype=torch.bfloat16)

    def model(x: torch.Tensor) -> torch.Tensor:
        return by_root(x, weight, 1e-4)

    assert not fusionpass.explain(model, X).fused
    rules = (Spelling("mine.norm", rms_norm, by_root),)
    report = fusionpass.explain(model, X, config=Config(rules=rules))
    assert report.count("rms_norm", rule="mine.norm") == 1
    off = Config.make(Config(rules=rules), {"disable": {"mine.norm"}})
    (refused,) = fusionpass.explain(model, X, config=off).refused
    assert refused.reason == "mine.norm is disabled by Config.disable"


def test_a_fold_of_ones_own_comes_first() -> None:
    norm = LlamaNorm(32)

    def model(x: torch.Tensor, residual: torch.Tensor) -> Any:
        return norm(x + residual)

    def total(residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return residual + x

    mine = Fold("mine.add", (total,), rms_norm, add_rms_norm, "residual")
    report = fusionpass.explain(model, X, X, config=Config(rules=(mine,)))
    assert report.count("add_rms_norm", rule="mine.add") == 1
    assert report.count("add_rms_norm", rule="norm.add") == 0
