"""The sizes of models, and `fusionpass tune`'s options."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fusionpass.cli import main
from fusionpass.errors import TuningError
from fusionpass.tuning.models import Model, read

pytest.importorskip("triton")

QWEN3_8B = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128,
}  # fmt: skip
LLAMA3_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
QWEN3_30B_A3B = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
}  # fmt: skip
DEEPSEEK_V3 = {
    "hidden_size": 7168, "intermediate_size": 18432, "num_attention_heads": 128, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1,
    "first_k_dense_replace": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "tp", "products", "experts"),
    [
        (QWEN3_8B, 1, {(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)}, (0, 0, 0)),
        (LLAMA3_70B, 1, {(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)}, (0, 0, 0)),
        (LLAMA3_70B, 8, {(1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584)}, (0, 0, 0)),
        (LLAMA3_70B, 16, {(768, 8192), (8192, 512), (3584, 8192), (8192, 1792)}, (0, 0, 0)),
        (QWEN3_30B_A3B, 1, {(5120, 2048), (2048, 4096)}, (128, 8, 768)),
        (
            DEEPSEEK_V3, 8,
            {
                (2112, 7168), (3072, 1536), (4096, 512), (7168, 2048), (512, 7168), (7168, 256), (4608, 7168),
                (7168, 2304),
            },
            (256, 8, 256),
        ),
        ({"text_config": QWEN3_8B}, 2, {(3072, 4096), (4096, 2048), (12288, 4096), (4096, 6144)}, (0, 0, 0)),
    ],
)  # fmt: skip
def test_sizes(config: dict[str, Any], tp: int, products: set[Any], experts: tuple[int, int, int]) -> None:
    made = Model.of(config, tp)
    assert {(n, k) for _, n, k in made.products()} == products
    assert (made.experts, made.top, made.expert_inner) == experts


def test_of_a_file_and_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN3_8B))
    assert read(str(path), 1) == read(str(tmp_path), 1) == Model.of(QWEN3_8B)


@pytest.mark.parametrize(
    ("text", "tp", "message"),
    [
        ("{", 1, "it cannot be read"),
        ("[]", 1, "it holds a list"),
        ('{"hidden_size": 8}', 1, "its configuration has no 'num_attention_heads'"),
        (json.dumps(QWEN3_8B), 3, r"is 12288|num_attention_heads is 32, no multiple of 3"),
        (json.dumps({**QWEN3_8B, "intermediate_size": 100}), 8, "the dense MLP is 100, no multiple of 8"),
    ],
)
def test_mistakes_of_files(tmp_path: Path, text: str, tp: int, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(TuningError, match=message):
        read(str(path), tp)


def test_no_such_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TuningError, match="there is no file 'nobody/nothing', nor such a model in the cache"):
        read("nobody/nothing", 1)


def test_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN3_8B))
    sizes = ["--batch-sizes", "8", "64", "--gpus", "2"]
    assert main(["tune", "--dry-run", "--op", "block_scaled_mm", "--model", str(path), *sizes]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("M=8") == told.count("M=64") == 4
    assert "pruned" in told
    assert "2 GPU(s): about" in told
    assert "no order takes less than" in told


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["--N", "512", "--K", "512"], {"block_scaled_mm"}),
        (["--N", "512", "--K", "512", "--input-type", "fp8_token"], {"scaled_mm"}),
        (["--N", "512", "--K", "512", "--input-type", "bf16"], {"linear"}),
        (["--N", "256", "--K", "512", "--E", "8", "--input-type", "bf16"], {"experts"}),
        (["--width", "1024", "--input-type", "bf16"], {"rms_norm", "add_rms_norm", "silu_mul"}),
    ],
)
def test_kernels_that_the_sizes_fit(options: list[str], count: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--dry-run", "--batch-sizes", "8", *options]) == 0
    told = set(capsys.readouterr().out.split())
    names = {"block_scaled_mm", "scaled_mm", "linear", "experts", "rms_norm", "add_rms_norm", "silu_mul"}
    assert names & told == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--op", "rms_nrom"], "there is no kernel 'rms_nrom' to tune. Did you mean 'rms_norm'"),
        (["--block-n", "64"], "blocks of 64 by 128 have no kernel"),
        (["--batch-sizes", "0"], "0 rows"),
        ([], "no kernel has these sizes for inputs of fp8"),
        (["--width", "4096", "--op", "block_scaled_mm"], "no kernel has these sizes"),
    ],
)
def test_mistakes_of_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--dry-run", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--width", "4096"]) == 2
    assert "there is no GPU" in capsys.readouterr().err
