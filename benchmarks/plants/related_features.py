"""Features that are related: one is active within another's tokens only, and pairs are correlated.

Of every four features of a layer, the second is a child of the first (active on a fifth of its tokens and hardly
anywhere else), and the third and fourth have activations of correlation 0.5. All decoders are random directions, so
that the features are as different in what they write as those of other families.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from plants.plant import Ground, Plant, layer_inputs, output_size
from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.transcoder import TranscoderAdapter, unit_rows
from tl_adapters.evaluation.planted_features import PlantingError, threshold_at_rate
from tl_adapters.local_stage.whitening import RunningCovariance, Whitening

CHILD_RATE = 0.2
"""Firing rate of a child over its parent's."""
SMALLEST_RATE = 1e-4
"""Lowest firing rate of a child."""
CONTAINMENT = 0.98
"""Least share of a child's tokens on which its parent is active."""
CORRELATION, TOLERANCE = 0.5, 0.02
"""Correlation of the activations of a pair, and by how much it may differ."""
SHRINKAGE = 1e-2
"""Share of the largest eigenvalue of the inputs' covariance that is added to all, so that features read directions in
which the inputs vary."""
ANGLES = 40
"""Number of angles that are tried between the encoders of two related features."""


class Direction(NamedTuple):
    """An encoder in whitened coordinates, with the threshold and activations at its rate."""

    w: Float[Tensor, "d_model"]
    threshold: float
    acts: Float[Tensor, "n"]

    @property
    def on(self) -> Tensor:
        return self.acts > 0


@torch.no_grad()
def related_features(ground: Ground, seed: int) -> Plant:
    """Plant related features in every layer, on the stream of the target with those of the earlier layers."""
    generator = torch.Generator().manual_seed(seed)
    empty = [TranscoderAdapter(ground.d_model, ground.per_layer) for _ in range(ground.n_layers)]
    growing = ground.plant(AdapterSet(empty))
    about: list[dict[str, Any]] = []
    for layer, mlp in enumerate(growing.mlps):
        x = layer_inputs(growing, ground.calibration, layer)
        inputs = RunningCovariance(ground.d_model)
        inputs.add(x)
        whitening = Whitening.of(inputs, SHRINKAGE)
        size = ground.strength * output_size(mlp, x)
        x = whitening(x.float())
        directions = _directions(x, ground, generator, layer, about)
        assert growing.planted is not None
        _write(growing.planted[layer], whitening, directions, size, generator)
    assert growing.planted is not None
    return Plant(pair := ground.plant(growing.planted), pair.planted, {"related": about})


def _directions(
    x: Tensor, ground: Ground, generator: torch.Generator, layer: int, about: list[dict[str, Any]]
) -> list[Direction]:
    """The features of a layer: a parent, its child and a pair, for rates from the highest to the lowest."""
    found: list[Direction] = []
    groups = math.ceil(ground.per_layer / 4)
    for group in range(groups):
        rate = ground.rates[group * len(ground.rates) // groups]  # from the highest to the lowest
        parent = _random(x, rate, generator)
        child, containment = _child(x, parent, max(SMALLEST_RATE, CHILD_RATE * rate), generator)
        one = _random(x, rate, generator)
        other, correlation = _correlated(x, one, rate, generator)
        at = len(found)
        about.append({"layer": layer, "kind": "child", "of": at, "feature": at + 1, "containment": containment})
        about.append({"layer": layer, "kind": "pair", "of": at + 2, "feature": at + 3, "correlation": correlation})
        found += [parent, child, one, other]
    return found[: ground.per_layer]


def _at_rate(x: Tensor, w: Tensor, rate: float) -> Direction | None:
    cut = threshold_at_rate(x @ w, rate)
    return None if cut is None else Direction(w, *cut)


def _random(x: Tensor, rate: float, generator: torch.Generator) -> Direction:
    """A random direction at a rate."""
    for _ in range(ANGLES):
        if (found := _at_rate(x, _unit(x, generator), rate)) is not None:
            return found
    raise PlantingError(f"No direction fires on a share of {rate:g} of these tokens; give more varied traces.")


def _unit(x: Tensor, generator: torch.Generator) -> Tensor:
    return unit_rows(torch.randn(x.shape[1], generator=generator)).to(x)


def _turned(x: Tensor, direction: Direction, rate: float, generator: torch.Generator) -> list[Direction]:
    """The direction turned towards a random one that is orthogonal to it, by ever larger angles below 90 degrees."""
    away = _unit(x, generator)
    away = unit_rows(away - (away @ direction.w) * direction.w)
    angles = [(i + 1) / (ANGLES + 1) * math.pi / 2 for i in range(ANGLES)]
    turned = (_at_rate(x, math.cos(a) * direction.w + math.sin(a) * away, rate) for a in angles)
    return [found for found in turned if found is not None]


def _child(x: Tensor, parent: Direction, rate: float, generator: torch.Generator) -> tuple[Direction, float]:
    """A feature at a lower rate that is active within the parent's tokens, at the largest angle at which it is."""
    candidates = [(c, int((c.on & parent.on).sum()) / int(c.on.sum())) for c in _turned(x, parent, rate, generator)]
    contained = [(c, share) for c, share in candidates if share >= CONTAINMENT]
    if not contained:
        raise PlantingError(f"No feature of rate {rate:g} is active within the tokens of another; give more traces.")
    return contained[-1]


def _correlated(x: Tensor, one: Direction, rate: float, generator: torch.Generator) -> tuple[Direction, float]:
    """A feature whose activations have a correlation of about `CORRELATION` with those of ``one``."""
    for _ in range(ANGLES):
        turned = _turned(x, one, rate, generator)
        values = [float(torch.corrcoef(torch.stack([one.acts, c.acts]))[0, 1]) for c in turned]
        best = min(range(len(turned)), key=lambda i: abs(values[i] - CORRELATION), default=None)
        if best is not None and abs(values[best] - CORRELATION) <= TOLERANCE:
            return turned[best], values[best]
    raise PlantingError(f"No two features of rate {rate:g} have a correlation of {CORRELATION}; give more traces.")


def _write(
    adapter: TranscoderAdapter,
    whitening: Whitening,
    directions: list[Direction],
    size: float,
    generator: torch.Generator,
) -> None:
    """Write the features of a layer; ``size`` is the root mean square of what one writes where it is active."""
    W_enc = torch.stack([d.w for d in directions], 1)
    W_enc, b_enc = whitening.encoder(W_enc, -torch.tensor([d.threshold for d in directions]))
    adapter.W_enc.copy_(W_enc)
    adapter.b_enc.copy_(b_enc)
    for index, direction in enumerate(directions):
        scale = size / float(direction.acts[direction.on].square().mean().sqrt())
        adapter.W_dec[index] = scale * unit_rows(torch.randn(adapter.W_dec.shape[1], generator=generator))
