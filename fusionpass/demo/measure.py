"""Generation, perplexity and time per token of one language model, with as few distinct shapes as there can be.

A compiled model compiles anew for every shape. So the prompts are padded to one length, the windows of the perplexity
have that length as well, and all go through one static cache: two graphs in all, a window and a single token.
"""

import inspect
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

Tick = Callable[[], Any]


@dataclass(frozen=True)
class Measured:
    """What one variant of the model gave.

    Attributes:
        answers: the text after each prompt.
        tokens: the same as token numbers.
        losses: mean negative log-likelihood per token of each window of the text.
        scored: over how many tokens.
        seconds_per_token: median over the decode steps of all prompts.
    """

    answers: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    losses: tuple[float, ...]
    scored: int
    seconds_per_token: float

    @property
    def perplexity(self) -> float:
        """`exp` of the mean negative log-likelihood; all windows have the same number of tokens."""
        return math.exp(statistics.fmean(self.losses))


@dataclass
class Runner:
    """Runs a causal language model of transformers on windows of `window` tokens and `new_tokens` after them.

    Args:
        model: a `PreTrainedModel` with a language-model head.
        tokenizer: its tokenizer.
        window: tokens a prompt is padded to, and of a perplexity window.
        new_tokens: tokens to generate after a prompt, greedily.
    """

    model: Any
    tokenizer: Any
    window: int
    new_tokens: int
    cache: Any = field(init=False)

    def __post_init__(self) -> None:
        from transformers import StaticCache

        # One cache for all runs: a second one would be allocated inside the compiled graph, and so be a third shape.
        self.cache = StaticCache(config=self.model.config, max_cache_len=self.window + self.new_tokens)
        pad = self.tokenizer.pad_token_id
        self.pad = self.tokenizer.eos_token_id if pad is None else pad

    def encode(self, prompt: str) -> torch.Tensor:
        """The prompt as a chat message where the tokenizer knows how to write one: [1, tokens], int64."""
        if getattr(self.tokenizer, "chat_template", None):
            message = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids: torch.Tensor = self.tokenizer(prompt, return_tensors="pt").input_ids
        return ids[:, 1 - self.window :].to(self.model.device)

    def generate(self, prompt: str, tick: Tick, new_tokens: int | None = None) -> tuple[tuple[int, ...], list[float]]:
        """The tokens after `prompt` and the seconds that each but the first took; `tick` is called at every one."""
        ids, mask = self._padded(self.encode(prompt))
        clock = _Clock(tick)
        self.cache.reset()
        out = self.model.generate(
            ids,
            attention_mask=mask,
            past_key_values=self.cache,
            streamer=clock,
            max_new_tokens=new_tokens or self.new_tokens,
            do_sample=False,
            pad_token_id=self.pad,
            disable_compile=True,
            **self._all_logits(),
        )
        return tuple(out[0, self.window :].tolist()), clock.steps()

    def windows(self, text: str) -> torch.Tensor:
        """`text` as [windows, window - 1] tokens; what does not fill the last one is left out."""
        width = self.window - 1
        ids = self.tokenizer(text, return_tensors="pt").input_ids[0]
        windows: torch.Tensor = ids[: len(ids) // width * width].view(-1, width).to(self.model.device)
        return windows

    @torch.no_grad()
    def losses(self, windows: torch.Tensor, tick: Tick) -> tuple[float, ...]:
        """For each window, the mean (fp64) negative log-likelihood of every token but its first."""
        found = []
        for ids in windows.split(1):
            self.cache.reset()
            logits = self.model(**self._inputs(ids)).logits[0, 1:-1].float()
            found.append(functional.cross_entropy(logits, ids[0, 1:], reduction="none").double().mean().item())
            tick()
        return tuple(found)

    def measure(self, prompts: tuple[str, ...], windows: torch.Tensor, tick: Tick) -> Measured:
        """All of the above; `ticks` says how often `tick` is called at most."""
        generated = [self.generate(prompt, tick) for prompt in prompts]
        answers = [self.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens, _ in generated]
        steps = [step for _, times in generated for step in times]
        return Measured(
            tuple(answers),
            tuple(tokens for tokens, _ in generated),
            self.losses(windows, tick),
            windows.numel() - len(windows),
            statistics.median(steps) if steps else math.nan,
        )

    def ticks(self, prompts: tuple[str, ...], windows: torch.Tensor) -> int:
        """How often `measure` calls its `tick` at most."""
        return len(prompts) * self.new_tokens + len(windows)

    def operators_per_token(self) -> int:
        """How many PyTorch operators that compute something one eager decode step calls."""
        inputs = self._inputs(torch.full((1, 1), self.pad, device=self.model.device))
        with torch.no_grad(), _Operators() as counted:
            self.model(**inputs)
        count: int = counted.count
        return count

    def _padded(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`ids` [1, tokens] with padding in front and its mask, [1, window] both; a single token stays alone."""
        # At least one token of padding: a mask that hides nothing is dropped, and without it the graph is another one.
        padding = (self.window - ids.shape[1], 0) if ids.shape[1] > 1 else (0, 0)
        return functional.pad(ids, padding, value=self.pad), functional.pad(torch.ones_like(ids), padding)

    def _inputs(self, ids: torch.Tensor) -> dict[str, Any]:
        """What `generate` calls the model with for these tokens, so that it is the same graph."""
        ids, mask = self._padded(ids)
        inputs: dict[str, Any] = self.model.prepare_inputs_for_generation(
            ids,
            past_key_values=self.cache,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
            is_first_iteration=True,
            **self._all_logits(),
        )
        return {**inputs, "return_dict": True}

    def _all_logits(self) -> dict[str, int]:
        # generate() asks for the last token's logits alone, which the perplexity cannot use.
        return {"logits_to_keep": 0} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}


class _Clock:
    """A streamer: generate() hands it the prompt, then each new token."""

    def __init__(self, tick: Tick) -> None:
        self.tick = tick
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        if self.times:
            self.tick()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def steps(self) -> list[float]:
        # From the prompt to the first token is the prefill.
        return [after - before for before, after in zip(self.times[1:], self.times[2:], strict=False)]


class _Operators(TorchDispatchMode):
    """Counts calls that write memory: no views, no bare allocations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        bare = func._schema.name.split("::")[1]
        self.count += not (func.is_view or bare.startswith(("empty", "new_empty", "_unsafe_view", "sym_")))
        return func(*args, **(kwargs or {}))
