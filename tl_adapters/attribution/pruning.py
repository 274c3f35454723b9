"""Which nodes and edges of an attribution graph matter? circuit-tracer's influence, pruning and scores, sparse.

Every target's incoming edges are taken as shares of their absolute sum; a source's influence is what the targets
explained owe to it along all paths, one share multiplied by the next. The graph is acyclic and its features are sorted
by layer, so one sweep from the targets down through the layers is the whole series, exactly: no matrix of nodes by
nodes, no power iteration. Everything is summed in float64, whatever the edges are kept in.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_adapters.attribution.graph import AttributionGraph, GraphError

NODE_THRESHOLD, EDGE_THRESHOLD = 0.8, 0.98
_SMALLEST_SUM = 1e-10
"""circuit-tracer's: edges of a target that sum to less than this stay small, and are not blown up to shares of one."""


@dataclass(frozen=True)
class PrunedGraph:
    """What is left of a graph; masks are in the order of its own nodes and edges."""

    node_mask: Bool[Tensor, "n_nodes"]
    """Nodes that stay; tokens and targets always do."""
    edge_mask: Bool[Tensor, "n_edges"]
    """Edges that stay, all of them between nodes that do."""
    influence: Float[Tensor, "n_nodes"]
    """In the whole graph, before anything was cut; 0 for targets, which feed nothing."""
    cumulative: Float[Tensor, "n_nodes"]
    """Share of all influence that a node and those above it hold: small is important, 1 is the last to matter."""


def influence(
    graph: AttributionGraph,
    edges: Int[Tensor, "2 n_kept"] | None = None,
    weights: Float[Tensor, "n_kept"] | None = None,
) -> Float[Tensor, "n_nodes"]:
    """What the targets owe to every node along all paths: w A + w A^2 + ..., w the targets' weights.

    Args:
        graph: its edges count by their absolute value, as shares of their target's sum.
        edges: some of the graph's edges [2, n_kept], sorted by target, to be used instead of all.
        weights: of those edges [n_kept], or other weights of all of them.

    Returns:
        [n_nodes], float64; 0 for the targets themselves.

    Raises:
        GraphError: edges without weights, values that are not finite, or edges that are not a sorted acyclic graph.
    """
    if edges is not None and weights is None:
        raise GraphError("Edges of a graph need their weights; give both.")
    edges = graph.edges if edges is None else edges
    weights = graph.weights if weights is None else weights
    _require_acyclic(graph, edges, weights)
    return _without_targets(graph, _sweep(graph, edges, _shares(graph, edges, weights)))


def prune(
    graph: AttributionGraph, node_threshold: float = NODE_THRESHOLD, edge_threshold: float = EDGE_THRESHOLD
) -> PrunedGraph:
    """Keep the nodes, then the edges between them, that hold most of the influence, as circuit-tracer does.

    Args:
        graph: not changed.
        node_threshold: nodes stay from the most influential down until they hold this share of all influence; tokens
            and targets stay anyway. 1 keeps whatever has any.
        edge_threshold: the same for edges, scored by their share of their target times the target's influence in what
            is left. Features then go that have lost all edges on either side, and errors that feed nothing, until
            nothing changes.

    Raises:
        GraphError: a threshold outside (0, 1], or no acyclic graph.
    """
    for name, threshold in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 < threshold <= 1:
            raise GraphError(f"{name} is {threshold}; it is a share of influence, above 0 and at most 1.")
    whole = influence(graph)
    nodes = whole >= _cut(whole, node_threshold)
    nodes[graph.first_token :] = True
    # positions in the graph's edges: from here on every pass reads only what is left
    places = (nodes[graph.edges[0]] & nodes[graph.edges[1]]).nonzero()[:, 0]
    scores_left = _edge_scores(graph, graph.edges[:, places], graph.weights[places])
    places = places[scores_left >= _cut(scores_left, edge_threshold)]
    nodes, places = _without_loose_ends(graph, nodes, places)
    edge_mask = torch.zeros(graph.edges.shape[1], dtype=torch.bool)
    edge_mask[places] = True
    return PrunedGraph(nodes, edge_mask, whole, _cumulative(whole))


def feature_share(graph: AttributionGraph) -> float:
    """Share of the targets' influence that passes through at least one adapter feature, 0..1.

    A target's incoming edges, by absolute value, are shares of one. Those from features begin the paths with a feature
    on them, wherever they end; those from tokens and errors are all the paths without one, since neither is fed by
    anything. The share is therefore what the targets owe directly to features, weighted with the targets' weights; a
    target without edges does not count, and of no influence at all the share is 0.

    Raises:
        GraphError: no acyclic graph.
    """
    _require_acyclic(graph, graph.edges, graph.weights)
    start = int(torch.searchsorted(graph.edges[0].contiguous(), graph.first_target))
    targets, sources = graph.edges[:, start:]
    owed = _target_weights(graph)[targets] * _shares(graph, graph.edges, graph.weights)[start:]
    total = float(owed.sum())
    return float(owed[sources < len(graph.features)].sum()) / total if total else 0.0


def graph_scores(graph: AttributionGraph) -> tuple[float, float]:
    """circuit-tracer's replacement and completeness scores, 0..1.

    Replacement is the tokens' part of the influence that tokens and errors have; completeness the part of every node's
    incoming edges that is not from errors, averaged with the nodes' influence. Without error nodes both are 1 by
    construction and say nothing: read `feature_share` and the graph's ``residual`` then.

    Raises:
        GraphError: no acyclic graph.
    """
    _require_acyclic(graph, graph.edges, graph.weights)
    n_features, first_token, first_target = len(graph.features), graph.first_token, graph.first_target
    shares = _shares(graph, graph.edges, graph.weights)
    total = _sweep(graph, graph.edges, shares)
    of_errors, of_tokens = float(total[n_features:first_token].sum()), float(total[first_token:first_target].sum())
    from_errors = (graph.edges[1] >= n_features) & (graph.edges[1] < first_token)
    frozen = torch.bincount(graph.edges[0], weights=shares * from_errors, minlength=graph.n_nodes)
    ends, everything = of_errors + of_tokens, float(total.sum())
    replacement = 1 - of_errors / ends if ends else 1.0
    completeness = 1 - float((frozen * total).sum()) / everything if everything else 1.0
    return replacement, completeness


def _require_acyclic(graph: AttributionGraph, edges: Int[Tensor, "2 n_kept"], weights: Float[Tensor, "n_kept"]) -> None:
    """What the sweep relies on; a graph may come from a file that somebody else wrote. Raises GraphError."""
    if not weights.isfinite().all():
        raise GraphError("The graph has edges whose weights are not finite; attribute it again, in float32 or higher.")
    if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < graph.n_nodes:
        raise GraphError(f"The graph has edges between nodes that it does not have (it has {graph.n_nodes}).")
    depth = torch.full((graph.n_nodes,), -1)  # errors and tokens, which nothing feeds
    depth[: len(graph.features)] = graph.features[:, 0]
    depth[graph.first_target :] = graph.n_layers
    in_order = bool((depth[: len(graph.features)].diff() >= 0).all() and (edges[0].diff() >= 0).all())
    if not in_order or not (depth[edges[0]] > depth[edges[1]]).all():
        raise GraphError(
            "The graph's features are not sorted by layer, its edges not by target, or some do not ascend."
        )


def _target_weights(graph: AttributionGraph) -> Float[Tensor, "n_nodes"]:
    weights = torch.zeros(graph.n_nodes, dtype=torch.float64)
    weights[graph.first_target :] = torch.tensor([target.weight for target in graph.targets], dtype=torch.float64)
    return weights


def _shares(
    graph: AttributionGraph, edges: Int[Tensor, "2 n_kept"], weights: Float[Tensor, "n_kept"]
) -> Float[Tensor, "n_kept"]:
    """Every edge's absolute value as a share of its target's sum."""
    size = weights.abs().double()
    sums = torch.bincount(edges[0], weights=size, minlength=graph.n_nodes).clamp(min=_SMALLEST_SUM)
    return size / sums[edges[0]]


def _sweep(
    graph: AttributionGraph, edges: Int[Tensor, "2 n_kept"], shares: Float[Tensor, "n_kept"]
) -> Float[Tensor, "n_nodes"]:
    """Influence plus the targets' own weights, in one pass over the edges."""
    total = _target_weights(graph)
    counts = graph.features[:, 0].unique_consecutive(return_counts=True)[1]
    layers = pairwise([0, *counts.cumsum(0).tolist()])
    groups = [(graph.first_target, graph.n_nodes), *reversed(list(layers))]
    # of a layer all that feeds it has been added once the layers above are done; within it nothing feeds anything
    for start, stop in torch.searchsorted(edges[0].contiguous(), torch.tensor(groups)).tolist():
        targets, sources = edges[:, start:stop]
        total.index_add_(0, sources, total[targets] * shares[start:stop])
    return total


def _without_targets(graph: AttributionGraph, total: Float[Tensor, "n_nodes"]) -> Float[Tensor, "n_nodes"]:
    total[graph.first_target :] = 0  # nothing is fed by a target: what stands there is its weight
    return total


def _edge_scores(
    graph: AttributionGraph, edges: Int[Tensor, "2 n_kept"], weights: Float[Tensor, "n_kept"]
) -> Float[Tensor, "n_kept"]:
    """An edge's share of its target, times what the explained targets owe to that one."""
    shares = _shares(graph, edges, weights)
    return shares * _sweep(graph, edges, shares)[edges[0]]


def _cut(values: Float[Tensor, "n"], threshold: float) -> float:
    """The value down to which the largest ones hold ``threshold`` of the sum; above all where nothing is positive."""
    values = values[values > 0].sort(descending=True).values
    if not len(values):
        return float("inf")
    if threshold == 1:  # the running sum is rounded, and reaches 1 before the smallest
        return float(values[-1])
    running = values.cumsum(0)
    return float(values[int(torch.searchsorted(running / running[-1], threshold))])


def _without_loose_ends(
    graph: AttributionGraph, nodes: Bool[Tensor, "n_nodes"], places: Int[Tensor, "n_left"]
) -> tuple[Bool[Tensor, "n_nodes"], Int[Tensor, "n_kept"]]:
    """Drop features that feed nothing or are fed by nothing, and errors that feed nothing, until none is left."""
    while True:
        targets, sources = graph.edges[:, places]
        fed, feeds = torch.zeros_like(nodes), torch.zeros_like(nodes)
        fed[targets], feeds[sources] = True, True
        fed[len(graph.features) :], feeds[graph.first_token :] = True, True  # may end there, or begin
        left = nodes & fed & feeds
        if torch.equal(left, nodes):
            return nodes, places
        nodes, places = left, places[left[targets] & left[sources]]


def _cumulative(values: Float[Tensor, "n_nodes"]) -> Float[Tensor, "n_nodes"]:
    """The share of the sum that each value and the larger ones hold; 1 where there is nothing to share."""
    order = values.argsort(descending=True, stable=True)
    running = values[order].cumsum(0)
    shares = torch.ones_like(values)
    if len(values) and running[-1] > 0:
        shares[order] = running / running[-1]
    return shares
