"""HTML views for notebooks: circuitsvis components that work offline, colored tokens, drawings, records and tables."""

from __future__ import annotations

import functools
import html
import importlib.util
import math
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from markupsafe import Markup

from tl_adapters.utils.html import Cell, count, measurement_cell, render, three_digits
from tl_adapters.utils.measurement import Measurement
from tl_adapters.utils.results import plain

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


_MOST_ITEMS = 6
"""Items of a collection that a cell shows."""
_MOST_CHARACTERS = 300
"""Characters of a text that a cell shows."""
_MOST_ROWS = 100
"""Rows that a notebook shows of a table of records."""


class ResultRecord:
    """What a frozen dataclass with the values of one result gets by deriving from it: JSON values and views.

    A class overrides `row` where tables show something else than its fields. In a terminal a record is its name and its
    row, cut as cells of a table are.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__repr__ = cls.__repr__  # type: ignore[method-assign]  # dataclass() sets its own where a class has none

    def __repr__(self) -> str:
        cells = [(name.replace("_", " "), value_cell(value)) for name, value in self.row().items()]
        parts = [f"{name} {cell.text}" + (f" ({cell.note})" if cell.note else "") for name, cell in cells]
        return f"{type(self).__name__}: {' '.join(', '.join(parts).split())}"  # texts are shown on one line

    def row(self) -> dict[str, Any]:
        """What tables show of the record: name -> value."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.repr}  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; numbers that are not defined are None."""
        return plain(self, null=True)

    def _repr_html_(self) -> str:
        rows = [(name.replace("_", " "), value_cell(value)) for name, value in self.row().items()]
        return tables_view(([type(self).__name__, ""], rows))


R = TypeVar("R", bound=ResultRecord)


class RecordTable(list[R]):
    """A list of records of one kind, which a notebook shows as a table with a row for each."""

    def __repr__(self) -> str:
        shown = [repr(record) for record in self[:_MOST_ITEMS]]
        more = [f"... and {len(self) - _MOST_ITEMS} more"] if len(self) > _MOST_ITEMS else []
        return "[" + ",\n ".join([*shown, *more]) + "]"

    def to_dict(self) -> dict[str, Any]:
        """The records as JSON values, under the key "records"."""
        return {"records": [record.to_dict() for record in self]}

    def to_pandas(self) -> DataFrame:
        """A DataFrame with a row for each record; the 95 % interval of a measurement has columns of its own."""
        return records_frame([record.row() for record in self])

    def _repr_html_(self) -> str:
        return rows_view([record.row() for record in self])


def rows_view(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Return the first rows of a table as the HTML of a notebook, and how many more there are."""
    shown = rows[:_MOST_ROWS]
    names = list(dict.fromkeys(name for row in shown for name in row))
    cells = [[value_cell(row.get(name)) for name in names] for row in shown]
    more: list[Table] = [([f"... and {len(rows) - len(shown):,} more rows"], [])] if len(rows) > len(shown) else []
    return tables_view(([name.replace("_", " ") for name in names] or ["no rows"], cells), *more)


def value_cell(value: Any) -> Cell:
    """A table cell that shows a value as a reader takes it; long texts and collections are cut."""
    if isinstance(value, Measurement):
        return measurement_cell(vars(value), three_digits)
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, (int, float)):
        return Cell(count(value) if isinstance(value, int) else three_digits(value))
    if isinstance(value, Mapping):
        return Cell(_cut([f"{key}: {value_cell(item).text}" for key, item in value.items()]))
    if hasattr(value, "_asdict"):  # a feature, as the command line names it
        return Cell(".".join(map(str, value)))
    if isinstance(value, (list, tuple)):
        return Cell(_cut([value_cell(item).text for item in value]))
    text = "-" if value is None else str(value)
    return Cell(text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 3]}...")


def _cut(texts: Sequence[str]) -> str:
    more = [f"... and {len(texts) - _MOST_ITEMS} more"] if len(texts) > _MOST_ITEMS else []
    return ", ".join([*texts[:_MOST_ITEMS], *more])


def records_frame(rows: Sequence[Mapping[str, Any]]) -> DataFrame:
    """Return rows as a pandas DataFrame: a measurement has columns for its value and interval, a feature for its id."""
    flat = [_flat(row) for row in rows]
    names = dict.fromkeys(name for row in flat for name in row)
    return data_frame({name: [row.get(name) for row in flat] for name in names})


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Measurement):
            flat |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
        elif hasattr(value, "_asdict"):
            flat |= value._asdict()
        else:
            flat[name] = value
    return flat


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
