"""A circuit as an SVG diagram: features by role and layer, with their effects on each other and on the word."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.circuits.circuit import ROLES, Circuit, CircuitEdge, CircuitFeature, Role
from tl_adapters.features.feature import VISIBLE_WHITESPACE, Feature
from tl_adapters.features.store import FeatureStore
from tl_adapters.utils.html import escape

MAX_SHOWN_EDGES, MAX_SHOWN_PER_ROLE = 80, 60
"""Edges in the diagram, and features of each role."""
Link = Callable[[FeatureId], str | None]
"""A function from a feature to the address of its page, or None."""
WIDTH, TOP, LEFT, RIGHT, DOT_DISTANCE = 1040.0, 34.0, 60.0, 130.0, 22.0
"""Width of the diagram, its margins, and the distance of two dots, in SVG units."""
_COLUMN_WIDTHS: dict[Role, float] = {"template": 1.2, "output": 1.2, "continuation": 1.0, "other": 0.6, "suppress": 0.8}
_COLORS = {
    "template": "#0969da",
    "output": "#d1570c",
    "continuation": "#1a7f37",
    "other": "#6e7781",
    "suppress": "#8250df",
}


def draw_circuit(circuit: Circuit, store: FeatureStore | None, link: Link) -> str:
    """The circuit as SVG: a column for each role, layers from the bottom up, the word at the right.

    The area of a dot is the size of the feature's total effect, and the width of an edge that of its weight; negative
    edges are dashed. Only the strongest edges and features are shown. Labels appear on hovering.

    Args:
        circuit: the circuit to show.
        store: feature store of its adapters, for labels and top logits.
        link: a function from a feature to the address of its page, or None.
    """
    edges = sorted(circuit.edges, key=lambda e: -size(e.weight))[:MAX_SHOWN_EDGES]
    features = _shown_features(circuit, {end for e in edges for end in (e.source, e.target) if end is not None})
    known = known_features(store, [f.id for f in features])
    layout = _layout(features)
    word = (WIDTH - 104.0, max(60.0, (TOP + layout.bottom) / 2))
    colors = {f.id: _COLORS[f.role] for f in features}
    heaviest = max((size(e.weight) for e in edges), default=0.0) or 1.0
    curves = [
        _curve(edge, layout.centers[edge.source], layout.centers.get(edge.target, word), colors[edge.source], heaviest)
        for edge in edges
        if edge.source in layout.centers and (edge.target is None or edge.target in layout.centers)
    ]
    largest = max((size(f.total) for f in features), default=0.0) or 1.0
    dots = [_dot(f, layout.centers[f.id], largest, known.get(f.id), link(f.id)) for f in features]
    return (
        f'<svg class="circuit" xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 {WIDTH:.0f} {max(layout.bottom, 90):.0f}" role="img" '
        f'aria-label="the circuit" font-family="system-ui, sans-serif" font-size="12">{"".join(curves)}'
        f"{''.join(layout.texts)}{_word(circuit, word)}{''.join(dots)}</svg>"
    )


@dataclass(frozen=True)
class _Layout:
    """Positions of everything in the diagram."""

    centers: dict[FeatureId | None, tuple[float, float]]
    """Center of each feature's dot."""
    texts: list[str]
    """Names of layers and roles, and the lines between layers."""
    bottom: float
    """Height of the diagram."""


def _layout(features: Sequence[CircuitFeature]) -> _Layout:
    """A column for each role of the circuit, and as many lines per layer as its fullest column needs."""
    present = {f.role for f in features}
    roles: list[Role] = [role for role in _COLUMN_WIDTHS if role in present]
    unit = (WIDTH - LEFT - RIGHT) / max(1e-9, sum(_COLUMN_WIDTHS[role] for role in roles))
    centers: dict[FeatureId | None, tuple[float, float]] = {}
    y, texts = TOP, []
    for layer in sorted({f.id.layer for f in features}, reverse=True):
        top, lines, left = y, 1, LEFT
        for role in roles:
            width = unit * _COLUMN_WIDTHS[role]
            per_line = max(1, int((width - 40) // DOT_DISTANCE))
            in_cell = [f for f in features if f.role == role and f.id.layer == layer]
            for i, f in enumerate(in_cell):
                columns = min(per_line, len(in_cell))
                x = left + width / 2 + (i % per_line - (columns - 1) / 2) * DOT_DISTANCE
                centers[f.id] = (x, top + 14 + DOT_DISTANCE * (i // per_line))
            lines = max(lines, math.ceil(len(in_cell) / per_line))
            left += width
        y = top + DOT_DISTANCE * lines + 8
        texts.append(f'<text x="4" y="{top + 18:.0f}" fill="#57606a">layer {layer}</text>')
        texts.append(f'<line x1="0" y1="{y - 1:.0f}" x2="{WIDTH - RIGHT:.0f}" y2="{y - 1:.0f}" stroke="#eaeef2"/>')
    left = LEFT
    for role in roles:
        middle = left + unit * _COLUMN_WIDTHS[role] / 2
        texts.append(f'<text x="{middle:.0f}" y="16" text-anchor="middle" fill="{_COLORS[role]}">{role}</text>')
        left += unit * _COLUMN_WIDTHS[role]
    return _Layout(centers, texts, y)


def _word(circuit: Circuit, position: tuple[float, float]) -> str:
    words = ", ".join(circuit.words) or circuit.behavior
    name = words if len(words) <= 14 else words[:13] + "…"
    x, y = position
    return (
        f'<g><title>{visible_text(words)}</title><rect x="{x:.0f}" y="{y - 15:.0f}" width="100" height="30" rx="6" '
        f'fill="#ffe28a" stroke="#d4a72c"/><text x="{x + 50:.0f}" y="{y + 5:.0f}" '
        f'text-anchor="middle" font-weight="600">{visible_text(name)}</text></g>'
    )


def _curve(
    edge: CircuitEdge, start: tuple[float, float], stop: tuple[float, float], color: str, heaviest: float
) -> str:
    (x1, y1), (x2, y2) = start, stop
    bend, share = max(30.0, abs(x2 - x1) / 2), size(edge.weight) / heaviest
    dash = ' stroke-dasharray="4 3"' if edge.weight < 0 else ""
    end = "the word" if edge.target is None else _name(edge.target)
    return (
        f'<path d="M{x1:.1f},{y1:.1f} C{x1 + bend:.1f},{y1:.1f} {x2 - bend:.1f},{y2:.1f} {x2:.1f},{y2:.1f}" '
        f'fill="none" stroke="{color}" stroke-width="{0.5 + 3.5 * share:.2f}" '
        f'stroke-opacity="{0.2 + 0.4 * share:.2f}"{dash}>'
        f"<title>{_name(edge.source)} → {end}: {signed(edge.weight)}</title></path>"
    )


def _shown_features(circuit: Circuit, ends: Collection[FeatureId]) -> list[CircuitFeature]:
    """The features to show: of each role those on a shown edge first, then the strongest."""
    chosen: list[CircuitFeature] = []
    for role in ROLES:
        of_role = [f for f in circuit.features if f.role == role]
        of_role.sort(key=lambda f: (f.id not in ends, -size(f.total)))
        chosen += of_role[:MAX_SHOWN_PER_ROLE]
    return sorted(chosen, key=lambda f: f.id)


def _dot(
    f: CircuitFeature, center: tuple[float, float], largest: float, known: Feature | None, address: str | None
) -> str:
    radius = 3 + 7 * math.sqrt(size(f.total) / largest)
    lines = [f"{_name(f.id)} · {f.role}"]
    if known is not None and known.label is not None:
        lines.append(known.label.text)
    if known is not None:
        lines.append("top logits " + " ".join(repr(token) for token, _ in known.top_logits[:6]))
    lines.append(f"total {signed(f.total)}, direct {signed(f.direct)}, through output {signed(f.through)}")
    hollow = f'fill="#fff" stroke="{_COLORS[f.role]}" stroke-width="1.5"'
    filled = f'fill="{_COLORS[f.role]}" stroke="#fff"'
    dot = (
        f'<circle cx="{center[0]:.1f}" cy="{center[1]:.1f}" r="{radius:.1f}" {hollow if f.sign < 0 else filled}>'
        f"<title>{visible_text(chr(10).join(lines), keep_lines=True)}</title></circle>"
    )
    return dot if address is None else f'<a href="{escape(address)}">{dot}</a>'


def visible_text(text: str, keep_lines: bool = False) -> str:
    """The escaped text, with whitespace other than spaces made visible."""
    signs = VISIBLE_WHITESPACE if not keep_lines else {}
    shown = text.translate({k: v for k, v in signs.items() if k != ord(" ")})
    return escape(shown.replace("\x00", "\N{REPLACEMENT CHARACTER}")).encode("utf-8", "replace").decode()


def _name(id: FeatureId) -> str:
    return f"{id.layer}.{id.index}"


def size(value: float) -> float:
    """The absolute value; 0 for NaN and infinity."""
    return abs(value) if math.isfinite(value) else 0.0


def signed(value: float) -> str:
    """The number with its sign; "-" for NaN and infinity."""
    return f"{value:+.3g}" if math.isfinite(value) else "-"


def known_features(store: FeatureStore | None, ids: Sequence[FeatureId]) -> dict[FeatureId, Feature]:
    """The records of these features, without those of layers that the store does not have."""
    if store is None:
        return {}
    return {f.id: f for f in store.features(sorted(id for id in ids if id.layer in store.about.layers))}
