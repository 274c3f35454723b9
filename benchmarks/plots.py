"""Draw the plots of docs/benchmarks.md from results.json, as SVG beside the page: ``python benchmarks/plots.py``.

A plot shows values that a table of the documentation holds as well (benchmarks/tables.py). The test
tests/benchmarks/test_recorded.py holds that plots and results agree.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from recorded import FOLDER, recorded, standalone
from tables import DECADES, FAMILY_NAMES, QUANTITY_NAMES, RECIPE_NAMES, growth_plot

from tl_adapters.pages.plots import Line, Plot, plot
from tl_adapters.utils.files import write_text

PLOTS_FOLDER = FOLDER.parent / "docs"


def recall_by_rate(block: dict[str, Any]) -> Plot:
    """Recall of planted features by firing rate, a line for each family, with the range over plants and seeds."""
    lines = []
    for name, family in block["families"].items():
        figures = {decade: family["recall"][decade] for decade in DECADES if decade in family["recall"]}
        values = [figure["value"] for figure in figures.values()]
        lows, highs = zip(*(figure["range"] for figure in figures.values()), strict=True)
        lines.append(Line(FAMILY_NAMES.get(name, name), [float(d) for d in figures], values, (lows, highs)))
    return plot(
        lines, xlabel="firing rate of the planted feature", ylabel="share that was found",
        caption="Recall by firing rate and family.", log_x=True, from_zero=True, without_color=True,
    )  # fmt: skip


def agreement_of_seeds(block: dict[str, Any]) -> Plot:
    """Share of alive features that a second seed finds too, over the KL that is left, a point for each recipe."""
    lines = []
    for name, by_width in block["recipes"].items():
        figures = by_width.values()
        kl, agreement = [100 * f["kl_share"]["value"] for f in figures], [f["seed_agreement"] for f in figures]
        values, ranges = [a["value"] for a in agreement], [a["range"] for a in agreement]
        band = ([low for low, _ in ranges], [high for _, high in ranges])
        labels = [f"{width} features" for width in by_width]
        lines.append(Line(RECIPE_NAMES.get(name, name), kl, values, band, labels=labels))
    return plot(
        lines, xlabel="KL of the replacement, % of the hybrid's", ylabel="share found by the other seed",
        caption="Agreement of two seeds over the KL that is left.", from_zero=True,
    )  # fmt: skip


def memory_of_a_step(block: dict[str, Any]) -> Plot:
    """GB of one step of the objective over the length of the document, measured and predicted."""
    steps = [(name.split("-"), step) for name, step in block["steps"].items() if name.startswith("train-")]
    lines = []
    for label, recompute in (("blocks kept", False), ("blocks computed again", True)):
        chosen = [s for name, s in steps if name[2] == "bfloat16" and ("recompute" in name) == recompute]
        chosen.sort(key=lambda step: step["tokens"])
        for kind, key in (("measured", "gb"), ("predicted", "predicted_gb")):
            lines.append(Line(f"{label}, {kind}", [s["tokens"] for s in chosen], [s[key] for s in chosen]))
    return plot(
        lines, xlabel="tokens of the document", ylabel="GB", caption="Memory of a step of the objective at 7B.",
        from_zero=True, without_color=True,
    )  # fmt: skip


def growth_of_a_step(block: dict[str, Any], quantity: str) -> Plot:
    """Time of a step over that at the standard case, by one quantity."""
    series, lines = block["series"][quantity], []
    for side, label in (("ours", "our step"), ("reference", "the formulas")):
        figures = [sides[side] for sides in series.values()]
        lows, highs = zip(*(figure["range"] for figure in figures), strict=True)
        values = [figure["value"] for figure in figures]
        lines.append(Line(label, [int(x) for x in series], values, (lows, highs), dashed=side == "reference"))
    name = QUANTITY_NAMES[quantity]
    return plot(
        lines, xlabel=name, ylabel="time, standard case = 1", caption=f"Time of a step by {name}.", log=True, log_x=True
    )  # fmt: skip


PLOTS: dict[str, tuple[str, Callable[[dict[str, Any]], Plot | None]]] = {
    "recall_by_rate": ("planted", recall_by_rate),
    "agreement_of_seeds": ("organism", agreement_of_seeds),
    "memory_of_a_step": ("gpu", memory_of_a_step),
    **{growth_plot(name): ("growth", partial(growth_of_a_step, quantity=name)) for name in QUANTITY_NAMES},
}
"""File in docs/, without its ending -> the block of results.json that it shows, and how."""


def drawn(name: str, folder: Path = FOLDER) -> str | None:
    """The text of one plot's file; None where what it shows is not recorded yet."""
    block, draw = PLOTS[name]
    found = recorded(block, folder)
    made = None if found is None else draw(found)
    return None if made is None else standalone(made.svg) + "\n"


def main() -> None:
    for name in PLOTS:
        if (text := drawn(name)) is not None:
            write_text(PLOTS_FOLDER / f"{name}.svg", text)
            print(PLOTS_FOLDER / f"{name}.svg")


if __name__ == "__main__":
    main()
