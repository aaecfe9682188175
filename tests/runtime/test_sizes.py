"""What is assumed of sizes, as it is kept beside a compiled piece; and outputs that keep their strides."""

import pytest
import torch
from torch._dynamo.source import LocalSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.testing._internal.two_tensor import TwoTensor

import fusionpass
from fusionpass.inductor import holds, size_check
from fusionpass.inductor.sizes import guards


@pytest.fixture
def pair() -> list[torch.Tensor]:
    """Fake tensors of [a, 8] and [b, 8] and both below each other, in a trace that assumes a < 100."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    rows = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])  # type: ignore[var-annotated]
    a, b = (
        mode.from_tensor(torch.zeros(n, 8), source=LocalSource(name), symbolic_context=rows)
        for name, n in (("a", 5), ("b", 7))
    )
    assert a.shape[0] < 100
    with mode:
        return [a, b, torch.cat([a, b])]


def test_what_is_assumed_of_sizes(pair: list[torch.Tensor]) -> None:
    assumed = guards(pair)
    assert holds(assumed, pair)
    check = size_check(guards([tensor.shape[0] for tensor in pair]))
    assert check(5, 7, 12)
    assert not check(5, 7, 13)
    assert not check(100, 7, 107)


def test_a_symbol_that_is_only_in_a_sum(pair: list[torch.Tensor]) -> None:
    """Nothing can be written down of it, so a piece with such an input is compiled again rather than shared."""
    a, _, both = pair
    for inputs in ([both], [a, both]):
        assert not holds(guards(inputs), inputs)


def test_a_tensor_that_becomes_several_in_the_graph() -> None:
    """The graph returns its parts, and their strides are not those of what Dynamo traced."""
    torch._dynamo.reset()
    x = TwoTensor(torch.randn(4, 3), torch.randn(4, 3))
    with torch.no_grad():
        y = fusionpass.compile(lambda x: (x + 1).t(), cache=False)(x)
    assert torch.equal(y.a, x.a.t() + 1)
    assert torch.equal(y.b, x.b.t() + 1)
