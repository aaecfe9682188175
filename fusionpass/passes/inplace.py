"""Writing a kernel's result where it belongs: to an input of the graph, or to a part of one, that nobody else reads."""

from collections.abc import Iterable, Mapping

import torch
from torch._prims_common import make_contiguous_strides_for
from torch.fx import Node

from ..graphs import VIEWS, aten, outputs_of, same_shape, same_strides, value
from ..launch import Launch
from ..op import Op


@torch.library.custom_op("fusionpass::written_back", mutates_args=("cache",))
def written_back(cache: torch.Tensor, new: torch.Tensor) -> None:
    """`cache.copy_(new)`, where a kernel has written to `cache` already what is in `new`: no work once compiled."""
    cache.copy_(new)


@written_back.register_fake
def _(cache: torch.Tensor, new: torch.Tensor) -> None:
    pass


WRITTEN_BACK = torch.ops.fusionpass.written_back.default


def keep_in_place(backs: Iterable[Node]) -> None:
    """Where what was mutated is a part of an input, the copy of the whole back to the input becomes no work."""
    for back in backs:
        if isinstance(back.args[1], Node) and back.args[1].target in (*VIEWS, aten.select_scatter.default):
            back.target = WRITTEN_BACK
            back.meta.pop("val", None)


def copies_back(op: Op, node: Node, arguments: Mapping[str, object], launch: Launch) -> list[Node] | str:
    """The copy back to each input that the launch mutates, or why what it mutates has to be copied first.

    Only the op may read the old value. Not even an earlier reader may there be: Inductor moves readers, and knows of no
    write yet.
    """
    results = {0: node} if op.single else outputs_of(node)
    parts = {}
    for name in launch.mutates:
        values = (v for v in arguments.values() if isinstance(v, Node) and v.meta["val"] is launch.args[name])
        parts[next(values)] = results.get(launch.returns.index(name))
    chains = {part: chain_of(part) for part in parts}
    within = {link for chain in chains.values() for link in chain}
    found: dict[Node, Node] = {}
    for part, chain in chains.items():
        if chain[-1].op != "placeholder":
            return f"{part.name} is copied before it is written: it is no input of the graph"
        back = _copy_back(chain[-1], part, parts, within | {node})
        if isinstance(back, str):
            return back
        found[chain[-1]] = back
    for part, chain in chains.items():
        for link in chain[:-1]:
            if other := next((user for user in link.users if user not in within | {node}), None):
                return f"{part.name} is copied before it is written: {other.name} reads the old value"
    return list(found.values())


def chain_of(part: Node) -> list[Node]:
    """What a tensor is a view of, from itself to an input: views of what is contiguous, and selections."""
    chain = [part]
    while (link := chain[-1]).target in (*VIEWS, aten.select.int):
        source = link.args[0]
        if not isinstance(source, Node) or (link.target in VIEWS and not _contiguous(source)):
            break
        chain.append(source)
    return chain


def _contiguous(node: Node) -> bool:
    val = value(node)
    return val is not None and same_strides(val.shape, make_contiguous_strides_for(val.shape), val.stride())


def _copy_back(whole: Node, part: Node, parts: Mapping[Node, Node | None], within: set[Node]) -> Node | str:
    """The copy to the input `whole` of what it holds once every part of it has its result."""
    told = f"{part.name} is copied before it is written: "
    others = [user for user in whole.users if user not in within]
    backs = [user for user in others if user.target is aten.copy_.default and user.args[0] is whole]
    if len(backs) != 1:
        return told + "the result is not its new value"
    new = backs[0].args[1]
    steps: set[Node] = set()
    written = _written(new, whole, parts, steps) if isinstance(new, Node) else None
    if written != {one for one in parts if chain_of(one)[-1] is whole}:
        return told + "the result is not its new value"
    for other in others:
        if other is not backs[0] and other not in steps:
            return told + f"{other.name} reads the old value"
    for step in steps:
        reader = next((user for user in step.users if user is not backs[0] and user not in steps), None)
        if step.target is aten.select_scatter.default and reader is not None:
            return told + f"{reader.name} reads all of {whole.name}"
    return backs[0]


def _written(new: Node, old: Node, parts: Mapping[Node, Node | None], steps: set[Node]) -> set[Node] | None:
    """The parts of `old` that have their results in `new`, where all else of it is as it was; else None.

    Takes note of the nodes between the results and `new`.
    """
    if old in parts:
        return {old} if new is parts[old] else None
    if new is old:
        return set()
    if new.target not in (*VIEWS, aten.select_scatter.default):
        return None
    steps.add(new)
    before: Node = new.args[0]  # type: ignore[assignment]
    if new.target in VIEWS:
        # The view of the old value with the shape that the new one had before it was viewed as the old is.
        for user in old.users:
            if user.target in VIEWS and same_shape(user.meta["val"].shape, before.meta["val"].shape):
                fits = same_shape(new.meta["val"].shape, old.meta["val"].shape)
                return _written(before, user, parts, steps) if fits else None
        return None
    _, filled, dim, index = new.args
    rank = old.meta["val"].dim()
    for user in old.users:
        if user.target is aten.select.int and (user.args[1] % rank, user.args[2]) == (dim % rank, index):
            inside, beside = _written(filled, user, parts, steps), _written(before, old, parts, steps)  # type: ignore[arg-type]
            return None if inside is None or beside is None or inside & beside else inside | beside
    return None
