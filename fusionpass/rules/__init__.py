"""When: every spelling and fold of the package, in the order in which they are tried."""

from ..rule import Fold, Spelling
from . import activation, libraries, norm, quant

SPELLINGS: tuple[Spelling, ...] = (
    *norm.SPELLINGS,
    *activation.SPELLINGS,
    *quant.SPELLINGS,
    *libraries.SPELLINGS,
)
FOLDS: tuple[Fold, ...] = (*norm.FOLDS, *activation.FOLDS)
