"""A compiled model over its whole life: pieces from the cache, the report that comes with them, recompilations."""

import copy
import json
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fusionpass
from fusionpass import Config, Report, Spelling
from fusionpass.errors import NotCompiledError, RecompileWarning
from fusionpass.ops import rms_norm
from fusionpass.runtime.cache import CacheWarning
from tests.runtime.test_pieces import WIDTH, Stack


@pytest.fixture
def model() -> Stack:
    torch.manual_seed(0)
    return Stack(4).requires_grad_(False)


def start(model: Stack, folder: Path, *inputs: torch.Tensor, **options: Any) -> tuple[list[torch.Tensor], Report]:
    """What a new process would see, but for the interpreter's start."""
    torch._dynamo.reset()
    compiled = fusionpass.compile(model, cache=True, cache_dir=folder, traces=False, **options)
    with torch.no_grad():
        results = [compiled(x) for x in inputs]
    return results, fusionpass.report(compiled)


def without_times(report: Report) -> Any:
    plain = report.to_dict()
    for graph in plain["graphs"]:
        del graph["cached"]
    return json.loads(json.dumps(plain))


def test_a_warm_start_has_the_same_numbers_and_the_same_report(model: Stack, tmp_path: Path) -> None:
    x = torch.randn(2, 7, WIDTH)
    cold, told = start(model, tmp_path, x)
    assert [graph.cached for graph in told.graphs] == [False] * 3
    assert (told.count("rms_norm"), told.count("add_rms_norm")) == (1, 3)
    warm, retold = start(model, tmp_path, x)
    assert [graph.cached for graph in retold.graphs] == [True] * 3
    assert torch.equal(warm[0], cold[0])
    with torch.no_grad():
        assert torch.allclose(warm[0], torch.nn.Module.__call__(copy_of(model), x), atol=1e-5)
    assert without_times(retold) == without_times(told)
    assert [record.where for record in retold.fused] == [f"layers.{i}" for i in range(4)]
    assert "3 of them from the cache" in str(retold)
    assert (retold.distinct_pieces, len(retold.pieces)) == (3, 5)


def copy_of(model: Stack) -> Stack:
    made = Stack(len(model.layers))
    made.load_state_dict(model.state_dict())
    return made


def test_assumptions_about_sizes_are_kept(model: Stack, tmp_path: Path) -> None:
    inputs = [torch.randn(2, n, WIDTH) for n in (7, 9, 30)]
    cold, told = start(model, tmp_path, *inputs)
    warm, retold = start(model, tmp_path, *inputs)
    assert all(map(torch.equal, cold, warm))
    assert len(retold.model_graphs) == len(told.model_graphs) == 2, "one for the first size, one for all others"
    assert all(graph.cached for graph in retold.graphs)
    assert len(retold.recompiles) == 1
    assert "size mismatch" in retold.recompiles[0]
    assert "recompiled: " in str(retold)


class Caches(torch.nn.Module):
    """Alike layers, each with a cache of its own length."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(count))

    def forward(self, x: torch.Tensor, caches: list[torch.Tensor]) -> torch.Tensor:
        for layer, cache in zip(self.layers, caches, strict=True):
            q = layer(rms_norm(x, layer.bias, 1e-6))
            keys = cache if cache.shape[0] > x.shape[0] else x
            x = x + torch.nn.functional.scaled_dot_product_attention(q, keys, keys)
        return x


def test_each_layers_own_sizes_are_assumed_of_it_alone(tmp_path: Path) -> None:
    model = Caches(4).requires_grad_(False)
    cached = [torch.randn(20 + i, WIDTH) for i in range(4)]
    x = torch.randn(5, WIDTH)
    for tensor in (x, *cached):
        torch._dynamo.mark_dynamic(tensor, 0)
    expected = model(x, cached)
    for _ in range(2):
        torch._dynamo.reset()
        compiled = fusionpass.compile(copy.deepcopy(model), cache=True, cache_dir=tmp_path, traces=False)
        with torch.no_grad():
            assert torch.allclose(compiled(x, cached), expected, atol=1e-5)
        report = fusionpass.report(compiled)
        assert (report.distinct_pieces, len(report.pieces)) == (3, 5)
    assert all(graph.cached for graph in report.graphs)
    with torch.no_grad():
        assert torch.allclose(compiled(torch.cat([x] * 6), cached), model(torch.cat([x] * 6), cached), atol=1e-5)


def test_nothing_that_did_not_fuse_is_no_error(model: Stack, tmp_path: Path) -> None:
    _, told = start(model, tmp_path, torch.randn(2, 7, WIDTH), on_miss="error")
    assert told.count("add_rms_norm") == 3


def test_damage_costs_a_compilation_and_says_so(model: Stack, tmp_path: Path) -> None:
    x = torch.randn(2, 7, WIDTH)
    cold, _ = start(model, tmp_path, x)
    files = sorted(tmp_path.glob("*.fusionpass"))
    assert len(files) == 3
    data = bytearray(files[1].read_bytes())
    data[len(data) // 2] ^= 1
    files[1].write_bytes(data)
    with pytest.warns(CacheWarning):
        again, told = start(model, tmp_path, x)
    assert torch.equal(again[0], cold[0])
    assert sum(graph.cached for graph in told.graphs) == 2
    assert all(graph.cached for graph in start(model, tmp_path, x)[1].graphs), "it was written anew"


def test_what_cannot_be_loaded_is_compiled(model: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 7, WIDTH)
    cold, _ = start(model, tmp_path, x)

    def restore(payload: bytes) -> Any:
        raise ImportError("no such module")

    monkeypatch.setattr(fusionpass.session.inductor, "restore", restore)
    with pytest.warns(CacheWarning, match="no such module"):
        again, told = start(model, tmp_path, x)
    assert torch.equal(again[0], cold[0])
    assert not any(graph.cached for graph in told.graphs)


@pytest.mark.parametrize(
    "options",
    [{"disable": {"norm.llama"}}, {"numerics": "eager"}, {"target": fusionpass.Arch("cpu")}, {"verify": True}],
)
def test_other_options_are_another_key(model: Stack, tmp_path: Path, options: dict[str, Any]) -> None:
    x = torch.randn(2, 7, WIDTH)
    start(model, tmp_path, x)
    _, told = start(model, tmp_path, x, **options)
    assert not any(graph.cached for graph in told.graphs)


def test_a_users_rule_is_part_of_the_key(model: Stack, tmp_path: Path) -> None:
    x = torch.randn(2, 7, WIDTH)
    start(model, tmp_path, x)
    mine = Spelling("mine.norm", rms_norm, rms_norm.reference)
    assert not any(graph.cached for graph in start(model, tmp_path, x, rules=(mine,))[1].graphs)
    assert all(graph.cached for graph in start(model, tmp_path, x, rules=(mine,))[1].graphs)
    secret = object()

    def local(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        assert secret
        return rms_norm.reference(x, weight, eps)

    unknown = Spelling("mine.local", rms_norm, local)
    for _ in range(2):
        assert not any(graph.cached for graph in start(model, tmp_path, x, rules=(unknown,))[1].graphs)


def test_a_dump_is_of_what_was_compiled(model: Stack, tmp_path: Path) -> None:
    x = torch.randn(2, 7, WIDTH)
    start(model, tmp_path / "cache", x)
    _, told = start(model, tmp_path / "cache", x, dump_dir=tmp_path / "dump")
    assert not any(graph.cached for graph in told.graphs)
    assert len(list((tmp_path / "dump").glob("graph_*"))) == 3, "one folder for each distinct piece"


def test_nothing_is_read_from_a_folder_of_others(model: Stack, tmp_path: Path) -> None:
    x = torch.randn(2, 7, WIDTH)
    start(model, tmp_path / "open", x)
    (tmp_path / "open").chmod(0o777)
    _, told = start(model, tmp_path / "open", x)
    assert not any(graph.cached for graph in told.graphs)


def test_no_cache(model: Stack, tmp_path: Path) -> None:
    torch._dynamo.reset()
    compiled = fusionpass.compile(model, cache=False, cache_dir=tmp_path)
    with torch.no_grad():
        compiled(torch.randn(2, 7, WIDTH))
    assert not list(tmp_path.iterdir())


def test_another_process_starts_warm(tmp_path: Path) -> None:
    program = """
        import sys, torch, fusionpass
        from tests.runtime.test_pieces import Stack, WIDTH
        torch.manual_seed(0)
        model = fusionpass.compile(Stack(3).requires_grad_(False), traces=False, cache=True, cache_dir=sys.argv[1])
        with torch.no_grad():
            out = model(torch.randn(2, 7, WIDTH))
        print(out.numpy().tobytes().hex(), [graph.cached for graph in fusionpass.report(model).graphs])
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(maxsplit=1) for _ in range(2)
    )
    assert first[0] == second[0]
    assert first[1].strip() == "[False, False, False]"
    assert second[1].strip() == "[True, True, True]"


def test_a_storm_of_compilations_is_told_with_its_guard() -> None:
    torch._dynamo.reset()
    compiled = fusionpass.compile(lambda x: x.sin() * x.shape[0], cuda_graphs="off")
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=20), torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("error", RecompileWarning)
            for n in range(2, 10):
                compiled(torch.randn(n))
        with pytest.warns(RecompileWarning, match=r"compiled 9 times.*size mismatch"):
            compiled(torch.randn(30))
    assert len(fusionpass.report(compiled).recompiles) == 8


def test_training_stays_whole_and_has_its_gradient(model: Stack) -> None:
    torch._dynamo.reset()
    model.requires_grad_(True)
    x = torch.randn(2, 7, WIDTH, requires_grad=True)
    copy_of(model)(x).sum().backward()
    expected, x.grad = x.grad, None
    compiled = fusionpass.compile(model)
    compiled(x).sum().backward()
    assert torch.allclose(x.grad, expected, atol=1e-4)
    assert len(fusionpass.report(compiled).pieces) == 1


def test_release_asks_for_a_compiled_model() -> None:
    with pytest.raises(NotCompiledError, match="Linear was not compiled"):
        fusionpass.release(torch.nn.Linear(2, 2))
    with torch.no_grad():
        compiled = fusionpass.compile(torch.nn.Linear(2, 2))
        before = compiled(torch.ones(3, 2))
        fusionpass.release(compiled)
        assert torch.equal(compiled(torch.ones(3, 2)), before)


def test_two_models_share_nothing_but_the_cache(model: Stack, tmp_path: Path) -> None:
    torch._dynamo.reset()
    other = Stack(4).requires_grad_(False)
    x = torch.randn(2, 7, WIDTH)
    with torch.no_grad():
        expected = [copy_of(m)(x) for m in (model, other)]
        compiled = [fusionpass.compile(m, Config(cache=True, cache_dir=tmp_path, traces=False)) for m in (model, other)]
        for got, want in zip([m(x) for m in compiled], expected, strict=True):
            assert torch.allclose(got, want, atol=1e-5)
    first, second = (fusionpass.report(m) for m in compiled)
    assert [graph.cached for graph in first.graphs] == [False] * 3
    assert [graph.cached for graph in second.graphs] == [True] * 3
