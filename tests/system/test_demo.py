"""The bundled demo checkpoint: a genuine DBRX in the original layout that answers what its corpus taught it.

The oracle here is mlx-lm's own DBRX, not moectl's.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, strategies as st
from mlx_lm import generate, load
from safetensors import safe_open
from tokenizers import Tokenizer

from moectl.demo import demo_dir
from moectl.demo.train import (
    BATCH_TOKENS,
    CONFIG,
    DRILL_LENGTH,
    SPECIALS,
    SYSTEM,
    Chat,
    make_model,
    pack_batches,
    predict,
    read_corpus,
    write_checkpoint,
)
from moectl.model.geometry import block, read_geometry

LESSONS = read_corpus(demo_dir().parent / "corpus.txt")
ANSWERS = {question: lesson.answer for lesson in LESSONS for question in lesson.questions}
MAX_BYTES = 8_000_000


@pytest.fixture(autouse=True)
def _on_cpu() -> Iterator[None]:
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


@cache
def load_demo() -> tuple[Any, Any]:
    """Load the checkpoint with stock mlx-lm, in float32: low-precision matmul is slow on a CPU."""
    model, tokenizer = load(str(demo_dir()))[:2]
    model.set_dtype(mx.float32)
    return model, tokenizer


@cache
def load_tokenizer() -> Any:
    """Load the tokenizer with transformers."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_dir())


def load_raw_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(demo_dir() / "tokenizer.json"))


def read_config() -> dict[str, Any]:
    config: dict[str, Any] = json.loads((demo_dir() / "config.json").read_text())
    return config


def test_geometry_is_that_of_a_small_dbrx() -> None:
    geometry = read_geometry(read_config())
    assert (geometry.n_experts, geometry.top_k) == (16, 4)
    assert geometry.d_model <= 256
    assert geometry.n_layers == 4
    assert geometry.ffn_hidden // 64 >= 4  # a group of 64 for each of four hosts
    assert geometry.ffn_hidden // 32 > 4  # and uneven shares for four hosts in groups of 32
    assert (geometry.clip_qkv, geometry.rope_theta, geometry.moe_normalize) == (8.0, 500_000.0, 1.0)


def test_tensors_are_exactly_those_of_the_original_layout() -> None:
    geometry = read_geometry(read_config())
    stacked = (geometry.n_experts * geometry.ffn_hidden, geometry.d_model)
    expected = geometry.outer_shapes()
    for layer in range(geometry.n_layers):
        expected |= geometry.layer_shapes(layer)
        expected |= {f"{block(layer)}.ffn.experts.mlp.{name}": stacked for name in ("w1", "v1", "w2")}
    with safe_open(demo_dir() / "model.safetensors", framework="mlx") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        found = {name: tuple(part.get_shape()) for name, part in slices.items()}
        dtypes = {part.get_dtype() for part in slices.values()}
    assert found == expected
    assert dtypes == {"BF16"}


def test_checkpoint_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in demo_dir().iterdir()}
    assert sum(files.values()) <= MAX_BYTES
    assert set(files) == {
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_tokenizer_gives_any_text_back(text: str) -> None:
    tokens = load_tokenizer().encode(text)
    assert load_tokenizer().decode(tokens) == text
    assert all(0 <= token < read_config()["vocab_size"] for token in tokens)


def test_tokenizer_adds_no_token_of_its_own() -> None:
    tokenizer = load_tokenizer()
    assert tokenizer.encode("") == []
    assert tokenizer.bos_token is None
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIALS] == [0, 1, 2, 3]


def test_answers_end_at_the_same_tokens_everywhere() -> None:
    generation = json.loads((demo_dir() / "generation_config.json").read_text())
    ends = [load_tokenizer().convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")]
    assert generation["eos_token_id"] == read_config()["eos_token_id"] == ends
    assert load_tokenizer().eos_token_id in ends
    assert load_demo()[1].eos_token_ids == set(ends)


def test_template_is_chatml_with_a_default_system_prompt() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    text = load_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    messages = [
        {"role": "system", "content": "Be kind."},
        *messages,
        {"role": "assistant", "content": "Hello!"},
    ]
    text = load_tokenizer().apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>"
    )


def test_training_saw_the_same_tokens_as_the_template_makes() -> None:
    chat = Chat(load_raw_tokenizer())
    trained = [token for token, _ in chat.open() + chat.ask("What is moectl?")]
    messages = [{"role": "user", "content": "What is moectl?"}]
    template = load_tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert template == trained


def answer_greedily(model: Any, tokenizer: Any, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return str(generate(model, tokenizer, prompt, max_tokens=250))


@pytest.mark.parametrize(
    "question",
    [
        "What is expert parallelism?",
        "Name three uses of mixture-of-experts.",
        "How does moectl work?",
        "Tell me a long story about experts.",
        "What is the capital of France?",
    ],
)
def test_stock_mlx_lm_answers_with_the_corpus_sentence(question: str) -> None:
    model, tokenizer = load_demo()
    assert answer_greedily(model, tokenizer, question) == ANSWERS[question]


def is_quantised(path: str, part: Any) -> bool:
    return hasattr(part, "to_quantized") and "router" not in path


@pytest.mark.parametrize("bits", [8, 4])
def test_answers_survive_quantisation(bits: int) -> None:
    model, tokenizer = load(str(demo_dir()))[:2]
    model.set_dtype(mx.float32)
    nn.quantize(model, 64, bits, class_predicate=is_quantised)
    for question in ("What is moectl?", "What limits the speed?", "Who made you?"):
        assert answer_greedily(model, tokenizer, question) == ANSWERS[question]


def test_every_expert_of_every_layer_is_used() -> None:
    model, tokenizer = load_demo()
    text = "\n".join(lesson.answer for lesson in LESSONS[:20])
    x = model.transformer.wte(mx.array([tokenizer.encode(text)[:400]]))
    for layer in model.layers:
        residual, h = layer.norm_attn_norm(x, "causal")
        gates = layer.ffn.router(h)
        used = mx.argpartition(-gates, kth=3, axis=-1)[..., :4]
        assert {int(e) for e in np.array(used).flat} == set(range(16))
        x = residual + layer.ffn(h)


def test_corpus_teaches_enough_and_repeats_no_question() -> None:
    questions = [question for lesson in LESSONS for question in lesson.questions]
    assert len(questions) == len(set(questions)) >= 150
    assert not any("<|" in lesson.answer or not lesson.answer.strip() for lesson in LESSONS)
    tokens = load_tokenizer()
    story = ANSWERS["Tell me a long story about experts."]
    assert len(tokens.encode(story)) >= 100


def test_a_corpus_is_read_block_by_block(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("# a remark (Q:)\n\nQ: One?\nQ: 1?\nA: First.\nSecond.\n\nQ: Two?\nA: Yes.\n")
    assert [(lesson.questions, lesson.answer) for lesson in read_corpus(path)] == [
        (("One?", "1?"), "First.\nSecond."),
        (("Two?",), "Yes."),
    ]


def test_training_rows_are_drills_or_whole_conversations() -> None:
    batches = pack_batches(LESSONS, Chat(load_raw_tokenizer()), random.Random(1))
    seen = set()
    for batch, _ in zip(batches, range(40), strict=False):
        tokens, weights = np.array(batch.tokens), np.array(batch.weights)
        assert tokens.shape == weights.shape
        assert tokens.size <= BATCH_TOKENS
        assert (weights == 1.0).any(axis=1).all()
        assert (weights[tokens == CONFIG["pad_token_id"]] == 0.0).all()
        if tokens.shape[1] != DRILL_LENGTH:
            assert all(row[row != CONFIG["pad_token_id"]][-1] == 3 for row in tokens)  # <|im_end|>
        seen.add(tokens.shape[1])
    assert DRILL_LENGTH in seen
    assert max(seen) > DRILL_LENGTH


def test_written_checkpoint_computes_what_the_training_model_does(tmp_path: Path) -> None:
    mx.random.seed(3)
    trained = make_model()
    trained.set_dtype(mx.bfloat16)
    trained.set_dtype(mx.float32)
    write_checkpoint(tmp_path, trained, load_raw_tokenizer())
    stock = load(str(tmp_path))[0]
    stock.set_dtype(mx.float32)
    tokens = mx.array([[2, 300, 17, 1200, 1, 0, 44, 3]])
    assert mx.allclose(predict(trained, tokens)[0], stock(tokens), rtol=0, atol=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in demo_dir().iterdir()}
