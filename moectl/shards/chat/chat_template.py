"""The model's chat template: it renders a conversation, and shows the text after an assistant's turn.

transformers renders in its sandbox; mlx-lm knows whether a model thinks first, and has templates that are not Jinja.
"""

from __future__ import annotations

import ast
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import Tokenizer

from moectl.errors import BadField
from moectl.model.parameters import THINKING_SWITCHES
from moectl.shards.chat.answer_grammar import can_describe
from moectl.shards.chat.calls import TEXT_FORMAT, CallFormat, find_format, open_format
from moectl.shards.chat.thinking import Markers, find_markers
from moectl.shards.chat.tools_as_text import mend_systems, tell_as_text, urge

Json = dict[str, Any]
Refuse = Callable[[str, str], NoReturn]  # key, why
EFFORT = "reasoning_effort"  # OpenAI's option, which some templates know

_MARK = "moectl-answer"
_QUESTION = {"role": "user", "content": "moectl"}
_TOOL_NAME = "moectl_probe"
_TOOL = {"name": _TOOL_NAME, "description": "", "parameters": {"type": "object", "properties": {}}}


class ChatTemplate:
    """A template, with the special tokens that it may use, and the markers of an answer's thinking and tool calls."""

    def __init__(
        self,
        tokens: Tokenizer,
        template: str | None,
        own: Callable[..., str] | None,
        form: Json,
        named: Json,
        find_calls: Callable[[Any, Mapping[str, int]], CallFormat | None] = lambda renderer, added: None,
    ) -> None:
        from mlx_lm.tokenizer_utils import TokenizerWrapper

        self._renderer = TokenizerWrapper(_Bare(tokens, template, named), lambda _: None, chat_template=own)
        self._is_program = own is not None  # of mlx-lm; it fails at an option that it does not know
        added = {token.content: number for number, token in tokens.get_added_tokens_decoder().items()}
        self.markers: Markers | None = find_markers(self._renderer, template or "", added, form)
        own_calls = find_calls(self._renderer, added)
        # A template that knows tools is of use where their calls can be read; else both are told as text.
        self.tells_tools = own_calls is not None and self._knows_tools()
        self.calls = own_calls if own_calls is not None and self.tells_tools else open_format(TEXT_FORMAT)
        self.call_markers = find_markers(self._renderer, template or "", added, form, self.calls)
        # The same where calls are held to a grammar: what it cannot describe is told as text.
        self.held_calls, self.held_markers = self.calls, self.call_markers
        if not can_describe(self.calls):
            self.held_calls = open_format(TEXT_FORMAT)
            self.held_markers = find_markers(self._renderer, template or "", added, form, self.held_calls)
        self.added = added
        self._has_thinking = "message.thinking" in (template or "")
        names = self.markers.names if self.markers else ()
        self._thinks = any(own is not None or name in (template or "") for name in names)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        ask: bool = True,
        think: bool | None = None,
        options: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        must_call: Sequence[str] = (),
        held: bool = False,
    ) -> str:
        """Return a conversation as one text; with `ask` an answer can follow. Raises what the template raises.

        The answer may call `tools`, and is told to call one of `must_call`; `held` says that its calls are held to a
        grammar. A system message where the template takes none becomes text of the user's.
        `think` turns thinking on or off, None leaves it as mlx-lm has it. `options` are the template's own; those that
        it does not know have no effect. Raises BadField where thinking cannot be turned on or off.
        """
        told = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if self._has_thinking:
            told = [_name_thinking(message) for message in told]
        chosen = {**self._choose_thinking(think), **self._choose_options(options or {})}
        told = urge(told, must_call)
        known = [_without_strict(tool) for tool in tools]
        if not self.tells_tools or (held and self.held_calls is not self.calls):
            told, known = tell_as_text(told, known), []
        if known:
            chosen["tools"] = known
        try:
            return self._render(told, ask, chosen)
        except Exception:  # the template is a program of the model, and says in its own way what it does not take
            mended = mend_systems(told)
            if mended == told:
                raise
            return self._render(mended, ask, chosen)

    def find_turn_end(self) -> str:
        """Return the text after an assistant's turn, at the end or before another turn; "" if there is none."""
        turns = [_QUESTION, {"role": "assistant", "content": _MARK}]
        for more in ([], turns[:1]):
            try:
                _, found, rest = self.render([*turns, *more], ask=False).rpartition(_MARK)
            except Exception:  # the template is a program of the model; a request that uses it shows its error
                return ""
            if found and rest.strip():
                return rest.lstrip()
        return ""

    def _render(self, messages: Sequence[Mapping[str, Any]], ask: bool, options: Mapping[str, Any]) -> str:
        return str(self._renderer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask, **options))

    def _choose_thinking(self, think: bool | None) -> Json:
        if think is None or (think == self._thinks and not self._switches):
            return {}
        if self._switches:
            return dict.fromkeys(self._switches, think)
        if not self._thinks:
            raise BadField("this model does not think before it answers", hint="leave it out", param="think")
        other = f"choose a low {EFFORT}" if self._knows(EFFORT, "low", "high") else "hide its thinking"
        raise BadField(
            "thinking cannot be turned off: the model's chat template has no switch for it",
            hint=f"leave it out; {other}",
            param="think",
        )

    def _choose_options(self, options: Mapping[str, Any]) -> Json:
        chosen = dict(options)
        if chosen.get(EFFORT) == "none" and not self._knows(EFFORT, "low", "high"):
            chosen = {**dict.fromkeys(self._switches, False), **chosen}
        return {name: value for name, value in chosen.items() if not self._is_program or name in self._switches}

    def _knows_tools(self) -> bool:
        """Whether a tool's name is in what is rendered."""
        tools = [{"type": "function", "function": _TOOL}]
        try:
            return _TOOL_NAME in self._render([_QUESTION], True, {"tools": tools})
        except Exception:  # see find_turn_end
            return False

    @functools.cached_property
    def _switches(self) -> tuple[str, ...]:
        return tuple(name for name in THINKING_SWITCHES if self._knows(name, True, False))

    def _knows(self, option: str, *values: Any) -> bool:
        """Whether an option's value changes what is rendered."""
        try:
            return len({self._render([_QUESTION], True, {option: value}) for value in values}) > 1
        except Exception:  # see find_turn_end
            return False


def open_chat_template(
    config: Json, file: str | None, defaults: Json, *, tokens: Tokenizer, named: Json, refuse: Refuse
) -> ChatTemplate | None:
    """Return the template of chat_template.jinja or of `config`, None where a model has none."""
    template = _choose(config.get("chat_template"), refuse) if file is None else file
    if template is not None and not template.strip():
        template = None  # it would make every prompt empty
    own, form = None, Json()
    kind = config.get("chat_template_type", defaults.get("chat_template_type"))
    if kind is not None:
        from mlx_lm import chat_templates

        known = sorted(module.name for module in pkgutil.iter_modules(chat_templates.__path__))
        if not isinstance(kind, str) or kind not in known:  # else a file could name any module
            refuse("chat_template_type", f"is {kind!r}, and moectl knows {' and '.join(known)}")
        module = importlib.import_module(f"{chat_templates.__name__}.{kind}")
        form = getattr(module, "RESPONSE_FORMAT", {})
        if "chat_template_type" in config or template is None:
            own = getattr(module, "apply_chat_template", None)  # some modules only know how to read answers
    if template is None and own is None:
        return None
    find_calls = functools.partial(find_format, config=config, defaults=defaults)
    return ChatTemplate(tokens, template, own, form, named, find_calls)


def find_defaults(config: Mapping[str, Any]) -> Json:
    """Return mlx-lm's defaults for the tokenizer of a model, from the text of its model file: nothing is run."""
    found = find_spec("mlx_lm")
    assert found is not None
    assert found.submodule_search_locations
    package = Path(found.submodule_search_locations[0])
    kind, architectures = config.get("model_type"), config.get("architectures")
    if not isinstance(kind, str):
        return {}
    name = _read_literal(package / "utils.py", "MODEL_REMAPPING").get(kind, kind)
    by_architecture = _read_literal(package / "utils.py", "MODEL_ARCHITECTURE_REMAPPING")
    for architecture in architectures if isinstance(architectures, list) else [architectures]:
        if isinstance(architecture, str):
            name = by_architecture.get((kind, architecture), name)
    files = {path.stem: path for path in (package / "models").glob("*.py")}
    return _read_literal(files[name], "TOKENIZER_DEFAULTS") if name in files else {}


@functools.cache
def _read_literal(file: Path, name: str) -> dict[Any, Any]:
    """Return the dictionary that a Python file gives a name at its top, {} where there is none."""
    text = file.read_text(encoding="utf-8")
    for statement in ast.parse(text).body if name in text else []:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            value: dict[Any, Any] = ast.literal_eval(statement.value)
            return value
    return {}


def _choose(told: Any, refuse: Refuse) -> str | None:
    """Return the template; of several, the one with the name default."""
    if told is None or isinstance(told, str):
        return told
    try:
        by_name = told if isinstance(told, dict) else {each["name"]: each["template"] for each in told}
    except (TypeError, KeyError):
        refuse("chat_template", "is neither a text nor a list of templates with their names")
    if not isinstance(template := by_name.get("default"), str):
        refuse("chat_template", "has several templates, and none that is named default")
    return template


def _name_thinking(message: Json) -> Json:
    """Return a call's message with what was thought before it under gpt-oss's name, which takes it without content."""
    thought = message.get("reasoning_content")
    is_for_it = thought and message.get("tool_calls") and not message["content"]
    return {**message, "thinking": thought} if is_for_it else message


def _without_strict(tool: Mapping[str, Any]) -> Json:
    """Return a tool without what only the server obeys."""
    return {**tool, "function": {key: value for key, value in tool["function"].items() if key != "strict"}}


class _Bare:
    """The part of a transformers tokenizer that mlx-lm needs to render."""

    eos_token_id = None

    def __init__(self, tokens: Tokenizer, template: str | None, named: Json) -> None:
        self.chat_template = template
        self._tokens = tokens
        self._named = named

    def get_vocab(self) -> dict[str, int]:
        return self._tokens.get_vocab()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self._tokens.encode(text, add_special_tokens=add_special_tokens).ids

    def apply_chat_template(self, messages: list[Json], **options: Any) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        del options["tokenize"], options["return_dict"]
        given = {**self._named, **options}
        texts, _ = render_jinja_template([messages], chat_template=self.chat_template, **given)
        return str(texts[0])
