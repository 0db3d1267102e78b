"""The numbers that say how to sample: what each may be, in a flag, in the chat, in the API and in a request.

A model may bring defaults for some of them, which hold where a request says nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moectl.errors import CheckpointError

MAX_LOGPROBS = 20  # as OpenAI
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")  # of reasoning: OpenAI's, and DeepSeek's last
THINKING_SWITCHES = ("enable_thinking", "thinking")  # what chat templates call the option that turns it on and off


@dataclass(frozen=True, slots=True)
class Parameter:
    """What a number may be; `optional` ones may also be None."""

    kind: type[int] | type[float]
    low: float
    high: float
    text: str  # follows "should be"
    optional: bool = False

    def allows(self, value: object) -> bool:
        """Whether a value is of the right type and within the limits."""
        if value is None:
            return self.optional
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else int | float):
            return False
        return self.low <= value <= self.high


_PENALTY = Parameter(float, -2, 2, "between -2 and 2")  # as OpenAI defines them, over the tokens generated so far
PARAMETERS = {
    "max_tokens": Parameter(int, 1, 2**31 - 1, "1 or more"),
    "temperature": Parameter(float, 0, 2, "between 0 (greedy) and 2"),  # as OpenAI
    "top_p": Parameter(float, 0, 1, "0 or more and at most 1"),
    "top_k": Parameter(int, 0, 2**31 - 1, "between 0 (all) and 2^31-1"),
    "min_p": Parameter(float, 0, 1, "between 0 and 1"),
    "seed": Parameter(int, 0, 2**64 - 1, "between 0 and 2^64-1", optional=True),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": Parameter(float, 0.01, 100, "between 0.01 and 100"),  # over prompt and answer, as vLLM has it
    "logprobs": Parameter(int, 0, MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}", optional=True),
}

# Keys of generation_config.json that are defaults of requests; do_sample is one of temperature.
DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_defaults(generation: Mapping[str, Any]) -> dict[str, int | float]:
    """Return a model's defaults by parameter, from its generation_config.json.

    `do_sample` false is greedy and true samples, as in transformers; without it a temperature counts, as in vLLM.
    Raises CheckpointError for a value that no request may have.
    """
    given = {name: generation[name] for name in DEFAULTS if generation.get(name) is not None}
    if given.get("top_k") == -1:  # all, as other servers write it
        given["top_k"] = 0
    for name, value in given.items():
        if not PARAMETERS[name].allows(value):
            raise CheckpointError(
                f"generation_config.json: {name} is {json.dumps(value)[:80]}: it should be {PARAMETERS[name].text}",
                hint="correct it in a copy of the checkpoint's directory, or remove the key",
            )
    if generation.get("do_sample") is False:
        given["temperature"] = 0.0
    elif generation.get("do_sample") is True:
        given.setdefault("temperature", 1.0)
    return given
