"""Texts in columns for a terminal: wrapped, marked where they first differ, and safe to print.

Texts are escaped by `utils.printing`. The only escape sequences in the output are those for bold text, and only if
``styled`` is set.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, zip_longest

from tl_adapters.utils.printing import printable_character

NARROWEST = 30
"""Narrowest column in characters; with less room, texts are printed below one another."""
BETWEEN = " │ "
"""Separator of two columns."""
PARTING = "≠"
"""Mark in front of the first character that differs."""
_BOLD, _PLAIN = "\x1b[1m", "\x1b[0m"


@dataclass(frozen=True)
class Column:
    """One text with its title and footer."""

    title: str
    """Line above the text."""
    text: str
    """The text itself; it is escaped when it is printed."""
    footer: str
    """Line below the text."""
    strong: Sequence[tuple[int, int]] = ()
    """Spans of characters to print in bold, as (start, stop)."""
    parts_at: int | None = None
    """Index of the first character that differs, which is marked by `PARTING`."""


_Cell = tuple[str, bool]
"""The printed form of one character, and whether it is bold."""


def side_by_side(columns: Sequence[Column], width: int, styled: bool = False) -> str:
    """The columns as lines of at most ``width`` characters, or below one another if they would be too narrow.

    Args:
        columns: the columns from left to right.
        width: width of the terminal in characters.
        styled: use escape sequences for bold text; set it only if the output is a terminal.
    """
    each = (width - len(BETWEEN) * (len(columns) - 1)) // max(1, len(columns))
    if each < NARROWEST:
        blocks = (chain(*_parts(column, width)) for column in columns)
        return "\n\n".join("\n".join(_render(line, styled) for line in block) for block in blocks)
    wrapped = [_parts(column, each) for column in columns]
    rows = (row for part in zip(*wrapped, strict=True) for row in zip_longest(*part, fillvalue=[]))
    return "\n".join(BETWEEN.join(_render(line, styled, each) for line in row).rstrip() for row in rows)


def _parts(column: Column, width: int) -> list[list[list[_Cell]]]:
    """Title, text and footer as lines of at most ``width``, with empty lines around the text."""
    strong = {index for start, stop in column.strong for index in range(start, stop)}
    paragraphs: list[list[_Cell]] = [[]]
    for index, character in enumerate(column.text):
        if index == column.parts_at:
            paragraphs[-1].append((PARTING, True))
        if character == "\n":
            paragraphs.append([])
        else:
            paragraphs[-1].append((printable_character(character), index in strong))
    if column.parts_at == len(column.text):
        paragraphs[-1].append((PARTING, True))
    title = list(_wrap([(printable_character(c), True) for c in column.title], width))
    text = [line for paragraph in paragraphs for line in _wrap(paragraph, width)]
    footer = list(_wrap([(printable_character(c), False) for c in column.footer], width))
    return [[*title, []], [*text, []], footer]


def _wrap(cells: list[_Cell], width: int) -> Iterator[list[_Cell]]:
    """Lines of at most ``width``, broken after a space if there is one; an empty paragraph gives one empty line."""
    line: list[_Cell] = []
    for cell in cells:
        while line and _width(line) + _width([cell]) > width:
            space = max((i + 1 for i, (shown, _) in enumerate(line) if shown == " "), default=len(line))
            yield line[:space]
            line = line[space:]
        line.append(cell)
    yield line


def _width(cells: Sequence[_Cell]) -> int:
    """Terminal cells of a line: two for wide East Asian characters, none for combining marks."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for shown, _ in cells
        for c in shown
    )


def _render(line: Sequence[_Cell], styled: bool, fill: int = 0) -> str:
    """The line as text, padded with spaces to ``fill``."""
    parts = ((bold, "".join(shown for shown, _ in run)) for bold, run in groupby(line, key=lambda cell: cell[1]))
    text = "".join(f"{_BOLD}{part}{_PLAIN}" if bold and styled else part for bold, part in parts)
    return text + " " * (fill - _width(line))
