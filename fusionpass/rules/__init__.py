"""When: every spelling and fold of the package, in the order in which they are tried."""

from ..rule import Fold, Spelling
from . import norm, quant

SPELLINGS: tuple[Spelling, ...] = (*norm.SPELLINGS, *quant.SPELLINGS)
FOLDS: tuple[Fold, ...] = (*norm.FOLDS,)
