"""Linears quantised by the real libraries, and what their traced graphs compute, on a machine without their hardware."""

import contextlib
import copy
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

import fusionpass
from fusionpass import Arch, Config, Report, pipeline

WIDTH, OUT = 256, 128


@dataclass(frozen=True)
class Variant:
    """A library's quantised linear.

    Attributes:
        library: what has to be importable.
        make: the linear, `WIDTH` in and `OUT` out.
        scheme: what its activations should be recognised as.
        arch: the GPU that it is traced for.
    """

    library: str
    make: Callable[[], nn.Module]
    scheme: str
    arch: str = "sm_90"


def _torchao(config: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchao.quantization as ao

        model = nn.Sequential(nn.Linear(WIDTH, OUT, bias=False, dtype=torch.bfloat16))
        ao.quantize_(model, config(ao))
        return model[0]

    return make


def _fp8(*granularity: Any) -> Callable[[], nn.Module]:
    def config(ao: Any) -> Any:
        parts = [getattr(ao, name)(*args) for name, *args in granularity]
        return ao.Float8DynamicActivationFloat8WeightConfig(granularity=parts[0] if len(parts) == 1 else parts)

    return _torchao(config)


def _fp8_static(ao: Any) -> Any:
    scale = torch.tensor([[0.01]])
    return ao.Float8StaticActivationFloat8WeightConfig(act_quant_scale=scale, granularity=ao.PerTensor())


def _mxfp8(mode: str) -> Callable[[], nn.Module]:
    def config(ao: Any) -> Any:
        mx = importlib.import_module("torchao.prototype.mx_formats")
        return mx.MXDynamicActivationMXWeightConfig(
            kernel_preference=importlib.import_module("torchao.quantization.quantize_.common").KernelPreference.AUTO, scaling_mode=mx.ScaleCalculationMode[mode]
        )

    return _torchao(config)


def _nvfp4(ao: Any) -> Any:
    mx = importlib.import_module("torchao.prototype.mx_formats")
    return mx.NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False)


def _compressed_tensors() -> nn.Module:
    from transformers.integrations.compressed_tensors import CompressedTensorsFP8Linear

    return CompressedTensorsFP8Linear(WIDTH, OUT)


def _diffusers() -> nn.Module:
    from diffusers.quantizers.bfl.utils import BFLFP8RLinear

    return BFLFP8RLinear(WIDTH, OUT, bias=False, compute_dtype=torch.bfloat16)


VARIANTS = {
    "torchao_row": Variant("torchao", _fp8(("PerRow",)), "fp8_token,amax_dtype=input,eps=0.0,rounding=divide"),
    "torchao_tensor": Variant("torchao", _fp8(("PerTensor",)), ""),
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
    "torchao_mxfp8": Variant("torchao", _mxfp8("RCEIL"), "mxfp8,layout=swizzled", "sm_100"),
    "torchao_mxfp8_log2": Variant("torchao", _mxfp8("RCEIL"), "mxfp8,layout=swizzled,scale_rounding=log2_ceil"),
    "torchao_mxfp8_floor": Variant("torchao", _mxfp8("FLOOR"), "mxfp8,layout=swizzled,scale_rounding=floor", "sm_100"),
    "torchao_nvfp4": Variant("torchao", _torchao(_nvfp4), "nvfp4,layout=swizzled", "sm_100"),
    "compressed_tensors": Variant(
        "compressed_tensors", _compressed_tensors, "fp8_token,eps=0.0,rounding=divide,zero=one"
    ),
    "diffusers": Variant("diffusers", _diffusers, "fp8_token,rounding=divide"),
}


@contextlib.contextmanager
def hardware(capability: tuple[int, int]) -> Iterator[None]:
    """The libraries' checks of the GPU answer as on one of this compute capability."""
    with contextlib.ExitStack() as patched:
        for module in [m for name, m in list(sys.modules.items()) if name.startswith("torchao")]:
            for at_least in ((8, 9), (9, 0), (10, 0)):
                name = f"is_sm_at_least_{at_least[0]}{at_least[1]}"
                if name in vars(module):
                    patched.enter_context(mock.patch.object(module, name, lambda least=at_least: capability >= least))
            if "_check_hardware_support" in vars(module):
                patched.enter_context(mock.patch.object(module, "_check_hardware_support", lambda *a, **k: None))
        patched.enter_context(mock.patch("torch.utils._triton.has_triton", lambda: True))
        patched.enter_context(mock.patch("torch.cuda.get_device_capability", lambda device=None: capability))
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


class Operands(Interpreter):
    """Runs a graph that was traced for a GPU on the CPU up to its matrix products, and keeps what they are given."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.found: list[torch.Tensor] = []

    def run_node(self, n: Node) -> Any:
        if n.op == "call_function" and re.search(r"_mm|gemm", str(n.target)):
            args, _ = self.fetch_args_kwargs_from_env(n)
            self.found += [a for a in tree_leaves(args) if isinstance(a, torch.Tensor)]
            return torch.zeros(n.meta["val"].shape, dtype=n.meta["val"].dtype)
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if "inline_asm" in str(target):
            return _next_power_of_two(args[0])
        return super().call_function(target, args, {**kwargs, "device": torch.device("cpu")} if "device" in kwargs else kwargs)


def _next_power_of_two(value: torch.Tensor) -> torch.Tensor:
    """`cvt.rp.satfinite.ue8m0x2.f32` by its definition: the smallest of 2**-127 … 2**127 that is not below `value`."""
    powers = torch.exp2(torch.arange(-127, 128, dtype=torch.float64))
    byte = torch.searchsorted(powers, value.double().contiguous()).clamp(max=254)
    return torch.where(value.isnan(), 255, byte).to(torch.uint16)
