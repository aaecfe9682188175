"""What a user can change so that a site fuses, from the reason why it did not."""

import re
from collections.abc import Callable

from .trace import Record

_RULE = "or add a spelling of your own (docs/add-a-rule.md)"

_ADVICE: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r"^(\S+) is disabled by Config\.disable", lambda m: f'Take "{m[1]}" out of Config.disable (FUSIONPASS_DISABLE).'),
    (
        r"then at (\S+): expected (.+?) to read it, found (.+)$",
        lambda m: f"Let {m[2]} follow {m[1]} directly, where the model has {m[3]}, {_RULE}.",
    ),
    (
        r"then(?: at \S+)?: expected (.+?), found (.+)$",
        lambda m: f"Write {m[1]} there, where the model has {m[2]}, {_RULE}.",
    ),
    (r"then(?: at \S+)?: (.+)$", lambda m: f"Spell it as the rule does ({m[1]}), {_RULE}."),
    (
        r"(\S+) is also read by (\S+), outside",
        lambda m: f"Let {m[2]} read what the op returns, not {m[1]} from the middle of it.",
    ),
    (r"(\S+) is read by (\S+) more than once", lambda m: f"Let {m[2]} read {m[1]} once."),
    (
        r"(\S+) is computed after (\S+) reads",
        lambda m: f"Compute {m[1]} before {m[2]}: a fused op runs once, when all its inputs are there.",
    ),
    (r"(\S+) writes to memory in between", lambda m: f"Do the write in place ({m[1]}) before the site or behind it."),
    (r"copied before it is written", lambda m: "Pass the cache as an input, and read it only through the op's result."),
    (
        r"quantised (?:as|with) .* already",
        lambda m: "Quantise all that read this tensor with one scheme, and where it is static with one scale.",
    ),
    (r"the op would return .*strides", lambda m: "Lay the input out contiguously in front of the site."),
    (r"the op would return", lambda m: "Give the result the shape and dtype that the op returns."),
    (r"has shape \([^)]*\), x has width (\d+)", lambda m: f"Use a weight of {m[1]} elements, one for each column."),
    (r"^verify: ", lambda m: "The rewrite gave other numbers: please report it, with the model's line."),
    (r"made float32 just before", lambda m: "Give the kernel the narrow tensor; else Inductor fuses the cast."),
    (r"no rule folds it into (.+?), which", lambda m: f"Add a Fold of {m[1]} and the op (docs/add-a-rule.md)."),
    (r"a CPU target", lambda m: 'Nothing is lost; explain a GPU with Config(target=Arch("sm_90")) or --target sm_90.'),
)


def advise(kind: str, record: Record) -> str:
    """What can be changed about one site.

    Args:
        kind: "fused", "refused" or "missed".
        record: of that site.

    Returns:
        A sentence; empty for a fused site that is run by a kernel, or where there is nothing to change.
    """
    for pattern, say in _ADVICE:
        if found := re.search(pattern, record.reason):
            return say(found)
    if kind == "fused":
        return ""
    return f"Change what the reason names, {_RULE}."
