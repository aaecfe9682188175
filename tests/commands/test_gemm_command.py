"""fusionpass explain --gemm: every kind of product, every algorithm, with its reason."""

import pytest

from fusionpass import cli
from fusionpass.arch import Arch
from fusionpass.ops.gemm.dispatch import KINDS, Request, choose, why_not


def printed(capsys: pytest.CaptureFixture[str], *options: str) -> list[list[str]]:
    assert cli.main(["explain", "--gemm", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]


@pytest.mark.parametrize("target", ["sm_90", "sm_120", "gfx942", "cpu"])
def test_every_row_and_every_rejection(capsys: pytest.CaptureFixture[str], target: str) -> None:
    rows = printed(capsys, "--target", target, "--rows", "8", "--rows", "512")
    kind, count, seen = "", "", []
    for first, second, algorithm, told in rows:
        kind, count = first or kind, second or count
        seen.append((kind, count, algorithm))
        request = Request(kind, int(count), 4096, 4096)
        if algorithm == choose(Arch(target), request).algorithm:
            assert told == "chosen"
        else:
            assert told == (why_not(Arch(target), request, algorithm) or "could, but others come first")
    assert seen == [(kind, rows, name) for kind, table in KINDS.items() for rows in ("8", "512") for name in table]


def test_one_kind_and_size(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--target", "sm_90", "--kind", "fp8_row", "--rows", "1", "--columns", "96", "--k", "40")
    rows = printed(capsys, *options)
    assert rows[0] == ["fp8_row", "1", "triton", "K is 40, not a multiple of 16"]
    assert [row[2] for row in rows] == list(KINDS["fp8_row"])


def test_a_weight_that_lies_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(capsys, "--target", "sm_100", "--kind", "nvfp4", "--rows", "64", "--layout", "swizzled")
    told = {row[2]: row[3] for row in rows}
    assert told["flashinfer_trtllm"] == "w lies swizzled, not trtllm: repack_linears_ changes that"
    assert told["cublas"] == "chosen"
    assert told["triton"] == "could, but others come first"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gemm", "--kind", "mxfp"], "there is no kind of product 'mxfp'. Did you mean 'mxfp8'?"),
        (["--gemm", "--out-dtype", "bf16"], "a result is not 'bf16'. Did you mean 'bfloat16'?"),
        (["--gemm", "--layout", "swizzle"], "a weight does not lie 'swizzle'. Did you mean 'swizzled'?"),
        ([], "there is no model. Name one, or ask for the products with --gemm"),
    ],
)
def test_mistakes_are_named(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert cli.main(["explain", *options]) != 0
    captured = capsys.readouterr()
    assert message in captured.out + captured.err
