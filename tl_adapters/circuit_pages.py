"""hesitation.html of a run: the circuit drawn, and what was measured with it, arm by arm.

It is made from the block "hesitation" of results.json, circuit.json and the feature store, so it can be made anew at
any time; a part of the block that is not there is left out. It is one file that loads nothing and runs no script.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_adapters.adapter import FeatureId
from tl_adapters.atomic import write_text
from tl_adapters.circuit_drawing import (
    SHOWN_EDGES,
    SHOWN_PER_ROLE,
    Link,
    draw_circuit,
    known_features,
    shown_text,
    signed,
    size,
)
from tl_adapters.circuits import ROLES, Circuit
from tl_adapters.feature_pages import feature_address
from tl_adapters.feature_store import FeatureStore
from tl_adapters.features import ALIVE_FIRINGS, Example, Feature
from tl_adapters.results import plain
from tl_adapters.views import Line, escape, marked, page, plot, table, with_interval

FILE = "hesitation.html"
PAGES = "features/pages"
"""Where a run's feature pages are."""
LISTED = 60
Block = Mapping[str, Any]

_MEANS = {
    "output": "raise the word themselves",
    "template": "fire where it may come, and raise it through output features",
    "continuation": "raise what the word begins",
    "suppress": "lower it",
}
_FIGURE_ARMS = ("none", "output", "template", "both", "random")
_ARMS = {
    "none": "nothing changed",
    "output": "output features",
    "template": "template features",
    "both": "both",
    "both_at_1": "both, at strength 1",
    "random": "random features",
    "bias_only": "decoder biases only",
    "b_dec_only": "decoder biases only",
    "others": "four times as many of the most active others",
    "ban": "the words banned",
    "logit_bias": "a bias on their logits",
    "steering": "a steering vector",
    "neurons": "the target's neurons",
    "other_tokens": "features of other tokens",
    "negated": "circuit, negated",
}
_STYLE = """<style>
.circuit { width: 100%; height: auto; } .circuit a:hover circle { stroke: #1b1f24; stroke-width: 2; }
.bars { display: flex; flex-wrap: wrap; gap: 20px; } .bars figure { margin: 0; flex: 1 1 300px; max-width: 340px; }
.bars svg { width: 100%; height: auto; } .wide { overflow-x: auto; } .wide table { font-size: 13px; }
.wide td { white-space: nowrap; padding-right: 10px; }
td.text, th.text { text-align: left; white-space: normal; } td code { white-space: pre-wrap; font-size: 12px; }
.answers { grid-template-columns: repeat(auto-fit, minmax(min(100%, 280px), 1fr)); }
</style>"""


def write_circuit_page(
    folder: str | Path, block: Block, circuit: Circuit, store: FeatureStore | None, examples: Sequence[Block]
) -> Path:
    """Write hesitation.html into a run folder and return its path.

    Args:
        folder: of the run; features are linked where it has their pages.
        block: "hesitation" of results.json; what is not in it is not shown.
        circuit: of the run.
        store: for what the features are called, promote and fire on; one of other adapters is not used.
        examples: generations side by side: "question", and the name of every arm with what it said.

    Raises DiskFullError.
    """
    folder, block = Path(folder), plain(block)
    if store is not None and store.about.fingerprints.get("adapters") != circuit.fingerprints.get("adapters"):
        store = None
    link = page_link(folder, store)
    words = [word.strip() for word in block.get("words") or circuit.words if word.strip()]
    sections = [
        _head(block, circuit, words),
        _criteria(block),
        _drawing(circuit, store, link),
        _behaviour(block, "necessity", "Necessity: the replacement without them", "Features taken out of"),
        _behaviour(block, "sufficiency", "Sufficiency: the hybrid with them", "Features added to"),
        _behaviour(block, "transfer", "Transfer: the target itself", "The circuit's decoders, negated, added to"),
        _sampled(block),
        _injected(block),
        _probabilities(block),
        _mediation(block),
        _dose(block),
        _kinds(block),
        _suppressors(block),
        _features(circuit, store, link),
        _generations(examples, words),
    ]
    path = folder / FILE
    body = _STYLE + "\n".join(filter(None, sections))
    write_text(path, page(f"The {circuit.behaviour} circuit", body.encode("utf-8", "replace").decode()))
    return path


def page_link(folder: Path, store: FeatureStore | None = None) -> Link:
    """Where a feature is shown, from the run folder; None for one that has no page there."""
    pages: dict[str, bool] = {}

    def link(feature: FeatureId) -> str | None:
        if store is not None:
            if feature.layer not in store.about.layers:
                return None
            if store.firings[store.about.layers.index(feature.layer), feature.index] < ALIVE_FIRINGS:
                return None
        address = f"{PAGES}/{feature_address(feature)}"
        file = address.partition("#")[0]
        if file not in pages:
            pages[file] = (folder / file).is_file()
        return address if pages[file] else None

    return link


# -- sections ------------------------------------------------------------------------------------------------------


def _head(block: Block, circuit: Circuit, words: Sequence[str]) -> str:
    c = block.get("circuit") or {}
    said = ", ".join(f"<mark>{shown_text(word)}</mark>" for word in words)
    rows = [
        [f"{role} features: {_MEANS[role]}", str(c.get(role, sum(f.role == role for f in circuit.features)))]
        for role in ROLES
    ]
    for key, name, form in _FACTS:
        if c.get(key) is not None:
            rows.append([name, _any(c[key], form)])
    if c.get("by_layer"):
        rows.append(["features by layer", shown_text(", ".join(map(str, c["by_layer"])))])
    for split, m in (block.get("moments") or {}).items():
        counts = f"{_count(m.get('moments'))} moments, {_count(m.get('boundaries'))} boundaries"
        rows.append([f"{shown_text(split)} split", f"{counts} in {_count(m.get('documents'))} documents"])
    return (
        f'<p class="soft"><a href="report.html">← report</a></p><h1>The {shown_text(circuit.behaviour)} circuit</h1>'
        f'<p class="soft">Which features make the model say {said}, and what becomes of it without them. Found on the '
        f"{shown_text(circuit.split)} split, measured on another. A <i>moment</i> is a place before the word, a "
        "<i>boundary</i> one like it where it is not. Intervals are 95 % bootstrap intervals over documents or "
        f"problems.</p>{table(['the circuit', ''], rows)}"
    )


def _criteria(block: Block) -> str:
    if not block.get("criteria"):
        return ""
    rows = [
        [
            shown_text(str(c["name"])),
            _any(c.get("value")),
            _any(c.get("bar")),
            "reached" if c.get("reached") else "<b>missed</b>",
        ]
        for c in block["criteria"]
    ]
    return "<h2>What was asked of it</h2>" + table(["criterion", "measured", "bar", ""], rows)


def _drawing(circuit: Circuit, store: FeatureStore | None, link: Link) -> str:
    if not circuit.features:
        return "<h2>The circuit</h2><p>No feature was found.</p>"
    edges = f"the {min(SHOWN_EDGES, len(circuit.edges))} strongest of {len(circuit.edges):,} edges are drawn"
    text = (
        "<p>Area: total effect on the word's log-odds; hollow where it lowers them. Of each role at most "
        f"{SHOWN_PER_ROLE} features, and {edges if circuit.edges else 'edges were not measured'}; dashed edges "
        "lower. Hover for what a feature is, click for its page.</p>"
    )
    return f"<h2>The circuit</h2>{text}{draw_circuit(circuit, store, link)}"


def _behaviour(block: Block, name: str, title: str, said: str) -> str:
    arms: Mapping[str, Block] = block.get(name) or {}
    if not arms:
        return ""
    reference = arms.get("none") or next(iter(arms.values()))
    on = {"necessity": "the replacement", "sufficiency": "the hybrid", "transfer": "the target"}[name]
    draws = (arms.get("random") or {}).get("draws")
    random = f" Random features: mean of {draws} draws." if draws else ""
    text = (
        f"<p>{said} {on}; {_count(reference.get('n'))} problems of the "
        f"{shown_text(str(reference.get('split', '')))} split.{random}</p>"
    )
    shown = [arm for arm in _FIGURE_ARMS if arm in arms] if name != "transfer" else list(arms)
    figures = [
        _bars([_bar(arms[arm], arm, key, percent) for arm in shown], caption, percent)
        for key, caption, percent in (
            ("hesitation_per_1k", "Hesitations per 1,000 response tokens.", False),
            ("length", "Response length, tokens.", False),
            ("accuracy", "Accuracy.", True),
        )
    ]
    if name == "sufficiency":  # nothing is cut there
        arms = {arm: {k: v for k, v in record.items() if k != "hesitation_cut"} for arm, record in arms.items()}
    rest = [arm for arm in arms if arm not in shown]
    rivals = ""
    if rest:
        rivals = "<h3>Rivals and controls</h3>" + _records(
            {arm: arms[arm] for arm in ["none", "both", *rest] if arm in arms}
        )
    main = _records({arm: arms[arm] for arm in shown})
    return f'<h2>{title}</h2>{text}<div class="bars">{"".join(figures)}</div>{main}{rivals}'


def _records(arms: Mapping[str, Block]) -> str:
    columns = [
        (key, name, percent)
        for key, name, percent in _COLUMNS
        if any(record.get(key) is not None for record in arms.values())
    ]
    rows = [[_arm(arm), *(_cell(record, key, percent) for key, _, percent in columns)] for arm, record in arms.items()]
    return '<div class="wide">' + table(["", *(name for _, name, _ in columns)], rows) + "</div>"


def _sampled(block: Block) -> str:
    arms = block.get("sampled") or {}
    return "<h2>Sampled, not greedy</h2>" + _records(arms) if arms else ""


def _injected(block: Block) -> str:
    arms = block.get("injected") or {}
    if not arms:
        return ""
    rows = [[_arm(arm), _any(figure, percent=True), _count((figure or {}).get("n"))] for arm, figure in arms.items()]
    text = "<p>A wrong step is written into the model's answer; how often does it put it right?</p>"
    return f"<h2>Injected errors</h2>{text}" + table(["", "corrected", "injected"], rows)


def _probabilities(block: Block) -> str:
    out = []
    for name, title in (("probabilities", "Probability of the word"), ("other_words", "Probability of other words")):
        arms = block.get(name) or {}
        places = [p for p in ("moment", "boundary", "elsewhere") if any((arm or {}).get(p) for arm in arms.values())]
        if places:
            rows = [[_arm(a), *(_any((f or {}).get(p), percent=True) for p in places)] for a, f in arms.items()]
            heads = {"moment": "at moments", "boundary": "at boundaries", "elsewhere": "elsewhere"}
            out.append(f"<h3>{title}</h3>" + table(["model", *(heads[p] for p in places)], rows))
    return "<h2>On given text</h2><p>The same text for every model: no answer drifts.</p>" + "".join(out) if out else ""


def _mediation(block: Block) -> str:
    m = block.get("mediation") or {}
    names = {
        "total": "effect of the template features",
        "through_output": "of it through output features",
        "share": "share through output features",
        "interaction": "interaction: both together, beyond the sum",
    }
    rows = [[names[key], _any(m[key], percent=key == "share" or None)] for key in names if m.get(key) is not None]
    text = "<p>Template features are taken out while output features are held where they were, and the other way.</p>"
    return f"<h2>Do template features work through output features?</h2>{text}" + table(["", ""], rows) if rows else ""


def _dose(block: Block) -> str:
    dose = [d for d in block.get("dose") or [] if d.get("n") is not None]
    smallest = block.get("smallest") or {}
    if not dose:
        return ""
    n, plots = [d["n"] for d in dose], []
    rates = [d.get("hesitation_per_1k") or {} for d in dose]
    if any(r.get("value") is not None for r in rates):
        value, low, high = ([_nan(r.get(key)) for r in rates] for key in ("value", "low", "high"))
        plots.append(
            plot(
                [Line("first n features out", n, value, (low, high))],
                xlabel="features taken out",
                ylabel="hesitations per 1,000 tokens",
                caption="How many features it takes, strongest first.",
            )
        )
    lines = [
        Line(name, n, [_nan(d.get(key)) for d in dose])
        for key, name in (("p_moment", "taken out, at moments"), ("p_inserted", "put into the hybrid, at moments"))
        if any(d.get(key) is not None for d in dose)
    ]
    if lines:
        plots.append(
            plot(lines, xlabel="features", ylabel="probability of the word", caption="The same on given text.")
        )
    said = ""
    if smallest:
        cut = f" a cut by {_any(smallest.get('cut'), percent=True)}" if smallest.get("cut") is not None else " the cut"
        said = (
            f"<p>The smallest number tried that reaches{cut}: <b>{_count(smallest['n'])}</b>.</p>"
            if smallest.get("n") is not None
            else f"<p>No number that was tried reaches{cut}.</p>"
        )
    return f'<h2>How many it takes</h2>{said}<div class="plots">{"".join(plots)}</div>'


def _kinds(block: Block) -> str:
    kinds = block.get("kinds") or {}
    if not kinds:
        return ""
    names = list(dict.fromkeys(kind for counts in kinds.values() for kind in counts or {}))
    rows = [[_arm(arm), *(_count((counts or {}).get(kind)) for kind in names)] for arm, counts in kinds.items()]
    return "<h2>What follows the word</h2>" + table(["", *map(shown_text, names)], rows)


def _suppressors(block: Block) -> str:
    rows = []
    if s := block.get("suppressors"):
        text = f"{_any(s.get('p_boundary_before'), percent=True)} → {_any(s.get('p_boundary_after'), percent=True)}"
        rows.append([f"suppressors: P(word) at boundaries, with → without them{_ids(s)}", _count(s.get("n")), text])
    if b := block.get("bystanders"):
        text = f"{_any(b.get('p_before'), percent=True)} → {_any(b.get('p_after'), percent=True)}"
        rows.append([f"bystanders: P(word) at moments, with → without them{_ids(b)}", _count(b.get("n")), text])
    return "<h2>Those that lower it, and those that look on</h2>" + table(["", "features", ""], rows) if rows else ""


def _ids(block: Block) -> str:
    ids = [str(id) for id in block.get("ids") or []]
    return f"<small>{shown_text(', '.join(ids[:12]))}{' …' if len(ids) > 12 else ''}</small>" if ids else ""


def _features(circuit: Circuit, store: FeatureStore | None, link: Link) -> str:
    if not circuit.features:
        return ""
    chosen = sorted(circuit.features, key=lambda f: -size(f.total))[:LISTED]
    known, rows = known_features(store, [f.id for f in chosen]), []
    for f in chosen:
        name = f"{f.id.layer}.{f.id.index}"
        address = link(f.id)
        cells = [name if address is None else f'<a href="{escape(address)}">{name}</a>', f.role]
        cells += [signed(value) for value in (f.direct, f.through, f.total, f.contrast)]
        cells.append(_short(f.mass))
        if store is not None:
            cells += _described(known.get(f.id))
        rows.append(cells)
    header = ["feature", "role", "direct", "through output", "total", "over boundaries", "activation"]
    header += ["promotes", "fires on"] if store is not None else []
    text = (
        f"<p>The {len(chosen)} of {len(circuit):,} with the largest total effect; all are in circuit.json. Effects are "
        "in nats of the word's log-odds, mean over the moments; <i>over boundaries</i>: total less that there.</p>"
    )
    return f"<h2>Its features</h2>{text}{table(header, rows)}"


def _described(feature: Feature | None) -> list[str]:
    if feature is None:
        return ["", ""]
    label = f"<small>{shown_text(feature.label.text)}</small>" if feature.label is not None else ""
    promotes = " ".join(f"<code>{shown_text(token)}</code>" for token, _ in feature.promotes[:4])
    return [promotes + label, "<br>".join(f"<code>{_excerpt(e)}</code>" for e in feature.top[:2])]


def _excerpt(example: Example) -> str:
    start = max(0, example.at - 10)
    before, after = (
        "".join(example.tokens[start : example.at]),
        "".join(example.tokens[example.at + 1 : example.at + 5]),
    )
    return f"{shown_text(before)}<mark>{shown_text(example.tokens[example.at])}</mark>{shown_text(after)}"


def _generations(examples: Sequence[Block], words: Sequence[str]) -> str:
    out = []
    for example in examples:
        said = {arm: text for arm, text in example.items() if arm != "question" and isinstance(text, str)}
        boxes = "".join(
            f"<div><h4>{_arm(arm)}</h4><pre>{marked(text, words) if words else escape(text)}</pre></div>"
            for arm, text in said.items()
        )
        question = escape(str(example.get("question", "")))
        out.append(f'<p><b>{question}</b></p><div class="answers">{boxes}</div>')
    return "<h2>The same problem, with and without</h2>" + "".join(out) if out else ""


# -- bars and cells ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bar:
    name: str
    value: float
    low: float
    high: float


def _bar(record: Block, arm: str, key: str, percent: bool) -> _Bar:
    interval = (record.get("ci") or {}).get(key) or {}
    value = _nan(record.get(key))
    return _Bar(_ARMS.get(arm, arm), value, _nan(interval.get("low")), _nan(interval.get("high")))


def _bars(bars: Sequence[_Bar], caption: str, percent: bool) -> str:
    """Bars with their intervals and values; a value that is not there is a gap."""
    ends = [x for b in bars for x in (b.value, b.high) if math.isfinite(x)]
    scale = 130 / (max(ends, default=0.0) or 1.0)
    rows = []
    for i, b in enumerate(bars):
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
        said = _percent(b.value) if percent else _short(b.value)
        rows.append(f'<text x="{130 + end * scale:.1f}" y="{y + 14}">{said}</text>')
    height = 26 * len(bars) + 8
    return (
        f'<figure><svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 320 {height}" font-size="12" '
        f'font-family="system-ui, sans-serif">{"".join(rows)}</svg><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _cell(record: Block, key: str, percent: bool | None) -> str:
    value = record.get(key)
    interval = (record.get("ci") or {}).get(key)
    return (
        _any({"value": value, **(interval or {})}, percent) if not isinstance(value, Mapping) else _any(value, percent)
    )


def _any(value: Any, percent: bool | None = None) -> str:
    """A number, a figure with its interval, or a text; shares as percent unless it is said what they are."""
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        if value.get("value") is None:
            return "-"
        if percent is None:
            percent = str(value.get("unit", "")).startswith(("share", "accuracy", "probability"))
        form = _percent if percent else _short
        low, high = value.get("low"), value.get("high")
        if low is None or high is None:
            return form(value["value"])
        return with_interval(form(value["value"]), f"{form(low)} to {form(high)}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _percent(value) if percent else _short(value)
    return shown_text(str(value))


def _arm(name: str) -> str:
    return shown_text(_ARMS.get(name, name))


def _nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _short(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


_FACTS: tuple[tuple[str, str, bool | None], ...] = (
    ("share_of_alive", "promoting features, as a share of the alive ones", True),
    ("share_of_all", "as a share of all features", True),
    ("share_of_activation", "of all activation at the moments", True),
    ("times_l0", "promoting features, over the features active per token", None),
    ("distinct_directions", "distinct directions they write", None),
    ("alive", "alive features", None),
    ("strength", "strength at which they are added", None),
    ("threshold", "direct effect from which a feature is an output feature, nats", None),
)
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
)
