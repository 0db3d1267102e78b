"""Requests that real agents have sent, with long texts cut; `tests/recordings/agents/README.md` says how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

AGENTS = Path(__file__).parent.parent / "recordings" / "agents"


def read_recorded(name: str) -> dict[str, Any]:
    """Return the body of a recorded request."""
    body: dict[str, Any] = json.loads((AGENTS / f"{name}.json").read_text())
    return body
