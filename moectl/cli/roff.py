"""Source for man pages: letters, fonts, sentences, and the part of Markdown that the guides use.

Other Markdown is an error. Tables are for tbl(1), which mandoc and groff have built in or run where the first line of a
page asks for it.
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from markdown_it.tree import SyntaxTreeNode

NEEDS_TBL = "'\\\" t"
RAGGED = (".ad l", ".nh")  # groff would stretch and hyphenate narrow columns
_NARROW = 16  # letters; what is longer than that in a table may wrap
_FONTS = {"strong": "B", "em": "I"}


def escape(text: str, *, code: bool = False) -> str:
    r"""Return a text as roff source. In code every hyphen is a minus, as typed; in prose only those of options are."""
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
    """Return a line of source that is text, also where it begins like a macro."""
    return rf"\&{source}" if source.startswith((".", "'")) else source


def sentences(source: str) -> list[str]:
    """Return source as lines of one sentence each, as man pages have it: so a change is small."""
    return [line(sentence) for sentence in re.split(r"(?<=[.:;!?]) (?=[A-Z]|\\\(aq)", source)]


def literal(text: str) -> list[str]:
    """Return lines as they are to be typed or read, indented."""
    return [".PP", ".RS 4", ".EX", *(line(escape(source, code=True)) for source in text.splitlines()), ".EE", ".RE"]


def below(last: str, lines: Iterable[str]) -> Iterator[str]:
    """Yield lines to stand below a last one: a title begins a paragraph by itself."""
    for source in lines:
        if source != ".PP" or not last.startswith((".SH", ".SS")):
            yield source
            last = source


def to_roff(text: str) -> list[str]:
    """Return Markdown as lines of man(7), to stand below a title. Raises ValueError for what the guides do not use."""
    from markdown_it import MarkdownIt
    from markdown_it.tree import SyntaxTreeNode

    tree = SyntaxTreeNode(MarkdownIt("commonmark").enable("table").parse(text))
    return list(below(".SH", itertools.chain.from_iterable(map(_block, tree.children))))


def _block(node: SyntaxTreeNode) -> Iterator[str]:
    match node.type:
        case "heading":
            yield f".S{'H' if node.tag == 'h2' else 'S'} {_inline(node)}"
        case "paragraph":
            yield ".PP"
            yield from sentences(_inline(node))
        case "fence":
            yield from literal(node.content)
        case "bullet_list":
            yield from _items(node, (r"\(bu" for _ in node.children))
        case "ordered_list":
            yield from _items(node, (f"{number}." for number, _ in enumerate(node.children, 1)))
        case "table":
            yield from _table(node)
        case _:
            raise ValueError(f"no guide may hold a {node.type}: {node.content!r}")


def _items(node: SyntaxTreeNode, tags: Iterable[str]) -> Iterator[str]:
    for item, tag in zip(node.children, tags, strict=True):
        if [child.type for child in item.children] != ["paragraph"]:
            raise ValueError(f"no guide may hold a list of more than paragraphs: {_plain(item)!r}")
        yield f".IP {tag} 3"
        yield from sentences(_inline(item.children[0]))


def _table(node: SyntaxTreeNode) -> Iterator[str]:
    rows = [[_inline(cell) for cell in row.children] for part in node.children for row in part.children]
    plain = [[_plain(cell) for cell in row.children] for part in node.children for row in part.children]
    wide = [max(map(len, column)) > _NARROW for column in zip(*plain, strict=True)]
    head, columns = " ".join("lb" for _ in wide), " ".join("lx" if is_wide else "l" for is_wide in wide)
    yield from (".PP", ".TS", head, f"{columns}.")
    for row in rows:
        cells = (f"T{{\n{line(cell)}\nT}}" if is_wide else cell for cell, is_wide in zip(row, wide, strict=True))
        yield from "\t".join(cells).split("\n")
    yield ".TE"


def _inline(node: SyntaxTreeNode, font: str = "R") -> str:
    """Return the source of what stands inside a block, in one line."""
    return "".join(_piece(child, font) for child in node.children)


def _piece(node: SyntaxTreeNode, font: str) -> str:
    match node.type:
        case "inline":
            return _inline(node, font)
        case "text":
            return escape(node.content)
        case "softbreak":
            return " "
        case "code_inline":
            return bold(node.content).removesuffix("R") + font
        case "strong" | "em":
            inner = _FONTS[node.type]
            return rf"\f{inner}{_inline(node, inner)}\f{font}"
        case "link":
            text, target = _inline(node, font), escape(str(node.attrs["href"]))
            return text if text == target else f"{text} <{target}>"
        case _:
            raise ValueError(f"no guide may hold a {node.type}: {node.content!r}")


def _plain(node: SyntaxTreeNode) -> str:
    return "".join(child.content or _plain(child) for child in node.children)
