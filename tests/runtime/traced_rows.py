"""Graphs with symbolic sizes, as AOTAutograd would trace them."""

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

N, OTHER = 7, 11
"""Dimensions of these sizes are symbolic."""


def trace(
    function: Callable[..., Any], *tensors: torch.Tensor, table: Mapping[Any, Any] | None = None
) -> tuple[Graph, sympy.Symbol | None, sympy.Symbol | None]:
    """The aten graph of `function`, the symbol of size N in it and that of size OTHER; None: the size is fixed.

    Args:
        function: of the tensors.
        tensors: what it is traced on.
        table: decompositions; default: Inductor's.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = []
    for i, tensor in enumerate(tensors):
        dynamic = [DimDynamic.DUCK if size in (N, OTHER) else DimDynamic.STATIC for size in tensor.shape]
        context = StatelessSymbolicContext(dynamic_sizes=dynamic)
        fakes.append(mode.from_tensor(tensor, source=ConstantSource(f"t{i}"), symbolic_context=context))
    with mode, torch.no_grad(), enable_python_dispatcher():
        decompositions = select_decomp_table() if table is None else table
        graph = make_fx(function, decomposition_table=decompositions)(*fakes).graph
    sizes = [size for fake in fakes for size in fake.shape if isinstance(size, torch.SymInt)]
    found = {size.node.hint: size.node.expr for size in sizes}
    return graph, *(found[n] if n in found and found[n].is_Symbol else None for n in (N, OTHER))
