"""Influence, pruning and scores of attribution graphs, as in circuit-tracer, on sparse edges.

The incoming edges of every node are normalized to shares of their absolute sum. The influence of a node is the sum over
all paths from it to the targets of the product of the shares. The graph is acyclic and its features are sorted by
layer, so one pass from the targets down through the layers gives the whole series exactly, without a matrix of nodes by
nodes and without power iteration. All sums are in float64, whatever the dtype of the edges.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_adapters.attribution.graph import AttributionGraph, GraphError
from tl_adapters.utils.notebook import ResultRecord

NODE_THRESHOLD, EDGE_THRESHOLD = 0.8, 0.98
"""Shares of influence that the nodes and edges of a pruned graph hold (circuit-tracer's defaults)."""
SMALLEST_SUM = 1e-10
"""circuit-tracer's lower bound of the sum by which edges are divided: smaller sums give shares below 1 in total."""


@dataclass(frozen=True)
class PrunedGraph(ResultRecord):
    """Masks over the nodes and edges of a graph, and the influence by which they were chosen."""

    node_mask: Bool[Tensor, "n_nodes"]
    """Nodes that are kept; tokens and targets always are."""
    edge_mask: Bool[Tensor, "n_edges"]
    """Edges that are kept, all of them between kept nodes."""
    influence: Float[Tensor, "n_nodes"]
    """Influence in the whole graph, before pruning; 0 for targets, which have no outgoing edges."""
    cumulative: Float[Tensor, "n_nodes"]
    """Share of all influence held by a node and the nodes with more influence: small values are the most important."""

    def __repr__(self) -> str:
        n = self.row()
        return f"PrunedGraph: {n['nodes']:,} of {n['of nodes']:,} nodes and {n['edges']:,} of {n['of edges']:,} edges"

    def row(self) -> dict[str, Any]:
        """The numbers of nodes and edges that are kept, and of all."""
        masks = {"nodes": self.node_mask, "edges": self.edge_mask}
        kept = {name: int(mask.sum()) for name, mask in masks.items()}
        return {**kept, **{f"of {name}": len(mask) for name, mask in masks.items()}}

    def to_dict(self) -> dict[str, Any]:
        """`row` as JSON values, without the tensors."""
        return self.row()


def influence(
    graph: AttributionGraph,
    edges: Int[Tensor, "2 n_kept"] | None = None,
    weights: Float[Tensor, "n_kept"] | None = None,
) -> Float[Tensor, "n_nodes"]:
    """The influence of every node on the targets: w A + w A^2 + ..., with w the targets' weights.

    Args:
        graph: A holds the absolute values of its edges as shares of the sum over each edge target.
        edges: some of the graph's edges [2, n_kept], sorted by target, to use instead of all.
        weights: weights of those edges [n_kept], or other weights of all edges.

    Returns:
        [n_nodes] in float64; 0 for the targets themselves.

    Raises:
        GraphError: edges are given without weights, weights are not finite, or the edges are not those of an acyclic
            graph, sorted by target.
    """
    if edges is not None and weights is None:
        raise GraphError("influence() got edges without weights; give both.")
    edges = graph.edges if edges is None else edges
    weights = graph.weights if weights is None else weights
    _require_acyclic(graph, edges, weights)
    return _without_targets(graph, _sweep(graph, edges, _shares(graph, edges, weights)))


def prune(
    graph: AttributionGraph, node_threshold: float = NODE_THRESHOLD, edge_threshold: float = EDGE_THRESHOLD
) -> PrunedGraph:
    """The nodes, and then the edges between them, that hold most of the influence, as in circuit-tracer.

    Args:
        graph: the graph; it is not changed.
        node_threshold: the most influential nodes are kept until they hold this share of all influence; tokens and
            targets are always kept. 1 keeps every node with any influence.
        edge_threshold: the same for edges. The score of an edge is its share times the influence of its target in the
            graph of the kept nodes. Features without incoming or outgoing edges, and errors without outgoing edges, are
            then removed until nothing changes.

    Raises:
        GraphError: a threshold is outside (0, 1], or the graph is not acyclic.
    """
    for name, threshold in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 < threshold <= 1:
            raise GraphError(f"{name} is {threshold}; give a share of influence, above 0 and at most 1.")
    whole = influence(graph)
    nodes = whole >= _cut(whole, node_threshold)
    nodes[graph.first_token :] = True
    # Edge indices, so that every later pass reads the remaining edges only.
    edges = (nodes[graph.edges[0]] & nodes[graph.edges[1]]).nonzero()[:, 0]
    edge_scores = _edge_scores(graph, graph.edges[:, edges], graph.weights[edges])
    edges = edges[edge_scores >= _cut(edge_scores, edge_threshold)]
    nodes, edges = _without_loose_ends(graph, nodes, edges)
    edge_mask = torch.zeros(graph.edges.shape[1], dtype=torch.bool)
    edge_mask[edges] = True
    return PrunedGraph(nodes, edge_mask, whole, _cumulative(whole))


def feature_share(graph: AttributionGraph) -> float:
    """The share of the targets' influence that passes through at least one adapter feature, from 0 to 1.

    Every path that contains a feature enters the target by an edge from a feature, and a path that enters by an edge
    from a token or an error contains no feature, since neither has incoming edges. The share is therefore that of the
    target's direct edges from features, averaged with the targets' weights. Targets without edges do not count; if
    there is no influence at all the share is 0.

    Raises:
        GraphError: the graph is not acyclic.
    """
    _require_acyclic(graph, graph.edges, graph.weights)
    start = int(torch.searchsorted(graph.edges[0].contiguous(), graph.first_target))
    targets, sources = graph.edges[:, start:]
    direct = _target_weights(graph)[targets] * _shares(graph, graph.edges, graph.weights)[start:]
    total = float(direct.sum())
    return float(direct[sources < len(graph.features)].sum()) / total if total else 0.0


def graph_scores(graph: AttributionGraph) -> tuple[float, float]:
    """circuit-tracer's replacement and completeness scores, from 0 to 1.

    The replacement score is the tokens' share of the influence of tokens and errors. The completeness score is the
    share of every node's incoming edges that does not come from errors, averaged with the nodes' influence as weights.
    Without error nodes both are 1 by construction; `feature_share` and the graph's ``residual`` are informative then.

    Raises:
        GraphError: the graph is not acyclic.
    """
    _require_acyclic(graph, graph.edges, graph.weights)
    n_features, first_token, first_target = len(graph.features), graph.first_token, graph.first_target
    shares = _shares(graph, graph.edges, graph.weights)
    total = _sweep(graph, graph.edges, shares)
    of_errors, of_tokens = float(total[n_features:first_token].sum()), float(total[first_token:first_target].sum())
    from_errors = (graph.edges[1] >= n_features) & (graph.edges[1] < first_token)
    error_shares = torch.bincount(graph.edges[0], weights=shares * from_errors, minlength=graph.n_nodes)
    ends, everything = of_errors + of_tokens, float(total.sum())
    replacement = 1 - of_errors / ends if ends else 1.0
    completeness = 1 - float((error_shares * total).sum()) / everything if everything else 1.0
    return replacement, completeness


def _require_acyclic(graph: AttributionGraph, edges: Int[Tensor, "2 n_kept"], weights: Float[Tensor, "n_kept"]) -> None:
    """Check what `_sweep` relies on, since graphs may come from files that others wrote. Raises GraphError."""
    if not weights.isfinite().all():
        raise GraphError("Some edge weights are not finite; attribute the prompt again, in float32 or higher.")
    if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < graph.n_nodes:
        raise GraphError(
            f"The graph has edges between nodes that it does not have; its nodes are 0 to {graph.n_nodes - 1}."
        )
    depth = torch.full((graph.n_nodes,), -1)  # errors and tokens, which have no incoming edges
    depth[: len(graph.features)] = graph.features[:, 0]
    depth[graph.first_target :] = graph.n_layers
    in_order = bool((depth[: len(graph.features)].diff() >= 0).all() and (edges[0].diff() >= 0).all())
    if not in_order or not (depth[edges[0]] > depth[edges[1]]).all():
        raise GraphError(
            "The graph's features are not sorted by layer, its edges are not sorted by target, or some edges do not "
            "ascend to a later layer; attribute the prompt again."
        )


def _target_weights(graph: AttributionGraph) -> Float[Tensor, "n_nodes"]:
    weights = torch.zeros(graph.n_nodes, dtype=torch.float64)
    weights[graph.first_target :] = torch.tensor([target.weight for target in graph.targets], dtype=torch.float64)
    return weights


def _shares(
    graph: AttributionGraph, edges: Int[Tensor, "2 n_kept"], weights: Float[Tensor, "n_kept"]
) -> Float[Tensor, "n_kept"]:
    """The absolute value of every edge as a share of the sum over the edges of the same target."""
    size = weights.abs().double()
    sums = torch.bincount(edges[0], weights=size, minlength=graph.n_nodes).clamp(min=SMALLEST_SUM)
    return size / sums[edges[0]]


def _sweep(
    graph: AttributionGraph, edges: Int[Tensor, "2 n_kept"], shares: Float[Tensor, "n_kept"]
) -> Float[Tensor, "n_nodes"]:
    """The influence of every node plus the targets' own weights, in one pass over the edges."""
    total = _target_weights(graph)
    counts = graph.features[:, 0].unique_consecutive(return_counts=True)[1]
    layers = pairwise([0, *counts.cumsum(0).tolist()])
    groups = [(graph.first_target, graph.n_nodes), *reversed(list(layers))]
    # Once the later layers are done, a layer's influence is complete: features of one layer have no edges between them.
    for start, stop in torch.searchsorted(edges[0].contiguous(), torch.tensor(groups)).tolist():
        targets, sources = edges[:, start:stop]
        total.index_add_(0, sources, total[targets] * shares[start:stop])
    return total


def _without_targets(graph: AttributionGraph, total: Float[Tensor, "n_nodes"]) -> Float[Tensor, "n_nodes"]:
    total[graph.first_target :] = 0  # targets have no outgoing edges: their entry is their own weight
    return total


def _edge_scores(
    graph: AttributionGraph, edges: Int[Tensor, "2 n_kept"], weights: Float[Tensor, "n_kept"]
) -> Float[Tensor, "n_kept"]:
    """The score of every edge: its share times the influence of its target."""
    shares = _shares(graph, edges, weights)
    return shares * _sweep(graph, edges, shares)[edges[0]]


def _cut(values: Float[Tensor, "n"], threshold: float) -> float:
    """The value such that it and the larger ones hold ``threshold`` of the sum; infinity if no value is positive."""
    values = values[values > 0].sort(descending=True).values
    if not len(values):
        return float("inf")
    if threshold == 1:  # the rounded running sum may reach 1 before the smallest value
        return float(values[-1])
    running = values.cumsum(0)
    return float(values[int(torch.searchsorted(running / running[-1], threshold))])


def _without_loose_ends(
    graph: AttributionGraph, nodes: Bool[Tensor, "n_nodes"], edges: Int[Tensor, "n_left"]
) -> tuple[Bool[Tensor, "n_nodes"], Int[Tensor, "n_kept"]]:
    """Remove features without incoming or outgoing edges, and errors without outgoing edges, until there are none."""
    while True:
        targets, sources = graph.edges[:, edges]
        has_incoming, has_outgoing = torch.zeros_like(nodes), torch.zeros_like(nodes)
        has_incoming[targets], has_outgoing[sources] = True, True
        has_incoming[len(graph.features) :] = True  # errors, tokens and targets are kept without incoming edges
        has_outgoing[graph.first_token :] = True  # tokens and targets are kept without outgoing edges
        remaining = nodes & has_incoming & has_outgoing
        if torch.equal(remaining, nodes):
            return nodes, edges
        nodes, edges = remaining, edges[remaining[targets] & remaining[sources]]


def _cumulative(values: Float[Tensor, "n_nodes"]) -> Float[Tensor, "n_nodes"]:
    """The share of the sum held by each value and the larger ones; 1 for all if the sum is 0."""
    order = values.argsort(descending=True, stable=True)
    running = values[order].cumsum(0)
    shares = torch.ones_like(values)
    if len(values) and running[-1] > 0:
        shares[order] = running / running[-1]
    return shares
