"""Text as roff source, for the man pages. It knows letters and fonts, no macros."""

from __future__ import annotations

import re


def escape(text: str, *, code: bool = False) -> str:
    r"""Return a text as roff source. In code every hyphen is a minus, as typed; in prose those of options are."""
    text = text.replace("\\", r"\e")
    for letter, source in (("'", r"\(aq"), ("`", r"\(ga"), ("^", r"\(ha"), ("~", r"\(ti")):
        text = text.replace(letter, source)
    words = r"-" if code else r"(?<![\w(])-+[\w-]*|moectl-\w+(?=\()|\S+[./_=]\S*"
    text = re.sub(words, lambda match: match[0].replace("-", r"\-"), text)
    return "".join(letter if letter.isascii() else rf"\[u{ord(letter):04X}]" for letter in text)


def bold(text: str) -> str:
    """Return a text in bold, with its hyphens as typed."""
    return rf"\fB{escape(text, code=True)}\fR"


def line(source: str) -> str:
    """Return a line of source that is no macro, whatever it begins with."""
    return rf"\&{source}" if source.startswith((".", "'")) else source


def sentences(source: str) -> list[str]:
    """Return source as lines of one sentence each, as is the habit in man pages: a change is then one line's."""
    return [line(sentence) for sentence in re.split(r"(?<=[.:;!?]) (?=[A-Z]|\\\(aq)", source)]
