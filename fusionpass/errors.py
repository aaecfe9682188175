"""One class per user mistake. Every message says what, where and the next step."""

import difflib
from collections.abc import Iterable


class FusionpassError(Exception):
    """Base of all errors raised by fusionpass.

    Args:
        what: what is wrong, a full clause.
        where: the module path, argument or file concerned; may be empty.
        next_step: what the user can do about it; may be empty.
    """

    def __init__(self, what: str, where: str = "", next_step: str = "") -> None:
        self.what, self.where, self.next_step = what, where, next_step
        head = f"{where}: {what}" if where else what
        super().__init__(f"{head}. {next_step}" if next_step else head)


class ConfigError(FusionpassError):
    """A field of `Config` has a value that it cannot take."""


class ArchError(FusionpassError):
    """A target architecture that does not exist or does not fit the request."""


class BuildError(ArchError):
    """A target whose tensors this build of torch cannot make, not even without data."""


class SchemeError(FusionpassError):
    """A quantisation scheme that does not exist or does not fit the tensor."""


class ScaleError(FusionpassError):
    """A scale that is not positive, not finite, or of the wrong shape."""


class LayoutError(FusionpassError):
    """A layout of weights that does not exist, is not what is there, or would move memory that has to stay."""


class CalibrationError(FusionpassError):
    """Calibration data is missing, or a linear never ran on it."""


class SkipError(FusionpassError):
    """A skip rule that matches no module."""


class CheckpointError(FusionpassError):
    """A folder does not hold the quantised weights that a model needs, or a model cannot be stored as asked."""


class NothingToQuantizeError(FusionpassError):
    """The module holds no linear that could be quantised."""


class ArgumentError(FusionpassError):
    """An op was called with tensors whose shapes, dtypes or devices do not fit."""


class ModelError(FusionpassError):
    """A model that the command line was asked to load is not there."""


class RuleError(FusionpassError):
    """A spelling or a fold does not describe the op that it claims to be."""


class MissError(FusionpassError):
    """Something did not fuse and `on_miss="error"` asks for an exception."""


class TableError(FusionpassError):
    """A file of tuned configurations does not hold what such a file holds."""


class TuningError(FusionpassError):
    """A kernel cannot be tuned as asked: no device, no such sizes, or a key that its plan does not know."""


class ChangedError(FusionpassError):
    """A weight is no longer what a model was compiled for, and `guards="inputs"` keeps that from being noticed."""


class NotCompiledError(FusionpassError):
    """A report was asked for a model that fusionpass has not compiled."""


class TableWarning(UserWarning):
    """A part of a table of tuned configurations is left out."""


class ShardWarning(UserWarning):
    """Linears that are one product in many engines are quantised in part."""


class RecompileWarning(UserWarning):
    """Something was compiled again and again: soon Dynamo gives up on it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A next step that names the closest of `known` to `name`, and all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f"Did you mean {close[0]!r}? " if close else ""
    return f"{guess}Known: {', '.join(known)}"
