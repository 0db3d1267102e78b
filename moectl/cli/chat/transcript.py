"""What has been said in a chat, and the file that keeps it: `/save` and `/load`. It talks to nobody.

The file is JSON, `{"schema": "moectl.chat/1", "model", "settings": {…}, "messages": [{"role", "content",
"finish_reason"}]}`; fields may be added, never renamed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from moectl.cli.chat.settings import ChatSettings
from moectl.errors import MoectlError, UsageError
from moectl.files import replace_file

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = "moectl.chat/1"
ROLES = ("user", "assistant")  # in turns; the system message is one of the settings


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `finish_reason` of an assistant's is why it ended: "stop", "length", or "cancelled" part of the way."""

    role: str
    content: str
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Transcript:
    """Complete exchanges (a user's message and its answer, in turns) and how they were asked for."""

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
        if path.exists() and not path.is_file():  # a device or a pipe may never end
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
    model, said, given = raw.get("model", ""), raw.get("messages"), raw.get("settings", {})
    if not (isinstance(model, str) and isinstance(said, list) and isinstance(given, dict)):
        raise ValueError("model should be a text, messages a list and settings an object")
    known = asdict(settings) | {f.name: given[f.name] for f in fields(ChatSettings) if f.name in given}
    messages = tuple(_read_message(number, message) for number, message in enumerate(said))
    if len(messages) % len(ROLES):
        raise ValueError("its last message has no answer")
    return Transcript(model, ChatSettings(**known), messages)


def _read_message(number: int, raw: Any) -> Message:
    expected = ROLES[number % len(ROLES)]
    if not isinstance(raw, dict) or raw.get("role") != expected or not isinstance(raw.get("content"), str):
        raise ValueError(f"message {number + 1} should be a text of the role '{expected}'")
    reason = raw.get("finish_reason")
    if not (reason is None or isinstance(reason, str)):
        raise ValueError(f"the finish_reason of message {number + 1} should be a text")
    return Message(expected, raw["content"], reason)
