"""What was said in a chat, and the file that keeps it: `/save` and `/load`.

The file is JSON, `{"schema": "moectl.chat/1", "model", "settings": {…}, "messages": [{"role", "content",
"finish_reason", "thinking"}]}`; fields may be added, never renamed.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from moectl.cli.chat.settings import ChatSettings
from moectl.errors import MoectlError, UsageError
from moectl.files import replace_file
from moectl.records import build

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = "moectl.chat/1"
ROLES = ("user", "assistant")  # in turns; the system message is one of the settings


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `finish_reason` says why an assistant's ended: "stop", "length" or "cancelled"."""

    role: str
    content: str
    finish_reason: str | None = None
    thinking: str | None = None  # before the answer

    def api_fields(self) -> dict[str, str]:
        """Return the turn as a message of an API request; the model's template says whether to repeat the thinking."""
        thinking = {"reasoning_content": self.thinking} if self.thinking else {}
        return {"role": self.role, "content": self.content, **thinking}


@dataclass(frozen=True, slots=True)
class Transcript:
    """A chat: its settings, and in turns a user's message and the answer."""

    model: str
    settings: ChatSettings
    messages: tuple[Message, ...]


def save_transcript(path: Path, transcript: Transcript) -> None:
    """Write a chat to a file: mode 0600, atomically, over nothing but another saved chat. Raises UsageError."""
    if path.exists():
        _check_replaceable(path, transcript.settings)
    document = {
        "schema": SCHEMA,
        "model": transcript.model,
        "settings": asdict(transcript.settings),
        "messages": [asdict(message) for message in transcript.messages],
    }
    try:
        replace_file(path, json.dumps(document, ensure_ascii=False, indent=1).encode() + b"\n", mode=0o600)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def _check_replaceable(path: Path, settings: ChatSettings) -> None:
    try:
        load_transcript(path, settings)
    except MoectlError:
        raise UsageError(f"{path} exists and is not a saved chat: choose another name") from None


def load_transcript(path: Path, settings: ChatSettings) -> Transcript:
    """Read a saved chat; settings that it does not name are those given. Raises UsageError in one line."""
    try:
        if path.exists() and not path.is_file():  # reading a device or a pipe may never end
            raise UsageError(f"cannot read {path}: not a regular file")
        raw = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(raw, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text to send
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is not a saved chat: not JSON in UTF-8") from None
    try:
        return _read_document(raw, settings)
    except (UsageError, ValueError) as error:
        raise UsageError(f"{path} is not a saved chat: {error}") from None


def _read_document(raw: Any, settings: ChatSettings) -> Transcript:
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        raise ValueError(f"its schema is not {SCHEMA}")
    raw = {"model": "", **_known(raw, Transcript)}
    raw["settings"] = asdict(settings) | _known(raw.get("settings", {}), ChatSettings)
    if isinstance(raw.get("messages"), list):
        raw["messages"] = [_known(message, Message) for message in raw["messages"]]
    transcript = build(Transcript, raw)
    for number, (message, role) in enumerate(zip(transcript.messages, itertools.cycle(ROLES), strict=False), 1):
        if message.role != role:
            raise ValueError(f"message {number} should be of the role '{role}'")
    if len(transcript.messages) % len(ROLES):
        raise ValueError("its last message has no answer")
    return transcript


def _known(raw: Any, kind: type[Any]) -> dict[str, Any]:
    """Return those fields of an object that this version of moectl knows."""
    if not isinstance(raw, dict):
        raise ValueError(f"{raw!r:.40} should be an object")
    return {field.name: raw[field.name] for field in fields(kind) if field.name in raw}
