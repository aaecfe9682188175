"""Look-ups: which entry is taken, from which table, and what becomes of it."""

import json
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusionpass.arch import Arch
from fusionpass.errors import TableError, TableWarning, TuningError
from fusionpass.ops.gemm.blocks_triton import Cut as BlockCut
from fusionpass.tuning import names, store
from fusionpass.tuning.files import Name, measured, merge, read
from fusionpass.tuning.names import field, from_file, to_file
from fusionpass.tuning.rows import Cut, choose_rows, row_key

H100 = Arch("sm_90")
SLUG = store.STAND_IN["sm_90"]
KEY = {"N": 4608, "K": 7168, "dtype": "fp8_w8a8", "block_shape": [128, 128]}
RULE = BlockCut(64, 64, 128, splits=4)
FOREIGN = {
    "BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 32, "num_warps": 4, "num_stages": 5,
}  # fmt: skip
ROWS = Cut(1, 4096, 4)


def put(folder: Path, entries: dict[int, Any], key: dict[str, Any] = KEY, op: str = "block_scaled_mm") -> Path:
    path = merge(folder, Name.of(op, key, SLUG), entries, {})
    store.forget()
    return path


def look(m: int, **options: Any) -> int | None:
    found = store.find("block_scaled_mm", KEY, H100, m, **options)
    return None if found is None else found.m


@pytest.mark.parametrize(
    ("m", "nearest"), [(1, 1), (20, 32), (31, 32), (40, 32), (48, 64), (33, 32), (16, 1), (17, 32), (9000, 64)]
)
def test_the_nearest_number_of_rows_and_of_two_the_larger(folder: Path, m: int, nearest: int) -> None:
    put(folder, {32: {}, 1: {}, 64: {}})
    # 16 is 15 from 1 and 16 from 32; 48 is as near to 32 as to 64.
    assert look(m) == nearest


def test_a_tie_does_not_depend_on_the_order_in_the_file(folder: Path) -> None:
    path = put(folder, {32: {}, 64: {}})
    path.write_text('{"64": {}, "32": {}}')
    store.forget()
    assert look(48) == 64


@pytest.mark.parametrize(("m", "found"), [(64, 64), (32, 64), (128, 64), (31, None), (129, None)])
def test_reach_is_a_factor(folder: Path, m: int, found: int | None) -> None:
    put(folder, {64: {}})
    assert look(m, reach=2) == found


@pytest.mark.parametrize("shape", ["[128, 128]", "[128,128]"])
def test_a_foreign_file_is_read_in_both_spellings(folder: Path, shape: str) -> None:
    file = folder / f"N=4608,K=7168,device_name={SLUG},dtype=fp8_w8a8,block_shape={shape}.json"
    file.write_text(json.dumps({"triton_version": "3.4.0", "64": {**FOREIGN, "kpack": 2, "matrix_instr_nonkdim": 16}}))
    with pytest.warns(TableWarning) as told:
        cut = store.choose(RULE, "block_scaled_mm", KEY, H100, 64)
    # What a foreign file leaves out is the class's default, not the rule's: its kernel splits nothing.
    assert cut == BlockCut(16, 64, 128, splits=1, grouped=32, warps=4, stages=5)
    texts = [str(warning.message) for warning in told]
    assert [text.partition(": ")[2] for text in texts] == [
        "keys that are no numbers of rows are left out: triton_version",
        "not known to this kernel, and left out: kpack, matrix_instr_nonkdim",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.choose(RULE, "block_scaled_mm", KEY, H100, 64) == cut


def test_names_of_files_and_of_kernels_are_each_other_s(folder: Path) -> None:
    assert {field(name) for name in vars(RULE)} == {*FOREIGN, "SPLITS"}
    cut = BlockCut(32, 128, 64, 2, 8, 8, 4)
    assert from_file(RULE, to_file(cut), "") == cut
    assert field("block") == "BLOCK"


@pytest.mark.parametrize("value", [0, -4, "4", True, 1.5, None])
def test_a_value_that_is_no_size_is_an_error(folder: Path, value: object) -> None:
    put(folder, {64: {"BLOCK_SIZE_M": value}})
    with pytest.raises(TableError, match=r"BLOCK_SIZE_M is .* Pass a whole number above zero"):
        store.choose(RULE, "block_scaled_mm", KEY, H100, 64)


def test_null_and_empty_entries(folder: Path) -> None:
    path = put(folder, {1: None, 64: {}})
    assert store.choose(RULE, "block_scaled_mm", KEY, H100, 64) is RULE
    assert "something else was measured faster at 1 rows" in str(store.choose(RULE, "block_scaled_mm", KEY, H100, 1))
    merge(folder, Name.of("block_scaled_mm", KEY, SLUG), {}, {1: {"us": 2.0, "beside_us": {"cublas": 1.5, "b": 1.9}}})
    assert store.choose(RULE, "block_scaled_mm", KEY, H100, 1) == (
        "cublas: measured faster (1.50 against 2.00 µs at 1 rows, "
        f"N=4608,K=7168,dtype=fp8_w8a8,block_shape=[128,128], on {SLUG})"
    )
    assert path.exists()


def test_an_entry_that_the_kernel_cannot_take_leaves_the_rule(folder: Path) -> None:
    put(folder, {64: to_file(replace(RULE, depth=256))})
    names._told.clear()
    with pytest.warns(TableWarning, match="the entry of 64 is left out: too deep"):
        cut = store.choose(RULE, "block_scaled_mm", KEY, H100, 64, refuse=lambda cut: "too deep" * (cut.depth > 128))
    assert cut is RULE


@pytest.mark.parametrize("m", [None, 0])
def test_no_table_is_asked_for_a_symbolic_number_of_rows(folder: Path, m: int | None) -> None:
    put(folder, {1: FOREIGN})
    assert store.choose(RULE, "block_scaled_mm", KEY, H100, m) is RULE


def test_the_user_s_table_stands_in_the_place_of_the_shipped_one(folder: Path) -> None:
    key = row_key("fp8_token", 4096, 2)
    shipped = store.find("quantize", key, H100, 1024)
    assert shipped is not None
    assert shipped.entry == {"BLOCK_SIZE_M": 1, "BLOCK_SIZE_N": 4096, "num_warps": 8}
    put(folder, {64: to_file(Cut(2, 4096, 8))}, key, "quantize")
    found = store.find("quantize", key, H100, 64)
    assert found is not None
    assert (found.m, Path(found.path).parent) == (64, folder / "quantize")
    # All of it: an entry that is only in the shipped table is not found.
    assert store.find("quantize", key, H100, 1024, reach=2) is None


def test_a_change_of_the_folder_is_a_change_of_the_digest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = store.digest()
    put(folder, {1: {}})
    one = store.digest()
    put(folder, {1: None})
    assert len({empty, one, store.digest()}) == 3
    monkeypatch.delenv("FUSIONPASS_CONFIG_DIR")
    assert store.digest() == empty


def test_what_was_returned_cannot_change_what_is_returned_next(folder: Path) -> None:
    put(folder, {64: FOREIGN})
    found = store.find("block_scaled_mm", KEY, H100, 64)
    assert found is not None
    with pytest.raises(TypeError, match="does not support item assignment"):
        found.entry["num_warps"] = 1  # type: ignore[index]
    dict(found.entry or {})["num_warps"] = 1
    again = store.find("block_scaled_mm", KEY, H100, 64)
    assert again is not None
    assert again.entry == FOREIGN


def test_the_device_that_is_here_comes_before_the_one_that_stands_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder, {64: {}})
    h200 = merge(folder, Name.of("block_scaled_mm", KEY, "NVIDIA H200"), {1: FOREIGN}, {})
    store.forget()
    monkeypatch.setattr(store, "device_here", lambda: "NVIDIA_H200")
    monkeypatch.setattr(store, "_multiprocessors_here", lambda: 132)
    monkeypatch.setattr(Arch, "of", staticmethod(lambda device: H100))
    found = store.find("block_scaled_mm", KEY, H100, 64)
    assert found is not None
    assert (found.m, found.path) == (1, h200)
    # What it has no table for is looked up in those of the device that is like it.
    other = put(folder, {64: FOREIGN}, {**KEY, "N": 512})
    found = store.find("block_scaled_mm", {**KEY, "N": 512}, H100, 64)
    assert found is not None
    assert found.path == other
    monkeypatch.setattr(store, "_multiprocessors_here", lambda: 78)
    assert store.find("block_scaled_mm", {**KEY, "N": 512}, H100, 64) is None
    # For a target that is not here nothing of this device counts.
    assert store.find("block_scaled_mm", KEY, Arch("sm_100"), 64) is None


@pytest.mark.parametrize(
    ("name", "here", "count", "device", "reason"),
    [
        ("sm_90", None, None, SLUG, f"no device of sm_90 is here: {SLUG} stands for the target"),
        ("sm_90", "NVIDIA_H200", 132, SLUG, f"NVIDIA_H200 has 132 multiprocessors of the same kind, as {SLUG}"),
        ("sm_90", "NVIDIA_H100_PCIe", 114, None, f"NVIDIA_H100_PCIe has 114 multiprocessors, {SLUG} 132"),
        ("sm_90", SLUG, 132, None, f"{SLUG} has tables of its own"),
        ("sm_100", "NVIDIA_B200", 148, None, "there are no tables of another device for sm_100"),
        ("sm_120", None, None, None, "there are no tables of another device for sm_120"),
    ],
)
def test_whose_tables_serve_a_device_that_has_none(
    name: str, here: str | None, count: int | None, device: str | None, reason: str
) -> None:
    assert store.stand_in(Arch(name), here, count) == (device, reason)


def test_what_else_is_faster_counts_where_it_was_measured_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder, {64: None})
    assert isinstance(store.choose(RULE, "block_scaled_mm", KEY, H100, 64), str), "of a target that is not here"
    monkeypatch.setattr(Arch, "of", staticmethod(lambda device: H100))
    monkeypatch.setattr(store, "_multiprocessors_here", lambda: 132)
    monkeypatch.setattr(store, "device_here", lambda: SLUG)
    assert isinstance(store.choose(RULE, "block_scaled_mm", KEY, H100, 64), str)
    monkeypatch.setattr(store, "device_here", lambda: "NVIDIA_H200")
    assert store.choose(RULE, "block_scaled_mm", KEY, H100, 64) is RULE


@pytest.mark.parametrize(("width", "found"), [(4096, 4096), (3600, 4096), (2880, 2880), (3488, 2880), (8192, None)])
def test_a_width_takes_the_nearest_table_that_is_cut_alike(folder: Path, width: int, found: int | None) -> None:
    for measured_width in (2880, 4096):
        put(folder, {64: {}}, row_key("fp8_static", measured_width, 2), "rms_norm_quantize")
    look = store.find("rms_norm_quantize", row_key("fp8_static", width, 2), H100, 64, near="width")
    assert (None if look is None else dict(look.table.key)["width"]) == (None if found is None else str(found))


def test_rows_are_cut_as_measured_within_a_factor_of_two() -> None:
    wider = Cut(1, 4096, 8)
    for m, scheme, size, cut in [
        (1024, "fp8_token", 2, wider), (2000, "fp8_token,amax_dtype=input", 2, wider), (512, "fp8_token", 2, wider),
        (511, "fp8_token", 2, ROWS), (1024, "fp8_token", 4, ROWS), (None, "fp8_token", 2, ROWS),
    ]:  # fmt: skip
        assert choose_rows(ROWS, "quantize", scheme, H100, m, 4096, size, whole=True) == cut


@pytest.mark.parametrize(
    ("cut", "reason"),
    [
        (Cut(1, 2048, 4), "whole rows, 4096 columns, not 2048"),
        (Cut(1, 4096, 3), "num_warps: 3 is no power of two"),
    ],
)
def test_a_table_cannot_cut_rows_as_a_kernel_does_not(folder: Path, cut: Cut, reason: str) -> None:
    put(folder, {64: to_file(cut)}, row_key(None, 4096, 2), "rms_norm")
    names._told.clear()
    with pytest.warns(TableWarning, match=reason):
        assert choose_rows(ROWS, "rms_norm", None, H100, 64, 4096, 2, whole=True) == ROWS


def test_what_is_imposed_is_taken_and_a_key_that_nobody_asks_for_is_an_error(folder: Path) -> None:
    put(folder, {64: FOREIGN})
    other = {**KEY, "N": 64}
    with store.imposing("block_scaled_mm", KEY, replace(RULE, rows=16)) as given:
        assert store.choose(RULE, "block_scaled_mm", KEY, H100, 64) == replace(RULE, rows=16)
        assert store.choose(RULE, "block_scaled_mm", other, H100, 64) is RULE
        assert store.choose(RULE, "block_scaled_mm", KEY, H100, 64, refuse=lambda cut: "no") == "no"
    assert given.rule is RULE
    with store.imposing("block_scaled_mm", KEY, RULE, [(other, FOREIGN)]):
        assert store.choose(RULE, "block_scaled_mm", KEY, H100, 64) is RULE
        assert store.choose(RULE, "block_scaled_mm", other, H100, 64).rows == 16
        assert store.choose(RULE, "block_scaled_mm", {**KEY, "N": 65}, H100, 64) is RULE
    with store.imposing("block_scaled_mm", KEY, None):
        assert store.choose(RULE, "block_scaled_mm", KEY, H100, 64) is RULE
    with (
        pytest.raises(TuningError, match=r"no plan asks for K=7168, N=64"),
        store.imposing("block_scaled_mm", other, RULE),
    ):
        store.choose(RULE, "block_scaled_mm", KEY, H100, 64)
    assert store.choose(RULE, "block_scaled_mm", KEY, H100, 64) != RULE


def test_shipped_tables_hold_what_look_ups_read() -> None:
    count = 0
    for op in (Path(str(files("fusionpass.tuning"))) / "configs").iterdir():
        for path in op.glob("*.json"):
            name = Name.parse(op.name, path.name)
            if name is None:
                continue
            entries, others = read(path)
            assert not others
            assert name.device in store.STAND_IN.values()
            for m, entry in entries.items():
                assert entry == {} or to_file(from_file(ROWS, entry or {}, "")) == entry
                if entry:
                    count += 1
                    record = measured(path)[m]
                    assert record["us"] <= 0.97 * record["rule_us"]
                    assert {"device", "torch", "triton", "commit"} <= record.keys()
    assert count == 86


def test_nothing_is_read_at_import() -> None:
    code = (
        "import fusionpass, fusionpass.ops.norm.triton, fusionpass.ops.gemm.blocks_triton\n"
        "from fusionpass.tuning import store\n"
        "print(store._index.cache_info().misses, store._entries.cache_info().misses)\n"
        "store.find('quantize', {'width': 4096, 'scheme': 'fp8_token', 'bytes': 2}, fusionpass.Arch('sm_90'), 64)\n"
        "print(store._index.cache_info().misses, store._entries.cache_info().misses)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["0 0", "2 1"]


def test_the_device_s_name_is_asked_for_only_where_torch_uses_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.device_here() is None
    fake = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, current_device=lambda: 0,
        get_device_name=lambda index: "NVIDIA H100 80GB HBM3",
    )  # fmt: skip
    monkeypatch.setattr(torch, "cuda", fake)
    store._device_name.cache_clear()
    assert store.device_here() == SLUG
    store._device_name.cache_clear()
