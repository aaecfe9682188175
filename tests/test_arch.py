import dataclasses
import types
from unittest import mock

import pytest
import torch

from fusionpass import Arch
from fusionpass.errors import ArchError

# name: cuda, rocm, capability, warp, fp8 e4m3fn, pdl, copies strided heads
TABLE = {
    "cpu": (False, False, 0, 32, False, False, False),
    "sm_80": (True, False, 80, 32, False, False, False),
    "sm_86": (True, False, 86, 32, False, False, False),
    "sm_89": (True, False, 89, 32, True, False, False),
    "sm_90": (True, False, 90, 32, True, True, False),
    "sm_100": (True, False, 100, 32, True, True, False),
    "sm_103": (True, False, 103, 32, True, True, False),
    "sm_120": (True, False, 120, 32, True, True, False),
    "sm_121": (True, False, 121, 32, True, True, False),
    "gfx942": (False, True, 0, 64, False, False, True),
    "gfx950": (False, True, 0, 64, True, False, True),
}


@pytest.mark.parametrize("name", TABLE)
def test_truth_table(name):
    arch = Arch(name)
    found = (
        arch.is_cuda, arch.is_rocm, arch.capability, arch.warp_size, arch.has_fp8_e4m3fn, arch.has_pdl,
        arch.copies_strided_heads,
    )  # fmt: skip
    assert found == TABLE[name]
    assert arch.is_cpu is (name == "cpu")
    assert [arch.is_cpu, arch.is_cuda, arch.is_rocm].count(True) == 1


def test_an_arch_is_a_value():
    assert Arch("sm_90") == Arch("sm_90")
    assert len({Arch("sm_90"), Arch("sm_90"), Arch("sm_100")}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Arch("sm_90").name = "sm_80"


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("sm90", "sm_90"), ("SM_90", ""), ("gfx94", "gfx942"), ("gfx941", "gfx942"), ("CPU", ""), ("", ""),
        ("cuda", ""), ("h100", ""), ("sm_60", ""), ("sm_90a", "sm_90"), ("sm_1000", "sm_100"), ("sm_90\n", "sm_90"),
    ],
)  # fmt: skip
def test_unknown_names(name, guess):
    with pytest.raises(ArchError, match=r"is not a known target.*Known: cpu, gfx942, gfx950, sm_100") as raised:
        Arch(name)
    assert repr(name) in str(raised.value)
    assert f"Did you mean '{guess}" in str(raised.value) if guess else True


def _gpu(major=0, minor=0, gcn=""):
    return types.SimpleNamespace(major=major, minor=minor, gcnArchName=gcn)


@pytest.mark.parametrize(
    ("properties", "hip", "name"),
    [
        (_gpu(8, 0), None, "sm_80"),
        (_gpu(9, 0), None, "sm_90"),
        (_gpu(10, 3), None, "sm_103"),
        (_gpu(12, 1), None, "sm_121"),
        (_gpu(9, 4, "gfx942:sramecc+:xnack-"), "6.4.0", "gfx942"),
        (_gpu(9, 5, "gfx950"), "7.0.0", "gfx950"),
    ],
)
def test_the_target_of_a_device(properties, hip, name):
    with (
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.version, "hip", hip),
    ):
        assert Arch.of(torch.device("cuda", 0)) == Arch(name)


def test_the_target_of_the_cpu_and_of_what_has_none():
    assert Arch.of(torch.device("cpu")) == Arch("cpu")
    with pytest.raises(ArchError, match=r"no target for device type 'meta'. Pass Config\(target=Arch"):
        Arch.of(torch.device("meta"))
