"""hesitation.html of a run: the circuit as a diagram, and the measurements of every condition.

The page is made from the block "hesitation" of results.json, circuit.json and the feature store, so it can be
written again at any time; parts that the block does not hold are left out. It is one file that loads nothing and runs
no script.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
from tl_adapters.pages.feature_pages import feature_address
from tl_adapters.utils.files import write_text
from tl_adapters.utils.html import escape, highlight_spans, page, table
from tl_adapters.utils.results import Block, plain

HESITATION_PAGE_FILE = "hesitation.html"
FEATURE_PAGES_FOLDER = "features/pages"
"""Folder of the feature pages within a run."""
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
    """Writes hesitation.html into a run folder and returns its path.

    Args:
        folder: the run folder; features are linked to their pages if the folder has them.
        block: the block "hesitation" of results.json; sections that it has no measurements for are left out.
        circuit: the circuit of the run.
        store: labels, top logits and examples of the features; a store of other adapters is ignored.
        examples: answers to show side by side: "question", and the answer of each condition by its name. An optional
            "places" holds, for each condition, the (start, stop) of characters to highlight instead of the words.

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
        _diagram(circuit, store, link, (block.get("moments") or {}).get(circuit.split) or {}),
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
        _features(circuit, store, link),
        _generations(examples, words),
    ]
    path = folder / HESITATION_PAGE_FILE
    body = _STYLE + "\n".join(filter(None, sections))
    write_text(path, page(f"The {circuit.behavior} circuit", body.encode("utf-8", "replace").decode()))
    return path


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


# -- sections ------------------------------------------------------------------------------------------------------


def _head(block: Block, circuit: Circuit, words: Sequence[str]) -> str:
    sizes = block.get("circuit") or {}
    marked_words = ", ".join(f"<mark>{visible_text(word)}</mark>" for word in words[:MAX_SHOWN_WORDS])
    marked_words += f" and {len(words) - MAX_SHOWN_WORDS:,} more" if len(words) > MAX_SHOWN_WORDS else ""
    function = block.get("function")
    does = f"say {marked_words}" if marked_words else f"do what is called {visible_text(circuit.behavior)}"
    does += f" (found by the function <code>{visible_text(str(function))}</code>)" if function else ""
    n_of_role = {role: sizes.get(role, sum(f.role == role for f in circuit.features)) for role in ROLES}
    rows = [[f"{role} features: {_ROLE_DESCRIPTIONS[role]}", str(n)] for role, n in n_of_role.items()]
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
    return (
        f'<p class="soft"><a href="report.html">← report</a></p><h1>The {visible_text(circuit.behavior)} circuit</h1>'
        f'<p class="soft">Which features make the model {does}, and what it does without them. Found on the '
        f"{visible_text(circuit.split)} split, measured on another. An <i>onset</i> is a position whose next token "
        "begins the word; a <i>control position</i> matches it and begins something else. Intervals are 95 % intervals "
        f"over documents or problems.</p>{table(['the circuit', ''], rows)}"
    )


def _criteria(block: Block) -> str:
    if not block.get("criteria"):
        return ""
    rows = [
        [
            visible_text(str(c["name"])),
            shown(c.get("value")),
            shown(c.get("bar")),
            "<b>missed</b>" if c.get("reached") is False else OUTCOME_NAMES[c.get("reached")],
        ]
        for c in block["criteria"]
    ]
    return "<h2>Criteria</h2>" + table(["criterion", "measured", "threshold", ""], rows)


def _diagram(circuit: Circuit, store: FeatureStore | None, link: Link, onsets: Block) -> str:
    if not circuit.features:
        why = ""
        if onsets.get("moments") is not None:
            n, documents = count(onsets["moments"]), count(onsets.get("documents"))
            why = f" The model's {documents} answers of the {visible_text(circuit.split)} split hold {n} onsets"
            if not onsets["moments"]:
                why += ": the model never shows the behavior, so no circuit can be searched."
            else:
                why += f"; a circuit is searched for from {FEWEST_ONSETS} onsets on."
        return f"<h2>The circuit</h2><p>No feature was found.{why}</p>"
    edges = f"the {min(MAX_SHOWN_EDGES, len(circuit.edges))} strongest of {len(circuit.edges):,} edges are drawn"
    text = (
        "<p>Area: total effect on the word's log-odds; hollow where it lowers them. Of each role at most "
        f"{MAX_SHOWN_PER_ROLE} features, and {edges if circuit.edges else 'edges were not measured'}; dashed edges "
        "lower. Hover over a feature for its label, click it for its page.</p>"
    )
    return f"<h2>The circuit</h2>{text}{draw_circuit(circuit, store, link)}"


def _features(circuit: Circuit, store: FeatureStore | None, link: Link) -> str:
    if not circuit.features:
        return ""
    chosen = sorted(circuit.features, key=lambda f: -size(f.total))[:MAX_TABLE_FEATURES]
    known, rows = known_features(store, [f.id for f in chosen]), []
    for f in chosen:
        name = f"{f.id.layer}.{f.id.index}"
        address = link(f.id)
        cells = [name if address is None else f'<a href="{escape(address)}">{name}</a>', f.role]
        cells += [signed(value) for value in f.effects]
        cells.append(short(f.activation))
        if store is not None:
            cells += _label_cells(known.get(f.id))
        rows.append(cells)
    header = ["feature", "role", *EFFECT_NAMES, "activation"]
    header += ["top logits", "top examples"] if store is not None else []
    text = (
        f"<p>The {len(chosen)} of {len(circuit):,} with the largest total effect; all are in circuit.json. Effects are "
        "in nats of the word's log-odds, mean over the onsets; <i>on continuation</i>: in nats of the log-odds of the "
        "tokens after it; <i>onsets less controls</i>: total less that at control positions.</p>"
    )
    return f"<h2>Its features</h2>{text}{table(header, rows)}"


def _label_cells(feature: Feature | None) -> list[str]:
    if feature is None:
        return ["", ""]
    label = f"<small>{visible_text(feature.label.text)}</small>" if feature.label is not None else ""
    top_logits = " ".join(f"<code>{visible_text(token)}</code>" for token, _ in feature.top_logits[:4])
    return [top_logits + label, "<br>".join(f"<code>{_excerpt(e)}</code>" for e in feature.top_examples[:2])]


def _excerpt(example: Example) -> str:
    start, texts = max(0, example.token_index - 10), example.display_texts
    before, after = (
        "".join(texts[start : example.token_index]),
        "".join(texts[example.token_index + 1 : example.token_index + 5]),
    )
    return f"{visible_text(before)}<mark>{visible_text(texts[example.token_index])}</mark>{visible_text(after)}"


def _generations(examples: Sequence[Block], words: Sequence[str]) -> str:
    parts = []
    for example in examples:
        answers = {name: text for name, text in example.items() if name != "question" and isinstance(text, str)}
        spans = example.get("places") or {
            name: [match.span() for match in word_pattern(words).finditer(text)] if words else []
            for name, text in answers.items()
        }
        boxes = "".join(
            f"<div><h4>{condition_name(name)}</h4><pre>{highlight_spans(text, spans.get(name) or [])}</pre></div>"
            for name, text in answers.items()
        )
        question = escape(str(example.get("question", "")))
        parts.append(f'<p><b>{question}</b></p><div class="answers">{boxes}</div>')
    return "<h2>Answers to the same problems</h2>" + "".join(parts) if parts else ""
