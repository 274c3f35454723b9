"""A circuit as an SVG diagram: features by role and layer, with their effects on each other and on the word."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.circuits.circuit import ROLES, Circuit, CircuitEdge, CircuitFeature, Role
from tl_adapters.features.feature import VISIBLE_WHITESPACE, Feature
from tl_adapters.features.store import FeatureStore
from tl_adapters.utils.html import render

MAX_SHOWN_EDGES, MAX_SHOWN_PER_ROLE = 80, 60
"""Edges in the diagram, and features of each role."""
Link = Callable[[FeatureId], str | None]
"""A function from a feature to the address of its page, or None."""
CIRCUIT_CAPTION = (
    "A column for each role, layers from the bottom up. The area of a dot is its total effect, a hollow dot lowers the "
    "word; dashed edges are negative. Hover to read a feature. The strongest features and edges are shown."
)
"""What a notebook says below the diagram."""
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


def no_pages(_: FeatureId) -> None:
    """The `Link` of a drawing without pages: every address is None."""


def draw_circuit(circuit: Circuit, store: FeatureStore | None = None, link: Link = no_pages) -> Markup:
    """The circuit as SVG: a column for each role, layers from the bottom up, the word at the right.

    The area of a dot is the size of the feature's total effect, and the width of an edge that of its weight; negative
    edges are dashed. Only the strongest edges and features are shown. Labels appear on hovering.

    Args:
        circuit: the circuit to show.
        store: feature store of its adapters, for labels and top logits; None shows neither.
        link: a function from a feature to the address of its page, or None; by default there are no pages.

    Raises FeatureStoreError for a feature that the store does not have in a layer that it has.
    """
    edges = sorted(circuit.edges, key=lambda e: -size(e.weight))[:MAX_SHOWN_EDGES]
    features = _shown_features(circuit, {end for e in edges for end in (e.source, e.target) if end is not None})
    known = known_features(store, [f.id for f in features])
    layout = _layout(features)
    word = (WIDTH - 104.0, max(60.0, (TOP + layout.bottom) / 2))
    roles = {f.id: f.role for f in features}
    heaviest = max((size(e.weight) for e in edges), default=0.0) or 1.0
    curves = [
        _curve(edge, layout.centers[edge.source], layout.centers.get(edge.target, word), roles[edge.source], heaviest)
        for edge in edges
        if edge.source in layout.centers and (edge.target is None or edge.target in layout.centers)
    ]
    largest = max((size(f.total) for f in features), default=0.0) or 1.0
    words = ", ".join(circuit.words) or circuit.behavior
    return render(
        "circuit/diagram.svg.j2",
        width=round(WIDTH),
        height=round(max(layout.bottom, 90)),
        right=round(WIDTH - RIGHT),
        layers=layout.layers,
        roles=layout.roles,
        curves=curves,
        word={"x": round(word[0]), "y": round(word[1]), "title": visible_text(words),
              "name": visible_text(words if len(words) <= 14 else words[:13] + "…")},
        dots=[_dot(f, layout.centers[f.id], largest, known.get(f.id), link(f.id)) for f in features],
    )  # fmt: skip


@dataclass(frozen=True)
class _Layout:
    """Positions of everything in the diagram."""

    centers: dict[FeatureId | None, tuple[float, float]]
    """Center of each feature's dot."""
    layers: list[tuple[str, int, int]]
    """For each layer its name, the height at which it is written, and that of the line below the layer."""
    roles: list[tuple[Role, int, str]]
    """For each role its name, the middle of its column, and its color."""
    bottom: float
    """Height of the diagram."""


def _layout(features: Sequence[CircuitFeature]) -> _Layout:
    """A column for each role of the circuit, and as many lines per layer as its fullest column needs."""
    present = {f.role for f in features}
    roles: list[Role] = [role for role in _COLUMN_WIDTHS if role in present]
    unit = (WIDTH - LEFT - RIGHT) / max(1e-9, sum(_COLUMN_WIDTHS[role] for role in roles))
    centers: dict[FeatureId | None, tuple[float, float]] = {}
    y, layers = TOP, []
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
        layers.append((f"layer {layer}", round(top + 18), round(y - 1)))
    left, titles = LEFT, []
    for role in roles:
        titles.append((role, round(left + unit * _COLUMN_WIDTHS[role] / 2), _COLORS[role]))
        left += unit * _COLUMN_WIDTHS[role]
    return _Layout(centers, layers, titles, y)


def _curve(
    edge: CircuitEdge, start: tuple[float, float], stop: tuple[float, float], role: Role, heaviest: float
) -> dict[str, Any]:
    (x1, y1), (x2, y2) = start, stop
    bend, share = max(30.0, abs(x2 - x1) / 2), size(edge.weight) / heaviest
    end = "the word" if edge.target is None else _name(edge.target)
    return {
        "path": f"M{x1:.1f},{y1:.1f} C{x1 + bend:.1f},{y1:.1f} {x2 - bend:.1f},{y2:.1f} {x2:.1f},{y2:.1f}",
        "color": _COLORS[role],
        "of": f"of-{role}",
        "width": f"{0.5 + 3.5 * share:.2f}",
        "opacity": f"{0.2 + 0.4 * share:.2f}",
        "dashed": edge.weight < 0,
        "title": f"{_name(edge.source)} → {end}: {signed(edge.weight)}",
    }


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
) -> dict[str, Any]:
    lines = [f"{_name(f.id)} · {f.role}"]
    if known is not None and known.label is not None:
        lines.append(known.label.text)
    if known is not None:
        lines.append("top logits " + " ".join(repr(token) for token, _ in known.top_logits[:6]))
    lines.append(f"total {signed(f.total)}, direct {signed(f.direct)}, through output {signed(f.through)}")
    return {
        "x": f"{center[0]:.1f}",
        "y": f"{center[1]:.1f}",
        "radius": f"{3 + 7 * math.sqrt(size(f.total) / largest):.1f}",
        "color": _COLORS[f.role],
        "of": f"of-{f.role}",
        "hollow": f.sign < 0,
        "title": "\n".join(lines),
        "address": address,
    }


def visible_text(text: str) -> str:
    """The text with signs for whitespace other than spaces."""
    return text.translate({k: v for k, v in VISIBLE_WHITESPACE.items() if k != ord(" ")})


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
