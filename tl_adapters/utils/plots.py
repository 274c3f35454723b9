"""Line plots as SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from tl_adapters.utils.html import escape


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
        figure = Figure(figsize=(4.6, 3.4), layout="constrained")  # not pyplot, whose backend is the user's
        axes = figure.subplots()
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
