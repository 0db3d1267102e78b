"""Every hint is named in tests/hints.toml with the test that does what it says, or with why there is none."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.support.hints import collect_hints

HERE = Path(__file__).parent
TABLE: dict[str, Any] = tomllib.loads((HERE / "hints.toml").read_text(encoding="utf-8"))
MOST_UNFOLLOWED = 18  # fewer is better: lower it with the list


def test_every_hint_is_in_the_table_once_and_nothing_else() -> None:
    listed = [*TABLE["followed"], *TABLE["person"], *TABLE["unfollowed"]]
    assert len(listed) == len(set(listed))
    hints = collect_hints()
    new = {text: place for text, place in hints.items() if text not in listed}
    assert new == {}, "name the test that follows it in tests/hints.toml"
    assert set(listed) - hints.keys() == set(), "moectl has no such hint any more"


def test_the_hints_that_no_test_follows_only_get_fewer() -> None:
    assert len(TABLE["unfollowed"]) <= MOST_UNFOLLOWED


@pytest.mark.parametrize("test", sorted(set(TABLE["followed"].values())))
def test_the_test_that_follows_a_hint_is_there_and_looks_at_it(test: str) -> None:
    path, _, name = test.partition("::")
    text = (HERE.parent / path).read_text(encoding="utf-8")
    [found] = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == name]
    source = "\n".join(text.splitlines()[found.lineno - 1 : found.end_lineno])
    hints = [hint for hint, named in TABLE["followed"].items() if named == test]
    parts = [part.strip() for hint in hints for part in hint.split("{}") if len(part) > 12]
    words = ("hint", "Hint", ".fix", *parts)
    assert any(word in source for word in words), "it never reads what the hint says"


def test_hints_are_found_where_they_are_given() -> None:
    hints = collect_hints()
    assert "check --hostfile" in hints  # as an argument
    assert "moectl deploy --verify (on this machine: moectl shard --verify DIR)" in hints  # by a name of its module
    assert "set 'SessionType default' for this host" in hints  # in a table
    assert "moectl setup --undo takes back what was run" in hints  # by a name of another module
    assert "in its ~/.bashrc, before what prints: case $- in *i*) ;; *) return;; esac" in hints  # returned
    assert "restart that Mac" in hints  # of a doctor's finding
    assert "free some space and {}" in hints  # with what is filled in
