"""Dynamo's traces on disk: a start from them has the same numbers and the same report, and none is used for another."""

import contextlib
import copy
import functools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import fusionpass
from fusionpass import Config, Report
from fusionpass.inductor import keeps_traces
from fusionpass.runtime.cache import CacheWarning
from fusionpass.session import Session
from tests.profiles import by_night
from tests.runtime import test_pieces
from tests.runtime.test_pieces import WIDTH, Layer, Stack
from tests.runtime.test_session import without_times

X = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of nodes of each graph that Dynamo handed over."""
    found: list[int] = []
    original = Session.__call__

    def counted(self: Session, gm: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        found.append(len(gm.graph.nodes))
        return original(self, gm, *args, **kwargs)

    monkeypatch.setattr(Session, "__call__", counted)
    return found


@pytest.fixture
def model() -> Stack:
    torch.manual_seed(0)
    return Stack(4).requires_grad_(False)


def start(model: Any, folder: Path, *inputs: Any, **options: Any) -> tuple[list[torch.Tensor], Report]:
    """What a new process would see, but for its addresses."""
    torch._dynamo.reset()
    torch._dynamo.pgo.get_code_state().clear()
    compiled = fusionpass.compile(model, cache=True, traces=True, cache_dir=folder, **options)
    with torch.no_grad():
        results = [compiled(x) for x in inputs]
    return results, fusionpass.report(compiled)


def plain(report: Report) -> Any:
    told = without_times(report)
    for graph in told["model_graphs"]:
        del graph["cached"]
    return told


def test_a_start_traces_nothing_and_has_the_same_report(
    model: Stack, tmp_path: Path, traced: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[int] = []
    monkeypatch.setattr(Session, "tell", lambda self, record, traces: logged.append(len(traces)))
    inputs = [torch.randn(2, n, WIDTH) for n in (7, 9, 30)]
    cold, told = start(model, tmp_path, *inputs)
    assert [graph.cached for graph in told.model_graphs] == [False, False]
    assert [graph.trace for graph in told.model_graphs] == ["", ""]
    traced.clear()
    warm, retold = start(model, tmp_path, *inputs)
    assert traced == []
    assert logged[2:] == logged[:2], "each graph has its line, with the pieces that it was the first to need"
    assert all(map(torch.equal, warm, cold))
    assert [graph.cached for graph in retold.model_graphs] == [True, True]
    assert plain(retold) == plain(told)
    assert "not traced, but from the cache: graph 0, 1" in str(retold)
    assert [record.where for record in retold.fused] == [f"layers.{i}" for i in range(4)]


def _decorated(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Decorated(Stack):
    @_decorated
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = super().forward(x)
        return result


def test_a_forward_behind_a_decorator(tmp_path: Path, traced: list[int]) -> None:
    """As transformers has them: the module is among `args`."""
    model = Decorated(2).requires_grad_(False)
    cold, told = start(model, tmp_path, X)
    assert [graph.trace for graph in told.model_graphs] == [""]
    traced.clear()
    warm, _ = start(model, tmp_path, X)
    assert traced == []
    assert torch.equal(warm[0], cold[0])
    other = Decorated(3).requires_grad_(False)
    start(other, tmp_path, X)
    assert len(traced) == 1, "another structure is another trace"


class Scaled(torch.nn.Module):
    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (WIDTH,)) * self.factor


def test_a_number_that_was_guarded_is_compared(tmp_path: Path, traced: list[int]) -> None:
    """It is in no weight and no source: the guards' text alone tells the two models apart."""
    (twice,), _ = start(Scaled(2), tmp_path, X)
    (thrice,), told = start(Scaled(3), tmp_path, X)
    assert torch.allclose(thrice, twice * 1.5, atol=1e-5)
    assert len(traced) == 2
    assert "traced anew, since" in told.model_graphs[0].trace


def test_workers_start_where_something_is_to_be_compiled(
    model: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    monkeypatch.setattr("fusionpass.inductor.warm_up", lambda: started.append(1))
    start(model, tmp_path, X)
    assert len(started) == 1
    start(model, tmp_path, X)
    assert len(started) == 1, "another process's trace was used"
    fusionpass.compile(model, cache=True, traces=False, cache_dir=tmp_path)
    assert len(started) == 2, "without traces Dynamo traces in any case"
    with torch.no_grad():
        torch.compile(lambda x: x + 1, backend="fusionpass", options={"cache": True, "cache_dir": tmp_path})(X)
    assert len(started) == 3, "nobody asks for its traces"


def test_a_later_size_is_dynamic_as_if_the_first_had_been_traced(
    model: Stack, tmp_path: Path, traced: list[int]
) -> None:
    inputs = [torch.randn(2, n, WIDTH) for n in (7, 9, 30)]
    start(model, tmp_path, inputs[0])
    traced.clear()
    results, told = start(model, tmp_path, *inputs)
    assert len(traced) == 1, "the second size, for all that follow"
    with torch.no_grad():
        for result, given in zip(results, inputs, strict=True):
            assert torch.allclose(result, eager(model, given), atol=1e-5)
    assert [graph.cached for graph in told.model_graphs] == [True, False]


def eager(model: Stack, x: torch.Tensor) -> torch.Tensor:
    made = Stack(len(model.layers))
    made.load_state_dict(model.state_dict())
    made.to(next(model.parameters()).dtype)
    result: torch.Tensor = made(x)
    return result


def test_weights_are_the_models_and_not_in_the_file(model: Stack, tmp_path: Path, traced: list[int]) -> None:
    start(model, tmp_path, X)
    weight = model.layers[1].q.weight.numpy().tobytes()
    assert not any(weight[:64] in file.read_bytes() for file in tmp_path.glob("*.fusionpass"))
    traced.clear()
    torch.manual_seed(7)
    another = Stack(4).requires_grad_(False)
    results, _ = start(another, tmp_path, X)
    with torch.no_grad():
        assert torch.allclose(results[0], eager(another, X), atol=1e-5)
        another.load_state_dict(model.state_dict())
        assert torch.allclose(another(X), eager(model, X), atol=1e-5)
    assert traced == []


def half(model: Stack) -> None:
    model.to(torch.bfloat16)


def wider_eps(model: Stack) -> None:
    model.layers[2].eps = 0.5


def hooked(model: Stack) -> None:
    model.layers[1].q.register_forward_hook(lambda module, args, result: result * 2)


def fewer(model: Stack) -> None:
    del model.layers[3]


def own_forward(model: Stack) -> None:
    model.layers[0].o.forward = lambda x: x * 3  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [half, wider_eps, hooked, fewer, own_forward])
def test_another_model_is_traced_anew(model: Stack, change: Any, tmp_path: Path, traced: list[int]) -> None:
    start(model, tmp_path, X)
    traced.clear()
    change(model)
    x = X.to(next(model.parameters()).dtype)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
    results, told = start(model, tmp_path, x)
    assert len(traced) == 1
    assert torch.allclose(results[0], expected, atol=1e-5 if x.dtype is torch.float32 else 5e-2)
    assert not told.model_graphs[0].cached


def test_patched_classes_and_functions_are_seen(
    model: Stack, tmp_path: Path, traced: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    start(model, tmp_path, X)
    original = Layer.forward

    def doubled(self: Layer, x: torch.Tensor) -> torch.Tensor:
        return original(self, x) * 2

    for target, name, value in ((Layer, "forward", doubled), (test_pieces.F, "rms_norm", scaled_norm)):
        traced.clear()
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            results, _ = start(model, tmp_path, X)
            with torch.no_grad():
                assert torch.allclose(results[0], eager(model, X), atol=1e-4)
        assert len(traced) == 1
    traced.clear()
    start(model, tmp_path, X)
    assert traced == [], "as it was at first"


def scaled_norm(x: torch.Tensor, shape: Any, weight: torch.Tensor, eps: float | None = None) -> torch.Tensor:
    return torch.layer_norm(x, shape, weight) * 0.5


def test_what_was_patched_when_it_was_traced_is_not_used_without(
    model: Stack, tmp_path: Path, traced: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Layer, "forward", skip)
        start(model, tmp_path, X)
    traced.clear()
    results, _ = start(model, tmp_path, X)
    assert len(traced) == 1
    with torch.no_grad():
        assert torch.allclose(results[0], eager(model, X), atol=1e-5)


def skip(self: Layer, x: torch.Tensor) -> torch.Tensor:
    return x + 1


def test_modes_are_guarded(model: Stack, tmp_path: Path, traced: list[int]) -> None:
    start(model, tmp_path, X)
    traced.clear()
    torch._dynamo.reset()
    compiled = fusionpass.compile(model, cache=True, traces=True, cache_dir=tmp_path)
    with torch.inference_mode():
        compiled(X)
    assert len(traced) == 1
    with torch.no_grad():
        compiled(X)
    assert len(traced) == 1, "the first trace serves"


@pytest.mark.parametrize("damage", ["bit", "half", "empty"])
def test_damage_costs_a_trace_and_says_so(model: Stack, damage: str, tmp_path: Path, traced: list[int]) -> None:
    cold, _ = start(model, tmp_path, X)
    for file in tmp_path.glob("*.fusionpass"):
        data = bytearray(file.read_bytes())
        if b'"backend": "__compiled_fn' in data:
            data[len(data) // 2] ^= damage == "bit"
            file.write_bytes(data[: {"bit": len(data), "half": len(data) // 2, "empty": 0}[damage]])
    traced.clear()
    with pytest.warns(CacheWarning):
        again, told = start(model, tmp_path, X)
    assert (len(traced), torch.equal(again[0], cold[0])) == (1, True)
    assert all(graph.cached for graph in told.graphs), "the pieces are whole"
    traced.clear()
    start(model, tmp_path, X)
    assert traced == [], "it was written anew"


def test_a_piece_that_is_gone_costs_a_trace(model: Stack, tmp_path: Path, traced: list[int]) -> None:
    cold, _ = start(model, tmp_path, X)
    pieces = [file for file in tmp_path.glob("*.fusionpass") if b'"fingerprint"' in file.read_bytes()[:100_000]]
    max(pieces, key=lambda file: file.stat().st_size).unlink()
    traced.clear()
    again, told = start(model, tmp_path, X)
    assert (len(traced), torch.equal(again[0], cold[0])) == (1, True)
    assert "a piece is no longer in the cache" in told.model_graphs[0].trace
    assert told.count("add_rms_norm") == 3


class Broken(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        torch._dynamo.graph_break()
        return x + 1


class Hooked(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.ReLU()
        self.inner.register_forward_hook(add_one)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x) * 2
        return result


def add_one(module: torch.nn.Module, args: Any, result: torch.Tensor) -> torch.Tensor:
    return result + 1


@pytest.mark.parametrize(
    ("made", "reason"),
    [(Broken(), "several graphs"), (Hooked(), "inner has hooks"), (torch.nn.Linear(WIDTH, 4), "backward")],
)
def test_what_is_not_kept_says_why(made: torch.nn.Module, reason: str, tmp_path: Path, traced: list[int]) -> None:
    for _ in range(2):
        traced.clear()
        torch._dynamo.reset()
        compiled = fusionpass.compile(copy.deepcopy(made), cache=True, traces=True, cache_dir=tmp_path)
        with torch.set_grad_enabled(reason == "backward"):
            assert torch.allclose(compiled(X), made(X), atol=1e-5)
        assert traced
        assert reason in str(fusionpass.report(compiled))


GLOBAL = torch.nn.Linear(WIDTH, WIDTH).requires_grad_(False)


def test_a_module_that_it_was_not_called_with_is_not_looked_into(tmp_path: Path, traced: list[int]) -> None:
    for _ in range(2):
        torch._dynamo.reset()
        compiled = fusionpass.compile(by_a_global, cache=True, traces=True, cache_dir=tmp_path)
        with torch.no_grad():
            assert torch.allclose(compiled(X), by_a_global(X), atol=1e-5)
        assert "a Linear that is not among what it was called with" in str(fusionpass.report(compiled))
    assert len(traced) == 2


def by_a_global(x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = GLOBAL(x) * 2
    return result


def test_functions_start_from_it_too(tmp_path: Path, traced: list[int]) -> None:
    for _ in range(2):
        torch._dynamo.reset()
        compiled = fusionpass.compile(twice, cache=True, traces=True, cache_dir=tmp_path)
        with torch.no_grad():
            assert torch.allclose(compiled(X, 3.0), twice(X, 3.0), atol=1e-5)
    assert len(traced) == 1
    with torch.no_grad():
        assert torch.allclose(compiled(X, 5.0), twice(X, 5.0), atol=1e-5)


def twice(x: torch.Tensor, by: float) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, (WIDTH,)) * by


def test_without_a_cache_nothing_is_kept(model: Stack, tmp_path: Path, traced: list[int]) -> None:
    for options in ({"cache": False}, {"dump_dir": tmp_path / "dump"}, {"verify": True}):
        for _ in range(2):
            traced.clear()
            torch._dynamo.reset()
            compiled = fusionpass.compile(
                model, **{"cache": True, "traces": True, "cache_dir": tmp_path / "cache", **options}
            )
            with torch.no_grad():
                compiled(X)
            assert len(traced) == 1
    assert not list((tmp_path / "cache").glob("*.fusionpass"))


def test_guards_of_inputs_alone(model: Stack, tmp_path: Path, traced: list[int]) -> None:
    cold, _ = start(model, tmp_path, X, guards="inputs")
    traced.clear()
    warm, _ = start(model, tmp_path, X, guards="inputs")
    assert (traced, torch.equal(cold[0], warm[0])) == ([], True)
    wider_eps(model)
    results, _ = start(model, tmp_path, X, guards="inputs")
    assert len(traced) == 1, "a start compares all that Dynamo read"
    with torch.no_grad():
        assert torch.allclose(results[0], copy.deepcopy(model)(X), atol=1e-5)


def test_models_of_one_process_have_their_own(model: Stack, tmp_path: Path, traced: list[int]) -> None:
    torch.manual_seed(3)
    models = [model, Stack(4).requires_grad_(False)]
    torch._dynamo.reset()
    for one in models:
        fusionpass.compile(one, cache=True, traces=True, cache_dir=tmp_path)
    with torch.no_grad():
        for one in models * 2:
            assert torch.allclose(one(X), eager(one, X), atol=1e-5)
    assert len(traced) == 1
    assert [fusionpass.report(one).model_graphs[0].cached for one in models] == [False, True]
    del model, models[0]
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.allclose(models[0](X), eager(models[0], X), atol=1e-5)


MAIN = """
    import json, sys, warnings
    import torch
    import fusionpass
    from fusionpass.session import Session

    traced = []
    original = Session.__call__
    def counted(self, gm, inputs, **kwargs):
        traced.append(len(gm.graph.nodes))
        return original(self, gm, inputs, **kwargs)
    Session.__call__ = counted

    def tell(model, results):
        report = fusionpass.report(model).to_dict()
        for graph in (*report["graphs"], *report["model_graphs"]):
            del graph["cached"]
        print(json.dumps({"traced": len(traced), "results": [r.double().tolist() for r in results], "report": report}))
"""

OWN = """
    from helper import Model
    torch.manual_seed(0)
    model = fusionpass.compile(Model().requires_grad_(False), cache=True, traces=True, cache_dir=sys.argv[1])
    with torch.no_grad():
        results = [model(torch.ones(n, 16)) for n in (3, 5)]
    tell(model, results)
"""

HELPER = """
from scale import factor
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(16, 16)

    def forward(self, x):
        return factor(torch.nn.functional.rms_norm(self.linear(x), (16,)))
"""


def run(folder: Path, text: str, *args: Any) -> Any:
    script = folder / "main.py"
    script.write_text(textwrap.dedent(MAIN) + textwrap.dedent(text))
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((root, os.environ.get("PYTHONPATH", "")))}
    command = [sys.executable, str(script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@by_night
def test_other_processes_start_from_it_until_a_source_changes(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "scale.py").write_text("def factor(x):\n    return x * 2\n")
    cache = tmp_path / "cache"
    cold = run(tmp_path, OWN, cache)
    warm = run(tmp_path, OWN, cache)
    assert (cold["traced"], warm["traced"]) == (2, 0)
    assert warm["results"] == cold["results"]
    assert warm["report"] == cold["report"]
    (tmp_path / "scale.py").write_text("def factor(x):\n    return x * 4\n")
    changed = run(tmp_path, OWN, cache)
    assert changed["traced"] == 2
    assert torch.allclose(torch.tensor(changed["results"][1]), 2 * torch.tensor(cold["results"][1]))


QWEN = """
    from transformers import Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=64, pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    ids = torch.randint(1, 64, (1, 5))
    options = dict(max_new_tokens=4, do_sample=False, cache_implementation="static", disable_compile=False)
    expected = model.generate(ids, **options)
    fusionpass.compile(model, cache=True, traces=True, cache_dir=sys.argv[1])
    results = [model.generate(ids, **options), model.generate(ids, **options)]
    assert all(torch.equal(result, expected) for result in results), (results, expected)
    with torch.no_grad():
        results.append(model(input_ids=ids, use_cache=False).logits)
    tell(model, results)
"""


@by_night
def test_a_model_of_transformers_generates_without_a_trace(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    cold = run(tmp_path, QWEN, tmp_path / "cache")
    assert [graph["trace"] for graph in cold["report"]["model_graphs"]] == [""] * cold["traced"]
    warm = run(tmp_path, QWEN, tmp_path / "cache")
    assert cold["traced"] > 1
    assert warm["traced"] == 0
    assert warm["results"] == cold["results"]
    assert warm["report"] == cold["report"]


@pytest.mark.parametrize(
    ("version", "kept"), [("2.10.1", False), ("2.11.0+cu130", True), ("2.14.1", True), ("2.15.0", False)]
)
def test_they_are_kept_under_versions_that_they_are_tested_with(
    version: str, kept: bool, model: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert keeps_traces() == kept
    assert (Session(Config(cache=True, cache_dir=tmp_path)).traces is not None) == kept
    assert Session(Config(cache=True, cache_dir=tmp_path, traces=True)).traces is not None
    assert Session(Config(cache=True, cache_dir=tmp_path, traces=False)).traces is None
    assert Session(Config(cache=False, cache_dir=tmp_path)).traces is None


@pytest.mark.parametrize("where", ["_find", "_keep"])
def test_a_mistake_in_it_costs_the_trace_alone(
    where: str, model: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced: list[int]
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("Dynamo moved something")

    monkeypatch.setattr(f"fusionpass.runtime.traces.Traces.{where}", broken)
    told = pytest.warns(CacheWarning, match="could not be read: RuntimeError")
    with told if where == "_find" else contextlib.nullcontext():
        results, report = start(model, tmp_path, X)
    assert len(traced) == 1
    assert torch.allclose(results[0], eager(model, X), atol=1e-5)
    said = [graph.trace for graph in report.model_graphs]
    assert said == ([""] if where == "_find" else ["its trace is not kept: RuntimeError('Dynamo moved something')"])
