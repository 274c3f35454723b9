"""The most influential part of an attribution graph as an SVG diagram, which a notebook shows without a server."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup

from tl_adapters.attribution.graph import AttributionGraph
from tl_adapters.attribution.pruning import influence
from tl_adapters.features.feature import VISIBLE_WHITESPACE
from tl_adapters.utils.html import render
from tl_adapters.utils.renamed import renamed_arguments

MAX_SHOWN_FEATURES, MAX_SHOWN_TOKENS, MAX_SHOWN_CONNECTIONS = 30, 12, 90
"""Features, tokens and edges that a diagram of a graph shows at most: the most influential ones."""
GRAPH_CAPTION = (
    "The features and tokens with the most influence on the targets, and the largest edges among them; dashed "
    "edges are negative. Hover to read a node or an edge. write_graph makes the page of the whole graph."
)
"""What a notebook says below the diagram."""
_DOT, _ROW, _MARGIN, _NAMES = 18, 46, 34, 66
"""Distance of two dots of one place, of two rows, margin at the top, and width of the rows' names, in SVG units."""
_NARROWEST_COLUMN, _MAX_NAME = 56, 8
"""Width of a column with one dot, and characters of a token that fit in it."""


@renamed_arguments(n_features="max_features")
def draw_graph(graph: AttributionGraph, max_features: int = MAX_SHOWN_FEATURES) -> Markup:
    """An attribution graph as SVG: a column for each token, layers from the bottom up, the targets at the top.

    The features, tokens and errors with the most influence on the targets are shown, with the edges among them that
    have the largest weights. The area of a dot is its influence, and the width of an edge its weight; negative edges
    are dashed. Labels appear on hovering.

    Args:
        graph: the graph; it is not changed.
        max_features: the largest number of features (and errors) that are shown.

    Raises:
        GraphError: the graph is not acyclic.
    """
    scores = influence(graph)
    shown = _shown_nodes(graph, scores, max_features)
    layout = _layout(graph, shown)
    among = torch.zeros(graph.n_nodes, dtype=torch.bool)
    among[shown] = True
    edges = (among[graph.edges[0]] & among[graph.edges[1]]).nonzero()[:, 0]
    edges = edges[graph.weights[edges].abs().argsort(descending=True)[:MAX_SHOWN_CONNECTIONS]]
    largest = float(graph.weights[edges].abs().max()) if len(edges) else 1.0
    most = max((float(scores[node]) for node in shown), default=0.0) or 1.0
    return render(
        "notebook/graph.svg.j2",
        width=layout.width,
        height=layout.height,
        rows=layout.rows,
        columns=layout.columns,
        curves=[_curve(graph, int(edge), layout, largest or 1.0) for edge in edges],
        dots=[_dot(graph, node, layout.centers[node], float(scores[node]) / most) for node in shown],
    )


def _shown_nodes(graph: AttributionGraph, scores: torch.Tensor, max_features: int) -> list[int]:
    """Numbers of the nodes to show: all targets, and the features, errors and tokens with the most influence."""

    def best(start: int, stop: int, n: int) -> list[int]:
        of_kind = scores[start:stop]
        return [start + int(i) for i in of_kind.topk(min(n, stop - start)).indices if of_kind[i] > 0]

    targets = range(graph.first_target, graph.n_nodes)
    tokens = best(graph.first_token, graph.first_target, MAX_SHOWN_TOKENS)
    return sorted([*best(0, graph.first_token, max_features), *tokens, *targets])


@dataclass(frozen=True)
class _Layout:
    """Positions of everything in the diagram."""

    centers: dict[int, tuple[float, float]]
    """Node number -> center of its dot."""
    columns: list[tuple[int, str, str]]
    """For each column its middle, the token as it is drawn, and the token in words."""
    rows: list[tuple[str, int]]
    """For each row its name and its height."""
    width: int
    height: int


def _layout(graph: AttributionGraph, shown: Sequence[int]) -> _Layout:
    """A column for each position that has a node, as wide as its fullest place, and a row for each layer that has."""
    places = {node: _place(graph, node) for node in shown}
    rows = sorted({row for row, _ in places.values()}, reverse=True)
    heights = {row: _MARGIN + _ROW * i for i, row in enumerate(rows)}
    names = {-1: "tokens", graph.n_layers: "targets"}
    by_place: dict[tuple[int, int], list[int]] = {}
    for node, place in places.items():
        by_place.setdefault(place, []).append(node)
    centers: dict[int, tuple[float, float]] = {}
    columns, left = [], float(_NAMES)
    for position in sorted({position for _, position in places.values()}):
        cells = {row: nodes for (row, at), nodes in by_place.items() if at == position}
        distances = {row: _NARROWEST_COLUMN if row == graph.n_layers else _DOT for row in cells}
        width = max(_NARROWEST_COLUMN, *(len(nodes) * distances[row] + 8 for row, nodes in cells.items()))
        for row, nodes in cells.items():
            for i, node in enumerate(nodes):
                centers[node] = (left + width / 2 + (i - (len(nodes) - 1) / 2) * distances[row], heights[row])
        token = graph.display_strings[position].translate(VISIBLE_WHITESPACE)
        columns.append((round(left + width / 2), _short(token), f"token {position}: {token}"))
        left += width
    return _Layout(
        centers=centers,
        columns=columns,
        rows=[(names.get(row, f"layer {row}"), heights[row]) for row in rows],
        width=round(left + 12),
        height=round(max(heights.values(), default=0) + 40),
    )


def _place(graph: AttributionGraph, node: int) -> tuple[int, int]:
    """Row (the layer; -1 for tokens, the number of layers for targets) and position of a node."""
    if node >= graph.first_target:
        return graph.n_layers, graph.targets[node - graph.first_target].position
    if node >= graph.first_token:
        return -1, node - graph.first_token
    nodes = graph.features if node < len(graph.features) else graph.errors
    layer, position = nodes[node - (0 if node < len(graph.features) else len(graph.features))][:2].tolist()
    return layer, position


def _curve(graph: AttributionGraph, edge: int, layout: _Layout, largest: float) -> dict[str, Any]:
    target, source = (int(node) for node in graph.edges[:, edge])
    (x1, y1), (x2, y2) = layout.centers[source], layout.centers[target]
    weight, bend = float(graph.weights[edge]), (y1 - y2) / 2
    share = abs(weight) / largest
    return {
        "path": f"M{x1:.1f},{y1:.1f} C{x1:.1f},{y1 - bend:.1f} {x2:.1f},{y2 + bend:.1f} {x2:.1f},{y2:.1f}",
        "negative": weight < 0,
        "width": f"{0.5 + 3.5 * share:.2f}",
        "opacity": f"{0.25 + 0.5 * share:.2f}",
        "title": f"{_title(graph, source)} → {_title(graph, target)}: {weight:+.3g}",
    }


def _dot(graph: AttributionGraph, node: int, center: tuple[float, float], share: float) -> dict[str, Any]:
    is_target = node >= graph.first_target
    return {
        "kind": _kind(graph, node),
        "x": f"{center[0]:.1f}",
        "y": f"{center[1]:.1f}",
        "radius": f"{3 + 5 * math.sqrt(max(0.0, share)):.1f}",
        "name": _short(_title(graph, node)) if is_target else "",
        "title": _title(graph, node) if is_target else f"{_title(graph, node)}; {share:.0%} of the largest influence",
    }


def _kind(graph: AttributionGraph, node: int) -> str:
    if node >= graph.first_target:
        return "target"
    if node >= graph.first_token:
        return "token"
    return "feature" if node < len(graph.features) else "error"


def _title(graph: AttributionGraph, node: int) -> str:
    name = graph.node_name(node).translate({k: v for k, v in VISIBLE_WHITESPACE.items() if k != ord(" ")})
    probability = graph.targets[node - graph.first_target].probability if node >= graph.first_target else None
    return name if probability is None else f"{name} {probability:.0%}"


def _short(text: str) -> str:
    return text if len(text) <= _MAX_NAME else text[: _MAX_NAME - 1] + "…"
