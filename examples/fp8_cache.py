"""A Hugging Face model over a static cache of FP8 codes: half the bytes that decoding reads, and no kernel more."""

from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, StaticCache
from transformers.cache_utils import StaticLayer

import fusionpass

CONFIG = Qwen3Config(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=256,
    max_position_embeddings=256,
)
FP8 = torch.float8_e4m3fn
SLOTS = 64


class CodesLayer(StaticLayer):
    """One layer's keys and values, each as codes of one scale, in plain PyTorch."""

    def __init__(self, slots: int, k_scale: float, v_scale: float) -> None:
        super().__init__(slots)
        self.scales = k_scale, v_scale

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = self.keys.to(FP8), self.values.to(FP8)
        self.k_scale, self.v_scale = (torch.tensor(scale, device=self.device) for scale in self.scales)
        for fixed in (self.keys, self.values, self.k_scale, self.v_scale):
            torch._dynamo.mark_static_address(fixed)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[-2]
        at = torch.arange(tokens, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(tokens)
        self.keys[:, :, at] = codes(key_states, self.k_scale)
        self.values[:, :, at] = codes(value_states, self.v_scale)
        return numbers(self.keys, self.k_scale, self.dtype), numbers(self.values, self.v_scale, self.dtype)


def codes(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() * scale.reciprocal()).clamp(-448, 448).to(FP8)


def numbers(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (x.float() * scale).to(dtype)


def cache(batch: int, device: str) -> StaticCache:
    made = StaticCache(config=CONFIG, max_cache_len=SLOTS)
    # In earnest: the largest magnitude of a layer's keys, and of its values, in a text, over 448.
    made.layers = [CodesLayer(SLOTS, 0.02, 0.01) for _ in made.layers]
    # Ahead of time, since the first tokens are compiled too.
    made.early_initialization(batch, CONFIG.num_key_value_heads, CONFIG.head_dim, torch.bfloat16, torch.device(device))
    return made


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen3ForCausalLM(CONFIG).to(device, torch.bfloat16).eval()
    prompt = torch.randint(0, 256, (2, 12), device=device)

    def text(count: int = 8) -> list[torch.Tensor]:
        held, tokens, said = cache(2, device), prompt, []
        for _ in range(count):
            tokens = model(tokens, past_key_values=held).logits[:, -1:].argmax(-1)
            said.append(tokens)
        return said

    eager = torch.cat(text(), 1)
    fusionpass.compile(model, numerics="eager")
    compiled = torch.cat(text(), 1)

    report = fusionpass.report(model)
    print(report)
    print("eager   ", eager.tolist())
    print("compiled", compiled.tolist())
    assert "qk_norm_rope_cache" in {record.op for record in report.fused}, "norm, rotation, codes and write are one op"
    assert not report.missed
    assert compiled.equal(eager) or device == "cuda", "the same tokens"


if __name__ == "__main__":
    main()
