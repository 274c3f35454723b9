"""Texts side by side in a terminal: wrapped, marked where they part, and safe to print whatever they hold.

Text of a model is not trusted: control characters (an escape sequence could move the cursor, rename the window or
hide what stands there) and invisible ones (marks that turn the direction of writing) are shown escaped. The only
escape sequences that come out are those that make text bold, and only where they are asked for.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, zip_longest

NARROWEST = 30
"""Characters of a column; where there is room for fewer, texts stand below one another."""
BETWEEN = " │ "
"""Between two columns."""
PARTING = "≠"
"""Stands before the first character that differs."""
_BOLD, _PLAIN = "\x1b[1m", "\x1b[0m"
_INVISIBLE = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")


@dataclass(frozen=True)
class Column:
    """One text and what is said of it."""

    title: str
    """The line above it."""
    text: str
    """As it is; made safe when it is shown."""
    footer: str
    """The line under it."""
    strong: Sequence[tuple[int, int]] = ()
    """Spans of the text to show in bold, first character and the one after the last."""
    parts_at: int | None = None
    """The character before which `PARTING` is put."""


_Cell = tuple[str, bool]
"""What is shown of one character, and whether in bold."""


def side_by_side(columns: Sequence[Column], width: int, styled: bool = False) -> str:
    """Columns as lines of at most ``width`` characters; one below the other where they would be too narrow.

    Args:
        columns: from left to right.
        width: of the terminal.
        styled: with escape sequences for bold. Only for a terminal.
    """
    each = (width - len(BETWEEN) * (len(columns) - 1)) // max(1, len(columns))
    if each < NARROWEST:
        blocks = (chain(*_parts(column, width)) for column in columns)
        return "\n\n".join("\n".join(_render(line, styled) for line in block) for block in blocks)
    wrapped = [_parts(column, each) for column in columns]
    rows = (row for part in zip(*wrapped, strict=True) for row in zip_longest(*part, fillvalue=[]))
    return "\n".join(BETWEEN.join(_render(line, styled, each) for line in row).rstrip() for row in rows)


def printable(text: str) -> str:
    """Text of a model with everything escaped that a terminal would act on or not show; line breaks stay."""
    return "".join(character if character == "\n" else _shown(character) for character in text)


def _shown(character: str) -> str:
    if character == "\t":
        return "    "
    return ascii(character)[1:-1] if unicodedata.category(character) in _INVISIBLE else character


def _parts(column: Column, width: int) -> list[list[list[_Cell]]]:
    """Title, text and footer, each as lines of at most ``width``; an empty line on either side of the text."""
    strong = {place for start, stop in column.strong for place in range(start, stop)}
    paragraphs: list[list[_Cell]] = [[]]
    for place, character in enumerate(column.text):
        if place == column.parts_at:
            paragraphs[-1].append((PARTING, True))
        if character == "\n":
            paragraphs.append([])
        else:
            paragraphs[-1].append((_shown(character), place in strong))
    if column.parts_at == len(column.text):
        paragraphs[-1].append((PARTING, True))
    title = list(_wrap([(_shown(c), True) for c in column.title], width))
    text = [line for paragraph in paragraphs for line in _wrap(paragraph, width)]
    footer = list(_wrap([(_shown(c), False) for c in column.footer], width))
    return [[*title, []], [*text, []], footer]


def _wrap(cells: list[_Cell], width: int) -> Iterator[list[_Cell]]:
    """Lines of at most ``width``, broken after a space where there is one; an empty paragraph is one empty line."""
    line: list[_Cell] = []
    for cell in cells:
        while line and _width(line) + _width([cell]) > width:
            space = max((i + 1 for i, (shown, _) in enumerate(line) if shown == " "), default=len(line))
            yield line[:space]
            line = line[space:]
        line.append(cell)
    yield line


def _width(cells: Sequence[_Cell]) -> int:
    """Places that cells take in a terminal: wide East Asian characters two, combining marks none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for shown, _ in cells
        for c in shown
    )


def _render(line: Sequence[_Cell], styled: bool, fill: int = 0) -> str:
    """A line as it is printed, filled with spaces to ``fill``."""
    parts = ((bold, "".join(shown for shown, _ in run)) for bold, run in groupby(line, key=lambda cell: cell[1]))
    text = "".join(f"{_BOLD}{part}{_PLAIN}" if bold and styled else part for bold, part in parts)
    return text + " " * (fill - _width(line))
