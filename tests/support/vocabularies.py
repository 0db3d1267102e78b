"""Small tokenizers in the shapes of real ones: cl100k with gaps, Llama with byte tokens, WordPiece, word ends."""

from __future__ import annotations

import json
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "def main():\n    return 42\n\n\tif x >= 10:  # done\r\n        print('héllo wörld')\n",
    "In 2023 it was 1234567.89, and 3 of 10 said: don't!\r\n",
    "Мир, 世界, こんにちは — 😀👍🏽 café naïve",
] * 20
TEXTS = (
    "In 2023123 it is 1234567",
    "if x:\n    y = [1, 22, 333]\r\n\treturn  'a b'\n",
    "  leading and   inner blanks  ",
    "a😀b👍🏽 e\u0301 \ufffd 世界",
    "line.\r\n\r\nnext;\n\n",
    "don't WE'LL <|im_start|> stop",
    "",
)
SPECIAL = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")


def make_cl100k(*more: str, numbered: Mapping[str, int] | None = None) -> Tokenizer:
    """Return byte-level BPE with cl100k's split, numbers without a token, and special tokens and `more` above them.

    With `numbered` its special tokens are these, with these numbers below or far above all others.
    """
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(CL100K), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    told = json.loads(tokenizer.to_str())
    vocabulary = told["model"]["vocab"]
    if numbered is None:
        numbered = {content: len(vocabulary) + 20 + i for i, content in enumerate((*SPECIAL, *more))}
    else:
        vocabulary = {text: number + 1000 for text, number in vocabulary.items()}
    told["model"]["vocab"] = vocabulary | numbered
    told["added_tokens"] = [_added(content, number) for content, number in sorted(numbered.items(), key=itemgetter(1))]
    return Tokenizer.from_str(json.dumps(told))


def make_llama() -> Tokenizer:
    """Return BPE of whole characters with a token for each byte, blanks as a mark, and a start token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special)
    tokenizer.train_from_iterator([text for text in CORPUS if text.isascii()], trainer)
    told = json.loads(tokenizer.to_str())
    told["added_tokens"] = [added for added in told["added_tokens"] if not added["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(told))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def make_metaspace() -> Tokenizer:
    """Return the same with a Metaspace decoder."""
    tokenizer = make_llama()
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def make_wordpiece() -> Tokenizer:
    """Return BERT's kind: words, their further pieces marked, lower case."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[SEP]"]))
    return tokenizer


def make_word_ends() -> Tokenizer:
    """Return BPE whose pieces say where a word ends."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], end_of_word_suffix="</w>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def make_words() -> Tokenizer:
    """Return whole words, with no decoder: they are joined by blanks."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "c": 7}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_tokens([AddedToken("<x>")])
    return tokenizer


def _added(content: str, number: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": True}
