"""Other libraries' kernels for the ops, as each is called: found when asked for, and named with a reason when not."""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .implementations import Arguments, Call

Make = Callable[[Arguments], Callable[[], list[torch.Tensor]]]
"""From one set of arguments, a call that returns what the op returns, in its order."""
Kernels = Mapping[tuple[str, str | None], Make]
"""By op and scheme."""


@dataclass(frozen=True)
class Peer:
    """A library.

    Args:
        module: what is imported.
        kernels: `kernels(module)`: what it has of our ops.
    """

    module: str
    kernels: Callable[[Any], Kernels]


def _outputs(a: Arguments, dtype: torch.dtype, scale_width: int | None = None) -> list[torch.Tensor]:
    """Codes or values like the input, and where a width is given float32 scales of as many columns."""
    x = a["x"] if "x" in a else a["gate"]
    made = [torch.empty(x.shape, dtype=dtype, device=x.device)]
    if scale_width is not None:
        made.append(torch.empty((x.shape[0], scale_width), dtype=torch.float32, device=x.device))
    return made


def _packed(a: Arguments) -> torch.Tensor:
    """The row that gate and up are halves of."""
    gate = a["gate"]
    return gate.as_strided((gate.shape[0], 2 * gate.shape[1]), (gate.stride(0), 1))


def _writes(run: Callable[..., object], result: list[torch.Tensor], *rest: Any) -> Callable[[], list[torch.Tensor]]:
    """A call of `run(*rest)`, which writes `result`."""

    def call() -> list[torch.Tensor]:
        run(*rest)
        return result

    return call


def _in_place(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and residual to be written to: the other implementations keep theirs."""
    return a["x"].clone(), a["residual"].clone()


def _flashinfer(module: Any) -> Kernels:
    norm, activation = module.norm, module.activation

    def rms(a: Arguments) -> Any:
        (y,) = _outputs(a, a["x"].dtype)
        return _writes(norm.rmsnorm, [y], a["x"], a["weight"], a["eps"], y)

    def rms_static(a: Arguments) -> Any:
        (q,) = _outputs(a, torch.float8_e4m3fn)
        return _writes(norm.rmsnorm_quant, [q], q, a["x"], a["weight"], a["scale"].reshape(1), a["eps"])

    def add_rms(a: Arguments) -> Any:
        x, residual = _in_place(a)
        return _writes(norm.fused_add_rmsnorm, [x, residual], x, residual, a["weight"], a["eps"])

    def add_rms_static(a: Arguments) -> Any:
        (_, residual), (q,), scale = _in_place(a), _outputs(a, torch.float8_e4m3fn), a["scale"].reshape(1)
        run = norm.fused_add_rmsnorm_quant
        return _writes(run, [q, residual], q, a["x"], residual, a["weight"], scale, a["eps"])

    def add_rms_blocks(a: Arguments) -> Any:
        (_, residual), (q,), (y,) = _in_place(a), _outputs(a, torch.float8_e4m3fn), _outputs(a, a["x"].dtype)
        rows, width = q.shape
        scales = torch.empty((width // 128, -(-rows // 4) * 4), dtype=torch.float32, device=q.device)
        result = [q, scales.t()[:rows], y, residual]
        run = norm.fused_add_rmsnorm_fp8_block_quant
        return _writes(run, result, q, scales, y, a["x"], residual, a["weight"], a["eps"])

    def layer(a: Arguments) -> Any:
        weight, bias = a["weight"].float(), a["bias"].float()
        return lambda: [norm.layernorm(a["x"], weight, bias, a["eps"])]

    def layer_static(a: Arguments) -> Any:
        (q,), weight, bias = _outputs(a, torch.float8_e4m3fn), a["weight"].float(), a["bias"].float()
        return _writes(norm.layernorm_quant, [q], q, a["x"], weight, bias, a["scale"].reshape(1), a["eps"])

    def gated(run: Any, a: Arguments) -> Any:
        (y,) = _outputs(a, a["gate"].dtype)
        return _writes(run, [y], _packed(a), y)

    return {
        ("rms_norm", None): rms,
        ("rms_norm_quantize", "fp8_static"): rms_static,
        ("add_rms_norm", None): add_rms,
        ("add_rms_norm_quantize", "fp8_static"): add_rms_static,
        ("add_rms_norm_quantize+norm", "fp8_group128"): add_rms_blocks,
        ("layer_norm", None): layer,
        ("layer_norm_quantize", "fp8_static"): layer_static,
        ("silu_mul", None): functools.partial(gated, activation.silu_and_mul),
        ("gelu_mul", None): functools.partial(gated, activation.gelu_and_mul),
    }


def _liger(module: Any) -> Kernels:
    ops = {name: importlib.import_module(f"{module.__name__}.{name}") for name in ("rms_norm", "layer_norm", "swiglu")}
    adding = importlib.import_module(f"{module.__name__}.fused_add_rms_norm")

    def rms(a: Arguments) -> Any:
        return lambda: [ops["rms_norm"].rms_norm_forward(a["x"], a["weight"], a["eps"], 0.0, "llama", False)[0]]

    def add_rms(a: Arguments) -> Any:
        rest = (a["x"], a["residual"], a["weight"], a["eps"], 0.0, "llama")
        return lambda: list(adding.fused_add_rms_norm_forward(*rest)[:2])

    def layer(a: Arguments) -> Any:
        return lambda: [ops["layer_norm"].layer_norm_forward(a["x"], a["weight"], a["bias"], a["eps"])[0]]

    def gated(a: Arguments) -> Any:
        # It takes the strides of the output for those of the inputs.
        gate, up = a["gate"].contiguous(), a["up"].contiguous()

        def run() -> list[torch.Tensor]:
            found = ops["swiglu"].swiglu_forward(gate, up)
            # Newer versions return what its gradient wants, too: the product is the last.
            return [found[-1] if isinstance(found, tuple) else found]

        return run

    return {
        ("rms_norm", None): rms,
        ("add_rms_norm", None): add_rms,
        ("layer_norm", None): layer,
        ("silu_mul", None): gated,
    }


def _quack(module: Any) -> Kernels:
    def rms(a: Arguments) -> Any:
        return lambda: [module.rmsnorm_fwd(a["x"], a["weight"], eps=a["eps"])[0]]

    def add_rms(a: Arguments) -> Any:
        return lambda: list(module.rmsnorm_fwd(a["x"], a["weight"], residual=a["residual"], eps=a["eps"])[:2])

    def layer(a: Arguments) -> Any:
        weight, bias = a["weight"].float(), a["bias"].float()
        return lambda: [module.layernorm_fwd(a["x"], weight, bias, a["eps"])]

    return {("rms_norm", None): rms, ("add_rms_norm", None): add_rms, ("layer_norm", None): layer}


def _vllm(module: Any) -> Kernels:
    ops, fp8 = torch.ops._C, torch.float8_e4m3fn

    def rms(a: Arguments) -> Any:
        (y,) = _outputs(a, a["x"].dtype)
        return _writes(ops.rms_norm, [y], y, a["x"], a["weight"], a["eps"])

    def add_rms(a: Arguments) -> Any:
        x, residual = _in_place(a)
        return _writes(ops.fused_add_rms_norm, [x, residual], x, residual, a["weight"], a["eps"])

    def rms_static(a: Arguments) -> Any:
        (q,) = _outputs(a, fp8)
        return _writes(ops.rms_norm_static_fp8_quant, [q], q, a["x"], a["weight"], a["scale"].reshape(1), a["eps"])

    def add_rms_static(a: Arguments) -> Any:
        (_, residual), (q,), scale = _in_place(a), _outputs(a, fp8), a["scale"].reshape(1)
        run = ops.fused_add_rms_norm_static_fp8_quant
        return _writes(run, [q, residual], q, a["x"], residual, a["weight"], scale, a["eps"])

    def rms_computed(run: str, dtype: torch.dtype, group: int | None, a: Arguments) -> Any:
        residual = _in_place(a)[1] if "residual" in a else None
        q, scales = _outputs(a, dtype, a["x"].shape[1] // group if group else 1)
        rest = (q, a["x"], a["weight"], scales, a["eps"], None, residual, *((group, False) if group else ()))
        result = [q, scales, *([residual] if residual is not None else [])]
        return _writes(getattr(ops, run), result, *rest)

    def gated(run: str, a: Arguments) -> Any:
        (y,) = _outputs(a, a["gate"].dtype)
        return _writes(getattr(ops, run), [y], y, _packed(a))

    def silu_static(a: Arguments) -> Any:
        (q,) = _outputs(a, fp8)
        return _writes(ops.silu_and_mul_quant, [q], q, _packed(a), a["scale"].reshape(1))

    def silu_blocks(a: Arguments) -> Any:
        q, scales = _outputs(a, fp8, a["gate"].shape[1] // 128)
        return _writes(ops.silu_and_mul_per_block_quant, [q, scales], q, _packed(a), scales, 128)

    def static(a: Arguments) -> Any:
        (q,) = _outputs(a, fp8)
        return _writes(ops.static_scaled_fp8_quant, [q], q, a["x"], a["scale"].reshape(1))

    def token(run: str, dtype: torch.dtype, a: Arguments) -> Any:
        q, scales = _outputs(a, dtype, 1)
        return _writes(getattr(ops, run), [q, scales], q, a["x"], scales, None)

    def blocks(a: Arguments) -> Any:
        q, scales = _outputs(a, fp8, a["x"].shape[1] // 128)
        rest = (a["x"], q, scales, 128, 1e-10, -448.0, 448.0, False, False, False)
        return _writes(ops.per_token_group_fp8_quant, [q, scales], *rest)

    computed = {
        "fp8_token": functools.partial(rms_computed, "rms_norm_dynamic_per_token_quant", fp8, None),
        "int8_token": functools.partial(rms_computed, "rms_norm_dynamic_per_token_quant", torch.int8, None),
        "fp8_group128": functools.partial(rms_computed, "rms_norm_per_block_quant", fp8, 128),
    }
    return {
        ("rms_norm", None): rms,
        ("add_rms_norm", None): add_rms,
        ("rms_norm_quantize", "fp8_static"): rms_static,
        ("add_rms_norm_quantize", "fp8_static"): add_rms_static,
        **{(f"{base}_quantize", s): make for base in ("rms_norm", "add_rms_norm") for s, make in computed.items()},
        ("silu_mul", None): functools.partial(gated, "silu_and_mul"),
        ("gelu_mul", None): functools.partial(gated, "gelu_and_mul"),
        ("silu_mul_quantize", "fp8_static"): silu_static,
        ("silu_mul_quantize", "fp8_group128"): silu_blocks,
        ("quantize", "fp8_static"): static,
        ("quantize", "fp8_token"): functools.partial(token, "dynamic_per_token_scaled_fp8_quant", fp8),
        ("quantize", "int8_token"): functools.partial(token, "dynamic_scaled_int8_quant", torch.int8),
        ("quantize", "fp8_group128"): blocks,
    }


def _torchao(module: Any) -> Kernels:
    return {("quantize", "fp8_group128"): lambda a: lambda: list(module.fp8_blockwise_act_quant(a["x"], 128))}


def _helion(module: Any) -> Kernels:
    # Not in its wheel: the examples are beside a checkout. It searches for minutes unless HELION_AUTOTUNE_EFFORT=none.
    rms_norm, swiglu = (module.import_path(module.EXAMPLES_DIR / f"{name}.py") for name in ("rms_norm", "swiglu"))

    def gated(a: Arguments) -> Any:
        gate, up = a["gate"].contiguous(), a["up"].contiguous()
        return lambda: [swiglu.swiglu_fwd(gate, up)]

    return {
        ("rms_norm", None): lambda a: lambda: [rms_norm.rms_norm_fwd(a["x"], a["weight"], a["eps"])[0]],
        ("silu_mul", None): gated,
    }


PEERS = {
    "flashinfer": Peer("flashinfer", _flashinfer),
    "liger": Peer("liger_kernel.ops", _liger),
    "quack": Peer("quack.rmsnorm", _quack),
    "vllm": Peer("vllm._custom_ops", _vllm),
    "torchao": Peer("torchao.kernel.blockwise_quantization", _torchao),
    "helion": Peer("helion._testing", _helion),
}


@functools.cache
def kernels(name: str) -> Kernels | str:
    """What a peer has, or why there is nothing of it."""
    peer = PEERS[name]
    try:
        return peer.kernels(importlib.import_module(peer.module))
    except Exception as error:  # another library may fail to load in any way; which one it was is said
        top = peer.module.partition(".")[0]
        gone = isinstance(error, ModuleNotFoundError) and error.name == top
        return "not installed" if gone else f"{type(error).__name__}: {error}"[:200]


def missing() -> dict[str, str]:
    """The peers that there is nothing of, and why."""
    return {name: found for name in PEERS if isinstance(found := kernels(name), str)}


def peer(name: str, op: str, scheme: str | None, sets: list[Arguments]) -> Call | None:
    """A peer's call of the op, `op` as cells have it; None where it has none."""
    found = kernels(name)
    make = None if isinstance(found, str) else found.get((op, scheme))
    if make is None:
        return None
    calls = [make(arguments) for arguments in sets]
    return lambda i: calls[i]()
