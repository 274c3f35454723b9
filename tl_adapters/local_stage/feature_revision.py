"""Changes to the features of a layer between steps of the local stage: merging split ones, and births of missing ones.

Gradient steps alone leave two kinds of error. Several features can share one decoder direction and divide the
activations of one true feature among themselves; they are merged into one whose encoder is fitted to the sum of their
activations. And a rare direction of the difference can be represented by no feature; it shows as a cluster of large
residuals, and an unused feature is given its direction and an encoder fitted to the tokens of the cluster.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_adapters.adapters.transcoder import row_norms, unit_rows
from tl_adapters.local_stage.encoder_fit import Encoder, fit_encoder
from tl_adapters.local_stage.layer_tokens import LayerTokens

SAME_DIRECTION = 0.9
"""Cosine above which two directions are the same."""
LARGEST_MERGE_ERROR = 0.4
"""Share of the summed activations' energy that a merged feature may miss; a group that misses more stays split."""
LARGE_RESIDUAL = 0.5
"""A residual is large if it is longer than this share of its token's difference."""
SMALLEST_ENERGY = 1e-3
"""Least squared length of a large residual, in units of the mean squared length of the difference."""
CLUSTERED_RESIDUALS, SMALLEST_CLUSTER = 4096, 4
"""Number of residuals that are clustered, and the fewest that make a cluster."""
DIRECTIONS_AT_ONCE = 16
"""Number of directions on which all residuals are projected at a time."""
ALONG, ALONG_SHARE = 0.1, 0.8
"""A residual is along a direction if its projection is longer than the first, in units of the root mean square of the
difference, and has more than the second of its energy."""
LARGEST_COST = 0.1
"""A birth may take a feature that explains at most this share of what the new one will."""
ACTIVE_TOKENS, INACTIVE_TOKENS = 6_000, 20_000
"""Most active and most inactive tokens to which an encoder is fitted."""


@torch.no_grad()
def merge_split_features(tokens: LayerTokens, generator: torch.Generator) -> int:
    """Merge features with one decoder direction, where one feature can have the sum of their activations.

    Args:
        tokens: tokens of the layer whose features change.
        generator: draws the tokens to which encoders are fitted.

    Returns: the number of features that are free now.
    """
    W_dec, energy = tokens.layer.adapter.W_dec, tokens.energy()
    norms, directions = row_norms(W_dec), unit_rows(W_dec)
    cosines, left, freed = directions @ directions.T, energy > 0, 0
    for feature in energy.argsort(descending=True).tolist():
        if not left[feature]:
            continue
        group = ((cosines[feature] > SAME_DIRECTION) & left).nonzero()[:, 0]
        left[group] = False
        if len(group) < 2:
            continue
        wanted = torch.stack([tokens.activations(member) * norms[member] for member in group.tolist()]).sum(0)
        encoder = _fit(tokens.x, wanted, generator)
        if encoder is None:
            continue
        acts = tokens.encoded([encoder])[0].relu_()
        missed = (acts - wanted).square().sum()
        if float(missed) > LARGEST_MERGE_ERROR * float(wanted.square().sum()):
            continue
        direction = unit_rows(energy[group] @ directions[group])
        for member in group.tolist():
            tokens.silence(member)
        tokens.replace(feature, encoder, direction, acts)
        freed += len(group) - 1
    return freed


@torch.no_grad()
def give_birth(tokens: LayerTokens, generator: torch.Generator) -> int:
    """Give unused and least-used features the directions that clusters of large residuals share.

    Args: as `merge_split_features`.

    Returns: the number of features that were born.
    """
    energy, residual = tokens.energy(), tokens.residual.clone()
    lengths = row_norms(residual).square()
    slots, born = energy.argsort().tolist(), 0
    written = unit_rows(tokens.layer.adapter.W_dec[energy > 0])
    found = residual_directions(residual, tokens.d, generator)
    # Where a feature has the direction, it lacks only the right encoder.
    missing = [direction for direction in found if not bool((written @ direction > SAME_DIRECTION).any())]
    for start in range(0, len(missing), DIRECTIONS_AT_ONCE):
        some, fits = missing[start : start + DIRECTIONS_AT_ONCE], list[tuple[Tensor, float, Encoder]]()
        for direction, along in zip(some, torch.stack(some) @ residual.T, strict=True):
            wanted = torch.where((along > ALONG) & (along.square() > ALONG_SHARE * lengths), along, 0.0)
            if (encoder := _fit(tokens.x, wanted, generator)) is not None:
                fits.append((direction, float(wanted.square().sum()), encoder))
        activations = tokens.encoded([encoder for *_, encoder in fits]).relu_()
        for (direction, size, encoder), acts in zip(fits, activations, strict=True):
            if born == len(slots) or float(energy[slots[born]]) > LARGEST_COST * size:
                return born  # the least-used feature explains more than this one would
            tokens.replace(slots[born], encoder, direction, acts)
            born += 1
    return born


@torch.no_grad()
def residual_directions(
    residual: Float[Tensor, "n d_model"], d: Float[Tensor, "n d_model"], generator: torch.Generator
) -> list[Float[Tensor, "d_model"]]:
    """Unit directions that clusters of large residuals share, the largest cluster first.

    Residuals are drawn by their length, not its square: rare but strong tokens must not crowd out the others.
    """
    energy = row_norms(residual).square()
    large = (energy > LARGE_RESIDUAL**2 * row_norms(d).square()) & (energy > SMALLEST_ENERGY)
    rows = large.nonzero()[:, 0]
    if len(rows) < SMALLEST_CLUSTER:
        return []
    rows = rows[_draw(energy[rows].sqrt().cpu(), CLUSTERED_RESIDUALS, generator).to(rows.device)]
    units = unit_rows(residual.index_select(0, rows).unique(dim=0))  # equal tokens make no cluster
    near = units @ units.T > SAME_DIRECTION
    left = torch.ones(len(units), dtype=torch.bool, device=units.device)
    sizes, directions = near.sum(1), list[Tensor]()
    while True:
        center = int((sizes * left).argmax())
        if int(sizes[center] * left[center]) < SMALLEST_CLUSTER:
            return directions
        members = near[center] & left
        for _ in range(2):
            direction = unit_rows(units[members].mean(0))
            members = (units @ direction > SAME_DIRECTION) & left
        gone = members | (left & near[center])
        left &= ~gone
        sizes -= near[gone].sum(0)
        directions.append(direction)


@torch.no_grad()
def remove_useless_features(tokens: LayerTokens, smallest_gain: float) -> int:
    """Silence features without which the error is hardly higher, or lower; those that write least come first.

    Args:
        tokens: tokens of the layer whose features change.
        smallest_gain: share of the difference's energy by which the error must be higher.

    Returns: the number of features that were active on some token and were removed.
    """
    total, removed = float(row_norms(tokens.d).square().sum()), 0
    for feature in tokens.energy().argsort().tolist():
        if tokens.gain(feature) < smallest_gain * total:
            removed += len(tokens.tokens[feature]) > 0
            tokens.silence(feature)
    return removed


def _fit(x: Tensor, wanted: Tensor, generator: torch.Generator) -> Encoder | None:
    """The encoder for wanted activations, fitted to a draw of the active and of the inactive tokens."""
    active, inactive = _sample(wanted > 0, ACTIVE_TOKENS, generator), _sample(wanted <= 0, INACTIVE_TOKENS, generator)
    rows = torch.cat([active, inactive])
    return fit_encoder(x.index_select(0, rows), wanted[rows])


def _sample(chosen: Bool[Tensor, "n"], most: int, generator: torch.Generator) -> Tensor:
    """Indices of at most ``most`` of the chosen tokens."""
    rows = chosen.nonzero()[:, 0]
    return rows[torch.randperm(len(rows), generator=generator)[:most].to(rows.device)]


def _draw(weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """At most n indices, drawn without replacement in proportion to weights (Efraimidis and Spirakis, 2006)."""
    keys = torch.rand(len(weights), generator=generator, dtype=torch.float64).log() / weights.double()
    return keys.topk(min(n, len(weights))).indices
