"""What each op of aten does to the rows of its operands: a rule for each family, and the table of ops."""

from collections.abc import Callable
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.utils._pytree import tree_leaves

from ..graphs import aten
from ..ops.moe import experts
from .row_state import Call, Mixed, Rows, State, expression, quotient, text

UNKNOWN = "takes the rows where it is not known to keep them apart"
SIZES = ("size", "length", "end", "repeats", "pad")
"""Arguments that may count rows: the rule, or the shape of the result, says whether the first rows stay the same."""


Rule = Callable[[Call], State]


def aligned(call: Call) -> State:
    """Element by element, with broadcasting."""
    rank = call.results[0].dim()
    found = {Rows(rank - tensor.dim() + at.dim, at.inner) for _, tensor, at in call.tensors() if at is not None}
    if len(found) > 1:
        return f"takes the {call.symbol} rows along different dimensions: {', '.join(map(call.place, call.rows()))}"
    return found.pop() if found else call.made()


def _along(call: Call) -> State:
    """Within the dimensions that it is told, all if it is told none; they may be gone in the result."""
    name, tensor, at = next(call.tensors())
    rank = tensor.dim()
    given = call.args.get("dim", call.args.get("dims"))
    axes = range(rank) if given in (None, []) else [axis % rank for axis in tree_leaves(given)]
    if at is None:
        return UNKNOWN
    if at.dim in axes:
        return f"works along the rows, {call.place(name)}"
    return at if call.results[0].dim() == rank else at.along(at.dim - sum(axis < at.dim for axis in axes))


def _before(count: int) -> Rule:
    """Within the last `count` dimensions of its first operand, which alone has rows; -1: within all but one."""

    def rule(call: Call) -> State:
        name, tensor, at = next(call.tensors())
        if list(call.rows()) != [name]:
            return UNKNOWN
        end = tensor.dim() - count if count >= 0 else 1
        return at if at.dim < end else f"mixes the rows, {call.place(name)}"

    return rule


def _product(result: str, **operands: str) -> Rule:
    """A sum of products: a letter for each dimension, counted from the last; results are separated by commas."""
    results = result.split(",")

    def rule(call: Call) -> State:
        found: set[tuple[str, Any]] = set()
        for name, tensor, at in call.tensors():
            letters = operands.get(name, "")
            if at is None:
                continue
            if tensor.dim() > len(letters) or (name.startswith("scale") and tensor.dtype != torch.float32):
                return f"has rows whose layout is not known, {call.place(name)}"
            found.add((letters[at.dim - tensor.dim()], at.inner))
        (letter, inner), *others = found
        if others or letter not in results[0]:
            return f"mixes the rows, {' and '.join(map(call.place, call.rows()))}"
        return tuple(Rows(r.index(letter), inner) if letter in r else UNKNOWN for r in results)

    return rule


_BY_POSITION = ("is_causal", "custom_mask_type", "window_size", "window_size_left", "window_size_right", "alibi_slopes")


def _attention(result: str, query: str, key: str, value: str) -> Rule:
    """Softmax of a product, times another, written as for `_product`."""
    masks = dict.fromkeys(("attn_mask", "attn_bias", "bias"), "bhls")
    product = _product(result, query=query, key=key, value=value, **masks)

    def rule(call: Call) -> State:
        found = product(call)
        if isinstance(found, str):
            return found
        packed = call.args.get("cum_seq_q") is not None or call.args.get("cu_seqlens_q") is not None
        if packed or (result[found[0].dim] == "l" and any(call.args.get(name) for name in _BY_POSITION)):
            return f"counts positions within the rows, {', '.join(map(call.place, call.rows()))}"
        return (*found, *[UNKNOWN] * (len(call.results) - len(found)))

    return rule


def _viewed(call: Call) -> State:
    """The same elements in the same order."""
    (name, before, at), after = next(call.tensors()), call.results[0]
    if at is None:
        return call.made()
    if "dtype" in call.args:
        return at if at.dim < before.dim() - 1 or before.dtype.itemsize == after.dtype.itemsize else UNKNOWN
    old, new = (list(map(expression, tensor.shape)) for tensor in (before, after))
    for dim, size in enumerate(new):
        if call.symbol in size.free_symbols:
            outer = quotient(old[at.dim], call.symbol * at.inner)
            ahead = quotient(sympy.prod(old[: at.dim]) * outer, sympy.prod(new[:dim]))
            inner = quotient(at.inner * sympy.prod(old[at.dim + 1 :]), sympy.prod(new[dim + 1 :]))
            if ahead is not None and inner is not None:
                return Rows(dim, inner)
    return f"makes {text(after)} of the rows, {call.place(name)}"


def _permuted(call: Call) -> State:
    """With the dimensions in another order."""
    at, rank = call.at("self"), call.tensor("self").dim()
    order = list(range(rank))
    if "dims" in call.args:
        order = [axis % rank for axis in call.args["dims"]]
    elif rank > 1:
        a, b = call.args.get("dim0", 0) % rank, call.args.get("dim1", 1) % rank
        order[a], order[b] = b, a
    return at.along(order.index(at.dim))


def _is_whole(call: Call, size: Any, length: sympy.Expr) -> bool:
    """Whether a slice of this size starts with the first of `length` rows, takes each, and ends with the last."""
    return call.args["start"] in (None, 0) and call.args["step"] == 1 and expression(size) == length


def _sliced(call: Call) -> State:
    state, axis = call.at("self"), call.axis()
    padded = isinstance(state, Mixed)
    at = state.leading if padded else state
    if at is None:
        return call.made()
    if axis != at.dim:
        return UNKNOWN if padded else at
    length = state.length if padded else expression(call.tensor("self").shape[axis])
    whole = _is_whole(call, call.results[0].shape[axis], length)
    return at if whole else f"takes some rows of {text(call.tensor('self'))}"


def _padded(call: Call) -> State:
    at, pad = call.at("self"), call.args["pad"]
    if at is None:
        return UNKNOWN
    # From the last dimension on: how many elements in front, how many behind.
    place = 2 * (call.tensor("self").dim() - 1 - at.dim)
    front, back = [*pad, *[0] * (place + 2)][place : place + 2]
    if front != 0 or any(call.counts(amount) for i, amount in enumerate(pad) if i != place + 1):
        return f"moves the rows, {call.place('self')}"
    reason = f"pads the rows, {call.place('self')}, to {text(call.results[0])}"
    return at if back == 0 else Mixed(reason, leading=at, length=expression(call.tensor("self").shape[at.dim]))


def _joined(call: Call) -> State:
    at, *others = {at for _, _, at in call.tensors()}
    axis = call.args["dim"] % call.results[0].dim()
    if others or at is None:
        return f"joins tensors that have the {call.symbol} rows in different dimensions, or not at all"
    if call.target.overloadpacket is aten.stack:
        return at.along(at.dim + (axis <= at.dim))
    return at if axis != at.dim else f"joins along dimension {axis}, the rows"


def _looked_up(call: Call) -> State:
    """Slices of a table, by index."""
    table, index = ("weight", "indices") if "weight" in call.args else ("self", "index")
    rows, at = call.at(table), call.at(index)
    axis = call.args.get("dim", 0) % call.tensor(table).dim()
    if rows is None:
        return at.along(axis + at.dim)
    return rows if at is None and axis != rows.dim else f"picks rows by index, {call.place(table)}"


def _indexed(call: Call) -> State:
    """`x[:, index]`: the indices' dimensions come where the first index is; first, where they are not neighbours."""
    at, places = call.at("self"), [i for i, index in enumerate(call.args["indices"]) if index is not None]
    given = [(tensor, index) for name, tensor, index in call.tensors() if name == "indices"]
    rank = max(tensor.dim() for tensor, _ in given)
    found = {Rows(rank - tensor.dim() + index.dim, index.inner) for tensor, index in given if index is not None}
    neighbours = places[-1] - places[0] == len(places) - 1
    if at is None and len(found) == 1:
        index = found.pop()
        return index.along(index.dim + (places[0] if neighbours else 0))
    if at is None or found or at.dim in places:
        return f"picks rows by index, of {text(call.tensor('self'))}"
    ahead = 0 if neighbours and at.dim < places[0] else rank
    return at.along(at.dim - sum(i < at.dim for i in places) + ahead)


def _gathered(call: Call) -> State:
    """`self[i, index[i, j]]`; without rows `self` is a table, read at the place of the row too."""
    rows, at, axis = call.at("self"), call.at("index"), call.axis()
    # The place of a row that others are flattened in front of depends on how many rows there are.
    placed = at is not None and expression(call.tensor("index").shape[at.dim]) == call.symbol * at.inner
    if at is None or (rows is None and axis != at.dim and not placed) or (rows is not None and rows != at):
        return f"picks rows by index, of {text(call.tensor('self'))}"
    return at if rows is None or rows.dim != axis else f"picks rows by index, {call.place('self')}"


def _scattered(call: Call) -> State:
    """`self` with some elements replaced."""
    at, rows = call.at("self"), call.rows()
    if at is None:
        return f"writes rows of padding into {call.args['self']}"
    if "dim" not in call.args:
        return UNKNOWN
    axis, packet, length = call.axis(), call.target.overloadpacket, expression(call.tensor("self").shape[at.dim])
    whole = packet is aten.slice_scatter and _is_whole(call, call.tensor("src").shape[at.dim], length)
    if axis == at.dim and not whole:
        return f"writes to rows by their place, {call.place('self')}"
    wanted = at.along(at.dim - (axis < at.dim)) if packet is aten.select_scatter else at
    return at if all(rows.get(name) == wanted for name, _, _ in call.tensors() if name != "self") else UNKNOWN


_HEADS_FIRST = ("bhle", "bgse", "bgsv")
"""Of query, key and value. Which head of the key a head of the query reads depends on how many there are."""

_TABLE: tuple[tuple[Rule, str], ...] = (
    (aligned, "_to_copy alias copy detach lift lift_fresh_copy masked_fill expand repeat"),
    (_along, "sum mean amax amin prod var var_mean any all argmax argmin max min aminmax linalg_vector_norm logsumexp"),
    (_along, "_softmax _log_softmax cumsum cumprod cummax cummin logcumsumexp sort topk flip roll"),
    (_along, "select split split_with_sizes unbind"),
    (_viewed, "view _unsafe_view squeeze unsqueeze"),
    (_permuted, "permute transpose t"),
    (_before(0), "view_as_real"),
    (_before(1), "view_as_complex _weight_int8pack_mm _weight_int4pack_mm"),
    (_before(2), "avg_pool2d max_pool2d_with_indices _adaptive_avg_pool2d"),
    (_before(-1), "convolution"),
    (_sliced, "slice"),
    (_padded, "constant_pad_nd"),
    (_joined, "cat stack"),
    (_looked_up, "embedding index_select"),
    (_indexed, "index _unsafe_index"),
    (_gathered, "gather"),
    (_scattered, "scatter scatter_add scatter_reduce slice_scatter select_scatter"),
    (_scattered, "index_put _unsafe_index_put index_copy index_add index_fill masked_scatter"),
    (_product("mn", self="mk", mat2="kn"), "mm _int_mm"),
    (_product("bmn", self="bmk", mat2="bkn"), "bmm"),
    (_product("mn", self="mn", mat1="mk", mat2="kn"), "addmm"),
    (_product("bmn", self="bmn", batch1="bmk", batch2="bkn"), "baddbmm"),
    (_product("m", self="mk", vec="k"), "mv"),
    (_product("", self="k", tensor="k"), "dot"),
    # The groups that have a scale each are z.
    (_product("mn", self="mk", mat2="kn", scale_a="mz", scale_b="zn", bias="n"), "_scaled_mm"),
    (_attention("b_lv", *_HEADS_FIRST), "scaled_dot_product_attention"),
    (_attention("b_lv,b_l", *_HEADS_FIRST), "_scaled_dot_product_flash_attention _scaled_dot_product_cudnn_attention"),
    (_attention("b_lv,b_l", *_HEADS_FIRST), "_scaled_dot_product_flash_attention_for_cpu"),
    (_attention("b_lv,b_l", *_HEADS_FIRST), "_scaled_dot_product_efficient_attention"),
    (_attention("b_lv,b_l", *_HEADS_FIRST), "_scaled_dot_product_fused_attention_overrideable"),
    (_attention("bl_v,b_l", "blhe", "bsge", "bsgv"), "_flash_attention_forward _efficient_attention_forward"),
)

RULES: dict[Any, Rule] = {
    torch.ops.prims.rev: _along,
    # Sorted by expert inside, and each pair on its own.
    experts.overload.overloadpacket: _product("tk", x="tk", ids="tk", weights="tk", x_scales="tk"),
    **{getattr(aten, name): rule for rule, names in _TABLE for name in names.split() if hasattr(aten, name)},
}
"""Beside ops that torch marks as pointwise, and those that are made of others."""

MADE = {
    torch.ops.prims.iota,
    *(getattr(aten, name) for name in ("full", "zeros", "ones", "empty", "empty_permuted", "arange")),
    *(getattr(aten, f"{name}_like") for name in ("full", "zeros", "ones", "empty")),
    *(getattr(aten, f"new_{name}") for name in ("full", "zeros", "ones", "empty")),
}
"""Ops that read no element: the first rows of what they make are the same however many there are."""
