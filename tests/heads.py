"""What the tests of ops on heads share: arguments to draw, and the check against the reference."""

from typing import Any

import torch
from hypothesis import strategies as st

from fusionpass.arch import Arch
from fusionpass.op import EXACT, OPS, Op
from fusionpass.ops.norm import AFTER, BEFORE
from fusionpass.ops.rope import DEINTERLEAVED, EACH, HALF, INTERLEAVED, LAST
from fusionpass.testing import activation_dtype, difference, exact, relative_error
from tests.kernels import DTYPES, alike_strides, poisoned

HEAD_OPS = tuple(
    op
    for op in OPS.values()
    if op.backends and op.namespace == "fusionpass" and {"cos", "q_weight"} & {*op.signature.parameters}
)
WIDTHS = (4, 6, 8, 20, 64, 80, 96, 128, 192, 256)
FP8 = torch.float8_e4m3fn


@st.composite
def heads(
    draw: st.DrawFn, groups: int, count: int, tokens: int, width: int, dtype: torch.dtype, device: str, rank: int
) -> torch.Tensor:
    """Heads in any memory order, a slice of a wider row at times: [groups, heads, tokens, width], or without groups."""
    generator = torch.Generator(device).manual_seed(draw(st.integers(0, 2**31)))
    pad = draw(st.sampled_from([0, 0, 1, 8]))
    first = draw(st.booleans())
    middle = (tokens, count + pad) if first else (count, tokens + pad)
    made = torch.randn(groups, *middle, width, generator=generator, device=device)
    made = (made * draw(st.sampled_from([0.01, 1.0, 30.0]))).to(dtype)
    made = made[:, :, :count].transpose(1, 2) if first else made[:, :, :tokens]
    return made if rank == 4 else made[0]


@st.composite
def arguments_for_heads(draw: st.DrawFn, op: Op, device: str, most: int = 5, dtypes: Any = DTYPES) -> dict[str, Any]:
    """Arguments of `op` by the names in its signature."""
    wanted = op.signature.parameters
    dtype = draw(st.sampled_from(dtypes))
    rank = draw(st.sampled_from([4, 4, 3]))
    groups = draw(st.integers(1, 3)) if rank == 4 else 1
    tokens, width = draw(st.integers(0, most)), draw(st.sampled_from(WIDTHS))
    q_heads, k_heads = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    generator = torch.Generator(device).manual_seed(draw(st.integers(0, 2**31)))

    def activation(count: int) -> torch.Tensor:
        made: torch.Tensor = draw(heads(groups, count, tokens, width, dtype, device, rank))
        return made

    made: dict[str, Any] = {name: activation(k_heads if name != "q" else q_heads) for name in "xqkv" if name in wanted}
    if "cos" in wanted:
        paired = draw(st.booleans())
        turned = draw(st.sampled_from([width, width, max(4, width // 4 * 2)]))
        table = draw(st.sampled_from([dtype, dtype, torch.float32]))
        shape = (draw(st.sampled_from([1, groups])), 1, tokens, turned // 2 if paired else turned)
        angle = torch.rand(shape[4 - rank :], generator=generator, device=device) * 6.3
        made |= {"cos": angle.cos().to(table), "sin": angle.sin().to(table), "paired": paired}
        made["style"] = draw(st.sampled_from([HALF, INTERLEAVED, DEINTERLEAVED]))
        made["rounding"] = draw(st.sampled_from([EACH, LAST]))
        if "positions" in wanted:
            made["rounding"] = LAST if table != dtype else made["rounding"]
    if "norm_rounding" in wanted:
        made["norm_rounding"] = draw(st.sampled_from([BEFORE, AFTER]))
        made["weight_offset"] = draw(st.sampled_from([0.0, 1.0])) if made["norm_rounding"] == AFTER else 0.0
        if "heads_dim" in wanted and width >= 8:  # of fewer, heads may come in a layout of their own
            made["heads_dim"] = draw(st.sampled_from([-1, rank - 3]))
        whole = made.get("heads_dim", -1) >= 0
        for name, count in (("weight", k_heads), ("q_weight", q_heads), ("k_weight", k_heads)):
            if name in wanted and draw(st.booleans()):
                made[name] = torch.randn(width * (count if whole else 1), generator=generator, device=device).to(dtype)
        for name in ("eps", "q_eps", "k_eps"):
            if name in wanted:
                made[name] = draw(st.sampled_from([1e-6, 1e-5, 0.1]))
    if "norm_first" in wanted:
        wide = made["rounding"] == EACH and torch.promote_types(dtype, made["cos"].dtype) != dtype
        made["norm_first"] = wide or draw(st.booleans())
    if "positions" in wanted:
        slots = tokens + draw(st.integers(0, 6))
        made["dim"] = rank - 2
        made["positions"] = torch.randperm(slots, generator=generator, device=device)[:tokens]
        made["k_cache"] = draw(heads(groups, k_heads, slots, width, dtype, device, rank))
        made["v_cache"] = draw(heads(groups, k_heads, slots, width, dtype, device, rank))
        if draw(st.booleans()):
            made |= {"v": None, "v_cache": None}
        made["k_out"] = draw(st.booleans())
    if "q_scale" in wanted:
        made["code_scheme"] = draw(st.sampled_from(["fp8_static", "fp8_static,rounding=divide"]))
        for name in ("q", "k", "v"):
            cache = f"{name}_cache"
            if f"{name}_scale" in wanted and draw(st.booleans()) and made.get(cache, made["q"]) is not None:
                made[f"{name}_scale"] = torch.full(draw(st.sampled_from([(), (1, 1)])), 0.037, device=device)
                if cache in wanted:
                    made[cache] = draw(heads(groups, k_heads, slots, width, FP8, device, rank))
    return op.bind((), made)


def check_heads(op: Op, arch: Arch, arguments: dict[str, Any]) -> list[torch.Tensor]:
    """Run the kernel of `op`: within the op's tolerance of the reference, its strides, and no further from float64."""
    launch, reason = op.plan(arch, arguments)
    assert launch is not None, reason
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    with poisoned():
        outputs = launch.run()
    for name, value in before.items():
        assert torch.equal(_bytes(value), _bytes(arguments[name])), f"{name} was written to"
    results = op.reference(**arguments)
    expected = [results] if op.single else results
    names = op.outputs(arguments)
    oracles = exact(op, arguments)
    assert len(outputs) == len(names) == len(expected)
    rounded = activation_dtype(arguments) if "norm_rounding" in arguments else None
    for name, output, want, oracle in zip(names, outputs, expected, oracles, strict=True):
        found = difference(output, want, op.tolerance.get(name, EXACT), rounded)
        assert found.within(op.tolerance.get(name, EXACT)), f"{name}: {found}"
        if name in ("k_cache", "v_cache"):
            continue  # index_put gives a dense copy, the kernel one like the cache
        assert alike_strides(output, want), f"{name}: strides {output.stride()}, not {want.stride()}"
        if oracle.numel():
            slack = torch.finfo(output.dtype).eps / oracle.numel() ** 0.5 + 1e-6
            assert relative_error(output, oracle) <= 1.05 * relative_error(want, oracle) + slack
    return outputs


def _bytes(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1).contiguous().view(torch.uint8)
