"""A checkpoint that calls tools as a script says: the tools that it is offered choose the call, a result ends the turn.

Its template knows no tools, so it is told of them as text. A line of a prompt is one token, whatever it says, so that
the long prompts of real agents fit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from tests.support.scripted import write_model

Calls = Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]]  # tool that is offered → what is called

ADD: Calls = {"add": [("add", {"a": 2, "b": 3})], "twice": [("twice", {"n": 1}), ("twice", {"n": 2})]}
AFTER = "ROUND TRIP-DONE after the tool."  # the answer once there is a result
WITHOUT = "Hello, no tools are here."
_END, _PAD = "<|im_end|>", "<|pad|>"
_TEMPLATE = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}"
    "{%- if messages[-1]['content'].startswith('<tool_response>') -%}<|go:after|>"
    "{%- elif 'Say hello' in messages[-2:]|map(attribute='content')|join -%}<|go:without|>CASES"
    "{%- else -%}<|go:without|>{%- endif -%}{%- endif -%}"
)
_CASE = "{%%- elif '\"name\": \"%s\"' in messages[0]['content'] -%%}<|go:%s|>"


def write_caller(directory: Path, calls: Calls = ADD, *, context: int = 131_072) -> Path:
    """Write the checkpoint and its small files; of the tools that are offered, the first in `calls` chooses.

    Asked to "Say hello", it calls none.
    """
    directory.mkdir(parents=True, exist_ok=True)
    used: set[str] = set()
    scripts = {name: _cut(_write_calls(wanted), used) for name, wanted in calls.items()}
    scripts |= {"after": _cut(AFTER, used), "without": _cut(WITHOUT, used)}
    specials = (_PAD, "<|im_start|>", _END, *(f"<|go:{name}|>" for name in scripts))
    vocabulary = {text: number for number, text in enumerate((_PAD, *sorted(used)))}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token=_PAD))
    tokens.pre_tokenizer = pre_tokenizers.Split(Regex("[^\n]*\n?"), "isolated")
    tokens.decoder = decoders.Fuse()
    tokens.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
    (directory / "tokenizer.json").write_text(tokens.to_str())
    template = _TEMPLATE.replace("CASES", "".join(_CASE % (name, name) for name in calls))
    told = {"eos_token": _END, "chat_template": template, "model_max_length": context}
    (directory / "tokenizer_config.json").write_text(json.dumps(told))
    number = tokens.get_vocab()
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": number[_END], "do_sample": False}))
    chains = [[f"<|go:{name}|>", *script, _END] for name, script in scripts.items()]
    write_model(directory, [[number[text] for text in chain] for chain in chains], context=context)
    return directory


def _write_calls(calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    written = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls]
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in written)


def _cut(text: str, used: set[str]) -> list[str]:
    """Return the pieces of a text, which begin and end anywhere; no two of a model's are the same."""
    pieces = []
    while text:
        length = next((n for n in range(13, len(text)) if text[:n] not in used), len(text))
        piece, text = text[:length], text[length:]
        while piece in used:
            piece += "\n"
        used.add(piece)
        pieces.append(piece)
    return pieces
