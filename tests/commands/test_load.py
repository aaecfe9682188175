"""What a command takes for a model, and what it says of what is none."""

import json

import pytest
import torch
from torch import nn

from fusionpass import Arch, Config
from fusionpass.commands.load import load
from fusionpass.errors import ModelError
from fusionpass.quantize import QuantizedLinear
from tests.report.stack import Stack, rows

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64, "dtype": "bfloat16",
}  # fmt: skip
SM90 = Config(target=Arch("sm_90"))


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_a_folder_with_a_configuration(folder):
    found = load(str(folder), 7)
    assert {p.device.type for p in found.model.parameters()} == {"meta"}
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}
    assert not found.model.training
    assert found.args[0].shape == (1, 7)
    assert found.name == folder.name
    assert found.notes == ["7 tokens", "no weights"]
    report = found.explain(SM90)
    assert (report.count("rms_norm"), report.count("add_rms_norm"), report.count("silu_mul")) == (1, 4, 2)


def test_a_folder_with_weights_only_where_they_are_asked_for(folder):
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).to(torch.bfloat16)
    model.save_pretrained(folder)
    loaded = load(str(folder), 7, weights=True).model
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert next(load(str(folder), 7).model.parameters()).is_meta


def test_weights_at_random_where_there_are_none(folder):
    found = load(str(folder), 7, weights=True)
    assert found.notes == ["7 tokens", "weights at random"]
    assert found.model(*found.args, **found.kwargs).logits.shape == (1, 7, 64)


def test_a_quantisation_in_the_configuration_is_told(folder):
    quantised = {**CONFIG, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (folder / "config.json").write_text(json.dumps(quantised))
    found = load(str(folder), 7)
    assert "not quantised, since its own quantisation needs its weights: see --scheme" in found.notes


def test_a_factory():
    found = load("tests.commands.factories:stack", 16)
    assert isinstance(found.model, Stack)
    assert found.name == "Stack"
    assert found.explain(SM90).count("scaled_mm") == 4
    assert load("tests.commands.factories:keyword", 16).explain(SM90).count("rms_norm_quantize") == 1
    assert load("tests.commands.factories:function", 16).explain(SM90).count("silu_mul") == 1


def test_a_factory_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "mine_for_load.py").write_text("import torch\ndef f():\n    return torch.relu, (torch.ones(3),)\n")
    monkeypatch.chdir(tmp_path)
    assert load("mine_for_load:f", 16).name == "relu"


def test_a_saved_program_knows_its_modules(tmp_path):
    torch.manual_seed(0)
    program = torch.export.export(Stack(3), (rows(),))
    torch.export.save(program, tmp_path / "stack.pt2")
    found = load(str(tmp_path / "stack.pt2"), 16)
    report = found.explain(SM90)
    assert found.name == "stack"
    assert (report.count("rms_norm_quantize"), report.count("add_rms_norm_quantize")) == (1, 2)
    assert [record.where for record in report.fused if "norm" in record.op] == [
        "layers.0.norm", "layers.1.norm", "layers.2.norm", "norm",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/folder", "there is no such folder or file"),
        ("tests.commands.nowhere:f", "No module named"),
        ("tests.commands.factories:nothing", "has no attribute 'nothing'"),
        ("tests.commands.factories:bare", "Stack is not called with token ids alone"),
        ("tests.commands.factories:wrong", "returned neither a model"),
        ("README.md", "torch.export cannot load it"),
        ("tests", "there is no config.json"),
    ],
)
def test_what_is_no_model(name, message):
    with pytest.raises(ModelError, match=message):
        load(name, 16)


def test_linears_are_quantised_but_the_head(folder):
    found = load(str(folder), 16)
    found.quantize("fp8_token")
    assert isinstance(found.model.lm_head, nn.Linear)
    assert isinstance(found.model.model.layers[0].mlp.up_proj, QuantizedLinear)
    assert found.notes[-1] == "its linears quantised as fp8_token, but lm_head"
    assert found.explain(SM90).count("add_rms_norm_quantize", scheme="fp8_token") == 3


def test_a_measured_scheme_wants_data(folder):
    with pytest.raises(ModelError, match="neither weights nor data"):
        load(str(folder), 16).quantize("fp8_static")
    found = load("tests.commands.factories:linear", 16)
    found.quantize("fp8_static", [])
    assert found.explain(SM90).count("silu_quantize", scheme="fp8_static") == 1
    with pytest.raises(ModelError, match="only a module"):
        load("tests.commands.factories:function", 16).quantize("fp8_token")
