"""lower: an op runs as a kernel where one is planned, gives what eager mode does, and pays; else as plain aten."""

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fusionpass.arch import Arch
from fusionpass.launch import Empty, Late, Launch
from fusionpass.op import Backend
from fusionpass.ops import attention, rms_norm
from fusionpass.passes.lower import lower
from fusionpass.report.trace import GraphTrace, Record

pytest.importorskip("triton")

X = torch.zeros(4, 64, dtype=torch.bfloat16)
W = torch.ones(64, dtype=torch.bfloat16)


def lowered(model: Callable[..., Any], *args: torch.Tensor, arch: str = "sm_90") -> Record:
    """The record of the one op in a model, which is aten's again unless a kernel runs it."""
    graph = make_fx(model, tracing_mode="fake")(*args).graph
    trace = GraphTrace(0)
    lower(graph, trace, Arch(arch))
    graph.lint()
    (record,) = trace.fused
    assert ("fusionpass" in str(graph)) == (record.backend in ("triton", "late"))
    return record


def test_a_kernel_where_one_is_planned() -> None:
    assert lowered(lambda x, w: rms_norm(x, w), X, W).backend == "triton"
    assert lowered(lambda x, w: rms_norm(x, w), X, W, arch="cpu").reason == "a CPU target: Inductor writes C++"
    record = lowered(lambda x, w: rms_norm(x, w), X.t().contiguous().t(), W)
    assert record.reason == "triton: x has stride 4 in its last dimension, not 1"


def test_a_cast_that_only_the_kernel_reads_is_not_written_out() -> None:
    def model(x: torch.Tensor, weight: torch.Tensor, twice: bool) -> Any:
        wide = torch.ops.prims.convert_element_type.default(x, torch.float32)
        return (rms_norm(wide, weight), *([wide + 1] if twice else []))

    record = lowered(lambda x, w: model(x, w, False), X, W)
    assert record.backend == "inductor"
    assert record.reason.endswith("torch.bfloat16 made float32 just before: Inductor need not write that out")
    assert lowered(lambda x, w: model(x, w, True), X, W).backend == "triton"
    assert lowered(lambda x, w: model(x, w, False), X.double(), W).backend == "triton"


def test_a_choice_that_waits_for_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rms_norm, "backends", [Backend("other", lambda arch, **arguments: Late("too early"))])
    record = lowered(lambda x, w: rms_norm(x, w), X, W)
    assert (record.backend, record.reason) == ("late", "too early")


@pytest.fixture
def making(monkeypatch: pytest.MonkeyPatch) -> Callable[[Empty], None]:
    """Lets the kernel of the norm allocate another output."""
    (backend,) = rms_norm.backends

    def use(made: Empty) -> None:
        def plan(arch: Arch, **arguments: Any) -> Launch | str:
            launch = backend.plan(arch, **arguments)
            return launch if isinstance(launch, str) else dataclasses.replace(launch, args=launch.args | {"norm": made})

        monkeypatch.setattr(rms_norm, "backends", [Backend("other", plan)])

    return use


@pytest.mark.parametrize(
    "made",
    [
        Empty((4, 64), torch.float32),
        Empty((64, 4), torch.bfloat16),
        Empty((4, 64), torch.bfloat16, (1, 4)),
    ],
    ids=["dtype", "shape", "strides"],
)
def test_a_kernel_that_lays_its_output_out_otherwise(making: Callable[[Empty], None], made: Empty) -> None:
    making(made)
    record = lowered(lambda x, w: rms_norm(x, w), X, W)
    assert record.backend == "inductor"
    assert record.reason == "other would lay out norm unlike eager mode, with strides (64, 1)"


def test_strides_that_no_address_depends_on(making: Callable[[Empty], None]) -> None:
    making(Empty((1, 64), torch.bfloat16, (7, 1)))
    assert lowered(lambda x, w: rms_norm(x, w), X[:1], W).backend == "triton"
    making(Empty((0, 64), torch.bfloat16, (1, 7)))
    assert lowered(lambda x, w: rms_norm(x, w), X[:0], W).backend == "triton"


def test_many_tokens_are_attended_by_the_kernel_that_pytorch_chose() -> None:
    """Some of its results are numbers or nothing, and nobody reads them."""

    def flash(q: Any, k: Any, v: Any, **_: Any) -> Any:
        return (
            torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0].transpose(1, 2).contiguous().transpose(1, 2)
        )

    with FakeTensorMode(), mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", flash):
        q = torch.empty(1, 8, 300, 64, device="cuda", dtype=torch.bfloat16)
        graph = make_fx(lambda q: attention(q, q, q))(q).graph
        lower(graph, GraphTrace(0), Arch("sm_90"))
    graph.lint()
    assert "_scaled_dot_product_flash_attention" in str(graph)
    assert all("val" in node.meta for node in graph.nodes if node.op == "call_function")
