"""Graphs on a real device: what the fake one cannot show, which is allocators, streams and random numbers."""

import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fusionpass.runtime.cuda_graphs import Graphs
from fusionpass.runtime.device import CudaDevice
from fusionpass.runtime.memory import Layout
from tests.gpu.harness import MIB, WIDTH, fleeting, layers, numbers, whole
from tests.runtime.harness import Compared
from tests.runtime.programs import S, program, size, tensor, weight

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch.cuda.synchronize()


@pytest.fixture
def w() -> Tensor:
    return numbers(WIDTH, WIDTH)


@pytest.mark.parametrize("inference", [False, True])
def test_results_are_the_callers_to_keep(w: Tensor, inference: bool) -> None:
    bench, kept = Compared(layers("z q o k")), []
    with torch.inference_mode(inference):
        for i in range(20):
            n = (8, 5, 33)[i % 3]
            got = bench(n, numbers(n, WIDTH), w)
            kept.append((got, [t.clone() for t in got]))
    assert bench.replays == 20 - 3
    for got, copies in kept:
        assert all(torch.equal(a, b) for a, b in zip(got, copies, strict=True))


def test_what_is_captured_is_not_computed(w: Tensor) -> None:
    """Neither the capture nor the warm-up changes what a program writes to."""
    step = S("a", lambda x, c, w: [x @ w + c.add_(1)], "x c w", "y", rows={"s0": (0,)})
    inputs = [size("s0"), tensor("x", "s0", WIDTH), tensor("c", WIDTH, mutated=True), weight("w", WIDTH, WIDTH)]
    for sizes in ((), (8, 4)):
        bench, cache = Compared(program(inputs, [step], "y"), "auto", *sizes), numbers(WIDTH)
        for n in (3, 3, 8, 8, 3, 4, 4):
            bench(n, numbers(n, WIDTH), cache, w)


def test_weights_inputs_and_caches_that_move(w: Tensor) -> None:
    step = S("a", lambda x, c, w: [x @ w + c.add_(1), x[1:]], "x c w", "y v")
    inputs = [size("s0"), tensor("x", "s0", WIDTH), tensor("c", WIDTH, mutated=True), weight("w", WIDTH, WIDTH)]
    bench = Compared(program(inputs, [step], "y v x"))
    home, cache, p = numbers(4, WIDTH), numbers(WIDTH), torch.nn.Parameter(w.clone(), requires_grad=False)
    for _ in range(3):
        bench(4, home.copy_(numbers(4, WIDTH)), cache, p)
    assert bench.note.copied == []
    for _ in range(3):
        x = numbers(4, WIDTH)
        _, view, same = bench(4, x, cache, p)
        assert same is x
        assert view.data_ptr() == x[1:].data_ptr()
    assert bench.note.copied == ["x"]
    p.copy_(numbers(WIDTH, WIDTH))
    bench(4, home, cache, p)
    p.data = numbers(WIDTH, WIDTH)
    for _ in range(3):
        bench(4, home, cache, p)
    p.data = p.data.cpu()
    p.data = p.data.cuda()
    for _ in range(3):
        bench(4, home, cache, p)
    assert bench.note.recaptures["x moved"] == 1
    assert bench.note.recaptures["w moved"] in (1, 2)  # the allocator may give the old address again
    other = numbers(WIDTH)
    for which in (other, cache, other, other, other):
        bench(4, home, which, p)
    assert bench.note.without["c, which the program writes to, moved"] == 2
    assert bench.note.recaptures["c moved"] == 1


@pytest.mark.parametrize("sizes", [(), (64, 32, 16, 8)])
def test_sizes_share_memory(w: Tensor, sizes: tuple[int, ...]) -> None:
    def chain(x: Tensor, w: Tensor) -> list[Tensor]:
        wide = x.repeat(1, 512)
        for _ in range(4):
            wide = wide * 2 + 1
        return [wide]

    bench = Compared(whole(chain, rows={"s0": (0,)}), "auto", *sizes)
    for n in (64, 32, 16, 8):
        for _ in range(3):
            bench(n, numbers(n, WIDTH), w)
    memory = bench.graphs.memory
    assert len(memory.graphs) == 4
    largest = memory.graphs[0][2]
    assert memory.total < 1.3 * largest + 16 * MIB, str(memory)


def test_nothing_is_kept_in_the_pool(w: Tensor) -> None:
    bench = Compared(layers())
    for _ in range(3):
        bench(8, numbers(8, WIDTH), w)
    place = next(iter(bench.graphs._cache.places.values()))
    blocks = [b for s in place.pools[-1].segments() for b in s["blocks"]]
    assert blocks
    assert not [block for block in blocks if block["state"] == "active_allocated"]


@pytest.mark.parametrize("sizes", [(), (16, 4)])
def test_memory_does_not_grow(w: Tensor, sizes: tuple[int, ...]) -> None:
    bench = Compared(layers(), "auto", *sizes)
    taken = []
    for _ in range(100):
        for n in (16, 16, 4, 4, 4):
            bench.call(n, fleeting(n, WIDTH), w)
        bench.graphs.release()
        assert bench.graphs.memory.total == 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        taken.append((torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]))
    assert taken[-1][0] <= taken[4][0] + 2 * MIB
    assert taken[4][1] - taken[-1][1] < 16 * MIB
    bench(16, numbers(16, WIDTH), w)


def test_dropped_without_a_release(w: Tensor) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    gc.disable()
    try:
        bench = Compared(whole(lambda x, w: [(x.repeat(64, 64) * 2)[:1, :1]]))
        for _ in range(3):
            bench.call(8, fleeting(8, WIDTH), w)
        assert torch.cuda.memory_reserved() > before
        del bench
    finally:
        gc.enable()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2 * MIB


def test_the_cap_on_memory(w: Tensor) -> None:
    bench = Compared(whole(lambda x, w: [x.repeat(64, 64)]), memory_mib=64)
    for _ in range(2):
        for n in (1, 2, 64, 3, 4):
            for _ in range(3):
                bench(n, numbers(n, WIDTH), w)
                assert bench.graphs.memory.total <= 64 * MIB, str(bench.graphs.memory)
    assert "s0=64" in bench.note.refused
    assert bench.replays


def test_two_programs_share_a_pool(w: Tensor) -> None:
    bench = Compared(layers())
    plain = whole(lambda x, w: [x @ w @ w])
    second = bench.graphs.wrap(plain, "second")
    for i in range(8):
        n = 4 + i % 2
        x = numbers(n, WIDTH)
        first = bench(n, x, w)
        copies = [t.clone() for t in first]
        got = second(n, x, w)
        assert torch.equal(got[0], x @ w @ w)
        assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))
    assert len(bench.graphs.memory.graphs) == 4


def test_a_call_on_another_stream_waits(w: Tensor) -> None:
    """The slow graph reads its buffer late: who fills it again too early is seen."""
    slow = layers(slow=20_000_000)
    bench, fast = Compared(slow), layers()
    streams = [torch.cuda.Stream() for _ in range(3)]
    for _ in range(2):
        bench(8, numbers(8, WIDTH), w)
    xs = [numbers(8, WIDTH) for _ in range(9)]
    torch.cuda.synchronize()
    got = []
    for i, x in enumerate(xs):
        with torch.cuda.stream(streams[i % 3]):
            got.append(bench.call(8, x, w))
    torch.cuda.synchronize()
    for x, results in zip(xs, got, strict=True):
        expected = fast.run(8, x, w)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert bench.replays == 10


@pytest.mark.parametrize("sizes", [(), (8, 4, 2)])
def test_eight_threads(w: Tensor, sizes: tuple[int, ...]) -> None:
    bench, wrong = Compared(layers(), "auto", *sizes), []
    torch.cuda.synchronize()

    def work(seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        try:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                for i in range(40):
                    n = 1 + (seed + i) % 8
                    x = torch.randint(-3, 4, (n, WIDTH), generator=generator, device="cuda").float()
                    expected = bench.program.run(n, x, w)
                    got = bench.call(n, x, w)
                    if not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
                        wrong.append(f"thread {seed}, call {i}, size {n}")
        except Exception as error:
            wrong.append(f"thread {seed}: {error!r}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert bench.replays > 200
    assert not bench.note.refused


def test_two_models_at_a_time(w: Tensor) -> None:
    """Their graphs run on two streams at once: neither may use the other's workspace of cuBLAS."""
    deep = whole(lambda x, w: [(((x @ w) % 4) @ w.t() % 4) @ w])
    benches = [Compared(deep), Compared(deep)]
    for bench in benches:
        for _ in range(3):
            bench(64, numbers(64, WIDTH), w)
    xs = [numbers(64, WIDTH) for _ in range(60)]
    expected = [deep.run(64, x, w)[0] for x in xs]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    got = []
    for i, x in enumerate(xs):
        with torch.cuda.stream(streams[i % 2]):
            got.append(benches[i % 2].call(64, x, w)[0])
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_inside_a_users_capture(w: Tensor) -> None:
    bench = Compared(layers())
    x = numbers(8, WIDTH)
    for _ in range(3):
        bench(8, x, w)
    graph, replays = torch.cuda.CUDAGraph(), bench.replays
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        inside = bench.call(8, x, w)
    assert bench.replays == replays
    for _ in range(3):
        x.copy_(numbers(8, WIDTH))
        graph.replay()
        expected = bench.program.run(8, x, w)
        assert all(torch.equal(a, b) for a, b in zip(inside, expected, strict=True))
        bench(8, x, w)
    assert bench.replays == replays + 3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_two_devices(w: Tensor) -> None:
    steps = [S("a", lambda x, w: [x @ w], "x w", "y")]
    graphs, made, weights = Graphs("auto"), [], [w.to(f"cuda:{i}") for i in range(2)]
    for i in range(2):
        where = f"cuda:{i}"
        inputs = [tensor("x", 4, WIDTH, device=where), weight("w", WIDTH, WIDTH, device=where)]
        made.append(graphs.wrap(program(inputs, steps, "y"), where))
    for _ in range(4):
        for i, call in enumerate(made):
            x = numbers(4, WIDTH).to(f"cuda:{i}")
            assert torch.equal(call(x, weights[i])[0], x @ weights[i])
    assert [graph.replays for note in graphs.notes for graph in note.graphs] == [3, 3]


def test_random_numbers_go_on(w: Tensor) -> None:
    bench = Compared(whole(lambda x, w: [torch.rand_like(x)]))
    x = numbers(4, WIDTH)
    drawn = [bench.call(4, x, w)[0] for _ in range(6)]
    assert bench.replays == 5
    for i, a in enumerate(drawn):
        assert not any(torch.equal(a, b) for b in drawn[:i])
    torch.manual_seed(7)
    first = [bench.call(4, x, w)[0] for _ in range(2)]
    torch.manual_seed(7)
    assert torch.equal(bench.call(4, x, w)[0], first[0])
    assert torch.equal(bench.call(4, x, w)[0], first[1])


def test_a_call_runs_at_the_next_size(w: Tensor) -> None:
    """Whatever is behind the rows; an index there is in range."""
    steps = [
        S("first", lambda i, w: [w[i], i + 0], "i w", "x j", rows={"s0": (0, 0)}),
        S("mix", lambda n, x, j: [x.cumsum(0) + n, (j + 1) % WIDTH], "s0 x j", "o k", uncapturable="it is attention"),
        S("last", lambda o, k, w: [o + w[k], (o + w[k]).t().contiguous()], "o k w", "z t", rows={"s0": (0, 1)}),
    ]
    inputs = [size("s0"), tensor("i", "s0"), weight("w", WIDTH, WIDTH)]
    bench = Compared(program(inputs, steps, "z t x"), "auto", 4, 16, 64)
    poison = torch.full((64 * MIB,), float("nan"), device="cuda")
    del poison
    torch.cuda.empty_cache()
    for n in (64, 5, 3, 16, 17, 1, 63, 4, 2):
        got = bench(n, torch.randint(0, WIDTH, (n,), device="cuda"), w)
        assert got[0].is_contiguous()
        assert got[1].is_contiguous()
    assert bench.replays == 9
    assert not bench.note.padding
    bench(65, torch.randint(0, WIDTH, (65,), device="cuda"), w)
    assert bench.replays == 9


def test_an_alias_does_not_keep_memory() -> None:
    device = CudaDevice("cuda")
    pool = device.pool()
    device.prepare()
    made = device.empty(Layout((3, 5), (8, 1), torch.bfloat16), pool)
    alias = device.alias(made[1:, 2:])
    made.fill_(3)
    assert alias.shape == (2, 3)
    assert alias.stride() == (8, 1)
    assert alias.data_ptr() == made[1:, 2:].data_ptr()
    assert alias.eq(3).all()
    pointer = made.data_ptr()
    del made
    again = device.empty(Layout((3, 5), (8, 1), torch.bfloat16), pool)
    assert again.data_ptr() == pointer
    assert device.pool_bytes(pool) > 0
    assert device.alias(again[:, :0]).shape == (3, 0)
    del again, alias
    device.give_back(pool)
    assert not pool.segments()


def test_an_empty_graph(recwarn: pytest.WarningsRecorder) -> None:
    bench = Compared(program([tensor("x", 4, 4)], [S("a", lambda x: [x.view(2, 8)], "x", "y")], "y"))
    for _ in range(4):
        bench(numbers(4, 4))
    assert not [warning for warning in recwarn if "empty" in str(warning.message)]
