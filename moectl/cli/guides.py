"""The guides of moectl/guide: their topics, their texts, and how their links read outside of a browser."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

TOPICS = (
    "cluster",
    "models",
    "daily",
    "agents",
    "planning",
    "deploying",
    "scripting",
    "troubleshooting",
    "security",
    "design",
    "verified",
    "contributing",
)
DIRECTORY = Path(__file__).parent.parent / "guide"
_MARK = re.compile(r"^<!-- .* -->\n", re.MULTILINE)  # for the tests that run and look up what a guide shows
_LINK = re.compile(r"\[([^\]]+)\]\((?:([a-z]+)\.md)?(?:#[\w-]+)?\)")


@dataclass(frozen=True, slots=True)
class Guide:
    """One guide in Markdown, without its marks."""

    topic: str
    title: str
    summary: str  # its first sentence
    body: str  # from the first sentence on

    def text(self, reference: str) -> str:
        """Return the body; `reference` says how to reach another guide, with {} for its topic."""

        def refer(match: re.Match[str]) -> str:
            return f"{match[1]} ({reference.format(match[2])})" if match[2] else match[1]

        return _LINK.sub(refer, self.body)


def read_guide(topic: str) -> Guide:
    """Return the guide to a topic of TOPICS."""
    text = _MARK.sub("", (DIRECTORY / f"{topic}.md").read_text(encoding="utf-8"))
    title, _, body = text.removeprefix("# ").partition("\n")
    body = body.strip() + "\n"
    return Guide(topic, title, " ".join(body.partition("\n\n")[0].split()), body)
