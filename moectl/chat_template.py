"""Render a conversation with the model's own template, and find what the template puts after an assistant's turn.

transformers renders in its sandbox; mlx-lm says whether a model thinks first, and has templates that are no Jinja.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from tokenizers import Tokenizer

Json = dict[str, Any]
Refuse = Callable[[str, str], NoReturn]  # key, why

_MARK = "moectl-answer"


class ChatTemplate:
    """A template and the special tokens that it may name."""

    def __init__(self, tokens: Tokenizer, template: str | None, own: Callable[..., str] | None, named: Json) -> None:
        from mlx_lm.tokenizer_utils import TokenizerWrapper

        self._renderer = TokenizerWrapper(_Bare(tokens, template, named), lambda _: None, chat_template=own)

    def render(self, messages: Sequence[Mapping[str, Any]], *, ask: bool = True) -> str:
        """Return a conversation as one text, up to where an answer begins if `ask`. Raises what the template raises."""
        told = [{key: value for key, value in message.items() if value is not None} for message in messages]
        return str(self._renderer.apply_chat_template(told, tokenize=False, add_generation_prompt=ask))

    def find_turn_end(self) -> str:
        """Return the text after an assistant's turn, the last or one that a turn follows; "" if there is none."""
        turns = [{"role": "user", "content": "moectl"}, {"role": "assistant", "content": _MARK}]
        for more in ([], turns[:1]):
            try:
                _, found, rest = self.render([*turns, *more], ask=False).rpartition(_MARK)
            except Exception:  # the template is the model's own program; whoever asks with it is told how it fails
                return ""
            if found and rest.strip():
                return rest.lstrip()
        return ""


def open_chat_template(
    config: Json, file: str | None, defaults: Json, *, tokens: Tokenizer, named: Json, refuse: Refuse
) -> ChatTemplate | None:
    """Return the template of chat_template.jinja or of `config`, None where a model has none."""
    template = _choose(config.get("chat_template"), refuse) if file is None else file
    own = None
    kind = config.get("chat_template_type", defaults.get("chat_template_type"))
    if kind is not None:
        # Its name is a file's: it may be one of mlx-lm's modules only.
        if not (isinstance(kind, str) and kind.isidentifier() and _exists(f"mlx_lm.chat_templates.{kind}")):
            refuse("chat_template_type", f"is {kind!r}, which mlx-lm does not have")
        if "chat_template_type" in config or template is None:
            own = importlib.import_module(f"mlx_lm.chat_templates.{kind}").apply_chat_template
    return None if template is None and own is None else ChatTemplate(tokens, template, own, named)


def find_defaults(model_type: Any) -> Json:
    """Return what mlx-lm knows of the tokenizers of this type of model where their files say nothing."""
    from mlx_lm.utils import MODEL_REMAPPING

    name = MODEL_REMAPPING.get(model_type, model_type) if isinstance(model_type, str) else None
    if not name or not name.isidentifier() or not _exists(f"mlx_lm.models.{name}"):
        return {}
    return getattr(importlib.import_module(f"mlx_lm.models.{name}"), "TOKENIZER_DEFAULTS", None) or {}


def _choose(told: Any, refuse: Refuse) -> str | None:
    """Return the template, of several the one named default."""
    if told is None or isinstance(told, str):
        return told
    try:
        by_name = told if isinstance(told, dict) else {each["name"]: each["template"] for each in told}
    except (TypeError, KeyError):
        refuse("chat_template", "is neither a text nor a list of templates with their names")
    if not isinstance(template := by_name.get("default"), str):
        refuse("chat_template", "has several templates, and none that is named default")
    return template


def _exists(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


class _Bare:
    """As much of a transformers tokenizer as mlx-lm needs to render."""

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
        texts, _ = render_jinja_template([messages], chat_template=self.chat_template, **self._named, **options)
        return str(texts[0])
