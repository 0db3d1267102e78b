"""A model's tokenizer, from the small files beside its weights: text to tokens, tokens to text, the ends of an answer.

The tokenizers library makes the tokens from tokenizer.json, for every class in tokenizer_config.json: transformers
builds some classes itself and ignores how the file splits text. Settings of the other files that change tokens are
followed, or refused by their name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import tokenizers

from moectl.errors import BadField, CheckpointError
from moectl.shards.chat.answer_grammar import HeldForm, write_grammar
from moectl.shards.chat.calls import CallReader
from moectl.shards.chat.chat_template import ChatTemplate, Json, find_defaults, open_chat_template
from moectl.shards.chat.thinking import AnswerText
from moectl.shards.chat.token_text import TextStream, find_context, has_byte_runs

TOKENIZER, CONFIG, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
ADDED, GENERATION, MODEL = "added_tokens.json", "generation_config.json", "config.json"
# Only the first two have a meaning here; the others matter where a text contains them.
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
_SWITCHES = ("add_bos_token", "add_eos_token", "split_special_tokens")
_TAIL = 64  # tokens at a prompt's end: more than any marker and the blanks after it
_HINT = "correct that file in the checkpoint, then try again"
_MISSING = "moectl shard --add-tokenizer REPO|DIR (for DBRX: Xenova/dbrx-instruct-tokenizer), then moectl deploy"

# Keys by which other libraries override tokenizer.json: key, section, kind of part, the part's own value.
_TOLD_TWICE: tuple[tuple[str, str, str, Callable[[Json], Any]], ...] = (
    ("add_prefix_space", "pre_tokenizer", "ByteLevel", lambda part: part.get("add_prefix_space", True)),
    ("add_prefix_space", "pre_tokenizer", "Metaspace", lambda part: part.get("prepend_scheme", "always") != "never"),
    ("do_lower_case", "normalizer", "BertNormalizer", lambda part: part.get("lowercase")),
    ("strip_accents", "normalizer", "BertNormalizer", lambda part: part.get("strip_accents")),
    ("tokenize_chinese_chars", "normalizer", "BertNormalizer", lambda part: part.get("handle_chinese_chars")),
)

Read = Callable[[str], bytes | None]  # a file's bytes by its name, None where there is no such file


class Tokenizer:
    """A model's tokens. `eos_token_ids` end an answer; a number without a token becomes empty text."""

    def __init__(
        self,
        tokens: tokenizers.Tokenizer,
        *,
        eos_token_ids: set[int],
        chat: ChatTemplate | None = None,
        around: tuple[list[int], list[int]] | None = None,
    ) -> None:
        self.eos_token_ids = eos_token_ids
        self._tokens = tokens
        self._chat = chat
        self._around = around  # a raw text's first and last tokens, where they are not those of tokenizer.json
        self._context = find_context(tokens)
        self._has_byte_runs = has_byte_runs(tokens)

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    def encode(self, text: str) -> list[int]:
        """Return a raw text's tokens, with the model's tokens before and after it."""
        if self._around is None:
            return self._encode(text, special=True)
        before, after = self._around
        return [*before, *self._encode(text, special=False), *after]

    @property
    def tells_tools(self) -> str:
        """How a model is told of tools: by its own "template", as "text", or not at all: "none"."""
        return "none" if self._chat is None else "template" if self._chat.tells_tools else "text"

    @property
    def thinks(self) -> bool:
        """Whether a model thinks before it answers, or can."""
        return self._chat is not None and self._chat.markers is not None and bool(self._chat.markers.openings)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        think: bool | None = None,
        options: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        must_call: Sequence[str] = (),
        *,
        held: bool = False,
    ) -> list[int]:
        """Return a conversation's tokens up to the beginning of the answer; see `ChatTemplate.render`."""
        assert self._chat is not None
        text = self._chat.render(messages, think=think, options=options, tools=tools, must_call=must_call, held=held)
        return self._encode(text, special=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        return self._tokens.decode(tokens, skip_special_tokens=False)

    def stream_answer(
        self, prompt: Sequence[int] | None, tools: Sequence[Mapping[str, Any]] = (), *, held: bool = False
    ) -> AnswerText:
        """Return a stream that turns an answer's tokens into text one by one, its thinking and calls of `tools` apart.

        `prompt` are the tokens of a conversation; after any other text, None, there is neither. `held` says that calls
        are held to a grammar.
        """
        if prompt is None or self._chat is None:
            return AnswerText(self.stream_text)
        tail = self.decode(prompt[-_TAIL:])
        if not tools:
            return AnswerText(self.stream_text, self._chat.markers, tail)
        calls, markers = self._chat.calls, self._chat.call_markers
        if held:
            calls, markers = self._chat.held_calls, self._chat.held_markers
        return AnswerText(self.stream_text, markers, tail, CallReader(calls, tools))

    def write_grammar(self, form: HeldForm, prompt: Sequence[int] | None) -> str:
        """Return the grammar of an answer of this form after a `prompt`, as in `stream_answer`."""
        if prompt is None or self._chat is None:
            return write_grammar(form, added={}, ends=self.eos_token_ids)
        markers = self._chat.held_markers if form.tools else self._chat.markers
        return write_grammar(
            form,
            added=self._chat.added,
            ends=self.eos_token_ids,
            markers=markers,
            calls=self._chat.held_calls,
            thinks=markers is not None and markers.are_opened_by(self.decode(prompt[-_TAIL:])),
        )

    @property
    def json(self) -> str:
        """The whole of it as the tokenizers library writes it."""
        return self._tokens.to_str()

    @property
    def added(self) -> list[int]:
        """The tokens that ordinary text does not have."""
        return sorted(self._tokens.get_added_tokens_decoder())

    def stream_text(self) -> TextStream:
        """Return a stream that turns tokens into text one by one."""
        return TextStream(self._tokens, self._context, has_byte_runs=self._has_byte_runs)

    def tell(self, token: int) -> str:
        """Return the text of a token between others: with its leading blank."""
        stream = self.stream_text()
        return stream.feed(token) + stream.finish()

    def _encode(self, text: str, *, special: bool) -> list[int]:
        try:
            return self._tokens.encode(text, add_special_tokens=special).ids
        except Exception as error:  # a lone surrogate, or a text outside the vocabulary
            raise BadField(f"the model's tokenizer cannot read this text: {error}") from None


def open_tokenizer(directory: Path) -> Tokenizer:
    """Open the tokenizer of a shard set or a checkpoint. Raises CheckpointError."""

    def read(name: str) -> bytes | None:
        path = directory / name
        return path.read_bytes() if path.is_file() else None

    return read_tokenizer(read, str(directory))


def read_tokenizer(read: Read, where: str) -> Tokenizer:
    """Open the tokenizer whose files `read` returns. Raises CheckpointError, which names `where`, file and key."""
    return _Files(read, where).open()


class _Files:
    """The files of one tokenizer, and the errors that name them."""

    def __init__(self, read: Read, where: str) -> None:
        self._read = read
        self._where = where
        self._config = self._json(CONFIG)
        self._special = self._json(SPECIAL)

    def open(self) -> Tokenizer:
        tokens = self._open_tokens()
        self._compare(self._config)
        self._add_tokens(tokens)
        self._mark_special(tokens)
        model = self._json(MODEL)
        defaults = find_defaults(model)
        template = self._text("chat_template.jinja")
        chat = open_chat_template(
            {"chat_template": self._json("chat_template.json").get("chat_template"), **self._config},
            None if template is None else template.replace("\r\n", "\n").replace("\r", "\n"),
            defaults,
            tokens=tokens,
            named={name: token for name in _NAMED if (token := self._find_named(name)) is not None},
            refuse=lambda key, why: self._refuse(CONFIG, key, why),
        )
        ends = self._find_ends(tokens, model, defaults)
        if chat is not None and (end := _first_added(tokens, chat.find_turn_end())) is not None:
            ends.add(end)
        return Tokenizer(tokens, eos_token_ids=ends, chat=chat, around=self._find_around(tokens))

    def _open_tokens(self) -> tokenizers.Tokenizer:
        text = self._text(TOKENIZER)
        if text is None:
            raise CheckpointError(f"{self._where} has no {TOKENIZER}", hint=_MISSING)
        self._file = self._json(TOKENIZER)
        if isinstance(model := self._file.get("model"), dict) and model.get("dropout"):
            why = f"is {model['dropout']!r}: the same text would get other tokens each time"
            self._refuse(TOKENIZER, "model.dropout", why)
        try:
            tokens = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library has no class of its own for this
            raise CheckpointError(f"{self._where}: {TOKENIZER} cannot be read: {error}", hint=_MISSING) from None
        for added in self._file.get("added_tokens") or ():
            if (number := tokens.token_to_id(added["content"])) != added["id"]:
                why = f"gives {added['content']!r} the number {added['id']}, and the tokenizers library reads {number}"
                self._refuse(TOKENIZER, "added_tokens", why)
        tokens.no_truncation()
        tokens.no_padding()
        for key in _SWITCHES:
            if not isinstance(self._config.get(key), bool | None):
                self._refuse(CONFIG, key, f"is {self._config[key]!r}, neither true nor false")
        tokens.encode_special_tokens = bool(self._config.get("split_special_tokens"))
        return tokens

    def _compare(self, config: Json) -> None:
        """Refuse a key with which transformers would split text differently from tokenizer.json."""
        for key, section, kind, said in _TOLD_TWICE:
            for part in _parts(self._file.get(section)):
                if part.get("type") == kind and config.get(key) is not None and config[key] != said(part):
                    self._refuse(CONFIG, key, f"is {config[key]!r}, and the {section} of {TOKENIZER} says otherwise")
        if config.get("fix_mistral_regex"):
            self._refuse(CONFIG, "fix_mistral_regex", f"is not supported: {TOKENIZER} alone says how a text is split")
        if config.get("tokenizer_class") == "NewlineTokenizer":
            why = "is NewlineTokenizer, which rewrites line ends: that is not supported"
            self._refuse(CONFIG, "tokenizer_class", why)

    def _add_tokens(self, tokens: tokenizers.Tokenizer) -> None:
        """Add the tokens that only the other files name; refuse a number that tokenizer.json does not give them."""
        known = {token.content for token in tokens.get_added_tokens_decoder().values()}
        listed = self._config.get("added_tokens_decoder") or {}
        try:
            wanted = sorted((int(number), _content(told), _flags(told)) for number, told in listed.items())
            for number, content, flags in wanted:
                if content not in known:
                    tokens.add_tokens([tokenizers.AddedToken(**flags)])
                self._check_number(tokens, CONFIG, "added_tokens_decoder", content, number)
        except (TypeError, ValueError, AttributeError) as error:
            self._refuse(CONFIG, "added_tokens_decoder", f"cannot be read: {error}")
        for content, number in self._json(ADDED).items():
            self._check_number(tokens, ADDED, repr(content), content, number)

    def _mark_special(self, tokens: tokenizers.Tokenizer) -> None:
        """Mark the tokens as special that only the other files mark so."""
        for name in _NAMED:
            token = self._find_named(name)
            if token is not None and tokens.token_to_id(token) is not None:
                tokens.add_special_tokens([token])
            elif token is not None and name in ("bos_token", "eos_token"):
                self._refuse(CONFIG, name, f"is {token!r}, which is not a token of {TOKENIZER}")
        for file, where in ((CONFIG, self._config), (SPECIAL, self._special)):
            for key in _LISTS:
                for content in self._contents(file, key, where.get(key)):
                    if tokens.token_to_id(content) is None:
                        self._refuse(file, key, f"has {content!r}, which is not a token of {TOKENIZER}")
                    tokens.add_special_tokens([content])

    def _check_number(self, tokens: tokenizers.Tokenizer, file: str, key: str, content: str, number: Any) -> None:
        if tokens.token_to_id(content) != number or tokens.id_to_token(number) != content:
            has = tokens.token_to_id(content)
            why = f"gives {content!r} the number {number!r}, and {TOKENIZER} gives it {'none' if has is None else has}"
            self._refuse(file, key, why)

    def _find_ends(self, tokens: tokenizers.Tokenizer, model: Json, defaults: Json) -> set[int]:
        """Return every token that ends an answer according to one of the files, else to mlx-lm."""
        text = model.get("text_config")
        told = [
            (GENERATION, "eos_token_id", self._json(GENERATION).get("eos_token_id")),
            (MODEL, "eos_token_id", model.get("eos_token_id")),
            (MODEL, "text_config.eos_token_id", text.get("eos_token_id") if isinstance(text, dict) else None),
            (CONFIG, "eos_token", _content(self._config.get("eos_token"))),
            (SPECIAL, "eos_token", _content(self._special.get("eos_token"))),
        ]
        if all(value in (None, []) for _, _, value in told[:3]):
            told.append((MODEL, "model_type", defaults.get("eos_token_ids")))
        ends: set[int] = set()
        for file, key, value in told:
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, str):
                    number = None if item.isdigit() else tokens.token_to_id(item)
                    if number is None:
                        self._refuse(file, key, f"has {item!r}, which is not a token of {TOKENIZER}")
                    ends.add(number)
                elif isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 31:
                    ends.add(item)
                elif item is not None:
                    self._refuse(file, key, f"has {item!r}: it should be a token's number, its text, or a list of them")
        return ends

    def _find_around(self, tokens: tokenizers.Tokenizer) -> tuple[list[int], list[int]] | None:
        """Return the tokens of add_bos_token and add_eos_token; None where tokenizer.json adds the same."""
        own = tokens.encode("").ids
        bos, eos = (self._number(tokens, name) for name in ("bos_token", "eos_token"))
        starts = bos is not None and own[:1] == [bos]
        ends = eos is not None and own[starts:][-1:] == [eos]
        wished = [self._config.get(key) for key in ("add_bos_token", "add_eos_token")]
        for key, wish, number in zip(("add_bos_token", "add_eos_token"), wished, (bos, eos), strict=True):
            if wish and number is None:
                self._refuse(CONFIG, key, f"is true, and there is no {key.removeprefix('add_')}")
        before, after = (there if wish is None else wish for wish, there in zip(wished, (starts, ends), strict=True))
        if (before, after) == (starts, ends):
            return None
        if len(own) != starts + ends:
            key = "add_bos_token" if before != starts else "add_eos_token"
            self._refuse(CONFIG, key, f"is {self._config[key]!r}, and the post_processor of {TOKENIZER} says otherwise")
        return [bos] * before, [eos] * after  # type: ignore[list-item]

    def _number(self, tokens: tokenizers.Tokenizer, name: str) -> int | None:
        token = self._find_named(name)
        return None if token is None else tokens.token_to_id(token)

    def _find_named(self, name: str) -> str | None:
        """Return the special token of this name, such as `bos_token`."""
        told = [(file, _content(where.get(name))) for file, where in ((CONFIG, self._config), (SPECIAL, self._special))]
        for file, token in told:
            if not isinstance(token, str | None):
                self._refuse(file, name, f"is {token!r}: it should be a token's text")
        return next((token for _, token in told if token), None)

    def _contents(self, file: str, key: str, value: Any) -> list[str]:
        items = list(value.values()) if isinstance(value, dict) else value or []
        told = [_content(item) for item in items] if isinstance(items, list) else [None]
        contents = [content for content in told if isinstance(content, str)]
        if len(contents) != len(told):
            self._refuse(file, key, f"is {value!r}: it should be a list of tokens")
        return contents

    def _text(self, name: str) -> str | None:
        try:
            data = self._read(name)
            return None if data is None else data.decode("utf-8-sig")  # some editors write a byte order mark
        except OSError as error:
            raise CheckpointError(f"{self._where}: {name} cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self._where}: {name} is not UTF-8: {error}", hint=_HINT) from None

    def _json(self, name: str) -> Json:
        text = self._text(name)
        try:
            value = {} if text is None else json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self._where}: {name} is not valid JSON: {error}", hint=_HINT) from None
        if not isinstance(value, dict):
            raise CheckpointError(f"{self._where}: {name} is not a JSON object", hint=_HINT)
        return value

    def _refuse(self, file: str, key: str, why: str) -> NoReturn:
        raise CheckpointError(f"{self._where}: {file}: {key} {why}", hint=_HINT)


def _parts(node: Any) -> Iterator[Json]:
    """Yield a section of tokenizer.json, and its parts where it is a sequence."""
    if isinstance(node, dict):
        yield node
        for parts in node.values():
            if isinstance(parts, list):
                for part in parts:
                    yield from _parts(part)


def _content(token: Any) -> Any:
    """Return the text of a token, which may be an object with flags."""
    return token.get("content") if isinstance(token, dict) else token


def _flags(told: Json) -> Json:
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {name: told[name] for name in names if name in told}


def _first_added(tokens: tokenizers.Tokenizer, text: str) -> int | None:
    """Return the first token of a text where it is an added token, which ordinary text does not have."""
    first = tokens.encode(text, add_special_tokens=False).ids[:1]
    return next((number for number in first if number in tokens.get_added_tokens_decoder()), None)
