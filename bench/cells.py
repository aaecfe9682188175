"""What the kernels' benchmark measures: cells, and the preset that the table in docs/kernels.md is made of."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from fusionpass.ops.quant import Scheme

NORMS = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm")
GATED = ("silu_mul", "gelu_mul")
SCHEMES = ("fp8_static", "fp8_token", "fp8_group128", "mxfp8", "nvfp4", "int8_token")
TOKENS = (1, 16, 64, 256, 1024, 8192, 32768)
HIDDEN = (4096, 8192, 5120, 2880)

USUALLY_WARM = 256
USUAL = (
    f"usual: warm up to {USUALLY_WARM} tokens, as a model's activations are, cold beyond; cold only where big enough"
)
FEW = 64
"""Tokens up to which a call is held against a kernel of one element."""
PLAIN = 4096
"""The width at which plain Inductor and eager mode are timed too."""


@dataclass(frozen=True)
class Cell:
    """One op at one size.

    Attributes:
        op: its name, "+" and further outputs.
        scheme: of an op that quantises.
        tokens: rows.
        hidden: columns.
        regime: "warm", "cold", "both" or "usual".
        ways: the implementations that are timed; None: all.
    """

    op: str
    scheme: str | None
    tokens: int
    hidden: int
    regime: str
    ways: tuple[str, ...] | None = None

    @property
    def title(self) -> str:
        """Op and scheme."""
        return f"{self.op} {self.scheme}" if self.scheme else self.op

    @property
    def family(self) -> tuple[int, str]:
        """What is compiled at once: an op and its quantising forms, of one width."""
        return self.hidden, self.op.partition("+")[0].removesuffix("_quantize")

    @property
    def regimes(self) -> tuple[str, ...]:
        """ "warm", on one set of buffers; "cold", on sets rotated past the L2; or both."""
        if self.regime == "usual":
            return ("warm",) if self.tokens <= USUALLY_WARM else ("cold",)
        return ("warm", "cold") if self.regime == "both" else (self.regime,)


def product(
    names: Iterable[str], schemes: Sequence[str | None], tokens: Iterable[int], hidden: Iterable[int], regime: str
) -> Iterator[Cell]:
    """Every op in every scheme at every size."""
    sizes = [(m, width) for width in hidden for m in tokens]
    return (Cell(name, scheme, *size, regime) for name in names for scheme in schemes for size in sizes)


def table() -> list[Cell]:
    """Every op that a model's layer has, alone and in every scheme, at sizes of models; one width after the other.

    Beside them the sizes, forms and ops that figures of other systems are known of: `verdicts.anchors`.
    """
    cells: list[Cell] = []
    known = (1, 64, 1024, 8192)
    for width in HIDDEN:
        for base in (*NORMS, *GATED):
            cells += product([base], [None], TOKENS, [width], "usual")
            cells += product([f"{base}_quantize"], SCHEMES, TOKENS, [width], "usual")
        cells += product(["quantize"], SCHEMES, TOKENS, [width], "usual")
        if width == PLAIN:
            cells += product(["add_rms_norm_quantize+norm"], ["fp8_group128"], known, [width], "usual")
            cells += product(["quantize"], ["fp8_group128,scale_dtype=float8_e8m0fnu"], known, [width], "usual")
            cells += product(["qk_norm_rope", "qk_norm_rope_cache"], [None], known, [width], "usual")
            cells += product(["silu_mul"], [None], known, [12288], "usual")
            cells += product(["silu_mul_quantize"], SCHEMES[:3], known, [12288], "usual")
    both = {(1024, 4096), (64, 12288)}
    return [
        Cell(c.op, c.scheme, c.tokens, c.hidden, "both" if (c.tokens, c.hidden) in both else c.regime, _ways(c))
        for c in cells
        if c.scheme is None or c.hidden % (Scheme.parse(c.scheme).group or 1) == 0
    ]


def _ways(cell: Cell) -> tuple[str, ...]:
    """Beside peers, wherever there are any."""
    ways = ["copy", "fusionpass", "inductor+pdl"]
    if cell.tokens <= FEW:
        ways.append("one element")
    if cell.hidden == PLAIN:
        ways += ["inductor", *(["eager"] if cell.tokens <= 8192 else [])]
    return tuple(ways)


PRESETS = {"table": table}
