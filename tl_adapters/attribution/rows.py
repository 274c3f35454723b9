"""The rows of an attribution graph: computed in batches, ranked by influence, and assembled into the graph.

A row holds what one target receives from every source. Sources are numbered as columns: the active features (by layer,
position and index), then the errors of frozen base MLPs, then the tokens. Targets are numbered after all sources.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_adapters.attribution.gradient import PromptModel
from tl_adapters.attribution.graph import AttributionGraph, GraphTarget
from tl_adapters.attribution.pruning import influence
from tl_adapters.attribution.targets import ResolvedTarget


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
        self._edges: list[tuple[Tensor, Tensor, Tensor]] = []
        """Per batch: the row's target number, the column and the weight of every edge."""
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
                score = influence(self.graph(torch.ones(self.n_active, dtype=torch.bool)))[: self.n_active]
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
            nonzero = dense.nonzero()
            row_numbers = torch.tensor(batch_numbers)[nonzero[:, 0].cpu()]
            self._edges.append((row_numbers, nonzero[:, 1].cpu(), dense[tuple(nonzero.T)].cpu()))
            self.numbers += batch_numbers
            self.balance += [
                (t.value, before, bias + decoders + t.constant, decoders)
                for t, before, bias, decoders in zip(batch, outside, biases, decoder_biases, strict=True)
            ]
            self.bar.update(len(batch))

    def graph(self, feature_nodes: Bool[Tensor, "n_active"]) -> AttributionGraph:
        """The graph of the rows so far, with the chosen features as nodes; ``about`` is left empty.

        Contributions of features that are not nodes are summed per row, as contribution from outside the graph.
        """
        model = self.model
        is_node = torch.ones(self.n_columns + len(self.targets), dtype=torch.bool)
        is_node[: self.n_active] = feature_nodes
        node_numbers = is_node.cumsum(0) - 1
        rows, columns, weights = (torch.cat(parts) for parts in zip(*self._edges, strict=True))
        numbers = torch.tensor(self.numbers)
        row_index = torch.zeros(len(is_node), dtype=torch.long)
        row_index[numbers] = torch.arange(len(numbers))
        from_node = is_node[columns]
        to_nodes, to_others = (
            torch.zeros(len(numbers), dtype=weights.dtype).index_add_(0, row_index[rows[part]], weights[part])
            for part in (from_node, ~from_node)
        )
        values, before_window, constants, decoder_biases = torch.tensor(self.balance, dtype=weights.dtype).T
        if model.linearization == "gradient":  # gradients do not add up to the value: the rest counts as constant
            constants = values - to_nodes - to_others
        by_row, row_order = torch.argsort(rows[from_node], stable=True), torch.argsort(numbers)
        edges = torch.stack([node_numbers[rows[from_node]], node_numbers[columns[from_node]]])
        return AttributionGraph(
            tokens=model.tokens,
            strings=self.strings,
            n_layers=model.n_layers,
            features=model.active.cpu()[feature_nodes],
            activations=model.activations.cpu()[feature_nodes],
            errors=self._error_nodes(),
            targets=[target.about for target in self.targets],
            edges=edges[:, by_row],
            weights=weights[from_node][by_row],
            rows=node_numbers[numbers][row_order],
            balance=torch.stack([values, to_nodes, to_others + before_window, constants], 1)[row_order],
            decoder_biases=decoder_biases[row_order],
        )

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
