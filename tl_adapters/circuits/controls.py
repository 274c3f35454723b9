"""What a circuit is held against: other features that are active where it is, and cheaper ways to stop a word.

* random sets of the same size, each feature replaced by another of its layer whose activation mass at the same places
  (moments and boundaries together) is nearest, drawn among the nearest five. Where a circuit is the most active set
  there is, no other set has its mass: so the share of the mass that each set holds is reported beside it;
* a harder one: the most active of the other features at those places, whatever their layer;
* both again, with the circuit's summed write norm at the onsets, and with its harm elsewhere (`circuit_tuning`);
* the word's logits set to minus infinity, or lowered by a bias;
* a difference-of-means direction of the residual stream (moments less boundaries) taken off after a layer, everywhere
  or only at tokens after which the word may come;
* neurons of the base's MLPs, off or held at their mean;
* the same search run for the token that most often comes at the boundaries instead.

Here is how each of them is made; `circuit_tuning` sets bias, steering and neurons to the circuit's own effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.circuits.onsets import Onsets, final_residual, log_odds
from tl_adapters.evaluation.behaviors import first_tokens
from tl_adapters.interventions.feature_edits import gated
from tl_adapters.interventions.variants import Variant
from tl_adapters.models.paired_model import PairedModel

NEAREST = 5
"""A feature's stand-in is drawn among so many."""


def matched_features(
    chosen: Sequence[FeatureId],
    activation: Float[Tensor, "n_layers n_features"],
    alive: Bool[Tensor, "n_layers n_features"],
    generator: torch.Generator,
) -> list[FeatureId]:
    """A random set of the same size, matched in layer and activation mass; each stand-in is taken once.

    Where a layer has fewer other alive features than are wanted, the set is smaller by so many.
    """
    free = alive.clone()
    for f in chosen:
        free[f] = False
    found = []
    order = torch.randperm(len(chosen), generator=generator).tolist()
    for layer, index in (chosen[i] for i in order):
        candidates = free[layer].nonzero()[:, 0]
        if not len(candidates):
            continue
        distance = (
            activation[layer, candidates].clamp(min=1e-6).log() - activation[layer, index].clamp(min=1e-6).log()
        ).abs()
        near = candidates[distance.argsort()[:NEAREST]]
        pick = int(near[torch.randint(len(near), (1,), generator=generator)])
        free[layer, pick] = False
        found.append(FeatureId(layer, pick))
    return found


def further_matched(
    chosen: Sequence[FeatureId],
    first: Sequence[FeatureId],
    activation: Float[Tensor, "n_layers n_features"],
    alive: Bool[Tensor, "n_layers n_features"],
    generator: torch.Generator,
) -> list[FeatureId]:
    """A matched set and what enlarges it: ``first``, then matched sets of what is left, until the layers have no more.

    The order in which sets are enlarged to a write norm or a harm (`circuit_tuning`).
    """
    order, free = list(first), alive.clone()
    added: Sequence[FeatureId] = first
    while added:
        for f in added:
            free[f] = False
        added = matched_features(chosen, activation, free, generator)
        order += added
    return order


def most_active_others(
    chosen: Sequence[FeatureId],
    activation: Float[Tensor, "n_layers n_features"],
    alive: Bool[Tensor, "n_layers n_features"],
    n: int,
) -> list[FeatureId]:
    """The ``n`` alive features outside a set with the largest mass (all of them, where there are fewer)."""
    free = alive.clone()
    for f in chosen:
        free[f] = False
    best = activation.masked_fill(~free, -torch.inf).flatten().topk(min(n, int(free.sum()))).indices.tolist()
    return [FeatureId(i // activation.shape[1], i % activation.shape[1]) for i in best]


# -- features in part ---------------------------------------------------------------------------------------------

Shares = Mapping[FeatureId, float]
"""Features, and how much of each activation is taken: 1 is all of it, more than 1 overshoots."""


def first_of(order: Sequence[FeatureId], size: float) -> dict[FeatureId, float]:
    """The first ``size`` features of an order, the last of them in part; of all of them so many times as are missing.

    So the size of a set can be set as finely as a coefficient. None of an empty order.
    """
    if not order or size <= 0:
        return {}
    if size >= len(order):
        return dict.fromkeys(order, size / len(order))
    whole = int(size)
    found = dict.fromkeys(order[:whole], 1.0)
    return found | {order[whole]: size - whole} if size > whole else found


def size_of_norm(order: Sequence[FeatureId], norms: Float[Tensor, "n_layers n_features"], goal: float) -> float | None:
    """How many features of an order have a summed write norm of ``goal``, as `first_of` takes them.

    Args:
        order: of features.
        norms: of every feature what it writes at the onsets, mean activation times the norm of its decoder row.
        goal: the circuit's sum.

    None where the features write nothing there: no factor makes them the circuit's equal.
    """
    sums = torch.tensor([float(norms[f]) for f in order], dtype=torch.float64).cumsum(0)
    if not len(sums) or float(sums[-1]) <= 0:
        return None
    if goal > float(sums[-1]):
        return len(order) * goal / float(sums[-1])
    at = int((sums < goal).sum())
    before = float(sums[at - 1]) if at else 0.0
    step = float(sums[at]) - before
    return at + ((goal - before) / step if step > 0 else 0.0)


def removed(shares: Shares) -> Variant:
    """The replacement with a share of each feature's activation taken away."""

    def entered(pair: PairedModel) -> Any:
        return gated(pair, _gates(pair, 1.0, {f: 1 - share for f, share in shares.items()}), "replacement")

    return Variant(f"replacement without {len(shares)} features, in part", entered)


def put_in(shares: Shares, strength: float = 1.0) -> Variant:
    """The hybrid with a share of each feature's activation added, ``strength`` times."""

    def entered(pair: PairedModel) -> Any:
        gates = _gates(pair, 0.0, {f: strength * share for f, share in shares.items()})
        return gated(pair, gates, "replacement", decoder_bias=False)

    return Variant(f"hybrid + {len(shares)} features, in part", entered)


def _gates(pair: PairedModel, others: float, chosen: Shares) -> dict[int, Tensor]:
    """Gates of every layer on the model's device: ``others``, but for the chosen features."""
    adapters = pair.installed_adapters()
    like = pair.model.W_E
    gates = torch.full((pair.n_layers, adapters.n_features), others)
    for f, value in chosen.items():
        gates[f] = value
    gates = gates.to(like.device, adapters[adapters.layer_indices[0]].W_dec.dtype)
    return {layer: gates[layer] for layer in adapters.layer_indices}


# -- neurons ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NeuronEffects:
    """What neurons of the base's MLPs do for the word, first order, and what they write elsewhere."""

    off: Float[Tensor, "n_layers d_mlp"]
    """Summed over the onsets, the margin lost without each neuron, in nats."""
    at_mean: Float[Tensor, "n_layers d_mlp"]
    """The same, with the neuron held at its mean."""
    mean: Float[Tensor, "n_layers d_mlp"]
    """Mean activation away from the onsets and what follows them."""
    written_off: Float[Tensor, "n_layers d_mlp"]
    """Mean square of what is taken away there without the neuron: its activation squared, times the squared norm of
    its output row."""
    written_at_mean: Float[Tensor, "n_layers d_mlp"]
    """The same, with the neuron held at its mean."""


def neuron_effects(pair: PairedModel, onsets: Onsets, documents: int | None = None) -> NeuronEffects:
    """Effects of every neuron over the first ``documents`` documents that have an onset (all, if None)."""
    device, n_layers = pair.model.W_E.device, pair.n_layers
    shape = (n_layers, pair.model.cfg.d_mlp)
    times, plus, total, squares = (torch.zeros(shape, device=device) for _ in range(4))
    places = 0
    for _, batch in onsets.with_onsets(documents).batches():
        batch = batch.to(device)
        away = batch.predicting & ~batch.onset & ~batch.continuation
        gates, shifts = (torch.full(shape, v, device=device, requires_grad=True) for v in (1.0, 0.0))

        def multiply(
            acts: Tensor,
            hook: HookPoint,
            layer: int,
            gates: Tensor = gates,
            shifts: Tensor = shifts,
            away: Tensor = away,
        ) -> Tensor:
            here = acts.detach()[away].float()
            total[layer] += here.sum(0)
            squares[layer] += here.square().sum(0)
            return acts * gates[layer].to(acts) + shifts[layer].to(acts)

        hooks = [(f"blocks.{layer}.mlp.hook_post", partial(multiply, layer=layer)) for layer in range(n_layers)]
        with torch.enable_grad(), pair.routed("replacement"), pair.model.hooks(fwd_hooks=hooks):
            said = log_odds(pair, final_residual(pair, batch.tokens), batch, batch.onset)
            by_gate, by_shift = torch.autograd.grad(said.sum(), [gates, shifts])
        times, plus, places = times + by_gate, plus + by_shift, places + int(away.sum())
    mean, square = total / max(1, places), squares / max(1, places)
    rows = torch.stack([mlp.weights()[1].W_out.detach().float().square().sum(-1) for mlp in pair.mlps])
    variance = (square - mean.square()).clamp(min=0)
    return NeuronEffects(times, times - mean * plus, mean, square * rows, variance * rows)


def by_size(scores: Float[Tensor, "n_layers d_mlp"], n: int | None = None) -> list[tuple[int, int]]:
    """(layer, index) of the ``n`` largest scores, largest first; of all, if None."""
    best = scores.flatten().topk(min(scores.numel() if n is None else n, scores.numel())).indices.tolist()
    return [(i // scores.shape[1], i % scores.shape[1]) for i in best]


def commonest_alternative(onsets: Onsets) -> int | None:
    """The token that most often comes at the boundaries, where the words do not; None where there is no boundary.

    A token with which a phrase begins is none: it comes at moments, too.
    """
    there = onsets.next_tokens[onsets.control]
    there = there[~torch.isin(there, torch.tensor(first_tokens(onsets.words), dtype=torch.long, device=there.device))]
    return int(there.mode().values) if len(there) else None
