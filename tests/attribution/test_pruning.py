"""Influence, pruning and scores: the sparse computation compared with dense matrices and circuit-tracer's rules."""

import html
import json
import re
import time
from typing import Any

import pytest
import torch
from helpers.random_graphs import build, random_graph
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tl_adapters.attribution.graph import AttributionGraph, GraphError, GraphTarget
from tl_adapters.attribution.pruning import feature_share, graph_scores, influence, prune
from tl_adapters.pages.graph_diagram import MAX_SHOWN_CONNECTIONS, draw_graph


def dense(graph: AttributionGraph) -> tuple[Tensor, Tensor]:
    """The matrix [target, source] and the nodes' weights."""
    matrix = torch.zeros(graph.n_nodes, graph.n_nodes, dtype=torch.float64)
    matrix[graph.edges[0], graph.edges[1]] = graph.weights.double()
    weights = torch.zeros(graph.n_nodes, dtype=torch.float64)
    weights[graph.first_target :] = torch.tensor([target.weight for target in graph.targets], dtype=torch.float64)
    return matrix, weights


def normalized(matrix: Tensor) -> Tensor:
    return matrix.abs() / matrix.abs().sum(1, keepdim=True).clamp(min=1e-10)


def series(matrix: Tensor, weights: Tensor) -> Tensor:
    """w A + w A^2 + ... = w ((I - A)^-1 - I)."""
    one = torch.eye(len(matrix), dtype=torch.float64)
    return weights @ (torch.linalg.inv(one - matrix) - one)


def threshold_value(values: Tensor, threshold: float) -> Tensor:
    largest = values.flatten().sort(descending=True).values
    return largest[min(int(torch.searchsorted(largest.cumsum(0) / largest.sum(), threshold)), len(largest) - 1)]


def dense_prune(graph: AttributionGraph, node_threshold: float, edge_threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """circuit-tracer's scheme on the whole matrix: nodes, edges [target, source], influence."""
    matrix, weights = dense(graph)
    whole = series(normalized(matrix), weights)
    nodes = whole >= threshold_value(whole, node_threshold)
    nodes[graph.first_token :] = True
    left = normalized(matrix * nodes[:, None] * nodes[None])
    by_edge = left * (series(left, weights) + weights)[:, None]
    edges = by_edge >= threshold_value(by_edge, edge_threshold)
    for _ in range(graph.n_nodes):
        nodes[: graph.first_token] &= edges[:, : graph.first_token].any(0)
        nodes[: len(graph.features)] &= edges[: len(graph.features)].any(1)
        edges &= nodes[:, None] & nodes[None]
    return nodes, edges, whole


@pytest.mark.parametrize("with_errors", [False, True])
def test_pruning_agrees_with_dense_matrices(with_errors: bool) -> None:
    nodes_cut = edges_cut = loose = 0
    for seed in range(100):
        graph = random_graph(seed, with_errors)
        for node_threshold, edge_threshold in ((0.8, 0.98), (0.5, 0.9), (0.95, 0.7), (0.3, 0.4)):
            nodes, edges, whole = dense_prune(graph, node_threshold, edge_threshold)
            pruned = prune(graph, node_threshold, edge_threshold)
            assert torch.allclose(pruned.influence, whole, rtol=1e-9, atol=1e-12)
            assert torch.equal(pruned.node_mask, nodes), (seed, node_threshold, edge_threshold)
            assert torch.equal(pruned.edge_mask, edges[graph.edges[0], graph.edges[1]]), (seed, node_threshold)
            assert int(pruned.edge_mask.sum()) == int(edges.sum())
            above = (whole[None] * (whole[None] >= whole[:, None] - 1e-12)).sum(1) / whole.sum()
            assert torch.allclose(pruned.cumulative[whole > 1e-9], above[whole > 1e-9], atol=1e-7)
            nodes_cut += int((~nodes).sum())
            edges_cut += int((~pruned.edge_mask).sum())
            influential = whole >= threshold_value(whole, node_threshold)
            loose += int((influential & ~nodes)[: graph.first_token].sum())
    assert nodes_cut > 1000 and edges_cut > 10000 and loose > 50  # every step of the scheme removed something


def test_float32_graphs_are_summed_in_float64() -> None:
    graph = random_graph(3, True, 50)
    single = AttributionGraph(**{**vars(graph), "weights": graph.weights.float()})
    rounded = AttributionGraph(**{**vars(graph), "weights": graph.weights.float().double()})
    assert influence(single).dtype == prune(single).cumulative.dtype == torch.float64
    assert torch.equal(influence(single), influence(rounded))


def test_some_edges_or_other_weights() -> None:
    graph = random_graph(4, True, 40)
    some = torch.arange(len(graph.weights)) % 3 > 0
    matrix, weights = dense(graph)
    part = torch.zeros_like(matrix)
    part[graph.edges[0][some], graph.edges[1][some]] = graph.weights[some]
    found = influence(graph, graph.edges[:, some], graph.weights[some])
    assert torch.allclose(found, series(normalized(part), weights), atol=1e-12)
    assert not torch.allclose(found, influence(graph), atol=1e-3)
    squared = influence(graph, weights=graph.weights**2)
    assert torch.allclose(squared, series(normalized(matrix**2), weights), atol=1e-12)
    with pytest.raises(GraphError, match="edges without weights"):
        influence(graph, graph.edges)


@pytest.mark.parametrize("with_errors", [False, True])
def test_feature_share_and_scores_against_dense_matrices(with_errors: bool) -> None:
    for seed in range(100):
        graph = random_graph(seed, with_errors)
        n_features, origins = len(graph.features), slice(len(graph.features), graph.first_target)
        matrix, weights = dense(graph)
        matrix = normalized(matrix)
        around = matrix.clone()
        around[:n_features] = 0  # paths end where they meet a feature
        expected = 1 - float(series(around, weights)[origins].sum() / weights.sum())
        assert feature_share(graph) == pytest.approx(expected, abs=1e-9)

        total = series(matrix, weights) + weights
        errors, tokens = slice(n_features, graph.first_token), slice(graph.first_token, graph.first_target)
        replacement = total[tokens].sum() / total[origins].sum()
        completeness = ((1 - matrix[:, errors].sum(1)) * total).sum() / total.sum()
        assert graph_scores(graph) == pytest.approx((float(replacement), float(completeness)), abs=1e-9)
        assert (graph_scores(graph) == (1, 1)) == (not with_errors)


def test_a_small_graph_computed_by_hand() -> None:
    # node 0: layer 0; 1 and 2: layer 1; 3: an error; 4 and 5: tokens; 6 and 7: targets
    edges = {(0, 4): -2.0, (1, 0): 3.0, (1, 4): 1.0, (2, 5): 5.0, (6, 1): -1.0, (6, 3): 1.0, (6, 5): 2.0, (7, 2): 4.0}
    graph = build([(0, 0, 9), (1, 0, 9), (1, 1, 9)], [(0, 1)], 2, [0.6, 0.2], edges)
    expected = [0.1125, 0.15, 0.2, 0.15, 0.15, 0.3 + 0.2, 0, 0]
    assert influence(graph).tolist() == pytest.approx(expected)
    assert feature_share(graph) == pytest.approx((0.15 + 0.2) / 0.8)
    assert graph_scores(graph)[0] == pytest.approx(0.65 / 0.8)
    # of a total of 1.2625 the second token has 0.5 and node 2 has 0.2, together more than half
    pruned = prune(graph, 0.5, 1.0)
    assert pruned.node_mask.tolist() == [False, False, True, False, True, True, True, True]
    assert graph.edges[:, pruned.edge_mask].T.tolist() == [[2, 5], [6, 5], [7, 2]]
    assert pruned.cumulative.tolist()[5] == pytest.approx(0.5 / 1.2625) and float(pruned.cumulative.max()) == 1.0
    # target 6 has one edge left, with a score of 0.6; the other scores are 0.2
    pruned = prune(graph, 0.5, 0.55)
    assert pruned.node_mask.tolist() == [False] * 4 + [True] * 4
    assert graph.edges[:, pruned.edge_mask].T.tolist() == [[6, 5]]


def test_features_without_outgoing_edges_are_removed_one_after_the_other() -> None:
    # 3 <- 2 <- 1 <- 0 <- token is a chain whose edge into the target is too weak to be kept
    edges = {(0, 4): 1.0, (1, 0): 1.0, (2, 1): 1.0, (3, 2): 1.0, (3, 4): 1e-9, (6, 3): 1e-7, (6, 5): 1.0}
    graph = build([(0, 0, 1), (1, 0, 1), (2, 0, 1), (3, 0, 1)], [], 2, [1.0], edges)
    pruned = prune(graph, 1.0, 0.99)
    assert pruned.node_mask.tolist() == [False] * 4 + [True] * 3
    assert graph.edges[:, pruned.edge_mask].T.tolist() == [[6, 5]]


def test_a_threshold_of_one_keeps_every_node_with_influence() -> None:
    # shares of 1e-19 are lost in a running sum of float64; the node must still be kept
    edges = {(0, 3): 1.0, (1, 2): 1.0, (1, 3): 0.0, (4, 0): 1e-19, (4, 2): 1.0}
    graph = build([(0, 0, 1), (0, 1, 1)], [], 2, [1.0], edges)
    pruned = prune(graph, 1.0, 1.0)
    assert pruned.node_mask.tolist() == [True, False, True, True, True]  # feature 1 has no influence
    assert graph.edges[:, pruned.edge_mask].T.tolist() == [[0, 3], [4, 0], [4, 2]]
    assert not prune(graph, 0.999, 1.0).node_mask[0]


def test_graphs_with_few_or_no_edges() -> None:
    empty = build([], [], 2, [1.0], {})
    pruned = prune(empty)
    assert pruned.node_mask.tolist() == [True] * 3 and pruned.edge_mask.shape == (0,)
    assert pruned.cumulative.tolist() == [1.0] * 3 and not influence(empty).any()
    assert feature_share(empty) == 0.0 and graph_scores(empty) == (1.0, 1.0)
    assert feature_share(build([(0, 0, 1)], [], 2, [1.0], {(3, 0): -2.0})) == 1.0  # ends in a feature never attributed
    zero = build([(0, 0, 1)], [], 2, [1.0], {(0, 1): 0.0, (3, 0): 0.0})
    assert prune(zero).node_mask.tolist() == [False, True, True, True] and not prune(zero).edge_mask.any()
    assert influence(zero).tolist() == [0.0] * 4 and feature_share(zero) == 0.0 and graph_scores(zero) == (1.0, 1.0)
    faint = build(
        [], [], 2, [1.0], {(2, 0): 3e-12, (2, 1): 1e-12}
    )  # as in circuit-tracer, rounding errors get almost no influence
    assert influence(faint).tolist() == pytest.approx([0.03, 0.01, 0.0])


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.01, float("nan")])
def test_thresholds_are_shares(threshold: float) -> None:
    graph = random_graph(0, False)
    with pytest.raises(GraphError, match="node_threshold is"):
        prune(graph, node_threshold=threshold)
    with pytest.raises(GraphError, match="edge_threshold is"):
        prune(graph, edge_threshold=threshold)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": torch.tensor([1.0, float("nan")])}, "not finite"),
        ({"edges": torch.tensor([[0, 9], [2, 0]])}, "does not have"),
        ({"edges": torch.tensor([[4, 0], [0, 2]])}, "edges are not sorted by target"),
        ({"edges": torch.tensor([[0, 4], [1, 0]])}, "some edges do not ascend"),  # within a layer
        ({"edges": torch.tensor([[2, 4], [0, 0]])}, "some edges do not ascend"),  # into a token
        ({"features": torch.tensor([[1, 0, 1], [0, 0, 1]])}, "not sorted by layer"),
    ],
)
def test_edges_that_are_not_a_sorted_acyclic_graph_are_refused(changes: dict[str, Tensor], message: str) -> None:
    graph = build([(1, 0, 1), (1, 0, 2)], [], 2, [1.0], {(0, 2): 1.0, (4, 0): 1.0}, dtype=torch.float32)
    influence(graph)
    broken = AttributionGraph(**{**vars(graph), **changes})
    for function in (influence, prune, feature_share, graph_scores):
        with pytest.raises(GraphError, match=message):
            function(broken)


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation gives."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.n = max(self.n, tensor.numel())
        return result


def test_twenty_thousand_features_take_seconds_and_no_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    n_features, n_layers, n_tokens, n_edges = 20_000, 26, 100, 2_000_000
    layers = torch.arange(n_features) * n_layers // n_features
    features = torch.stack([layers, torch.zeros_like(layers), torch.arange(n_features)], 1)
    first_target = n_features + n_tokens
    targets = torch.randint(0, n_features + 200, (n_edges,), generator=generator)
    targets = torch.where(targets < n_features, targets, first_target + targets % 10).sort().values
    below = torch.searchsorted(layers, torch.cat([layers, torch.full((n_tokens + 10,), n_layers)]))[targets]
    sources = (torch.rand(n_edges, generator=generator, dtype=torch.float64) * (below + n_tokens)).long()
    sources = torch.where(sources < below, sources, sources - below + n_features)
    graph = AttributionGraph(
        tokens=torch.arange(n_tokens),
        strings=["x"] * n_tokens,
        n_layers=n_layers,
        features=features,
        activations=torch.ones(n_features),
        errors=torch.zeros(0, 2, dtype=torch.long),
        targets=[GraphTarget(f"{i}", n_tokens - 1, 0.1, token=i) for i in range(10)],
        edges=torch.stack([targets, sources]),
        weights=torch.randn(n_edges, generator=generator),
        rows=torch.arange(n_features),
        balance=torch.zeros(n_features, 4),
        decoder_biases=torch.zeros(n_features),
    )
    began = time.process_time()
    with Largest() as largest:
        pruned = prune(graph)
    assert time.process_time() - began < 10
    assert largest.n <= 2 * n_edges  # the edges themselves; all nodes by all nodes would be 200 times as much
    assert 1_000 < int(pruned.node_mask.sum()) < n_features and 1_000 < int(pruned.edge_mask.sum()) < n_edges
    ends = pruned.influence[n_features:first_target].sum()
    unfed = torch.bincount(targets, minlength=n_features)[:n_features] == 0
    assert float(ends + pruned.influence[:n_features][unfed].sum()) == pytest.approx(1.0)  # all of it ends somewhere


def test_a_notebook_shows_a_graphs_targets_with_their_strongest_edges() -> None:
    graph = random_graph(3, with_errors=True)
    graph.strings[0] = "<script>\u202e"
    view = graph._repr_html_()
    assert "<script>" not in view and "&lt;script&gt;" in view and "\u202e" not in view
    for i, target in enumerate(graph.targets[:3]):
        into = graph.edges[0] == graph.first_target + i
        strongest = int(graph.weights.abs().masked_fill(~into, -1).argmax())
        assert f"strongest edges into {target.label}" in view and f"{graph.weights[strongest]:+.3g}" in view
    assert f">{graph.node_name(int(graph.edges[1, strongest]))}</".replace("'", "&#39;") in view
    kinds = (0, len(graph.features), graph.first_token + 1, graph.first_target)
    names = [graph.node_name(node) for node in kinds]
    layer, position, index = graph.features[0].tolist()
    assert names[0].startswith(f"{layer}.{index} at {position} ") and names[1].startswith("error of layer 0 at 0 ")
    assert names[2:] == ["token 1 ' t1'", "out0"]


def test_the_drawing_shows_the_most_influential_nodes_and_edges_among_them() -> None:
    graph = random_graph(3, with_errors=True)
    graph.strings[0] = "<script>\u202e"
    features, scores = 3, influence(graph)[: graph.first_token]
    svg = draw_graph(graph, max_features=features)
    assert "<script>" not in svg and "\u202e" not in svg and "nan" not in svg
    titles = {html.unescape(title) for title in re.findall(r"<title>([^\n]*?); \d+% of the largest influence", svg)}
    shown = {graph.node_name(int(node)) for node in scores.topk(features).indices}
    assert {title for title in titles if not title.startswith("token")} == shown
    assert svg.count("<rect") == len(graph.targets)
    assert 0 < svg.count("<path") <= MAX_SHOWN_CONNECTIONS


def test_a_graph_is_a_table_of_its_edges() -> None:
    graph = random_graph(3, with_errors=True)
    frame = graph.to_pandas()
    assert len(frame) == len(graph.weights) and frame["weight"].abs().is_monotonic_decreasing
    first = int(graph.weights.abs().argmax())
    assert frame["weight"][0] == float(graph.weights[first])
    assert frame["source"][0] == graph.node_name(int(graph.edges[1, first]))
    assert frame["target_node"][0] == int(graph.edges[0, first])
    record = json.loads(json.dumps(graph.to_dict(), allow_nan=False))
    assert record["text"] == graph.text and len(record["targets"]) == len(graph.targets)
    assert f"{len(graph.features):,} features" in repr(graph) and len(repr(graph)) < 200
