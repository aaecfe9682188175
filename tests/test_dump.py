import re
import warnings
from pathlib import Path

import pytest
import torch
import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config

import fusionpass
from fusionpass import Arch, Config
from fusionpass.aot import compile_launch
from fusionpass.commands.aot import sample
from fusionpass.op import OPS
from fusionpass.report.dump import asking_for_ptx, write_graph, write_index
from tests.models import Block, LlamaNorm

PASSES = ["captured", "normalize", "recognise", "fuse", "lower", "cleanup"]


@pytest.fixture
def block():
    return Block(16)


def _inputs(tokens=3):
    return torch.randn(tokens, 16).bfloat16(), torch.randn(tokens, 16).bfloat16()


def _settings():
    modules = (torch._inductor.config, torch._dynamo.config, torch._functorch.config)
    return [{k: _text(v) for k, v in module.shallow_copy_dict().items()} for module in modules]


def _text(value):
    # As text, so that a list that is changed in place is seen; equal sets need not print alike.
    return repr(sorted(value, key=repr) if isinstance(value, set | frozenset) else value)


def _check_graph(folder: Path):
    names = sorted(path.name for path in folder.iterdir())
    numbered = [f"{i:02d}_{name}.py" for i, name in enumerate([*PASSES, "generated"])]
    assert names == [*numbered, "kernels.md", "report.txt"]
    sources = {re.sub(r"^\d+_|\.py$", "", name): (folder / name).read_text() for name in names}
    for name in [*PASSES, "generated"]:
        compile(sources[name], name, "exec")
    assert "aten.rsqrt.default(" in sources["captured"]
    assert "torch.ops.fusionpass" not in sources["normalize"]
    assert sources["recognise"].count("torch.ops.fusionpass.rms_norm.default(") == 1
    assert sources["fuse"].count("torch.ops.fusionpass.add_rms_norm_quantize.default(") == 1
    assert "torch.ops.fusionpass" not in sources["cleanup"], "a CPU has no kernel: plain aten again"
    assert "def call(" in sources["generated"]
    (record,) = sources["report.txt"].splitlines()
    assert record.startswith("fused: norm: add_rms_norm_quantize [fp8_static, norm.add_quantize, inductor]")


def test_dump(block, tmp_path):
    before = _settings()
    with fusionpass.dump(tmp_path / "new" / "folder") as folder, torch.no_grad():
        assert folder == tmp_path / "new" / "folder"
        fusionpass.compile(block)(*_inputs())
    assert _settings() == before
    assert sorted(path.name for path in folder.iterdir()) == ["depyf", "graph_000", "index.md", "pieces.md"]
    _check_graph(folder / "graph_000")
    index = (folder / "index.md").read_text()
    assert [
        name for name in ("graph_000/00_captured.py", "graph_000/06_generated.py", "depyf/") if f"]({name})" in index
    ]
    (kernel,) = [line for line in index.splitlines() if line.startswith("| `cpp_fused_")]
    assert "**add_rms_norm_quantize** in norm" in kernel, "what the kernel is for"
    # The generator in Block.forward makes a closure of an argument.
    assert not (folder / "depyf" / "failed.txt").exists()
    assert "def __transformed_code_0_for_forward(self, x, residual):" in _depyf(
        folder, "__transformed_code_0_for_forward"
    )
    assert "def transformed_forward(" in _depyf(folder, "full_code_for_forward_0")


def _depyf(folder: Path, name: str) -> str:
    return (folder / "depyf" / f"{name}.py").read_text()


def test_where_depyf_fails_it_says_so(block, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise NotImplementedError("LOAD_SOMETHING")

    monkeypatch.setattr("depyf.decompiler.Decompiler.decompile_and_compile_like", fail)
    with torch.no_grad(), fusionpass.dump(tmp_path):
        result = fusionpass.compile(block)(*_inputs())
    assert result
    assert "Block.forward: NotImplementedError: LOAD_SOMETHING" in (tmp_path / "depyf" / "failed.txt").read_text()


def test_depyf_writes_what_it_can_and_replaces_nothing(tmp_path):
    norm = LlamaNorm(16)
    x, _ = _inputs()
    with fusionpass.dump(tmp_path), torch.no_grad():
        fusionpass.compile(norm)(x)
    names = {path.name for path in (tmp_path / "depyf").iterdir()}
    assert {"__transformed_code_0_for_forward.py", "full_code_for_forward_0.py"} <= names
    assert "failed.txt" not in names
    assert "def transformed_forward(" in (tmp_path / "depyf" / "full_code_for_forward_0.py").read_text()
    (entry,) = torch._dynamo.eval_frame._debug_get_cache_entry_list(LlamaNorm.forward)
    assert entry.code.co_filename == LlamaNorm.forward.__code__.co_filename


def test_a_graph_of_each_kind_of_input_and_nothing_overwritten(block, tmp_path):
    kept = tmp_path / "graph_000" / "mine.txt"
    kept.parent.mkdir()
    kept.write_text("kept")
    other = Block(32)
    with fusionpass.dump(tmp_path), torch.no_grad():
        fusionpass.compile(block)(*_inputs())
        fusionpass.compile(other)(torch.randn(2, 32).bfloat16(), torch.randn(2, 32).bfloat16())
    assert [path.name for path in kept.parent.iterdir()] == ["mine.txt"]
    for name in ("graph_000.1", "graph_000.2"):
        _check_graph(tmp_path / name)
    assert ", 32]" in (tmp_path / "graph_000.2" / "00_captured.py").read_text()


def test_it_warns_where_nothing_was_compiled(block, tmp_path):
    with torch.no_grad():
        fusionpass.compile(block)(*_inputs())
        expected = pytest.warns(UserWarning, match=r"nothing was compiled inside fusionpass\.dump")
        with expected as caught, fusionpass.dump(tmp_path):
            block(*_inputs())
    assert [w.filename for w in caught] == [__file__], "it points at the block"


def test_afterwards_nothing_is_written(block, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with fusionpass.dump(tmp_path):
            pass
    with torch.no_grad():
        fusionpass.compile(block)(*_inputs())
    assert not list(tmp_path.glob("graph_*"))


def test_an_exception_passes_and_restores_everything(block, tmp_path):
    before = _settings()
    fusionpass.compile(block)

    def run():
        with torch.no_grad(), fusionpass.dump(tmp_path):
            block(*_inputs())
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run()
    assert _settings() == before
    _check_graph(tmp_path / "graph_000")
    torch._dynamo.reset()
    with torch.no_grad():
        block(*_inputs())
    assert [path.name for path in tmp_path.glob("graph_*")] == ["graph_000"]


def test_config_dump_dir(block, tmp_path):
    before = _settings()
    with torch.no_grad():
        fusionpass.compile(block, dump_dir=tmp_path / "a")
        block(*_inputs())
        _check_graph(tmp_path / "a" / "graph_000")
        # Inductor's own cache is warm now, and the folder must not depend on it.
        torch._dynamo.reset()
        fusionpass.compile(block, dump_dir=tmp_path / "b")
        block(*_inputs())
    _check_graph(tmp_path / "b" / "graph_000")
    assert _settings() == before


def test_both_folders_are_written(block, tmp_path):
    with torch.no_grad(), fusionpass.dump(tmp_path / "outer"):
        fusionpass.compile(block, dump_dir=tmp_path / "own")(*_inputs())
    _check_graph(tmp_path / "outer" / "graph_000")
    _check_graph(tmp_path / "own" / "graph_000")


def test_what_did_not_fuse_is_in_the_report_file(block, tmp_path):
    with torch.no_grad():
        fusionpass.compile(block, dump_dir=tmp_path, disable={"norm.add_quantize"})(*_inputs())
    text = (tmp_path / "graph_000" / "report.txt").read_text()
    assert "fused: norm: add_rms_norm [norm.add, inductor]" in text
    assert "add_rms_norm_quantize [norm.add_quantize] norm.add_quantize is disabled by Config.disable" in text


def test_the_generated_code_says_what_each_kernel_computes(block, tmp_path):
    with torch.no_grad():
        fusionpass.compile(block, dump_dir=tmp_path)(*_inputs())
    lines = (tmp_path / "graph_000" / "06_generated.py").read_text().splitlines()
    kernels = [i for i, line in enumerate(lines) if re.match(r"cpp_fused_\w+ = async_compile\.", line)]
    assert kernels
    above = [" ".join(lines[lines.index("# fusionpass: what the next kernel computes", 0, i) : i]) for i in kernels]
    assert any("add_rms_norm_quantize in norm" in text for text in above)


@torch.library.custom_op("dumped::apart", mutates_args=())
def apart(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


apart.register_fake(torch.empty_like)


class Chain(torch.nn.Module):
    """Norms, and between them what stays out of the pieces; torch.nn.Sequential would break the graph before 2.14."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList(LlamaNorm(16) for _ in range(3))

    def forward(self, x):
        first, second, third = self.norms
        return third(apart(second(apart(first(x)))))


def test_the_index_says_where_the_code_of_each_piece_is(tmp_path):
    model = Chain().requires_grad_(False)
    fusionpass.compile(model, dump_dir=tmp_path, boundaries={"dumped::apart"})(_inputs()[0])
    report = fusionpass.report(model)
    assert len(report.pieces) == 5
    assert report.distinct_pieces < 3, "alike pieces have their code in common"
    index = (tmp_path / "index.md").read_text()
    assert "## Chain, graph 0" in index
    for piece in report.pieces:
        (line,) = re.findall(rf"^- {piece.name}: (.*)$", index, re.M)
        if piece.graph is None:
            assert line.startswith("runs eagerly")
            assert line.endswith("cut: dumped::apart is in Config.boundaries")
        else:
            assert line.startswith(f"[graph_{piece.graph:03d}](graph_{piece.graph:03d}/), {piece.modules[0]}")
            assert (tmp_path / f"graph_{piece.graph:03d}" / "00_captured.py").is_file()


def test_our_own_cache_makes_no_difference(block, tmp_path):
    options = {"cache": True, "cache_dir": tmp_path / "cache", "cuda_graphs": "off"}
    cached = []
    for name in (None, None, "dump"):
        torch._dynamo.reset()
        with torch.no_grad():
            fusionpass.compile(block, dump_dir=name and tmp_path / name, **options)(*_inputs())
        cached += [graph.cached for graph in fusionpass.report(block).graphs]
    assert cached == [False, True, False], "the cache is warm, and is not asked"
    _check_graph(tmp_path / "dump" / "graph_000")


def test_ptx_where_it_is_asked_for(block, tmp_path):
    pytest.importorskip("triton")
    config = Config(target=Arch("sm_90"))
    for asked in (False, True):
        with asking_for_ptx(asked):
            (trace,) = fusionpass.explain(block, *_inputs(), config=config).graphs
        files = {str(path.relative_to(tmp_path)) for path in write_graph(tmp_path, trace).rglob("*.ptx")}
        assert len(files) == asked
    (file,) = files
    text = (tmp_path / file).read_text()
    assert text.startswith("// fusionpass.add_rms_norm_quantize.default in norm\n")
    assert ".target sm_90" in text
    assert ".entry norm_kernel" in text
    write_index(tmp_path)
    assert f"]({file})" in (tmp_path / "index.md").read_text()


def test_every_stage_of_what_triton_compiles(block, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    arch = Arch("sm_90")
    op = OPS[torch.ops.fusionpass.add_rms_norm_quantize.default]
    launch, _ = op.plan(arch, sample(op, arch, 16, 512))
    compile_launch(launch, arch)
    with torch.no_grad(), fusionpass.dump(tmp_path / "dump", ptx=True) as folder:
        fusionpass.compile(block)(*_inputs())
        compile_launch(launch, arch)
    found = {path.suffix for path in (folder / "triton").rglob("norm_kernel.*")}
    assert {".ttir", ".ttgir", ".llir", ".ptx"} <= found, "though it was compiled before"
    compile_launch(launch, arch)
    from triton import knobs

    assert not knobs.compilation.dump_ir
