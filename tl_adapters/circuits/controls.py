"""What a circuit is compared with: other features that are active where it is, and interventions without features.

* random sets of the same size: each feature is replaced by another feature of its layer, drawn among the five whose
  activation at onsets and matched control positions is nearest. Where a circuit is the most active set there is, no
  other set has its activation; so the share of the activation that each set has is reported beside it;
* a harder control: the most active other features at those positions, whatever their layer;
* both again with the circuit's summed write norm at the onsets, and with its harm elsewhere (`control_strengths`);
* the word's logits set to minus infinity, or lowered by a bias (`steering`);
* a difference-of-means direction of the residual stream (onsets less controls), subtracted after a layer, at all
  positions or only after tokens after which the word may come (`steering`);
* neurons of the base's MLPs, set to zero or to their mean (`steering`);
* low rank: directions of the residual stream along which the adapters no longer write (`steering`);
* the same search for the token that most often comes at the control positions (`conditions`).

`control_strengths` sets bias, steering, neurons and low rank to the circuit's own effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.circuits.onsets import Onsets, final_residual, log_odds
from tl_adapters.evaluation.behaviors import first_tokens
from tl_adapters.interventions.variants import FeatureFactors, Variant, multiplied
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.arguments import HasFeatures, feature_pairs
from tl_adapters.utils.precision import host_float64, wide
from tl_adapters.utils.renamed import renamed_arguments

NEAREST_CANDIDATES = 5
"""A matched feature is drawn among this many nearest candidates."""
RELATIVE_RIDGE = 1e-3
"""Added to a covariance that is inverted, as a share of its mean eigenvalue."""


@renamed_arguments(chosen="features")
def matched_features(
    features: Sequence[FeatureId | tuple[int, int]] | HasFeatures,
    activation: Float[Tensor, "n_layers n_features"],
    alive: Bool[Tensor, "n_layers n_features"],
    generator: torch.Generator,
) -> list[FeatureId]:
    """Draw a random set of the same size, matched in layer and activation.

    Args:
        features: pairs (layer, index) to match, or those of a circuit; none of them is drawn.
        activation: of every feature, by which candidates are compared (in log scale).
        alive: features that may be drawn.
        generator: of the draw.

    No feature is drawn twice. Where a layer has too few other alive features, the set is smaller.

    Raises ArgumentError for something that is not a feature.
    """
    chosen = feature_pairs(features)
    free = _without(alive, chosen)
    drawn = []
    order = torch.randperm(len(chosen), generator=generator).tolist()
    for layer, index in (chosen[i] for i in order):
        candidates = free[layer].nonzero()[:, 0]
        if not len(candidates):
            continue
        distance = (
            activation[layer, candidates].clamp(min=1e-6).log() - activation[layer, index].clamp(min=1e-6).log()
        ).abs()
        near = candidates[distance.argsort()[:NEAREST_CANDIDATES]]
        pick = int(near[torch.randint(len(near), (1,), generator=generator)])
        free[layer, pick] = False
        drawn.append(FeatureId(layer, pick))
    return drawn


def matched_order(
    chosen: Sequence[FeatureId],
    first: Sequence[FeatureId],
    activation: Float[Tensor, "n_layers n_features"],
    alive: Bool[Tensor, "n_layers n_features"],
    generator: torch.Generator,
) -> list[FeatureId]:
    """Return the order in which features join a matched set that is enlarged to a write norm or a harm.

    It is ``first``, then further matched sets of the features that are left, until the layers have no more.
    """
    order, free = list(first), alive.clone()
    added: Sequence[FeatureId] = first
    while added:
        for f in added:
            free[f] = False
        added = matched_features(chosen, activation, free, generator)
        order += added
    return order


def _without(
    alive: Bool[Tensor, "n_layers n_features"], features: Sequence[FeatureId | tuple[int, int]]
) -> Bool[Tensor, "n_layers n_features"]:
    """The alive features without some."""
    free = alive.clone()
    for layer, index in features:
        free[layer, index] = False
    return free


@renamed_arguments(chosen="features")
def most_active_others(
    features: Sequence[FeatureId | tuple[int, int]] | HasFeatures,
    activation: Float[Tensor, "n_layers n_features"],
    alive: Bool[Tensor, "n_layers n_features"],
    n: int,
) -> list[FeatureId]:
    """Return the ``n`` most active alive features outside a set (all of them, where there are fewer).

    Args:
        features: the set: pairs (layer, index), or those of a circuit.
        activation: of every feature.
        alive: features that may be returned.
        n: how many are returned.

    Raises ArgumentError for something that is not a feature.
    """
    free = _without(alive, feature_pairs(features))
    best = activation.masked_fill(~free, -torch.inf).flatten().topk(min(n, int(free.sum()))).indices.tolist()
    return [FeatureId(i // activation.shape[1], i % activation.shape[1]) for i in best]


# -- features in part ---------------------------------------------------------------------------------------------

Shares = Mapping[FeatureId, float]
"""Feature -> the share of its activation that is removed or added; more than 1 inverts a removed activation."""


def first_features(order: Sequence[FeatureId], size: float) -> dict[FeatureId, float]:
    """Return the shares of the first ``size`` features of an order; the last of them has a fractional share.

    A size beyond the order gives every feature the same share above 1. So the size of a set can be set as finely as a
    coefficient.
    """
    if not order or size <= 0:
        return {}
    if size >= len(order):
        return dict.fromkeys(order, size / len(order))
    whole = int(size)
    shares = dict.fromkeys(order[:whole], 1.0)
    return shares | {order[whole]: size - whole} if size > whole else shares


def size_for_norm(order: Sequence[FeatureId], norms: Float[Tensor, "n_layers n_features"], goal: float) -> float | None:
    """Return the size at which `first_features` of an order have a summed write norm of ``goal``.

    Args:
        order: of features.
        norms: of every feature, mean activation at the onsets times the norm of its decoder row.
        goal: the circuit's sum.

    It is None where the features write nothing at the onsets, so that no factor gives them the circuit's norm.
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


def removed_in_part(shares: Shares) -> Variant:
    """The replacement with a share of each feature's activation removed."""
    left = FeatureFactors("replacement", tuple((f, 1 - share) for f, share in shares.items()))
    return multiplied(f"replacement without {len(shares)} features, in part", left)


def inserted_in_part(shares: Shares, strength: float = 1.0) -> Variant:
    """The hybrid with a share of each feature's activation added, ``strength`` times."""
    factors = tuple((f, strength * share) for f, share in shares.items())
    added = FeatureFactors("replacement", factors, others=0.0, decoder_bias=False)
    return multiplied(f"hybrid + {len(shares)} features, in part", added)


# -- neurons ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NeuronEffects:
    """First-order effects of neurons of the base's MLPs on the word, and what the neurons write elsewhere."""

    off: Float[Tensor, "n_layers d_mlp"]
    """Summed over the onsets, the log-odds lost when each neuron is set to zero, in nats."""
    at_mean: Float[Tensor, "n_layers d_mlp"]
    """The same, when the neuron is set to its mean."""
    mean: Float[Tensor, "n_layers d_mlp"]
    """Mean activation away from the onsets and continuations."""
    written_off: Float[Tensor, "n_layers d_mlp"]
    """Mean squared norm of what is removed there with the neuron at zero: the squared activation times the squared
    norm of the output row."""
    written_at_mean: Float[Tensor, "n_layers d_mlp"]
    """The same, with the neuron at its mean."""


def neuron_effects(pair: PairedModel, onsets: Onsets, documents: int | None = None) -> NeuronEffects:
    """Measure the effects of every neuron over the first ``documents`` documents that have an onset (all, if None)."""
    device, n_layers = pair.device, pair.n_layers
    shape = (n_layers, pair.model.cfg.d_mlp)
    times, plus, total, squares = (torch.zeros(shape, device=device) for _ in range(4))
    n_away = 0
    for _, batch in onsets.with_onsets(n=documents).batches():
        batch = batch.to(device)
        written: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: a hook runs again where blocks are computed again
        gates, shifts = (torch.full(shape, v, device=device, requires_grad=True) for v in (1.0, 0.0))

        def multiply(
            acts: Tensor,
            hook: HookPoint,
            layer: int,
            gates: Tensor = gates,
            shifts: Tensor = shifts,
            away: Tensor = batch.away_from_onsets,
            written: dict[int, tuple[Tensor, Tensor]] = written,
        ) -> Tensor:
            away_acts = acts.detach()[away].float()
            written[layer] = away_acts.sum(0), away_acts.square().sum(0)
            return acts * gates[layer].to(acts) + shifts[layer].to(acts)

        hooks = [(f"blocks.{layer}.mlp.hook_post", partial(multiply, layer=layer)) for layer in range(n_layers)]
        with torch.enable_grad(), pair.routed("replacement"), pair.model.hooks(fwd_hooks=hooks):
            odds = log_odds(pair, final_residual(pair, batch.tokens), batch, batch.onset)
            by_gate, by_shift = torch.autograd.grad(odds.sum(), [gates, shifts])
        times, plus, n_away = times + by_gate, plus + by_shift, n_away + int(batch.away_from_onsets.sum())
        for layer, (total_of_batch, squares_of_batch) in written.items():
            total[layer] += total_of_batch
            squares[layer] += squares_of_batch
    mean, square = total / max(1, n_away), squares / max(1, n_away)
    rows = torch.stack([mlp.weights()[1].W_out.detach().float().square().sum(-1) for mlp in pair.mlps])
    variance = (square - mean.square()).clamp(min=0)
    return NeuronEffects(times, times - mean * plus, mean, square * rows, variance * rows)


def largest_scores(scores: Float[Tensor, "n_layers d_mlp"], n: int | None = None) -> list[tuple[int, int]]:
    """Return (layer, index) of the ``n`` largest scores, largest first; of all scores, if None."""
    best = scores.flatten().topk(min(scores.numel() if n is None else n, scores.numel())).indices.tolist()
    return [(i // scores.shape[1], i % scores.shape[1]) for i in best]


# -- low rank -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WrittenDirection:
    """A unit direction of the residual stream along which an adapter writes at the onsets."""

    layer: int
    """Layer of the adapter."""
    direction: Float[Tensor, "d_model"]
    """The direction; those of one layer are orthonormal."""
    score: float
    """By which the directions of all layers are ordered."""


@torch.no_grad()
def written_directions(pair: PairedModel, onsets: Onsets) -> dict[str, list[WrittenDirection]]:
    """Directions that the adapters write along at the onsets, in two orders, by their names; the largest score first.

    * by energy at the onsets: the right singular vectors of what an adapter writes there; the score is the mean square;
    * by energy at the onsets over that elsewhere: the same in coordinates in which what it writes away from the onsets
      has the same energy in every direction, made orthonormal in their order; the score is the ratio.
    """
    d_model, n_away = pair.model.cfg.d_model, 0
    at_onsets: list[list[Tensor]] = [[] for _ in range(pair.n_layers)]
    elsewhere = [wide(torch.zeros(d_model, d_model, device=pair.device)) for _ in range(pair.n_layers)]
    for _, batch in onsets.batches():
        batch = batch.to(pair.device)
        with pair.routed("replacement"), pair.recorded("mlp.hook_adapter_out") as written:
            final_residual(pair, batch.tokens)
        n_away += int(batch.away_from_onsets.sum())
        for layer in range(pair.n_layers):
            at_onsets[layer].append(host_float64(written[layer][batch.onset]))
            rows = wide(written[layer][batch.away_from_onsets])
            elsewhere[layer] += rows.T @ rows
    orders: dict[str, list[WrittenDirection]] = {
        "by energy at the onsets": [],
        "by energy at the onsets over that elsewhere": [],
    }
    for layer in range(pair.n_layers):
        rows = torch.cat(at_onsets[layer]) / max(1, sum(map(len, at_onsets[layer]))) ** 0.5
        covariance = host_float64(elsewhere[layer]) / max(1, n_away)
        for order, found in zip(orders.values(), (None, covariance), strict=True):
            scores, directions = _strongest_directions(rows, found)
            n = int((scores > 1e-12 * scores.max()).sum()) if len(scores) else 0
            order += [WrittenDirection(layer, directions[:, i], float(scores[i])) for i in range(n)]
    return {name: sorted(order, key=lambda d: -d.score) for name, order in orders.items()}


def _strongest_directions(
    rows: Float[Tensor, "n d_model"], elsewhere: Float[Tensor, "d_model d_model"] | None
) -> tuple[Float[Tensor, "r"], Float[Tensor, "d_model r"]]:
    """Orthonormal directions in columns along which rows have most energy, strongest first, with the energies.

    With a covariance ``elsewhere`` the energies are relative to it.
    """
    if elsewhere is None:
        _, singular, right = torch.linalg.svd(rows, full_matrices=False)
        return singular.square(), right.T
    ridge = RELATIVE_RIDGE * elsewhere.diagonal().mean().clamp(min=1e-12)
    factor = torch.linalg.cholesky(elsewhere + ridge * torch.eye(len(elsewhere), dtype=elsewhere.dtype))
    _, singular, right = torch.linalg.svd(
        torch.linalg.solve_triangular(factor, rows.T, upper=False).T, full_matrices=False
    )
    return singular.square(), torch.linalg.qr(torch.linalg.solve_triangular(factor.T, right.T, upper=True)).Q


def commonest_alternative(onsets: Onsets) -> int | None:
    """Return the token that most often comes at the control positions; None where there are none.

    Tokens with which a word or phrase begins are left out, because they come at onsets too.
    """
    following = onsets.next_tokens[onsets.control]
    first = torch.tensor(first_tokens(onsets.phrases), dtype=torch.long, device=following.device)
    following = following[~torch.isin(following, first)]
    return int(following.mode().values) if len(following) else None
