"""Rule by rule: where the rows of a result are, and the reasons why they are nowhere."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph

from fusionpass.runtime.rows import row_dims
from tests.runtime.traced_rows import N, trace


def full(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


X, WIDE, BATCH, HEADS = full(N, 8), full(1, N, 8), full(2, N, 8), full(N, 4, 8)
QUERY, TABLE, IDS = full(N, 2, 3, 8), full(20, 8), torch.arange(N)
INT8, SQUARE = full(N, 32, dtype=torch.int8), full(8, 8)
FP8 = full(N, 32).to(torch.float8_e4m3fn)

PROVEN: dict[str, tuple[Any, ...]] = {
    "pointwise": (lambda x, w: torch.where(x > 0, x * w + 1, -x).sigmoid(), X, full(8), (0,)),
    "broadcast rows": (lambda x, w: x * w, full(N, 1), full(3, 1, 8), (1,)),
    "cast and clamp": (lambda x: x.double().clamp(-1, 1).to(torch.int8), X, (0,)),
    "masked fill": (lambda x, v: x.masked_fill(x > 0, v), X, torch.tensor(1.0), (0,)),
    "counted": (lambda x: x + torch.arange(x.shape[0])[:, None], X, (0,)),
    "made": (lambda x: (x.new_full((x.shape[0], 3), 2.0), torch.zeros_like(x), torch.empty(x.shape[0])), X, (0, 0, 0)),
    "made of one size": (lambda x: x + torch.full((8,), 2.0), X, (0,)),
    "no rows": (lambda x, w: (x, w.sum(), w @ w.t()), X, SQUARE, (0, None, None)),
    "sum": (lambda x: x.sum(-1), BATCH, (1,)),
    "sum in front": (lambda x: x.sum(0), BATCH, (0,)),
    "sum, kept": (lambda x: x.sum((0, 2), keepdim=True), BATCH, (1,)),
    "mean and max": (lambda x: (x.mean(0), x.amax(-1), x.argmax(-1), x.max(0).values), BATCH, (0, 1, 1, 0)),
    "variance": (lambda x: torch.var_mean(x, -1, correction=0), X, (0, 0)),
    "any": (lambda x: (x > 0).any(-1) & (x > 0).all(-1), X, (0,)),
    "softmax": (lambda x: x.softmax(-1) + x.log_softmax(-1), X, (0,)),
    "cumsum": (lambda x: x.cumsum(1).flip(1).roll(3, 1), X, (0,)),
    "sort": (lambda x: (*x.sort(-1), *x.topk(2, -1)), X, (0, 0, 0, 0)),
    "layer norm": (lambda x, w: F.layer_norm(x, (8,), w), X, full(8), (0,)),
    "layer norm op": (lambda x: torch.ops.aten.native_layer_norm(x, [8], None, None, 1e-5), X, (0, 0, 0)),
    "mm": (lambda x, w: x @ w, X, SQUARE, (0,)),
    "mm, rows on the right": (lambda x, w: w @ x.t(), X, SQUARE, (1,)),
    "linear": (lambda x, w, b: F.linear(x, w, b), WIDE, SQUARE, full(8), (1,)),
    "linear, flattened with a batch": (lambda x, w: F.linear(x, w), BATCH, SQUARE, (1,)),
    "linear, flattened in front of heads": (lambda x, w: F.linear(x, w), HEADS, SQUARE, (0,)),
    "addmm": (lambda x, b, w: torch.addmm(b, x, w), X, -X, SQUARE, (0,)),
    "bmm of rows": (lambda a, b: torch.bmm(a, b.transpose(1, 2)), HEADS, HEADS, (0,)),
    "bmm, rows on the left": (lambda a, b: torch.bmm(a, b), BATCH, full(2, 8, 3), (1,)),
    "baddbmm": (lambda c, a, b: torch.baddbmm(c, a, b), full(2, 1, 3), BATCH, full(2, 8, 3), (1,)),
    "mv": (lambda x, v: torch.mv(x, v), X, full(8), (0,)),
    "int mm": (lambda x, w: torch._int_mm(x, w), INT8, full(32, 16, dtype=torch.int8), (0,)),
    "scaled mm": (
        lambda x, w, a, b: torch._scaled_mm(x, w.t(), a, b, out_dtype=torch.bfloat16),
        FP8, FP8[:1].expand(16, 32).contiguous(), full(N, 1), full(1, 16), (0,),
    ),
    "convolution": (lambda x, w: F.conv2d(x, w), full(N, 3, 8, 8), full(4, 3, 3, 3), (0,)),
    "complex": (lambda x: torch.view_as_real(torch.view_as_complex(x) * 1j), full(3, N, 2), (1,)),
    "pool": (lambda x: F.avg_pool2d(x, 2), full(3, N, 8, 8), (1,)),
    "view": (lambda x: x.view(-1, 32), HEADS, (0,)),
    "view of heads and back": (lambda x: (x.view(1, -1, 2, 4) * 2).reshape(-1, 8), X, (0,)),
    "view through rows and heads": (lambda x: (x.reshape(-1, 8) * 2).view(-1, 4, 8), HEADS, (0,)),
    "view as integers": (lambda x: (x.view(torch.int32) + 1).view(torch.float32), X, (0,)),
    "view as bytes": (lambda x: x.view(torch.uint8), X, (0,)),
    "squeeze": (lambda x: x.squeeze(0).unsqueeze(-1).unsqueeze(0), WIDE, (1,)),
    "permute": (lambda x: (x.permute(2, 0, 1), x.transpose(0, -1), x[0].t()), BATCH, (2, 1, 1)),
    "expand": (lambda x, w: (x[:, None].expand(-1, 3, -1), w.expand(x.shape[0], 8)), X, full(1, 8), (0, 0)),
    "repeat": (lambda x: x.repeat(2, 1, 3), X, (1,)),
    "select and slice": (lambda x: (x[:, 1], x[:, 2:5], x[:, -1:], x[:]), X, (0, 0, 0, 0)),
    "split": (lambda x: (*x.chunk(2, -1), *x.split([3, 5], 1), *x[:, :2].unbind(1)), X, (0,) * 6),
    "cat and stack": (lambda x: (torch.cat([x, -x], -1), torch.stack([x, x], 0), torch.stack([x, x], 1)), X, (0, 1, 0)),
    "pad": (lambda x: F.pad(x, (1, 2)), X, (0,)),
    "pad behind, cut off": (lambda x: F.pad(x.t(), (0, x.shape[0] + 1))[:, : x.shape[0]].t(), X, (0,)),
    "embedding": (lambda i, w: F.embedding(i, w), IDS, TABLE, (0,)),
    "embedding of a batch": (lambda i, w: F.embedding(i, w), IDS.expand(3, N), TABLE, (1,)),
    "index of a table": (lambda i, w: (w[i], w[:, i], w[i, i % 8]), IDS, SQUARE.repeat(3, 1), (0, 1, 0)),
    "index elsewhere": (lambda x, i: (x[:, :, i], x[i], x[i, :, i]), full(4, N, 2), torch.arange(3) % 2, (1, 1, 1)),
    "index of a table twice": (lambda w, i: w[:, i, :, i], full(2, 8, 3, 8), IDS, (0,)),
    "index with a rank": (lambda x, i: x[:, i], full(N, 5, 4), full(2, 3, dtype=torch.int64), (0,)),
    "index_select": (lambda x, i: x.index_select(1, i), X, torch.arange(3), (0,)),
    "index_select of a table": (lambda w, i: w.index_select(1, i), SQUARE, IDS, (1,)),
    "table by place": (lambda x, w: x + w[: x.shape[0]], X, TABLE, (0,)),
    "table from a place": (lambda x, w: x + w[5 : 5 + x.shape[0]], X, TABLE, (0,)),
    "gather": (lambda x, i: (x.gather(1, i), torch.gather(full(20, 8), 0, i)), X, IDS[:, None] % 8, (0, 0)),
    "scatter": (lambda x, i: (x * 0).scatter(1, i, 1.0).scatter_add(1, i, x[:, :1]), X, IDS[:, None] % 8, (0,)),
    "write to columns": (lambda x: torch.slice_scatter(x, x[:, :2], 1, 3, 5).select_scatter(x[:, 0], 1, 1), X, (0,)),
    "write to all rows": (lambda x: torch.slice_scatter(x, -x, 0, 0, 2**63 - 1), X, (0,)),
    "router": (lambda x, w: x.new_zeros(x.shape).scatter(1, (x @ w).topk(2, -1).indices, 1.0), X, SQUARE, (0,)),
    "attention in a batch": (F.scaled_dot_product_attention, QUERY, QUERY, QUERY, (0,)),
    "attention, masked": (
        lambda q, m: F.scaled_dot_product_attention(q, q, q, m), QUERY, full(N, 1, 3, 3), (0,),
    ),
    "causal attention in a batch": (lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), QUERY, (0,)),
    "attention to a fixed cache": (
        lambda q, k, m: F.scaled_dot_product_attention(q, k, k, m),
        full(1, 2, N, 8), full(1, 2, 5, 8), full(N, 5), (2,),
    ),
    "attention by hand": (
        lambda q, k: (q @ k.transpose(-1, -2)).softmax(-1) @ k, QUERY, QUERY, (0,),
    ),
}  # fmt: skip

REFUSED: dict[str, tuple[Any, ...]] = {
    "sum": (lambda x: x.sum(0), X, "sum_1: aten.sum.dim_IntList works along the rows, dimension 0 of self [s, 8]"),
    "sum of all": (lambda x: x.sum(), X, "sum_1: aten.sum.default works along the rows"),
    "mean by hand": (lambda x: x.sum(-1) / x.shape[0], X, "div: aten.div.Tensor takes the number s as 'other'"),
    "size as a value": (lambda x: x + torch.full((), x.shape[0]), X, "takes the number s as 'fill_value'"),
    "size returned": (lambda x: (x, x.shape[0] * 2), X, "the number 2*s is returned"),
    "softmax": (lambda x: x.softmax(0), X, "works along the rows"),
    "cumsum": (lambda x: x.cumsum(0), X, "cumsum: aten.cumsum.default works along the rows"),
    "sort": (lambda x: x.sort(0).values, X, "works along the rows"),
    "topk": (lambda x: x.topk(2, 0).indices, X, "works along the rows"),
    "flip": (lambda x: x.flip(0), X, "works along the rows"),
    "roll": (lambda x: x.roll(1, 0), X, ": "),
    "roll of all": (lambda x: x.roll(1), X, ": "),
    "batch norm": (lambda x: F.batch_norm(x, None, None, training=True), X, "works along the rows"),
    "mm": (lambda x: x.t() @ x, X, "mm: aten.mm.default mixes the rows, dimension 1 of self [8, s] and dimension 0 of"),
    "mm with itself": (lambda x: x @ x.t(), X, "mm: "),
    "mv": (lambda x, v: torch.mv(x.t(), v), X, full(N), "the rows, dimension "),
    "dot": (lambda v: torch.dot(v, v), full(N), "the rows, dimension 0 of self [s]"),
    "outer": (lambda v: v[:, None] * v, full(N), "along different dimensions"),
    "flattened": (lambda x: x.view(-1), X, "view: aten.view.default returns [8*s], where the s rows are no dimension"),
    "flattened otherwise": (lambda x: x.view(-1)[:16], X, "takes some rows of [8*s]"),
    "transposed and viewed": (lambda x: x.t().reshape(-1, 8), X, "makes [s, 8] of the rows, dimension 1 of"),
    "bytes": (lambda x: x.view(torch.uint8).reshape(8, 4, -1), full(8, N), "view: aten.view.dtype "),
    "other rows": (lambda x: x + x.t().reshape(-1, 8), X, "makes [s, 8] of the rows"),
    "first row": (lambda x: x[0], X, "select: aten.select.int works along the rows"),
    "last row": (lambda x: x[-1], X, "select: "),
    "some rows": (lambda x: x[:4], X, "slice_1: aten.slice.Tensor takes some rows of [s, 8]"),
    "shifted": (lambda x: torch.cat([x[1:], x[:1]]), X, ""),
    "every second": (lambda x: x[::2], X, "takes some rows"),
    "end of a table": (lambda x, w: x + w[-x.shape[0] :], X, TABLE, "takes the number"),
    "column by size": (lambda x, w: w.select(1, x.shape[0]), X, full(8, 20), "takes the number s as 'index'"),
    "counted down": (lambda x: torch.arange(x.shape[0], 0, -1), X, "takes the number s as 'start'"),
    "counted twice": (lambda x: torch.arange(2 * x.shape[0]), X, "has no dimension of s in [2*s]"),
    "square": (lambda x: x.new_ones(x.shape[0], x.shape[0]).tril(), X, "has s in 2 dimensions of [s, s]"),
    "expanded": (lambda x: x[:, :1].expand(-1, x.shape[0]), X, "has s in 2 dimensions of [s, s]"),
    "repeated by size": (lambda x: x.repeat(x.shape[0], 1), X, "not known to keep them apart"),
    "cat of rows": (lambda x: torch.cat([x, -x]), X, "cat: aten.cat.default joins along dimension 0, the rows"),
    "cat with others": (lambda x, w: torch.cat([w, x]), X, SQUARE, "joins tensors that have the s rows in different"),
    "padded": (lambda x: F.pad(x, (0, 0, 0, 2)), X, "constant_pad_nd: aten.constant_pad_nd.default pads the rows"),
    "padded in front": (lambda x: F.pad(x, (0, 0, 2, 0))[: x.shape[0]], X, "moves the rows"),
    "padded, cut across": (lambda x: F.pad(x, (0, 0, 0, 2))[:, :4], X, "pads the rows"),
    "columns shifted by size": (lambda x: F.pad(x, (x.shape[0], -x.shape[0])), X, "moves the rows"),
    "padded, shifted": (lambda x: F.pad(x, (0, 0, 0, 2))[2:], X, "pads the rows"),
    "shift by padding": (lambda x: F.pad(x, (0, 0, 1, -1)), X, "moves the rows"),
    "embedding of rows": (lambda x, i: F.embedding(i, x), X, torch.arange(3), "embedding: "),
    "index_select of rows": (lambda x, i: x.index_select(0, i), X, torch.arange(3), "picks rows by index"),
    "column for each row": (lambda x, i: x.index_select(1, i), X, IDS, "picks rows by index"),
    "columns for each row": (lambda x, i: x[:, i], X, IDS, "picks rows by index"),
    "gather across": (lambda x, i: x.gather(1, i), X, IDS.expand(4, N) % 8, "picks rows by index"),
    "index of rows": (lambda x, i: x[i], X, torch.arange(3), "index: aten.index.Tensor picks rows by index"),
    "permutation": (lambda x, i: x[i], X, IDS, "picks rows by index"),
    "mask": (lambda x: x[x.sum(-1) > 0], X, "index: aten.index.Tensor gives sizes or numbers that"),
    "nonzero": (lambda x: x.nonzero(), X, "gives sizes or numbers that the sizes of the inputs do"),
    "item": (lambda x: x.new_ones(3) * x.amax().item(), X, "amax: "),
    "gather along": (lambda x, i: x.gather(0, i), X, IDS[:, None].expand(N, 8), "gather: aten.gather.default picks"),
    "gather by place of flattened": (
        lambda x, i: torch.gather(full(40, 8), 1, i.reshape(-1, 1)).view(2, -1, 1), X, IDS.expand(2, N) % 8, "gather: ",
    ),
    "scatter along": (lambda x, i: x.scatter(0, i, 0.0), X, IDS[:, None], "writes to rows by their place"),
    "scatter into the first rows": (lambda x, i: x.scatter(1, i, 0.0), X, torch.arange(3)[:, None], "not known to"),
    "scatter of a table": (lambda x, i, w: x.scatter_add(1, i, w), X, IDS[:, None], TABLE, "not known to keep them"),
    "scatter into a table": (lambda w, i: w.scatter(1, i, 2.0), TABLE, IDS[:, None], "writes rows of padding into w_1"),
    "index put": (
        lambda c, i, x: torch.index_put(c, (i,), x), TABLE, IDS, X,
        "index_put: aten.index_put.default writes rows of padding into c_1",
    ),
    "index copy": (lambda c, i, x: c.index_copy(0, i, x), TABLE, IDS, X, "writes rows of padding into c_1"),
    "cache by slice": (
        lambda c, x: torch.slice_scatter(c, x, 0, 0, x.shape[0]), TABLE, X, "writes rows of padding into c_1",
    ),
    "first row written": (lambda x, v: torch.select_scatter(x, v, 0, 0), X, full(8), "writes to rows by their place"),
    "random": (lambda x: x * torch.rand_like(x), X, "draws random numbers"),
    "random of one size": (lambda x: x * torch.rand(8), X, "draws random numbers"),
    "dropout": (lambda x: F.dropout(x, 0.5, training=True), X, "draws random numbers"),
    "scale of all": (lambda x: x / x.abs().amax(), X, "amax: "),
    "self-attention": (F.scaled_dot_product_attention, *[full(1, 2, N, 8)] * 3, "mixes the rows, dimension 2 of query"),
    "causal self-attention": (
        lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), full(1, 2, N, 8), "mixes the rows",
    ),
    "rows in the keys": (F.scaled_dot_product_attention, full(1, 2, 3, 8), *[full(1, 2, N, 8)] * 2, "mixes the rows"),
    "heads": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True),
        full(1, N, 3, 8), full(1, 1, 5, 8), "",
    ),
    "attention by place": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True),
        full(1, 2, N, 8), full(1, 2, 5, 8), "counts positions within the rows",
    ),
    "two sizes": (lambda x: x * 2, full(N, N), "x_1: the input has s in 2 dimensions of [s, s]"),
    "unfold": (lambda x: x.unfold(0, 2, 1), X, "nothing is known"),
    "convolution": (lambda x, w: F.conv1d(x, w), full(1, 3, N), full(4, 3, 3), "mixes the rows"),
    "convolution by rows": (lambda x, w: F.conv1d(x, w), full(1, 3, 9), full(N, 3, 3), "not known to keep them apart"),
    "convolution of rows by rows": (lambda x, w: F.conv1d(x, w), full(N, 3, 9), full(N, 3, 3), "convolution: "),
    "pool": (lambda x: F.avg_pool2d(x, 3, 1, 1), full(1, 2, N, 8), "mixes the rows, dimension 2 of self [1, 2, s, 8]"),
}  # fmt: skip


TABLES: dict[str, Any] = {"inductor": select_decomp_table(), "aten": {}}


def rows(graph: Graph, symbol: Any) -> tuple[int | None, ...] | str:
    found = row_dims(graph, symbol)
    # The symbol's name is torch's choice.
    return found.replace(str(symbol), "s") if isinstance(found, str) else found


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", PROVEN)
def test_proven(name: str, table: str) -> None:
    function, *tensors, expected = PROVEN[name]
    assert rows(*trace(function, *tensors, table=TABLES[table])[:2]) == expected


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, table: str) -> None:
    function, *tensors, expected = REFUSED[name]
    graph, symbol, _ = trace(function, *tensors, table=TABLES[table])
    found = rows(graph, symbol)
    assert isinstance(found, str)
    assert expected in found
    # It names a node, and for a node its op.
    node = next(node for node in graph.nodes if node.name == found.split(":")[0])
    assert node.op == "placeholder" or str(node.target) in found or "is returned" in found
