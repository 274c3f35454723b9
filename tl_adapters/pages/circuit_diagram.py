"""A circuit as a drawing: its features by role and layer, and the effects among them and on the word."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.circuits.circuit import ROLES, Circuit, CircuitEdge, CircuitFeature, Role
from tl_adapters.features.feature import VISIBLE_WHITESPACE, Feature
from tl_adapters.features.store import FeatureStore
from tl_adapters.utils.html import escape

SHOWN_EDGES, SHOWN_PER_ROLE = 80, 60
Link = Callable[[FeatureId], str | None]
"""A feature to the address of its page, or None."""
WIDTH, TOP, LEFT, RIGHT, STEP = 1040.0, 34.0, 60.0, 130.0, 22.0
"""Of the drawing, its margins, and from one dot to the next."""
_COLUMN_WIDTHS: dict[Role, float] = {"template": 1.2, "output": 1.2, "continuation": 1.0, "other": 0.6, "suppress": 0.8}
_COLOURS = {
    "template": "#0969da",
    "output": "#d1570c",
    "continuation": "#1a7f37",
    "other": "#6e7781",
    "suppress": "#8250df",
}


def draw_circuit(circuit: Circuit, store: FeatureStore | None, link: Link) -> str:
    """The circuit as SVG: a column for each role, layers from the bottom up, the word at the right.

    A feature's area is the size of its total effect, an edge's width that of its weight, dashed where it lowers. The
    strongest edges and features are drawn; hovering says what a feature is.

    Args:
        circuit: to draw.
        store: of its adapters, for labels and promoted tokens.
        link: a feature to the address of its page, or None.
    """
    edges = sorted(circuit.edges, key=lambda e: -size(e.weight))[:SHOWN_EDGES]
    features = _drawn_features(circuit, {end for e in edges for end in (e.source, e.target) if end is not None})
    known = known_features(store, [f.id for f in features])
    plan = _planned(features)
    word = (WIDTH - 104.0, max(60.0, (TOP + plan.bottom) / 2))
    colours = {f.id: _COLOURS[f.role] for f in features}
    heaviest = max((size(e.weight) for e in edges), default=0.0) or 1.0
    curves = [
        _curve(edge, plan.places[edge.source], plan.places.get(edge.target, word), colours[edge.source], heaviest)
        for edge in edges
        if edge.source in plan.places and (edge.target is None or edge.target in plan.places)
    ]
    largest = max((size(f.total) for f in features), default=0.0) or 1.0
    dots = [_dot(f, plan.places[f.id], largest, known.get(f.id), link(f.id)) for f in features]
    return (
        f'<svg class="circuit" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {max(plan.bottom, 90):.0f}" '
        f'role="img" aria-label="the circuit" font-family="system-ui, sans-serif" font-size="12">{"".join(curves)}'
        f"{''.join(plan.texts)}{_word(circuit, word)}{''.join(dots)}</svg>"
    )


@dataclass(frozen=True)
class _Plan:
    """Where everything stands."""

    places: dict[FeatureId | None, tuple[float, float]]
    """Middle of each feature's dot."""
    texts: list[str]
    """Names of layers and roles, and the lines between layers."""
    bottom: float
    """Height that is used."""


def _planned(features: Sequence[CircuitFeature]) -> _Plan:
    """A column for each role that is there, wide enough for what it usually holds; as many lines as a layer needs."""
    held = {f.role for f in features}
    roles: list[Role] = [role for role in _COLUMN_WIDTHS if role in held]
    unit = (WIDTH - LEFT - RIGHT) / max(1e-9, sum(_COLUMN_WIDTHS[role] for role in roles))
    places: dict[FeatureId | None, tuple[float, float]] = {}
    y, texts = TOP, []
    for layer in sorted({f.id.layer for f in features}, reverse=True):
        top, lines, left = y, 1, LEFT
        for role in roles:
            room = unit * _COLUMN_WIDTHS[role]
            per_line = max(1, int((room - 40) // STEP))
            here = [f for f in features if f.role == role and f.id.layer == layer]
            for i, f in enumerate(here):
                columns = min(per_line, len(here))
                x = left + room / 2 + (i % per_line - (columns - 1) / 2) * STEP
                places[f.id] = (x, top + 14 + STEP * (i // per_line))
            lines = max(lines, math.ceil(len(here) / per_line))
            left += room
        y = top + STEP * lines + 8
        texts.append(f'<text x="4" y="{top + 18:.0f}" fill="#57606a">layer {layer}</text>')
        texts.append(f'<line x1="0" y1="{y - 1:.0f}" x2="{WIDTH - RIGHT:.0f}" y2="{y - 1:.0f}" stroke="#eaeef2"/>')
    left = LEFT
    for role in roles:
        middle = left + unit * _COLUMN_WIDTHS[role] / 2
        texts.append(f'<text x="{middle:.0f}" y="16" text-anchor="middle" fill="{_COLOURS[role]}">{role}</text>')
        left += unit * _COLUMN_WIDTHS[role]
    return _Plan(places, texts, y)


def _word(circuit: Circuit, place: tuple[float, float]) -> str:
    said = ", ".join(circuit.words) or circuit.behavior
    name = said if len(said) <= 14 else said[:13] + "…"
    return (
        f'<g><title>{shown_text(said)}</title><rect x="{place[0]:.0f}" y="{place[1] - 15:.0f}" width="100" height="30" '
        f'rx="6" fill="#ffe28a" stroke="#d4a72c"/><text x="{place[0] + 50:.0f}" y="{place[1] + 5:.0f}" '
        f'text-anchor="middle" font-weight="600">{shown_text(name)}</text></g>'
    )


def _curve(
    edge: CircuitEdge, start: tuple[float, float], stop: tuple[float, float], colour: str, heaviest: float
) -> str:
    (x1, y1), (x2, y2) = start, stop
    bend, share = max(30.0, abs(x2 - x1) / 2), size(edge.weight) / heaviest
    dash = ' stroke-dasharray="4 3"' if edge.weight < 0 else ""
    end = "the word" if edge.target is None else _name(edge.target)
    return (
        f'<path d="M{x1:.1f},{y1:.1f} C{x1 + bend:.1f},{y1:.1f} {x2 - bend:.1f},{y2:.1f} {x2:.1f},{y2:.1f}" '
        f'fill="none" stroke="{colour}" stroke-width="{0.5 + 3.5 * share:.2f}" '
        f'stroke-opacity="{0.2 + 0.4 * share:.2f}"{dash}>'
        f"<title>{_name(edge.source)} → {end}: {signed(edge.weight)}</title></path>"
    )


def _drawn_features(circuit: Circuit, ends: Collection[FeatureId]) -> list[CircuitFeature]:
    """Of each role the features on a drawn edge, then the strongest."""
    found: list[CircuitFeature] = []
    for role in ROLES:
        of_role = [f for f in circuit.features if f.role == role]
        of_role.sort(key=lambda f: (f.id not in ends, -size(f.total)))
        found += of_role[:SHOWN_PER_ROLE]
    return sorted(found, key=lambda f: f.id)


def _dot(
    f: CircuitFeature, place: tuple[float, float], largest: float, known: Feature | None, address: str | None
) -> str:
    radius = 3 + 7 * math.sqrt(size(f.total) / largest)
    said = [f"{_name(f.id)} · {f.role}"]
    if known is not None and known.label is not None:
        said.append(known.label.text)
    if known is not None:
        said.append("promotes " + " ".join(repr(token) for token, _ in known.top_logits[:6]))
    said.append(f"total {signed(f.total)}, direct {signed(f.direct)}, through output {signed(f.through)}")
    hollow = f'fill="#fff" stroke="{_COLOURS[f.role]}" stroke-width="1.5"'
    filled = f'fill="{_COLOURS[f.role]}" stroke="#fff"'
    dot = (
        f'<circle cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="{radius:.1f}" {hollow if f.sign < 0 else filled}>'
        f"<title>{shown_text(chr(10).join(said), keep_lines=True)}</title></circle>"
    )
    return dot if address is None else f'<a href="{escape(address)}">{dot}</a>'


def shown_text(text: str, keep_lines: bool = False) -> str:
    """Escaped, and what would not be seen made visible."""
    signs = VISIBLE_WHITESPACE if not keep_lines else {}
    shown = text.translate({k: v for k, v in signs.items() if k != ord(" ")})
    return escape(shown.replace("\x00", "\N{REPLACEMENT CHARACTER}")).encode("utf-8", "replace").decode()


def _name(id: FeatureId) -> str:
    return f"{id.layer}.{id.index}"


def size(value: float) -> float:
    """How large, for sorting and sizes; 0 for NaN."""
    return abs(value) if math.isfinite(value) else 0.0


def signed(value: float) -> str:
    """With its sign, or - where it is not known."""
    return f"{value:+.3g}" if math.isfinite(value) else "-"


def known_features(store: FeatureStore | None, ids: Sequence[FeatureId]) -> dict[FeatureId, Feature]:
    """What the store knows of these; not of a layer that it does not have."""
    if store is None:
        return {}
    return {f.id: f for f in store.features(sorted(id for id in ids if id.layer in store.about.layers))}
