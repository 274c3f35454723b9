"""HTML building blocks: escaping, tables, cells with confidence intervals, templates and a page frame.

Style and script are inlined, so that a page opens offline. Text that comes from a model is escaped here.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
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
    """Return ``text`` as HTML that displays exactly this text."""
    return html.escape(text, quote=True)


def highlight_words(text: str, words: Sequence[str]) -> str:
    """Return ``text`` as HTML with every occurrence of ``words`` highlighted, in any case."""
    matches = re.finditer("|".join(rf"\b{re.escape(word)}\b" for word in words), text, flags=re.IGNORECASE)
    return highlight_spans(text, [match.span() for match in matches])


def highlight_spans(text: str, spans: Sequence[Sequence[int]]) -> str:
    """Return ``text`` as HTML with spans highlighted, each given as (start, stop) in characters; spans may overlap."""
    pieces, end = [], 0
    for start, stop in sorted(map(tuple, spans)):
        start = max(start, end)
        if start < stop:
            pieces.append(f"{escape(text[end:start])}<mark>{escape(text[start:stop])}</mark>")
            end = stop
    return "".join(pieces) + escape(text[end:])


def script_json(value: object) -> str:
    """Return ``value`` as ASCII JSON in which no character can end the script element that holds it.

    Raises ValueError for NaN and infinity.
    """
    text = dumps(value, separators=(",", ":"))
    for character in "<>&":  # several times as fast as str.translate; a page can hold megabytes
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def fill_template(template: str, parts: Mapping[str, str]) -> str:
    """Replace every ``@@name@@`` of a template by ``parts[name]``.

    The template is read once, so an ``@@name@@`` inside a part stays as it is.
    """
    return re.sub(r"@@([a-z0-9-]+)@@", lambda placeholder: parts[placeholder[1]], template)


def d3_license_and_script() -> tuple[str, str]:
    """Return the license and the minified script of d3 7.9.0, which is part of this package."""
    folder = files("tl_adapters.utils") / "d3"
    license_text, script = ((folder / name).read_text(encoding="utf-8") for name in ("d3.LICENSE", "d3.min.js"))
    return license_text, script


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table; the cells are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def interval_text(measurement: Mapping[str, Any], fmt: Callable[[float], str]) -> str:
    """Return the ends of a measurement's interval as text, or the reason why there is no interval.

    The share of bootstrap draws that had no value is added where there are any.

    Args:
        measurement: "low" and "high", and optionally "reason" and "undefined", as results.json holds them.
        fmt: formats one end.
    """
    low, high = measurement.get("low"), measurement.get("high")
    if low is None or high is None:
        return f"no interval: {measurement['reason']}" if measurement.get("reason") else ""
    undefined = measurement.get("undefined")
    return f"{fmt(low)} to {fmt(high)}" + (f"; {undefined:.1%} of the draws without a value" if undefined else "")


def measurement_cell(measurement: Mapping[str, Any], fmt: Callable[[float], str]) -> str:
    """Return a table cell with a measurement's value and interval; "-" and the reason where there is no value."""
    if measurement.get("value") is None:
        return with_interval("-", measurement["reason"]) if measurement.get("reason") else "-"
    interval = interval_text(measurement, fmt)
    return with_interval(fmt(measurement["value"]), interval) if interval else escape(fmt(measurement["value"]))


def with_interval(value: str, interval: str) -> str:
    """Return a table cell that shows an interval below its value."""
    return f"{escape(value)}<small>{escape(interval)}</small>"


def percent(value: float) -> str:
    """Return a share as a percentage with one decimal."""
    return f"{100 * value:.1f} %"


def three_digits(value: float) -> str:
    """Return a number with three significant digits."""
    return f"{value:.3g}"


def page(title: str, body: str) -> str:
    """Return a complete page around ``body``, which loads no other file."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n'
    )
