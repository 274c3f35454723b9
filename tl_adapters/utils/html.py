"""Small pieces of pages: escaped text, tables, line plots as SVG, and the page around them. They know no other room.

Everything is inlined, so a page opens offline; every piece of text that comes from a model is escaped here.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tl_adapters.utils.strict_json import dumps

_STYLE = """
:root { --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --paper: #ffffff; --tint: #f6f8fa; --mark: #ffe28a; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 32px 20px 64px; color: var(--ink); background: var(--paper);
       font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 40px 0 8px; }
p { max-width: 76ch; } .soft { color: var(--soft); }
table { border-collapse: collapse; margin: 12px 0; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
td small { display: block; color: var(--soft); }
.plots { display: flex; flex-wrap: wrap; gap: 16px; } .plots figure { margin: 0; flex: 1 1 320px; max-width: 540px; }
.plots svg { width: 100%; height: auto; } figcaption { color: var(--soft); font-size: 13px; }
.answers { display: grid; grid-template-columns: repeat(3, 1fr); gap: 12px; margin: 10px 0 22px; }
.answers > div { background: var(--tint); border: 1px solid var(--line); border-radius: 6px; padding: 8px 12px; }
.answers h4 { margin: 0 0 4px; font-size: 13px; color: var(--soft); }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
      font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; }
mark { background: var(--mark); border-radius: 3px; padding: 0 2px; font-weight: 600; }
@media (max-width: 720px) { .answers { grid-template-columns: 1fr; } }
"""


def escape(text: str) -> str:
    """Text as HTML that shows exactly it."""
    return html.escape(text, quote=True)


def marked(text: str, words: Sequence[str]) -> str:
    """``text`` as HTML with ``words`` highlighted, in any case."""
    found = re.finditer("|".join(rf"\b{re.escape(word)}\b" for word in words), text, flags=re.IGNORECASE)
    return marked_at(text, [match.span() for match in found])


def marked_at(text: str, places: Sequence[Sequence[int]]) -> str:
    """``text`` as HTML with places highlighted, each as (start, stop) of characters."""
    out, done = [], 0
    for start, stop in sorted(map(tuple, places)):
        start = max(start, done)
        if start < stop:
            out.append(f"{escape(text[done:start])}<mark>{escape(text[start:stop])}</mark>")
            done = stop
    return "".join(out) + escape(text[done:])


def inert_json(value: object) -> str:
    """JSON for a page's script: ASCII, and no character in it could end the script. Raises ValueError for NaN."""
    text = dumps(value, separators=(",", ":"))
    for sign in "<>&":  # several times as fast as translate, and pages hold megabytes
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def interval_text(figure: Mapping[str, Any], fmt: Callable[[float], str]) -> str:
    """The ends of a figure's interval, or why there is none; and how many draws of the bootstrap had no value.

    Args:
        figure: with "low" and "high", and perhaps "reason" and "undefined", as results.json holds them.
        fmt: writes an end.
    """
    low, high = figure.get("low"), figure.get("high")
    if low is None or high is None:
        return f"no interval: {figure['reason']}" if figure.get("reason") else ""
    undefined = figure.get("undefined")
    return f"{fmt(low)} to {fmt(high)}" + (f"; {undefined:.1%} of the draws without a value" if undefined else "")


def figure_cell(figure: Mapping[str, Any], fmt: Callable[[float], str]) -> str:
    """A table cell with a figure's value and its interval; "-" and the reason where it has no value."""
    if figure.get("value") is None:
        return with_interval("-", figure["reason"]) if figure.get("reason") else "-"
    interval = interval_text(figure, fmt)
    return with_interval(fmt(figure["value"]), interval) if interval else escape(fmt(figure["value"]))


def with_interval(value: str, interval: str) -> str:
    """A table cell with an interval under its value."""
    return f"{escape(value)}<small>{escape(interval)}</small>"


def page(title: str, body: str) -> str:
    """A whole page that needs nothing from anywhere."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n'
    )
