import json

import pytest

from fusionpass.arch import Arch
from fusionpass.tuning import store
from fusionpass.tuning.store import Cut, choose, look_up, refuse

H100 = Arch("sm_90")
RULE = Cut(1, 4096, 4)
SLOWER = {"op": "rms_norm", "scheme": None, "tokens": 64, "width": 4096, "us": 2.0, "inductor_us": 1.5}
WIDER = {"op": "quantize", "scheme": "fp8_token", "tokens": 1024, "width": 4096, "us": 10.0}
WIDER |= {"rows": 2, "columns": 4096, "warps": 8, "rule_us": 11.0}
RECORD = {"tokens": [1, 64, 1024], "widths": [2880, 4096, 8192], "cells": [SLOWER, WIDER]}


@pytest.fixture(autouse=True)
def cells(monkeypatch):
    monkeypatch.setattr(store, "_table", lambda arch: store.indexed(RECORD) if arch == "sm_90" else {})


@pytest.mark.parametrize(("tokens", "found"), [(64, True), (40, True), (128, True), (129, False), (1, False)])
def test_a_count_stands_for_those_within_a_factor_of_two(tokens, found):
    assert look_up("rms_norm", None, H100, tokens, 4096) == (SLOWER if found else None)


@pytest.mark.parametrize(("width", "found"), [(4096, True), (3600, True), (2880, False), (3000, False), (8192, False)])
def test_a_width_takes_the_nearest_measured_one_that_is_cut_alike(width, found):
    assert (look_up("rms_norm", None, H100, 64, width) is SLOWER) == found


def test_nothing_is_found_for_what_was_not_measured():
    assert look_up("rms_norm", None, H100, 64, 2048) is None
    assert look_up("rms_norm", None, Arch("sm_100"), 64, 4096) is None
    assert look_up("rms_norm", None, H100, None, 4096) is None
    assert look_up("rms_norm", None, H100, 0, 4096) is None
    assert look_up("rms_norm", "fp8_token", H100, 64, 4096) is None
    assert look_up("add_rms_norm", None, H100, 64, 4096) is None


def test_a_measured_cut_takes_the_place_of_the_rule():
    found = Cut(2, 4096, 8)
    assert choose(RULE, "quantize", "fp8_token", H100, 1024, 4096, 2) == found
    assert choose(RULE, "quantize", "fp8_token,amax_dtype=input", H100, 2000, 4096, 2) == found
    assert choose(RULE, "quantize", "fp8_token", H100, 1024, 4096, 4) == RULE
    assert choose(RULE, "quantize", "fp8_token", H100, None, 4096, 2) == RULE
    assert choose(RULE, "rms_norm", None, H100, 64, 4096, 2) == RULE


def test_a_refusal_carries_the_figures():
    wanted = "inductor: measured faster (1.50 against 2.00 µs at 64 × 4096 on h100)"
    assert refuse("rms_norm", None, H100, 64, 4096) == wanted
    assert refuse("quantize", "fp8_token", H100, 1024, 4096) is None
    assert refuse("rms_norm", None, H100, 1024, 4096) is None


def test_the_files_hold_what_look_up_reads():
    files = list((store.files("fusionpass.tuning") / "configs").iterdir())
    assert {path.name for path in files} == {f"{device}.json" for device in store.DEVICES.values()}
    for path in files:
        record = json.loads(path.read_text())
        assert {"device", "torch", "triton", "commit", "tokens", "widths", "cells"} <= record.keys()
        for cell in record["cells"]:
            assert {"op", "scheme", "tokens", "width", "us"} <= cell.keys()
            assert {"rows", "columns", "warps", "rule_us"} <= cell.keys() or "inductor_us" in cell
            assert cell["tokens"] in record["tokens"]
            assert cell["width"] in record["widths"]
