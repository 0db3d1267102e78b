"""The model's chat template: it renders a conversation, and shows the text after an assistant's turn.

transformers renders in its sandbox; mlx-lm knows whether a model thinks first, and has templates that are not Jinja.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from tokenizers import Tokenizer

Json = dict[str, Any]
Refuse = Callable[[str, str], NoReturn]  # key, why

_MARK = "moectl-answer"


class ChatTemplate:
    """A template, with the special tokens that it may use."""

    def __init__(self, tokens: Tokenizer, template: str | None, own: Callable[..., str] | None, named: Json) -> None:
        from mlx_lm.tokenizer_utils import TokenizerWrapper

        self._renderer = TokenizerWrapper(_Bare(tokens, template, named), lambda _: None, chat_template=own)

    def render(self, messages: Sequence[Mapping[str, Any]], *, ask: bool = True) -> str:
        """Return a conversation as one text; with `ask` an answer can follow. Raises what the template raises."""
        told = [{key: value for key, value in message.items() if value is not None} for message in messages]
        return str(self._renderer.apply_chat_template(told, tokenize=False, add_generation_prompt=ask))

    def find_turn_end(self) -> str:
        """Return the text after an assistant's turn, at the end or before another turn; "" if there is none."""
        turns = [{"role": "user", "content": "moectl"}, {"role": "assistant", "content": _MARK}]
        for more in ([], turns[:1]):
            try:
                _, found, rest = self.render([*turns, *more], ask=False).rpartition(_MARK)
            except Exception:  # the template is a program of the model; a request that uses it shows its error
                return ""
            if found and rest.strip():
                return rest.lstrip()
        return ""


def open_chat_template(
    config: Json, file: str | None, defaults: Json, *, tokens: Tokenizer, named: Json, refuse: Refuse
) -> ChatTemplate | None:
    """Return the template of chat_template.jinja or of `config`, None where a model has none."""
    template = _choose(config.get("chat_template"), refuse) if file is None else file
    if template is not None and not template.strip():
        template = None  # it would make every prompt empty
    own = None
    kind = config.get("chat_template_type", defaults.get("chat_template_type"))
    if kind is not None:
        from mlx_lm.chat_templates import deepseek_v32

        # The second one only parses answers, and has no template.
        known = {"deepseek_v32": deepseek_v32.apply_chat_template, "muse_spark": None}
        if not isinstance(kind, str) or kind not in known:
            refuse("chat_template_type", f"is {kind!r}, and moectl knows {' and '.join(known)}")
        if "chat_template_type" in config or template is None:
            own = known[kind]
    return None if template is None and own is None else ChatTemplate(tokens, template, own, named)


def find_defaults(model_type: Any) -> Json:
    """Return mlx-lm's defaults for the tokenizers of this type of model."""
    from mlx_lm.models import muse_spark  # the only model with defaults

    return muse_spark.TOKENIZER_DEFAULTS if model_type == "muse_spark" else {}


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
        texts, _ = render_jinja_template([messages], chat_template=self.chat_template, **self._named, **options)
        return str(texts[0])
