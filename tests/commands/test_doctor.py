"""fusionpass doctor: it says what is wrong, and its exit status says that something is."""

import os

import pytest
import torch

from fusionpass import Arch, cli
from fusionpass.commands import doctor
from fusionpass.op import OPS


def _by_about(findings):
    found = {}
    for finding in findings:
        found.setdefault(finding.about, []).append(finding)
    return found


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FUSIONPASS_CACHE", "1")
    return tmp_path


def test_versions():
    found = _by_about(doctor.versions())
    assert found["torch"][0].text == torch.__version__.split("+")[0]
    assert found["torch"][0].right is True


def test_an_old_torch_is_wrong(monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "2.9.1+cu128")
    (torch_,) = _by_about(doctor.versions())["torch"]
    assert torch_.right is False
    assert torch_.text == "2.9.1+cu128, older than 2.11, the oldest that is supported"


def test_backends_and_why_not():
    count = sum(1 for op in OPS.values() if op.backends and op.namespace == "fusionpass")
    assert doctor.Finding("backend triton", f"takes {count} ops") in list(doctor.backends(Arch("sm_90")))
    cpu = list(doctor.backends(Arch("cpu")))
    assert cpu[0].text == "takes 0 ops"
    assert "a CPU has no Triton kernels" in cpu[1].text
    old = [finding.text for finding in doctor.backends(Arch("sm_75"))]
    assert any(text.startswith("not for quantize") for text in old)


def test_caches(home):
    (own,) = _by_about(doctor.caches())["cache"]
    assert own.right
    assert own.text.startswith(str(home / "fusionpass"))
    assert ", 0 files, 0.0 MiB," in own.text
    (home / "fusionpass" / "entry").write_bytes(b"x" * 3 * 2**20)
    (own,) = _by_about(doctor.caches())["cache"]
    assert ", 1 files, 3.0 MiB," in own.text


def test_a_cache_that_others_may_write_is_wrong(home, capsys):
    folder = home / "fusionpass"
    folder.mkdir()
    os.chmod(folder, 0o777)
    (own,) = _by_about(doctor.caches())["cache"]
    assert own.right is False
    assert own.text.startswith(f"not used: {folder}")
    assert cli.main(["doctor", "--no-test"]) == 1
    assert f"fail cache not used: {folder}" in capsys.readouterr().out


def test_no_cache(home, monkeypatch):
    monkeypatch.setenv("FUSIONPASS_CACHE", "0")
    assert _by_about(doctor.caches())["cache"] == [doctor.Finding("cache", "off (FUSIONPASS_CACHE)")]


def test_all_is_well(home, capsys):
    assert cli.main(["doctor", "--no-test"]) == 0
    out = capsys.readouterr().out
    assert "ok   torch " in out
    assert "fail" not in out


def test_one_op_of_each_family_is_tested():
    found = list(doctor.self_test(Arch("cpu")))
    assert [finding.about for finding in found] == [
        f"test {name}" for name in ("quant", "activation", "norm", "rope", "attention", "gemm", "moe")
    ]
    assert all(finding.right for finding in found), [finding.text for finding in found]


def test_a_wrong_result_and_a_crash_are_told(monkeypatch):
    def broken(op, arch):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(doctor, "_compiled_alike", broken)
    found = list(doctor.self_test(Arch("cpu")))
    assert {finding.right for finding in found} == {False}
    assert found[0].text == "quantize: RuntimeError: no compiler"
