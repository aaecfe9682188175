"""scaled_mm: its reference against exact arithmetic, and what its plan takes."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fusionpass.arch import Arch
from fusionpass.errors import ArgumentError
from fusionpass.launch import Late, Launch
from fusionpass.ops import scaled_mm, scaled_mms
from tests.gemm import FP8, INT8, arguments_for_product, each_of, exact, product_of

pytest.importorskip("triton")
from fusionpass.ops.gemm.stream import Cut, configure

H100 = Arch("sm_90")


def arguments(rows: int = 8, k: int = 64, dtype: torch.dtype = FP8, **changes: Any) -> dict[str, Any]:
    return product_of(rows, 48, k, dtype, **changes)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_reference_is_the_product(data: st.DataObject) -> None:
    given = data.draw(arguments_for_product("cpu", 40, 80, 320))
    expected, slack = exact(given)
    got = scaled_mm.reference(**given)
    eps = torch.finfo(got.dtype).eps
    # What PyTorch's CPU product rounds in between is its own: one step of 16 bits more.
    assert (got.double() - expected).abs().le(slack + 1.5 * eps * expected.abs() + 2.0**-24).all()
    assert got.is_contiguous()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": torch.zeros(8, 64)}, "a is torch.float32, b torch.float8_e4m3fn"),
        ({"a": torch.zeros(8, 48, dtype=FP8)}, r"a is \(8, 48\), b \(64, 48\)"),
        ({"a": torch.zeros(2, 4, 64, dtype=FP8)}, r"a is \(2, 4, 64\)"),
        ({"a_scale": torch.ones(8)}, r"a_scale is torch.float32, shape \(8,\)"),
        ({"b_scale": torch.ones(48, 1)}, r"b_scale is torch.float32, shape \(48, 1\)"),
        ({"b_scale": torch.ones((), dtype=torch.float64)}, "b_scale is torch.float64"),
        ({"bias": torch.ones(8)}, r"bias is torch.float32, shape \(8,\)"),
        ({"bias": torch.ones(48, dtype=torch.int32)}, "bias is torch.int32"),
        ({"out_dtype": "float23"}, "out_dtype is 'float23'"),
    ],
)
def test_what_does_not_fit_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        scaled_mm(**arguments(**changes))


def reason(arch: str = "sm_90", **changes: Any) -> str:
    launch, why = scaled_mm.plan(Arch(arch), arguments(**changes))
    assert launch is None
    return why


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rows": 65}, "65 rows are bound by their products (at most 64)"),
        (
            {"rows": 33, "a_scale": torch.ones(()), "b_scale": torch.ones(1, 1)},
            "33 rows are bound by their products (at most 32)",
        ),
        ({"arch": "sm_80"}, "sm_80 has no float8_e4m3fn"),
        ({"arch": "gfx942"}, "gfx942 has no float8_e4m3fn"),
        ({"dtype": torch.float8_e4m3fnuz}, "sm_90 has no float8_e4m3fnuz"),
        ({"k": 24}, "K is 24, not a multiple of 16"),
        ({"k": 0}, "K is 0, not a multiple of 16"),
        ({"a": torch.zeros(8, 72, dtype=FP8)[:, :64]}, "a has strides (72, 1), not rows of 16 bytes each"),
        ({"a": torch.zeros(64, 8, dtype=FP8).t()}, "a has strides (1, 8), not rows of 16 bytes each"),
        ({"a": torch.zeros(8, 128, dtype=FP8)[:, ::2]}, "a has strides (128, 2), not rows of 16 bytes each"),
        ({"b": torch.zeros(48, 128, dtype=FP8)[:, ::2].t()}, "b has strides (2, 128), not columns of 16 bytes each"),
        ({"b": torch.zeros(64, 48, dtype=FP8)}, "b has strides (48, 1), not columns of 16 bytes each"),
        ({"b": torch.zeros(48, 72, dtype=FP8)[:, :64].t()}, "b has strides (1, 72), not columns of 16 bytes each"),
        ({"a_scale": torch.ones(8, 2)[:, :1]}, "a_scale has strides (2, 1)"),
        ({"b_scale": torch.ones(1, 96)[:, ::2]}, "b_scale has strides (96, 2)"),
        ({"bias": torch.ones(96)[::2]}, "bias has stride 2"),
        ({"bias": torch.ones(48, device="meta")}, "bias is on meta, a on cpu"),
    ],
)
def test_what_the_kernel_refuses(changes: dict[str, Any], why: str) -> None:
    assert reason(**changes) == f"triton: {why}"


@pytest.mark.parametrize(
    "changes", [{"dtype": INT8, "arch": "sm_80"}, {"dtype": torch.float8_e4m3fnuz, "arch": "gfx942"}]
)
def test_other_codes(changes: dict[str, Any]) -> None:
    arch = changes.pop("arch")
    assert isinstance(scaled_mm.plan(Arch(arch), arguments(**changes))[0], Launch)


def test_int8_with_single_scales_has_the_kernel_up_to_64_rows() -> None:
    """PyTorch has no fused product of these to lose against."""
    singles = {"a_scale": torch.ones(()), "b_scale": torch.ones(())}
    assert isinstance(scaled_mm.plan(H100, arguments(64, dtype=INT8, **singles))[0], Launch)


def test_symbolic_sizes() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    made = arguments()
    with mode:
        tensors = {name: v for name, v in made.items() if isinstance(v, torch.Tensor)}
        fake = made | {name: mode.from_tensor(v, static_shapes=True) for name, v in tensors.items()}
    several = mode.shape_env.create_unbacked_symint()
    with mode:
        a = torch.empty(several, 64, dtype=FP8)
        planned, late = scaled_mm.plan(H100, {**fake, "a": a, "a_scale": torch.empty(several, 1)})
        wide = torch.empty(several, 64, dtype=FP8).t()
        deep = torch.empty_strided((several, 48), (1, 64), dtype=FP8)
        refused = [
            scaled_mm.plan(H100, {**fake, "b": wide, "b_scale": torch.empty(1, several)}),
            scaled_mm.plan(H100, {**fake, "b": deep}),
        ]
    assert planned == Late("few rows have a kernel, more go to cuBLAS"), late
    assert refused == [(None, "triton: the size of the weight is symbolic")] * 2


def test_a_split_is_two_launches_that_share_their_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusionpass.ops.gemm import stream

    whole, _ = scaled_mm.plan(H100, arguments())
    assert isinstance(whole, Launch)
    assert whole.all == (whole,)
    monkeypatch.setattr(stream, "configure", lambda *_: stream.Cut(16, 32, splits=2))
    launch, _ = scaled_mm.plan(H100, arguments())
    assert isinstance(launch, Launch)
    (product,) = launch.before
    assert product.args["sums"] is launch.args["sums"]
    assert [part.args["PDL"] for part in launch.launching_early().all] == [2, 2]


def several(**changes: Any) -> dict[str, Any]:
    """Arguments of three weights of 48, 32 and 16 columns."""
    made: dict[str, Any] = {name: value for name, value in arguments().items() if name != "algo"}
    for which, columns in (("_2", 32), ("_3", 16)):
        other = product_of(1, columns, 64)
        made |= {f"b{which}": other["b"], f"b_scale{which}": other["b_scale"]}
    return scaled_mms.bind((), {**made, **changes})


def test_several_are_each() -> None:
    given = several()
    results = scaled_mms.reference(**given)
    assert scaled_mms.outputs(given) == ("product", "product_2", "product_3")
    assert len(scaled_mms.outputs(several(b_3=None, b_scale_3=None))) == 2
    for got, one in zip(results, each_of(given), strict=True):
        assert torch.equal(got, scaled_mm.reference(**one))


@pytest.mark.parametrize("changes", [{"b_3": None}, {"b_scale_3": None}])
def test_a_third_weight_has_a_scale(changes: dict[str, None]) -> None:
    with pytest.raises(ArgumentError, match="only one of b_3 and b_scale_3"):
        scaled_mms(**several(**changes))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"b_2": torch.zeros(1, 64, dtype=FP8).t(), "b_scale_2": torch.ones(1, 1)}, "a weight has one column"),
        ({"b_scale_2": torch.ones(())}, "the weights' scales or biases are of different kinds"),
        ({"bias": torch.ones(48)}, "the weights' scales or biases are of different kinds"),
        ({"b_3": torch.zeros(64, 16, dtype=FP8)}, "b has strides (16, 1), not columns of 16 bytes each"),
    ],
)
def test_what_the_kernel_refuses_of_several(changes: dict[str, Any], why: str) -> None:
    assert scaled_mms.plan(H100, several(**changes)) == (None, f"triton: {why}")


@pytest.mark.parametrize(
    ("rows", "columns", "k", "cut"),
    [
        (1, 6144, 4096, Cut(8, 512, stages=1)),
        (1, 4096, 12288, Cut(4, 1024, warps=2, stages=1)),
        (8, 6144, 4096, Cut(32, 128, stages=6, parts=2)),
        (8, 4096, 4096, Cut(32, 128, stages=6, parts=2)),
        (8, 1024, 4096, Cut(64, 256, 8, stages=3)),
        (8, 1024, 512, Cut(64, 256, 2, stages=3)),
        (32, 24576, 4096, Cut(64, 256, stages=3)),
        (32, 1024, 4096, Cut(64, 256, 4, stages=3)),
        (64, 24576, 4096, Cut(64, 128, stages=6)),
        (64, 4096, 12288, Cut(64, 128, 2, stages=6)),
    ],
)
def test_the_cut_is_what_was_measured_best(rows: int, columns: int, k: int, cut: Cut) -> None:
    assert configure(H100, rows, columns, k) == cut


@given(
    name=st.sampled_from(["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"]),
    rows=st.integers(1, 64),
    columns=st.integers(1, 2**18),
    steps=st.integers(1, 2**12),
)
def test_every_cut_fits(name: str, rows: int, columns: int, steps: int) -> None:
    """Tiles of both operands into a multiprocessor's shared memory, and no split is without a step."""
    cut = configure(Arch(name), rows, columns, 16 * steps)
    shared = {"sm_90": 227, "sm_100": 227, "sm_80": 163, "gfx950": 160}.get(name, 64 if "gfx" in name else 99)
    assert rows == 1 or (cut.columns + max(16, rows)) * cut.depth * cut.stages <= shared * 1024
    assert cut.splits == 1 or cut.splits * cut.depth <= 16 * steps
