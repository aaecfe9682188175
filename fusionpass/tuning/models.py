"""The sizes of a model, from its Hugging Face configuration."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TuningError


@dataclass(frozen=True)
class Model:
    """What one of the GPUs that share a model has of it.

    Attributes:
        hidden: columns of the residual stream.
        inner: columns between the products of a dense MLP, or of the shared experts; 0: there is none.
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: columns of each.
        experts: how many there are; 0: none.
        top: of them for each token.
        expert_inner: columns between the products of an expert.
        latent: of DeepSeek's attention, columns of what queries, and keys and values, are made from, those that rotate,
            those that do not, and those of values; None: it is not of that kind.
        dense: columns between the products of a dense MLP beside the shared experts'; 0: there is none.
        qk_norm: whether queries and keys are normalised by the head.
    """

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int = 0
    top: int = 0
    expert_inner: int = 0
    latent: tuple[int, int, int, int, int] | None = None
    dense: int = 0
    qk_norm: bool = False

    @property
    def width(self) -> int:
        """Columns of what is normalised."""
        return self.hidden

    @staticmethod
    def of(config: Mapping[str, Any], tp: int = 1) -> "Model":
        """The sizes in a configuration.

        Args:
            config: what `config.json` holds.
            tp: how many GPUs share each layer.

        Raises:
            TuningError: it has no such sizes, or they cannot be shared so.
        """
        given = {**config, **(config.get("text_config") or {})}

        def share(name: str, size: int) -> int:
            if size % tp:
                raise TuningError(f"{name} is {size}, no multiple of {tp}", "--tp-size", "Pass a divisor")
            return size // tp

        try:
            hidden, heads = int(given["hidden_size"]), int(given["num_attention_heads"])
            inner = int(given.get("intermediate_size") or 0)
        except (KeyError, TypeError, ValueError) as error:
            raise TuningError(
                f"its configuration has no {error}", "--model", "Pass the sizes by --N and --K"
            ) from error
        experts = next((int(given[n]) for n in _EXPERTS if given.get(n)), 0)
        expert = int(given.get("moe_intermediate_size") or inner) if experts else 0
        shared = int(given.get("n_shared_experts") or 0) * expert
        if not shared and given.get("shared_expert_intermediate_size"):
            shared = int(given["shared_expert_intermediate_size"])
        some_dense = bool(given.get("first_k_dense_replace")) and bool(shared)
        kv_heads = int(given.get("num_key_value_heads") or heads)
        latent = None
        if given.get("kv_lora_rank"):
            names = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
            latent = tuple(int(given.get(name) or 0) for name in names)
        return Model(
            hidden,
            share("the dense MLP", shared if experts else inner),
            share("num_attention_heads", heads),
            max(1, kv_heads // tp),
            int(given.get("head_dim") or hidden // heads),
            experts,
            int(given.get("num_experts_per_tok") or given.get("top_k") or 0),
            share("moe_intermediate_size", expert),
            latent,  # type: ignore[arg-type]
            share("intermediate_size", inner) if some_dense else 0,
            str(given.get("model_type", "")).startswith(_QK_NORM),
        )

    def products(self) -> Iterator[tuple[str, int, int]]:
        """The name, N and K of each linear; projections that share an input are one."""
        if self.latent is None:
            yield "qkv", (self.heads + 2 * self.kv_heads) * self.head_dim, self.hidden
            yield "o", self.hidden, self.heads * self.head_dim
        else:
            q, kv, rope, nope, v = self.latent
            yield "q_a and kv_a", q + kv + rope, self.hidden
            if q:
                yield "q_b", self.heads * (nope + rope), q
            yield "kv_b", self.heads * (nope + v), kv
            yield "o", self.hidden, self.heads * v
        for name, inner in (("mlp", self.inner), ("dense mlp", self.dense)):
            if inner:
                yield f"{name} gate and up", 2 * inner, self.hidden
                yield f"{name} down", self.hidden, inner


@dataclass(frozen=True)
class Sizes:
    """One product, one mixture of experts or one kind of row, where a model is asked for.

    Attributes:
        n: rows of the weight; of experts, columns between the products; 0: there is no product.
        k: columns of the weight; of experts, of the tokens.
        experts: how many; 0: the product is a linear's.
        top: experts of each token.
        width: columns of a row; 0: there is none.
    """

    n: int
    k: int
    experts: int
    top: int
    width: int

    @property
    def hidden(self) -> int:
        """Columns of a row, or of the tokens of a mixture."""
        return self.k if self.experts else self.width

    @property
    def inner(self) -> int:
        """Columns of a row."""
        return self.width

    @property
    def expert_inner(self) -> int:
        """Columns between the products of an expert."""
        return self.n

    def products(self) -> Iterator[tuple[str, int, int]]:
        """The one product."""
        if self.n and self.k and not self.experts:
            yield "product", self.n, self.k


_QK_NORM = ("qwen3", "gemma3")
"""The beginnings of `model_type` whose configurations do not say that queries and keys have a norm for each head."""
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")


def read(model: str, tp: int) -> Model:
    """The sizes of a model.

    Args:
        model: a `config.json`, its folder, or an id whose configuration is in the Hugging Face cache.
        tp: how many GPUs share each layer.

    Raises:
        TuningError: there is none, or it has no such sizes.
    """
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        path = _cached(model)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TuningError(f"it cannot be read: {error}", str(path), "Pass a config.json") from error
    if not isinstance(config, dict):
        raise TuningError(f"it holds a {type(config).__name__}", str(path), "Pass a config.json")
    return Model.of(config, tp)


def _cached(model: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(model, "config.json", local_files_only=True))
    except Exception as error:  # not installed, not there, or no name of a model
        fix = "Pass a config.json, or download the model first"
        raise TuningError(f"there is no file {model!r}, nor such a model in the cache", "--model", fix) from error
