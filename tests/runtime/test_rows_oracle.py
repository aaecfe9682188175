"""Random programs: what is proven of a program holds when it is run, with NaN and anything else as padding."""

import contextlib
import math
import random
import re
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionpass.runtime.rows import row_dims
from tests.runtime.traced_rows import N, trace

SHAPES = {"x": (N, 4), "y": (N, 4), "z": (2, N, 3), "c": (N, 1), "q": (N, 2, 3, 4), "i": (N,), "w": (4, 4), "v": (4,),
          "t": (16, 4), "k": (3,)}  # fmt: skip
INTEGERS = ("i", "k")

UNARY = """
-a | a * 2 + 1 | a.relu() | a.abs() | a.double() | a.sum() | a.sum(0) | a.sum(-1) | a.sum(1, keepdim=True)
a.amax(0, keepdim=True) | a.amax(-1) | a.cumsum(0) | a.cumsum(-1) | a.flip(0) | a.flip(-1) | a.roll(1, 0)
a.transpose(0, 1) | a.transpose(0, -1) | a.permute(1, 0, 2) | a.permute(2, 0, 1) | a.unsqueeze(0) | a.unsqueeze(1)
a.unsqueeze(-1) | a.squeeze() | a.squeeze(0) | a.squeeze(-1) | a.reshape(-1) | a.reshape(-1, 4) | a.reshape(-1, 3)
a.flatten(0, 1) | a.flatten(1) | a.reshape(-1, a.shape[-1]) | a.reshape(a.shape[0], -1) | a.reshape(a.shape[-1], -1)
a.unflatten(-1, (2, 2)) | a.unflatten(0, (2, -1)) | a.unflatten(0, (-1, 4)) | a.unflatten(0, (-1, 2, 3))
a[0] | a[-1] | a[:, 0] | a[..., -1] | a[1:] | a[:3] | a[::2] | a[..., 1:] | a[:, :2] | a[:] | a[None]
F.pad(a, (0, 1)) | F.pad(a, (1, 0)) | F.pad(a, (1, -1)) | F.pad(a, (0, 2))[..., : a.shape[-1]]
F.pad(a, (0, 0, 0, 2))[..., : a.shape[-2], :] | F.pad(a, (0, 0, 2, 0))[..., : a.shape[-2], :]
a.repeat(2, 1) | a.repeat(1, 2) | a.expand(3, -1, -1) | a.expand(2, -1, -1, -1) | a.tril() | torch.cat([a, a])
a * a.shape[0] | a + a.numel() | torch.arange(a.shape[0]).double() | torch.arange(a.numel()).reshape(a.shape).double()
torch.ones_like(a) | a.new_full(a.shape[:2], 3.0) | a.unbind(0)[0] | a.unbind(-1)[0] | a.chunk(2, -1)[1] | a.chunk(2)[0]
a.new_zeros(a.shape[0], a.shape[0]) | a.new_ones(a.shape[0], 2) | torch.var_mean(a, -1, correction=0)[1]
"""
BINARY = """
a + b | a * b | a - b | torch.maximum(a, b) | a + b[:, None] | a * b[..., None] | a @ b | a @ b.t() | a.t() @ b
a @ b.transpose(-1, -2) | a.matmul(b) | F.linear(a, b) | torch.cat([a, b]) | torch.cat([a, b], -1)
torch.cat([a, b], 1) | torch.stack([a, b]) | torch.stack([a, b], -1) | a + b[: a.shape[0]] | a[: b.shape[0]]
a + b[2 : 2 + a.shape[0]]
a.expand(b.shape) | a.expand_as(b) | a.reshape(b.shape) | torch.addmm(a, b, b)
torch.slice_scatter(a, b, -1, 0, b.shape[-1])
torch.select_scatter(a, b, 0, 1) | torch.select_scatter(a, b, -1, 1) | torch.slice_scatter(a, b, 0, 1, 1 + b.shape[0])
"""
INDEXING = """
a[b] | a[:, b] | a[b, b] | a[b, :, b] | a[..., b] | a.index_select(0, b) | a.index_select(-1, b) | F.embedding(b, a)
a.gather(0, b) | a.gather(-1, b) | a.gather(1, b[:, None]) | a.gather(0, b[:, None]) | a.gather(1, b.reshape(-1, 1))
a.scatter(-1, b, 5.0) | a.scatter(0, b, 5.0) | a.scatter(1, b[:, None], 5.0) | a.scatter(0, b[:, None], 5.0)
a.scatter_add(1, b[:, None], a) | a.index_fill(0, b, 2.0) | a.index_add(0, b, a) | a.index_copy(0, b, a[:3])
torch.index_put(a, (b,), a[:1] * 0) | a.take_along_dim(b[:, None], 1) | a[b.sum() % 2] | F.one_hot(b, 4).double()
"""
DISCRETE = """
a.argmax(-1) | a.argmax(0) | a.sort(-1).indices | a.sort(0).values | a.topk(2, -1).values | a.topk(2, 0).values
torch.where(a > 0, a, 2.0) | (a > 0).any(-1).double() | (a > 1).all(0).double() | a.masked_fill(a > 2, 0.0) | a[a > 0]
"""
INEXACT = """
a.softmax(-1) | a.softmax(0) | a.mean(-1) | a.mean(0) | a.mean() | F.layer_norm(a, (4,)) | a.exp() | a / a.sum(-1, True)
a.log_softmax(1) | a / a.shape[0] | F.scaled_dot_product_attention(a, a, a) | torch.sigmoid(a) | a.var(0) | a.std(-1)
F.scaled_dot_product_attention(a, a, a, is_causal=True) | a.logsumexp(-1) | torch.linalg.vector_norm(a, dim=-1)
"""
MUTATIONS = """
a.add_(b) | a.mul_(2) | a[:, 0] = 1.0 | a[..., 1] = b[..., 0] | a[0] = 2.0 | a.zero_() | a[1:] = b[1:] | a.copy_(b)
a[: b.shape[0]] = b | a[:] = a[:] + 1
"""


def choices(text: str) -> list[str]:
    return [part.strip() for line in text.strip().splitlines() for part in line.split("|")]


MODULES = {"torch": torch, "F": F}
POOLS = {name: choices(globals()[name]) for name in ("UNARY", "BINARY", "INDEXING", "DISCRETE", "INEXACT", "MUTATIONS")}
ERRORS = (RuntimeError, IndexError, TypeError, ValueError, AttributeError, NotImplementedError)


def inputs(rows: int) -> dict[str, torch.Tensor]:
    """Small whole numbers, so that sums are exact in any order; the first rows are the same for any number of rows."""
    made = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        sizes = [32 if size == N else size for size in shape]
        values = torch.randint(0 if name in INTEGERS else -3, 4, sizes, generator=torch.Generator().manual_seed(seed))
        made[name] = (values % 3 if name in INTEGERS else values.double())[
            tuple(slice(rows if size == N else None) for size in shape)
        ].clone()
    return made


def padded(values: dict[str, torch.Tensor], fill: float | None) -> dict[str, torch.Tensor]:
    """All rows from the Nth on as something else: `fill`, or random."""
    for name, tensor in values.items():
        if N in SHAPES[name] and name not in INTEGERS:
            tail = tensor.narrow(SHAPES[name].index(N), N, tensor.shape[SHAPES[name].index(N)] - N)
            tail.copy_(
                torch.randn(tail.shape).double() * 100 if fill is None else torch.full(tail.shape, fill).double()
            )
    return values


def grow(draw: random.Random) -> tuple[list[str], float]:
    """A program of statements that eager mode takes, and how far its numbers may be off: not at all, or by rounding."""
    exact = draw.choice([True, False])
    pools = ["UNARY"] * 3 + ["BINARY"] * 3 + ["INDEXING", "DISCRETE" if exact else "INEXACT"]
    pools += draw.choice([["MUTATIONS"], [], [], []])
    env: dict[str, Any] = {**inputs(N), **MODULES}
    program: list[str] = []
    for _ in range(draw.randint(1, 14)):
        pool = draw.choice(pools)
        names = [name for name, value in env.items() if isinstance(value, torch.Tensor)]
        # What was made last is read more often: chains find more than single steps.
        a, b = (draw.choice([*names, *names[-3:], *names[-1:] * 3]) for _ in range(2))
        if pool == "INDEXING":
            b = draw.choice([name for name in names if env[name].dtype == torch.int64])
        line = re.sub(r"\ba\b", "{a}", re.sub(r"\bb\b", "{b}", draw.choice(POOLS[pool]))).format(a=a, b=b)
        name = f"o{len(program)}"
        line = line if pool == "MUTATIONS" else f"{name} = {line}"
        with contextlib.suppress(*ERRORS):
            trial = run([*program, line], inputs(N))
            if all(value.numel() <= 2048 and bool((value.abs() < 2**30).all()) for value in trial.values()):
                env |= trial
                program.append(line)
    return program, 0.0 if exact else 1e-9


def run(program: list[str], values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All values of a program, inputs too."""
    env: dict[str, Any] = {**values, **MODULES}
    exec("\n".join(program), env)
    return {name: env[name] for name in (*values, *(line.split(" = ")[0] for line in program)) if name.isidentifier()}


def proofs(program: list[str]) -> dict[str, int | str | None]:
    """What is proven of each value of a program; nothing where it cannot be traced, or not for any number of rows."""
    names, tensors = zip(*inputs(N).items(), strict=True)

    def function(*given: torch.Tensor) -> list[torch.Tensor]:
        return list(run(program, dict(zip(names, given, strict=True))).values())[len(names) :]

    try:
        graph, symbol, _ = trace(torch.func.functionalize(function, remove="mutations"), *tensors)
    except ERRORS:
        return {}
    if symbol is None:
        return {}
    results = graph.output_node().args[0]
    found: dict[str, int | str | None] = {}
    for name, node in zip(list(run(program, inputs(N)))[len(names) :], results, strict=True):
        graph.output_node().args = ([node],)
        proven = row_dims(graph, symbol)
        found[name] = proven if isinstance(proven, str) else proven[0]
    return found


def check(program: list[str], tolerance: float, found: dict[str, Any], rows: int, fill: float | None) -> None:
    """Run on N rows and on those with others behind: what was proven to have the same first rows has them."""
    try:
        expected, actual = run(program, inputs(N)), run(program, padded(inputs(rows), fill))
    except ERRORS:
        return  # it is for N rows only
    proven = {name: dim for name, dim in found.items() if not isinstance(dim, str)}
    if proven:
        # Nothing was written to an input either that depends on padding.
        proven |= {name: shape.index(N) if N in shape else None for name, shape in SHAPES.items()}
    for name, dim in proven.items():
        same = actual[name] if dim is None else actual[name].narrow(dim, 0, N)
        torch.testing.assert_close(same, expected[name], rtol=tolerance, atol=tolerance, equal_nan=True)


@settings(max_examples=settings.default.max_examples // 4)  # a tenth of a second each
@given(st.randoms(use_true_random=False), st.integers(1, 9), st.sampled_from([math.nan, math.inf, None]))
def test_what_is_proven_holds(draw: random.Random, more: int, fill: float | None) -> None:
    program, tolerance = grow(draw)
    check(program, tolerance, proofs(program), N + more, fill)


def test_much_is_proven_and_much_refused() -> None:
    """Else the test above would be empty."""
    found = [proven for seed in range(100) for proven in proofs(grow(random.Random(seed))[0]).values()]
    assert sum(isinstance(proven, int) for proven in found) > 100
    assert sum(isinstance(proven, str) for proven in found) > 100
