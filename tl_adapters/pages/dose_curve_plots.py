"""Behavior left, and injected errors corrected, against harm elsewhere: the dose curves of a circuit as two plots.

The curves are those of the part "dose_curves" of the block "hesitation" (`circuits.dose_curves`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tl_adapters.pages.circuit_sections import CONDITION_NAMES, Section, SectionTable, short, shown
from tl_adapters.pages.plots import Plot, measured_curve, plot
from tl_adapters.utils.html import Cell, percent, visible
from tl_adapters.utils.results import Block

CURVE_NAMES = {
    "circuit": "the circuit",
    "random": "matched random features",
    "others": "most active other features",
    "logit_bias": "a bias against the words",
    **{name: CONDITION_NAMES[name] for name in ("neurons", "steering", "low_rank")},
}
"""Curve -> its name."""
_HARM = "KL from the replacement elsewhere, nats per token"


def dose_curve_plots(block: Block) -> list[Plot]:
    """The two plots of a block "hesitation"; the second is left out where no errors were injected, or both."""
    curves: Mapping[str, Any] = (block.get("dose_curves") or {}).get("curves") or {}
    panels = (
        ("behavior_left", "share of P(word) at onsets that is left",
         "Behavior left against harm elsewhere. The nearer a curve is to the lower left corner, the less it harms for "
         "what it removes."),
        ("corrected", "share of injected errors corrected",
         "Injected errors corrected against the same harm. A curve that falls removes more than the word."),
    )  # fmt: skip
    plots = []
    for key, ylabel, caption in panels:
        lines = [
            measured_curve(
                CURVE_NAMES.get(name, name),
                [point.get("kl_elsewhere") or {} for point in points],
                [point[key] for point in points],
                [point.get("factor") == 1 for point in points],
            )
            for name, points in curves.items()
            if points and all(point.get(key) for point in points)
        ]
        if lines:
            plots.append(
                plot(
                    lines, xlabel=_HARM, ylabel=ylabel, caption=caption, log_x=True, from_zero=True, without_color=True
                )
            )
    return plots


def dose_curves_section(block: Block) -> Section | None:
    """The dose curves, with a table of the points at full strength."""
    part = block.get("dose_curves") or {}
    plots, unchanged = dose_curve_plots(block), part.get("unchanged") or {}
    if not plots:
        return None
    rows: list[list[str | Cell]] = [
        ["nothing", "", shown(1.0, as_share=True), shown(0.0), shown(unchanged.get("corrected"), as_share=True)]
    ]
    for name, points in part["curves"].items():
        for point in points:
            if point.get("factor") == 1:
                size = "all of it" if name == "circuit" else f"{short(point['size'])} {visible(point['unit'])}"
                cells = [shown(point.get("behavior_left"), as_share=True), shown(point.get("kl_elsewhere"))]
                corrected = shown(point.get("corrected"), as_share=True)
                rows.append([visible(CURVE_NAMES.get(name, name)), size, *cells, corrected])
    header = ["removed", "full strength", "behavior left", "harm elsewhere", "injected errors corrected"]
    text = (
        "Every intervention at several strengths; elsewhere is away from onsets. Large points are at full strength: "
        "the whole circuit, and every other intervention at the size that was set on the select split to the circuit's "
        "effect (for other features, to its harm). All curves begin at 100 % of the behavior without harm, which the "
        "logarithmic axis cannot show. "
        "Bars are 95 % intervals over documents and problems. Unchanged, P(word) at the onsets is "
        f"{_value(unchanged.get('p_onset'))}."
    )
    return Section("Behavior left against harm elsewhere", text, plots=plots, tables=[SectionTable(header, rows)])


def _value(measurement: Any) -> str:
    return "not known" if not measurement or measurement.get("value") is None else percent(measurement["value"])
