"""The rows of an attribution graph: computed in batches, ranked by influence, and assembled into the graph.

A row holds what one target receives from every source. Sources are numbered as columns: the active features (by layer,
position and index), then the errors of frozen base MLPs, then the tokens. Targets are numbered after all sources.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_adapters.attribution.gradient import PromptModel
from tl_adapters.attribution.graph import AttributionGraph, GraphTarget
from tl_adapters.attribution.pruning import SMALLEST_SUM
from tl_adapters.attribution.targets import ResolvedTarget


@dataclass(frozen=True)
class _Batch:
    """Rows that were computed together, with their edges one row after another."""

    numbers: Int[Tensor, "n_rows"]
    """The number of each row's target."""
    layers: list[int]
    """The layer of each row's target, or n_layers for the graph's own targets; they descend."""
    ends: Int[Tensor, "n_rows_and_1"]
    """Where the edges of each row begin, and the end of the last one's."""
    columns: Int[Tensor, "n_edges"]
    """The source of each edge, in 32 bits: a long prompt has hundreds of millions of edges."""
    weights: Float[Tensor, "n_edges"]
    """Its weight."""
    sums: Float[Tensor, "n_rows"]
    """Sum of the absolute weights of each row, in float64."""

    @classmethod
    def of(cls, dense: Float[Tensor, "n_rows n_columns"], numbers: Sequence[int], layers: Sequence[int]) -> _Batch:
        """The edges of rows that are not 0."""
        row, column = dense.nonzero(as_tuple=True)
        weights, row, column = dense[row, column].cpu(), row.cpu(), column.to(torch.int32).cpu()
        ends = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(row, minlength=len(dense)).cumsum(0)])
        sums = torch.zeros(len(dense), dtype=torch.float64).index_add_(0, row, weights.abs().double())
        return cls(torch.tensor(numbers), list(layers), ends, column, weights, sums)

    def row_of_edges(self) -> Int[Tensor, "n_edges"]:
        """The row of every edge, within the batch."""
        return torch.arange(len(self.numbers)).repeat_interleave(self.ends.diff())

    def of_layer(self, layer: int) -> slice:
        """The rows of a layer."""
        first = next((i for i, other in enumerate(self.layers) if other <= layer), len(self.layers))
        return slice(first, first + self.layers.count(layer))


class GraphRows:
    """The rows computed so far, sparse. The targets' rows are computed on construction.

    Args:
        model: the linearized model (or the gradients) of the prompt.
        targets: the targets of the graph.
        strings: the text of each token of the prompt.
        batch_size: rows that are computed together.
        bar: a tqdm bar, updated by the number of rows.
    """

    def __init__(
        self, model: PromptModel, targets: Sequence[ResolvedTarget], strings: list[str], batch_size: int, bar: Any
    ) -> None:
        self.model, self.targets, self.strings, self.batch_size, self.bar = model, targets, strings, batch_size, bar
        self.n_active = len(model.active)
        self.n_errors = model.n_layers * model.n_tokens if model.linearization == "frozen_mlp" else 0
        self.n_columns = self.n_active + self.n_errors + model.n_tokens
        self.numbers: list[int] = []
        """The number of each row's target: a feature's column, or n_columns and up for the graph's own targets."""
        self.balance: list[tuple[float, float, float, float]] = []
        """Per row: value, contribution from before the window, constant part, and the decoder biases within it."""
        self._batches: list[_Batch] = []
        self._add(targets, range(self.n_columns, self.n_columns + len(targets)))

    def add_features(self, eligible: Bool[Tensor, "n_active"], n_rows: int) -> Bool[Tensor, "n_active"]:
        """Add the rows of ``n_rows`` eligible features; returns a mask of the features that have rows.

        If more are eligible, those with the largest influence on the targets are added first. Influence is computed
        again after every batch, from the rows so far.
        """
        done = torch.zeros(self.n_active, dtype=torch.bool)
        eligible, features = eligible.cpu(), _ActiveFeatures(self.model)
        while (left := n_rows - int(done.sum())) > 0:
            if n_rows == int(eligible.sum()):
                batch = (eligible & ~done).nonzero()[:, 0]  # all of them, so no ranking is needed
            else:
                score = self.influence()[: self.n_active]
                score[done | ~eligible] = -1.0
                batch = score.topk(min(left, max(self.batch_size, n_rows // 16))).indices
            self._add([features.target(column) for column in batch.tolist()], batch.tolist())
            done[batch] = True
        return done

    def _add(self, targets: Sequence[ResolvedTarget], numbers: Sequence[int]) -> None:
        """Compute rows, sorted by layer and position, so that a batch shares one backward pass and its length."""
        order = sorted(range(len(targets)), key=lambda i: (-targets[i].layer, targets[i].position))
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            batch, batch_numbers = [targets[i] for i in indices], [numbers[i] for i in indices]
            positions = torch.tensor([t.position for t in batch], device=self.model.activations.device)
            rows = self.model.rows([t.layer for t in batch], positions, torch.stack([t.vector for t in batch]))
            outside, biases, decoder_biases = torch.stack([rows.outside, rows.biases, rows.decoder_biases]).tolist()
            dense = torch.cat([rows.features, *([rows.errors.flatten(1)] if self.n_errors else []), rows.tokens], 1)
            of_targets = batch_numbers[0] >= self.n_columns  # the graph's own end all paths, at whatever layer they are
            layers = [self.model.n_layers if of_targets else t.layer for t in batch]
            self._batches.append(_Batch.of(dense, batch_numbers, layers))
            self.numbers += batch_numbers
            self.balance += [
                (t.value, before, bias + decoders + t.constant, decoders)
                for t, before, bias, decoders in zip(batch, outside, biases, decoder_biases, strict=True)
            ]
            self.bar.update(len(batch))

    def influence(self) -> Float[Tensor, "n_columns"]:
        """The influence of every column on the targets by the rows so far (`pruning.influence` of their graph).

        It is read off the batches as they are, for a graph of all active features has too many edges to be formed.
        """
        found = torch.zeros(self.n_columns + len(self.targets), dtype=torch.float64)
        found[self.n_columns :] = torch.tensor([target.about.weight for target in self.targets], dtype=found.dtype)
        for layer in range(self.model.n_layers, -1, -1):  # once later layers are done, a layer's influence is complete
            for batch in self._batches:
                rows = batch.of_layer(layer)
                edges = slice(int(batch.ends[rows.start]), int(batch.ends[rows.stop]))
                if edges.start == edges.stop:
                    continue
                per_weight = found[batch.numbers[rows]] / batch.sums[rows].clamp(min=SMALLEST_SUM)
                per_edge = per_weight.repeat_interleave(batch.ends[rows.start : rows.stop + 1].diff())
                found.index_add_(0, batch.columns[edges], batch.weights[edges].abs() * per_edge)
        return found[: self.n_columns]

    def graph(self, feature_nodes: Bool[Tensor, "n_active"]) -> AttributionGraph:
        """The graph of the rows so far, with the chosen features as nodes; ``about`` is left empty.

        Contributions of features that are not nodes are summed per row, as contribution from outside the graph.
        """
        model = self.model
        is_node = torch.ones(self.n_columns + len(self.targets), dtype=torch.bool)
        is_node[: self.n_active] = feature_nodes
        node_numbers = is_node.cumsum(0) - 1
        numbers = torch.tensor(self.numbers)
        edges, weights, to_nodes, to_others = self._between_nodes(is_node, node_numbers)
        values, before_window, constants, decoder_biases = torch.tensor(self.balance, dtype=weights.dtype).T
        if model.linearization == "gradient":  # gradients do not add up to the value: the rest counts as constant
            constants = values - to_nodes - to_others
        by_row, row_order = torch.argsort(edges[0], stable=True), torch.argsort(numbers)
        return AttributionGraph(
            tokens=model.tokens,
            strings=self.strings,
            n_layers=model.n_layers,
            features=model.active.cpu()[feature_nodes],
            activations=model.activations.cpu()[feature_nodes],
            errors=self._error_nodes(),
            targets=[target.about for target in self.targets],
            edges=edges[:, by_row],
            weights=weights[by_row],
            rows=node_numbers[numbers][row_order],
            balance=torch.stack([values, to_nodes, to_others + before_window, constants], 1)[row_order],
            decoder_biases=decoder_biases[row_order],
        )

    def _between_nodes(
        self, is_node: Bool[Tensor, "n_columns_and_targets"], node_numbers: Int[Tensor, "n_columns_and_targets"]
    ) -> tuple[Int[Tensor, "2 n_edges"], Float[Tensor, "n_edges"], Float[Tensor, "n_rows"], Float[Tensor, "n_rows"]]:
        """The edges between nodes with their weights, and per row the sums of edges from nodes and from others."""
        kept, sums = list[tuple[Tensor, Tensor, Tensor]](), list[Tensor]()
        for batch in self._batches:
            row, from_node = batch.row_of_edges(), is_node[batch.columns]
            both = torch.zeros(2, len(batch.numbers), dtype=batch.weights.dtype)
            for total, part in zip(both, (from_node, ~from_node), strict=True):
                total.index_add_(0, row[part], batch.weights[part])
            sums.append(both)
            targets, sources = node_numbers[batch.numbers[row[from_node]]], node_numbers[batch.columns[from_node]]
            kept.append((targets, sources, batch.weights[from_node]))
        targets, sources, weights = (torch.cat(parts) for parts in zip(*kept, strict=True))
        to_nodes, to_others = torch.cat(sums, 1)
        return torch.stack([targets, sources]), weights, to_nodes, to_others

    def _error_nodes(self) -> Int[Tensor, "n_errors 2"]:
        """Layer and position of every error node; none if base MLPs are not frozen."""
        if not self.n_errors:
            return torch.zeros(0, 2, dtype=torch.long)
        return torch.cartesian_prod(torch.arange(self.model.n_layers), torch.arange(self.model.n_tokens))


class _ActiveFeatures:
    """The active features as targets. The values of all of them are read from the device at once."""

    def __init__(self, model: PromptModel) -> None:
        values, constants = [], []
        for layer, (start, stop) in enumerate(itertools.pairwise(model.offsets)):
            _, position, index = model.active[start:stop].T
            values.append(model.pre_activations[layer][position, index])
            constants.append(model.b_enc[layer][index])
        self.encoders, self.features = model.encoders, model.active.tolist()
        self.values, self.constants = torch.stack([torch.cat(values), torch.cat(constants)]).tolist()

    def target(self, column: int) -> ResolvedTarget:
        """The pre-activation of the feature at ``column``."""
        layer, position, index = self.features[column]
        vector, about = self.encoders[layer][:, index], GraphTarget("", position, 1.0)
        return ResolvedTarget(layer, position, vector, self.values[column], self.constants[column], about)
