"""fusionpass dump, aot and bench."""

import sys

import pytest

from fusionpass import cli


@pytest.mark.parametrize("run", [False, True], ids=["traced", "run"])
def test_dump_writes_graphs_and_where_it_runs_the_code(run, tmp_path, capsys):
    command = ["dump", "tests.commands.factories:keyword", "--target", "cpu", "--out", str(tmp_path / "out")]
    assert cli.main([*command, *(["--run"] if run else [])]) == 0
    assert capsys.readouterr().out == f"Stack: see {tmp_path / 'out' / 'index.md'}\n"
    index = (tmp_path / "out" / "index.md").read_text()
    assert "(graph_000/03_fuse.py)" in index
    assert ("_generated.py)" in index) == run
    text = (tmp_path / "out" / "graph_000" / "03_fuse.py").read_text()
    assert "torch.ops.fusionpass.rms_norm_quantize.default(" in text


def test_aot_compiles_for_targets_that_are_not_here(capsys, tmp_path):
    pytest.importorskip("triton")
    ops = ["rms_norm", "rms_norm_quantize"]
    command = ["aot", "--arch", "sm_90,gfx942", "--width", "512", "--out", str(tmp_path)]
    assert cli.main([*command, *(f"--op={name}" for name in ops)]) == 0
    kinds = ("sm_90.ptx", "gfx942.amdgcn")
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.0.{kind}" for name in ops for kind in kinds}
    assert ".target sm_90" in (tmp_path / "rms_norm.0.sm_90.ptx").read_text()
    out = capsys.readouterr().out
    assert "sm_90" in out
    rows = [line for line in out.splitlines() if "rms_norm" in line]
    assert [row.count(" B ") for row in rows] == [2, 2], out


def test_aot_says_why_there_is_no_kernel(capsys):
    assert cli.main(["aot", "--arch", "cpu", "--op", "rms_norm"]) == 0
    assert "triton: " in capsys.readouterr().out


def test_aot_names_what_does_not_exist(capsys):
    assert cli.main(["aot", "--op", "rms_nrom"]) == 2
    assert "there is no op 'rms_nrom' with a kernel" in capsys.readouterr().err


def test_a_kernel_that_does_not_compile_is_a_failure(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("out of registers\nline 2")

    monkeypatch.setattr("fusionpass.aot.compile_launch", fail)
    assert cli.main(["aot", "--arch", "sm_90", "--op", "rms_norm"]) == 1
    assert "RuntimeError: out of registers" in capsys.readouterr().out


def test_bench_runs_a_module_of_the_checkout(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "kernels", "--help"])
    assert stopped.value.code == 0
    assert "--tokens" in capsys.readouterr().out


def test_bench_says_what_there_is_not(capsys):
    assert cli.main(["bench", "kernel"]) == 2
    assert "there is no bench/kernel.py" in capsys.readouterr().err


def test_bench_draws_what_was_measured(monkeypatch):
    ran = []
    monkeypatch.setattr("runpy.run_module", lambda name, **_: ran.append((name, sys.argv[1:])))
    assert cli.main(["bench", "--plot", "plots", "kernels", "--op", "rms_norm"]) == 0
    assert ran == [("bench.kernels", ["--op", "rms_norm"]), ("bench.plot", ["--out", "plots"])]
