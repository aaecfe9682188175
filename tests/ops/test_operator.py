"""The ops as operators of torch.library: schemas, fakes, gradients, empty tensors."""

import pytest
import torch

from fusionpass.ops import add_rms_norm, add_rms_norm_quantize, quantize, rms_norm, rms_norm_quantize

OPS = (rms_norm, add_rms_norm, quantize, rms_norm_quantize, add_rms_norm_quantize)
SCALE = torch.tensor(0.02)


def _sample(op, tokens, width, dtype, **options):
    return op.bind((), {**op.sample(tokens, width, dtype, "cpu", torch.Generator().manual_seed(0)), **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS, ids=str)
def test_opcheck(op, dtype):
    arguments = _sample(op, 4, 24, dtype, **dict.fromkeys(op.options.values(), True))
    torch.library.opcheck(op.overload, tuple(arguments.values()))
    for value in arguments.values():
        if isinstance(value, torch.Tensor):
            value.requires_grad_()
    # The fourth check sums the outputs, which no PyTorch does for codes; its place is in test_gradients below.
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op.overload, tuple(arguments.values()), test_utils=checks)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0), (0, 0)])
@pytest.mark.parametrize("op", OPS, ids=str)
def test_empty(op, shape):
    arguments = _sample(op, 4, shape[-1], torch.bfloat16, **dict.fromkeys(op.options.values(), True))
    for name in arguments.keys() & {"x", "residual"}:
        arguments[name] = torch.empty(shape, dtype=torch.bfloat16)
    results = op(**arguments)
    for result in results if isinstance(results, list) else [results]:
        assert result.shape == shape


def test_a_call_takes_names_and_defaults():
    x, weight = torch.randn(4, 8), torch.rand(8)
    assert torch.equal(rms_norm(weight=weight, x=x), rms_norm(x, weight, 1e-6))
    # A list of one is that one, as callers expect of quantize; the operator itself keeps its schema.
    assert isinstance(quantize(x, SCALE), torch.Tensor)
    assert isinstance(torch.ops.fusionpass.quantize(x, SCALE), list)


def _norm(x, weight, eps):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def _codes(x, scale):
    return (x * scale.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn)


def _plain(x, residual, weight, scale):
    """Every op written out without one."""
    total = x + residual
    norm, single = _norm(total, weight, 1e-6), _norm(x, weight, 1e-6)
    return {
        rms_norm: [single],
        add_rms_norm: [norm, total],
        quantize: [_codes(x, scale)],
        rms_norm_quantize: [_codes(single, scale), single],
        add_rms_norm_quantize: [_codes(norm, scale), norm, total],
    }


def _gradients(results, cotangents, inputs):
    loss = sum((r.float() * c).sum() for r, c in zip(results, cotangents, strict=True))
    return torch.autograd.grad(loss, inputs, allow_unused=True)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_gradients_are_those_of_the_parts(op):
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "x": torch.randn(5, 16, generator=generator),
        "residual": torch.randn(5, 16, generator=generator),
        "weight": torch.rand(16, generator=generator) + 0.5,
        "scale": torch.tensor(0.02),
    }
    inputs = {name: t.requires_grad_() for name, t in tensors.items()}
    taken = {name: t for name, t in inputs.items() if name in op.signature.parameters}
    results = op(**taken, **dict.fromkeys(op.options.values(), True))
    results = results if isinstance(results, list) else [results]
    expected = _plain(**inputs)[op]
    cotangents = [torch.randn(5, 16, generator=generator) for _ in results]
    found = _gradients(results, cotangents, list(taken.values()))
    wanted = _gradients(expected, cotangents, list(taken.values()))
    for name, gradient, other in zip(taken, found, wanted, strict=True):
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, other, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_of_one_output_and_of_some_inputs():
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.rand(8, requires_grad=True)
    _, norm, _ = add_rms_norm_quantize(x, residual, weight, scale=SCALE, norm_out=True)
    assert not x.requires_grad
    (found,) = torch.autograd.grad(norm.sum(), weight)
    (wanted,) = torch.autograd.grad(_norm(x + residual, weight, 1e-6).sum(), weight)
    torch.testing.assert_close(found, wanted)


def test_an_input_written_before_the_backward_is_noticed():
    x, weight = torch.randn(3, 8), torch.rand(8, requires_grad=True)
    norm = rms_norm(x, weight)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        norm.sum().backward()


def test_nothing_is_recorded_without_gradients():
    x = torch.randn(3, 8, requires_grad=True)
    with torch.no_grad():
        assert not rms_norm(x, torch.rand(8)).requires_grad
