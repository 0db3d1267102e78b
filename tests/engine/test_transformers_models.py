"""Checkpoints of many families, as publishers store them: the tokens and logits that transformers computes.

They are read as `moectl shard` reads them: traced through mlx-lm's loading, then computed part by part.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moectl.errors import PlanError
from moectl.model.placement import SPLITS
from moectl.planner.families import find_family
from tests.support import transformers_models as theirs
from tests.support.cutting import cut
from tests.support.families import is_equal, run_greedily, run_set
from tests.support.ring import process_env
from tests.support.traced import open_traced
from tests.system.test_end_to_end import moectl

DOZEN = (
    *("mixtral", "qwen3_moe", "qwen3_next", "gpt_oss (truncate)", "deepseek_v3", "kimi_k2", "glm4_moe"),
    *("minimax_m2", "nemotron_h", "gemma3_text", "llama", "mistral3"),
)
QUICK = ("hidden", "tensor")
LIVE = ["qwen3_next", "gpt_oss (truncate)", "deepseek_v3", "mistral3"]
LONG = pytest.mark.long
FIRST = 0x4E00  # the character of token 0


pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@cache
def source_of(case: str, root: Path) -> Path:
    return theirs.write_model(case, root / case)


def load_traced(case: str, root: Path) -> Any:
    """Return mlx-lm's model with all parameters computed from the traced checkpoint, in float32."""
    traced = open_traced(source_of(case, root))
    found = {name: traced.part(name) for name in traced.parameters}
    model = traced.model  # its `sanitize` may have taken the head away
    model.load_weights(
        [(n, a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a) for n, a in found.items()]
    )
    model.eval()
    return model


def compare(case: str, found: list[mx.array]) -> None:
    """Compare every token, and the logits of those for which transformers' are kept."""
    assert [int(np.array(logits).argmax()) for logits in found] == theirs.tokens_of(case)
    expected = [mx.array(logits)[None] for logits in theirs.logits_of(case)]
    same, off = is_equal(found[: theirs.LOGITS], expected)
    assert same, f"{off:.1e} off"


def marks_of(case: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.xfail(reason=theirs.WRONG[case], strict=True)] if case in theirs.WRONG else []


@pytest.mark.parametrize("case", [pytest.param(case, marks=marks_of(case)) for case in theirs.cases()])
def test_a_published_checkpoint_computes_what_transformers_computes(case: str, checkpoints: Path) -> None:
    compare(case, run_greedily(load_traced(case, checkpoints), prompt=theirs.PROMPT, steps=theirs.STEPS))


@pytest.mark.parametrize(
    ("case", "split"),
    [
        pytest.param(*pair, marks=[*marks_of(pair[0]), *([] if pair[0] in DOZEN and pair[1] in QUICK else [LONG])])
        for pair in product(theirs.cases(), SPLITS)
    ],
)
def test_the_ranks_of_a_set_compute_what_transformers_computes(
    case: str, split: str, checkpoints: Path, tmp_path: Path
) -> None:
    refusal = find_family(theirs.config_of(case)["model_type"]).refused.get(split)
    if refusal is not None:
        with pytest.raises(PlanError, match=re.escape(refusal)):
            cut(source_of(case, checkpoints), tmp_path, split=split, nodes=2)
        return
    cut(source_of(case, checkpoints), tmp_path, split=split, nodes=2)
    compare(case, run_set(tmp_path, prompt=theirs.PROMPT, steps=theirs.STEPS))


def write_alphabet(directory: Path) -> None:
    """Write a tokenizer with one character for each number."""
    model = {
        "type": "WordLevel",
        "vocab": {chr(FIRST + i): i for i in range(theirs.VOCABULARY)},
        "unk_token": chr(FIRST),
    }
    split = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    told = {"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "decoder": {"type": "Fuse"}, "model": model}
    (directory / "tokenizer.json").write_text(json.dumps(told))
    (directory / "tokenizer_config.json").write_text("{}")


@pytest.mark.system
@pytest.mark.parametrize("case", ["qwen3_next", *(pytest.param(case, marks=LONG) for case in LIVE[1:])])
def test_the_command_line_says_what_transformers_says(case: str, tmp_path: Path) -> None:
    model = theirs.write_model(case, tmp_path / "model")
    write_alphabet(model)
    prompt = "".join(chr(FIRST + token) for token in theirs.PROMPT)
    asked = ("--local", "2", "--keep-alive", "0", "--raw", "--temp", "0", "--max-tokens", str(theirs.STEPS))
    said = moectl("run", "--model", str(model), *asked, prompt, XDG_CACHE_HOME=str(tmp_path / "cache")).stdout
    assert [ord(letter) - FIRST for letter in said.strip()] == theirs.tokens_of(case)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "cases", [LIVE, pytest.param([c for c in theirs.cases() if c not in LIVE], marks=LONG)], ids=["few", "others"]
)
def test_transformers_says_the_same_today(cases: list[str], tmp_path: Path) -> None:
    """MOECTL_TEST_TORCH names the directory with torch and accelerate, which transformers wants for FP8 and MXFP4."""
    path = os.pathsep.join(filter(None, (os.environ.get("MOECTL_TEST_TORCH"), process_env().get("PYTHONPATH"))))
    env = {**process_env(), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}  # torch's threads wait busily for each other
    there = [sys.executable, "-c", "import torch, accelerate"]
    found = subprocess.run(there, env=env, capture_output=True, check=False)
    if b"ModuleNotFoundError" in found.stderr:
        pytest.skip("torch or accelerate is not installed; the golden files serve")
    program = [sys.executable, "-m", "tests.support.transformers_models", str(tmp_path), *cases]
    subprocess.run(program, env=env, check=True)
    live = json.loads((tmp_path / "transformers.json").read_text(encoding="utf-8"))
    golden = json.loads((theirs.GOLDEN / "transformers.json").read_text(encoding="utf-8"))
    assert live == {case: golden[case] for case in cases}
    with np.load(tmp_path / "transformers.npz") as logits:
        for case in cases:
            np.testing.assert_allclose(logits[case], theirs.logits_of(case), rtol=1e-4, atol=1e-4)
