"""What a sweep found: its points, which of them no other beats, and both as a table and a page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_adapters.features.feature import ALIVE_FIRINGS
from tl_adapters.utils.files import write_text
from tl_adapters.utils.html import escape, interval_text, page, table, with_interval
from tl_adapters.utils.measurement import Measurement
from tl_adapters.utils.plots import Line, plot

PAGE = "sweep.html"
FIGURES = ("l0", "kl", "kl_hybrid", "kl_of_hybrid", "nmse", "recovered")
Block = dict[str, Any]


@dataclass(frozen=True)
class SweepPoint:
    """One combination of the swept options, and what its adapters measure on held-out text."""

    name: str
    """Its run folder, within the sweep's."""
    options: dict[str, Any]
    """The swept options and their values here."""
    l0: Measurement
    """Active features per response token, mean over layers."""
    kl: Measurement
    """KL(target || replacement) per response token."""
    kl_hybrid: Measurement
    """KL(target || hybrid) on the same tokens: what having no adapters costs."""
    kl_of_hybrid: Measurement
    """The first over the second, paired by document."""
    nmse: Measurement
    """Squared error of the residual stream after the last layer, over the target's squares."""
    recovered: Measurement | None
    """Share of the accuracy gained over the hybrid that the adapters recover; None where no problem was answered."""
    features: int
    """Features of all layers."""
    alive: int
    """Of these, how many are alive on ``tokens`` tokens (`faithfulness.ALIVE_FIRINGS`)."""
    tokens: int
    """Tokens of the held-out text, prompts included."""


def read_point(block: Block) -> SweepPoint:
    """The inverse of `results.plain`."""
    return SweepPoint(**{**block, **{name: _read_figure(block[name]) for name in FIGURES}})


def _read_figure(block: Block | None) -> Measurement | None:
    if block is None:
        return None
    return Measurement(**{**block, "seeds": tuple(block["seeds"])})


def pareto_front(costs: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the points that no other beats, that is, costs no more in both and less in one.

    A point with a cost that is not a number is not on the front.
    """

    def beaten(point: tuple[float, float]) -> bool:
        return any(other[0] <= point[0] and other[1] <= point[1] and other != point for other in costs)

    return [i for i, cost in enumerate(costs) if not any(map(math.isnan, cost)) and not beaten(cost)]


def on_the_front(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """The points that no other beats in L0 and KL."""
    return [points[i] for i in pareto_front([(nan(p.l0.value), nan(p.kl.value)) for p in points])]


# -- the table --------------------------------------------------------------------------------------------------------


def markdown(points: Sequence[SweepPoint]) -> str:
    """The points as a markdown table, each figure with its interval."""
    header, rows = _cells(points)
    texts = [[value + (f" ({interval})" if interval else "") for value, interval in row] for row in rows]
    lines = [header, ["---"] * len(header), *texts]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _cells(points: Sequence[SweepPoint]) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """Header, and rows of values with their intervals."""
    answered = any(p.recovered is not None for p in points)
    options = list(dict.fromkeys(option for p in points for option in p.options))
    header = [*options, "L0", "KL", "KL / hybrid's", "NMSE", "alive", *(["recovered"] if answered else []), "front"]
    best, rows = on_the_front(points), []
    for p in points:
        row = [(_text(p.options.get(option)), "") for option in options]
        row += [_with_ends(p.l0, _short), _with_ends(p.kl, _short), _with_ends(p.kl_of_hybrid, _percent)]
        row += [_with_ends(p.nmse, _short), (f"{p.alive:,} of {p.features:,}", "")]
        row += [_with_ends(p.recovered, _percent)] if answered else []
        rows.append([*row, ("yes" if p in best else "", "")])
    return header, rows


def _with_ends(figure: Measurement | None, fmt: Callable[[float], str]) -> tuple[str, str]:
    if figure is None or figure.value is None:
        return "-", "" if figure is None else figure.reason
    return fmt(figure.value), interval_text(vars(figure), fmt)


def nan(value: float | None) -> float:
    """A number that can be drawn or left out."""
    return math.nan if value is None else value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _short(value: float) -> str:
    return f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


# -- the page ---------------------------------------------------------------------------------------------------------


def write_page(folder: Path, record: Block, points: Sequence[SweepPoint]) -> Path:
    """Write sweep.html from what sweep.json records and its points; returns its path."""
    about = (f'<p class="soft">{escape(text)}</p>' for text in _about(record, points))
    body = ["<h1>Sparsity against faithfulness</h1>", *about]
    if points:
        plots = [
            _tradeoff(points, lambda p: p.kl_of_hybrid, ylabel="KL over the hybrid's", log=True, caption=(
                "KL(target || replacement) as a share of KL(target || hybrid), against active features per token."
            ))
        ]  # fmt: skip
        if any(p.recovered is not None for p in points):
            caption = "Share of the accuracy gained over the hybrid that the adapters recover."
            plots.append(_tradeoff(points, lambda p: p.recovered, ylabel="recovered", sign=-1, caption=caption))
        header, rows = _cells(points)
        cells = [[with_interval(*cell) if cell[1] else escape(cell[0]) for cell in row] for row in rows]
        body += [f'<div class="plots">{"".join(plots)}</div>', table([escape(cell) for cell in header], cells)]
    write_text(folder / PAGE, page("Sparsity against faithfulness", "\n".join(body)))
    return folder / PAGE


def _about(record: Block, points: Sequence[SweepPoint]) -> list[str]:
    config, behaviour = record["config"], record.get("behaviour") or {}
    pair = f"{config['base']} (base) and {config['target']} (target)" if config["target"] else "the built-in pair"
    texts = [f"Transcoder adapters between {pair}, over {' and '.join(record['grid'])}; {len(points)} points are done."]
    if points:
        first = points[0]
        texts.append(
            f"Measured on {first.l0.n:,} held-out documents ({first.l0.split}; {first.tokens:,} tokens). Intervals are "
            "95 % intervals over documents or problems. KL is in nats per response token; the hybrid's is "
            f"{_short(nan(first.kl_hybrid.value))}. NMSE is that of the residual stream after the last layer. A "
            f"feature is alive if it fired at least {ALIVE_FIRINGS} times in these tokens. On the front are the "
            "points that no other beats in L0 and KL."
        )
    if behaviour:
        said = " and ".join(f"the {name} {_percent(rate['accuracy'])}" for name, rate in behaviour.items())
        texts.append(f"Recovered is the share of the accuracy gained over the hybrid; right answers: {said}.")
    return texts


def _tradeoff(
    points: Sequence[SweepPoint],
    of: Callable[[SweepPoint], Measurement | None],
    *,
    ylabel: str,
    caption: str,
    log: bool = False,
    sign: int = 1,
) -> str:
    """Figure ``of`` each point against its L0; ``sign`` -1 where more of it is better.

    The first swept option is written beside the points; the others say which series a point belongs to.
    """
    shown = [(p, figure) for p in points if (figure := of(p)) is not None and _has_a_place(p.l0.value, figure, log)]
    if not shown:
        return f"<p>{escape(caption)} None of the {len(points)} points has a place on these axes.</p>"
    series: dict[str, list[tuple[SweepPoint, Measurement]]] = {}
    for p, figure in shown:
        name = ", ".join(f"{key} {_text(value)}" for key, value in list(p.options.items())[1:])
        series.setdefault(name or "points", []).append((p, figure))
    lines = [
        Line(
            name,
            [nan(p.l0.value) for p, _ in members],
            [nan(figure.value) for _, figure in members],
            ([nan(figure.low) for _, figure in members], [nan(figure.high) for _, figure in members]),
            labels=[_text(next(iter(p.options.values()))) for p, _ in members],
        )
        for name, members in series.items()
    ]
    costs = [(nan(p.l0.value), sign * nan(figure.value)) for p, figure in shown]
    front = sorted(costs[i] for i in pareto_front(costs))
    lines.append(Line("not beaten by any", [x for x, _ in front], [sign * y for _, y in front], dashed=True))
    beside = f" Beside the points: {next(iter(points[0].options))}."
    left_out = len(points) - len(shown)
    missing = f" Without {left_out} of {len(points)} points, which have no place on these axes." if left_out else ""
    return plot(
        lines, xlabel="L0 (mean over layers)", ylabel=ylabel, caption=caption + beside + missing, log=log, log_x=True
    )


def _has_a_place(x: float | None, figure: Measurement, log: bool) -> bool:
    """A logarithmic axis has none for 0, such as the L0 of adapters that are all dead."""
    return x is not None and x > 0 and figure.value is not None and (figure.value > 0 or not log)
