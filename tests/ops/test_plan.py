"""What the kernels' plans accept, and the reasons that they give where they do not."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fusionpass.arch import Arch
from fusionpass.op import OPS
from fusionpass.ops import add_rms_norm_quantize, quantize, rms_norm, silu_mul, silu_mul_quantize

pytest.importorskip("triton")

from fusionpass.ops.activation.triton import configure as configure_activation
from fusionpass.ops.norm.triton import configure
from fusionpass.ops.quant.scheme import Scheme
from fusionpass.tuning import store
from fusionpass.tuning.files import Name, merge
from fusionpass.tuning.names import to_file
from fusionpass.tuning.rows import Cut, row_key

H100 = Arch("sm_90")


def sample(op, tokens=4, width=64, dtype=torch.bfloat16, **changes):
    return {**op.bind((), op.sample(tokens, width, dtype, "cpu", torch.Generator())), **changes}


def reason(op, arch=H100, **changes):
    launch, why = op.plan(arch, sample(op, **changes))
    assert launch is None
    return why


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.backends and op.namespace == "fusionpass"], ids=str)
def test_launches_take_the_ops_own_tensors(op):
    """In a graph they are told apart by identity, so that a view of one would be none of them."""
    arguments = sample(op, tokens=1, width=128)
    launch, why = op.plan(H100, arguments)
    assert launch is not None, why
    given = [id(v) for v in arguments.values() if isinstance(v, torch.Tensor)]
    taken = [v for part in launch.all for v in part.args.values() if isinstance(v, torch.Tensor)]
    assert taken
    assert all(id(v) in given for v in taken)


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.backends and op.namespace == "fusionpass"], ids=str)
def test_without_programmatic_dependent_launch(op):
    arguments = sample(op, tokens=1, width=128)
    launch, _ = op.plan(H100, arguments)
    plain, _ = op.plan(H100, arguments, frozenset({"pdl"}))
    assert any(part.pdl for part in launch.all)
    for part, other in zip(launch.all, plain.all, strict=True):
        assert not other.pdl
        assert not other.args.get("PDL")
        assert "launch_pdl" not in other.options()
        assert (other.kernel, other.grid, other.args.keys()) == (part.kernel, part.grid, part.args.keys())


def test_targets():
    assert reason(rms_norm, Arch("cpu")) == "triton: the cpu has no Triton kernels"
    assert reason(rms_norm, Arch("sm_75")) == "triton: Triton's kernels need sm_80 or newer, not sm_75"
    assert rms_norm.plan(Arch("sm_80"), sample(rms_norm))[0] is not None
    assert reason(quantize, Arch("sm_80")) == "triton: Triton cannot convert to float8_e4m3fn on sm_80"
    assert reason(quantize, Arch("gfx942")) == "triton: Triton cannot convert to float8_e4m3fn on gfx942"
    fnuz = "fp8_static,dtype=float8_e4m3fnuz"
    assert reason(quantize, scheme=fnuz) == "triton: sm_90 does not convert to float8_e4m3fnuz"
    assert quantize.plan(Arch("gfx942"), sample(quantize, scheme=fnuz))[0] is not None


def test_tensors():
    assert reason(rms_norm, width=16385) == "triton: rows of 16385 columns do not fit in registers (at most 16384)"
    assert reason(rms_norm, width=0) == "triton: the rows are empty"
    assert reason(rms_norm, dtype=torch.float64) == "triton: x is torch.float64"
    assert "not a dense vector of 64" in reason(rms_norm, weight=torch.ones(128, dtype=torch.bfloat16)[::2])
    columns = torch.ones(64, 4, dtype=torch.bfloat16).t()
    assert reason(quantize, x=columns) == "triton: x has stride 4 in its last dimension, not 1"
    swapped = torch.ones(3, 4, 64, dtype=torch.bfloat16).transpose(0, 1)
    assert reason(rms_norm, x=swapped) == "triton: x has strides (64, 256, 1): its rows are not evenly spaced"
    other = torch.ones(4, 64, dtype=torch.float16)
    assert (
        reason(add_rms_norm_quantize, residual=other) == "triton: x and the residual differ in shape, dtype or device"
    )
    assert reason(quantize, scale=torch.ones(2)) == "triton: the scale is not one element"
    assert reason(quantize, scale=torch.ones((), dtype=torch.int32)).startswith("triton: the scale is torch.int32")


@pytest.mark.parametrize("shape", [(2, 3, 64), (1, 5, 64), (3, 1, 64), (64,), (0, 64), (3, 0, 64)])
def test_leading_dimensions_become_rows(shape):
    x = torch.ones(*shape[:-1], 80, dtype=torch.bfloat16)[..., :64]
    launch, why = rms_norm.plan(H100, sample(rms_norm, x=x))
    assert launch is not None, why
    assert launch.args["x"] is x
    assert launch.args["rows"] == x[..., 0].numel()
    assert launch.args["norm"].shape == shape


def test_a_symbolic_token_count_adds_no_guard():
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    made = sample(add_rms_norm_quantize, tokens=12)

    def fake(value):
        if not isinstance(value, torch.Tensor):
            return value
        dims = ([DimDynamic.DYNAMIC] if value.dim() == 2 else []) + [DimDynamic.STATIC] * min(1, value.dim())
        return mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dims))

    arguments = {name: fake(value) for name, value in made.items()}
    arguments["residual"] = arguments["x"]
    launch, why = add_rms_norm_quantize.plan(H100, arguments)
    assert launch is not None, why
    assert not isinstance(launch.grid[0], int)
    assert not environment.guards


@pytest.mark.parametrize(
    ("rows", "width", "itemsize", "expected"),
    [
        (None, 64, 2, Cut(8, 64, 4)),
        (None, 576, 2, Cut(1, 1024, 4)),
        (64, 576, 2, Cut(1, 1024, 4)),
        (8192, 576, 2, Cut(2, 1024, 4)),
        (8192, 576, 4, Cut(1, 1024, 8)),
        (8192, 2048, 2, Cut(1, 2048, 8)),
        (None, 4096, 2, Cut(1, 4096, 4)),
        (None, 8192, 4, Cut(1, 8192, 4)),
        (None, 16384, 2, Cut(1, 16384, 8)),
    ],
)
def test_how_the_norm_is_cut(rows, width, itemsize, expected):
    assert configure(H100, rows, width, itemsize) == expected
    other = configure(Arch("gfx942"), rows, width, itemsize)
    assert (other.rows, other.warps * 2) == (expected.rows, expected.warps)


def test_measured_cells_overrule_the_rule(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSIONPASS_CONFIG_DIR", str(tmp_path))
    name = Name.of("add_rms_norm_quantize", row_key("fp8_static", 64, 2), store.STAND_IN["sm_90"])
    merge(tmp_path, name, {4: to_file(Cut(2, 64, 1))}, {})

    def cut(op, **changes):
        launch, _ = op.plan(H100, sample(op, **changes))
        return launch.args["ROWS"], launch.args["BLOCK"], launch.num_warps

    assert cut(add_rms_norm_quantize) == (2, 64, 1)
    assert cut(rms_norm) == (8, 64, 4)
    assert cut(add_rms_norm_quantize, dtype=torch.float32) == (4, 64, 4)
    assert cut(add_rms_norm_quantize, scheme="fp8_token", scale=None) == (8, 64, 4)


def test_weight_and_scale_are_read_early_only_where_that_is_said_to_be_safe():
    launch, _ = add_rms_norm_quantize.plan(H100, sample(add_rms_norm_quantize))
    assert launch.early == ("weight", "scale")
    assert launch.args["EARLY"] is False
    assert launch.reading_early().args["EARLY"] is True


@pytest.mark.parametrize(
    ("scheme", "rows", "width", "cut"),
    [
        (None, 1, 1536, Cut(1, 512, 2)),
        ("fp8_static", 1, 64, Cut(8, 64, 2)),
        ("fp8_static", 64, 1536, Cut(1, 512, 2)),
        ("mxfp8", 64, 12288, Cut(1, 1024, 4)),
        ("fp8_group128", 1, 64, Cut(4, 128, 2)),
        (None, 1024, 1536, Cut(4, 512, 8)),
        (None, None, 12288, Cut(2, 1024, 8)),
        ("nvfp4", 1, 2880, Cut(1, 512, 2)),
        ("nvfp4", None, 2880, Cut(2, 1024, 4)),
        ("fp8_token", None, 12288, Cut(1, 16384, 16)),
        ("fp8_token", 64, 2880, Cut(1, 4096, 4)),
        ("int8_token", 1, 28672, Cut(1, 32768, 16)),
    ],
)
def test_how_an_activation_is_cut(scheme, rows, width, cut):
    assert configure_activation(H100, scheme and Scheme.parse(scheme), rows, width) == cut


def test_what_a_gated_activation_refuses():
    up = torch.zeros(4, 64, dtype=torch.float16)
    assert reason(silu_mul, up=up).startswith("triton: gate is torch.bfloat16 (4, 64), up is torch.float16")
    assert reason(silu_mul_quantize, Arch("sm_80")) == "triton: Triton cannot convert to float8_e4m3fn on sm_80"
    assert reason(silu_mul_quantize, scale=None) == "triton: the scale is not one element"
    assert reason(silu_mul, width=0) == "triton: the rows are empty"
    packed = torch.zeros(4, 128, dtype=torch.bfloat16)
    launch, _ = silu_mul.plan(H100, {"gate": packed[:, :64], "up": packed[:, 64:]})
    assert (launch.args["gate_row"], launch.args["up_row"]) == (128, 128)
