"""The kernels' benchmark where there is no GPU: what it measures, in which order, and what it makes of the figures."""

import json
import sys
import types
from contextlib import nullcontext

import pytest
import torch

from bench import kernels, peers, verdicts
from bench.cells import HIDDEN, SCHEMES, TOKENS, Cell, table
from bench.check import checker
from bench.implementations import argument_sets, in_processes, left_to_inductor, named, without_data
from bench.kernels import checked, parse, regimes
from bench.replays import calls_for
from bench.sample import samples
from fusionpass.arch import Arch
from fusionpass.ops import rms_norm_quantize

SM90 = Arch("sm_90")


def made(op="rms_norm", scheme=None, tokens=1, hidden=4096, regime="warm", commit="c", **us):
    results = {way.replace("_", " ").replace("plus", "+"): {"us": v} for way, v in us.items()}
    key = {"op": op, "scheme": scheme, "dtype": "bfloat16", "tokens": tokens, "hidden": hidden, "regime": regime}
    return {**key, "results": results, "commit": commit}


def test_the_preset_is_what_the_table_needs():
    cells = table()
    sizes = {(c.tokens, c.hidden) for c in cells if c.op == "add_rms_norm"}
    assert sizes == {(tokens, hidden) for tokens in TOKENS for hidden in HIDDEN}
    assert len(cells) == len({(c.op, c.scheme, c.tokens, c.hidden) for c in cells})
    schemes = {c.scheme for c in cells if c.op == "gelu_mul_quantize" and c.hidden == 4096}
    assert schemes == set(SCHEMES)
    # Groups of 128 do not divide 2880.
    assert {c.scheme for c in cells if c.op == "quantize" and c.hidden == 2880} == set(SCHEMES) - {"fp8_group128"}
    for cell in cells:
        assert {"copy", "fusionpass", "inductor+pdl"} <= set(cell.ways)
        assert ("one element" in cell.ways) == (cell.tokens <= 64)
    # Widths come one after the other, so that what time leaves out is a width and not a bit of each.
    assert [c.hidden for c in cells if c.op == "rms_norm"] == sorted(
        [c.hidden for c in cells if c.op == "rms_norm"], key=HIDDEN.index
    )


def test_the_preset_has_every_cell_that_anchors_may_be_of(tmp_path):
    names = verdicts._names()
    path = tmp_path / "a.csv"
    lines = ["op,tokens,size,regime,implementation,percent_of_copy"]
    for name in names:
        size = {"silu": 12288}.get(name[:4], "32/8" if name.startswith("qk") else 4096)
        lines += [f"{name},{m},{size},{'warm' if m < 100 else 'cold'},x,50" for m in (1, 64, 1024, 8192)]
    # Nothing was measured of these.
    lines = [line for line in lines if "l_int8" not in line and "_g128_ue8m0" not in line.removeprefix("fp8")]
    path.write_text("\n".join(lines))
    best, unknown = verdicts.anchors(path)
    assert not unknown
    measured = {(c.op, c.scheme, c.tokens, c.hidden, regime) for c in table() for regime in c.regimes}
    assert best.keys() <= measured


def test_every_cell_can_be_sampled_and_planned():
    """On meta tensors: nothing is refused, and its arguments on a device would be the same but for their values."""
    kinds = {(c.op, c.scheme, c.hidden) for c in table() if c.tokens == 64}
    for name, scheme, hidden in kinds:
        op, also = named(name)
        (given,) = argument_sets(op, 64, hidden, torch.bfloat16, 1, scheme, also, "meta")
        assert left_to_inductor(op, given, SM90) is None, (name, scheme, hidden)


def test_arguments_without_data_lie_as_those_with(monkeypatch):
    empty = torch.empty_strided

    def on_cpu(*size, device=None, **rest):
        return empty(*size, device="cpu" if device == "cuda" else device, **rest)

    monkeypatch.setattr(torch, "empty_strided", on_cpu)
    for cell in table():
        if (cell.tokens, cell.hidden) in ((1, 4096), (1, 12288)):
            op, also = named(cell.op)
            size = (op, 1, cell.hidden, torch.bfloat16)
            (real,) = argument_sets(*size, 1, cell.scheme, also, "cpu")
            hollow = without_data(*size, cell.scheme, also)
            assert real.keys() == hollow.keys()
            for name, value in real.items():
                if isinstance(value, torch.Tensor):
                    assert (value.shape, value.stride(), value.dtype) == (
                        hollow[name].shape,
                        hollow[name].stride(),
                        hollow[name].dtype,
                    )
                else:
                    assert value == hollow[name]


def test_other_options_choose_cells_of_a_preset():
    options = parse(["--preset", "table", "--op", "rms_norm", "quantize", "--hidden", "8192", "--tokens", "1"])
    assert {(c.op, c.hidden, c.tokens) for c in options.cells} == {("rms_norm", 8192, 1), ("quantize", 8192, 1)}
    options = parse(["--preset", "table", "--scheme", "nvfp4", "--hidden", "5120"])
    assert {c.scheme for c in options.cells} == {None, "nvfp4"}


def test_without_a_preset_options_make_the_cells():
    cells = parse(["--op", "rms_norm", "quantize", "--scheme", "nvfp4", "--tokens", "2", "--hidden", "64"]).cells
    assert cells == [Cell("rms_norm", None, 2, 64, "both"), Cell("quantize", "nvfp4", 2, 64, "both")]
    assert {c.op for c in parse([]).cells} == {"add_rms_norm_quantize"}
    assert len({c.op for c in parse(["--op", "all"]).cells}) > 30


def test_tokens_of_a_decode_step_are_usually_warm():
    def chosen(tokens, regime, cold=30):
        return regimes(Cell("rms_norm", None, tokens, 64, regime), cold)

    assert chosen(64, "usual") == chosen(64, "warm") == {"warm": 1}
    assert chosen(1024, "usual") == chosen(1024, "cold") == {"cold": 30}
    assert chosen(1024, "usual", None) == {}
    assert chosen(64, "both") == {"warm": 1, "cold": 30}


def test_a_graph_has_as_many_calls_of_each_set():
    assert calls_for(1000, 1) == 256
    assert calls_for(200_000_000, 1) == 25
    assert calls_for(2_000_000_000, 2) == 16
    assert calls_for(2_000_000, 300) == 300
    assert calls_for(20_000_000, 7) == 252


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command with a clock of one second a size; gives the file and what was timed."""
    clock = [0.0]
    monkeypatch.setattr(kernels, "require_gpu", lambda: None)
    monkeypatch.setattr(kernels, "warm_up", lambda seconds=1.0: None)
    monkeypatch.setattr(kernels, "workers", nullcontext)
    monkeypatch.setattr(kernels.time, "monotonic", lambda: clock[0])
    compiled, timed = [], []

    def measure(cell, options):
        clock[0] += 1
        timed.append((cell.op, cell.scheme, cell.tokens))
        us = {"copy": 1.0, "fusionpass": 1.0, "inductorpluspdl": 1.2}
        made_ = [made(cell.op, cell.scheme, cell.tokens, cell.hidden, regime, **us) for regime in cell.regimes]
        return [{k: v for k, v in one.items() if k not in ("commit", "dtype")} for one in made_]

    monkeypatch.setattr(kernels, "measure", measure)
    monkeypatch.setattr(kernels, "in_processes", lambda work, each, pool, seconds: compiled.append((each, seconds)))

    def command(*arguments):
        timed.clear()
        compiled.clear()
        preset = [
            "--preset",
            "table",
            "--hidden",
            "8192",
            "--tokens",
            "1",
            "16",
            "--op",
            "rms_norm",
            "rms_norm_quantize",
        ]
        monkeypatch.setattr(sys, "argv", ["x", *preset, "--scheme", "nvfp4", "--out", str(tmp_path), *arguments])
        kernels.main()
        return json.loads((tmp_path / "kernels.json").read_text()), list(timed), list(compiled)

    return command


def test_a_run_compiles_an_op_in_all_its_forms_and_then_times_it(run, capsys):
    found, timed, compiled = run("--commit", "one")
    assert timed == [
        ("rms_norm", None, 1),
        ("rms_norm", None, 16),
        ("rms_norm_quantize", "nvfp4", 1),
        ("rms_norm_quantize", "nvfp4", 16),
    ]
    ((jobs, seconds),) = compiled
    assert {(way, op) for way, op, *_ in jobs} == {
        (way, op) for way in ("fusionpass", "inductor+pdl") for op in ("rms_norm", "rms_norm_quantize")
    }
    assert seconds is None
    assert len(found["cells"]) == 4
    assert {cell["commit"] for cell in found["cells"]} == {"one"}
    assert found["summary"]["bars"][2]["met"]
    assert found["summary"]["peers"]["flashinfer"] == "not installed"
    assert "flashinfer: not installed" in capsys.readouterr().out


def test_a_run_out_of_time_stops_and_is_taken_up_again(run, capsys):
    found, timed, _ = run("--commit", "one", "--budget", "3")
    assert len(timed) == len(found["cells"]) == 3
    assert (
        "left out for time, 1 sizes (--resume takes them up): rms_norm_quantize nvfp4 8192" in capsys.readouterr().out
    )
    found, timed, _ = run("--commit", "one", "--budget", "3", "--resume")
    assert timed == [("rms_norm_quantize", "nvfp4", 16)]
    assert len(found["cells"]) == 4
    assert run("--commit", "one", "--resume")[1] == []
    found, timed, _ = run("--commit", "two", "--resume")
    assert len(timed) == 4
    assert {cell["commit"] for cell in found["cells"]} == {"two"}
    assert found["summary"]["cells"] == 4


def test_figures_of_another_commit_are_not_judged(run, tmp_path):
    old = [made(tokens=tokens, hidden=64, commit="old", copy=1, fusionpass=2, inductorpluspdl=1) for tokens in (1, 2)]
    (tmp_path / "kernels.json").write_text(json.dumps({"cells": old}))
    found, _, _ = run("--commit", "new")
    assert len(found["cells"]) == 6
    assert found["summary"]["cells"] == 4


def test_work_that_takes_too_long_is_given_up():
    class Pool:
        def map(self, work, each, timeout):
            assert timeout == 2.0
            raise TimeoutError

    in_processes(print, [(1,)], Pool(), 2.0)


def test_the_copy_and_the_floor_are_bars():
    cells = [
        made(tokens=1024, regime="cold", copy=95.0, fusionpass=100.0),
        made(tokens=8192, regime="cold", copy=94.0, fusionpass=100.0),
        made(tokens=1024, regime="warm", copy=1.0, fusionpass=100.0),
        made(hidden=4096, one_element=0.5, fusionpass=1.1),
        made(hidden=5120, one_element=0.5, fusionpass=1.5),
        made(hidden=8192, one_element=0.5, fusionpass=1.6),
        made(hidden=2880, tokens=256, one_element=0.5, fusionpass=9.0),
    ]
    copied, floor, *_ = verdicts.summary(cells)["bars"]
    assert (copied["met"], copied["cells"], copied["failed"]) == (False, 2, 1)
    assert copied["worst"] == [{"cell": "rms_norm 8192 × 4096 cold", "value": 94.0}]
    assert (floor["met"], floor["cells"], floor["failed"]) == (False, 3, 1)
    assert floor["worst"] == [{"cell": "rms_norm 1 × 8192 warm", "value": 1.1}]


def test_slower_than_inductor_fails_unless_it_was_left_to_it():
    cells = [
        made(fusionpass=1.03, inductorpluspdl=1.0),
        made(tokens=2, fusionpass=1.04, inductorpluspdl=1.0),
        {**made(tokens=4, fusionpass=1.5, inductorpluspdl=1.0), "left": "measured faster"},
        made(tokens=8, fusionpass=1.0, inductorpluspdl=3.0),
        made(tokens=16, fusionpass=1.0),
    ]
    bar = verdicts.summary(cells)["bars"][2]
    assert (bar["met"], bar["cells"], bar["failed"]) == (False, 4, 1)
    assert bar["worst"] == [{"cell": "rms_norm 2 × 4096 warm", "value": 1.04}]
    assert bar["left"] == ["rms_norm 4 × 4096 warm"]
    assert bar["geomean"] == round((3 / 1.03 / 1.04 / 1.5) ** 0.25, 4)


def test_anchors_are_the_best_of_each_cell(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        "op,tokens,size,regime,implementation,us,same_size_copy_us,percent_of_copy,min_bytes\n"
        "rms_norm,1,4096,warm,a,2,1,50.0,9\n"
        "rms_norm,1,4096,warm,b,2,1,60.0,9\n"
        "rms_int8_token,64,4096,warm,a,2,1,40.0,9\n"
        'qk_norm_rope_kv,64,32/8,warm,"b(+k,v out)",2,1,30.0,9\n'
        "fp8_g128_ue8m0,64,4096,warm,b,2,1,30.0,9\n"
        "unheard_of,64,4096,warm,b,2,1,30.0,9\n"
    )
    best, unknown = verdicts.anchors(path)
    assert best[("rms_norm", None, 1, 4096, "warm")] == (60.0, "b")
    assert ("qk_norm_rope_cache", None, 64, 4096, "warm") in best
    assert ("quantize", "fp8_group128,scale_dtype=float8_e8m0fnu", 64, 4096, "warm") in best
    assert unknown == ["unheard_of"]
    cells = [
        made(copy=57.0, fusionpass=100.0),
        made("rms_norm_quantize", "int8_token", 64, copy=80.0, fusionpass=100.0),
    ]
    bar = verdicts.summary(cells, path)["bars"][3]
    assert (bar["met"], bar["cells"], bar["failed"]) == (True, 2, 0)
    assert bar["geomean"] == round((0.95 * 2) ** 0.5, 4)
    assert len(bar["not measured"]) == 2
    assert bar["no such op"] == ["unheard_of"]
    slower = verdicts.summary([made(copy=56.0, fusionpass=100.0)], path)["bars"][3]
    assert (slower["met"], slower["failed"]) == (False, 1)
    # No cell behind, but not by so much in front.
    assert verdicts.summary([made(copy=70.0, fusionpass=100.0)], path)["bars"][3]["met"] is False


def test_verdicts_are_printed(tmp_path, monkeypatch, capsys):
    cell = {**made(tokens=1024, regime="cold", copy=90.0, fusionpass=100.0), "wrong": {"vllm": "AssertionError: far"}}
    (tmp_path / "k.json").write_text(json.dumps({"cells": [cell]}))
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "k.json")])
    verdicts.main()
    text = capsys.readouterr().out
    assert "NOT met: cold, from 1024 tokens: ≥ 95 % of a copy's speed (1 of 1 cells fail)" in text
    assert "90.000  rms_norm 1024 × 4096 cold" in text
    assert "nothing measured: warm, up to 64 tokens" in text
    assert "wrong: rms_norm 1024 × 4096 cold: vllm: AssertionError: far" in text


def cpu_sets(name, scheme=None, count=1):
    op, also = named(name)
    return argument_sets(op, 4, 256, torch.bfloat16, count, scheme, also, "cpu")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_outputs_are_checked_against_float64(scheme):
    op, _ = named("add_rms_norm_quantize")
    (arguments,) = cpu_sets("add_rms_norm_quantize", scheme)
    check, outputs = checker(op, arguments), op.reference(**arguments)
    assert check(outputs) < 0.2
    with pytest.raises(AssertionError, match="from float64"):
        check([outputs[0].view(torch.uint8).flip(0).view(outputs[0].dtype), *outputs[1:]])
    with pytest.raises(AssertionError, match="outputs, not"):
        check(outputs[:-1])


def test_what_is_wrong_is_said_and_not_timed(monkeypatch):
    sets = cpu_sets("rms_norm")
    right = sets[0]["x"].float() * (sets[0]["x"].float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    def broken():
        raise OSError("no such device")

    found = {
        "liger": {("rms_norm", None): lambda a: lambda: [(right * a["weight"]).bfloat16()]},
        "quack": {("rms_norm", None): lambda a: lambda: [right.bfloat16()]},
        "vllm": {("rms_norm", None): lambda a: broken},
        "torchao": {},
        "helion": "not installed",
    }
    monkeypatch.setattr(peers, "kernels", found.get)
    cell = Cell("rms_norm", None, 4, 256, "warm", ("eager", "copy"))
    calls, errors, wrong = checked(cell, sets, ["eager", "inductor", *found], SM90)
    assert calls.keys() == {"eager", "liger"} == errors.keys()
    assert wrong["vllm"] == "OSError: no such device"
    assert "from float64" in wrong["quack"]


def test_inductor_is_held_to_the_same(monkeypatch):
    monkeypatch.setitem(
        kernels.IMPLEMENTATIONS, "inductor", lambda op, sets, arch: lambda i: [torch.zeros_like(sets[i]["x"])]
    )
    cell = Cell("rms_norm", None, 4, 256, "warm")
    assert "from float64" in checked(cell, cpu_sets("rms_norm"), ["inductor"], SM90)[2]["inductor"]


def rms(x, weight, eps):
    return (x.float() * (x.float().square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()).to(x.dtype)


def static(y, scale):
    return (y.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def computed(y, group=None, dtype=torch.float8_e4m3fn):
    y = y.float().unflatten(-1, (-1, group or y.shape[-1]))
    most = 448.0 if dtype.is_floating_point else 127.0
    scales = y.abs().amax(-1, keepdim=True) / most
    codes = y / scales
    codes = codes if dtype.is_floating_point else codes.round()
    return codes.clamp(-most, most).to(dtype).flatten(-2), scales.squeeze(-1)


def layer(x, weight, bias, eps):
    return torch.nn.functional.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(x.dtype)


def gated(row, act=torch.nn.functional.silu):
    gate, up = row.float().chunk(2, -1)
    return (act(gate) * up).to(row.dtype)


def fake_flashinfer():
    def fused_add_rmsnorm(input, residual, weight, eps=1e-6, enable_pdl=None):
        residual += input
        input.copy_(rms(residual, weight, eps))

    def fused_add_rmsnorm_quant(out, input, residual, weight, scale, eps=1e-6, enable_pdl=None):
        residual += input
        out.copy_(static(rms(residual, weight, eps), scale))

    def blocks(out, block_scale, normed_out, input, residual, weight, eps=1e-6, enable_pdl=None):
        residual += input
        normed_out.copy_(rms(residual, weight, eps))
        q, scales = computed(normed_out, 128)
        out.copy_(q)
        assert block_scale.is_contiguous()
        block_scale.t()[: len(q)].copy_(scales)

    def layernorm_quant(out, input, gemma, beta, scale, eps=1e-6):
        assert gemma.dtype == beta.dtype == torch.float32
        out.copy_(static(layer(input, gemma, beta, eps), scale))

    norm = types.SimpleNamespace(
        rmsnorm=lambda input, weight, eps=1e-6, out=None, enable_pdl=None: out.copy_(rms(input, weight, eps)),
        rmsnorm_quant=lambda out, input, weight, scale, eps=1e-6, enable_pdl=None: out.copy_(
            static(rms(input, weight, eps), scale)
        ),
        fused_add_rmsnorm=fused_add_rmsnorm,
        fused_add_rmsnorm_quant=fused_add_rmsnorm_quant,
        fused_add_rmsnorm_fp8_block_quant=blocks,
        layernorm=lambda input, gemma, beta, eps=1e-6: layer(input, gemma, beta, eps),
        layernorm_quant=layernorm_quant,
    )
    activation = types.SimpleNamespace(
        silu_and_mul=lambda input, out=None, enable_pdl=None: out.copy_(gated(input)),
        gelu_and_mul=lambda input, out=None, enable_pdl=None: out.copy_(gated(input, torch.nn.functional.gelu)),
    )
    return types.SimpleNamespace(norm=norm, activation=activation)


def fake_vllm():
    def rms_norm_dynamic_per_token_quant(result, input, weight, scale, epsilon, scale_ub, residual):
        if residual is not None:
            residual += input
            input = residual
        for into, value in zip((result, scale), computed(rms(input, weight, epsilon), None, result.dtype), strict=True):
            into.copy_(value)

    def rms_norm_per_block_quant(
        result, input, weight, scale, epsilon, scale_ub, residual, group_size, is_scale_transposed
    ):
        assert (group_size, is_scale_transposed) == (128, False)
        if residual is not None:
            residual += input
            input = residual
        for into, value in zip((result, scale), computed(rms(input, weight, epsilon), group_size), strict=True):
            into.copy_(value)

    def both(result, scales, y, group=None):
        for into, value in zip((result, scales), computed(y, group, result.dtype), strict=True):
            into.copy_(value)

    def group_fp8(input, q, s, group, eps, low, high, ue8m0, transposed, aligned):
        assert (low, high, ue8m0, transposed, aligned) == (-448.0, 448.0, False, False, False)
        both(q, s, input, group)

    fi = fake_flashinfer().norm
    return types.SimpleNamespace(
        rms_norm=lambda result, input, weight, epsilon: result.copy_(rms(input, weight, epsilon)),
        fused_add_rms_norm=lambda input, residual, weight, epsilon: fi.fused_add_rmsnorm(
            input, residual, weight, epsilon
        ),
        rms_norm_static_fp8_quant=lambda result, input, weight, scale, epsilon: fi.rmsnorm_quant(
            result, input, weight, scale, epsilon
        ),
        fused_add_rms_norm_static_fp8_quant=lambda result, input, residual, weight, scale, epsilon: (
            fi.fused_add_rmsnorm_quant(result, input, residual, weight, scale, epsilon)
        ),
        rms_norm_dynamic_per_token_quant=rms_norm_dynamic_per_token_quant,
        rms_norm_per_block_quant=rms_norm_per_block_quant,
        silu_and_mul=lambda result, input: result.copy_(gated(input)),
        gelu_and_mul=lambda out, input: out.copy_(gated(input, torch.nn.functional.gelu)),
        silu_and_mul_quant=lambda result, input, scale: result.copy_(static(gated(input), scale)),
        silu_and_mul_per_block_quant=lambda out, input, scales, group_size: both(out, scales, gated(input), group_size),
        static_scaled_fp8_quant=lambda result, input, scale: result.copy_(static(input, scale)),
        dynamic_per_token_scaled_fp8_quant=lambda result, input, scale, scale_ub: both(result, scale, input),
        dynamic_scaled_int8_quant=lambda result, input, scale, azp: both(result, scale, input),
        per_token_group_fp8_quant=group_fp8,
    )


def fake_liger(monkeypatch):
    forwards = {
        "rms_norm": {
            "rms_norm_forward": lambda X, W, eps, offset, casting_mode, row_mode: (rms(X, W, eps), X, None, 1, 1, 0)
        },
        "fused_add_rms_norm": {
            "fused_add_rms_norm_forward": lambda X, R, W, eps, offset, casting_mode: (
                rms(X + R, W, eps),
                X + R,
                None,
                1,
                1,
                1,
                casting_mode,
            )
        },
        "layer_norm": {"layer_norm_forward": lambda X, W, B, eps: (layer(X, W, B, eps), X, None, None, 1, 1)},
        "swiglu": {"swiglu_forward": lambda a, b: torch.nn.functional.silu(a) * b},
    }
    for name, functions in forwards.items():
        monkeypatch.setitem(sys.modules, f"fake_liger.{name}", types.SimpleNamespace(**functions))
    return types.SimpleNamespace(__name__="fake_liger")


def fake_quack():
    def rmsnorm_fwd(x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6):
        total = x if residual is None else x + residual
        return rms(total, weight, eps), total, None

    def layernorm_fwd(x, weight, bias=None, eps=1e-6):
        assert weight.dtype == bias.dtype == torch.float32
        return layer(x, weight, bias, eps)

    return types.SimpleNamespace(rmsnorm_fwd=rmsnorm_fwd, layernorm_fwd=layernorm_fwd)


def fake_helion():
    def import_path(path):
        kernels_ = {
            "rms_norm.py": {"rms_norm_fwd": lambda x, weight, eps: (rms(x, weight, eps), None)},
            "swiglu.py": {
                "swiglu_fwd": lambda a, b: torch.nn.functional.silu(a.view(-1)).mul(b.view(-1)).view(a.shape)
            },
        }
        return types.SimpleNamespace(**kernels_[path.name])

    return types.SimpleNamespace(EXAMPLES_DIR=__import__("pathlib").Path("examples"), import_path=import_path)


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_gets_its_arguments_and_gives_the_ops_outputs(name, monkeypatch):
    monkeypatch.setattr(torch.ops, "_C", fake_vllm(), raising=False)
    module = {
        "flashinfer": fake_flashinfer,
        "liger": lambda: fake_liger(monkeypatch),
        "quack": fake_quack,
        "vllm": lambda: None,
        "torchao": lambda: types.SimpleNamespace(fp8_blockwise_act_quant=lambda x, block_size: computed(x, block_size)),
        "helion": fake_helion,
    }[name]()
    found = peers.PEERS[name].kernels(module)
    assert found
    for (op_name, scheme), make in found.items():
        op, _ = named(op_name)
        first, second = cpu_sets(op_name, scheme, 2)
        kept = {k: v.clone() for k, v in first.items() if isinstance(v, torch.Tensor)}
        call = make(first)
        checker(op, first)(call())
        call()
        # Others run on the same arguments.
        assert all(torch.equal(v, first[k]) for k, v in kept.items()), (op_name, scheme)
        checker(op, second)(make(second)())


def test_a_peer_that_is_not_there_is_named_with_the_reason(monkeypatch):
    monkeypatch.setattr(
        peers,
        "PEERS",
        {
            "gone": peers.Peer("no_such_library.part", lambda module: {}),
            "broken": peers.Peer("json", lambda module: module.no_such_name),
            "there": peers.Peer("json", lambda module: {("rms_norm", None): lambda a: lambda: [a["x"]]}),
        },
    )
    peers.kernels.cache_clear()
    assert peers.missing() == {
        "gone": "not installed",
        "broken": "AttributeError: module 'json' has no attribute 'no_such_name'",
    }
    sets = cpu_sets("rms_norm", count=2)
    call = peers.peer("there", "rms_norm", None, sets)
    assert call(1)[0] is sets[1]["x"]
    assert peers.peer("there", "rms_norm_quantize", "nvfp4", sets) is None
    assert peers.peer("gone", "rms_norm", None, sets) is None
    peers.kernels.cache_clear()


def test_plots_are_a_file_an_op_and_always_the_same(tmp_path):
    plot = pytest.importorskip("bench.plot", exc_type=ImportError)
    cells = [
        made(
            op, scheme, tokens, 4096, regime, copy=1.0, fusionpass=1.1, inductorpluspdl=1.5, one_element=0.5, liger=2.0
        )
        for op, scheme in (("rms_norm", None), ("quantize", "nvfp4"), ("quantize", "mxfp8"))
        for tokens, regime in ((1, "warm"), (64, "warm"), (64, "cold"), (1024, "cold"))
    ]
    (tmp_path / "kernels.json").write_text(json.dumps({"cells": [*cells, made("silu_mul", fusionpass=1.0)]}))
    work = {"decode, batch 1": {"default": {"us": 80.0}, "fusionpass": {"us": 40.0}}}
    (tmp_path / "e2e.json").write_text(json.dumps({"device": "Some GPU", "layers": 8, "work": work}))
    found = []
    for out in ("a", "b"):
        plot.main(["--results", str(tmp_path), "--out", str(tmp_path / out)])
        found.append({path.name: path.read_text() for path in (tmp_path / out).iterdir()})
    assert found[0] == found[1]
    assert found[0].keys() == {"kernels-rms_norm-4096.svg", "kernels-quantize-4096.svg", "layer.svg"}
    assert all(text in found[0]["kernels-quantize-4096.svg"] for text in (">nvfp4<", ">mxfp8<", ">liger<", ">1024<"))
    assert ">10<" in found[0]["layer.svg"].replace(" ", "")
    assert ">Some GPU<" in found[0]["layer.svg"]


def test_what_is_drawn_is_this_gpus_or_the_only_one(tmp_path, monkeypatch):
    plot = pytest.importorskip("bench.plot", exc_type=ImportError)
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="there is none"):
        plot.measured()
    (tmp_path / "one").mkdir()
    assert plot.measured() == tmp_path / "one"
    (tmp_path / "two").mkdir()
    with pytest.raises(FileNotFoundError, match=r"--results: .*one, .*two"):
        plot.measured()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    assert plot.measured() == tmp_path / "some-gpu"


def test_a_line_has_the_regime_that_models_meet():
    plot = pytest.importorskip("bench.plot", exc_type=ImportError)
    cells = [
        made(tokens=tokens, regime=regime, copy=1.0, fusionpass=us)
        for tokens, regime, us in ((1024, "cold", 2.0), (1024, "warm", 4.0), (64, "warm", 5.0), (64, "cold", 8.0))
    ]
    assert plot.lines(cells) == {"fusionpass": [(64, 20.0), (1024, 50.0)]}


def test_the_sample_has_every_kernel_in_every_scheme():
    names = [title for title, *_ in samples("cpu")]
    assert len(names) == len(set(names)) > 100
    assert any("nvfp4" in name for name in names)
    assert any(name.startswith("experts") for name in names)
    assert {rms_norm_quantize.name, "attention"} <= {name.split()[0] for name in names}
