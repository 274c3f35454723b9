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
from tl_adapters.local_stage.local_layer import LocalLayer

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
LARGEST_COST = 0.1
"""A birth may take a feature that explains at most this share of what the new one will."""
ACTIVE_TOKENS, INACTIVE_TOKENS = 6_000, 20_000
"""Most active and most inactive tokens to which an encoder is fitted."""
MIN_FIRINGS = 3
"""A feature with fewer active tokens counts as unused."""


@torch.no_grad()
def merge_split_features(layer: LocalLayer, x: Float[Tensor, "n d_model"], generator: torch.Generator) -> int:
    """Merge features with one decoder direction, where one feature can have the sum of their activations.

    Args:
        layer: the layer, whose adapter changes.
        x: tokens in the layer's coordinates.
        generator: draws the tokens to which encoders are fitted.

    Returns: the number of features that are free now.
    """
    acts = layer.adapter.encode(x)
    energy = _energy(layer, acts)
    norms, directions = row_norms(layer.adapter.W_dec), unit_rows(layer.adapter.W_dec)
    cosines, left, freed = directions @ directions.T, energy > 0, 0
    for feature in energy.argsort(descending=True).tolist():
        if not left[feature]:
            continue
        group = ((cosines[feature] > SAME_DIRECTION) & left).nonzero()[:, 0]
        left[group] = False
        if len(group) < 2:
            continue
        wanted = acts[:, group] @ norms[group]
        encoder = _fit(x, wanted, generator)
        if encoder is None:
            continue
        missed = (torch.relu(x @ encoder.w + encoder.b) - wanted).square().sum()
        if float(missed) > LARGEST_MERGE_ERROR * float(wanted.square().sum()):
            continue
        layer.silence(group)
        layer.replace(feature, encoder, unit_rows(energy[group] @ directions[group]))
        freed += len(group) - 1
    return freed


@torch.no_grad()
def give_birth(
    layer: LocalLayer, x: Float[Tensor, "n d_model"], d: Float[Tensor, "n d_model"], generator: torch.Generator
) -> int:
    """Give unused and least-used features the directions that clusters of large residuals share.

    Args: as `merge_split_features`; d: differences in the layer's coordinates.

    Returns: the number of features that were born.
    """
    acts = layer.adapter.encode(x)
    residual = d - layer.adapter.decode(acts)
    energy, lengths = _energy(layer, acts), residual.square().sum(1)
    slots, born = energy.argsort().tolist(), 0
    written = unit_rows(layer.adapter.W_dec[energy > 0])
    for direction in residual_directions(residual, d, generator):
        if bool((written @ direction > SAME_DIRECTION).any()):
            continue  # a feature has this direction, and lacks only the right encoder
        along = residual @ direction
        tokens = (along > 0.1) & (along.square() > 0.8 * lengths)
        wanted = torch.where(tokens, along, 0.0)
        encoder = _fit(x, wanted, generator, ridge=1e-2)
        if encoder is None or born == len(slots):
            continue
        if float(energy[slots[born]]) > LARGEST_COST * float(wanted.square().sum()):
            break  # the least-used feature explains more than this one would
        layer.replace(slots[born], encoder, direction)
        born += 1
    return born


@torch.no_grad()
def residual_directions(
    residual: Float[Tensor, "n d_model"], d: Float[Tensor, "n d_model"], generator: torch.Generator
) -> list[Float[Tensor, "d_model"]]:
    """Unit directions that clusters of large residuals share, the largest cluster first.

    Residuals are drawn by their length, not its square: rare but strong tokens must not crowd out the others.
    """
    energy = residual.square().sum(1)
    large = (energy > LARGE_RESIDUAL**2 * d.square().sum(1)) & (energy > SMALLEST_ENERGY)
    rows = large.nonzero()[:, 0]
    if len(rows) < SMALLEST_CLUSTER:
        return []
    rows = rows[_draw(energy[rows].sqrt().cpu(), CLUSTERED_RESIDUALS, generator).to(rows.device)]
    units = unit_rows(residual[rows].unique(dim=0))  # equal tokens make no cluster
    near = units @ units.T > SAME_DIRECTION
    left = torch.ones(len(units), dtype=torch.bool, device=units.device)
    directions: list[Tensor] = []
    while True:
        sizes = near[:, left].sum(1) * left
        center = int(sizes.argmax())
        if int(sizes[center]) < SMALLEST_CLUSTER:
            return directions
        members = near[center] & left
        for _ in range(2):
            direction = unit_rows(units[members].mean(0))
            members = (units @ direction > SAME_DIRECTION) & left
        left &= ~(units @ direction > SAME_DIRECTION) & ~near[center]
        directions.append(direction)


def _energy(layer: LocalLayer, acts: Float[Tensor, "n n_features"]) -> Float[Tensor, "n_features"]:
    """What every feature alone adds: its activations' energy in decoder-norm units; 0 for an unused one."""
    energy = acts.square().sum(0) * row_norms(layer.adapter.W_dec).square()
    return torch.where((acts > 0).sum(0) < MIN_FIRINGS, 0.0, energy)


def _fit(x: Tensor, wanted: Tensor, generator: torch.Generator, ridge: float = 1e-3) -> Encoder | None:
    """The encoder for wanted activations, fitted to a draw of the active and of the inactive tokens."""
    active, inactive = _sample(wanted > 0, ACTIVE_TOKENS, generator), _sample(wanted <= 0, INACTIVE_TOKENS, generator)
    rows = torch.cat([active, inactive])
    return fit_encoder(x[rows], wanted[rows], ridge=ridge)


def _sample(tokens: Bool[Tensor, "n"], most: int, generator: torch.Generator) -> Tensor:
    """Indices of at most ``most`` of the given tokens."""
    rows = tokens.nonzero()[:, 0]
    return rows[torch.randperm(len(rows), generator=generator)[:most].to(rows.device)]


def _draw(weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """At most n indices, drawn without replacement in proportion to weights (Efraimidis and Spirakis, 2006)."""
    keys = torch.rand(len(weights), generator=generator, dtype=torch.float64).log() / weights.double()
    return keys.topk(min(n, len(weights))).indices


@torch.no_grad()
def remove_useless_features(
    layer: LocalLayer, x: Float[Tensor, "n d_model"], d: Float[Tensor, "n d_model"], smallest_gain: float
) -> int:
    """Silence features without which the error is hardly higher, or lower; those that write least come first.

    Args: as `give_birth`; smallest_gain: share of the difference's energy by which the error must be higher.

    Returns: the number of features that were active on some token and were removed.
    """
    acts = layer.adapter.encode(x)
    decoder, residual = layer.adapter.W_dec, d - layer.adapter.decode(acts)
    total, removed = float(d.square().sum()), 0
    for feature in _energy(layer, acts).argsort().tolist():
        tokens = (acts[:, feature] > 0).nonzero()[:, 0]
        written = acts[tokens, feature, None] * decoder[feature]
        gain = float(2 * (residual[tokens] * written).sum() + written.square().sum()) / total
        if gain < smallest_gain:
            residual[tokens] += written
            layer.silence(torch.tensor([feature]))
            removed += len(tokens) > 0
    return removed
