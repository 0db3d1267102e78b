"""A model's defaults for requests, from its generation_config.json, as transformers and vLLM take them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moectl.errors import CheckpointError
from moectl.model.parameters import DEFAULTS, read_defaults
from moectl.shards.source.checkpoint import open_checkpoint, read_sampling
from tests.support.tiny import write_checkpoint

# What published repositories have in that file, without what this module does not read.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "dbrx": ({"_from_model_config": True, "eos_token_id": 100257}, {}),
    "gpt-oss": ({"do_sample": True, "eos_token_id": [200002, 199999, 200012]}, {"temperature": 1.0}),
    "qwen3": (
        {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    ),
    "qwen2.5": (
        {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
        {"repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
    ),
    "llama3": ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(name: str) -> None:
    generation, wanted = PUBLISHED[name]
    assert read_defaults(generation) == wanted


@pytest.mark.parametrize(
    ("generation", "wanted"),
    [
        ({}, {}),
        (dict.fromkeys(("do_sample", *DEFAULTS)), {}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.6, "top_k": 50}, {"temperature": 0.0, "top_k": 50}),
        ({"temperature": 0.3}, {"temperature": 0.3}),  # without do_sample: as vLLM
        ({"temperature": 0}, {"temperature": 0}),
        ({"top_k": -1, "min_p": 0.05}, {"top_k": 0, "min_p": 0.05}),
    ],
)
def test_what_the_keys_mean(generation: dict[str, Any], wanted: dict[str, float]) -> None:
    assert read_defaults(generation) == wanted


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", 9),
        ("temperature", "0.6"),
        ("top_k", 20.5),
        ("top_k", [20]),
        ("top_p", 95),
        ("min_p", True),
        ("repetition_penalty", 0),
    ],
)
def test_a_value_that_no_request_may_have_is_refused_by_its_name(tmp_path: Path, key: str, value: Any) -> None:
    directory = write_checkpoint(tmp_path / "m")
    (directory / "generation_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {key} is .*: it should be ") as caught:
        open_checkpoint(str(directory))
    assert caught.value.hint == "correct it in a copy of the checkpoint's directory, or remove the key"
    (directory / "generation_config.json").write_text("{}")
    open_checkpoint(str(directory)).close()


def test_a_set_without_that_file_has_no_defaults(tmp_path: Path) -> None:
    assert read_sampling(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "unknown": 1}))
    assert read_sampling(tmp_path) == {"temperature": 0.5}
