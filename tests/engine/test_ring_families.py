"""The dozen families on real ranks: checkpoints with mlx-lm's names, cut, loaded and answered on a ring of two.

Each family runs at one split, which changes from one to the next, over uneven shares; `--long` runs all splits. All
cases share one ring: starting its processes takes longer than their answers.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from moectl.model.placement import SPLITS
from moectl.shards.chat.tokenizer import open_tokenizer
from tests.engine.test_engine_families import drive, whole
from tests.engine.test_families import DOZEN, WAYS
from tests.engine.test_lockstep import run_ranks
from tests.support.alphabet import write_tokenizer
from tests.support.cutting import cut
from tests.support.families import config_of

pytestmark = pytest.mark.usefixtures("uncompiled")
# Two blocks beside each other in a layer, so that sums of one layer do not wait for each other; a window of its own.
FAMILIES = (*DOZEN, "cohere", "gemma3_text", "falcon_h1")
PROMPTS = ["thequickbrownfoxjumpsoverthelazydogagainandagain", "mixture"]  # of letters, which all vocabularies have
TOKENS = 12


def list_cases(*, every: bool) -> Iterator[tuple[str, str]]:
    turn = itertools.cycle(SPLITS)
    for family in FAMILIES:
        possible = [split for split in SPLITS if split not in WAYS[family]]
        if every:
            yield from ((family, split) for split in possible)
        else:
            yield family, next(split for split in turn if split in possible)


def write_model(family: str, directory: Path) -> Path:
    """Write a family's small model as MLX writes one."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_of(family)))
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(whole(family).parameters())))
    write_tokenizer(directory)
    return directory


def test_real_ranks_answer_as_one_process(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    cases = list(list_cases(every=request.config.getoption("--long")))
    for family in dict.fromkeys(family for family, _ in cases):
        write_model(family, tmp_path / family)
    jobs = []
    for family, split in cases:
        shards = tmp_path / f"{family}-{split}"
        cut(tmp_path / family, shards, split=split, shares=(2, 1))
        jobs.append({"shards": str(shards), "prompts": PROMPTS, "max_tokens": TOKENS, "raw": True})
    results = run_ranks(2, jobs, tmp_path, MLX_DISABLE_COMPILE="1")
    for number, (family, split) in enumerate(cases):
        driven = drive(family, open_tokenizer(tmp_path / family))
        expected = [driven.ask(prompt, TOKENS) for prompt in PROMPTS]
        driven.run()
        leader = results[1 if split == "layers" else 0][number]
        assert leader["tokens"] == [driven.tokens(asked) for asked in expected], (family, split)
        assert sum(map(len, leader["tokens"])) > TOKENS
