"""What a user can choose. The only reader of the environment (FUSIONPASS_*)."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arch import Arch
from .errors import ConfigError, nearest

if TYPE_CHECKING:
    from .rule import Beside, Fold, Spelling

_CHOICES = {
    "numerics": ("fast", "eager"),
    "cuda_graphs": ("auto", "piecewise", "full", "off"),
    "guards": ("all", "inputs"),
    "on_miss": ("ignore", "warn", "error"),
}
_PASSES = ("masks", "counters", "normalize", "recognise", "fuse")
"""The passes that `disable` may name; what comes after them is needed for code to come out."""


@dataclass(frozen=True)
class Config:
    """Options of one `compile` call. Immutable; state never lives here.

    Args:
        disable: names of rules ("norm.llama"), ops ("add_rms_norm"), passes ("fuse") or backends ("triton") to leave
            out; "pdl": no kernel is launched before the one in front of it has ended.
        numerics: "eager" keeps every intermediate rounding of eager mode; "fast" lets Inductor drop those that it
            drops by default (it keeps float32 between operators).
        cuda_graphs: "full": one CUDA graph a call; "piecewise": one a piece, with `boundaries` and the attention of
            other libraries than PyTorch outside; "auto": full where every op can be captured, else piecewise; "off".
        capture_sizes: token counts to capture at the first call, and to pad other calls to where rows are proven
            independent; None: sizes are captured as they come, at their second call.
        boundaries: operators that stay out of CUDA graphs, and where the graph is cut: "lib::op", or the full name of a
            function.
        graph_limit: how many CUDA graphs are kept; the least recently used is dropped.
        graph_memory: how many MiB they may hold together; None: no limit.
        cache: keep compiled pieces on disk, so that the next process starts warm.
        traces: keep what Dynamo made of the model there, too, so that the next process does not trace it; None: under
            the versions of torch that it is tested with.
        cache_dir: where; None: "fusionpass" in the user's cache folder.
        guards: what is checked at each call: "all" that Dynamo read, or its "inputs" alone, so that a call of a deep
            model returns sooner. With "inputs", compile again after any change of the model, of its mode or of a
            global that it reads; new values of its weights are seen all the same. A module is called `self` then.
        on_miss: what happens when something that looks like a fusion site did not fuse: "ignore" records it in the
            report, "warn" also warns, "error" raises `MissError`.
        verify: run every rewrite beside what it replaces, on random and awkward inputs of the traced shapes, before it
            is made; one that differs by more than the op's tolerance is not made, and the report says so. Slow.
        dump_dir: a folder for the graphs before and after each pass and the generated code.
        target: the target to plan kernels for; None: that of the traced inputs.
        gemm: what computes products, by kind ({"mxfp8": "flashinfer_cutlass"}), instead of the first that can;
            `fusionpass explain --gemm` lists both. What cannot compute one in the model is an error then.
        rules: spellings and folds of one's own, tried before the package's. Not settable by the environment.

    Every field can be set by the environment as FUSIONPASS_<FIELD> (lists separated by commas, pairs as kind=name); an
    argument wins.

    Raises:
        ConfigError: a value that does not exist.
    """

    disable: frozenset[str] = frozenset()
    numerics: str = "fast"
    cuda_graphs: str = "auto"
    capture_sizes: tuple[int, ...] | None = None
    boundaries: frozenset[str] = frozenset()
    graph_limit: int = 64
    graph_memory: int | None = None
    cache: bool = True
    traces: bool | None = None
    cache_dir: Path | None = None
    guards: str = "all"
    on_miss: str = "ignore"
    verify: bool = False
    dump_dir: Path | None = None
    target: Arch | None = None
    gemm: Mapping[str, str] = field(default_factory=dict, hash=False)
    rules: tuple["Spelling | Fold | Beside", ...] = ()

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name}={value!r} does not exist", "Config", nearest(str(value), choices))
        for name in ("verify", "cache", "traces"):
            if not isinstance(getattr(self, name), bool) and not (name == "traces" and self.traces is None):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not a bool", "Config", "Pass True or False")
        for name, example in (("disable", '{"norm.llama"}'), ("boundaries", '{"lib::op"}')):
            object.__setattr__(self, name, _names(name, getattr(self, name), example))
        for name in ("dump_dir", "cache_dir"):
            folder: object = getattr(self, name)
            if isinstance(folder, str | Path):
                object.__setattr__(self, name, Path(folder))
            elif folder is not None:
                raise ConfigError(f"{name}={folder!r} is not a path", "Config", 'Pass "some/folder"')
        object.__setattr__(self, "capture_sizes", _sizes(self.capture_sizes))
        for name, least in (("graph_limit", 1), ("graph_memory", 0)):
            number: object = getattr(self, name)
            if not (_is_int(number) and number >= least) and not (name == "graph_memory" and number is None):  # type: ignore[operator]
                raise ConfigError(f"{name}={number!r} is not an int of at least {least}", "Config", "Pass 64")
        target: object = self.target
        if target is not None and not isinstance(target, Arch):
            raise ConfigError(f"target={target!r} is not an Arch", "Config", 'Pass fusionpass.Arch("sm_90")')
        object.__setattr__(self, "gemm", _algorithms(self.gemm))
        object.__setattr__(self, "rules", _checked(self.rules))

    @staticmethod
    def make(config: "Config | None" = None, overrides: Mapping[str, Any] | None = None) -> "Config":
        """`config` (default: what the environment says) with `overrides`.

        Raises:
            ConfigError: an option or a value that does not exist.
        """
        fields = {f.name for f in dataclasses.fields(Config)}
        for name in overrides or {}:
            if name not in fields:
                raise ConfigError(f"there is no option {name!r}", "Config", nearest(name, fields))
        made = dataclasses.replace(config or _from_environment(fields), **(overrides or {}))
        for name in sorted(made.disable):
            if name not in (known := _can_be_disabled() | {rule.name for rule in made.rules}):
                raise ConfigError(f"disable names {name!r}, which does not exist", "Config", nearest(name, known))
        return made


def config_dir() -> Path | None:
    """The folder of the user's tuned tables, FUSIONPASS_CONFIG_DIR, or None.

    Not a field of `Config`: ops that run outside of compiled models ask for it, too.
    """
    text = os.environ.get("FUSIONPASS_CONFIG_DIR")
    return Path(text) if text else None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _names(field: str, given: object, example: str) -> frozenset[str]:
    names: list[Any] = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [None]
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{field}={given!r} is not a collection of names", "Config", f"Pass {example}")
    return frozenset(names)


def _sizes(given: object) -> tuple[int, ...] | None:
    if given is None:
        return None
    sizes: list[Any] = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [None]
    if not sizes or not all(_is_int(size) and size > 0 for size in sizes):
        raise ConfigError(f"capture_sizes={given!r} is not a collection of token counts", "Config", "Pass (1, 8, 64)")
    return tuple(sorted(set(sizes)))


def _algorithms(given: object) -> dict[str, str]:
    if not isinstance(given, Mapping) or not all(isinstance(part, str) for pair in given.items() for part in pair):
        raise ConfigError(f"gemm={given!r} is not algorithms by kind", "Config", 'Pass {"fp8_block128": "triton"}')
    if not given:
        return {}
    from .ops.gemm.dispatch import KINDS

    for kind, name in given.items():
        if kind not in KINDS:
            raise ConfigError(f"gemm names {kind!r}, no kind of product", "Config", nearest(kind, KINDS))
        if name not in ("auto", *KINDS[kind]):
            raise ConfigError(
                f"gemm names {name!r}, no algorithm of {kind}", "Config", nearest(name, ("auto", *KINDS[kind]))
            )
    return dict(given)


def _checked(rules: object) -> tuple["Spelling | Fold | Beside", ...]:
    from .rule import Beside, Fold, Spelling

    given = tuple(rules) if isinstance(rules, Iterable) else (None,)
    if not all(isinstance(rule, Spelling | Fold | Beside) for rule in given):
        raise ConfigError(f"rules={rules!r} is not a collection of rules", "Config", "Pass (fusionpass.Spelling(...),)")
    return given


def _can_be_disabled() -> set[str]:
    from .op import OPS
    from .passes.mixtures import RULE
    from .rules import FOLDS, SPELLINGS

    rules = {RULE} | {spelling.name for spelling in SPELLINGS} | {fold.name for fold in FOLDS}
    backends = {backend.name for op in OPS.values() for backend in op.backends}
    return {*_PASSES, *rules, *backends, "pdl", *(op.name for op in OPS.values())}


def _from_environment(fields: Iterable[str]) -> Config:
    values: dict[str, Any] = {}
    for name in fields:
        text = os.environ.get(f"FUSIONPASS_{name.upper()}")
        if not text or name == "rules":
            continue
        if name in ("disable", "boundaries"):
            values[name] = frozenset(part.strip() for part in text.split(",") if part.strip())
        elif name == "target":
            values[name] = Arch(text)
        elif name == "gemm":
            pairs = [part.partition("=") for part in text.split(",")]
            values[name] = {kind.strip(): algorithm.strip() for kind, _, algorithm in pairs}
        elif name == "capture_sizes":
            values[name] = [int(part) if part.strip().isdecimal() else part for part in text.split(",")]
        elif name in ("graph_limit", "graph_memory"):
            values[name] = int(text) if text.isdecimal() else text
        elif name in ("verify", "cache", "traces"):
            values[name] = {"1": True, "true": True, "0": False, "false": False}.get(text.lower(), text)
        else:
            values[name] = text
    return Config(**values)
