"""Figures of a circuit's page as cells and bars: numbers with their intervals, arms by name, gaps where nothing is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tl_adapters.pages.circuit_diagram import shown_text
from tl_adapters.utils.html import escape, measurement_cell

Block = Mapping[str, Any]
_ARMS = {
    "none": "nothing changed",
    "output": "output features",
    "template": "template features",
    "circuit": "the whole circuit",
    "circuit_at_strength": "the whole circuit, stronger",
    "random": "random features",
    "random_scaled": "random features of equal write norm",
    "random_equal_harm": "random features of equal harm elsewhere",
    "random_at_strength": "random features, stronger",
    "bias_only": "decoder biases only",
    "b_dec_only": "decoder biases only",
    "others": "as many of the most active others",
    "others_scaled": "most active others of equal write norm",
    "others_equal_harm": "most active others of equal harm elsewhere",
    "others_at_strength": "as many of the most active others, stronger",
    "ban": "the words banned",
    "logit_bias": "a bias on their logits",
    "steering": "a steering vector",
    "neurons": "neurons of the base's MLPs",
    "other_tokens": "features of other tokens",
    "negated": "circuit, negated",
}


@dataclass(frozen=True)
class Bar:
    """One bar: a value and its interval, in the units of its figure."""

    name: str
    value: float
    low: float
    high: float


def bar(record: Block, arm: str, key: str) -> Bar:
    """Of one arm's record."""
    interval = (record.get("ci") or {}).get(key) or {}
    value = nan(record.get(key))
    return Bar(_ARMS.get(arm, arm), value, nan(interval.get("low")), nan(interval.get("high")))


def bars(drawn: Sequence[Bar], caption: str, as_share: bool) -> str:
    """Bars with their intervals and values; a value that is not there is a gap."""
    ends = [x for b in drawn for x in (b.value, b.high) if math.isfinite(x)]
    scale = 130 / (max(ends, default=0.0) or 1.0)
    rows = []
    for i, b in enumerate(drawn):
        y = 6 + 26 * i
        rows.append(f'<text x="118" y="{y + 14}" text-anchor="end">{shown_text(b.name[:19])}</text>')
        if not math.isfinite(b.value):
            rows.append(f'<text x="126" y="{y + 14}" fill="#57606a">not measured</text>')
            continue
        end = b.value
        colour = "#8c959f" if i == 0 else "#54a0ee"
        rows.append(f'<rect x="124" y="{y}" width="{max(0.5, b.value * scale):.1f}" height="19" fill="{colour}"/>')
        if math.isfinite(b.low) and math.isfinite(b.high):
            end = max(b.value, b.high)
            low, high = (f"{124 + end * scale:.1f}" for end in (b.low, b.high))
            path = f"M{low},{y + 9.5} H{high} M{low},{y + 6} v7 M{high},{y + 6} v7"
            rows.append(f'<path d="{path}" stroke="#1b1f24" fill="none"/>')
        said = percent(b.value) if as_share else short(b.value)
        rows.append(f'<text x="{130 + end * scale:.1f}" y="{y + 14}">{said}</text>')
    height = 26 * len(drawn) + 8
    return (
        f'<figure><svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 320 {height}" font-size="12" '
        f'font-family="system-ui, sans-serif">{"".join(rows)}</svg><figcaption>{escape(caption)}</figcaption></figure>'
    )


def cell(record: Block, key: str, as_share: bool | None) -> str:
    """What a record has under a key, with the interval that it has of it."""
    value = record.get(key)
    interval = (record.get("ci") or {}).get(key)
    return shown(value if isinstance(value, Mapping) else {"value": value, **(interval or {})}, as_share)


def shown(value: Any, as_share: bool | None = None) -> str:
    """A number, a figure with its interval, or a text; where nothing is said, a figure's unit tells shares."""
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        if as_share is None:
            as_share = str(value.get("unit", "")).startswith(("share", "accuracy", "probability"))
        form = percent if as_share else short
        return measurement_cell(value, form)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return percent(value) if as_share else short(value)
    return shown_text(str(value))


def arm_name(name: str, block: Block | None = None) -> str:
    """As a reader is told it, escaped; ``block`` tells how much stronger the stronger circuit is."""
    strength = ((block or {}).get("circuit") or {}).get("strength")
    for sign in (
        "",
        " - ",
        " + ",
        ", ",
    ):  # "none", "replacement - circuit", "hybrid + circuit", "replacement, steering"
        model, found, arm = name.partition(sign) if sign else ("", "", name)
        if arm in _ARMS:
            told = _ARMS[arm] if strength is None else _ARMS[arm].replace("stronger", f"at strength {strength:g}")
            return shown_text(model + found + told)
    return shown_text(name)


def nan(value: float | None) -> float:
    """A number that can be drawn or left out."""
    return math.nan if value is None else float(value)


def count(value: int | None) -> str:
    """A whole number."""
    return "-" if value is None else f"{value:,}"


def percent(value: float) -> str:
    """A share."""
    return f"{100 * value:.1f} %"


def short(value: float) -> str:
    """Three digits."""
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
