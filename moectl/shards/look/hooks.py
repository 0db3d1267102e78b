"""Hooks: let a module, MLX's sum over ranks, or MLX's compiler do something else when it is called.

A hooked module's parameters keep their names, and its class its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx

Hook = Callable[..., Any]  # (call, *args, **kwargs): `call` is what the module does by itself


def hook_call(module: Any, hook: Hook) -> None:
    """Call `hook` in the place of this one module."""
    base = type(module)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return hook(partial(base.__call__, self), *args, **kwargs)

    module.__class__ = type(base.__name__, (base,), {"__call__": call, "__module__": base.__module__})


@contextmanager
def hooked(hooks: Iterable[tuple[Any, Hook]]) -> Iterator[None]:
    """Install hooks on modules while the block runs."""
    before: list[tuple[Any, type]] = []
    try:
        for module, hook in hooks:
            before.append((module, type(module)))
            hook_call(module, hook)
        yield
    finally:
        for module, base in reversed(before):
            module.__class__ = base


@contextmanager
def replaced_sum(all_sum: Callable[..., mx.array]) -> Iterator[None]:
    """Call `all_sum` in the place of `mx.distributed.all_sum` while the block runs."""
    before = mx.distributed.all_sum
    mx.distributed.all_sum = all_sum
    try:
        yield
    finally:
        mx.distributed.all_sum = before


@contextmanager
def uncompiled() -> Iterator[None]:
    """Let MLX compile nothing in the block: on a CPU it would call a compiler for each function of each shape."""
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()
