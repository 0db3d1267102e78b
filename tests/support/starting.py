"""Which tests start the whole program, ranks or a host to log in to, by what their functions refer to.

A test is one of them where it, a fixture of it, or a helper that they call takes the environment of such a process
(`tests.support.ring`), or starts an sshd. So a new test needs no marker.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

import pytest

from tests.support.netns import run_cluster
from tests.support.ring import process_env, rank_env
from tests.support.sshd import run_sshd

STARTERS = (process_env, rank_env, run_cluster, run_sshd)


def starts_processes(item: pytest.Item) -> bool:
    """Return whether a test or one of its fixtures comes to one of the STARTERS."""
    info: Any = getattr(item, "_fixtureinfo", None)
    fixtures = [one.func for several in info.name2fixturedefs.values() for one in several] if info else []
    return any(_reaches(inspect.unwrap(one)) for one in (getattr(item, "function", None), *fixtures) if one)


@cache
def _reaches(function: Any) -> bool:
    seen: set[FunctionType] = set()
    left = [function]
    while left:
        one = left.pop()
        if one in STARTERS:
            return True
        if isinstance(one, FunctionType) and one not in seen and one.__module__.startswith("tests."):
            seen.add(one)
            left += [found for name in _names(one.__code__) if callable(found := one.__globals__.get(name))]
        elif inspect.isclass(one) and one.__module__.startswith("tests."):
            left += [method for method in vars(one).values() if isinstance(method, FunctionType)]
    return False


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
