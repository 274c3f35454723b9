"""The points of a sparsity sweep, their Pareto front, and both as a markdown table and as the page sweep.html."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_adapters.features.feature import ALIVE_FIRINGS
from tl_adapters.pages.navigation import REPORT_PAGE_FILE, SWEEP_PAGE_FILE, PageLink
from tl_adapters.pages.plots import Line, Plot, nan_for_none, plot
from tl_adapters.utils.files import write_text
from tl_adapters.utils.html import Cell, interval_text, percent, render, shown_from, three_digits
from tl_adapters.utils.measurement import Measurement
from tl_adapters.utils.notebook import RecordTable, ResultRecord, tables_view

_MEASURED_FIELDS = ("l0", "kl", "kl_hybrid", "kl_of_hybrid", "nmse", "recovered")


@dataclass(frozen=True)
class SweepPoint(ResultRecord):
    """One combination of the swept options, with the measurements of its adapters on held-out text."""

    name: str
    """Name of its run folder within the folder of the sweep."""
    options: dict[str, Any]
    """The swept options with their values at this point."""
    l0: Measurement
    """Active features per response token, mean over layers."""
    kl: Measurement
    """KL(target || replacement) per response token, in nats."""
    kl_hybrid: Measurement
    """KL(target || hybrid) on the same tokens, that is, without adapters."""
    kl_of_hybrid: Measurement
    """Ratio of ``kl`` to ``kl_hybrid``, paired by document."""
    nmse: Measurement
    """Squared error of the residual stream after the last layer, over the target's squares."""
    recovered: Measurement | None
    """Share of the target's accuracy gain over the hybrid that the adapters recover; None if no problems were
    answered."""
    features: int
    """Number of features in all layers."""
    alive: int
    """Number of features that are alive on ``tokens`` tokens (at least `ALIVE_FIRINGS` firings)."""
    tokens: int
    """Tokens of the held-out text, prompts included."""

    def row(self) -> dict[str, Any]:
        """The fields, with each swept option under its own name."""
        fields = super().row()
        return {"name": fields.pop("name"), **fields.pop("options"), **fields}


def read_sweep_point(record: Mapping[str, Any]) -> SweepPoint:
    """Return the point that `results.plain` turned into a mapping. Raises UnreadableFileError."""
    with shown_from("sweep.json"):
        return SweepPoint(**{**record, **{name: _read_measurement(record[name]) for name in _MEASURED_FIELDS}})


def _read_measurement(record: Mapping[str, Any] | None) -> Measurement | None:
    if record is None:
        return None
    return Measurement(**{**record, "seeds": tuple(record.get("seeds", Measurement.seeds))})


def pareto_front(costs: Sequence[tuple[float, float]]) -> list[int]:
    """Return the positions of the points on the Pareto front.

    A point is on the front if no other point costs at most as much in both and less in one. A point with a cost that is
    not a number is not on it.
    """

    def dominated(point: tuple[float, float]) -> bool:
        return any(other[0] <= point[0] and other[1] <= point[1] and other != point for other in costs)

    return [i for i, cost in enumerate(costs) if not any(map(math.isnan, cost)) and not dominated(cost)]


def points_on_front(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """Return the points on the Pareto front of L0 and KL."""
    return [points[i] for i in pareto_front([(nan_for_none(p.l0.value), nan_for_none(p.kl.value)) for p in points])]


# -- the table --------------------------------------------------------------------------------------------------------


def sweep_markdown(points: Sequence[SweepPoint]) -> str:
    """Return the points as a markdown table, each measurement with its interval."""
    header, rows = _table_texts(points)
    texts = [[value + (f" ({interval})" if interval else "") for value, interval in row] for row in rows]
    lines = [header, ["---"] * len(header), *texts]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _table_texts(points: Sequence[SweepPoint]) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """Return the header, and rows of (value, interval)."""
    answered = any(p.recovered is not None for p in points)
    options = list(dict.fromkeys(option for p in points for option in p.options))
    header = [*options, "L0", "KL", "KL / hybrid's", "NMSE", "alive", *(["recovered"] if answered else []), "front"]
    front, rows = points_on_front(points), []
    for p in points:
        row = [(_option_text(p.options.get(option)), "") for option in options]
        row += [_value_and_interval(p.l0, three_digits), _value_and_interval(p.kl, three_digits)]
        row += [_value_and_interval(p.kl_of_hybrid, percent), _value_and_interval(p.nmse, three_digits)]
        row += [(f"{p.alive:,} of {p.features:,}", "")]
        row += [_value_and_interval(p.recovered, percent)] if answered else []
        rows.append([*row, ("yes" if p in front else "", "")])
    return header, rows


def _value_and_interval(measurement: Measurement | None, fmt: Callable[[float], str]) -> tuple[str, str]:
    if measurement is None or measurement.value is None:
        return "-", "" if measurement is None else measurement.reason
    return fmt(measurement.value), interval_text(vars(measurement), fmt)


def _option_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class Sweep(RecordTable[SweepPoint]):
    """The points of a sweep; a notebook shows them as sweep.html does, as plots and a table."""

    def _repr_html_(self) -> str:
        header, rows = _table_texts(self)
        table = tables_view((header, [[Cell(value, interval) for value, interval in row] for row in rows]))
        return render("notebook/plots.html.j2", plots=_plots(self)) + table


# -- the page ---------------------------------------------------------------------------------------------------------


def write_sweep_page(folder: Path, record: Mapping[str, Any], points: Sequence[SweepPoint]) -> Path:
    """Write sweep.html into the folder of a sweep and return its path.

    Args:
        folder: folder of the sweep.
        record: the content of sweep.json, from which the configuration and the accuracies are shown.
        points: the points that are done.

    Raises:
        UnreadableFileError: sweep.json does not hold what the page shows.
        DiskFullError.
    """
    with shown_from(folder / "sweep.json"):
        header, rows = _table_texts(points)
        text = render(
            "sweep/sweep.html.j2",
            run_pages=[PageLink("Sweep", SWEEP_PAGE_FILE, current=True), *_reports(folder, points)],
            introduction=_introduction(record, points),
            plots=_plots(points),
            header=header,
            rows=[[Cell(value, interval) for value, interval in row] for row in rows],
        )
    write_text(folder / SWEEP_PAGE_FILE, text)
    return folder / SWEEP_PAGE_FILE


def _reports(folder: Path, points: Sequence[SweepPoint]) -> list[PageLink]:
    """Return links to the reports of the points that were evaluated as runs of their own."""
    addresses = {p.name: f"{p.name}/{REPORT_PAGE_FILE}" for p in points}
    return [PageLink(name, address) for name, address in addresses.items() if (folder / address).is_file()]


def _plots(points: Sequence[SweepPoint]) -> list[Plot | str]:
    """Return the plots of the points; a sentence stands for a plot on whose axes no point has a place."""
    if not points:
        return []
    caption = "KL(target || replacement) as a share of KL(target || hybrid), against active features per token."
    plots = [_tradeoff_plot(points, lambda p: p.kl_of_hybrid, ylabel="KL over the hybrid's", log=True, caption=caption)]
    if any(p.recovered is not None for p in points):
        caption = "Share of the accuracy gained over the hybrid that the adapters recover."
        plots.append(_tradeoff_plot(points, lambda p: p.recovered, ylabel="recovered", sign=-1, caption=caption))
    return plots


def _introduction(record: Mapping[str, Any], points: Sequence[SweepPoint]) -> list[str]:
    config, rates = record["config"], record.get("behaviour") or {}
    pair = f"{config['base']} (base) and {config['target']} (target)" if config["target"] else "the built-in pair"
    texts = [f"Transcoder adapters between {pair}, over {' and '.join(record['grid'])}; {len(points)} points are done."]
    if points:
        first = points[0]
        texts.append(
            f"Measured on {first.l0.n:,} held-out documents ({first.l0.split}; {first.tokens:,} tokens). Intervals are "
            "95 % intervals over documents or problems. KL is in nats per response token; the hybrid's is "
            f"{three_digits(nan_for_none(first.kl_hybrid.value))}. NMSE is that of the residual stream after the last "
            f"layer. A feature is alive if it fired at least {ALIVE_FIRINGS} times in these tokens. On the front are "
            "the points that no other beats in L0 and KL."
        )
    if rates:
        accuracies = " and ".join(f"the {name} {percent(rate['accuracy'])}" for name, rate in rates.items())
        texts.append(f"Recovered is the share of the accuracy gained over the hybrid; right answers: {accuracies}.")
    return texts


def _tradeoff_plot(
    points: Sequence[SweepPoint],
    measurement_of: Callable[[SweepPoint], Measurement | None],
    *,
    ylabel: str,
    caption: str,
    log: bool = False,
    sign: int = 1,
) -> Plot | str:
    """Return a plot of one measurement of each point against its L0; ``sign`` is -1 if a larger value is better.

    The first swept option is written beside the points; each combination of the others is a series of its own.
    """
    drawable = [
        (p, measurement)
        for p in points
        if (measurement := measurement_of(p)) is not None and _is_drawable(p.l0.value, measurement, log)
    ]
    if not drawable:
        return f"{caption} None of the {len(points)} points has a place on these axes."
    series: dict[str, list[tuple[SweepPoint, Measurement]]] = {}
    for p, measurement in drawable:
        name = ", ".join(f"{key} {_option_text(value)}" for key, value in list(p.options.items())[1:])
        series.setdefault(name or "points", []).append((p, measurement))
    lines = [
        Line(
            name,
            [nan_for_none(p.l0.value) for p, _ in members],
            [nan_for_none(m.value) for _, m in members],
            ([nan_for_none(m.low) for _, m in members], [nan_for_none(m.high) for _, m in members]),
            labels=[_option_text(next(iter(p.options.values()))) for p, _ in members],
        )
        for name, members in series.items()
    ]
    costs = [(nan_for_none(p.l0.value), sign * nan_for_none(m.value)) for p, m in drawable]
    front = sorted(costs[i] for i in pareto_front(costs))
    lines.append(Line("not beaten by any", [x for x, _ in front], [sign * y for _, y in front], dashed=True))
    option = f" Beside the points: {next(iter(points[0].options))}."
    left_out = len(points) - len(drawable)
    missing = f" Without {left_out} of {len(points)} points, which have no place on these axes." if left_out else ""
    return plot(
        lines, xlabel="L0 (mean over layers)", ylabel=ylabel, caption=caption + option + missing, log=log, log_x=True
    )


def _is_drawable(l0: float | None, measurement: Measurement, log: bool) -> bool:
    """Return whether a point has coordinates; a logarithmic axis has none for 0, such as the L0 of dead adapters."""
    return l0 is not None and l0 > 0 and measurement.value is not None and (measurement.value > 0 or not log)
