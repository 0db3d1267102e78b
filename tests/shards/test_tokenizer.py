"""A tokenizer is opened as its files say: equal to tokenizers' own reading of tokenizer.json, or refused by key."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx_lm.models
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings, strategies as st

from moectl.engine.answer import read_prompt
from moectl.engine.request import Request
from moectl.errors import CheckpointError, UsageError
from moectl.shards import prepare
from moectl.shards.chat.chat_template import find_defaults
from moectl.shards.chat.tokenizer import Tokenizer, open_tokenizer
from tests.support import vocabularies
from tests.support.tiny import write_checkpoint
from tests.support.vocabularies import TEXTS
from tests.support.words import ask_chat

TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML = {"bos_token": None, "eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "chat_template": TEMPLATE}
Files = dict[str, Any]


@pytest.fixture(scope="module")
def cl100k() -> str:
    return vocabularies.make_cl100k().to_str()


@pytest.fixture(scope="module")
def llama() -> str:
    return vocabularies.make_llama().to_str()


@pytest.fixture
def write(tmp_path: Path, cl100k: str) -> Callable[..., Path]:
    """Write a tokenizer's files: cl100k's kind with ChatML, with `changes` by file name; None removes a file."""

    def write(changes: Files | None = None, **config: Any) -> Path:
        files: Files = {"tokenizer.json": cl100k, "tokenizer_config.json": CHATML | config, **(changes or {})}
        for name, value in files.items():
            if value is not None:
                data = value if isinstance(value, bytes) else value.encode() if isinstance(value, str) else None
                (tmp_path / name).write_bytes(json.dumps(value).encode() if data is None else data)
        return tmp_path

    return write


def own(directory: Path) -> tokenizers.Tokenizer:
    """Return the reading that counts."""
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


def number(directory: Path, token: str) -> int:
    found = own(directory).token_to_id(token)
    assert found is not None
    return found


def changed(text: str, change: Callable[[Any], object]) -> str:
    told = json.loads(text)
    change(told)
    return json.dumps(told)


@pytest.mark.parametrize(
    "kind",
    ["PreTrainedTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", "Own", None],
)
def test_tokens_are_those_of_tokenizer_json_whatever_the_class(write: Callable[..., Path], kind: str | None) -> None:
    directory = write(tokenizer_class=kind, auto_map={"AutoTokenizer": ["evil.Evil", None]})
    tokenizer = open_tokenizer(directory)
    for text in TEXTS:
        assert tokenizer.encode(text) == own(directory).encode(text).ids


def test_a_start_token_and_blanks_as_marks(write: Callable[..., Path], llama: str) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer", "legacy": True}
    directory = write({"tokenizer.json": llama, "tokenizer_config.json": config | {"add_bos_token": True}})
    for text in TEXTS:
        assert open_tokenizer(directory).encode(text) == own(directory).encode(text).ids
    write({"tokenizer.json": llama, "tokenizer_config.json": config | {"add_bos_token": False, "add_eos_token": True}})
    tokens = open_tokenizer(directory).encode("return 42")
    assert tokens == [*own(directory).encode("return 42", add_special_tokens=False).ids, number(directory, "</s>")]


def test_a_start_token_that_tokenizer_json_does_not_add(write: Callable[..., Path]) -> None:
    directory = write(add_bos_token=True, bos_token={"content": "<|endoftext|>", "lstrip": False})
    assert open_tokenizer(directory).encode("x") == [
        number(directory, "<|endoftext|>"),
        *own(directory).encode("x").ids,
    ]


def test_nothing_is_cut_and_nothing_is_padded(write: Callable[..., Path], cl100k: str) -> None:
    tokens = tokenizers.Tokenizer.from_str(cl100k)
    tokens.enable_truncation(3)
    tokens.enable_padding(length=9)
    directory = write({"tokenizer.json": tokens.to_str()}, model_max_length=3)
    assert (
        open_tokenizer(directory).encode("one two three four")
        == tokenizers.Tokenizer.from_str(cl100k).encode("one two three four").ids
    )
    prompt = read_prompt(ask_chat(1, "one two three", 1), open_tokenizer(directory), vocab_size=9999, max_seq_len=9999)
    assert len(prompt) > 9


def test_files_may_begin_with_a_byte_order_mark(write: Callable[..., Path], cl100k: str) -> None:
    mark = b"\xef\xbb\xbf"
    directory = write(
        {
            "tokenizer.json": mark + cl100k.encode(),
            "tokenizer_config.json": mark + json.dumps({"eos_token": "<|endoftext|>"}).encode(),
            "generation_config.json": mark + b'{"eos_token_id": [7]}',
            "chat_template.jinja": mark + TEMPLATE.encode(),
        }
    )
    tokenizer = open_tokenizer(directory)
    assert {7} < tokenizer.eos_token_ids
    assert tokenizer.encode("a 123") == tokenizers.Tokenizer.from_str(cl100k).encode("a 123").ids
    assert tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "x"}])).startswith("<|im_start|>user")


# The chat template.

ALL = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": TEMPLATE}]


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": CHATML},
        {"tokenizer_config.json": CHATML | {"chat_template": ALL}},
        {"tokenizer_config.json": CHATML | {"chat_template": {each["name"]: each["template"] for each in ALL}}},
        {
            "tokenizer_config.json": CHATML | {"chat_template": "old"},
            "chat_template.jinja": TEMPLATE.replace("\n", "\r\n"),
        },
        {"tokenizer_config.json": {}, "chat_template.json": {"chat_template": TEMPLATE}},
        {"tokenizer_config.json": None, "chat_template.jinja": TEMPLATE},
    ],
    ids=["text", "list", "names", "file wins", "json file", "no config"],
)
def test_a_chat_template_in_each_form(write: Callable[..., Path], files: Files) -> None:
    directory = write(files)
    tokenizer = open_tokenizer(directory)
    assert tokenizer.has_chat_template
    text = "<|im_start|>user\n a 12345<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode_chat([{"role": "user", "content": " a 12345"}]) == own(directory).encode(text).ids
    assert number(directory, "<|im_end|>") in tokenizer.eos_token_ids


def test_a_template_of_mlx_lm(write: Callable[..., Path]) -> None:
    tokenizer = open_tokenizer(write(chat_template_type="deepseek_v32"))
    assert "<｜User｜>x" in tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "x"}]))
    tokenizer = open_tokenizer(write(chat_template_type="muse_spark"))
    assert tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "x"}])).startswith("<|im_start|>user")


@pytest.mark.parametrize("files", [{}, {"chat_template.jinja": ""}, {"chat_template.jinja": "\n"}], ids=str)
@pytest.mark.parametrize("template", [None, "", " "])
def test_a_model_without_a_chat_template(write: Callable[..., Path], files: Files, template: str | None) -> None:
    tokenizer = open_tokenizer(write(files, chat_template=template))
    assert not tokenizer.has_chat_template
    with pytest.raises(UsageError, match="no chat template"):
        read_prompt(ask_chat(1, "x", 1), tokenizer, vocab_size=9999, max_seq_len=9999)


# What ends an answer.


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        ({"eos_token_id": 5}, {}, {5}),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, {5, 6, 7}),
        ({"eos_token_id": [5, None]}, {"eos_token_id": None}, {5}),
        ({"eos_token_id": None}, {"eos_token_id": [8]}, {8}),
        ({}, {"text_config": {"eos_token_id": 9}}, {9}),
        ({"eos_token_id": "<|pad|>"}, {"eos_token_id": [5, "<|im_start|>"]}, {5, "<|pad|>", "<|im_start|>"}),
        (None, None, set()),
    ],
    ids=lambda value: str(value) if not isinstance(value, set) else "",
)
def test_every_file_says_what_ends_an_answer(
    write: Callable[..., Path], generation: Any, config: Any, wanted: set[int | str]
) -> None:
    directory = write({"generation_config.json": generation, "config.json": config}, chat_template=None)
    ends = {token if isinstance(token, int) else number(directory, token) for token in wanted}
    assert open_tokenizer(directory).eos_token_ids == ends | {number(directory, "<|endoftext|>")}


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (TEMPLATE, {"<|im_end|>"}),
        ("{% for m in messages %}{{ m.content }} <|im_end|>{% endfor %}", {"<|im_end|>"}),
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}", {"<|im_start|>"}),
        # As gpt-oss: a turn ends in another way where it is the last, and only that is the answer's end.
        (
            "{% for m in messages %}{{ m.content }}{{ '<|im_end|>' if loop.last else '<|im_start|>' }}{% endfor %}",
            {"<|im_end|>"},
        ),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", set()),
        ("{{ raise_exception('no') }}", set()),
        ("{% if %}", set()),
    ],
)
def test_what_a_template_puts_after_a_turn_ends_an_answer(
    write: Callable[..., Path], template: str, wanted: set[str]
) -> None:
    directory = write(chat_template=template)
    ends = {number(directory, token) for token in wanted}
    assert open_tokenizer(directory).eos_token_ids == ends | {number(directory, "<|endoftext|>")}


def test_what_mlx_lm_knows_of_a_kind_of_model(write: Callable[..., Path]) -> None:
    directory = write({"config.json": {"model_type": "muse_spark"}})
    assert {200001, 200008} < open_tokenizer(directory).eos_token_ids


# What is refused.

REFUSED: list[tuple[Files, str]] = [
    ({"generation_config.json": {"eos_token_id": [0, 1.5]}}, "generation_config.json: eos_token_id has 1.5"),
    ({"generation_config.json": {"eos_token_id": [[0]]}}, "generation_config.json: eos_token_id has [0]"),
    ({"generation_config.json": {"eos_token_id": True}}, "generation_config.json: eos_token_id has True"),
    ({"generation_config.json": {"eos_token_id": -1}}, "generation_config.json: eos_token_id has -1"),
    ({"generation_config.json": {"eos_token_id": {"a": 1}}}, "generation_config.json: eos_token_id has {'a': 1}"),
    ({"generation_config.json": {"eos_token_id": "<|no|>"}}, "generation_config.json: eos_token_id has '<|no|>'"),
    ({"generation_config.json": {"eos_token_id": "3"}}, "generation_config.json: eos_token_id has '3'"),
    ({"generation_config.json": "[]"}, "generation_config.json is not a JSON object"),
    ({"generation_config.json": "{"}, "generation_config.json is not valid JSON"),
    ({"generation_config.json": b"\xff"}, "generation_config.json is not UTF-8"),
    ({"config.json": {"eos_token_id": [None, "<|no|>"]}}, "config.json: eos_token_id has '<|no|>'"),
    ({"special_tokens_map.json": {"eos_token": "<|no|>"}}, "special_tokens_map.json: eos_token has '<|no|>'"),
    ({"added_tokens.json": {"<|new|>": 3}}, "added_tokens.json: '<|new|>' gives '<|new|>' the number 3"),
    ({"tokenizer.json": "{}"}, "tokenizer.json cannot be read"),
    ({"tokenizer.json": "{"}, "tokenizer.json is not valid JSON"),
    ({"tokenizer.json": None}, "has no tokenizer.json"),
]
CONFIGS: list[tuple[str, Any]] = [
    ("eos_token", "<|no|>"),
    ("eos_token", 3),
    ("bos_token", "<|no|>"),
    ("additional_special_tokens", ["<|no|>"]),
    ("additional_special_tokens", [5]),
    ("extra_special_tokens", {"image_token": "<|no|>"}),
    ("added_tokens_decoder", {"3": {"content": "<|new|>"}}),
    ("added_tokens_decoder", {"x": {"content": "<|new|>"}}),
    ("added_tokens_decoder", {"3": "<|new|>"}),
    ("added_tokens_decoder", ["<|new|>"]),
    ("add_bos_token", True),
    ("add_bos_token", "yes"),
    ("add_prefix_space", True),
    ("fix_mistral_regex", True),
    ("tokenizer_class", "NewlineTokenizer"),
    ("chat_template", 5),
    ("chat_template", ["x"]),
    ("chat_template", [{"name": "tool_use", "template": "x"}]),
    ("chat_template_type", "evil"),
]


@pytest.mark.parametrize(("files", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_a_malformed_file_is_named(write: Callable[..., Path], files: Files, said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_tokenizer(write(files))
    assert said in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(("key", "value"), CONFIGS, ids=str)
def test_a_key_that_is_not_obeyed_is_named(write: Callable[..., Path], key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: {key} "):
        open_tokenizer(write(**{key: value}))


def test_keys_of_tokenizer_json_that_are_not_obeyed(write: Callable[..., Path], cl100k: str) -> None:
    random = changed(cl100k, lambda told: told["model"].update(dropout=0.1))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: model\.dropout is 0\.1"):
        open_tokenizer(write({"tokenizer.json": random}))
    token = json.loads(cl100k)["added_tokens"][0] | {"id": 90_000, "content": "<|far|>"}
    far = changed(cl100k, lambda told: told["added_tokens"].append(token))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: added_tokens gives '<\|far\|>' the number 90000"):
        open_tokenizer(write({"tokenizer.json": far}))


def test_tokens_that_only_another_file_names(write: Callable[..., Path], cl100k: str) -> None:
    """A number that fits is obeyed, and a token of the vocabulary becomes a special one."""
    plain = changed(cl100k, lambda told: told.update(added_tokens=[]))
    told = {str(json.loads(cl100k)["model"]["vocab"]["<|im_start|>"]): {"content": "<|im_start|>", "special": True}}
    directory = write({"tokenizer.json": plain}, added_tokens_decoder=told, additional_special_tokens=["<|im_end|>"])
    numbers = open_tokenizer(directory).encode("a<|im_start|>b<|im_end|>")
    assert [numbers[1], numbers[3]] == [number(directory, "<|im_start|>"), number(directory, "<|im_end|>")]


def test_special_tokens_may_be_split(write: Callable[..., Path]) -> None:
    tokenizer = open_tokenizer(write(split_special_tokens=True))
    assert len(tokenizer.encode("<|im_end|>")) > 1


def test_a_text_that_the_vocabulary_cannot_spell_is_refused() -> None:
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="?"))
    with pytest.raises(UsageError, match="tokenizer cannot read this text"):
        read_prompt(Request(1, "b", 1), Tokenizer(tokens, eos_token_ids=set()), vocab_size=9, max_seq_len=9)


# Before anything is written.


@pytest.mark.parametrize("files", [REFUSED[0][0], {"tokenizer_config.json": CHATML | {"eos_token": "<|no|>"}}], ids=str)
def test_shard_refuses_before_it_writes(write: Callable[..., Path], tmp_path: Path, files: Files) -> None:
    write_checkpoint(tmp_path)
    source = write(files)
    planned: list[str] = []

    def begin(label: str, _: int) -> Callable[[int], None]:
        planned.append(label)
        return lambda _: None

    with pytest.raises(CheckpointError, match=next(iter(files))):
        prepare.shard(str(source), prepare.Wanted(), directory=tmp_path / "out", bars=begin)
    assert not planned
    assert not (tmp_path / "out").exists()


# Real files, changed anyhow: the same tokens as tokenizers', or a refusal that names the file.

CONFIG_CHANGES: dict[str, st.SearchStrategy[Any]] = {
    "tokenizer_class": st.sampled_from(["GPT2Tokenizer", "LlamaTokenizerFast", "T5Tokenizer", "X", None]),
    "add_prefix_space": st.sampled_from([True, False, None]),
    "add_eos_token": st.sampled_from([False, None]),
    "clean_up_tokenization_spaces": st.booleans(),
    "legacy": st.booleans(),
    "from_slow": st.booleans(),
    "do_lower_case": st.booleans(),
    "use_fast": st.booleans(),
    "model_max_length": st.sampled_from([3, 10**30]),
    "truncation_side": st.sampled_from(["left", "right"]),
    "unk_token": st.sampled_from([None, "[UNK]", "<|pad|>"]),
    "pad_token": st.sampled_from([None, "[PAD]", {"content": "<|pad|>", "__type": "AddedToken"}]),
    "eos_token": st.sampled_from([None, "<|im_end|>", "<|no|>"]),
    "additional_special_tokens": st.sampled_from([None, [], ["<|im_end|>"], ["<|no|>"]]),
}
SPLITS = [
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    },
    {"type": "None"},
]
FILE_CHANGES: dict[str, st.SearchStrategy[Any]] = {
    "pre_tokenizer": st.sampled_from(SPLITS),
    "normalizer": st.sampled_from([None, {"type": "NFC"}, {"type": "NFKC"}, {"type": "Lowercase"}, {"type": "X"}]),
    "truncation": st.just({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}),
    "padding": st.just(
        {
            "strategy": {"Fixed": 8},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "!",
        }
    ),
}

MODEL_CHANGES: dict[str, st.SearchStrategy[Any]] = {
    "ignore_merges": st.booleans(),
    "dropout": st.sampled_from([None, 0.0, 0.5]),
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=st.fixed_dictionaries({}, optional=CONFIG_CHANGES),
    file=st.fixed_dictionaries({}, optional=FILE_CHANGES),
    model=st.fixed_dictionaries(
        {}, optional={"ignore_merges": st.booleans(), "dropout": st.sampled_from([None, 0.0, 0.5])}
    ),
)
def test_tokens_equal_those_of_tokenizers_or_the_key_is_named(
    write: Callable[..., Path], cl100k: str, config: Files, file: Files, model: Files
) -> None:
    def change(told: Any) -> None:
        told.update(file)
        told["model"].update(model)

    directory = write({"tokenizer.json": changed(cl100k, change)}, **config)
    try:
        tokenizer: Tokenizer = open_tokenizer(directory)
    except CheckpointError as error:
        assert "tokenizer.json cannot be read" in error.message or any(  # noqa: PT017
            f": {key} " in error.message for key in (*config, "model.dropout")
        )
        return
    reference = own(directory)
    reference.no_truncation()
    reference.no_padding()
    for text in TEXTS:
        assert tokenizer.encode(text) == reference.encode(text).ids


def test_what_mlx_lm_says_in_a_model_file_is_read_without_running_it() -> None:
    models = Path(mlx_lm.models.__file__).parent
    told = [path.stem for path in sorted(models.glob("*.py")) if "TOKENIZER_DEFAULTS" in path.read_text()]
    assert told
    for name in told:
        assert find_defaults({"model_type": name}) == import_module(f"mlx_lm.models.{name}").TOKENIZER_DEFAULTS
    for kind in ("llama", "kimi_k2", "no_such_type", "../utils", None, 7, ["muse_spark"]):
        assert find_defaults({"model_type": kind}) == {}
    assert find_defaults({"model_type": "bailing_hybrid", "architectures": ["BailingMoeV3ForCausalLM", 3]}) == {}


def test_no_file_of_a_checkpoint_names_a_module(write: Callable[..., Path]) -> None:
    for kind in ("os", "..utils", "deepseek_v32.copy", ["deepseek_v32"]):
        with pytest.raises(CheckpointError, match="and moectl knows deepseek_v32 and muse_spark"):
            open_tokenizer(write(chat_template_type=kind))
