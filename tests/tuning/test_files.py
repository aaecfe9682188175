"""Tables as files: names, what they hold, and several writers."""

import json
import multiprocessing
import sys
from pathlib import Path

import pytest

from fusionpass.errors import TableError
from fusionpass.tuning.files import Name, measured, merge, meta_path, read

H100 = "NVIDIA H100 80GB HBM3"
BLOCKS = {"N": 4608, "K": 7168, "dtype": "fp8_w8a8", "block_shape": [128, 128]}
SLUG = "NVIDIA_H100_80GB_HBM3"


@pytest.mark.parametrize(
    ("op", "key", "path"),
    [
        (
            "block_scaled_mm",
            BLOCKS,
            f"N=4608,K=7168,device_name={SLUG},dtype=fp8_w8a8,block_shape=[128, 128].json",
        ),
        ("experts", {"E": 128, "N": 768}, f"E=128,N=768,device_name={SLUG}.json"),
        (
            "experts",
            {"E": 128, "N": 768, "dtype": "fp8_w8a8", "block_shape": [128, 128], "down": True},
            f"E=128,N=768,device_name={SLUG},dtype=fp8_w8a8,block_shape=[128, 128]_down.json",
        ),
        ("experts", {"E": 8, "N": 64, "dtype": None, "down": False}, f"E=8,N=64,device_name={SLUG}.json"),
        ("quantize", {"width": 64, "scheme": "mxfp8"}, f"quantize/width=64,scheme=mxfp8,device_name={SLUG}.json"),
    ],
)
def test_a_name_and_what_it_is_of(op: str, key: dict[str, object], path: str) -> None:
    name = Name.of(op, key, H100)
    assert name.path == Path(path)
    assert Name.parse(Path(path).parent.name, Path(path).name) == name
    assert name.device == SLUG


@pytest.mark.parametrize("shape", ["[128,128]", "[128, 128]", "[ 128 , 128 ]"])
def test_every_spelling_of_the_block_is_the_same_table(shape: str) -> None:
    found = Name.parse("", f"N=4608,K=7168,device_name={SLUG},dtype=fp8_w8a8,block_shape={shape}.json")
    assert found is not None
    assert found.key == Name.of("block_scaled_mm", BLOCKS, H100).key


@pytest.mark.parametrize(
    "file",
    [
        "README.md",
        "N=1,K=2,device_name=X.meta.json",
        "N=1,K=2.json",  # of no device
        "device_name=X.json",  # of nothing
        "N=1,K=2,device_name=X.json.tmp",
        "notes,device_name=X.json",
        "width=64,device_name=X.json",  # of no op
    ],
)
def test_other_files_are_no_tables(file: str) -> None:
    assert Name.parse("", file) is None


def test_what_is_merged_is_read_and_sorted_as_numbers(tmp_path: Path) -> None:
    name = Name.of("block_scaled_mm", BLOCKS, H100)
    entry = {"BLOCK_SIZE_M": 16, "num_warps": 4}
    merge(tmp_path, name, {64: entry, 1024: {}}, {64: {"us": 1.5}})
    path = merge(tmp_path, name, {8: None, 64: {**entry, "num_warps": 8}}, {8: {"us": 2.0}})
    assert list(json.loads(path.read_text())) == ["8", "64", "1024"]
    assert read(path)[0] == {8: None, 64: {**entry, "num_warps": 8}, 1024: {}}
    assert measured(path) == {8: {"us": 2.0}, 64: {"us": 1.5}}
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != ".lock") == sorted([path.name, meta_path(path).name])


def test_a_file_of_another_spelling_is_added_to_and_keeps_what_is_not_ours(tmp_path: Path) -> None:
    foreign = tmp_path / f"N=4608,K=7168,device_name={SLUG},dtype=fp8_w8a8,block_shape=[128,128].json"
    foreign.write_text('{"triton_version": "3.4.0", "512": {"BLOCK_SIZE_M": 64, "kpack": 2}}')
    assert merge(tmp_path, Name.of("block_scaled_mm", BLOCKS, H100), {1: {}}, {}) == foreign
    assert json.loads(foreign.read_text()) == {
        "triton_version": "3.4.0", "1": {}, "512": {"BLOCK_SIZE_M": 64, "kpack": 2},
    }  # fmt: skip


@pytest.mark.parametrize("text", ["", "[]", '{"1": 3}', '{"1": {'])
def test_what_is_no_table_is_named_and_never_replaced(tmp_path: Path, text: str) -> None:
    name = Name.of("block_scaled_mm", BLOCKS, H100)
    path = tmp_path / name.path
    path.write_text(text)
    with pytest.raises(TableError, match=r"^.*N=4608.*tune again|by number of rows|or null"):
        merge(tmp_path, name, {1: {}}, {})
    assert path.read_text() == text


def _writer(folder: Path, number: int) -> None:
    name = Name.of("block_scaled_mm", BLOCKS, H100)
    for i in range(50):
        m = 4 * i + number + 1
        merge(folder, name, {m: {"BLOCK_SIZE_M": m}}, {m: {"us": float(m)}})


def test_four_writers_of_fifty_lose_nothing_and_a_reader_always_parses(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    writers = [context.Process(target=_writer, args=(tmp_path, number)) for number in range(4)]
    path = tmp_path / Name.of("block_scaled_mm", BLOCKS, H100).path
    for writer in writers:
        writer.start()
    seen, reads = 0, 0
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            count = len(read(path)[0])
            assert count >= seen
            seen, reads = count, reads + 1
            assert all(m in read(path)[0] for m in measured(path))
    assert [writer.exitcode for writer in writers] == [0, 0, 0, 0]
    assert reads > 10
    assert read(path)[0] == {m: {"BLOCK_SIZE_M": m} for m in range(1, 201)}
    assert measured(path) == {m: {"us": float(m)} for m in range(1, 201)}
