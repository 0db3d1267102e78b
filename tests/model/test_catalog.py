"""The catalog of published models and the table of families: equal to what they are made of, and to published sizes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moectl.model.catalog import MODELS
from tests.support.make_catalog import FAMILIES, GOLDEN, find_structure, make_families, read_published, strip

PUBLISHED = read_published()
QUICK = ("databricks/dbrx-instruct", "openai/gpt-oss-20b", "meta-llama/Llama-3.2-3B-Instruct")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.long, id=n.partition("/")[2]) for n in PUBLISHED]
)
def test_structures_are_those_of_the_published_configs(name: str) -> None:
    assert MODELS[name].structure == find_structure(PUBLISHED[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_as_published(name: str) -> None:
    """In billions, with one decimal: what the repositories' names and indexes say."""
    assert MODELS[name].structure.parameters / 1e9 == pytest.approx(PUBLISHED[name]["parameters"], abs=0.06)


def test_names_and_precisions() -> None:
    assert len(MODELS) == len(list(MODELS)) > 60
    for name, entry in PUBLISHED.items():
        for other in entry.get("also", []):
            assert MODELS[other].structure == MODELS[name].structure
        for small, (bits, group_size) in entry.get("quantised", {}).items():
            quantization = MODELS[small].quantization
            assert quantization is not None
            assert (quantization.bits, quantization.group_size) == (bits, group_size)


def test_what_is_packed_already_stays_so() -> None:
    experts = {part.quantization for part in MODELS["mlx-community/gpt-oss-20b-MXFP4-Q8"].structure.stacks}
    assert {q.mode for q in experts if q} == {"mxfp4"}
    assert MODELS["openai/gpt-oss-20b"].quantised(None) == MODELS["openai/gpt-oss-20b"]


def test_the_table_of_families_is_what_was_compared() -> None:
    assert json.loads(FAMILIES.read_text(encoding="utf-8")) == make_families()


def test_every_refusal_that_was_found_is_in_the_table() -> None:
    ways: dict[str, Any] = json.loads((GOLDEN / "ways.json").read_text(encoding="utf-8"))
    families = make_families()
    assert {name: families[name]["refused"] for name in ("llama", "minimax", "gemma4")} == {
        name: ways[name] for name in ("llama", "minimax", "gemma4")
    }


def test_empty_values_are_left_out() -> None:
    assert strip({"a": 0, "b": None, "c": False, "d": (0, 1), "e": {}}) == {"c": False, "d": [0, 1]}
