import json

import pytest

from fusionpass.arch import Arch
from fusionpass.tuning import store

H100 = Arch("sm_90")
CELLS = (
    {"tokens": 64, "width": 4096, "rows": 1, "warps": 8, "us": 2.0, "inductor_us": 1.5},
    {"tokens": 1024, "width": 4096, "rows": 2, "warps": 4, "us": 10.0},
)


@pytest.fixture
def cells(monkeypatch):
    monkeypatch.setattr(store, "_cells", lambda family, arch: CELLS if (family, arch) == ("norm", "sm_90") else ())


@pytest.mark.parametrize(
    ("tokens", "found"), [(64, 0), (40, 0), (128, 0), (129, None), (2048, 1), (1, None), (8192, None)]
)
def test_the_nearest_cell_within_a_factor_of_two(cells, tokens, found):
    assert store.look_up("norm", H100, tokens, 4096) == (None if found is None else CELLS[found])


def test_other_widths_targets_and_symbolic_counts_find_nothing(cells):
    assert store.look_up("norm", H100, 64, 4095) is None
    assert store.look_up("norm", Arch("sm_100"), 64, 4096) is None
    assert store.look_up("norm", H100, None, 4096) is None
    assert store.look_up("norm", H100, 0, 4096) is None


def test_a_refusal_carries_the_figures(cells):
    assert (
        store.refuse("norm", H100, 64, 4096) == "inductor: measured faster (1.50 against 2.00 µs at 64 × 4096 on h100)"
    )
    assert store.refuse("norm", H100, 1024, 4096) is None


def test_the_files_hold_what_look_up_reads():
    folder = store.files("fusionpass.tuning") / "configs"
    for family in folder.iterdir():
        for path in family.iterdir():
            record = json.loads(path.read_text())
            assert {"device", "torch", "triton", "commit", "cells"} <= record.keys()
            assert all({"tokens", "width", "us"} <= cell.keys() for cell in record["cells"])
