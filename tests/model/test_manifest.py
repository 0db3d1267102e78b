"""The manifest's text: what is written is read back, and nothing that is read can surprise."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from moectl.errors import IntegrityError
from moectl.model.manifest import FileEntry, Manifest, parse_manifest
from moectl.model.placement import make_placement
from moectl.model.structure import Quantization
from tests.model.test_placement import structure
from tests.support.tiny import json_values, make_config

CONFIG = make_config()
MODEL = structure(layers=2, heads=4, kv_heads=2, hidden=384)
UP = "transformer.blocks.0.ffn.experts.up_proj"
WHOLE = Manifest(
    name="tiny",
    source="dbrx/tiny",
    revision="0123abcd",
    fingerprint="f" * 64,
    config=CONFIG,
    structure=MODEL,
    quantization=Quantization(4, 64),
    table={"bits": 4, "group_size": 64, "lm_head": {"bits": 8, "group_size": 64, "mode": "affine"}},
    split="hidden",
    shares=(1, 1.5),
    files={"config.json": FileEntry(7, "0" * 64), "rank-0/head.safetensors": FileEntry(99, "a" * 64)},
    tensors={
        "lm_head.weight": {"rank-0/head.safetensors": ()},
        f"{UP}.weight": {
            "rank-0/layer-000.safetensors": (((0, 16), (0, 128), (0, 8)),),
            "rank-1/layer-000.safetensors": (((0, 16), (128, 384), (0, 8)),),
        },
    },
)
RAW: dict[str, Any] = json.loads(WHOLE.to_json())
PATH = PurePosixPath("set/moectl.json")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in parsed JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for key, item in inner for p in ((*path, key), *places(item, (*path, key)))]


def change(path: tuple[Any, ...], value: Any) -> str:
    raw = deepcopy(RAW)
    at = raw
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(raw)


def parse(text: str) -> Manifest | None:
    """Return the manifest, whose every derived value can be had, or None when it is refused."""
    try:
        manifest = parse_manifest(text, PATH)
    except IntegrityError:
        return None
    assert manifest.placement.structure == manifest.structure
    assert manifest.files_of(0).items() <= manifest.files.items()
    assert json.loads(manifest.to_json())["schema"] == "moectl.shards/2"
    return manifest


def test_what_is_written_is_read_back() -> None:
    assert parse(WHOLE.to_json()) == WHOLE


@pytest.mark.parametrize(("split", "shares"), [("experts", (15, 1)), ("tensor", (2, 4.5)), ("layers", (0.1, 1))])
def test_every_split_is_read_back(split: str, shares: tuple[float, ...]) -> None:
    placement = make_placement(MODEL, split, 2, shares=shares)
    manifest = replace(WHOLE, split=split, shares=placement.shares)
    read = parse(manifest.to_json())
    assert read == manifest
    assert read is not None
    assert read.placement == placement


def test_copies_of_experts_are_read_back() -> None:
    placement = make_placement(MODEL, "experts", 3, replicas=2, frequencies=range(16))
    manifest = replace(WHOLE, split="experts", shares=placement.shares, held=placement.held)
    read = parse(manifest.to_json())
    assert read == manifest
    assert read is not None
    assert read.placement == placement
    for held in ([[0, 1]], [[0], "1"], [list(range(16)), [3, 3], [1]], [list(range(15)), [1], [2]], [[True], [], []]):
        raw = {**json.loads(manifest.to_json()), "held": held, "shares": [1] * len(held)}
        assert parse(json.dumps(raw)) is None
    assert parse(change(("held",), [[0], [1]])) is None


def test_a_set_made_before_there_were_copies_is_read() -> None:
    raw = deepcopy(RAW)
    del raw["held"]
    assert parse(json.dumps(raw)) == WHOLE


@settings(max_examples=400, deadline=None)
@given(path=st.sampled_from(places(RAW)), value=json_values | st.integers() | st.just(10**400) | st.just(["x"]))
def test_nonsense_in_a_manifest_never_surprises(path: tuple[Any, ...], value: Any) -> None:
    parse(change(path, value))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_missing_and_surplus_parts_never_surprise(data: st.DataObject) -> None:
    raw = deepcopy(RAW)
    at, key = raw, data.draw(st.sampled_from(sorted(raw)))
    while isinstance(at[key], dict) and at[key] and data.draw(st.booleans()):
        at, key = at[key], data.draw(st.sampled_from(sorted(at[key])))
    if data.draw(st.booleans()):
        del at[key]
    else:
        at[data.draw(st.text(max_size=3))] = at[key]
    parse(json.dumps(raw))


@settings(max_examples=200, deadline=None)
@given(start=st.integers(0, 2000), length=st.integers(0, 2000), text=st.text(max_size=3))
def test_damaged_text_never_surprises(start: int, length: int, text: str) -> None:
    whole = WHOLE.to_json()
    parse(whole[:start] + text + whole[start + length :])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("config",), []),
        (("shares",), "11"),
        (("shares",), ["1", "5"]),
        (("shares",), []),
        (("shares",), [1, 0]),
        (("shares",), [1, -1]),
        (("shares",), [1, 1e999]),
        (("split",), "rows"),
        (("structure",), {}),
        (("structure", "order"), []),
        (("structure", "order"), [0, 1]),
        (("structure", "kinds"), []),
        (("structure", "kinds", 0, "parts", 0, "values"), "4"),
        (("structure", "kinds", 0, "parts", 0, "heads", "role"), "tail"),
        (("structure", "vocab_size"), None),
        (("table",), 4),
        (("tensors", f"{UP}.weight", "rank-0/layer-000.safetensors"), [[[0, 16], [0]]]),
        (("tensors", f"{UP}.weight"), ["rank-0/layer-000.safetensors"]),
        (("files",), []),
        (("files", "config.json"), 7),
        (("files", "../precious"), {"bytes": 1, "sha256": "0" * 64}),
        (("files", "/precious"), {"bytes": 1, "sha256": "0" * 64}),
        (("files", "config.json", "bytes"), -1),
        (("files", "config.json", "bytes"), True),
        (("files", "config.json", "sha256"), "0"),
        (("tensors",), {"x": "y"}),
        (("quantization",), 4),
        (("quantization", "bits"), "4"),
        (("revision",), 4),
        (("source",), None),
        (("schema",), "moectl.shards/1"),
    ],
    ids=str,
)
def test_each_part_is_checked(path: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(IntegrityError, match=r"set/moectl\.json") as caught:
        parse_manifest(change(path, value), PATH)
    assert caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"schema": "moectl.shards/2"}'], ids=len)
def test_what_is_no_manifest_is_refused(text: str) -> None:
    assert parse(text) is None
