"""When: every spelling and fold of the package, in the order in which they are tried."""

from ..rule import Beside, Fold, Spelling
from . import activation, attention, gemm, libraries, norm, quant, rope

SPELLINGS: tuple[Spelling, ...] = (
    *norm.SPELLINGS,
    *activation.SPELLINGS,
    *quant.SPELLINGS,
    *libraries.SPELLINGS,
    *rope.SPELLINGS,
)
FOLDS: tuple[Fold | Beside, ...] = (*norm.FOLDS, *activation.FOLDS, *rope.FOLDS, *gemm.FOLDS, *attention.FOLDS)
