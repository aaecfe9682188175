"""The pieces of bench/perplexity.py."""

import math
import statistics

import torch
from torch import nn

from bench.perplexity import Padded, pad_linears, table
from fusionpass.quantize import QuantizedLinear, quantize_


def test_a_padded_linear_is_the_linear_and_can_be_quantised() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(192, 32), "b": nn.Linear(256, 32, bias=False), "head": nn.Linear(192, 16)})
    linear, x = model["a"], torch.randn(3, 192)
    expected = linear(x)
    assert pad_linears(model, 128, "head") == 1
    assert isinstance(model["a"], Padded)
    torch.testing.assert_close(model["a"](x), expected)
    quantize_(model, "fp8_group128", skip="head")
    assert isinstance(model["a"].linear, QuantizedLinear)
    assert model["a"].linear.in_features == 256
    assert (model["a"](x) - expected).norm() < 0.05 * expected.norm()


def test_the_table() -> None:
    base = {"scheme": "bf16", "quantized": 0, "padded": 0, "losses": (1.0, 2.0, 3.0)}
    other = {"scheme": "mxfp8", "quantized": 7, "padded": 2, "losses": (1.1, 2.2, 3.3)}
    lines = table([base, other]).splitlines()
    assert lines[2] == f"| bf16 | – | {math.exp(2):.3f} | – | – |"
    error = statistics.stdev([0.1, 0.2, 0.3]) / math.sqrt(3)
    assert lines[3] == f"| mxfp8 | 7, 2 of them padded | {math.exp(2.2):.3f} | {math.expm1(0.2):+.2%} | {error:.2%} |"
