"""Dumped graphs are programs: they run on random inputs, and all of one model give the same."""

import itertools
import subprocess
import sys

import pytest
import torch

import fusionpass
from fusionpass import Arch, Config
from fusionpass.report.dump import write_graph, write_index
from fusionpass.report.replay import differences, loaded, random_inputs, results_of
from tests.models import Block
from tests.report.stack import Stack, rows
from tests.test_golden import CASES, NORM, WIDTH


def _dumped(tmp_path, function, *args, **options):
    """The dumped files of a traced function, in order."""
    report = fusionpass.explain(function, *args, **options)
    (trace,) = report.graphs
    return sorted(write_graph(tmp_path, trace).glob("[0-9]*.py"))


def _alike(values, tensor):
    wanted = (tensor.shape, tensor.dtype)
    return [value for value in values if isinstance(value, torch.Tensor) and (value.shape, value.dtype) == wanted]


@pytest.mark.parametrize(("function", "args"), CASES, ids=[f.__name__ for f, _ in CASES])
def test_every_dumped_graph_runs_and_equals_the_original(function, args, tmp_path):
    files = _dumped(tmp_path, function, *args)
    assert [file.stem[3:] for file in files] == ["captured", "normalize", "recognise", "fuse", "lower", "cleanup"]
    first = loaded(files[0])
    given = random_inputs(first.INPUTS, seed=3)
    weights = [value for value in given if value.shape == (WIDTH,)]
    # The function's arguments in the order of the graph's inputs; of several alike, some order must give the same.
    orders = [order for order in itertools.permutations(given, len(args))
              if all(any(v is w for w in _alike([v], a)) for v, a in zip(order, args, strict=True))]  # fmt: skip
    before = NORM.weight.data
    try:
        if weights:
            NORM.weight.data = weights[0]
        originals = []
        for order in orders:
            with torch.no_grad():
                originals.append(torch.utils._pytree.tree_leaves(function(*order)))
    finally:
        NORM.weight.data = before
    assert originals
    for file in files:
        results = results_of(loaded(file).forward, first.INPUTS, seed=3)[: len(originals[0])]
        assert any(not differences(results, original) for original in originals), file.name


def test_a_dumped_file_is_a_program_of_its_own(tmp_path):
    files = _dumped(tmp_path, Block(16), rows(3)[:, :16], rows(3)[:, :16], config=Config(target=Arch("sm_90")))
    command = [sys.executable, str(files[3]), "--against", str(files[0])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Its inputs were columns of something wider, and lie like that.
    assert "0: uint8[3, 16] strides [16, 1]" in done.stdout
    assert done.stdout.endswith(f"the same as {files[0]}\n")
    text = files[0].read_text().replace("aten.rsqrt.default(", "aten.sqrt.default(")
    other = tmp_path / "other.py"
    other.write_text(text)
    done = subprocess.run([*command[:-1], str(other)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "of 48 elements differ, by up to" in done.stdout


def test_inputs_have_the_recorded_strides_and_are_the_same_for_a_seed():
    inputs = [
        ((3, 5), (10, 2), torch.bfloat16), ((2, 4), (0, 1), torch.float32), ((), (), torch.float32),
        ((7,), (1,), torch.float8_e4m3fn), ((4,), (1,), torch.int64), ((4,), (1,), torch.bool),
        ((0, 3), (3, 1), torch.float32), 5, True,
    ]  # fmt: skip
    first, second, third = (random_inputs(inputs, seed=seed) for seed in (1, 1, 2))
    assert not differences(first, second)
    assert differences(first, third)
    for value, given in zip(first[:7], inputs[:7], strict=True):
        assert (tuple(value.shape), value.stride(), value.dtype) == given
        assert value.double().isfinite().all()
    assert torch.equal(first[1][0], first[1][1])
    assert first[2] > 0
    assert set(first[4].tolist()) <= {0, 1}
    assert first[7:] == [5, True]
    with pytest.raises(fusionpass.FusionpassError, match="neither a tensor nor a number"):
        random_inputs([None])


def test_what_differs_is_told():
    one = [torch.tensor([1.0, float("nan"), -0.0]), 3]
    assert not differences(one, [torch.tensor([1.0, float("nan"), 0.0]), 3])
    assert differences(one, one[:1]) == ["2 values, and 1"]
    assert differences(one, [torch.tensor([1.0, 2.0, 0.0]), 4])[0].startswith("0: 1 of 3 elements differ")
    assert differences(one, [one[0].bfloat16(), 4])[1] == "1: 3, and 4"
    assert differences([torch.zeros(2, 2)], [torch.zeros(2, 2).t()]) != [], "strides are part of a value"


def test_sizes_that_are_symbols_have_the_numbers_that_were_traced_with(tmp_path):
    model = Stack(1)
    x = rows(6)
    torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        fusionpass.compile(model, dump_dir=tmp_path, cuda_graphs="off")(x)
    (folder,) = tmp_path.glob("graph_*")
    files = [file for file in sorted(folder.glob("[0-9]*.py")) if "generated" not in file.name]
    results = [results_of(loaded(file).forward, loaded(file).INPUTS) for file in files]
    for file, values in zip(files, results, strict=True):
        assert any(value.shape == (6, 32) for value in values if isinstance(value, torch.Tensor)), file.name
        outputs = [value for value in values if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16]
        assert outputs[0].isfinite().any(), file.name


def test_a_graph_that_writes_to_its_input_returns_it_changed(tmp_path):
    def write(cache, x):
        cache.copy_(x)
        return cache * 2

    files = _dumped(tmp_path, write, torch.zeros(3, 4), torch.zeros(3, 4))
    for file in files:
        module = loaded(file)
        doubled, *given = results_of(module.forward, module.INPUTS)
        assert torch.equal(doubled, given[0] * 2)
        assert torch.equal(given[0], given[1])


def test_each_process_of_several_has_its_own_folder(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with fusionpass.dump(tmp_path / "block") as folder, torch.no_grad():
            fusionpass.compile(Stack(1), dump_dir=tmp_path / "own", cuda_graphs="off")(rows())
    finally:
        torch.distributed.destroy_process_group()
    assert folder == tmp_path / "block" / "rank_0"
    for name in ("block", "own"):
        assert (tmp_path / name / "rank_0" / "index.md").is_file()
        assert list((tmp_path / name / "rank_0").glob("graph_*"))
        assert not list((tmp_path / name).glob("graph_*"))


def test_the_index_lists_what_is_there(tmp_path):
    report = fusionpass.explain(Stack(1), rows())
    for _ in range(2):
        write_graph(tmp_path, report.graphs[0])
    write_index(tmp_path)
    text = (tmp_path / "index.md").read_text()
    for file in tmp_path.glob("graph_*/*"):
        assert f"]({file.relative_to(tmp_path)})" in text
