"""Linears quantised by the real libraries, and what their graphs compute, on a machine without their hardware."""

import contextlib
import copy
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves, tree_map

import fusionpass
from fusionpass import Arch, Config, Report, pipeline
from fusionpass.ops import scaled_mms
from tests.gemm import each_of

WIDTH, OUT = 256, 128
RCEIL, LOG2 = "mxfp8,layout=swizzled", "mxfp8,layout=swizzled,scale_rounding=log2_ceil"


@dataclass(frozen=True)
class Variant:
    """A library's quantised linear.

    Attributes:
        library: what has to be importable.
        make: `make(width)`, the linear, `OUT` wide.
        scheme: what its activations are recognised as; empty where they are not.
        arch: the GPU that it is traced for.
        folds: whether a norm or an activation in front of it takes the quantisation; not where a maximum over the
            whole tensor stands in between.
    """

    library: str
    make: Callable[[int], nn.Module]
    scheme: str
    arch: str = "sm_90"
    folds: bool = True

    def linear(self, width: int = WIDTH) -> nn.Module:
        """The linear; the test is skipped where the library is not installed, or torch cannot trace for a GPU."""
        if not torch.backends.cuda.is_built():
            pytest.skip("this build of torch has no CUDA")
        pytest.importorskip(self.library, reason=f"{self.library} is not installed")
        if self.library == "torchao":
            importlib.import_module("torchao.prototype.mx_formats")
        with hardware((10, 0)):
            return self.make(width)


def _torchao(*steps: Callable[[Any], Any]) -> Callable[[int], nn.Module]:
    """A linear that `quantize_` was called on with each configuration in turn."""

    def make(width: int) -> nn.Module:
        ao = importlib.import_module("torchao.quantization")
        model = nn.Sequential(nn.Linear(width, OUT, bias=False, dtype=torch.bfloat16))
        for config in steps:
            ao.quantize_(model, config(ao))
            model(torch.randn(4, width, dtype=torch.bfloat16)) if config is not steps[-1] else None
        return model[0]

    return make


def _fp8(*granularity: tuple[Any, ...]) -> Callable[[int], nn.Module]:
    def config(ao: Any) -> Any:
        parts = [getattr(ao, name)(*args) for name, *args in granularity]
        return ao.Float8DynamicActivationFloat8WeightConfig(granularity=parts[0] if len(parts) == 1 else parts)

    return _torchao(config)


def _fp8_static(ao: Any) -> Any:
    scale = torch.tensor([[0.01]])
    return ao.Float8StaticActivationFloat8WeightConfig(act_quant_scale=scale, granularity=ao.PerTensor())


def _mxfp8(mode: str) -> Callable[[int], nn.Module]:
    def config(ao: Any) -> Any:
        mx = importlib.import_module("torchao.prototype.mx_formats")
        preference = importlib.import_module("torchao.quantization.quantize_.common").KernelPreference.AUTO
        return mx.MXDynamicActivationMXWeightConfig(
            kernel_preference=preference, scaling_mode=mx.ScaleCalculationMode[mode]
        )

    return _torchao(config)


def _nvfp4(step: str | None = None) -> Callable[[Any], Any]:
    def config(ao: Any) -> Any:
        mx = importlib.import_module("torchao.prototype.mx_formats")
        return mx.NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False, step=step)

    return config


def _compressed_tensors(width: int) -> nn.Module:
    if torch.__version__ < "2.12":
        pytest.skip("Dynamo of torch 2.11 breaks the graph at the scaled_mm that transformers calls")
    from transformers.integrations.compressed_tensors import CompressedTensorsFP8Linear

    return CompressedTensorsFP8Linear(width, OUT)


def _diffusers(width: int) -> nn.Module:
    from diffusers.quantizers.bfl.utils import BFLFP8RLinear

    return BFLFP8RLinear(width, OUT, bias=False, compute_dtype=torch.bfloat16)


VARIANTS = {
    "torchao_row": Variant("torchao", _fp8(("PerRow",)), "fp8_token,amax_dtype=input,eps=0.0,rounding=divide"),
    "torchao_tensor": Variant("torchao", _fp8(("PerTensor",)), "fp8_static,rounding=divide", folds=False),
    "torchao_1x128": Variant(
        "torchao",
        _fp8(("PerBlock", [1, 128]), ("PerBlock", [128, 128])),
        "fp8_group128,amax_dtype=input,eps=0.0,rounding=divide",
    ),
    "torchao_static": Variant("torchao", _torchao(_fp8_static), "fp8_static,rounding=divide"),
    "torchao_int8": Variant(
        "torchao",
        _torchao(lambda ao: ao.Int8DynamicActivationInt8WeightConfig()),
        "int8_token,amax_dtype=input,eps=1.1920928955078125e-07,divisor=127.5",
    ),
    # Up to torch 2.11 torchao has no instruction for it.
    "torchao_mxfp8": Variant("torchao", _mxfp8("RCEIL"), RCEIL if torch.__version__ >= "2.12" else LOG2, "sm_100"),
    "torchao_mxfp8_log2": Variant("torchao", _mxfp8("RCEIL"), LOG2),
    "torchao_mxfp8_floor": Variant("torchao", _mxfp8("FLOOR"), "", "sm_100"),
    "torchao_nvfp4": Variant("torchao", _torchao(_nvfp4()), "nvfp4,layout=swizzled", "sm_100", folds=False),
    "torchao_nvfp4_static": Variant(
        "torchao", _torchao(_nvfp4("prepare"), _nvfp4("convert")), "nvfp4,layout=swizzled", "sm_100"
    ),
    "compressed_tensors": Variant(
        "compressed_tensors", _compressed_tensors, "fp8_token,eps=0.0,rounding=divide,zero=one"
    ),
    "diffusers": Variant("diffusers", _diffusers, "fp8_token,rounding=divide"),
}
RECOGNISED = {name: variant for name, variant in VARIANTS.items() if variant.scheme}


class Normed(nn.Module):
    """A norm in front of linears."""

    def __init__(self, *linears: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6, dtype=torch.bfloat16)
        self.linears = nn.ModuleList(linears)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.norm(x)
        return [linear(x) for linear in self.linears]


class Gated(nn.Module):
    """SiLU of a gate times a value in front of a linear."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> Any:
        return self.linear(F.silu(gate) * up)


@contextlib.contextmanager
def hardware(capability: tuple[int, int]) -> Iterator[None]:
    """The libraries' checks of the GPU answer as on one of this compute capability."""

    def is_at_least(*wanted: int) -> Callable[[], bool]:
        return lambda: capability >= wanted

    def always(*args: Any, **kwargs: Any) -> bool:
        return True

    def of_device(device: Any = None) -> tuple[int, int]:
        return capability

    answers = {
        "is_sm_at_least_89": is_at_least(8, 9),
        "is_sm_at_least_90": is_at_least(9, 0),
        "is_sm_at_least_100": is_at_least(10, 0),
        "_check_hardware_support": always,
    }
    with contextlib.ExitStack() as patched:
        for module in [m for name, m in sys.modules.items() if name.startswith("torchao")]:
            for name in answers.keys() & vars(module).keys():
                patched.enter_context(mock.patch.object(module, name, answers[name]))
        patched.enter_context(mock.patch("torch.utils._triton.has_triton", always))
        patched.enter_context(mock.patch("torch.cuda.get_device_capability", of_device))
        yield


@dataclass(frozen=True)
class Trace:
    """A model's graph before and after the passes, with what the report says."""

    before: GraphModule
    after: GraphModule
    report: Report


def trace(variant: Variant, model: nn.Module, *args: torch.Tensor) -> Trace:
    """The one graph of a model, traced for the variant's GPU; neither the model nor the arguments move there."""
    graphs: list[GraphModule] = []
    run = pipeline.run

    def between(passes: Any, graph: Graph, *rest: Any, **options: Any) -> None:
        for step in (lambda: None, lambda: run(passes, graph, *rest, **options)):
            step()
            graphs.append(GraphModule(graph.owning_module, copy.deepcopy(graph)))

    capability = (10, 0) if variant.arch == "sm_100" else (9, 0)
    with hardware(capability), mock.patch.object(pipeline, "run", between):
        report = fusionpass.explain(model, *args, config=Config(target=Arch(variant.arch)))
    before, after = graphs
    return Trace(before, after, report)


OPERANDS = ("a", "b", "a_scale", "b_scale")
"""Of a product, in the order of `torch._scaled_mm`."""


class Operands(Interpreter):
    """Runs a graph that was traced for a GPU on the CPU, and keeps what its matrix products are given."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.found: list[torch.Tensor] = []

    def run_node(self, n: Node) -> Any:
        if n.op == "call_function" and re.search(r"_mm|gemm", str(n.target)):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if n.target is scaled_mms.overload:
                args = [[one[name] for name in OPERANDS] for one in each_of(scaled_mms.bind(args, kwargs))]
            self.found += [a for a in tree_leaves(args) if isinstance(a, torch.Tensor)]
            # What is done to a product of ones shows the scales that come later.
            return tree_map(lambda val: torch.ones(val.shape, dtype=val.dtype), n.meta["val"])
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if "inline_asm" in str(target):
            return _next_power_of_two(args[0])
        return super().call_function(target, args, {k: CPU if k == "device" else v for k, v in kwargs.items()})


CPU = torch.device("cpu")


def operands(graph: GraphModule, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """What the matrix products of a graph are given, and its results."""
    run = Operands(graph)
    results = run.run(*(tensor.clone() for tensor in inputs))
    return [*run.found, *tree_leaves(results)]


def random_inputs(graph: GraphModule, seed: int, special: float | None = None) -> list[torch.Tensor]:
    """A real tensor for each placeholder: activations of all sizes with a row and a group of zeros; positive scales.

    With `special`, one element of each activation's first row is that number.
    """
    generator = torch.Generator().manual_seed(seed)
    made = []
    for node in graph.graph.find_nodes(op="placeholder"):
        val = node.meta["val"]
        shape, floating = list(val.shape), val.dtype.is_floating_point
        if val.dtype == torch.bfloat16 and val.dim() > 1:
            size = torch.empty(*shape[:-1], 1).uniform_(-3, 3, generator=generator)
            tensor = torch.randn(shape, generator=generator) * 10**size
            rows = tensor.view(-1, shape[-1])
            rows[1:2] = 0
            rows[2:3, :128] = 0
            rows[:1, 5] = rows[0, 5] if special is None else special
            made.append(tensor.to(val.dtype))
        elif floating and val.dtype.itemsize > 1:
            made.append((torch.rand(shape, generator=generator) * 0.1 + 0.01).to(val.dtype))
        else:
            byte = torch.randint(30, 100, shape, generator=generator).to(torch.uint8)
            made.append(byte.view(val.dtype) if floating else byte.to(val.dtype))
    return made


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal in every bit; one NaN is like another."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.itemsize > 1:
        return torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))
    if a.dtype == torch.float8_e4m3fn:
        a, b = (x.view(torch.uint8).where(~x.float().isnan(), 127) for x in (a, b))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _next_power_of_two(value: torch.Tensor) -> torch.Tensor:
    """`cvt.rp.satfinite.ue8m0x2.f32` by its definition: the smallest of 2**-127 … 2**127 that is not below `value`."""
    powers = torch.exp2(torch.arange(-127, 128, dtype=torch.float64))
    byte = torch.searchsorted(powers, value.double().contiguous()).clamp(max=254)
    return torch.where(value.isnan(), 255, byte).to(torch.uint16)
