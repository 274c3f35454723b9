"""hesitation.html of a run: the circuit drawn, and what was measured with it, arm by arm.

It is made from the block "hesitation" of results.json, circuit.json and the feature store, so it can be made anew at
any time; a part of the block that is not there is left out. It is one file that loads nothing and runs no script.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.checkpoints.fingerprints import differing
from tl_adapters.circuits.circuit import EFFECT_NAMES, ROLES, Circuit
from tl_adapters.circuits.criteria import OUTCOME_NAMES
from tl_adapters.circuits.find import FEWEST_ONSETS
from tl_adapters.circuits.results_block import upgraded_block
from tl_adapters.data.words import word_pattern
from tl_adapters.features.feature import ALIVE_FIRINGS, Example, Feature
from tl_adapters.features.store import FeatureStore
from tl_adapters.pages.circuit_diagram import (
    SHOWN_EDGES,
    SHOWN_PER_ROLE,
    Link,
    draw_circuit,
    known_features,
    shown_text,
    signed,
    size,
)
from tl_adapters.pages.circuit_sections import (
    arm_name,
    arms_section,
    controls_section,
    count,
    dose_section,
    injected_section,
    kinds_section,
    mediation_section,
    probabilities_section,
    sampled_section,
    short,
    shown,
    suppressors_section,
)
from tl_adapters.pages.feature_pages import feature_address
from tl_adapters.utils.files import write_text
from tl_adapters.utils.html import escape, highlight_spans, page, table
from tl_adapters.utils.results import Block, plain

HESITATION_PAGE_FILE = "hesitation.html"
PAGES = "features/pages"
"""Where a run's feature pages are."""
LISTED, SHOWN_WORDS = 60, 12

_MEANS = {
    "output": "raise the word themselves",
    "template": "fire where it may come, and raise it through output features",
    "continuation": "raise what the word begins",
    "other": "do none of this by themselves",
    "suppress": "lower it",
}
_HOLDERS = {
    "circuit": "the circuit",
    "random": "matched random features",
    "others": "as many of the most active others",
}
_FACTS: tuple[tuple[str, str, bool | None], ...] = (
    ("share_of_alive", "promoting features, as a share of the alive ones", True),
    ("share_of_all", "as a share of all features", True),
    ("share_of_activation", "of all activation over the texts it was found on", True),
    ("times_l0", "promoting features, over the features active per token", None),
    ("distinct_directions", "distinct directions they write", None),
    ("alive", "alive features", None),
    ("strength", "strength at which they were searched; they are added at 1, and at this strength beside it", None),
    ("threshold", "direct effect from which a feature is an output feature, nats", None),
)
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
        examples: generations side by side: "question", and the name of every arm with what it said; "places", where
            there are any, has for each arm what is to be marked instead of the words, as (start, stop) of characters.

    Raises DiskFullError.
    """
    folder, block = Path(folder), upgraded_block(plain(block, null=True))
    if store is not None and differing(store.about.fingerprints, circuit.fingerprints):
        store = None
    link = page_link(folder, store)
    words = [word.strip() for word in block.get("words") or circuit.words if word.strip()]
    sections = [
        _head(block, circuit, words),
        _criteria(block),
        _drawing(circuit, store, link, (block.get("moments") or {}).get(circuit.split) or {}),
        controls_section(block),
        arms_section(block, "necessity", "Necessity: the replacement without them", "Features taken out of"),
        arms_section(block, "sufficiency", "Sufficiency: the hybrid with them", "Features added to"),
        arms_section(block, "transfer", "Transfer: the target itself", "The circuit's decoders, negated, added to"),
        sampled_section(block),
        injected_section(block),
        probabilities_section(block),
        mediation_section(block),
        dose_section(block),
        kinds_section(block),
        suppressors_section(block),
        _features(circuit, store, link),
        _generations(examples, words),
    ]
    path = folder / HESITATION_PAGE_FILE
    body = _STYLE + "\n".join(filter(None, sections))
    write_text(path, page(f"The {circuit.behavior} circuit", body.encode("utf-8", "replace").decode()))
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
    said = ", ".join(f"<mark>{shown_text(word)}</mark>" for word in words[:SHOWN_WORDS])
    said += f" and {len(words) - SHOWN_WORDS:,} more" if len(words) > SHOWN_WORDS else ""
    function = block.get("function")
    does = f"say {said}" if said else f"do what is called {shown_text(circuit.behavior)}"
    does += f" (found by the function <code>{shown_text(str(function))}</code>)" if function else ""
    rows = [
        [f"{role} features: {_MEANS[role]}", str(c.get(role, sum(f.role == role for f in circuit.features)))]
        for role in ROLES
    ]
    for key, name, form in _FACTS:
        if c.get(key) is not None:
            rows.append([name, shown(c[key], form)])
    for held, share in (c.get("share_of_mass") or {}).items():
        rows.append([f"of the activation at moments and boundaries: {_HOLDERS[held]}", shown(share, as_share=True)])
    if c.get("by_layer"):
        rows.append(["features by layer", shown_text(", ".join(map(str, c["by_layer"])))])
    for split, m in (block.get("moments") or {}).items():
        counts = f"{count(m.get('moments'))} moments, {count(m.get('boundaries'))} boundaries"
        if alike := (block.get("begins_alike") or {}).get(split):
            counts += f" ({count(alike)} of them before something else that begins alike)"
        rows.append([f"{shown_text(split)} split", f"{counts} in {count(m.get('documents'))} documents"])
    return (
        f'<p class="soft"><a href="report.html">← report</a></p><h1>The {shown_text(circuit.behavior)} circuit</h1>'
        f'<p class="soft">Which features make the model {does}, and what becomes of it without them. Found on the '
        f"{shown_text(circuit.split)} split, measured on another. A <i>moment</i> is a place before the word, a "
        "<i>boundary</i> one like it where it is not. Intervals are 95 % intervals over documents or "
        f"problems.</p>{table(['the circuit', ''], rows)}"
    )


def _criteria(block: Block) -> str:
    if not block.get("criteria"):
        return ""
    rows = [
        [
            shown_text(str(c["name"])),
            shown(c.get("value")),
            shown(c.get("bar")),
            "<b>missed</b>" if c.get("reached") is False else OUTCOME_NAMES[c.get("reached")],
        ]
        for c in block["criteria"]
    ]
    return "<h2>What was asked of it</h2>" + table(["criterion", "measured", "bar", ""], rows)


def _drawing(circuit: Circuit, store: FeatureStore | None, link: Link, moments: Block) -> str:
    if not circuit.features:
        why = ""
        if moments.get("moments") is not None:
            n, documents = count(moments["moments"]), count(moments.get("documents"))
            why = f" The model's {documents} answers of the {shown_text(circuit.split)} split hold {n} moments"
            if not moments["moments"]:
                why += ": it never does it, so there is nothing to find a circuit of."
            else:
                why += f"; a circuit is searched from {FEWEST_ONSETS} on."
        return f"<h2>The circuit</h2><p>No feature was found.{why}</p>"
    edges = f"the {min(SHOWN_EDGES, len(circuit.edges))} strongest of {len(circuit.edges):,} edges are drawn"
    text = (
        "<p>Area: total effect on the word's log-odds; hollow where it lowers them. Of each role at most "
        f"{SHOWN_PER_ROLE} features, and {edges if circuit.edges else 'edges were not measured'}; dashed edges "
        "lower. Hover for what a feature is, click for its page.</p>"
    )
    return f"<h2>The circuit</h2>{text}{draw_circuit(circuit, store, link)}"


def _features(circuit: Circuit, store: FeatureStore | None, link: Link) -> str:
    if not circuit.features:
        return ""
    chosen = sorted(circuit.features, key=lambda f: -size(f.total))[:LISTED]
    known, rows = known_features(store, [f.id for f in chosen]), []
    for f in chosen:
        name = f"{f.id.layer}.{f.id.index}"
        address = link(f.id)
        cells = [name if address is None else f'<a href="{escape(address)}">{name}</a>', f.role]
        cells += [signed(value) for value in f.effects]
        cells.append(short(f.activation))
        if store is not None:
            cells += _described(known.get(f.id))
        rows.append(cells)
    header = ["feature", "role", *EFFECT_NAMES, "activation"]
    header += ["promotes", "fires on"] if store is not None else []
    text = (
        f"<p>The {len(chosen)} of {len(circuit):,} with the largest total effect; all are in circuit.json. Effects are "
        "in nats of the word's log-odds, mean over the moments; <i>on continuation</i>: in nats of the log-odds of the "
        "tokens after it; <i>onsets less controls</i>: total less that at boundaries.</p>"
    )
    return f"<h2>Its features</h2>{text}{table(header, rows)}"


def _described(feature: Feature | None) -> list[str]:
    if feature is None:
        return ["", ""]
    label = f"<small>{shown_text(feature.label.text)}</small>" if feature.label is not None else ""
    promotes = " ".join(f"<code>{shown_text(token)}</code>" for token, _ in feature.top_logits[:4])
    return [promotes + label, "<br>".join(f"<code>{_excerpt(e)}</code>" for e in feature.top_examples[:2])]


def _excerpt(example: Example) -> str:
    start, shown = max(0, example.token_index - 10), example.display_texts
    before, after = (
        "".join(shown[start : example.token_index]),
        "".join(shown[example.token_index + 1 : example.token_index + 5]),
    )
    return f"{shown_text(before)}<mark>{shown_text(shown[example.token_index])}</mark>{shown_text(after)}"


def _generations(examples: Sequence[Block], words: Sequence[str]) -> str:
    out = []
    for example in examples:
        said = {arm: text for arm, text in example.items() if arm != "question" and isinstance(text, str)}
        places = example.get("places") or {
            arm: [match.span() for match in word_pattern(words).finditer(text)] if words else []
            for arm, text in said.items()
        }
        boxes = "".join(
            f"<div><h4>{arm_name(arm)}</h4><pre>{highlight_spans(text, places.get(arm) or [])}</pre></div>"
            for arm, text in said.items()
        )
        question = escape(str(example.get("question", "")))
        out.append(f'<p><b>{question}</b></p><div class="answers">{boxes}</div>')
    return "<h2>The same problem, with and without</h2>" + "".join(out) if out else ""
