"""Where a graph is cut, what is alike, and that a program in pieces computes what the whole does."""

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from fusionpass.report.trace import ModelGraph
from fusionpass.runtime.build import Builder, Request
from fusionpass.runtime.fingerprint import fingerprint
from fusionpass.runtime.pieces import boundary, cut, is_attention, mutates, qualified_name
from fusionpass.runtime.program import Program

F = nn.functional
WIDTH, HEADS = 16, 4


@torch.library.custom_op("fusionpass_tests::stays_out", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def stays_out(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@stays_out.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fusionpass_tests::pair", mutates_args=())
def pair(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x + 1, x - 1


@pair.register_fake
def _(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("fusionpass_tests::paged_attention", mutates_args=())
def paged_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@paged_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(q)


class Layer(nn.Module):
    attend: Callable[..., torch.Tensor] = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.weight, self.eps = nn.Parameter(torch.rand(WIDTH)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.rms_norm(x, (WIDTH,), self.weight, self.eps)
        q = self.q(h).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = (t.unflatten(-1, (HEADS // 2, -1)).transpose(1, 2) for t in self.kv(h).chunk(2, -1))
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for t in (k, v))
        return x + self.o(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Stack(nn.Module):
    def __init__(self, layers: int = 4, eps: Sequence[float] = ()) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(*eps[i : i + 1]) for i in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.sum(-1)


def captured(
    function: Callable[..., Any], *args: Any, dynamic: bool | None = None
) -> tuple[GraphModule, Sequence[Any]]:
    """Dynamo's graph of a call."""
    found: list[Any] = []

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        for node in gm.graph.find_nodes(op="placeholder"):
            node.meta["source"] = node._dynamo_source.name
        found.append((gm, inputs))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=dynamic)(*args)
    ((gm, inputs),) = found
    return gm, inputs


def built(gm: GraphModule, inputs: Sequence[Any], **options: Any) -> tuple[Program, ModelGraph, list[Request]]:
    """The program, each distinct piece "compiled" to itself."""
    requests: list[Request] = []
    known: dict[str, int] = {}

    def compile_piece(request: Request, note: Callable[[int], None]) -> Any:
        index = known.setdefault(request.fingerprint.text, len(known))
        note(index)
        if index == len(requests):
            requests.append(request)
        module = requests[index].module
        return SimpleNamespace(call=module, mutated=(), uncapturable="", rows={}, key="")

    record = ModelGraph(0)
    program = Builder(compile_piece, **options).build(gm, inputs, record)
    return program, record, requests


def originals(gm: GraphModule, model: nn.Module) -> list[Any]:
    """For each input of Dynamo's graph, the parameter that it is, or None."""
    named = {f"L['self'].{name}": parameter for name, parameter in model.named_parameters()}
    found = []
    for node in gm.graph.find_nodes(op="placeholder"):
        source = node.meta["source"]
        name = source if isinstance(source, str) else source()
        for part in ("._modules", "._parameters"):
            name = name.replace(part, "")
        name = name.replace("['", ".").replace("']", "").replace("L.self", "L['self']")
        found.append(named.get(name))
    return found


def test_layers_share_their_code_and_their_numbers() -> None:
    model, x = Stack(5), torch.randn(2, 7, WIDTH)
    gm, inputs = captured(model, x)
    program, record, requests = built(gm, inputs)
    assert [piece.graph for piece in record.pieces] == [0, 1, 1, 1, 1, 2], "the first and the last are like no other"
    assert [len(request.weights) for request in requests] == [5, 7, 2], "weights are inputs"
    arguments = [t if isinstance(t, nn.Parameter) else x for t in originals(gm, model)]
    with torch.no_grad():
        assert torch.equal(program.run(*arguments)[0], model(x))


def test_each_piece_says_where_its_modules_are_in_its_own_layer() -> None:
    gm, inputs = captured(Stack(4), torch.randn(2, 7, WIDTH))
    _, record, _ = built(gm, inputs)
    third = record.pieces[3]
    assert third.modules[0] == "layers.2"
    assert third.modules[1].startswith("layers.3")
    assert third.paths["layers.0.o"] == "layers.2.o"
    assert "attention" in third.why


def test_another_constant_is_another_piece() -> None:
    gm, inputs = captured(Stack(5, eps=(1e-6, 1e-6, 1e-5, 1e-6, 1e-6)), torch.randn(2, 7, WIDTH))
    _, record, _ = built(gm, inputs)
    graphs = [piece.graph for piece in record.pieces]
    assert graphs == [0, 1, 2, 1, 1, 3], "the piece that ends with the third layer's norm has its own eps"


def test_a_graph_with_nothing_alike_is_not_cut() -> None:
    gm, inputs = captured(Stack(2), torch.randn(2, 7, WIDTH))
    program, record, requests = built(gm, inputs)
    assert len(program.steps) == len(record.pieces) == len(requests) == 1
    assert requests[0].module is gm


def test_what_only_regroups_the_operands_stays_with_attention() -> None:
    gm, _ = captured(Stack(3), torch.randn(2, 7, WIDTH))
    pieces = list(cut(gm).pieces.values())
    names = [qualified_name(node) for node in pieces[1].module.graph.nodes]
    attention = next(i for i, name in enumerate(names) if "scaled_dot_product_attention" in name)
    assert any("expand" in name for name in names[:attention]), "K and V are repeated in attention's own piece"
    assert not any("expand" in qualified_name(node) for node in pieces[0].module.graph.nodes)


@pytest.mark.parametrize("fp8", [True, False])
def test_numbers_of_a_caches_codes_are_made_where_attention_reads_them(fp8: bool) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        q = F.scaled_dot_product_attention(q * 2, k, k)
        codes[:, :, 0] = q.to(codes.dtype)[:, :, 0]
        wide = (codes.float() * scale).to(q.dtype)
        return F.scaled_dot_product_attention(q, wide, codes.to(torch.float32).to(q.dtype))

    x = torch.randn(1, 2, 3, 4).bfloat16()
    codes = x.to(torch.float8_e4m3fn if fp8 else torch.int8)
    gm, _ = captured(attend, x, x, torch.ones(()), codes)
    *_, before, last = cut(gm).pieces.values()
    made = [[qualified_name(node).rpartition(".")[2] for node in piece.module.graph.nodes] for piece in (before, last)]
    assert made[1].count("mul") == int(fp8)
    assert ("float" in made[0], "setitem" in made[0]) == (not fp8, True)


def test_a_write_keeps_what_it_changes_in_front_of_it() -> None:
    def attend(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        k = cache[:, :2].reshape(1, 2, -1, 4)  # a copy where the strides ask for one
        cache.add_(1)
        return F.scaled_dot_product_attention(x, k, k)

    x, cache = torch.randn(1, 2, 3, 4), torch.randn(1, 5, 4, 3).transpose(-1, -2)
    gm, inputs = captured(attend, x, cache)
    program, _, _ = built(gm, inputs, boundaries={"torch._C._nn.scaled_dot_product_attention"})
    assert len(program.steps) == 2
    expected = attend(x, (mine := copy.deepcopy(cache)))
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    theirs = copy.deepcopy(cache)
    (got,) = program.run(*(x if "x" in name else theirs for name in names))
    assert torch.equal(got, expected)
    assert torch.equal(theirs, mine)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("of_torch", [False, True])
def test_attention_alone(of_torch: bool, alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another library's stays out of CUDA graphs where each piece is one; a graph can hold PyTorch's own."""
    if not of_torch:
        monkeypatch.setattr(Layer, "attend", staticmethod(paged_attention))
    gm, inputs = captured(Stack(3), torch.randn(2, 7, WIDTH))
    program, record, requests = built(gm, inputs, attention_alone=alone)
    out = [piece.boundary != "" for piece in record.pieces]
    assert out == ([False, True] * 3 + [False] if alone and not of_torch else [False] * 4)
    assert [step.uncapturable != "" for step in program.steps] == out
    assert len(requests) == 3
    assert all("paged_attention is attention of another library" in p.boundary for p in record.pieces if p.boundary)


@pytest.mark.parametrize(
    ("named", "count"), [((), 2), (("fusionpass_tests::pair",), 2), (("torch._C._nn.gelu", "torch.sigmoid"), 3)]
)
def test_boundaries(named: Sequence[str], count: int) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        first, second = pair(F.gelu(x))
        y = torch.ops.fusionpass_tests.stays_out(first) * second
        return torch.ops.fusionpass_tests.stays_out(torch.ops.fusionpass_tests.stays_out(y))

    x = torch.randn(3, 4)
    gm, inputs = captured(function, x)
    program, record, _ = built(gm, inputs, boundaries=frozenset(named))
    reasons = [piece.boundary for piece in record.pieces if piece.boundary]
    assert "fusionpass_tests::stays_out is tagged cudagraph_unsafe" in reasons
    assert len(reasons) == count, "neighbours are one piece"
    if named:
        assert any("is in Config.boundaries" in reason for reason in reasons)
    assert torch.equal(program.run(x)[0], function(x))


def test_several_sizes_reach_the_pieces_that_need_them() -> None:
    model, x = Stack(4), torch.randn(2, 7, WIDTH)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    gm, inputs = captured(model, x)
    program, record, _ = built(gm, inputs)
    sizes = [declared for declared in program.inputs if declared.kind == "size"]
    assert len(sizes) == 2
    assert record.pieces[1].graph == record.pieces[2].graph
    other = torch.randn(3, 11, WIDTH)
    by_symbol = {declared.symbol: None for declared in sizes}
    for declared in program.inputs:
        if declared.kind == "tensor":
            by_symbol |= dict(zip(map(str, declared.shape), other.shape, strict=True))
    arguments = [
        parameter if parameter is not None else by_symbol[d.symbol] if d.kind == "size" else other
        for parameter, d in zip(originals(gm, model), program.inputs, strict=True)
    ]
    with torch.no_grad():
        assert torch.equal(program.run(*arguments)[0], model(other))


def test_a_shape_is_handed_on_as_its_sizes() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        shape = x.shape
        z = torch.ops.fusionpass_tests.stays_out(x)
        return torch.ones(shape) * z.repeat(1, shape[1] - 3) + shape[0]

    x = torch.randn(3, 4)
    torch._dynamo.mark_dynamic(x, 0)
    gm, inputs = captured(function, x)
    program, _, requests = built(gm, inputs)
    other = torch.randn(7, 4)
    given = [7 if declared.kind == "size" else other for declared in program.inputs]
    assert torch.equal(program.run(*given)[0], function(other))
    kinds = {type(value) for request in requests for value in request.inputs}
    assert not {torch.Size, tuple} & kinds


def test_values_are_let_go_as_soon_as_nobody_reads_them() -> None:
    gm, inputs = captured(Stack(3), torch.randn(2, 7, WIDTH))
    program, _, _ = built(gm, inputs)
    read = {slot for step in program.steps for slot in step.inputs} - set(program.results)
    assert sorted(slot for step in program.steps for slot in step.dead) == sorted(read)
    for index, step in enumerate(program.steps):
        later = {slot for other in program.steps[index + 1 :] for slot in other.inputs}
        assert not later & set(step.dead)


def _text(function: Callable[..., Any], *args: Any) -> str:
    return fingerprint(captured(function, *args)[0]).text


X = torch.randn(4, 8)


@pytest.mark.parametrize(
    "other",
    [
        (lambda x, y: x * y + 3, X, X.clone()),
        (lambda x, y: x * y + 2.0, X, X.clone()),
        (lambda x, y: x + y + 2, X, X.clone()),
        (lambda x, y: y * x + 2, X, X.clone()[:, :1]),
        (lambda x, y: x * y + 2, X.double(), X.clone()),
        (lambda x, y: x * y + 2, X[:3], X.clone()[:3]),
        (lambda x, y: x * y + 2, X.t().contiguous().t(), X.clone()),
        (lambda x, y: x * y + 2, X, X.clone().requires_grad_()),
        (lambda x, y: x * y + 2, X, X),
        (lambda x, y: x * y[:, :] + 2, X, X.clone()),
    ],
)
def test_what_the_compiler_sees_tells_pieces_apart(other: tuple[Any, ...]) -> None:
    same = lambda x, y: x * y + 2  # noqa: E731
    assert _text(same, X, X.clone()) == _text(lambda a, b: a * b + 2, torch.randn(4, 8), torch.randn(4, 8))
    assert _text(same, X, X.clone()) != _text(*other)


def test_modes_tell_pieces_apart() -> None:
    gm, _ = captured(lambda x: x @ x.t(), X)
    before = fingerprint(gm).text
    with torch.autocast("cpu"):
        assert fingerprint(gm).text != before
    with torch.no_grad():
        assert fingerprint(gm).text != before
    assert fingerprint(gm).text == before


def test_a_fingerprint_names_the_users_functions_and_what_cannot_be_saved() -> None:
    gm, _ = captured(lambda x: x + 1, X)
    assert not fingerprint(gm).unsaveable
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    node.target = copy.copy
    assert fingerprint(gm).functions == [copy.copy]
    node.target = lambda x, y: x
    assert "local" in fingerprint(gm).unsaveable


def test_what_a_node_is() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        x = torch.add(x, 1, out=torch.empty_like(x))
        x.relu_()
        y = F.relu(x, inplace=True)
        x[0] = 2
        return torch.ops.aten.copy_.default(y.__iadd__(1), x) + ((x > 0) & (y > 0) | (x < 1)).sin()

    gm, _ = captured(function, X.clone())
    nodes = {n.name: n for n in gm.graph.nodes}
    assert [n for n in nodes.values() if ("sin" in n.name or n.op in ("placeholder", "output")) and mutates(n)] == []
    # Operators that are spelt with an underscore for Python's sake.
    pure = [n for n in nodes.values() if qualified_name(n).rsplit(".", 1)[-1].strip("_") in ("and", "or")]
    assert len(pure) == 2
    assert not any(map(mutates, pure))
    writing = {qualified_name(n) for n in nodes.values() if mutates(n)}
    assert {"relu_", "_operator.setitem", "aten::copy_", "torch.nn.functional.relu", "__iadd__"} <= writing
    assert not is_attention(nodes["sin"])
    assert boundary(nodes["sin"]) == ""
