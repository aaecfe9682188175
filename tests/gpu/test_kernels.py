"""Every op's kernel on the device: against its reference, against float64, and under programmatic dependent launch."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusionpass.arch import Arch
from fusionpass.ops import add_rms_norm, add_rms_norm_quantize, quantize, rms_norm
from tests.kernels import DTYPES, KERNEL_OPS, arguments_for, check, shapes

DEVICE = torch.device("cuda")
SCHEMES = ("fp8_static", "fp8_static,rounding=divide")
NARROW = st.one_of(st.integers(1, 300), st.sampled_from([576, 1024, 2048, 2880]))
many = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
each_op = pytest.mark.parametrize("op", KERNEL_OPS, ids=lambda op: op.name)


@pytest.fixture(scope="module")
def arch():
    return Arch.of(DEVICE)


def sample(op, tokens, width, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return op.bind((), op.sample(tokens, width, dtype, "cuda", generator))


@each_op
@many
@given(data=st.data())
def test_drawn_arguments(op, data):
    shape = data.draw(shapes(70, NARROW))
    check(op, Arch.of(DEVICE), data.draw(arguments_for(op, shape, "cuda", SCHEMES)), early=data.draw(st.booleans()))


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "width"), [(1, 576), (64, 2048), (257, 4096), (33, 5120), (1024, 8192), (7, 16384), (3000, 128)]
)
def test_sizes_of_models(op, dtype, tokens, width, arch):
    check(op, arch, sample(op, tokens, width, dtype))


@each_op
def test_past_32_bit_offsets(op, arch):
    width = 4096
    whole = sample(op, 1, width)
    large = torch.randn(2**31 // width + 3, width, device=DEVICE, dtype=torch.bfloat16)
    activations = [name for name in ("x", "residual", "gate", "up") if name in whole]
    whole |= dict.fromkeys(activations, large)
    outputs = op.plan(arch, whole)[0].run()
    last = whole | dict.fromkeys(activations, large[-2:])
    for output, expected in zip(outputs, check(op, arch, last), strict=True):
        assert torch.equal(output[-2:].float(), expected.float())


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(1, 576), (5, 4096), (64, 2048), (1024, 4096), (4096, 576)])
def test_chain_under_dependent_launch(tokens, width, early, arch):
    """Each kernel reads what the one before it wrote: launching early must not let it read too early."""
    first = sample(add_rms_norm, tokens, width)

    def chain(dependent):
        x, residual = first["x"], first["residual"]
        for _ in range(40):
            launch = add_rms_norm.plan(arch, {**first, "x": x, "residual": residual})[0]
            launch = launch.reading_early() if early else launch
            if not dependent:
                launch = dataclasses.replace(launch, pdl=False, args={**launch.args, "PDL": False})
            x, residual = launch.run()
        return x, residual

    expected = chain(False)
    torch.cuda.synchronize()
    chain(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(True)
    for _ in range(5):
        for tensor in captured:
            tensor.fill_(float("nan"))
        graph.replay()
        for ours, theirs in zip(captured, expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("tokens", [1, 64, 1024])
def test_weight_and_scale_just_computed(tokens, arch):
    """Without `reading_early`, weight and scale may come from the kernel just before, itself launched early."""
    arguments = sample(add_rms_norm_quantize, tokens, 2048)
    ones = torch.ones(2048, device=DEVICE, dtype=torch.bfloat16)
    results, expected = [], []
    for i in range(20):
        row = torch.randn(1, 2048, device=DEVICE, dtype=torch.bfloat16) + i
        weight = rms_norm.plan(arch, {"x": row, "weight": ones, "eps": 1e-6})[0].run()[0]
        results.append(add_rms_norm_quantize.plan(arch, {**arguments, "weight": weight[0]})[0].run())
        scale = rms_norm.plan(arch, {"x": row[:, :1].float().abs() + 1, "weight": ones[:1].float(), "eps": 1e-6})[
            0
        ].run()[0]
        results.append(quantize.plan(arch, {"x": arguments["x"], "scale": scale, "scheme": "fp8_static"})[0].run())
        torch.cuda.synchronize()
        expected.append(add_rms_norm_quantize.plan(arch, {**arguments, "weight": weight[0]})[0].run())
        expected.append(quantize.plan(arch, {"x": arguments["x"], "scale": scale, "scheme": "fp8_static"})[0].run())
    for ours, theirs in zip(results, expected, strict=True):
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True))


@each_op
def test_called_as_an_op_it_runs_the_kernel(op, arch):
    arguments = sample(op, 9, 640)
    called = op(**arguments)
    launched = op.plan(arch, arguments)[0].run()
    for ours, theirs in zip(called if isinstance(called, list) else [called], launched, strict=True):
        assert torch.equal(ours.float(), theirs.float())


def test_a_scale_on_the_cpu_is_refused_and_the_reference_runs(arch):
    arguments = {**sample(quantize, 4, 64), "scale": torch.tensor(0.01)}
    launch, reason = quantize.plan(arch, arguments)
    assert launch is None
    assert "on cpu" in reason
    assert torch.equal(quantize(**arguments).float(), quantize.reference(**arguments)[0].float())
