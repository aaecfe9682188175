import dataclasses
import os
from pathlib import Path

import pytest
import torch

import fusionpass
from fusionpass import Arch, Config, Spelling, pipeline
from fusionpass.config import _can_be_disabled
from fusionpass.errors import ArchError, ConfigError
from fusionpass.ops import rms_norm
from fusionpass.report import GraphTrace


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("FUSIONPASS_")]:
        monkeypatch.delenv(name)


def test_defaults():
    assert dataclasses.asdict(Config()) == {
        "disable": frozenset(),
        "numerics": "fast",
        "cuda_graphs": "auto",
        "capture_sizes": None,
        "boundaries": frozenset(),
        "graph_limit": 64,
        "graph_memory": None,
        "cache": True,
        "traces": None,
        "cache_dir": None,
        "guards": "all",
        "on_miss": "ignore",
        "verify": False,
        "dump_dir": None,
        "target": None,
        "gemm": {},
        "rules": (),
    }
    assert Config.make() == Config()


RULE = Spelling("mine.norm", rms_norm, rms_norm.reference)
VALUES = [
    ("disable", {"norm.llama"}, frozenset({"norm.llama"})),
    ("disable", ["fuse", "triton", "fuse"], frozenset({"fuse", "triton"})),
    ("disable", (name for name in ["add_rms_norm"]), frozenset({"add_rms_norm"})),
    ("numerics", "eager", "eager"),
    ("verify", True, True),
    ("cuda_graphs", "off", "off"),
    ("guards", "inputs", "inputs"),
    ("on_miss", "warn", "warn"),
    ("on_miss", "error", "error"),
    ("dump_dir", "some/folder", Path("some/folder")),
    ("dump_dir", Path("some/folder"), Path("some/folder")),
    ("target", Arch("sm_90"), Arch("sm_90")),
    ("rules", [RULE], (RULE,)),
]


@pytest.mark.parametrize(("field", "value", "kept"), VALUES)
def test_every_field(field, value, kept):
    made = Config.make(None, {field: value})
    assert getattr(made, field) == kept
    assert type(getattr(made, field)) is type(kept)
    others = {f.name for f in dataclasses.fields(Config)} - {field}
    assert all(getattr(made, name) == getattr(Config(), name) for name in others)
    assert len({made, Config()}) == 2, "a config is hashable, and another one"


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().numerics = "eager"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"numerics": "eagre"}, "numerics='eagre' does not exist. Did you mean 'eager'"),
        ({"numerics": None}, "numerics=None does not exist. Known: eager, fast"),
        ({"cuda_graphs": "of"}, "cuda_graphs='of' does not exist. Did you mean 'off'"),
        ({"cuda_graphs": True}, "cuda_graphs=True does not exist"),
        ({"guards": "none"}, "guards='none' does not exist. Known: all, inputs"),
        ({"on_miss": "raise"}, "on_miss='raise' does not exist. Known: error, ignore, warn"),
        ({"on_miss": ["warn"]}, "on_miss=.* does not exist"),
        ({"disable": "norm.llama"}, "disable='norm.llama' is not a collection of names. Pass {\"norm.llama\"}"),
        ({"disable": None}, "disable=None is not a collection"),
        ({"disable": 3}, "disable=3 is not a collection"),
        ({"disable": {1}}, r"disable=\{1\} is not a collection"),
        ({"disable": {"norm.lama"}}, "disable names 'norm.lama', which does not exist. Did you mean 'norm.llama'"),
        ({"disable": {"fuse", "tritn"}}, "disable names 'tritn'.*Did you mean 'triton'"),
        ({"disable": {"lower"}}, "disable names 'lower'"),
        ({"dump_dir": 3}, "dump_dir=3 is not a path"),
        ({"target": "sm_90"}, r"target='sm_90' is not an Arch. Pass fusionpass.Arch"),
        ({"target": torch.device("cuda")}, "is not an Arch"),
        ({"rules": RULE}, "rules=.* is not a collection of rules"),
        ({"rules": ["norm.llama"]}, r"rules=\['norm.llama'\] is not a collection of rules"),
        ({"disable": {"mine.norm"}}, "disable names 'mine.norm', which does not exist"),
        ({"cuda_graphs": "pieces"}, "cuda_graphs='pieces' does not exist. Did you mean 'piecewise'"),
        ({"capture_sizes": (0, 8)}, r"capture_sizes=\(0, 8\) is not a collection of token counts"),
        ({"capture_sizes": ()}, r"capture_sizes=\(\) is not a collection of token counts"),
        ({"boundaries": "lib::op"}, "boundaries='lib::op' is not a collection of names"),
        ({"graph_limit": 0}, "graph_limit=0 is not an int of at least 1"),
        ({"graph_limit": None}, "graph_limit=None is not an int of at least 1"),
        ({"graph_memory": -1}, "graph_memory=-1 is not an int of at least 0"),
        ({"cache": "yes"}, "cache='yes' is not a bool"),
        ({"cache_dir": 3}, "cache_dir=3 is not a path"),
        ({"numeric": "eager"}, "there is no option 'numeric'. Did you mean 'numerics'"),
        ({"dumpdir": "x"}, "there is no option 'dumpdir'. Did you mean 'dump_dir'"),
        ({"zzz": 1}, "there is no option 'zzz'. Known: boundaries, cache, "),
    ],
)
def test_mistakes(overrides, message):
    with pytest.raises(ConfigError, match=f"Config: .*{message}"):
        Config.make(None, overrides)


@pytest.mark.parametrize("call", [fusionpass.compile, lambda f, **o: fusionpass.dynamo_backend(None, [], options=o)])
def test_a_mistake_is_told_before_anything_is_compiled(call):
    with pytest.raises(ConfigError, match="Did you mean 'numerics'"):
        call(torch.nn.Identity(), numeric="eager")
    with pytest.raises(ConfigError, match=r"Did you mean 'norm\.llama'"):
        call(torch.nn.Identity(), disable={"norm.lama"})


def test_what_can_be_disabled_is_what_exists():
    trace = GraphTrace(0)
    passes = {name for name, _ in (*pipeline.early(Config(), trace), *pipeline.late(Config(), trace))}
    known = _can_be_disabled()
    assert passes - known == {"lower", "cleanup"}
    assert known >= {"norm.llama", "norm.add_quantize", "quant.fp8_static", "add_rms_norm", "quantize", "triton"}
    assert Config.make(None, {"disable": known}).disable == known


ENVIRONMENT = [
    ("DISABLE", "norm.llama", "disable", frozenset({"norm.llama"})),
    ("DISABLE", " norm.llama, fuse ,,", "disable", frozenset({"norm.llama", "fuse"})),
    ("NUMERICS", "eager", "numerics", "eager"),
    ("CUDA_GRAPHS", "off", "cuda_graphs", "off"),
    ("GUARDS", "inputs", "guards", "inputs"),
    ("ON_MISS", "error", "on_miss", "error"),
    ("DUMP_DIR", "some/folder", "dump_dir", Path("some/folder")),
    ("TARGET", "gfx942", "target", Arch("gfx942")),
    ("NUMERICS", "", "numerics", "fast"),
    ("VERIFY", "1", "verify", True),
    ("VERIFY", "false", "verify", False),
    ("CAPTURE_SIZES", "64, 1,8", "capture_sizes", (1, 8, 64)),
    ("BOUNDARIES", "lib::op, lib::other", "boundaries", frozenset({"lib::op", "lib::other"})),
    ("GRAPH_LIMIT", "3", "graph_limit", 3),
    ("GRAPH_MEMORY", "300", "graph_memory", 300),
    ("CACHE", "1", "cache", True),
    ("TRACES", "1", "traces", True),
    ("CACHE_DIR", "some/folder", "cache_dir", Path("some/folder")),
    ("GEMM", "mxfp8=triton, nvfp4 = cublas", "gemm", {"mxfp8": "triton", "nvfp4": "cublas"}),
]


def test_the_environment_reaches_every_field():
    assert {field for _, _, field, _ in ENVIRONMENT} == {f.name for f in dataclasses.fields(Config)} - {"rules"}


@pytest.mark.parametrize(("variable", "text", "field", "value"), ENVIRONMENT)
def test_environment(monkeypatch, variable, text, field, value):
    monkeypatch.setenv(f"FUSIONPASS_{variable}", text)
    assert getattr(Config.make(), field) == value
    assert getattr(Config(), field) == getattr(Config.make(Config()), field), "only make reads the environment"


@pytest.mark.parametrize(
    ("variable", "text", "error", "message"),
    [
        ("NUMERICS", "eagre", ConfigError, "Did you mean 'eager'"),
        ("GEMM", "mxfp8", ConfigError, "gemm names '', no algorithm of mxfp8"),
        ("GEMM", "mxfp=triton", ConfigError, "Did you mean 'mxfp8'"),
        ("VERIFY", "perhaps", ConfigError, "verify='perhaps' is not a bool"),
        ("ON_MISS", "fail", ConfigError, "on_miss='fail' does not exist"),
        ("DISABLE", "norm.lama", ConfigError, "Did you mean 'norm.llama'"),
        ("TARGET", "sm90", ArchError, "Did you mean 'sm_90'"),
        ("CAPTURE_SIZES", "1,many", ConfigError, "is not a collection of token counts"),
        ("GRAPH_LIMIT", "few", ConfigError, "graph_limit='few' is not an int"),
    ],
)
def test_mistakes_in_the_environment(monkeypatch, variable, text, error, message):
    monkeypatch.setenv(f"FUSIONPASS_{variable}", text)
    with pytest.raises(error, match=message):
        Config.make()


def test_precedence(monkeypatch):
    monkeypatch.setenv("FUSIONPASS_NUMERICS", "eager")
    monkeypatch.setenv("FUSIONPASS_ON_MISS", "warn")
    made = Config.make(None, {"numerics": "fast"})
    assert (made.numerics, made.on_miss) == ("fast", "warn"), "an override wins, the rest is the environment's"
    given = Config.make(Config(on_miss="error"), {"cuda_graphs": "off"})
    assert (given.numerics, given.on_miss, given.cuda_graphs) == ("fast", "error", "off"), "a config is complete"
