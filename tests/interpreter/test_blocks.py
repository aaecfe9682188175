"""The kernel of products with scales along K through Triton's interpreter."""

from typing import Any

import pytest
import torch
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from fusionpass.arch import Arch
from fusionpass.ops.gemm.blocks_triton import Cut
from fusionpass.ops.quant.scheme import Scheme
from tests.blocks import KINDS, arguments_for_product, check_product, product_of
from tests.profiles import share

# No programmatic dependent launch in these: the interpreter has no grids to wait for.
ARCH = Arch("sm_89")


def check(arguments: dict[str, Any], cut: Cut | None = None) -> torch.Tensor:
    # The interpreter multiplies matrices of bfloat16 as if they were integers; these codes and scales fit in float16.
    wide = {"WIDE": tl.float16} if arguments["a_scheme"].startswith("mxfp8") else {}
    return check_product(ARCH, arguments, cut, **wide)


@share(40)
@given(data=st.data())
def test_drawn_arguments(data: st.DataObject) -> None:
    arguments = data.draw(arguments_for_product("cpu", 40, 150, 400))
    few, rows = arguments["a"].shape[0] == 1, data.draw(st.sampled_from([16, 32]))
    depths = [32, 64, 128] if arguments["a_scheme"].startswith(("fp8", "int8")) and not few else [64, 128, 256]
    cut = Cut(
        1 if few else rows,
        data.draw(st.sampled_from([16, 32])),
        data.draw(st.sampled_from(depths)),
        data.draw(st.sampled_from([1, 1, 2, 3, 20])),
        data.draw(st.sampled_from([1, 2, 8])),
    )
    check(arguments, cut)


@pytest.mark.parametrize("rows", [1, 2, 17, 65, 140])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_as_planned(kind: str, rows: int) -> None:
    check(product_of(kind, rows, 136, 256), None)


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_a_last_group_that_is_not_whole(rows: int) -> None:
    """DeepSeek's shards: K = 3884 has 30 groups and 44 codes."""
    arguments = product_of("fp8", rows, 20, 384)
    for name in ("a", "b"):
        arguments[name] = arguments[name][:, : 256 + 44]
    check(arguments)


@pytest.mark.parametrize("kind", ["mxfp8", "mxfp8_swizzled"])
@pytest.mark.parametrize("rows", [1, 3])
def test_exponents_of_zero_and_nan(kind: str, rows: int) -> None:
    arguments = product_of(kind, rows, 20, 128)
    if kind == "mxfp8":
        arguments["a_scale"][0, 1] = 255
        arguments["b_scale"][3, 2] = 0
        arguments["b"][3, 64:96] = 0
    else:
        arguments["a_scale"][0, 1] = 255  # of the first row too: the first block's first bytes are its groups
    got = check_nan(arguments)
    assert got[0].isnan().all()
    assert not got[1:].isnan().any()


def check_nan(arguments: dict[str, Any]) -> torch.Tensor:
    import dataclasses

    from fusionpass.ops import block_scaled_mm

    launch, reason = block_scaled_mm.plan(ARCH, arguments)
    assert launch is not None, reason
    changed = tuple(dataclasses.replace(one, args={**one.args, "WIDE": tl.float16}) for one in launch.before)
    own = {} if changed else {"WIDE": tl.float16}
    launch = dataclasses.replace(launch, args={**launch.args, **own}, before=changed)
    return launch.run()[0]


def test_every_e2m1_code_and_its_negative() -> None:
    arguments = product_of("nvfp4", 1, 16, 16, out_dtype="float32")
    arguments["a"].fill_(0)
    arguments["a"][0, 0] = 0x02  # 1.0, and 0
    arguments["b"].fill_(0)
    arguments["b"][:, 0] = torch.arange(16, dtype=torch.uint8)
    arguments |= {
        name: torch.ones_like(arguments[name].float()).to(torch.float8_e4m3fn) for name in ("a_scale", "b_scale")
    }
    arguments |= {name: torch.ones(()) for name in ("a_global_scale", "b_global_scale")}
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert torch.equal(check(arguments)[0], torch.cat([magnitudes, -magnitudes]))
    assert Scheme.parse("nvfp4").packed
