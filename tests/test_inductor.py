"""What we rely on in Inductor's internals, seen in the code that it generates for a faked GPU. Nothing is launched.

When a torch release moves one of these, a test here names it.
"""

import ast
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fusionpass
from fusionpass.arch import Arch
from fusionpass.compile import Session
from fusionpass.config import Config
from fusionpass.inductor import kernels_in, package_digest
from fusionpass.op import OPS
from tests.models import LlamaNorm, static

pytest.importorskip("triton")
from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

from tests.fake_gpu import codegen, fake_gpu, needs_cuda_build

pytestmark = needs_cuda_build

WIDTH = 1024


@pytest.fixture(scope="module", autouse=True)
def _no_ops_are_left() -> Iterator[None]:
    """Ops of one's own keep what is compiled out of the cache, in other tests too."""
    before = set(OPS)
    yield
    for overload in OPS.keys() - before:
        del OPS[overload]


def llama(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def layers(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, matrix: torch.Tensor
) -> Any:
    """Two rounds of add + norm + quantise + FP8 GEMM, as a stack of layers chains them."""
    for _ in range(2):
        residual = x + residual
        codes = static(llama(residual, weight), scale)
        x = torch._scaled_mm(codes, matrix, scale, scale, out_dtype=torch.bfloat16)
    return x, residual


def arguments(tokens: int = 96, dynamic: bool = False, columns: int = WIDTH) -> tuple[torch.Tensor, ...]:
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    x, residual = empty(tokens, columns)[:, :WIDTH], empty(tokens, WIDTH)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(residual, 0)
    matrix = empty(WIDTH, WIDTH, dtype=torch.float8_e4m3fn).t()
    return x, residual, empty(WIDTH), empty(dtype=torch.float32), matrix


def generated(
    arch: str, make: Callable[[], Any] = arguments, function: Callable[..., Any] = layers, **options: Any
) -> tuple[str, Session]:
    session = Session(Config(target=Arch(arch), **options))
    (source,) = codegen(function, make, arch, session)
    ast.parse(source)
    return source, session


def call_of(source: str) -> str:
    return source[source.index("def call(") : source.index("runner = ") if "runner = " in source else None]


@pytest.mark.parametrize("dynamic", [False, True])
def test_few_rows_of_a_product(dynamic: bool) -> None:
    """A kernel where their number is known; else a call that chooses when it is."""
    source, session = generated("sm_90", lambda: arguments(8, dynamic))
    backends = [record.backend for record in session.report.fused if record.op == "scaled_mm"]
    call = call_of(source)
    assert backends == (["late"] if dynamic else ["triton"]) * 2
    # The weight is narrow, so K is split, and another kernel adds up.
    assert kernels_in(source) == (2 if dynamic else 6)
    assert call.count("torch.ops.fusionpass.scaled_mm.default(") == (2 if dynamic else 0)
    assert "extern_kernels._scaled_mm" not in call


@pytest.mark.parametrize("rows", [8, 96])
def test_weights_side_by_side_are_one_launch(rows: int) -> None:
    """Queries, keys and values of few rows; of many, each is the library's, as the model called it."""

    def projected(codes: torch.Tensor, scale: torch.Tensor, *weights: torch.Tensor) -> Any:
        return [torch._scaled_mm(codes, b.t(), scale, scale, out_dtype=torch.bfloat16) for b in weights]

    def make() -> tuple[torch.Tensor, ...]:
        sizes = [(rows, 4096), (6144, 4096), (1024, 4096), (1024, 4096)]
        codes, *weights = (torch.empty(size, dtype=torch.float8_e4m3fn, device="cuda") for size in sizes)
        return codes, torch.empty((), device="cuda"), *weights

    source, session = generated("sm_90", make, projected)
    (record,) = session.report.fused
    assert (record.op, record.rules) == ("scaled_mms", ("scaled_mms.two", "scaled_mms.three"))
    assert kernels_in(source) == (1 if rows == 8 else 0)
    assert call_of(source).count("extern_kernels._scaled_mm") == (0 if rows == 8 else 3)


def test_one_kernel_per_site_launched_from_the_wrapper() -> None:
    source, session = generated("sm_90")
    assert session.report.count("add_rms_norm_quantize") == 2
    assert {r.backend for r in session.report.fused if "scaled_mm" not in r.op} == {"triton"}
    assert kernels_in(source) == 2, "one launch a layer; the GEMMs are library calls"
    call = call_of(source)
    assert "torch.ops.fusionpass" not in call, "no operator dispatch at run time"
    assert not re.search(r"\bclone\b|\bcopy_\(", call), "outputs are written in place, nothing is cloned"
    assert len(re.findall(r"empty_strided_cuda\(", call)) <= 6


def test_a_symbolic_token_count_stays_one_kernel() -> None:
    source, session = generated("sm_90", lambda: arguments(dynamic=True))
    assert session.report.count("add_rms_norm_quantize") == 2
    assert kernels_in(source) == 2
    assert re.search(r"\.run\(.*\bs\d+", call_of(source)), "the grid follows the symbol"


def test_a_strided_input_is_read_where_it_is() -> None:
    source, session = generated("sm_90", lambda: arguments(columns=3 * WIDTH))
    assert {r.backend for r in session.report.fused if "scaled_mm" not in r.op} == {"triton"}
    assert kernels_in(source) == 2, "no copy in front"


def test_programmatic_dependent_launch_reaches_the_kernel() -> None:
    source, session = generated("sm_90", lambda: arguments(tokens=1))
    planned = session.report.count("add_rms_norm_quantize")
    assert planned == 2
    asked = "gdc_wait" in source
    assert asked == ("'launch_pdl': True" in source), "a kernel that waits is launched with PDL, and no other"


@pytest.mark.parametrize("theirs", [False, True])
def test_dependents_start_early_unless_inductors_kernels_are_among_them(theirs: bool) -> None:
    with torch._inductor.config.patch({"triton.enable_pdl": theirs}):
        source, session = generated("sm_90", lambda: arguments(tokens=1))
    assert session.report.count("add_rms_norm_quantize") == 2
    assert re.findall(r"'PDL': (\w+)", source) in ([["True"], ["True", "True"]] if theirs else [["2"], ["2", "2"]])


def test_a_rotation_is_compiled_without_fused_multiply_adds() -> None:
    def make() -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty(shape, device="cuda") for shape in ((1, 8, 16, 64), (1, 16, 64), (1, 16, 64)))

    source, session = generated("sm_90", make, lambda x, cos, sin: torch.ops.fusionpass.rope(x, cos, sin))
    assert [record.backend for record in session.report.fused] == ["triton"]
    assert (
        source.count("triton_meta={'enable_fp_fusion': False")
        == len(re.findall(r"heads_kernel\w*\.run\(", source))
        == 1
    )
    assert "enable_fp_fusion" not in generated("sm_90")[0]


def test_numbers_reach_the_kernel_in_float32() -> None:
    source, _ = generated("sm_90")
    (signature,) = set(re.findall(r"'signature': (\{[^}]*'x_row'[^}]*\})", source))
    assert "fp64" not in signature
    assert ast.literal_eval(signature)["eps"] in ("fp32", "constexpr")


def test_launches_of_one_kernel_keep_their_own_options() -> None:
    """Inductor shares a definition between launches with equal arguments; warps and PDL are not among them."""
    triton = pytest.importorskip("triton")
    from fusionpass.launch import Empty, Launch
    from tests.twin import copy_kernel

    def sample(tokens: int, width: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, Any]:
        return {"x": torch.zeros(tokens, width, dtype=dtype, device=device)}

    if not hasattr(torch.ops.fusionpass_test, "twin"):

        @fusionpass.op(outputs=("y",), sample=sample, namespace="fusionpass_test")
        def twin(x: torch.Tensor, warps: int) -> torch.Tensor:
            """A copy."""
            return x.clone()

        def plan(arch: Arch, x: torch.Tensor, warps: int) -> Launch:
            args = {"x": x, "y": Empty(tuple(x.shape), x.dtype), "N": 1024, "BLOCK": triton.next_power_of_2(1024)}
            return Launch(copy_kernel, (1,), args, ("y",), num_warps=warps, pdl=warps == 8)

        twin.backends.append(fusionpass.Backend("triton", plan))

    def function(x: torch.Tensor) -> Any:
        y = torch.ops.fusionpass_test.twin(x, 4)
        return torch.ops.fusionpass_test.twin(y, 8)

    source, _ = generated("sm_90", lambda: (torch.empty(1024, device="cuda"),), function)
    assert sorted(re.findall(r"configs=\[\{'num_warps': (\d)", source)) == ["4", "8"]
    assert source.count("'launch_pdl': True") == 1


def cached() -> Any:
    """An op whose kernel writes x + x / 2 into a cache, with x / 2 from a launch of its own."""
    from fusionpass.launch import Empty, Launch
    from tests.twin import copy_kernel, write_kernel

    if hasattr(torch.ops.fusionpass_test, "cached"):
        return torch.ops.fusionpass_test.cached

    def sample(tokens: int, width: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, Any]:
        return {"cache": torch.zeros(2 * width, device=device), "x": torch.zeros(width, device=device)}

    @fusionpass.op(outputs=("cache",), sample=sample, namespace="fusionpass_test")
    def cached(cache: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """A write at the start."""
        return torch.cat([x + x, cache[x.shape[0] :]])

    def plan(arch: Arch, cache: torch.Tensor, x: torch.Tensor) -> Launch:
        half = Empty(tuple(x.shape), x.dtype)
        first = Launch(copy_kernel, (1,), {"x": x, "y": half, "N": 1024, "BLOCK": 1024}, ("y",))
        args = {"cache": cache, "x": x, "half": half, "N": 1024, "START": 0, "BLOCK": 1024}
        return Launch(write_kernel, (1,), args, ("cache",), mutates=("cache",), before=(first,))

    cached.backends.append(fusionpass.Backend("triton", plan))
    return torch.ops.fusionpass_test.cached


CACHE = (4096,)


@pytest.mark.parametrize(
    ("reads", "copied"),
    [
        (lambda old, new, x: (new[:8] * 2,), False),
        (lambda old, new, x: (new * 2, old[:4] + 1), True),
        (lambda old, new, x: (new + old,), True),
    ],
)
def test_a_cache_is_written_in_place_where_nobody_reads_the_old_one(reads: Any, copied: bool) -> None:
    write = cached()

    def function(cache: torch.Tensor, x: torch.Tensor) -> Any:
        new = write(cache, x)
        results = reads(cache, new, x)
        cache.copy_(new)
        return results

    source, session = generated(
        "sm_90", lambda: (torch.empty(CACHE, device="cuda"), torch.empty(1024, device="cuda")), function
    )
    (record,) = session.report.fused
    assert ("reads the old value" in record.reason) == copied
    call = call_of(source)
    assert len(re.findall(r"copy_kernel\w*\.run\(", call)) == len(re.findall(r"write_kernel\w*\.run\(", call)) == 1
    assert call.index("copy_kernel") < call.index("write_kernel")
    written = re.search(r"write_kernel\w*\.run\((\w+), (\w+), (\w+)", call)
    assert written
    assert (written[1] == "arg0_1") == (not copied), "in place"
    allocated = re.findall(r"empty_strided_cuda\(\((\d+),", call)
    assert ("4096" in allocated) == copied


def test_a_cache_that_keeps_its_old_value_is_copied() -> None:
    write = cached()
    make = lambda: (torch.empty(CACHE, device="cuda"), torch.empty(1024, device="cuda"))  # noqa: E731
    source, session = generated("sm_90", make, lambda cache, x: write(cache, x))
    assert "the result is not its new value" in session.report.fused[0].reason
    assert not re.search(r"write_kernel\w*\.run\(arg0_1", call_of(source))


def test_a_cache_that_is_computed_is_copied() -> None:
    write = cached()

    def function(cache: torch.Tensor, x: torch.Tensor) -> Any:
        return write(cache + 1, x)

    source, session = generated(
        "sm_90", lambda: (torch.empty(CACHE, device="cuda"), torch.empty(1024, device="cuda")), function
    )
    assert "it is no input of the graph" in session.report.fused[0].reason
    assert "write_kernel" in source


def test_launches_share_a_buffer_and_copy_what_they_mutate(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are run eagerly; a fake kernel notes what it is given."""
    from fusionpass.launch import Empty, Launch

    given: list[dict[str, Any]] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda **kwargs: given.append(kwargs)

    between, cache = Empty((4,), torch.float32), torch.zeros(8)
    first = Launch(Kernel(), (1,), {"x": cache, "y": between, "z": Empty((4,), torch.float32)}, ("y",))
    same = Launch(Kernel(), (1,), {"x": cache, "y": between, "z": between}, ("y", "z"))
    one, other = same.run()
    assert one.data_ptr() != other.data_ptr(), "two outputs are two buffers"
    given.clear()
    launch = Launch(Kernel(), (1,), {"x": between, "c": cache}, ("c",), mutates=("c",), before=(first,))
    (result,) = launch.run()
    assert given[0]["y"] is given[1]["x"]
    assert given[0]["y"] is not given[0]["z"]
    assert given[0]["x"] is cache
    assert result is given[1]["c"] is not cache


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_disabled_kernels_become_inductors_own(arch: str) -> None:
    source, session = generated(arch, disable=frozenset({"triton"}))
    assert {r.backend for r in session.report.fused} == {"inductor"}
    assert all("triton: disabled" in r.reason for r in session.report.fused)
    assert kernels_in(source) == 2, "Inductor fuses the whole chain into one kernel of its own"


def test_rocm_has_its_own_reasons() -> None:
    _, session = generated("gfx942")
    assert session.report.count("add_rms_norm_quantize") == 2
    assert {r.backend for r in session.report.fused} == {"inductor"}
    assert all("e4m3fn" in r.reason for r in session.report.fused), "gfx942 converts e4m3fnuz, not e4m3fn"


def test_without_the_package_it_takes_as_many_kernels_or_more() -> None:
    (plain,) = codegen(layers, arguments, "sm_90")
    ours, _ = generated("sm_90")
    assert kernels_in(ours) <= kernels_in(plain)


def test_an_op_called_by_the_model_is_lowered_too() -> None:
    norm = LlamaNorm(WIDTH).weight.detach()

    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return fusionpass.ops.rms_norm(x, weight, 1e-6)

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty(4, WIDTH, dtype=torch.bfloat16, device="cuda"), norm.to("cuda")

    source, session = generated("sm_90", make, function)
    assert session.report.count("rms_norm") == 1
    assert kernels_in(source) == 1


def test_the_digest_follows_the_sources() -> None:
    assert re.fullmatch(r"[0-9a-f]{64}", package_digest())


def test_launchers_are_cached_beside_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusionpass.inductor.pieces import _one_triton_cache

    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with _one_triton_cache():
        assert "TRITON_CACHE_DIR" not in os.environ, "there is no GPU"
    with fake_gpu("sm_90"), _one_triton_cache():
        assert os.environ["TRITON_CACHE_DIR"] == triton_cache_dir(0)
    assert "TRITON_CACHE_DIR" not in os.environ
    monkeypatch.setenv("TRITON_CACHE_DIR", "somewhere")
    with fake_gpu("sm_90"), _one_triton_cache():
        assert os.environ["TRITON_CACHE_DIR"] == "somewhere"


def test_workers_are_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import async_compile

    from fusionpass.inductor import warm_up

    asked: list[int] = []
    monkeypatch.setattr(async_compile, "maybe_warm_pool", lambda: asked.append(1))
    monkeypatch.setattr(async_compile.AsyncCompile, "use_process_pool", classmethod(lambda cls: False))
    warm_up()
    assert not asked
    with fake_gpu("sm_90"):
        warm_up()
    assert asked == [1]
