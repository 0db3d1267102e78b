"""The sampling parameters and their limits, for requests and for the chat's settings.

The API and the command line have narrower limits where OpenAI has them: a temperature of 2 at most.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

MAX_LOGPROBS = 20  # as OpenAI


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
    "temperature": Parameter(float, 0, sys.float_info.max, "0 (greedy) or more"),
    "top_p": Parameter(float, 0, 1, "0 or more and at most 1"),
    "top_k": Parameter(int, 0, 2**31 - 1, "between 0 (all) and 2^31-1"),
    "min_p": Parameter(float, 0, 1, "between 0 and 1"),
    "seed": Parameter(int, 0, 2**64 - 1, "between 0 and 2^64-1", optional=True),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": Parameter(float, 0.01, 100, "between 0.01 and 100"),  # over prompt and answer, as vLLM has it
    "logprobs": Parameter(int, 0, MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}", optional=True),
}
