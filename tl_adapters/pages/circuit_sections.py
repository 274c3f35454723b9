"""The measurements of a circuit as sections of its page, with the cells and bars that they consist of.

A section is "" for a measurement that the block does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tl_adapters.pages.circuit_diagram import shown_text
from tl_adapters.utils.html import escape, measurement_cell, percent, table
from tl_adapters.utils.plots import Line, nan_for_none, plot
from tl_adapters.utils.results import Block

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
    value = nan_for_none(record.get(key))
    return Bar(_ARMS.get(arm, arm), value, nan_for_none(interval.get("low")), nan_for_none(interval.get("high")))


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


def count(value: int | None) -> str:
    """A whole number."""
    return "-" if value is None else f"{value:,}"


def short(value: float) -> str:
    """Three digits."""
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# -- the sections ---------------------------------------------------------------------------------------------------

_FIGURE_ARMS = ("none", "output", "template", "circuit", "random")
_COLUMNS: tuple[tuple[str, str, bool | None], ...] = (
    ("hesitation_per_1k", "hesitations per 1,000", False),
    ("hesitation_cut", "of them gone", True),
    ("length", "length, tokens", False),
    ("length_change", "change in length", None),
    ("accuracy", "accuracy", True),
    ("accuracy_change", "change in accuracy", True),
    ("accuracy_without_slip", "accuracy, no slip", True),
    ("accuracy_with_slip", "accuracy, a slip", True),
    ("truncated", "cut off", True),
    ("kl_elsewhere", "KL elsewhere, nats per token", False),
)


def arms_section(block: Block, name: str, title: str, said: str) -> str:
    """What an arm says: rates, lengths and accuracy, as bars and as a table."""
    arms: Mapping[str, Block] = _with_harm(block, name)
    if not arms:
        return ""
    reference = arms.get("none") or next(iter(arms.values()))
    on = {"necessity": "the replacement", "sufficiency": "the hybrid", "transfer": "the target"}[name]
    draws = (arms.get("random") or {}).get("draws")
    random = f" Random features: mean of {draws} draws." if draws else ""
    text = (
        f"<p>{said} {on}; {count(reference.get('n'))} problems of the "
        f"{shown_text(str(reference.get('split', '')))} split.{random}</p>"
    )
    drawn = [arm for arm in _FIGURE_ARMS if arm in arms] if name != "transfer" else list(arms)
    figures = [
        bars([bar(arms[arm], arm, key) for arm in drawn], caption, as_share)
        for key, caption, as_share in (
            ("hesitation_per_1k", f"{_counted(block, capital=True)} per 1,000 response tokens.", False),
            ("length", "Response length, tokens.", False),
            ("accuracy", "Accuracy.", True),
        )
    ]
    if name == "sufficiency":  # nothing is cut there
        arms = {arm: {k: v for k, v in record.items() if k != "hesitation_cut"} for arm, record in arms.items()}
    rest = [arm for arm in arms if arm not in drawn]
    rivals = ""
    if rest:
        rivals = "<h3>Rivals and controls</h3>" + _records(
            {arm: arms[arm] for arm in ["none", "circuit", *rest] if arm in arms}, block
        )
    main = _records({arm: arms[arm] for arm in drawn}, block)
    return f'<h2>{title}</h2>{text}<div class="bars">{"".join(figures)}</div>{main}{rivals}'


def _with_harm(block: Block, name: str) -> dict[str, Block]:
    """The arms of a part, each with the KL(replacement || condition) elsewhere that was read over given text."""
    given, model = block.get("probabilities") or {}, {"necessity": "replacement", "sufficiency": "hybrid"}.get(name)
    found = {}
    for arm, record in (block.get(name) or {}).items():
        keys = [model] if arm == "none" else [f"{model}{sign}{arm}" for sign in (" - ", " + ", ", ")]
        harm = next((given[key].get("kl_elsewhere") for key in keys if given.get(key)), None)
        found[arm] = record if harm is None else {**record, "kl_elsewhere": harm}
    return found


def _counted(block: Block, capital: bool = False) -> str:
    """What is counted in answers, by the name that the study gave it."""
    name = str(block.get("behaviour") or "hesitation")
    said = "hesitations" if name == "hesitation" else f"occurrences of {name}"
    return said[0].upper() + said[1:] if capital else said


def _records(arms: Mapping[str, Block], block: Block) -> str:
    columns = [
        (key, name.replace("hesitations", shown_text(_counted(block))), as_share)
        for key, name, as_share in _COLUMNS
        if any(record.get(key) is not None for record in arms.values())
    ]
    rows = [
        [arm_name(arm, block), *(cell(record, key, as_share) for key, _, as_share in columns)]
        for arm, record in arms.items()
    ]
    return '<div class="wide">' + table(["", *(name for _, name, _ in columns)], rows) + "</div>"


def sampled_section(block: Block) -> str:
    """Answers drawn at a temperature."""
    arms = block.get("sampled") or {}
    return "<h2>Sampled, not greedy</h2>" + _records(arms, block) if arms else ""


def injected_section(block: Block) -> str:
    """Wrong steps that were set right."""
    arms = block.get("injected") or {}
    if not arms:
        return ""
    rows = [
        [arm_name(arm, block), shown(figure, as_share=True), count((figure or {}).get("n"))]
        for arm, figure in arms.items()
    ]
    text = "<p>A wrong step is written into the model's answer; how often does it put it right?</p>"
    out = f"<h2>Injected errors</h2>{text}" + table(["", "corrected", "injected"], rows)
    if more := block.get("injected_more") or {}:
        rows = [[arm_name(arm, block), shown(figure, as_share=True)] for arm, figure in more.items()]
        text = "<p>How much more is corrected without other features than without the circuit, paired by step:</p>"
        out += text + table(["without, in place of the circuit", "more corrected"], rows)
    return out


def controls_section(block: Block) -> str:
    """What the circuit is held against, and how each of it was set."""
    controls = block.get("controls") or {}
    if not controls:
        return ""
    rows = [
        [
            arm_name(name, block),
            shown(c.get("setting")),
            f"{shown(c.get('size'))} {shown_text(str(c.get('unit', '')))}",
            shown(c.get("write_norm"), as_share=True),
            f"{shown(c.get('p_onset_before'), as_share=True)} → {shown(c.get('p_onset'), as_share=True)}",
            shown(c.get("kl_elsewhere")),
            "" if c.get("reached") else "<b>not reached</b>",
        ]
        for name, c in controls.items()
    ]
    text = (
        "<p>Set on the select split. Bias, steering and neurons have the circuit's effect, P(word) at the moments, at "
        "the least harm elsewhere: KL(replacement || condition), in nats per token, over the response without the "
        "moments and what follows them. Other features are as many as the circuit's, or as many as have its summed "
        "write norm at the moments (activation times norm of the decoder row), or as many as do its harm elsewhere. "
        "Where the goal cannot be reached the nearest is taken.</p>"
    )
    heads = ["", "chosen", "size", "write norm, of the circuit's", "P(word) at moments", "KL elsewhere", ""]
    return f"<h2>Controls</h2>{text}" + '<div class="wide">' + table(heads, rows) + "</div>"


def probabilities_section(block: Block) -> str:
    """Of the word, over the same text for every arm; beside it what the condition changes elsewhere."""
    out = []
    heads = {"moment": "at moments", "boundary": "at boundaries", "elsewhere": "elsewhere"}
    heads |= {"kl_elsewhere": "KL(replacement || model) away from moments, nats per token"}
    for name, title in (("probabilities", "Probability of the word"), ("other_words", "Probability of other words")):
        arms = block.get(name) or {}
        places = [p for p in heads if any((arm or {}).get(p) for arm in arms.values())]
        if places:
            rows = [
                [arm_name(a, block), *(shown((f or {}).get(p), as_share=p != "kl_elsewhere") for p in places)]
                for a, f in arms.items()
            ]
            out.append(f"<h3>{title}</h3>" + table(["model", *(heads[p] for p in places)], rows))
    what = ""
    if block.get("measured"):
        what = (
            f" The probability is that of {shown_text(str(block['measured']))}; of a phrase it is that of all its "
            "tokens at the moments, elsewhere of those up to and with the one at which the text parts from it."
        )
    text = f"<p>The same text for every model: no answer drifts.{what}</p>"
    return f"<h2>On given text</h2>{text}" + "".join(out) if out else ""


def mediation_section(block: Block) -> str:
    """Does template work through output?"""
    m = block.get("mediation") or {}
    names = {
        "n": "template features, by formula, in the circuit and outside of it",
        "total": "effect of the template features",
        "through_output": "of it through output features",
        "share": "share through output features",
        "interaction": "interaction: both together, beyond the sum",
    }
    rows = [[names[key], shown(m[key], as_share=key == "share" or None)] for key in names if m.get(key) is not None]
    text = "<p>Template features are taken out while output features are held where they were, and the other way.</p>"
    return f"<h2>Do template features work through output features?</h2>{text}" + table(["", ""], rows) if rows else ""


def dose_section(block: Block) -> str:
    """Hesitation by number of features."""
    dose = [d for d in block.get("dose") or [] if d.get("n") is not None]
    smallest = block.get("smallest") or {}
    if not dose:
        return ""
    n, plots = [d["n"] for d in dose], []
    rates = [d.get("hesitation_per_1k") or {} for d in dose]
    if any(r.get("value") is not None for r in rates):
        value, low, high = ([nan_for_none(r.get(key)) for r in rates] for key in ("value", "low", "high"))
        plots.append(
            plot(
                [Line("first n features out", n, value, (low, high))],
                xlabel="features taken out",
                ylabel=f"{_counted(block).partition(' of ')[0]} per 1,000 tokens",
                caption="In the order in which the search took them, beyond the circuit too.",
            )
        )
    lines = [
        Line(name, n, [nan_for_none(d.get(key)) for d in dose])
        for key, name in (("p_moment", "taken out, at moments"), ("p_inserted", "put into the hybrid, at moments"))
        if any(d.get(key) is not None for d in dose)
    ]
    if lines:
        plots.append(
            plot(lines, xlabel="features", ylabel="probability of the word", caption="The same on given text.")
        )
    said = ""
    if smallest:
        cut = (
            f" a cut by {shown(smallest.get('cut'), as_share=True)}" if smallest.get("cut") is not None else " the cut"
        )
        said = (
            f"<p>The smallest number tried that reaches{cut}: <b>{count(smallest['n'])}</b>.</p>"
            if smallest.get("n") is not None
            else f"<p>No number that was tried reaches{cut}.</p>"
        )
    return f'<h2>How many it takes</h2>{said}<div class="plots">{"".join(plots)}</div>'


def kinds_section(block: Block) -> str:
    """What follows the word."""
    kinds = block.get("kinds") or {}
    if not kinds:
        return ""
    names = list(dict.fromkeys(kind for counts in kinds.values() for kind in counts or {}))
    rows = [
        [arm_name(arm, block), *(count((counts or {}).get(kind)) for kind in names)] for arm, counts in kinds.items()
    ]
    return "<h2>What follows the word</h2>" + table(["", *map(shown_text, names)], rows)


def suppressors_section(block: Block) -> str:
    """Features of the other sign, and those that only fire there."""
    rows = []
    if s := block.get("suppressors"):
        text = f"{shown(s.get('p_boundary_before'), as_share=True)} → {shown(s.get('p_boundary_after'), as_share=True)}"
        rows.append([f"suppressors: P(word) at boundaries, with → without them{_ids(s)}", count(s.get("n")), text])
    if b := block.get("bystanders"):
        text = f"{shown(b.get('p_before'), as_share=True)} → {shown(b.get('p_after'), as_share=True)}"
        rows.append([f"bystanders: P(word) at moments, with → without them{_ids(b)}", count(b.get("n")), text])
    return "<h2>Those that lower it, and those that look on</h2>" + table(["", "features", ""], rows) if rows else ""


def _ids(block: Block) -> str:
    ids = [str(id) for id in block.get("ids") or []]
    return f"<small>{shown_text(', '.join(ids[:12]))}{' …' if len(ids) > 12 else ''}</small>" if ids else ""
