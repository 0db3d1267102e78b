"""Requests for the chat template, as a user's words make them."""

from __future__ import annotations

from typing import Any

from moectl.engine.request import Request


def ask_chat(number: int, text: str, max_tokens: int, *, system: str | None = None, **more: Any) -> Request:
    """Return a request of one user's message, after a system prompt where there is one."""
    words = [("system", system)] * (system is not None) + [("user", text)]
    messages = tuple({"role": role, "content": str(content)} for role, content in words)
    return Request(number, "", max_tokens, messages=messages, **more)
