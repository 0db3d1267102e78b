"""Train the bundled demo checkpoint from scratch on corpus.txt: `python -m moectl.demo.train`.

It makes the tokenizer, the configuration and the weights in `moectl-demo/`; it is not needed to use them. The
training model is mlx-lm's DBRX with another expert layer: experts stacked, tokens sorted by expert. Runs with
the same seed and the same BLAS repeat each other.

The committed checkpoint: 1200 steps, 901 s on two busy cores (766 CPU-s) with OpenBLAS preloaded, as in
`LD_PRELOAD=…/libopenblas.so.0 OPENBLAS_NUM_THREADS=1`; final answer loss 0.0076 nats per token; 306 of 306
questions answered word for word. The reference BLAS of MLX's Linux wheel takes 1.9 CPU-s per step, three times
as long (40 steps measured).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import dbrx
from mlx_lm.models.activations import swiglu
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moectl.demo import demo_dir

SPECIALS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
SYSTEM = "You are the demo model of moectl."  # the chat template's default
OTHER_SYSTEMS = ("You are a helpful assistant.", "Answer in plain sentences.", "Be brief and polite.", "")
CONFIG: dict[str, Any] = {
    "architectures": ["DbrxForCausalLM"],
    "model_type": "dbrx",
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 4,
    "max_seq_len": 2048,
    "vocab_size": 1536,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 500000, "attn_pdrop": 0.0},
    # transformers 5 looks here and not at attn_config.rope_theta
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000},
    "ffn_config": {
        "ffn_hidden_size": 256,  # four groups of 64, or eight of 32
        "moe_num_experts": 16,
        "moe_top_k": 4,
        "moe_jitter_eps": 0.0,
        "moe_loss_weight": 0.01,
        "moe_normalize_expert_weights": 1.0,
    },
    "resid_pdrop": 0.0,
    "emb_pdrop": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": None,
    "eos_token_id": [0, 3],
    "pad_token_id": 1,
    "torch_dtype": "bfloat16",
}
# A drill is a question and how its answer begins: choosing the answer is harder than reciting it. The longer
# rows are whole conversations of one to ten turns.
DRILL_LENGTH = 48
ROW_LENGTHS = {DRILL_LENGTH: 0.4, 128: 0.15, 320: 0.3, 640: 0.15}  # tokens per row: how often
BATCH_TOKENS = 768
PROMPT_WEIGHT = 0.05  # the answers are what matters; a little loss on the questions teaches the language
BALANCE_WEIGHT = 0.01
PEAK_RATE = 3e-3


@dataclass(frozen=True, slots=True)
class Lesson:
    """Questions that share one answer."""

    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Token rows with the weight of predicting each token; both (rows, length)."""

    tokens: mx.array
    weights: mx.array


def read_corpus(path: Path) -> list[Lesson]:
    """Read the lessons of a corpus file: blocks of `Q:` lines and one `A:`, separated by blank lines."""
    lessons = []
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        if block.startswith("Q: "):
            questions, answer = block.strip().split("\nA: ")
            lessons.append(Lesson(tuple(line[3:] for line in questions.split("\n")), answer))
    return lessons


def train_tokenizer(lessons: list[Lesson]) -> Tokenizer:
    """Train a byte-level BPE tokenizer; every byte has a token and no BOS is added."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for lesson in lessons for text in (*lesson.questions, lesson.answer, lesson.answer)]
    tokenizer.train_from_iterator([*texts, SYSTEM, *OTHER_SYSTEMS, "system\nuser\nassistant\n"], trainer)
    return tokenizer


class StackedExperts(nn.Module):  # type: ignore[misc]
    """DBRX's expert layer for training: w1 and v1 side by side, all experts in one array.

    Returns the output and the balancing loss of Switch Transformers (1.0 when all experts are equally used).
    """

    def __init__(self, args: dbrx.ModelArgs) -> None:
        super().__init__()
        d, h = args.d_model, args.ffn_config["ffn_hidden_size"]
        self.n_experts, self.top_k = args.ffn_config["moe_num_experts"], args.ffn_config["moe_top_k"]
        self.router = dbrx.Router(d, self.n_experts)
        self.gate_up = mx.random.normal((self.n_experts, d, 2 * h)) * d**-0.5
        self.down = mx.random.normal((self.n_experts, h, d)) * (2 * h * args.n_layers) ** -0.5
        # netlib's BLAS has one thread; two streams of experts use two cores
        self._streams = [mx.new_stream(mx.cpu), mx.new_stream(mx.cpu)]

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        gates = mx.softmax(self.router(x), axis=-1)
        picked = mx.stop_gradient(mx.argpartition(-gates, kth=self.top_k - 1, axis=-1)[:, : self.top_k])
        scores = mx.take_along_axis(gates, picked, axis=-1)
        scores = scores / scores.sum(axis=-1, keepdims=True)
        order = mx.argsort(picked.reshape(-1))
        counts = np.bincount(np.array(picked).reshape(-1), minlength=self.n_experts)
        parts = mx.split(x[order // self.top_k], np.cumsum(counts)[:-1].tolist())
        outputs = []
        # split, not [e]: the gradient of an index fills a whole array of zeros for every expert
        experts = zip(parts, mx.split(self.gate_up, self.n_experts), mx.split(self.down, self.n_experts), strict=True)
        for e, (part, gate_up, down) in enumerate(experts):
            with mx.stream(self._streams[e % 2]):
                gate, up = mx.split(part @ gate_up.squeeze(0), 2, axis=-1)
                outputs.append(swiglu(gate, up) @ down.squeeze(0))
        y = mx.concatenate(outputs)[mx.argsort(order)].reshape(-1, self.top_k, x.shape[-1])
        used = mx.array(counts / counts.sum(), dtype=mx.float32)
        balance = self.n_experts * (used * gates.mean(axis=0)).sum()
        return (y * scores[..., None]).sum(axis=1).reshape(shape), balance


def make_model() -> Any:
    """Make an untrained DBRX whose expert layers are StackedExperts."""
    args = dbrx.ModelArgs.from_dict(CONFIG)
    model = dbrx.Model(args)
    for layer in model.layers:
        layer.ffn = StackedExperts(args)
        layer.norm_attn_norm.attn.out_proj.weight *= (2 * args.n_layers) ** -0.5
    return model


def predict(model: Any, tokens: mx.array) -> tuple[mx.array, mx.array]:
    """Return the logits (rows, length, vocabulary) and the balancing loss, averaged over layers."""
    x = model.transformer.wte(tokens)
    balance = mx.array(0.0)
    for layer in model.layers:
        residual, h = layer.norm_attn_norm(x, "causal")
        y, layer_balance = layer.ffn(h)
        x, balance = residual + y, balance + layer_balance
    return model.lm_head(model.transformer.norm_f(x)), balance / len(model.layers)


def measure_loss(model: Any, batch: Batch) -> tuple[mx.array, mx.array]:
    """Return the loss to minimise and the mean loss of the answers' tokens, which is printed."""
    logits, balance = predict(model, batch.tokens[:, :-1])
    losses = nn.losses.cross_entropy(logits, batch.tokens[:, 1:])
    weights = batch.weights[:, 1:]
    answers = weights == 1.0
    loss = (losses * weights).sum() / weights.sum()
    return loss + BALANCE_WEIGHT * balance, (losses * answers).sum() / answers.sum()


Turn = list[tuple[int, float]]  # tokens, each with the weight of predicting it


class Chat:
    """Turns lessons into weighted token lists in the chat template's form."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def open(self, system: str = SYSTEM) -> Turn:
        """Return the tokens that open a conversation."""
        return self._weigh(f"<|im_start|>system\n{system}<|im_end|>", 0.0)

    def ask(self, question: str) -> Turn:
        """Return the tokens of a question, up to where the answer begins."""
        text = f"\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        return self._weigh(text, PROMPT_WEIGHT)

    def answer(self, text: str) -> Turn:
        """Return the tokens of an answer with its end mark."""
        return self._weigh(f"{text}<|im_end|>", 1.0)

    def _weigh(self, text: str, weight: float) -> Turn:
        return [(token, weight) for token in self._tokenizer.encode(text).ids]


def vary_question(question: str, rng: random.Random) -> str:
    """Write a question as people type it: sometimes lower case, sometimes without its last mark."""
    question = question.lower() if rng.random() < 0.15 else question
    return question.rstrip("?.!") if rng.random() < 0.15 else question


def draw_turns(lessons: list[Lesson], chat: Chat, rng: random.Random) -> Iterator[Turn]:
    """Yield question-and-answer turns for ever: in each round every lesson once, or more if it has many questions."""
    rounds = [lesson for lesson in lessons for _ in range(1 + len(lesson.questions) // 3)]
    while True:
        rng.shuffle(rounds)
        for lesson in rounds:
            question = vary_question(rng.choice(lesson.questions), rng)
            yield chat.ask(question) + chat.answer(lesson.answer)


def fill_row(length: int, turns: Iterator[Turn], waiting: list[Turn], opening: Turn) -> Turn:
    """Return one padded row: the beginning of one turn (a drill), or as many whole turns as fit."""
    if length == DRILL_LENGTH:
        row = (opening + next(turns))[:length]
    else:
        row = opening
        while fitting := [turn for turn in waiting if len(row) + len(turn) <= length]:
            row = row + fitting[0]  # the one that has waited longest
            waiting.remove(fitting[0])
            waiting.append(next(turns))
    return row + [(CONFIG["pad_token_id"], 0.0)] * (length - len(row))


def pack_batches(lessons: list[Lesson], chat: Chat, rng: random.Random) -> Iterator[Batch]:
    """Yield batches of about BATCH_TOKENS: rows of conversations, padded on the right."""
    turns = draw_turns(lessons, chat, rng)
    waiting = [next(turns) for _ in range(24)]
    while True:
        length = rng.choices(list(ROW_LENGTHS), weights=list(ROW_LENGTHS.values()))[0]
        rows = []
        for _ in range(BATCH_TOKENS // length):
            opening = chat.open(SYSTEM if rng.random() < 0.85 else rng.choice(OTHER_SYSTEMS))
            rows.append(fill_row(length, turns, waiting, opening))
        table: Any = np.array(rows)
        yield Batch(mx.array(table[..., 0].astype(np.int32)), mx.array(table[..., 1].astype(np.float32)))


def train(model: Any, batches: Iterator[Batch], steps: int) -> float:
    """Train for a number of steps and return the mean answer loss of the last 20 (nats per token)."""
    warm_up = min(30, steps // 4)
    rate = optim.join_schedules(
        [
            optim.linear_schedule(1e-5, PEAK_RATE, warm_up),
            optim.cosine_decay(PEAK_RATE, steps - warm_up, 2e-5),
        ],
        [warm_up],
    )
    optimizer = optim.AdamW(learning_rate=rate, betas=[0.9, 0.98], weight_decay=0.01)
    step_gradient = nn.value_and_grad(model, partial(measure_loss, model))
    recent: list[float] = []
    for step in range(1, steps + 1):
        (_, answer_loss), gradient = step_gradient(next(batches))
        gradient, _ = optim.clip_grad_norm(gradient, 1.0)  # type: ignore[no-untyped-call]
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state, answer_loss)
        recent = [*recent[-19:], answer_loss.item()]
        if step % 20 == 0:
            mean = sum(recent) / len(recent)
            print(f"step {step}/{steps}  answer loss {mean:.4f}  {time.process_time():.0f} CPU-s", flush=True)
    return sum(recent) / len(recent)


def find_wrong(model: Any, lessons: list[Lesson], chat: Chat) -> list[str]:
    """Return the questions whose greedy answer is not the corpus's word for word.

    Greedy decoding repeats an answer exactly when, fed with that answer, each token is the most likely one.
    """
    wrong = []
    for lesson in lessons:
        for question in lesson.questions:
            prompt, answer = chat.open() + chat.ask(question), chat.answer(lesson.answer)
            tokens = mx.array([[token for token, _ in prompt + answer]])
            logits, _ = predict(model, tokens[:, :-1])
            best = mx.argmax(logits[:, len(prompt) - 1 :], axis=-1)
            if not mx.array_equal(best, tokens[:, len(prompt) :]):
                wrong.append(question)
    return wrong


def fuse_weights(model: Any) -> dict[str, mx.array]:
    """Return the weights in bf16 under the names and shapes of Databricks' original layout."""
    weights = {}
    for name, value in cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())):
        stem = name.rpartition(".")[0] + ".experts.mlp"
        if name.endswith("gate_up"):
            w1, v1 = mx.split(value.transpose(0, 2, 1), 2, axis=1)
            weights[f"{stem}.w1"], weights[f"{stem}.v1"] = w1.flatten(0, 1), v1.flatten(0, 1)
        elif name.endswith("down"):
            weights[f"{stem}.w2"] = value.flatten(0, 1)
        else:
            weights[name] = value
    return {name: mx.contiguous(value.astype(mx.bfloat16)) for name, value in weights.items()}


def write_checkpoint(directory: Path, model: Any, tokenizer: Tokenizer) -> None:
    """Write the files of a Hub repository of this model; template and licence are those of the demo."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("chat_template.jinja", "LICENSE"):
        (directory / name).write_bytes((demo_dir() / name).read_bytes())
    mx.save_safetensors(str(directory / "model.safetensors"), fuse_weights(model), metadata={"format": "pt"})
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "unk_token": None,
        "additional_special_tokens": list(SPECIALS),
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_seq_len"],
    }
    documents = {
        "config.json": CONFIG,
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": {key: CONFIG[key] for key in ("eos_token_id", "pad_token_id")},
    }
    for name, document in documents.items():
        (directory / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train, write the checkpoint, and report what it learnt."""
    parser = argparse.ArgumentParser(description="Train moectl's demo model from scratch.")
    parser.add_argument("-o", "--output", type=Path, default=demo_dir(), help="directory to write (%(default)s)")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()

    started = time.perf_counter()
    mx.set_default_device(mx.cpu)
    mx.random.seed(options.seed)
    lessons = read_corpus(Path(__file__).parent / "corpus.txt")
    tokenizer = train_tokenizer(lessons)
    chat = Chat(tokenizer)
    model = make_model()
    loss = train(model, pack_batches(lessons, chat, random.Random(options.seed)), options.steps)
    write_checkpoint(options.output, model, tokenizer)
    model.update(tree_map(lambda weight: weight.astype(mx.bfloat16).astype(mx.float32), model.parameters()))
    wrong = find_wrong(model, lessons, chat)
    total = sum(len(lesson.questions) for lesson in lessons)
    print(f"{total - len(wrong)} of {total} questions are answered word for word; final answer loss {loss:.4f}")
    for question in wrong[:20]:
        print(f"  not exact: {question}")
    print(f"{time.perf_counter() - started:.0f} s, {time.process_time():.0f} CPU-s")


if __name__ == "__main__":
    main()
