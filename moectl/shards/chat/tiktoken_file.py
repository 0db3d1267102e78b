r"""A tokenizer.json from the tiktoken vocabulary of a repository whose own tokenizer is Python code, which never runs.

Such a vocabulary has tokens and their ranks only. How a text is split, and the special tokens, are in the code: a table
has them for the tokenizers that are known. Where the code is there it is read as text, to see that it is the known one.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, NoReturn

from moectl.errors import CheckpointError

CONFIG = "tokenizer_config.json"
_PATTERNS = ("tiktoken.model", "*.tiktoken")
_LETTERS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
)
_ENDS = (r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+")
_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+")
_CL100K = "|".join((*_WORDS, r"\p{N}{1,3}", *_ENDS))
_ONE_DIGIT = "|".join((*_WORDS, r"\p{N}", *_ENDS))

Read = Callable[[str], bytes | None]  # a file's bytes by its name, None where there is no such file
Special = dict[str, int]


@dataclass(frozen=True, slots=True)
class Kind:
    """A tokenizer that is known. `name_special` gets how many ranks there are, and the names that the config has."""

    vocabulary: str
    split: str  # the regular expression of tiktoken
    name_special: Callable[[int, Mapping[int, str]], Special]
    marks: tuple[str, ...]  # what its code contains
    source: str  # where the code was read
    starts: int | None = None  # the number of the first special token; None: the config names it
    composes: bool = False  # whether it makes a text NFC first


def _name_kimi(ranks: int, named: Mapping[int, str]) -> Special:
    # Its code has 256 or, in later repositories, 258; the last two are beyond the model's vocabulary.
    return {named.get(number, f"<|reserved_token_{number}|>"): number for number in range(ranks, ranks + 258)}


def _name_in_order(*names: str, extras: int = 0) -> Callable[[int, Mapping[int, str]], Special]:
    listed = (*names, *(f"<|extra_{i}|>" for i in range(extras)))
    return lambda ranks, _: {name: ranks + i for i, name in enumerate(listed)}


def _name_phi3_small(ranks: int, _: Mapping[int, str]) -> Special:
    known = {
        "<|endoftext|>": 1,
        "<|fim_prefix|>": 2,
        "<|fim_middle|>": 3,
        "<|fim_suffix|>": 4,
        "<|system|>": 5,
        "<|user|>": 6,
        "<|assistant|>": 7,
        "<|end|>": 10,
        "<|endofprompt|>": 20,
    }
    unused = [8, 9, 0, *range(11, 20), *range(21, 96)]
    return {name: ranks + i for name, i in known.items()} | {
        f"<|dummy_id_{n}|>": ranks + i for n, i in enumerate(unused)
    }


KINDS = {
    "TikTokenTokenizer": Kind(
        "tiktoken.model",
        "|".join((r"[\p{Han}]+", *_LETTERS, r"\p{N}{1,3}", *_ENDS)),
        _name_kimi,
        (r"[\p{Han}]+", *_LETTERS, r"\p{N}{1,3}", *_ENDS, "<|reserved_token_"),
        "moonshotai/Kimi-K2-Instruct and Kimi-Linear-48B-A3B-Instruct, tokenization_kimi.py",
    ),
    "QWenTokenizer": Kind(
        "qwen.tiktoken",
        _ONE_DIGIT,
        _name_in_order("<|endoftext|>", "<|im_start|>", "<|im_end|>", extras=205),
        (_ONE_DIGIT, "range(205)", "151643", 'normalize("NFC"'),
        "Qwen/Qwen-7B, tokenization_qwen.py",
        starts=151643,
        composes=True,
    ),
    "HYTokenizer": Kind(
        "hy.tiktoken",
        _ONE_DIGIT,
        _name_in_order("<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>", extras=205),
        (f'PAT_STR = r"""{_ONE_DIGIT}"""', "range(205)", 'normalize("NFC"'),
        "tencent/Hunyuan-A13B-Instruct, tokenization_hy.py",
        starts=127957,
        composes=True,
    ),
    "Phi3SmallTokenizer": Kind(
        "cl100k_base.tiktoken",
        _CL100K,
        _name_phi3_small,
        ('tiktoken.get_encoding("cl100k_base")', '"<|end|>": 100266', "EFFECTIVE_PADDED_VOCAB_SIZE = 100352"),
        "microsoft/Phi-3-small-8k-instruct, tokenization_phi3_small.py",
        starts=100256,
    ),
}


def is_vocabulary(file: str) -> bool:
    """Whether a file has the name of a tiktoken vocabulary."""
    return any(fnmatch(file.lower(), pattern) for pattern in _PATTERNS)


def convert(read: Read, files: list[str], config: Mapping[str, Any], where: str, vocabulary: int) -> bytes | None:
    """Return the tokenizer.json of a repository with a tiktoken vocabulary; None where it has none.

    `files` are the names of the repository's files, `config` is its tokenizer_config.json, `vocabulary` the number of
    the model's tokens. The same files give the same bytes. Raises CheckpointError for a tokenizer that is not known.
    """
    there = sorted(filter(is_vocabulary, files))
    if not there:
        return None
    name, module = _find_class(config)
    kind = KINDS.get(name)
    if kind is None or kind.vocabulary not in there:
        what = f"the tokenizer class {name}" if name else "a tokenizer without a name"
        _refuse(f"{where}: moectl cannot convert {there[0]} of {what}: only the repository's code says how")
    code = read(module) if module else None
    if code is not None and (lost := [mark for mark in kind.marks if mark not in code.decode("utf-8", "replace")]):
        _refuse(f"{where}: {module} is not the {name} that moectl knows: it does not contain {lost[0]}")
    ranks = _read_ranks(read(kind.vocabulary) or b"", f"{where}: {kind.vocabulary}")
    named = _find_names(config, where)
    starts = kind.starts if kind.starts is not None else min(named, default=None)
    if starts != len(ranks):
        told = "the config names none" if starts is None else f"the first special token of {name} is {starts}"
        _refuse(f"{where}: {kind.vocabulary} has {len(ranks)} tokens, and {told}")
    special = kind.name_special(len(ranks), named)
    return _write(kind, ranks, {token: number for token, number in special.items() if number < vocabulary}, where)


def _find_class(config: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the name of a tokenizer's class, and the file with its code."""
    mapped = config.get("auto_map")
    told = mapped.get("AutoTokenizer") if isinstance(mapped, dict) else None
    place = next((item for item in (told if isinstance(told, list) else [told]) if isinstance(item, str)), "")
    module, _, name = place.rpartition("--")[2].rpartition(".")
    named = config.get("tokenizer_class")
    return name or (named if isinstance(named, str) else ""), f"{module}.py" if module else None


def _find_names(config: Mapping[str, Any], where: str) -> dict[int, str]:
    """Return the special tokens that tokenizer_config.json names, by number."""
    listed = config.get("added_tokens_decoder") or {}
    try:
        return {int(number): str(told["content"]) for number, told in listed.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        _refuse(f"{where}: {CONFIG}: added_tokens_decoder cannot be read")


def _read_ranks(data: bytes, what: str) -> dict[bytes, int]:
    """Return tokens and their ranks, which count from 0. Raises CheckpointError."""
    ranks: dict[bytes, int] = {}
    for i, line in enumerate(filter(None, data.splitlines())):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            _refuse(f"{what} is not a tiktoken vocabulary: line {i + 1} is not a token and its rank")
        if int(rank) != i or len(ranks) != i + 1:
            _refuse(f"{what} is not a whole tiktoken vocabulary: line {i + 1} has the rank {int(rank)}")
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking:
        _refuse(f"{what} is not a whole tiktoken vocabulary: it has no token for the byte 0x{lacking[0]:02X}")
    return ranks


def _write(kind: Kind, ranks: dict[bytes, int], special: Special, where: str) -> bytes:
    """Return tokenizer.json as transformers makes it from ranks."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would say that there is no PyTorch
    from tokenizers import AddedToken, normalizers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):  # type: ignore[misc]
        @staticmethod
        def load_tiktoken_bpe(_: str) -> dict[bytes, int]:
            return ranks  # its own needs the tiktoken library

    tokens = Converter(pattern=kind.split).converted()
    if kind.composes:
        tokens.normalizer = normalizers.NFC()
    for token, number in sorted(special.items(), key=lambda item: item[1]):
        tokens.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        if tokens.token_to_id(token) != number:  # an ordinary token has the same text
            _refuse(f"{where}: {token!r} should be the token {number}, and the vocabulary has it as another one")
    return str(tokens.to_str()).encode()


def _refuse(why: str) -> NoReturn:
    raise CheckpointError(why, hint="--tokenizer REPO|DIR takes one that has a tokenizer.json")
