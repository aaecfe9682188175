"""Compile launches ahead of time, for any target, on a machine that need not have one."""

from dataclasses import dataclass
from typing import Any

import torch

from .arch import Arch
from .launch import Empty, Launch

_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e4m3fnuz: "*fp8e4b8",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Specialised:
    """A kernel for all launches that Triton does not tell apart.

    Attributes:
        kernel: the `triton.jit` function.
        signature: the type of each parameter.
        constants: the parameters whose value is compiled in.
        divisible: the positions of those that are multiples of sixteen.
        options: Triton's own.
    """

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(launch: Launch) -> "Specialised":
        """The kernel of `launch`, not of those before it; equal where one compilation serves both."""
        kinds, constants, divisible = [], [], []
        for index, parameter in enumerate(launch.kernel.params):
            value = launch.args[parameter.name]
            kind = "constexpr" if parameter.is_constexpr else parameter_type(value)
            kinds.append((parameter.name, kind))
            if kind == "constexpr":
                constants.append((parameter.name, value))
            elif _divisible(value):
                divisible.append(index)
        options = tuple(launch.options().items())
        return Specialised(launch.kernel, tuple(kinds), tuple(constants), tuple(divisible), options)

    def compile(self, arch: Arch) -> Any:
        """Triton's compiled kernel: what it has as `asm` and `metadata`. Kept in Triton's cache, as at a launch."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        target = GPUTarget("hip", arch.name, arch.warp_size) if arch.is_rocm else GPUTarget("cuda", arch.capability, 32)
        # By position, in the kernel's order, which is how a launch names what it caches.
        positions = {name: index for index, (name, _) in enumerate(self.signature)}
        constants = {(positions[name],): value for name, value in self.constants}
        # Those without an attribute have an empty one, but for floats: part of the name, too.
        attributes = {
            (index,): [["tt.divisibility", 16]] if index in self.divisible else []
            for index, (_, kind) in enumerate(self.signature)
            if kind != "fp32"
        }
        source = ASTSource(self.kernel, dict(self.signature), constants, attributes)
        return triton.compile(source, target=target, options=dict(self.options))


def compile_launch(launch: Launch, arch: Arch) -> dict[str, Any]:
    """Compile the kernel of `launch`, not of those before it, as it would be specialised for these arguments.

    Args:
        launch: its tensors may be fake or on the meta device; sizes may be symbolic (64-bit, with no divisibility).
        arch: an NVIDIA or AMD target.

    Returns:
        Triton's stages by name: "ttir", "ttgir", "llir", and "ptx" and "cubin", or "amdgcn" and "hsaco".
    """
    return dict(Specialised.of(launch).compile(arch).asm)


def parameter_type(value: Any) -> str:
    """Triton's name for the type of a runtime argument; "constexpr" where Triton specialises on the value."""
    if isinstance(value, torch.Tensor | Empty):
        return _POINTERS[value.dtype]
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "i64"


def _divisible(value: Any) -> bool:
    if isinstance(value, Empty):
        return True
    if isinstance(value, torch.Tensor):
        offset = value.storage_offset() * value.element_size()
        return isinstance(offset, int) and offset % 16 == 0
    return isinstance(value, int) and value % 16 == 0
