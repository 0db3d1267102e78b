"""A tokenizer.json made from a tiktoken vocabulary: the tokens and the text of the tiktoken library, or a refusal."""

from __future__ import annotations

import base64
import json
import random
import shlex
import unicodedata
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
from tokenizers import Regex, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from moectl.errors import CheckpointError
from moectl.shards.chat.tiktoken_file import KINDS, convert
from moectl.shards.chat.tokenizer import open_tokenizer
from moectl.shards.source.checkpoint import open_checkpoint
from moectl.shards.tokenizer_files import choose_tokenizer, fetch_tokenizer
from tests.shards.test_tokenizer_files import moectl
from tests.support.tiny import write_checkpoint, write_words
from tests.support.vocabularies import CORPUS

SIZE = 700  # tokens of the vocabularies here
PLACES = {
    "TikTokenTokenizer": "tokenization_kimi",
    "QWenTokenizer": "tokenization_qwen",
    "HYTokenizer": "tokenization_hy",
    "Phi3SmallTokenizer": "tokenization_phi3_small",
}
NAMED = {"[BOS]": 0, "[EOS]": 1, "<|im_end|>": 2, "<think>": 22, "[PAD]": 255}
TEXTS = (
    "",
    "Hello, world! It's WE'LL don't I'M 'tis 'S",
    "中文English混合，北京市 Pascal。汉字abc 㐀𠀀々〇",
    "Привет, мир! Ёлка ҐЄЇ",
    "こんにちは、世界。カタカナ ﾊﾝｶｸ 한국어 조선말",
    "مرحبا بالعالم ١٢٣ שלום עולם עִבְרִית",
    "नमस्ते दुनिया १२३ สวัสดีชาวโลก ជំរាបសួរ မင်္ဂလာပါ ગુજરાતી தமிழ்",
    "Γειά σου Κόσμε · Tiếng Việt: Nguyễn ‒ e\u0301 vs é, Å \u212b ﬁ ǅ ſ K",
    "def f(x):\n    if x >= 10:  # done\r\n\treturn [x_1, 'a', 0x1F]\n\n\n  }\n",
    "#include <a.h>\nint main(void){return 1234567+89.0e-10;}\r\n\r\n",
    "😀👍🏽 👨‍👩‍👧‍👦 🇩🇪 ☃\ufe0f ½ ² Ⅷ ① ٪ \u200b\u2028\u2029\x85\xa0\u3000",
    "   \n\n \t\t  x    y\n   ",
    " " * 90 + "=" * 70 + "\n" * 9 + "aaaaaaaaaaaaaaaaaaaaaaaaa" + "abab" * 9,
    "<|im_end|><|endoftext|>[BOS] a<|im_start|>b <|reserved_token_1|> <|im_end| <think>\n</think>",
    "\x00\x01\x7f\ufffd\ufeff\U0010ffff",
)


@cache
def ranks_of(kind: str) -> dict[bytes, int]:
    """Return a small vocabulary, learnt from text that is split as this tokenizer splits it."""
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(KINDS[kind].split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = list(bytes_to_unicode().values())
    learner.train_from_iterator(
        [*CORPUS, *TEXTS], trainers.BpeTrainer(vocab_size=SIZE, initial_alphabet=alphabet, show_progress=False)
    )
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    vocabulary = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    return {bytes(byte_of[char] for char in token): number for token, number in vocabulary}


def write_vocabulary(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def write_tokenizer(directory: Path, kind: str, **config: Any) -> Path:
    """Write the files of such a tokenizer as they are published, beside a checkpoint's weights or alone."""
    directory.mkdir(parents=True, exist_ok=True)
    first = len(ranks_of(kind))
    told: dict[str, Any] = {
        "tokenizer_class": kind,
        "auto_map": {"AutoTokenizer": [f"{PLACES[kind]}.{kind}", None]},
        **config,
    }
    if kind == "TikTokenTokenizer":
        told["added_tokens_decoder"] = {str(first + i): {"content": name, "special": True} for name, i in NAMED.items()}
        told |= {"bos_token": "[BOS]", "eos_token": "[EOS]"}
    (directory / "tokenizer_config.json").write_text(json.dumps(told))
    (directory / KINDS[kind].vocabulary).write_bytes(write_vocabulary(ranks_of(kind)))
    code = "raise SystemExit('run')\n" + "\n".join(KINDS[kind].marks)
    (directory / f"{PLACES[kind]}.py").write_text(code, encoding="utf-8")
    return directory


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name a tokenizer, which need not have as many tokens here as it has."""
    name: str = request.param
    monkeypatch.setitem(KINDS, name, replace(KINDS[name], starts=KINDS[name].starts and SIZE))
    return name


def texts() -> list[str]:
    """Return the texts, and random ones of their characters and of pieces where splits differ."""
    draw = random.Random(3)
    pieces = [
        *set("".join(TEXTS)),
        "'s",
        "'LL",
        "  ",
        "\r\n",
        "\n\n",
        "123",
        "中文",
        "e\u0301",
        "ab",
        "==",
        "<|im_end|>",
    ]
    return [*TEXTS, *("".join(draw.choices(pieces, k=draw.randint(1, 40))) for _ in range(600))]


def test_its_tokens_and_texts_are_those_of_tiktoken(kind: str, tmp_path: Path) -> None:
    fetched = fetch_tokenizer(str(write_tokenizer(tmp_path, kind)), 2 * SIZE)
    made = tokenizers.Tokenizer.from_file(str(fetched.files["tokenizer.json"]))
    named = {len(ranks_of(kind)) + i: name for name, i in NAMED.items()} if kind == "TikTokenTokenizer" else {}
    theirs = tiktoken.Encoding(
        kind,
        pat_str=KINDS[kind].split,
        mergeable_ranks=ranks_of(kind),
        special_tokens=KINDS[kind].name_special(len(ranks_of(kind)), named),
    )
    for text in texts():
        composed = unicodedata.normalize("NFC", text) if KINDS[kind].composes else text
        tokens = theirs.encode(composed, allowed_special="all")
        assert made.encode(text).ids == tokens
        assert made.decode(tokens, skip_special_tokens=False) == theirs.decode(tokens) == composed
    for number in range(theirs.n_vocab):
        assert made.decode([number], skip_special_tokens=False) == theirs.decode([number])


def test_kimi_splits_han_from_other_letters() -> None:
    split = pre_tokenizers.Split(Regex(KINDS["TikTokenTokenizer"].split), "isolated")
    assert [piece for piece, _ in split.pre_tokenize_str("中文English混合 12345")] == [
        *("中文", "English", "混合", " ", "123", "45")
    ]


def test_names_that_only_the_code_has() -> None:
    """The numbers are those of the published repositories."""
    phi = KINDS["Phi3SmallTokenizer"].name_special(100256, {})
    assert (phi["<|end|>"], phi["<|dummy_id_2|>"], phi["<|endofprompt|>"]) == (100266, 100256, 100276)
    assert (phi["<|dummy_id_11|>"], phi["<|dummy_id_12|>"], phi["<|dummy_id_86|>"]) == (100275, 100277, 100351)
    assert sorted(phi.values()) == list(range(100256, 100352))
    qwen = KINDS["QWenTokenizer"].name_special(151643, {})
    assert (qwen["<|im_end|>"], qwen["<|extra_204|>"]) == (151645, 151850)
    kimi = KINDS["TikTokenTokenizer"].name_special(163584, {163586: "<|im_end|>"})
    assert (kimi["<|im_end|>"], kimi["<|reserved_token_163600|>"]) == (163586, 163600)
    assert KINDS["HYTokenizer"].name_special(127957, {})["<|eos|>"] == 127960


def test_a_model_of_kimis_kind_is_cut_with_a_tokenizer(tmp_path: Path) -> None:
    source, out = write_checkpoint(tmp_path / "kimi", vocab_size=SIZE + 256), tmp_path / "set"
    write_tokenizer(source, "TikTokenTokenizer", chat_template="{{ messages[0].content }}<|im_end|>")
    said = moectl(tmp_path, "shard", str(source), "--nodes", "1", "-o", str(out), "--no-canary")
    assert "kimi has no tokenizer.json: making it from its tiktoken vocabulary." in said
    assert "tokenizer.json" in json.loads((out / "moectl.json").read_text())["files"]
    assert not list(out.glob("*.py"))
    tokenizer = open_tokenizer(out)
    assert tokenizer.encode_chat([{"role": "user", "content": "a"}])[-1] == SIZE + 2
    assert SIZE + 1 in tokenizer.eos_token_ids
    before = (out / "tokenizer.json").stat().st_mtime_ns
    moectl(tmp_path, "shard", str(source), "--nodes", "1", "-o", str(out), "--no-canary")
    assert (out / "tokenizer.json").stat().st_mtime_ns == before


def test_special_tokens_beyond_the_models_vocabulary_are_left_out(tmp_path: Path) -> None:
    fetched = fetch_tokenizer(str(write_tokenizer(tmp_path, "TikTokenTokenizer")), SIZE + 256)
    assert tokenizers.Tokenizer.from_file(str(fetched.files["tokenizer.json"])).get_vocab_size() == SIZE + 256


def test_an_unknown_one_is_refused_and_the_flag_of_the_hint_helps(tmp_path: Path) -> None:
    source = write_tokenizer(write_checkpoint(tmp_path / "new", vocab_size=2 * SIZE), "TikTokenTokenizer")
    config = {"tokenizer_class": "OtherTokenizer", "auto_map": {"AutoTokenizer": ["a--b.OtherTokenizer", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    shard = ("shard", str(source), "--nodes", "1", "-o", str(tmp_path / "set"), "--no-canary")
    said = moectl(tmp_path, *shard, code=4)
    assert "new: moectl cannot convert tiktoken.model of the tokenizer class OtherTokenizer" in said
    hint = said.partition("Hint: ")[2]
    assert hint.startswith("--tokenizer REPO|DIR")
    assert not (tmp_path / "set").exists()
    flag = shlex.split(hint)[0]
    moectl(tmp_path, *shard, flag, str(write_words(tmp_path / "words")))


def refusal(source: Path, vocabulary: int = 2 * SIZE) -> str:
    with pytest.raises(CheckpointError) as caught:
        fetch_tokenizer(str(source), vocabulary)
    return caught.value.message


def test_code_that_is_not_the_known_one_is_refused(kind: str, tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / kind, kind)
    (source / f"{PLACES[kind]}.py").write_text("PAT_STR = r'\\p{L}+'\n")
    assert f"{PLACES[kind]}.py is not the {kind} that moectl knows: it does not contain " in refusal(source)
    (source / f"{PLACES[kind]}.py").unlink()  # a copy without code
    assert fetch_tokenizer(str(source), 2 * SIZE).files["tokenizer.json"].is_file()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda lines: [*lines[:-1], b"?? 9"], f"line {SIZE} is not a token and its rank"),
        (lambda lines: [b"version https://git-lfs"], "line 1 is not a token and its rank"),
        (lambda lines: lines[:5] + lines[6:], "line 6 has the rank 6"),
        (lambda lines: [*lines[:300], lines[7].split()[0] + b" 300"], "line 301 has the rank 300"),
        (lambda lines: lines[:255], "has no token for the byte 0x"),
        (lambda lines: [], "has no token for the byte 0x00"),
        (
            lambda lines: lines[:-9],
            f"has {SIZE - 9} tokens, and the first special token of TikTokenTokenizer is {SIZE}",
        ),
    ],
)
def test_a_damaged_vocabulary_is_refused(change: Any, why: str, tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / "kimi", "TikTokenTokenizer")
    path = source / "tiktoken.model"
    path.write_bytes(b"\n".join(change(path.read_bytes().splitlines())))
    assert why in refusal(source)


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    said = refusal(write_tokenizer(tmp_path / "qwen", "QWenTokenizer"))
    assert said.endswith(f"qwen.tiktoken has {SIZE} tokens, and the first special token of QWenTokenizer is 151643")


@pytest.mark.parametrize(
    ("listed", "why"),
    [
        ({"7": {"content": "<a>"}}, "the first special token of TikTokenTokenizer is 7"),
        ({"x": {"content": "<a>"}}, "tokenizer_config.json: added_tokens_decoder cannot be read"),
        ([1], "tokenizer_config.json: added_tokens_decoder cannot be read"),
        ({}, "the config names none"),
    ],
)
def test_a_config_that_contradicts_the_vocabulary_is_refused(listed: Any, why: str, tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / "kimi", "TikTokenTokenizer")
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": listed}))
    assert why in refusal(source)


def test_an_ordinary_token_with_the_text_of_a_special_one_is_refused(tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / "kimi", "TikTokenTokenizer")
    ranks = [*list(ranks_of("TikTokenTokenizer"))[:-1], b"[EOS]"]
    (source / "tiktoken.model").write_bytes(write_vocabulary({token: i for i, token in enumerate(ranks)}))
    assert f"'[EOS]' should be the token {SIZE + 1}" in refusal(source)


def test_a_tokenizer_json_that_is_there_is_taken(tmp_path: Path) -> None:
    source = write_words(write_checkpoint(tmp_path / "both"))
    (source / "tiktoken.model").write_bytes(b"")
    with open_checkpoint(str(source)) as checkpoint:
        chosen = choose_tokenizer(str(source), None, lambda _: None, lambda said: pytest.fail(said))(checkpoint, 128)
    assert chosen is checkpoint


def test_the_same_files_give_the_same_bytes() -> None:
    kind, config = (
        "TikTokenTokenizer",
        {"tokenizer_class": "TikTokenTokenizer", "added_tokens_decoder": {str(SIZE): {"content": "[BOS]"}}},
    )
    data = {"tiktoken.model": write_vocabulary(ranks_of(kind))}
    first, second = (convert(data.get, list(data), config, "here", 2 * SIZE) for _ in range(2))
    assert first == second is not None
