"""Models of several architectures, as a user runs them: shard → deploy → run → serve over four hosts of their own.

The checkpoints are tiny and random, laid out as their publishers do. The answer of mlx-lm in one process is the
right one.
"""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import openai
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from tests.support.alphabet import VOCAB_SIZE, write_tokenizer
from tests.support.layouts import write_layout
from tests.support.netns import Cluster
from tests.support.ring import process_env
from tests.support.tiny import write_checkpoint
from tests.system.test_end_to_end import MOECTL, moectl

PROMPT = "the quick brown fox"
LENGTH = 24
_DENSE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
DENSE: dict[str, dict[str, Any]] = {
    # DeepSeek-R1's distillations are Qwen2 and Llama; the blog ran Llama-3.2-3B.
    "qwen2": {**_DENSE, "model_type": "qwen2", "tie_word_embeddings": False},
    "llama": {
        **_DENSE,
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 256,
            "rope_type": "llama3",
        },
    },
    # Devstral.
    "ministral3": {
        **_DENSE,
        "model_type": "ministral3",
        "head_dim": 16,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 16.0,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 256,
            "rope_theta": 1e6,
            "rope_type": "yarn",
        },
    },
}


def write_dense(directory: Path, config: dict[str, Any]) -> None:
    """Write a dense model with random weights; mlx-lm's names are those of its publisher."""
    from mlx_lm.utils import _get_classes

    mx.random.seed(5)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    weights = {name: array.astype(mx.bfloat16) for name, array in tree_flatten(model.parameters())}
    directory.mkdir(parents=True)
    mx.save_safetensors(str(directory / "model.safetensors"), weights)
    (directory / "config.json").write_text(json.dumps(config))


def write_model(directory: Path, name: str) -> None:
    if name in DENSE:
        write_dense(directory, DENSE[name])
    elif name == "dbrx":
        write_checkpoint(directory, vocab_size=VOCAB_SIZE)
    else:
        write_layout(directory, name, vocab_size=VOCAB_SIZE)
    write_tokenizer(directory)


def answer_of_mlx_lm(directory: Path) -> str:
    """Return mlx-lm's greedy answer in this process, in float32."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    model, _ = load_model(directory)
    model.set_dtype(mx.float32)
    cache, found = make_prompt_cache(model), list[int]()
    tokens = mx.array([tokenizer.encode(PROMPT).ids])
    for _ in range(LENGTH):
        tokens = mx.argmax(model(tokens, cache=cache)[:, -1:], axis=-1)
        found.append(int(tokens.item()))  # type: ignore[arg-type]
    return str(tokenizer.decode(found, skip_special_tokens=False))


@pytest.mark.netns
@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("kimi-k2-int4", "hidden"),
        ("deepseek-v3-fp8", "experts"),
        ("ministral3", "tensor"),
        ("llama", "layers"),
        pytest.param("qwen2", "hidden", marks=pytest.mark.long),
        pytest.param("gpt-oss-mxfp4", "hidden", marks=pytest.mark.long),
        pytest.param("qwen3-next", "hidden", marks=pytest.mark.long),
        pytest.param("dbrx", "tensor", marks=pytest.mark.long),
    ],
)
def test_four_hosts_answer_like_mlx_lm(name: str, split: str, hostfile: Path, netns: Cluster, tmp_path: Path) -> None:
    source = tmp_path / name
    write_model(source, name)
    right = answer_of_mlx_lm(source)
    at = ("--hostfile", str(hostfile))
    made = json.loads(moectl("shard", str(source), *at, "--split", split, "--json").stdout)
    assert made["split"] == split
    deployed = json.loads(moectl("deploy", *at, "--json", MOECTL_DEPLOY_NO_CHECK="0").stdout)
    assert [host["ok"] for host in deployed["hosts"]] == [True] * 4
    ask = ("run", PROMPT, "--raw", "--temp", "0", "--max-tokens", str(LENGTH))
    assert moectl(*ask, *at, "--keep-alive", "0").stdout.rstrip("\n") == right.rstrip("\n")


@pytest.mark.parametrize(("name", "split"), [("kimi-k2-int4", "tensor"), ("llama", "hidden")])
def test_a_served_model_answers_like_mlx_lm(name: str, split: str, tmp_path: Path) -> None:
    source = tmp_path / name
    write_model(source, name)
    words = ["serve", "--local", "2", "--model", str(source), "--split", split, "--port", "0", "--json"]
    process = subprocess.Popen([*MOECTL, *words], stdout=subprocess.PIPE, text=True, env=process_env())
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "it said why on stderr"
        url = json.loads(line)["url"]
        api = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        [model] = api.models.list().data
        answer = api.completions.create(model=model.id, prompt=PROMPT, max_tokens=LENGTH, temperature=0)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert answer.choices[0].text == answer_of_mlx_lm(source)
