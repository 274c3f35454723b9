"""HTML views for notebooks: circuitsvis components that work offline, colored tokens, drawings and data frames."""

from __future__ import annotations

import functools
import html
import importlib.util
import math
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from tl_adapters.utils.html import Cell, render

if TYPE_CHECKING:
    from pandas import DataFrame

Table = tuple[Sequence[str], Sequence[Sequence[str | Cell]]]
"""A header, and rows with as many cells."""


@dataclass(frozen=True)
class NotebookView:
    """Self-contained HTML that a notebook displays as the result of a cell."""

    html: str = field(repr=False)
    """The HTML, which loads nothing from the network."""

    def _repr_html_(self) -> str:
        return self.html


def tables_view(*tables: Table) -> Markup:
    """Return tables, one below the other, as the HTML of a notebook."""
    return render("notebook/tables.html.j2", tables=tables)


def drawing_view(drawing: Markup, caption: str) -> Markup:
    """Return a drawing that scrolls within itself, with a caption, as the HTML of a notebook."""
    return render("notebook/drawing.html.j2", drawing=drawing, caption=caption)


def data_frame(columns: Mapping[str, Sequence[Any]]) -> DataFrame:
    """Return columns as a pandas DataFrame; pandas is imported here, because that takes most of a second."""
    import pandas as pd

    return pd.DataFrame(dict(columns))


def rows_frame(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> DataFrame:
    """Return rows as a pandas DataFrame with these columns, which it has without rows too."""
    return data_frame({name: [row[name] for row in rows] for name in names})


def circuitsvis_view(parts: Sequence[Markup | tuple[str, Mapping[str, object]]]) -> NotebookView:
    """Return HTML and circuitsvis components in order, with the script of circuitsvis included once.

    circuitsvis itself writes 1.3 MB of script for every component and tries the network first.

    Args:
        parts: pieces of HTML that `render` made, and components as (name, properties). Tokens among the properties
            must be escaped (`circuitsvis_tokens`).

    Raises:
        ValueError: a property is a number that is not finite.
    """
    pieces = [
        {"html": part, "id": ""}
        if isinstance(part, Markup)
        else {"html": "", "id": f"circuits-vis-{uuid.uuid4().hex[:12]}", "component": part[0], "properties": part[1]}
        for part in parts
    ]
    script = _circuitsvis_script() if any(piece["id"] for piece in pieces) else ""
    return NotebookView(render("notebook/components.html.j2", pieces=pieces, script=script))


def circuitsvis_tokens(tokens: Sequence[str]) -> list[str]:
    """Return tokens for circuitsvis: escaped, since it inserts them as HTML, and with visible line breaks."""
    return [html.escape(token, quote=False).replace("\n", "↵\n") for token in tokens]


@functools.cache
def _circuitsvis_script() -> Markup:
    """Return the script of circuitsvis without importing the package, which takes seconds."""
    package = importlib.util.find_spec("circuitsvis")
    assert package is not None
    assert package.origin is not None
    script = Path(package.origin).parent / "dist" / "cdn" / "iife.js"
    return Markup(re.sub(r"</(?=script)", r"<\\/", script.read_text(encoding="utf-8")))


def colored_tokens(tokens: Sequence[str], values: Sequence[float]) -> NotebookView:
    """Return a text in which each token is colored by its value; hovering over a token shows the value.

    Raises ValueError for values that are not finite, or not one value for each token.
    """
    values = [float(value) for value in values]
    if len(tokens) != len(values) or not all(map(math.isfinite, values)):
        raise ValueError(f"Got {len(tokens)} tokens and {len(values)} values; give one finite value for each token.")
    return circuitsvis_view([("ColoredTokens", {"tokens": circuitsvis_tokens(tokens), "values": values})])
