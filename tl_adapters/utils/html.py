"""Small pieces of pages: escaped text, tables, line plots as SVG, and the page around them. They know no other room.

Everything is inlined, so a page opens offline; every piece of text that comes from a model is escaped here.
"""

from __future__ import annotations

import functools
import html
import importlib.util
import io
import math
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter, MaxNLocator

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


@dataclass(frozen=True)
class Line:
    """One line of a plot."""

    label: str
    """Its name in the legend."""
    x: Sequence[float]
    """Horizontal positions."""
    y: Sequence[float]
    """Values."""
    band: tuple[Sequence[float], Sequence[float]] | None = None
    """Lower and upper ends of an interval around the values."""
    dashed: bool = False
    """Drawn dashed: a reference, not a measurement along x."""
    labels: Sequence[str] | None = None
    """A text beside each place, shown as it is; the places are then points that no line joins, a band their bars."""


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


@dataclass(frozen=True)
class View:
    """A piece of HTML that a notebook shows."""

    html: str = field(repr=False)
    """Self-contained: nothing is loaded from anywhere."""

    def _repr_html_(self) -> str:
        return self.html


def circuitsvis_view(parts: Sequence[str | tuple[str, Mapping[str, object]]]) -> View:
    """HTML and circuitsvis's components (name, properties) one after the other, its script in it once.

    circuitsvis itself writes 1.3 MB of script for each component, and asks the network first. Properties are those of
    the component; tokens are to be escaped (`circuitsvis_tokens`). Raises ValueError for a number that is not finite.
    """
    pieces, calls = [], []
    for part in parts:
        if isinstance(part, str):
            pieces.append(part)
            continue
        name, (component, properties) = f"circuits-vis-{uuid.uuid4().hex[:12]}", part
        pieces.append(f'<div id="{name}" style="margin: 12px 0"></div>')
        # Tokens hold no "<" any more; what else could would end the script.
        held = dumps(properties).replace("<", "\\u003c")
        calls.append(f'CircuitsVis.render("{name}", CircuitsVis.{component}, {held});')
    script = f'<script type="module">{_circuitsvis()}\n{"".join(calls)}</script>' if calls else ""
    return View("".join(pieces) + script)


def circuitsvis_tokens(tokens: Sequence[str]) -> list[str]:
    """Tokens as circuitsvis is to have them: it inserts them as HTML, and shows no line breaks."""
    return [html.escape(token, quote=False).replace("\n", "↵\n") for token in tokens]


@functools.cache
def _circuitsvis() -> str:
    """circuitsvis's script, read without importing it, which takes seconds."""
    package = importlib.util.find_spec("circuitsvis")
    assert package is not None
    assert package.origin is not None
    script = Path(package.origin).parent / "dist" / "cdn" / "iife.js"
    return script.read_text(encoding="utf-8").replace("</script>", "<\\/script>")


def coloured_tokens(tokens: Sequence[str], values: Sequence[float]) -> View:
    """A text with each token coloured by its value, by circuitsvis; hover shows the value.

    Raises ValueError for values that are not finite.
    """
    values = [float(value) for value in values]
    if len(tokens) != len(values) or not all(map(math.isfinite, values)):
        raise ValueError(f"Got {len(tokens)} tokens and {len(values)} values; give one finite value for each token.")
    return circuitsvis_view([("ColoredTokens", {"tokens": circuitsvis_tokens(tokens), "values": values})])


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


def plot(
    lines: Sequence[Line],
    *,
    xlabel: str,
    ylabel: str,
    caption: str,
    log: bool = False,
    whole: bool = False,
    log_x: bool = False,
) -> str:
    """Lines and points as an SVG figure; ``log`` scales y, ``log_x`` x, ``whole`` keeps x ticks at whole numbers."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tl_adapters", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(4.6, 3.4), layout="constrained")
        for line in lines:
            if line.labels is not None:
                _points(axes, line, line.labels)
                continue
            (drawn,) = axes.plot(
                line.x, line.y, "--" if line.dashed else "-", marker="." if whole and not line.dashed else "",
                linewidth=1.4, label=line.label,
            )  # fmt: skip
            if line.band is not None:
                axes.fill_between(line.x, *line.band, alpha=0.2, color=drawn.get_color(), linewidth=0)
        axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
        if log_x:
            axes.set_xscale("log")
        for axis in [*([axes.xaxis] if log_x else []), *([axes.yaxis] if log else [])]:
            axis.set_major_formatter(_PlainLog())
            axis.set_minor_formatter(_PlainLog(minor_thresholds=(2, 0.4)))  # matplotlib's own: labels if they are few
        if whole:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        legend = figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a $ is a $
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
    svg = out.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}<figcaption>{escape(caption)}</figcaption></figure>"


class _PlainLog(LogFormatter):
    """0.01 where matplotlib writes a power of ten: easier to read, and much faster to draw."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _points(axes: Axes, line: Line, labels: Sequence[str]) -> None:
    bars = None
    if line.band is not None:
        lows, highs = line.band
        down = [max(0.0, y - low) for y, low in zip(line.y, lows, strict=True)]
        bars = (down, [max(0.0, high - y) for y, high in zip(line.y, highs, strict=True)])
    axes.errorbar(line.x, line.y, yerr=bars, fmt="o", markersize=4, elinewidth=1, label=line.label)
    for x, y, label in zip(line.x, line.y, labels, strict=True):
        axes.annotate(
            label, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7, parse_math=False  # a $ is a $
        )  # fmt: skip


def page(title: str, body: str) -> str:
    """A whole page that needs nothing from anywhere."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n'
    )
