"""What is asked of the model: text and parameters, as they travel from the command line to every rank.

Tokens only where a measurement needs exactly so many: the worker tokenizes. No defaults for people: those are the
command line's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moectl.errors import UsageError

MAX_PROMPT_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Request:
    """One completion; `id` counts up from 1 within a session."""

    id: int
    prompt: str
    max_tokens: int
    system: str | None = None
    raw: bool = False  # no chat template
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0
    seed: int | None = None
    prompt_tokens: tuple[int, ...] | None = None  # token ids instead of `prompt`; neither template nor tokenizer then
    ignore_eos: bool = False  # go on to max_tokens
    messages: tuple[dict[str, str], ...] | None = None  # a whole conversation instead of `system` and `prompt`
    top_k: int = 0  # 0 = all
    min_p: float = 0.0
    presence_penalty: float = 0.0  # these two as OpenAI defines them, over the tokens generated so far
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and answer, as vLLM has it
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id → what is added to its logit
    logprobs: int | None = None  # None: none; k: each chosen token's, and of the k most probable
    stop: tuple[str, ...] = ()  # texts that end the answer; they are not part of it
    # Tokens of the answer that were told before a restart; it goes on after them. `max_tokens` and the statistics'
    # completion tokens count them too.
    answered: tuple[int, ...] = ()
    cache_prompt: bool = True  # look for it in the prompt cache, and keep it there; a measurement wants neither

    def __post_init__(self) -> None:
        if self.prompt_tokens is not None:  # JSON has lists only
            object.__setattr__(self, "prompt_tokens", tuple(self.prompt_tokens))
        for text in (self.prompt, self.system or ""):
            try:
                size = len(text.encode())
            except UnicodeEncodeError:
                raise UsageError("the prompt is not UTF-8 text") from None
            if size > MAX_PROMPT_BYTES:
                raise UsageError(f"the prompt has {size} bytes, more than {MAX_PROMPT_BYTES}: no context holds it")
        if self.max_tokens < 1:
            raise UsageError(f"max tokens should be 1 or more, it is {self.max_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature should be 0 or more, it is {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p should be above 0 and at most 1, it is {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise UsageError(f"seed should be between 0 and 2^64-1, it is {self.seed}")


@dataclass(frozen=True, slots=True)
class Stats:
    """What a completion took; times in seconds, memory in bytes (the peak of rank 0's arrays)."""

    prompt_tokens: int
    completion_tokens: int
    prompt_s: float  # from admission to the first token
    decode_s: float  # from the first token to the last
    ttft_s: float  # from the request's arrival at rank 0 to the first token
    peak_memory_bytes: int
    cached_tokens: int = 0  # of the prompt: found in the prompt cache, not computed again
    drafted_tokens: int = 0  # proposed by prompt lookup
    accepted_tokens: int = 0  # of those: confirmed by the model
