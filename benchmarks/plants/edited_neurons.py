"""Edited neurons: some gated neurons of the target have other weights than the base's.

A neuron of a gated MLP computes act(x W_gate) (x W_in) and writes that multiple of its row of W_out. Its weights are
taken from other neurons of the layer, for four kinds of edit in turn: W_gate, W_in, W_out, and all three. What the
target computes differently is then known exactly: the change of the neuron's output, which is

    (a' - a) w        where only W_gate or W_in is another one
    a (w' - w)        where only W_out is
    a' w' - a w       where all three are

with a, w the base's activation and row and a', w' the target's. An activation has two signs, and the features of an
adapter have one, so each of these terms is two true features, its positive and its negative part.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from plants.plant import Ground, Plant
from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.transcoder import TranscoderAdapter, row_norms
from tl_adapters.evaluation.feature_matching import target_inputs
from tl_adapters.models.routed_mlp import MLPWeights, RoutedMLP

KINDS = ("gate", "in", "out", "all")
SMALLEST_SIZE = 0.1
"""A true feature counts as active where it writes more than this, in units of the root mean square of the layer's
difference."""


@dataclass(frozen=True)
class Edit:
    """A neuron, and the neuron whose weights it has in the target."""

    neuron: int
    donor: int
    kind: str


class NeuronChanges(TranscoderAdapter):
    """The true features of a layer whose neurons were edited, as an adapter whose encoder is exact.

    Args:
        mlp: the layer of the pair.
        edits: its edited neurons.
        smallest: size below which a feature counts as inactive; with 0 the decoded activations are the difference.
    """

    def __init__(self, mlp: RoutedMLP, edits: list[Edit], smallest: float) -> None:
        target, base = mlp.weights()
        neurons = torch.tensor([edit.neuron for edit in edits])
        rows = torch.stack([row for edit in edits for row in _rows(edit, target.W_out, base.W_out)])
        super().__init__(base.W_in.shape[0], 2 * len(rows), dtype=base.W_in.dtype)
        self._target, self._base = _only(target, neurons), _only(base, neurons)
        self._kinds, self.smallest = [edit.kind for edit in edits], smallest
        with torch.no_grad():
            self.W_dec.copy_(torch.cat([rows, -rows]))

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch n_features"]:
        """The positive and the negative parts of the terms; 0 where one is smaller than `smallest`."""
        new, old = self._target.neurons(x), self._base.neurons(x)
        terms = torch.stack(
            [t for i, kind in enumerate(self._kinds) for t in _terms(kind, new[..., i], old[..., i])], -1
        )
        acts = torch.relu(torch.cat([terms, -terms], -1))
        return torch.where(acts * row_norms(self.W_dec) > self.smallest, acts, 0.0)


def _rows(edit: Edit, new: Tensor, old: Tensor) -> list[Tensor]:
    """The directions of an edit's terms."""
    w, w_new = old[edit.neuron], new[edit.neuron]
    return {"out": [w_new - w], "all": [w_new, -w]}.get(edit.kind, [w])


def _terms(kind: str, new: Tensor, old: Tensor) -> list[Tensor]:
    """The activations of an edit's terms."""
    return {"out": [old], "all": [new, old]}.get(kind, [new - old])


def _only(weights: MLPWeights, neurons: Tensor) -> MLPWeights:
    """The weights of some neurons, apart from the model's."""
    return MLPWeights(
        weights.W_gate[:, neurons].detach().clone(),
        weights.W_in[:, neurons].detach().clone(),
        weights.W_out[neurons].detach().clone(),
        weights.act_fn,
    )


@torch.no_grad()
def edited_neurons(ground: Ground, seed: int) -> Plant:
    """A target of which ``per_layer`` neurons in every layer have weights of other neurons."""
    generator = torch.Generator().manual_seed(seed)
    target, edits = copy.deepcopy(ground.base), []
    for block in target.model.layers:
        mlp = block.mlp
        drawn = torch.randperm(mlp.gate_proj.out_features, generator=generator)[: 2 * ground.per_layer].tolist()
        pairs = zip(drawn[: ground.per_layer], drawn[ground.per_layer :], strict=True)
        edits.append([Edit(neuron, donor, KINDS[i % len(KINDS)]) for i, (neuron, donor) in enumerate(pairs)])
        for edit in edits[-1]:
            for kind, weight in (
                ("gate", mlp.gate_proj.weight),
                ("in", mlp.up_proj.weight),
                ("out", mlp.down_proj.weight.T),
            ):
                if edit.kind in (kind, "all"):
                    weight[edit.neuron] = weight[edit.donor]
    pair = ground.pair(target)
    squares, n = torch.zeros(pair.n_layers), 0
    for inputs in target_inputs(pair, ground.calibration):
        squares += torch.stack([m.difference(x).square().sum().float() for m, x in zip(pair.mlps, inputs, strict=True)])
        n += len(inputs[0])
    sizes = (squares / n).sqrt().tolist()
    truth = [NeuronChanges(m, e, SMALLEST_SIZE * s) for m, e, s in zip(pair.mlps, edits, sizes, strict=True)]
    return Plant(pair, AdapterSet(truth), {"edits": [[vars(edit) for edit in layer] for layer in edits]})
