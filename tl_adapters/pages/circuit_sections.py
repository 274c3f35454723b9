"""The measurements of a circuit as sections of its page, with the cells and bars that they consist of.

A section is None if the block does not hold its measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tl_adapters.pages.circuit_diagram import visible_text
from tl_adapters.pages.plots import Line, Plot, nan_for_none, plot
from tl_adapters.utils.html import Cell, measurement_cell, percent, render
from tl_adapters.utils.results import Block

CONDITION_NAMES = {
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
    "low_rank": "low rank of what adapters write",
    "other_tokens": "features of other tokens",
    "negated": "circuit, negated",
    "negated_random": "random features, negated",
}
"""Condition of a study -> its name."""


@dataclass(frozen=True)
class SectionTable:
    """One table of a section."""

    header: Sequence[str]
    """Titles of its columns."""
    rows: Sequence[Sequence[str | Cell]]
    """Its cells."""
    title: str = ""
    """A heading above it; none where empty."""
    text: str = ""
    """A paragraph above it; none where empty."""


@dataclass(frozen=True)
class Section:
    """A section of the page, from top to bottom."""

    title: str
    """Its heading."""
    text: str = ""
    """A paragraph below the heading; none where empty."""
    bars: Sequence[Plot] = ()
    """Bar charts."""
    plots: Sequence[Plot] = ()
    """Plots."""
    tables: Sequence[SectionTable] = ()
    """Tables."""


# -- cells and bars -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """One bar of a chart: a value with its interval, NaN where unknown."""

    name: str
    value: float
    low: float
    high: float


def bar(record: Block, condition: str, key: str) -> Bar:
    """The bar of one value of a condition's record."""
    interval = (record.get("ci") or {}).get(key) or {}
    return Bar(
        CONDITION_NAMES.get(condition, condition),
        nan_for_none(record.get(key)),
        nan_for_none(interval.get("low")),
        nan_for_none(interval.get("high")),
    )


def bar_chart(chart: Sequence[Bar], caption: str, as_share: bool) -> Plot:
    """Horizontal bars with their values and intervals; an unknown value is a gap."""
    ends = [x for b in chart for x in (b.value, b.high) if math.isfinite(x)]
    scale = 130 / (max(ends, default=0.0) or 1.0)
    bars = []
    for i, b in enumerate(chart):
        y, known = 6 + 26 * i, math.isfinite(b.value)
        record: dict[str, Any] = {"name": visible_text(b.name[:19]), "y": y, "width": None, "interval": ""}
        if known:
            end = b.value
            if math.isfinite(b.low) and math.isfinite(b.high):
                end = max(b.value, b.high)
                low, high = (f"{124 + x * scale:.1f}" for x in (b.low, b.high))
                record["interval"] = f"M{low},{y + 9.5} H{high} M{low},{y + 6} v7 M{high},{y + 6} v7"
            record["width"] = f"{max(0.5, b.value * scale):.1f}"
            record |= {"text_x": f"{130 + end * scale:.1f}", "value": percent(b.value) if as_share else short(b.value)}
        bars.append(record)
    return Plot(render("circuit/bars.svg.j2", bars=bars, height=26 * len(chart) + 8, caption=caption), caption)


def cell(record: Block, key: str, as_share: bool | None) -> str | Cell:
    """The value of a record with its interval, as a table cell."""
    value = record.get(key)
    interval = (record.get("ci") or {}).get(key)
    return shown(value if isinstance(value, Mapping) else {"value": value, **(interval or {})}, as_share)


def shown(value: Any, as_share: bool | None = None) -> str | Cell:
    """A number, a measurement with its interval, or a text, as a table cell.

    ``as_share`` prints percent; None decides by the unit of a measurement.
    """
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        if as_share is None:
            as_share = str(value.get("unit", "")).startswith(("share", "accuracy", "probability"))
        form = percent if as_share else short
        return measurement_cell(value, form)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return percent(value) if as_share else short(value)
    return visible_text(str(value))


def _joined(*parts: str | Cell, separator: str) -> Cell:
    """One cell that shows several, with their notes below."""
    cells = [part if isinstance(part, Cell) else Cell(part) for part in parts]
    return Cell(separator.join(c.text for c in cells), separator.join(filter(None, (c.note for c in cells))))


def _change(before: Any, after: Any) -> Cell:
    """A cell with a probability before and after."""
    return _joined(shown(before, as_share=True), shown(after, as_share=True), separator=" → ")


def condition_name(name: str, block: Block | None = None) -> str:
    """The name of a condition on the page; ``block`` holds the strength that "stronger" stands for."""
    strength = ((block or {}).get("circuit") or {}).get("strength")
    # "none", "replacement - circuit", "hybrid + circuit", "replacement, steering"
    for sign in ("", " - ", " + ", ", "):
        model, separator, condition = name.partition(sign) if sign else ("", "", name)
        if condition in CONDITION_NAMES:
            text = (
                CONDITION_NAMES[condition]
                if strength is None
                else CONDITION_NAMES[condition].replace("stronger", f"at strength {strength:g}")
            )
            return visible_text(model + separator + text)
    return visible_text(name)


def count(value: int | None) -> str:
    """A count with thousands separators; "-" for None."""
    return "-" if value is None else f"{value:,}"


def short(value: float) -> str:
    """A number with three significant digits; "-" for NaN."""
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# -- the sections ---------------------------------------------------------------------------------------------------

_CONDITIONS_WITH_BARS = ("none", "output", "template", "circuit", "random")
_COLUMNS: tuple[tuple[str, str, bool | None], ...] = (
    ("hesitation_per_1k", "hesitations per 1,000", False),
    ("hesitation_cut", "share of them removed", True),
    ("length", "length, tokens", False),
    ("length_change", "change in length", None),
    ("accuracy", "accuracy", True),
    ("accuracy_change", "change in accuracy", True),
    ("accuracy_without_slip", "accuracy, no slip", True),
    ("accuracy_with_slip", "accuracy, a slip", True),
    ("truncated", "cut at the limit", True),
    ("kl_elsewhere", "KL elsewhere, nats per token", False),
)


def conditions_section(block: Block, name: str, title: str, action: str) -> Section | None:
    """Hesitation rate, length and accuracy of every condition of a part, as bars and as a table.

    Args:
        block: the block "hesitation".
        name: the part: necessity, sufficiency or transfer.
        title: heading of the section.
        action: what is done to the features, such as "Features removed from".
    """
    conditions: Mapping[str, Block] = _with_harm(block, name)
    if not conditions:
        return None
    reference = conditions.get("none") or next(iter(conditions.values()))
    on = {"necessity": "the replacement", "sufficiency": "the hybrid", "transfer": "the target"}[name]
    draws = (conditions.get("random") or {}).get("draws")
    random = f" Random features: mean of {draws} draws." if draws else ""
    n, split = count(reference.get("n")), visible_text(str(reference.get("split", "")))
    with_bars = [c for c in _CONDITIONS_WITH_BARS if c in conditions] if name != "transfer" else list(conditions)
    charts = [
        bar_chart([bar(conditions[c], c, key) for c in with_bars], caption, as_share)
        for key, caption, as_share in (
            ("hesitation_per_1k", f"{_counted(block, capital=True)} per 1,000 response tokens.", False),
            ("length", "Response length, tokens.", False),
            ("accuracy", "Accuracy.", True),
        )
    ]
    if name == "sufficiency":  # the hybrid hardly hesitates, so no rate can be cut
        conditions = {
            condition: {k: v for k, v in record.items() if k != "hesitation_cut"}
            for condition, record in conditions.items()
        }
    rest = [condition for condition in conditions if condition not in with_bars]
    tables = [_records({condition: conditions[condition] for condition in with_bars}, block)]
    if rest:
        compared = [condition for condition in ["none", "circuit", *rest] if condition in conditions]
        tables.append(_records({c: conditions[c] for c in compared}, block, "Baselines and controls"))
    return Section(title, f"{action} {on}; {n} problems of the {split} split.{random}", bars=charts, tables=tables)


def _with_harm(block: Block, name: str) -> dict[str, Block]:
    """The records of a part by condition, each with its KL elsewhere (measured over given text)."""
    given, model = block.get("probabilities") or {}, {"necessity": "replacement", "sufficiency": "hybrid"}.get(name)
    records = {}
    for condition, record in (block.get(name) or {}).items():
        keys = [model] if condition == "none" else [f"{model}{sign}{condition}" for sign in (" - ", " + ", ", ")]
        harm = next((given[key].get("kl_elsewhere") for key in keys if given.get(key)), None)
        records[condition] = record if harm is None else {**record, "kl_elsewhere": harm}
    return records


def _counted(block: Block, capital: bool = False) -> str:
    """The plural of what the rate counts: hesitations, or occurrences of a behavior."""
    name = str(block.get("behaviour") or "hesitation")
    text = "hesitations" if name == "hesitation" else f"occurrences of {name}"
    return text[0].upper() + text[1:] if capital else text


def _records(conditions: Mapping[str, Block], block: Block, title: str = "") -> SectionTable:
    columns = [
        (key, name.replace("hesitations", visible_text(_counted(block))), as_share)
        for key, name, as_share in _COLUMNS
        if any(record.get(key) is not None for record in conditions.values())
    ]
    rows = [
        [condition_name(condition, block), *(cell(record, key, as_share) for key, _, as_share in columns)]
        for condition, record in conditions.items()
    ]
    return SectionTable(["", *(name for _, name, _ in columns)], rows, title)


def sampled_section(block: Block) -> Section | None:
    """Answers sampled at a temperature."""
    conditions = block.get("sampled") or {}
    return Section("Sampled answers", tables=[_records(conditions, block)]) if conditions else None


def injected_section(block: Block) -> Section | None:
    """Share of injected wrong steps that the answer corrects, by condition."""
    conditions = block.get("injected") or {}
    if not conditions:
        return None
    rows = [
        [condition_name(condition, block), shown(figure, as_share=True), count((figure or {}).get("n"))]
        for condition, figure in conditions.items()
    ]
    tables = [SectionTable(["", "corrected", "injected"], rows)]
    if more := block.get("injected_more") or {}:
        differences = [[condition_name(name, block), shown(figure, as_share=True)] for name, figure in more.items()]
        text = "How much more is corrected without other features than without the circuit, paired by step:"
        header = ["without, in place of the circuit", "more corrected"]
        tables.append(SectionTable(header, differences, text=text))
    text = "A wrong step is written into the model's answer; how often does the model correct it?"
    return Section("Injected errors", text, tables=tables)


def controls_section(block: Block) -> Section | None:
    """The controls of the circuit, and the strength that each was set to on the select split."""
    controls = block.get("controls") or {}
    if not controls:
        return None
    rows = [
        [
            condition_name(name, block),
            shown(c.get("setting")),
            _joined(shown(c.get("size")), visible_text(str(c.get("unit", ""))), separator=" "),
            shown(c.get("write_norm"), as_share=True),
            _change(c.get("p_onset_before"), c.get("p_onset")),
            shown(c.get("kl_elsewhere")),
            "" if c.get("reached") else Cell("not reached", strong=True),
        ]
        for name, c in controls.items()
    ]
    text = (
        "Set on the select split. Bias, steering, neurons and low rank (directions along which adapters no longer "
        "write) have the circuit's effect, P(word) at the onsets, at the least harm elsewhere: KL(replacement || "
        "condition), in nats per token, over the response without the onsets and continuations. Other features are as "
        "many as the circuit's, or as many as have its summed write norm at the onsets (activation times norm of the "
        "decoder row), or as many as do its harm elsewhere. Where the goal cannot be reached the nearest is taken."
    )
    header = ["", "chosen", "size", "write norm, of the circuit's", "P(word) at onsets", "KL elsewhere", ""]
    return Section("Controls", text, tables=[SectionTable(header, rows)])


def probabilities_section(block: Block) -> Section | None:
    """Probability of the word over the same text for every condition, and the KL elsewhere."""
    tables = []
    heads = {"moment": "at onsets", "boundary": "at control positions", "elsewhere": "elsewhere"}
    heads |= {"kl_elsewhere": "KL(replacement || model) away from onsets, nats per token"}
    for name, title in (("probabilities", "Probability of the word"), ("other_words", "Probability of other words")):
        conditions = block.get(name) or {}
        columns = [p for p in heads if any((condition or {}).get(p) for condition in conditions.values())]
        if columns:
            rows = [
                [condition_name(a, block), *(shown((f or {}).get(p), as_share=p != "kl_elsewhere") for p in columns)]
                for a, f in conditions.items()
            ]
            tables.append(SectionTable(["model", *(heads[p] for p in columns)], rows, title))
    what = ""
    if block.get("measured"):
        what = (
            f" The probability is that of {visible_text(str(block['measured']))}. The probability of a phrase is that "
            "of all its tokens at the onsets; elsewhere it is that of its tokens up to the first one at which the text "
            "differs from the phrase."
        )
    text = f"Every model reads the same text, so answers cannot diverge.{what}"
    return Section("On given text", text, tables=tables) if tables else None


def mediation_section(block: Block) -> Section | None:
    """The effect of template features, and how much of it passes through output features."""
    m = block.get("mediation") or {}
    names = {
        "n": "template features, by formula, in the circuit and outside of it",
        "total": "effect of the template features",
        "through_output": "part of it through output features",
        "share": "share through output features",
        "interaction": "interaction: both together, beyond the sum",
    }
    rows = [[names[key], shown(m[key], as_share=key == "share" or None)] for key in names if m.get(key) is not None]
    text = "Template features are removed while output features keep their activations, and the reverse."
    title = "Do template features work through output features?"
    return Section(title, text, tables=[SectionTable(["", ""], rows)]) if rows else None


def dose_section(block: Block) -> Section | None:
    """Hesitation rate and probability by the number of features removed or inserted."""
    dose = [d for d in block.get("dose") or [] if d.get("n") is not None]
    if not dose:
        return None
    n, plots = [d["n"] for d in dose], []
    rates = [d.get("hesitation_per_1k") or {} for d in dose]
    if any(r.get("value") is not None for r in rates):
        value, low, high = ([nan_for_none(r.get(key)) for r in rates] for key in ("value", "low", "high"))
        plots.append(
            plot(
                [Line("first n features removed", n, value, (low, high))],
                xlabel="features removed",
                ylabel=f"{_counted(block).partition(' of ')[0]} per 1,000 tokens",
                caption="In the order of the search, which continues beyond the circuit.",
            )
        )
    lines = [
        Line(name, n, [nan_for_none(d.get(key)) for d in dose])
        for key, name in (("p_moment", "removed, at onsets"), ("p_inserted", "inserted into the hybrid, at onsets"))
        if any(d.get(key) is not None for d in dose)
    ]
    if lines:
        plots.append(
            plot(lines, xlabel="features", ylabel="probability of the word", caption="The same on given text.")
        )
    return Section("By number of features", _smallest_text(block.get("smallest") or {}), plots=plots)


def _smallest_text(smallest: Block) -> str:
    """A sentence about the smallest number of features that reaches the cut."""
    if not smallest:
        return ""
    cut = "the cut"
    if smallest.get("cut") is not None:
        cut = f"a cut by {_joined(shown(smallest['cut'], as_share=True), separator='').text}"
    if smallest.get("n") is None:
        return f"No number that was tried reaches {cut}."
    return f"The smallest number tried that reaches {cut} is {count(smallest['n'])}."


def kinds_section(block: Block) -> Section | None:
    """Counts of what follows the word, by kind and condition."""
    kinds = block.get("kinds") or {}
    if not kinds:
        return None
    names = list(dict.fromkeys(kind for counts in kinds.values() for kind in counts or {}))
    rows = [
        [condition_name(condition, block), *(count((counts or {}).get(kind)) for kind in names)]
        for condition, counts in kinds.items()
    ]
    return Section("What follows the word", tables=[SectionTable(["", *map(visible_text, names)], rows)])


def suppressors_section(block: Block) -> Section | None:
    """The effect of suppressors at control positions, and of bystanders at onsets."""
    rows: list[list[str | Cell]] = []
    if s := block.get("suppressors"):
        name = "suppressors: P(word) at control positions, with → without them"
        change = _change(s.get("p_boundary_before"), s.get("p_boundary_after"))
        rows.append([Cell(name, _ids(s)), count(s.get("n")), change])
    if b := block.get("bystanders"):
        name = "bystanders: P(word) at onsets, with → without them"
        rows.append([Cell(name, _ids(b)), count(b.get("n")), _change(b.get("p_before"), b.get("p_after"))])
    return Section("Suppressors and bystanders", tables=[SectionTable(["", "features", ""], rows)]) if rows else None


def _ids(block: Block) -> str:
    ids = [str(id) for id in block.get("ids") or []]
    return f"{visible_text(', '.join(ids[:12]))}{' …' if len(ids) > 12 else ''}" if ids else ""
