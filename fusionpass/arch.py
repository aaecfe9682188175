"""Targets by name, so that every decision can be made, and tested, for any of them on any machine."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import ArchError, nearest

if TYPE_CHECKING:
    import torch

_KNOWN = ("cpu", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121", "gfx942", "gfx950")


@dataclass(frozen=True)
class Arch:
    """A compilation target.

    Args:
        name: `"cpu"`, an NVIDIA `"sm_NN"` or an AMD `"gfxNNN"` (gfx942, gfx950).

    Raises:
        ArchError: the name is none of these.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in _KNOWN and not re.fullmatch(r"sm_(7[05]|8[0-9]|9[0-9]|1[0-9][0-9])", self.name):
            raise ArchError(f"{self.name!r} is not a known target", "Arch", nearest(self.name, _KNOWN))

    @property
    def is_cpu(self) -> bool:
        """A CPU, whatever its instruction set."""
        return self.name == "cpu"

    @property
    def is_cuda(self) -> bool:
        """An NVIDIA GPU."""
        return self.name.startswith("sm_")

    @property
    def is_rocm(self) -> bool:
        """An AMD GPU."""
        return self.name.startswith("gfx")

    @property
    def capability(self) -> int:
        """NVIDIA compute capability times ten (90 for Hopper); 0 elsewhere."""
        return int(self.name[3:]) if self.is_cuda else 0

    @property
    def warp_size(self) -> int:
        """Threads per warp, or per wavefront on AMD."""
        return 64 if self.is_rocm else 32

    @property
    def has_fp8_e4m3fn(self) -> bool:
        """Whether Triton can convert to e4m3fn here (sm_89 and newer, gfx950)."""
        return self.capability >= 89 or self.name == "gfx950"

    @property
    def multiprocessors(self) -> int:
        """Multiprocessors, or compute units, of A100, H100, B200, RTX 5090, MI300X and MI355X; 128 if not known."""
        known = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304, "gfx950": 256}
        return known.get(self.name, 128)

    @property
    def has_pdl(self) -> bool:
        """Whether it has programmatic dependent launch (Hopper and newer)."""
        return self.capability >= 90

    @property
    def copies_strided_heads(self) -> bool:
        """Whether a strided QKV slice is copied before QK-norm by default (ROCm)."""
        return self.is_rocm

    @staticmethod
    def of(device: "torch.device") -> "Arch":
        """The target of tensors that live on `device`.

        Raises:
            ArchError: a device that is neither a CPU nor a CUDA or ROCm GPU.
        """
        import torch

        if device.type == "cpu":
            return Arch("cpu")
        if device.type != "cuda":
            raise ArchError(f"no target for device type {device.type!r}", "Arch.of", "Pass Config(target=Arch(...))")
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return Arch(properties.gcnArchName.split(":")[0])
        return Arch(f"sm_{properties.major}{properties.minor}")
