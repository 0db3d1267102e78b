"""Tokenizers of models that think before they answer: small chat templates of their kinds, with their markers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moectl.shards.chat.tokenizer import Tokenizer, open_tokenizer
from tests.support import vocabularies

THINK = ("<think>", "</think>")
CHANNELS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")
XTML = ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
)
QWEN = CHATML + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"  # as Qwen3
ALWAYS = CHATML + "<think>\n{% endif %}"  # as DeepSeek-R1
NAMED = CHATML + "{{ '<think>' if thinking else '</think>' }}{% endif %}"  # as DeepSeek-V3.1
HARMONY = (  # as gpt-oss
    "<|start|>system<|message|>Reasoning: {{ reasoning_effort or 'medium' }}<|end|>{% for m in messages %}<|start|>"
    "{{ m.role }}{{ '<|channel|>final' if m.role == 'assistant' }}<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{# <|channel|>analysis<|message|> #}{% endif %}"
)
PLAIN = CHATML.split("{% if m.role", 1)[0] + "{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"


def make_thinker(directory: Path, template: str, added: Sequence[str] = THINK, **config: Any) -> Tokenizer:
    """Write a tokenizer with these added tokens to a directory; open it."""
    (directory / "tokenizer.json").write_text(vocabularies.make_cl100k(*added).to_str())
    told = {"eos_token": "<|endoftext|>", "chat_template": template, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(told))
    return open_tokenizer(directory)
