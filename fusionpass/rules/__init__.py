"""When: every spelling and fold of the package, in the order in which they are tried."""

from ..rule import Fold, Spelling
from . import activation, norm, quant

SPELLINGS: tuple[Spelling, ...] = (*norm.SPELLINGS, *activation.SPELLINGS, *quant.SPELLINGS)
FOLDS: tuple[Fold, ...] = (*norm.FOLDS, *activation.FOLDS)
