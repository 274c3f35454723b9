"""Line and point plots as inline SVG, drawn without pyplot, so that the user's matplotlib backend stays as it is."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from xml.dom import minidom

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from tl_adapters.utils.html import render, visible

_Dashes = str | tuple[int, tuple[int, ...]]
_STYLES: tuple[tuple[str, str, _Dashes], ...] = (
    ("#000000", "o", "-"),
    ("#0072b2", "s", (0, (5, 2))),
    ("#d55e00", "^", (0, (3, 1, 1, 1))),
    ("#009e73", "D", (0, (1, 1))),
    ("#cc79a7", "v", (0, (6, 2, 1, 2))),
    ("#b87a00", "P", (0, (2, 2))),
    ("#3a8fc8", "X", (0, (8, 2, 1, 2, 1, 2))),
)
"""Color, marker and dashes, of which _style takes those that tell lines apart in grey too. The colors are those of
Okabe and Ito, which remain distinct with every kind of color blindness, the last two darker, so that they stand out
from white. Black is the color of the page's text."""

_FONT_SIZE = 10.75
"""Size of every text, in points of a plot some 340 wide: 11 pixels or more on a screen of 400."""
_LEGEND_CHARACTERS = 44
"""Characters of the two longest names for which a legend of two columns is no wider than a plot."""
_MARKERS = 8
"""Least number of points that are marked on a line; all are where it has fewer."""


@dataclass(frozen=True)
class Plot:
    """A drawn plot."""

    svg: Markup
    """The plot as an SVG element."""
    caption: str
    """Text below the plot."""

    def _repr_html_(self) -> str:
        """The plot with its caption, as a notebook shows it."""
        return render("notebook/plot.html.j2", plot=self)


@dataclass(frozen=True)
class Line:
    """One line, or one series of labeled points, of a plot."""

    label: str
    """Name in the legend."""
    x: Sequence[float]
    """Horizontal positions."""
    y: Sequence[float]
    """Values; NaN leaves a gap."""
    band: tuple[Sequence[float], Sequence[float]] | None = None
    """Lower and upper ends of an interval around the values."""
    dashed: bool = False
    """Whether the line is dashed and has no markers, which marks a reference."""
    x_band: tuple[Sequence[float], Sequence[float]] | None = None
    """Lower and upper ends of an interval around the positions, in a plot that is drawn ``without_color``."""
    large: Sequence[bool] | None = None
    """Which points are drawn larger, in a plot that is drawn ``without_color``."""
    labels: Sequence[str] | None = None
    """Text beside each point, shown literally. The points are then not joined, and the band becomes error bars."""


def measured_line(label: str, x: Sequence[float], measurements: Sequence[Mapping[str, Any]]) -> Line:
    """Return a line through measurements ("value", "low", "high") with their intervals as its band; None is a gap."""
    values, lows, highs = (
        [nan_for_none(measurement.get(key)) for measurement in measurements] for key in ("value", "low", "high")
    )
    return Line(label, x, values, (lows, highs))


def measured_curve(
    label: str, x: Sequence[Mapping[str, Any]], y: Sequence[Mapping[str, Any]], large: Sequence[bool]
) -> Line:
    """Return a line through points of which both coordinates are measurements with intervals."""
    across, line = measured_line("", [], x), measured_line(label, [], y)
    return replace(line, x=across.y, x_band=across.band, large=large)


def nan_for_none(value: float | None) -> float:
    """Return ``value``, or NaN for None: plots leave a gap there. Raises ValueError for a text that is no number."""
    return math.nan if value is None else float(value)


def plot(
    lines: Sequence[Line],
    *,
    xlabel: str,
    ylabel: str,
    caption: str,
    log: bool = False,
    whole: bool = False,
    log_x: bool = False,
    from_zero: bool = False,
    without_color: bool = False,
) -> Plot:
    """Return lines and points as an SVG with a caption; each has a color, and a marker or dashes, of its own.

    Args:
        lines: the lines and series of points.
        xlabel, ylabel: labels of the axes.
        caption: text below the plot.
        log: whether the y axis is logarithmic.
        whole: whether ticks of the x axis are whole numbers only.
        log_x: whether the x axis is logarithmic.
        from_zero: whether the y axis begins at zero.
        without_color: whether lines differ in both markers and dashes, for lines that cross often; their intervals
            are error bars, and the plot is larger.
    """
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tl_adapters", "font.size": _FONT_SIZE}):
        size = (4.7, 5.2) if without_color else (4.6, 3.4)
        figure = Figure(figsize=size, layout="constrained", facecolor="none")  # not pyplot, whose backend is the user's
        axes = figure.subplots()
        axes.set_facecolor("none")
        for number, line in enumerate(map(_with_numbers, lines)):
            style = _style(number, line.dashed, without_color)
            if without_color:
                _draw_curve(axes, line, *style)
            elif line.labels is None:
                _draw_line(axes, line, *style, all_marked=whole)
            else:
                _draw_points(axes, line, line.labels, *style)
        axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
        if log_x:
            axes.set_xscale("log")
        for axis in [*([axes.xaxis] if log_x else []), *([axes.yaxis] if log else [])]:
            axis.set_major_formatter(_DecimalLogFormatter())
            # matplotlib's own thresholds: minor ticks are labeled if they are few
            axis.set_minor_formatter(_DecimalLogFormatter(minor_thresholds=(2, 0.4)))
        if from_zero:
            axes.set_ylim(bottom=0)
        if whole:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        longest = sorted((len(visible(line.label)) for line in lines), reverse=True)
        ncols = 2 if sum(longest[:2]) <= _LEGEND_CHARACTERS else 1
        legend = figure.legend(loc="outside lower center", ncols=ncols, frameon=False, fontsize=_FONT_SIZE)
        for text in legend.get_texts():
            text.set_parse_math(False)  # "$" is not math here
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    names = ", ".join(visible(line.label) for line in lines)
    return Plot(_for_pages(out.getvalue(), f"Plot of {visible(ylabel)} against {visible(xlabel)}: {names}"), caption)


def _for_pages(svg: str, name: str) -> Markup:
    """Return matplotlib's SVG with a name for screen readers, and with the color of the text around it for black.

    Its styles become attributes, since the policy of a page allows only its own style.
    """
    document = minidom.parseString(svg)
    root = document.documentElement
    assert root is not None
    for tag in ("metadata", "style"):
        for element in root.getElementsByTagName(tag):
            assert element.parentNode is not None
            element.parentNode.removeChild(element)
    for element in root.getElementsByTagName("*"):
        declarations = [declaration.split(":", 1) for declaration in element.getAttribute("style").split(";")]
        if element.hasAttribute("style"):
            element.removeAttribute("style")
            for key, value in (map(str.strip, parts) for parts in declarations if len(parts) == 2):
                if key == "font":  # "9px 'DejaVu Sans', sans-serif", for which there is no attribute
                    size, _, family = value.partition(" ")
                    element.setAttribute("font-size", size)
                    element.setAttribute("font-family", family)
                else:
                    element.setAttribute(key, "currentColor" if value == "#000000" else value)
    _rename_ids(root, hashlib.sha256(svg.encode()).hexdigest()[:8])
    root.setAttribute("role", "img")
    root.setAttribute("aria-label", name)
    root.setAttribute("fill", "currentColor")  # of texts, which have no color
    root.setAttribute("stroke-linejoin", "round")  # what the style element said of everything
    root.setAttribute("stroke-linecap", "butt")
    return Markup(root.toxml())  # matplotlib escapes what it writes


def _rename_ids(root: minidom.Element, ending: str) -> None:
    """Give the ids that a drawing refers to an ending, so that no two plots of a page share one; remove the others."""
    for element in root.getElementsByTagName("*"):
        if element.tagName == "g" and element.hasAttribute("id"):
            element.removeAttribute("id")
        for name, start, stop in (("id", "", ""), ("xlink:href", "#", ""), ("clip-path", "url(#", ")")):
            if element.hasAttribute(name):
                id = element.getAttribute(name).removeprefix(start).removesuffix(stop)
                element.setAttribute(name, f"{start}{id}_{ending}{stop}")


def _with_numbers(line: Line) -> Line:
    """Return the line with gaps for None. Raises ValueError for a text, which matplotlib would draw as a category."""
    x, y = list(map(nan_for_none, line.x)), list(map(nan_for_none, line.y))
    band, x_band = (
        ends and (list(map(nan_for_none, ends[0])), list(map(nan_for_none, ends[1])))
        for ends in (line.band, line.x_band)
    )
    return replace(line, x=x, y=y, band=band, x_band=x_band)


class _DecimalLogFormatter(LogFormatter):
    """Ticks as 0.01 where matplotlib writes a power of ten: easier to read, and much faster to draw."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        assert self.axis is not None
        low, high = self.axis.get_view_interval()
        # 1, 2 and 5 of each decade, of which there is room for all labels; within one decade all of matplotlib's.
        left_out = high > 10 * low and round(x / 10 ** math.floor(math.log10(x))) not in (1, 2, 5)
        return f"{x:g}" if not left_out and super().__call__(x, pos) else ""


def _style(number: int, reference: bool, without_color: bool) -> tuple[str, str, _Dashes]:
    """Return color, marker and dashes of a line by its place in the plot.

    A reference has dashes and no marker. The others are solid with a marker each, and dashed once the markers are used
    up; without color, they have dashes from the first. So 49 lines differ in grey, and 14 series of points.
    """
    count = len(_STYLES)
    turn, place = divmod(number, count)
    color, marker, _ = _STYLES[place]
    if reference and not without_color:
        return color, "", _STYLES[1 + number % (count - 1)][2]  # the first is solid
    return color, marker, _STYLES[(turn + place * without_color) % count][2]


def _draw_line(axes: Axes, line: Line, color: str, marker: str, dashes: _Dashes, all_marked: bool) -> None:
    axes.plot(
        line.x, line.y, color=color, marker=marker, markersize=4, linestyle=dashes, linewidth=1.4,
        markevery=1 if all_marked else max(1, len(line.x) // _MARKERS), label=visible(line.label),
    )  # fmt: skip
    if line.band is not None:
        axes.fill_between(line.x, *line.band, alpha=0.2, color=color, linewidth=0)


def _draw_curve(axes: Axes, line: Line, color: str, marker: str, dashes: _Dashes) -> None:
    axes.errorbar(
        line.x, line.y, xerr=_error_bars(line.x, line.x_band), yerr=_error_bars(line.y, line.band), color=color,
        marker=marker, markersize=4, linestyle=dashes, linewidth=1.3, elinewidth=0.7, label=visible(line.label),
    )  # fmt: skip
    chosen = [i for i, is_large in enumerate(line.large or ()) if is_large]
    axes.plot(
        [line.x[i] for i in chosen], [line.y[i] for i in chosen], marker, color=color, markersize=9,
        markeredgecolor="black", markeredgewidth=0.8, zorder=3,
    )  # fmt: skip


def _error_bars(
    values: Sequence[float], band: tuple[Sequence[float], Sequence[float]] | None
) -> tuple[list[float], list[float]] | None:
    """The lengths of error bars below and above values, from the ends of their intervals."""
    if band is None:
        return None
    lows, highs = band
    below = [max(0.0, value - low) for value, low in zip(values, lows, strict=True)]
    return below, [max(0.0, high - value) for value, high in zip(values, highs, strict=True)]


def _draw_points(axes: Axes, line: Line, labels: Sequence[str], color: str, marker: str, dashes: _Dashes) -> None:
    axes.errorbar(
        line.x, line.y, yerr=_error_bars(line.y, line.band), color=color, marker=marker, markersize=4, elinewidth=1,
        linestyle="", fillstyle="full" if dashes == "-" else "none",  # hollow where a line would be dashed
        label=visible(line.label),
    )  # fmt: skip
    for x, y, label in zip(line.x, line.y, labels, strict=True):
        axes.annotate(
            visible(label), (x, y), xytext=(5, 4), textcoords="offset points", fontsize=_FONT_SIZE,
            parse_math=False,  # "$" is not math
        )  # fmt: skip
