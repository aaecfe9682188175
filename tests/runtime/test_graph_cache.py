"""Which graphs are kept, and what they may cost."""

import gc

from fusionpass.runtime.program import Program
from tests.runtime.harness import Bench, W, attention, linear, numbers, same
from tests.runtime.programs import S, program, size, tensor


def test_the_least_recently_used_goes() -> None:
    bench = Bench(linear(), limit=2)
    for n in (1, 2, 1, 2, 2, 1, 3, 3, 3, 1, 1, 2):
        bench(n, numbers(n, 4), W)
    assert bench.device.captures == 3
    bench(2, numbers(2, 4), W)
    assert bench.device.captures == 4
    assert [graph.sizes for graph in bench.note.graphs] == ["s0=1", "s0=2"]
    assert len(bench.device.live) == 2


def test_keys_that_keep_changing_are_captured_later_and_later() -> None:
    bench = Bench(linear(), limit=2)
    for n in range(1, 200):
        for _ in range(2):
            bench(n % 20 + 1, numbers(n % 20 + 1, 4), W)
    assert bench.device.captures < 25
    assert bench.note.sightings >= 8
    assert "dropped before they were replayed" in str(bench.note)


def test_sizes_share_memory() -> None:
    bench = Bench(attention("z q"))
    for n in (32, 16, 8, 4):
        for _ in range(2):
            bench(n, numbers(n, 4), W)
    assert len(bench.note.graphs) == 4
    pool = bench.device.pools[0]
    assert not pool.blocks, "nothing is kept but aliases"
    assert bench.graphs.memory.total == pool.high + 8 * 1000
    assert [grown for _, _, grown in bench.graphs.memory.graphs][1:] == [2000] * 3
    assert "4 CUDA graphs" in str(bench.graphs.memory)


def test_what_nobody_reads_any_more_gives_its_memory_to_the_next() -> None:
    steps = [S(f"s{i}", lambda x: [x * 2], f"v{i}", f"v{i + 1}") for i in range(20)]
    bench = Bench(program([tensor("v0", 4096)], steps, "v20"), "piecewise")
    for _ in range(3):
        bench(numbers(4096))
    assert bench.device.pools[-1].high < 3 * 4096 * 4


def wide() -> Program:
    step = S("a", lambda n, x: [x.repeat(1, 1000)], "s0 x", "y")
    return program([size("s0"), tensor("x", "s0", 4)], [step], "y")


def test_the_cap_on_memory() -> None:
    bench = Bench(wide(), memory_mib=1)
    for _ in range(2):
        for n in (1, 2, 40, 3, 50, 30, 100, 1):
            for _ in range(3):
                bench(n, numbers(n, 4))
                assert bench.graphs.memory.total <= 2**20
    for _ in range(2):
        bench(50, numbers(50, 4))
    assert {"s0=50", "s0=1"} <= {graph.sizes for graph in bench.note.graphs}
    assert "1.0" in bench.note.refused["s0=100"]
    assert "s0=200" not in bench.note.refused
    captures = bench.device.captures
    for _ in range(3):
        bench(200, numbers(200, 4))
    assert bench.device.captures == captures


def test_what_an_older_graph_took_is_not_held_against_a_new_one() -> None:
    """A pool gives nothing back before all its graphs are gone: a new one is begun."""
    bench = Bench(wide(), "piecewise", memory_mib=1)
    steps = [S(f"s{i}", lambda x: [x + 1], f"v{i}", f"v{i + 1}") for i in range(8)]
    chain = program([tensor("v0", 4)], steps, "v8")
    second = bench.graphs.wrap(chain, "second")
    for _ in range(3):
        bench(65, numbers(65, 4))
    assert [graph.replays for graph in bench.note.graphs] == [2]
    assert bench.graphs.memory.total > 2**20 - 8000
    for _ in range(4):
        x = numbers(4)
        same(second(x)[0], x + 8)
    assert not bench.note.graphs
    assert [graph.replays for graph in bench.graphs.notes[1].graphs] == [2]
    assert len(bench.device.pools) == 2


def test_two_programs_share_a_pool() -> None:
    bench = Bench(attention())
    second = bench.graphs.wrap(linear(), "second")
    for _ in range(5):
        bench(3, numbers(3, 4), W)
        x = numbers(3, 4)
        same(second(3, x, W)[0], linear().run(3, x, W)[0])
    assert len(bench.device.pools) == 1
    assert len(bench.graphs.memory.graphs) == 2


def test_a_program_that_nobody_can_call_any_more() -> None:
    bench = Bench(linear())
    second = bench.graphs.wrap(linear(), "second")
    for _ in range(2):
        second(3, numbers(3, 4), W)
    assert len(bench.device.live) == 1
    del second
    assert bench.graphs.memory.graphs == ()
    for _ in range(2):
        bench(3, numbers(3, 4), W)
    assert len(bench.device.live) == 1


def test_everything_is_freed_without_the_garbage_collector() -> None:
    bench = Bench(attention())
    for _ in range(3):
        bench(3, numbers(3, 4), W)
    live = bench.device.live
    gc.disable()
    try:
        del bench.call, bench.graphs
        assert not live
    finally:
        gc.enable()


def test_released_and_captured_again() -> None:
    bench = Bench(attention("z q"))
    highs = []
    for _ in range(100):
        for _ in range(3):
            bench(3, numbers(3, 4), W)
        highs.append(bench.graphs.memory.total)
        bench.graphs.release()
        assert bench.graphs.memory.total == 0
        assert not bench.device.live
    assert len(set(highs)) == 1
    assert bench.counts() == (200, 400)
    assert all(pool.closed for pool in bench.device.pools)
