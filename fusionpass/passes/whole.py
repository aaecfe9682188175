"""What is done to a graph of Dynamo's as a whole, before it is cut and before AOTAutograd sees it."""

from collections.abc import Collection

from torch.fx import GraphModule

from .counters import counters
from .masks import masks


def whole(gm: GraphModule, disable: Collection[str] = ()) -> list[str]:
    """`masks`, then `counters`, in place; what each says of it."""
    return [*masks(gm, disable), *counters(gm, disable)]
