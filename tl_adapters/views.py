"""Small pieces of pages: escaped text, tables, line plots as SVG, and the page around them. They know no other room.

Everything is inlined, so a page opens offline; every piece of text that comes from a model is escaped here.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

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
.plots { display: flex; flex-wrap: wrap; gap: 16px; } .plots figure { margin: 0; flex: 1 1 320px; }
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


def escape(text: str) -> str:
    """Text as HTML that shows exactly it."""
    return html.escape(text, quote=True)


def marked(text: str, words: Sequence[str]) -> str:
    """``text`` as HTML with ``words`` highlighted, in any case."""
    parts = re.split("(" + "|".join(rf"\b{re.escape(word)}\b" for word in words) + ")", text, flags=re.IGNORECASE)
    return "".join(f"<mark>{escape(p)}</mark>" if i % 2 else escape(p) for i, p in enumerate(parts))


@dataclass(frozen=True)
class View:
    """A piece of HTML that a notebook shows."""

    html: str = field(repr=False)
    """Self-contained: nothing is loaded from anywhere."""

    def _repr_html_(self) -> str:
        return self.html


def coloured_tokens(tokens: Sequence[str], values: Sequence[float]) -> View:
    """A text with each token coloured by its value, by circuitsvis; hover shows the value.

    Takes circuitsvis's offline source (its default view asks the network first) and escapes the tokens (it would
    insert them as HTML, and ``<think>`` would vanish). Raises ValueError for values that are not finite.
    """
    from circuitsvis.tokens import colored_tokens  # seconds, and most pages need none

    values = [float(value) for value in values]
    if len(tokens) != len(values) or not all(map(math.isfinite, values)):
        raise ValueError(f"Got {len(tokens)} tokens and {len(values)} values; give one finite value for each token.")
    return View(colored_tokens([html.escape(token, quote=False) for token in tokens], values).local_src)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def with_interval(value: str, interval: str) -> str:
    """A table cell with an interval under its value."""
    return f"{escape(value)}<small>{escape(interval)}</small>"


def plot(
    lines: Sequence[Line], *, xlabel: str, ylabel: str, caption: str, log: bool = False, whole: bool = False
) -> str:
    """A line plot as an SVG figure; ``log`` scales y, ``whole`` keeps x ticks at whole numbers."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tl_adapters", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(4.6, 3.4), layout="constrained")
        for line in lines:
            (drawn,) = axes.plot(
                line.x, line.y, "--" if line.dashed else "-", marker="." if whole and not line.dashed else "",
                linewidth=1.4, label=line.label,
            )  # fmt: skip
            if line.band is not None:
                axes.fill_between(line.x, *line.band, alpha=0.2, color=drawn.get_color(), linewidth=0)
        axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
        if whole:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
    svg = out.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}<figcaption>{escape(caption)}</figcaption></figure>"


def page(title: str, body: str) -> str:
    """A whole page that needs nothing from anywhere."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n'
    )
