"""hesitation.html of a run: the circuit as a diagram, and the measurements of every condition.

The page is made from the block "hesitation" of results.json, circuit.json and the feature store, so it can be
written again at any time; parts that the block does not hold are left out. It is one file that loads nothing and runs
no script.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.checkpoints.fingerprints import differing
from tl_adapters.circuits.circuit import EFFECT_NAMES, ROLES, Circuit
from tl_adapters.circuits.criteria import OUTCOME_NAMES
from tl_adapters.circuits.results_block import upgraded_block
from tl_adapters.circuits.search import FEWEST_ONSETS
from tl_adapters.data.words import word_pattern
from tl_adapters.features.feature import ALIVE_FIRINGS, Example, Feature
from tl_adapters.features.store import FeatureStore
from tl_adapters.pages.circuit_diagram import (
    MAX_SHOWN_EDGES,
    MAX_SHOWN_PER_ROLE,
    Link,
    draw_circuit,
    known_features,
    signed,
    size,
    visible_text,
)
from tl_adapters.pages.circuit_sections import (
    Section,
    condition_name,
    conditions_section,
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
from tl_adapters.pages.dose_curve_plots import dose_curves_section
from tl_adapters.pages.feature_pages import feature_address
from tl_adapters.pages.navigation import FEATURE_PAGES_FOLDER, HESITATION_PAGE_FILE, page_links
from tl_adapters.utils.html import Cell, highlight_spans, render, shown_from
from tl_adapters.utils.results import RESULTS_FILE, Block, output_file, plain, write_output

MAX_TABLE_FEATURES, MAX_SHOWN_WORDS = 60, 12
"""Features in the table of the circuit, and words in the heading."""

_ROLE_DESCRIPTIONS = {
    "output": "raise the word themselves",
    "template": "fire where it may come, and raise it through output features",
    "continuation": "raise what the word begins",
    "other": "do none of this by themselves",
    "suppress": "lower it",
}
_FEATURE_SET_NAMES = {
    "circuit": "the circuit",
    "random": "matched random features",
    "others": "as many of the most active others",
}
_CIRCUIT_ROWS: tuple[tuple[str, str, bool | None], ...] = (
    ("share_of_alive", "promoting features, as a share of the alive ones", True),
    ("share_of_all", "as a share of all features", True),
    ("share_of_activation", "of all activation over the texts it was found on", True),
    ("times_l0", "promoting features, over the features active per token", None),
    ("distinct_directions", "distinct directions they write", None),
    ("alive", "alive features", None),
    ("strength", "strength at which they were searched; they are added at 1, and at this strength beside it", None),
    ("threshold", "direct effect from which a feature is an output feature, nats", None),
)


def write_circuit_page(
    folder: str | Path, block: Block, circuit: Circuit, store: FeatureStore | None, examples: Sequence[Block]
) -> Path:
    """Writes hesitation.html into a run folder and returns its path.

    Args:
        folder: the run folder; features are linked to their pages if the folder has them.
        block: the block "hesitation" of results.json; sections that it has no measurements for are left out.
        circuit: the circuit of the run.
        store: labels, top logits and examples of the features; a store of other adapters is ignored.
        examples: answers to show side by side: "question", and the answer of each condition by its name. An optional
            "places" holds, for each condition, the (start, stop) of characters to highlight instead of the words.

    Raises:
        UnreadableFileError: the block does not hold what the page shows.
        DiskFullError.
    """
    folder, block = Path(folder), upgraded_block(plain(block, null=True))
    if store is not None and differing(store.about.fingerprints, circuit.fingerprints):
        store = None
    link = page_link(folder, store)
    with shown_from(folder / RESULTS_FILE):
        words = [word.strip() for word in block.get("words") or circuit.words if word.strip()]
        text = render(
            "circuit/circuit.html.j2",
            run_pages=page_links(output_file(folder, HESITATION_PAGE_FILE)),
            behavior=visible_text(circuit.behavior),
            split=visible_text(circuit.split),
            about=_about(block, circuit, words),
            criteria=_criteria_rows(block),
            diagram=_diagram(circuit, store, link, (block.get("moments") or {}).get(circuit.split) or {}),
            sections=[section for section in _sections(block) if section is not None],
            features=_features(circuit, store, link),
            generations=[_generation(example, words) for example in examples],
            texts_withheld=bool(block.get("texts_withheld")),
        )
    return write_output(folder, HESITATION_PAGE_FILE, text)


def _sections(block: Block) -> list[Section | None]:
    """The sections of measurements in their order; None for those that were not measured."""
    return [
        dose_curves_section(block),
        controls_section(block),
        conditions_section(block, "necessity", "Necessity: the replacement without them", "Features removed from"),
        conditions_section(block, "sufficiency", "Sufficiency: the hybrid with them", "Features added to"),
        conditions_section(
            block, "transfer", "Transfer: the target itself", "The circuit's decoders, negated, added to"
        ),
        sampled_section(block),
        injected_section(block),
        probabilities_section(block),
        mediation_section(block),
        dose_section(block),
        kinds_section(block),
        suppressors_section(block),
    ]


def page_link(folder: Path, store: FeatureStore | None = None) -> Link:
    """A function from a feature to the address of its page, relative to the run folder, or None if it has no page."""
    pages: dict[str, bool] = {}

    def link(feature: FeatureId) -> str | None:
        if store is not None:
            if feature.layer not in store.about.layers:
                return None
            if store.firings[store.about.layers.index(feature.layer), feature.index] < ALIVE_FIRINGS:
                return None
        address = f"{FEATURE_PAGES_FOLDER}/{feature_address(feature)}"
        file = address.partition("#")[0]
        if file not in pages:
            pages[file] = (folder / file).is_file()
        return address if pages[file] else None

    return link


# -- parts of the page ---------------------------------------------------------------------------------------------


def _about(block: Block, circuit: Circuit, words: Sequence[str]) -> dict[str, Any]:
    sizes = block.get("circuit") or {}
    n_of_role = {role: sizes.get(role, sum(f.role == role for f in circuit.features)) for role in ROLES}
    rows: list[list[str | Cell]] = [
        [f"{role} features: {_ROLE_DESCRIPTIONS[role]}", str(n_of_role[role])] for role in ROLES
    ]
    for key, name, form in _CIRCUIT_ROWS:
        if sizes.get(key) is not None:
            rows.append([name, shown(sizes[key], form)])
    for features, share in (sizes.get("share_of_mass") or {}).items():
        name = f"of the activation at onsets and control positions: {_FEATURE_SET_NAMES[features]}"
        rows.append([name, shown(share, as_share=True)])
    if sizes.get("by_layer"):
        rows.append(["features by layer", visible_text(", ".join(map(str, sizes["by_layer"])))])
    for split, m in (block.get("moments") or {}).items():
        counts = f"{count(m.get('moments'))} onsets, {count(m.get('boundaries'))} control positions"
        if alike := (block.get("begins_alike") or {}).get(split):
            counts += f" ({count(alike)} of them before something else that begins alike)"
        rows.append([f"{visible_text(split)} split", f"{counts} in {count(m.get('documents'))} documents"])
    if engine := block.get("engine"):
        own = ", ".join(engine["by_our_own"])
        by = f"{engine['name']} in {engine['dtype']}" + (f"; by our own engine: {own}" if own else "")
        rows.append(["problems answered by", visible_text(by)])
    return {
        "words": [visible_text(word) for word in words[:MAX_SHOWN_WORDS]],
        "more_words": len(words) - MAX_SHOWN_WORDS,
        "function": visible_text(str(block.get("function") or "")),
        "rows": rows,
    }


def _criteria_rows(block: Block) -> list[list[str | Cell]]:
    return [
        [
            visible_text(str(c["name"])),
            shown(c.get("value")),
            shown(c.get("bar")),
            Cell("missed", strong=True) if c.get("reached") is False else OUTCOME_NAMES[c.get("reached")],
        ]
        for c in block.get("criteria") or []
    ]


def _diagram(circuit: Circuit, store: FeatureStore | None, link: Link, onsets: Block) -> dict[str, Any]:
    """The drawing of the circuit and what is said above it."""
    if not circuit.features:
        why = ""
        if onsets.get("moments") is not None:
            n, documents = count(onsets["moments"]), count(onsets.get("documents"))
            why = f" The model's {documents} answers of the {visible_text(circuit.split)} split hold {n} onsets"
            if not onsets["moments"]:
                why += ": the model never shows the behavior, so no circuit can be searched."
            else:
                why += f"; a circuit is searched for from {FEWEST_ONSETS} onsets on."
        return {"drawing": None, "text": f"No feature was found.{why}"}
    edges = f"the {min(MAX_SHOWN_EDGES, len(circuit.edges))} strongest of {len(circuit.edges):,} edges are drawn"
    text = (
        "The area of a dot is the feature's total effect on the word's log-odds; the dot is hollow where the feature "
        f"lowers them. Of each role at most {MAX_SHOWN_PER_ROLE} features are drawn, and "
        f"{edges if circuit.edges else 'edges were not measured'}; a dashed edge has a negative weight. Hover over a "
        "feature for its label, and click it for its page."
    )
    return {"drawing": draw_circuit(circuit, store, link), "text": text}


def _features(circuit: Circuit, store: FeatureStore | None, link: Link) -> dict[str, Any]:
    chosen = sorted(circuit.features, key=lambda f: -size(f.total))[:MAX_TABLE_FEATURES]
    known = known_features(store, [f.id for f in chosen])
    rows = [
        {
            "name": f"{f.id.layer}.{f.id.index}",
            "address": link(f.id),
            "cells": [f.role, *map(signed, f.effects), short(f.activation)],
            **_examples(known.get(f.id)),
        }
        for f in chosen
    ]
    header = ["feature", "role", *EFFECT_NAMES, "activation"]
    header += ["top logits", "top examples"] if store is not None else []
    return {"shown": len(chosen), "total": len(circuit), "header": header, "rows": rows, "stored": store is not None}


def _examples(feature: Feature | None) -> dict[str, Any]:
    """The label, top logits and top activating examples of a feature; empty without its record."""
    if feature is None:
        return {"label": "", "top_logits": [], "examples": []}
    return {
        "label": visible_text(feature.label.text) if feature.label is not None else "",
        "top_logits": [visible_text(token) for token, _ in feature.top_logits[:4]],
        "examples": [_excerpt(example) for example in feature.top_examples[:2]],
    }


def _excerpt(example: Example) -> list[tuple[str, bool]]:
    """The text around the token of an example, in pieces, and for each whether it is that token."""
    start, at, texts = max(0, example.token_index - 10), example.token_index, example.display_texts
    pieces = (("".join(texts[start:at]), False), (texts[at], True), ("".join(texts[at + 1 : at + 5]), False))
    return [(visible_text(piece), marked) for piece, marked in pieces]


def _generation(example: Block, words: Sequence[str]) -> dict[str, Any]:
    """The answers to one problem by condition, with the words or the given places highlighted."""
    answers = {name: text for name, text in example.items() if name != "question" and isinstance(text, str)}
    spans = example.get("places") or {
        name: [match.span() for match in word_pattern(words).finditer(text)] if words else []
        for name, text in answers.items()
    }
    boxes = [(condition_name(name), "", highlight_spans(text, spans.get(name) or [])) for name, text in answers.items()]
    return {"question": str(example.get("question", "")), "boxes": boxes}
