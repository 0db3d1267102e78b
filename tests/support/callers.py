"""Tool calls as models write them: two calls in each format that moectl reads, and tokenizers of such models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moectl.shards.chat.tokenizer import Tokenizer
from tests.support.thinkers import CHANNELS, CHATML, make_thinker

TOOLED = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML + "{% endif %}"


class Style(NamedTuple):
    """One format: mlx-lm's name for it, the markers that are tokens, what stands before, between and after calls."""

    name: str | None
    added: Sequence[str]
    before: str
    calls: Sequence[str]
    after: str

    @property
    def written(self) -> str:
        """Two calls in one answer."""
        return self.before + "".join(self.calls) + self.after


def make_tool(name: str = "f") -> dict[str, Any]:
    """Return a tool with a text `p` and a whole number `n`."""
    properties = {"p": {"type": "string"}, "n": {"type": "integer"}}
    schema = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": schema}}


def make_caller(directory: Path, style: Style, template: str = TOOLED) -> Tokenizer:
    """Write and open the tokenizer of a model that writes calls in this style."""
    more = {} if style.name is None else {"tool_parser_type": style.name}
    return make_thinker(directory, template, ("<think>", "</think>", *style.added), **more)


# Both calls are f(p="a<b", n=2), then f(p="", n=-1).
_XML = '<invoke name="f">\n<parameter name="p">{}</parameter>\n<parameter name="n">{}</parameter>\n</invoke>\n'
_ARG = (
    "<tool_call>f<arg_key>p</arg_key><arg_value>{}</arg_value><arg_key>n</arg_key><arg_value>{}</arg_value></tool_call>"
)
_QWEN = (
    "<tool_call>\n<function=f>\n<parameter=p>\n{}\n</parameter>\n<parameter=n>\n{}\n</parameter>\n</function>\n"
    "</tool_call>\n"
)
_LONGCAT = (
    "<longcat_tool_call>f\n<longcat_arg_key>p</longcat_arg_key>\n<longcat_arg_value>{}</longcat_arg_value>\n"
    "<longcat_arg_key>n</longcat_arg_key>\n<longcat_arg_value>{}</longcat_arg_value>\n</longcat_tool_call>"
)
_MINICPM = '<function name="f"><param name="p">{}</param><param name="n">{}</param></function>'
_KIMI = '<|tool_call_begin|>functions.f:{}<|tool_call_argument_begin|>{{"p": "{}", "n": {}}}<|tool_call_end|>'
_KIMI3 = (
    '<|open|>call tool="f" index="1"<|sep|><|open|>argument key="p" type="string"<|sep|>{}<|close|>argument<|sep|>'
    '<|open|>argument key="n" type="integer"<|sep|>{}<|close|>argument<|sep|><|close|>call<|sep|>'
)
_ATEM = (
    '<atem:invoke name="f"><atem:parameter name="p">{}</atem:parameter><atem:parameter name="n">{}</atem:parameter>'
    "</atem:invoke>"
)
_JSON = '<tool_call>\n{{"name": "f", "arguments": {{"p": "{}", "n": {}}}}}\n</tool_call>\n'
_VALUES = (("a<b", 2), ("", -1))


def _twice(form: str) -> list[str]:
    return [form.format(*values) for values in _VALUES]


STYLES = {
    "json_tools": Style("json_tools", ("<tool_call>", "</tool_call>"), "", _twice(_JSON), ""),
    "json_tools in letters": Style("json_tools", (), "", _twice(_JSON), ""),
    "qwen3_coder": Style("qwen3_coder", ("<tool_call>", "</tool_call>"), "", _twice(_QWEN), ""),
    "glm47": Style("glm47", ("<tool_call>", "</tool_call>"), "", _twice(_ARG), ""),
    "laguna": Style("laguna", ("<tool_call>", "</tool_call>"), "", _twice(_ARG), ""),
    "mistral": Style(
        "mistral", ("[TOOL_CALLS]", "[ARGS]"), "", _twice('[TOOL_CALLS]f[ARGS]{{"p": "{}", "n": {}}}'), ""
    ),
    "pythonic": Style(
        "pythonic",
        ("<|tool_call_start|>", "<|tool_call_end|>"),
        "<|tool_call_start|>[",
        ['f(p="a<b", n=2)', ', f(p="", n=-1)'],
        "]<|tool_call_end|>",
    ),
    "kimi_k2": Style(
        "kimi_k2",
        ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>"),
        "<|tool_calls_section_begin|>",
        [_KIMI.format(i, *values) for i, values in enumerate(_VALUES)],
        "<|tool_calls_section_end|>",
    ),
    "kimi_k3": Style(
        "kimi_k3",
        ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"),
        "<|open|>tools<|sep|>",
        _twice(_KIMI3),
        "<|close|>tools<|sep|>",
    ),
    "minimax_m2": Style(
        "minimax_m2",
        ("<minimax:tool_call>", "</minimax:tool_call>"),
        "<minimax:tool_call>\n",
        _twice(_XML),
        "</minimax:tool_call>",
    ),
    "minicpm5": Style("minicpm5", (), "", _twice(_MINICPM), ""),
    "muse_spark": Style("muse_spark", (), "<atem:function_calls>", _twice(_ATEM), "</atem:function_calls>"),
    "gemma4": Style(
        "gemma4",
        ("<|tool_call>", "<tool_call|>", '<|"|>'),
        "",
        _twice('<|tool_call>call:f{{p:<|"|>{}<|"|>,n:{}}}<tool_call|>'),
        "",
    ),
    "function_gemma": Style(
        "function_gemma",
        ("<start_function_call>", "<end_function_call>", "<escape>"),
        "",
        _twice("<start_function_call>call:f{{p:<escape>{}<escape>,n:{}}}<end_function_call>"),
        "",
    ),
    "longcat": Style("longcat", ("<longcat_tool_call>", "</longcat_tool_call>"), "", _twice(_LONGCAT), ""),
    "gpt-oss": Style(
        None,
        (*CHANNELS, "<|constrain|>"),
        "<|channel|>analysis<|message|>hm<|end|>",
        [
            "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
            '{"p": "a<b", "n": 2}<|call|>',
            '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"p": "", "n": -1}<|call|>',
        ],
        "",
    ),
}
