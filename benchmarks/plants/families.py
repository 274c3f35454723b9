"""Families of plants, by name. A family makes a `Plant` from a ground and a seed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict

import torch

from plants.edited_neurons import edited_neurons
from plants.learned_features import learned_features
from plants.plant import Ground, Plant, layer_inputs
from plants.related_features import related_features
from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.evaluation.planted_features import plant_features
from tl_adapters.models.paired_model import PairedModel

NOISE_SHARE = 0.1
"""Energy of the dense noise over that of the planted features."""


def discriminants(ground: Ground, seed: int) -> Plant:
    """The features of `plant_features`: encoders are discriminants of texts, or random directions."""
    return _planted(ground, seed, ground.pair(copy.deepcopy(ground.base)), None)


def attention(ground: Ground, seed: int) -> Plant:
    """The same features in a target whose attention is that of another model."""
    target = copy.deepcopy(ground.base)
    for block, other in zip(target.model.layers, ground.other.model.layers, strict=True):
        block.self_attn.load_state_dict(other.self_attn.state_dict())
    return _planted(ground, seed, ground.pair(copy.deepcopy(target)), target)


@torch.no_grad()
def noise(ground: Ground, seed: int) -> Plant:
    """The same features, and in every layer a dense change of the MLP that has a tenth of their energy."""
    clean = discriminants(ground, seed)
    target, generator = copy.deepcopy(ground.base), torch.Generator().manual_seed(seed)
    for layer, block in enumerate(target.model.layers):
        mlp, x = clean.pair.mlps[layer], layer_inputs(clean.pair, ground.calibration, layer)
        weight = block.mlp.down_proj.weight
        change = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight)
        _, base = mlp.weights()
        written = base.neurons(x) @ change.T
        change *= (NOISE_SHARE * mlp.planted(x).square().sum() / written.square().sum()).sqrt()
        weight += change
    pair = ground.plant(clean.truth, target)
    return Plant(pair, pair.planted, clean.about)


def _planted(ground: Ground, seed: int, host: PairedModel, target: torch.nn.Module | None) -> Plant:
    """Features of `plant_features`, made for the stream of the hybrid of ``host``."""
    options = dict(per_layer=ground.per_layer, rates=ground.rates, strength=ground.strength, seed=seed)
    made = plant_features(host, ground.calibration, **options)
    pair = ground.plant(AdapterSet(list(made.adapters)), target)
    return Plant(pair, pair.planted, {"features": [asdict(feature) for feature in made.features]})


FAMILIES: dict[str, Callable[[Ground, int], Plant]] = {
    "discriminants": discriminants,
    "related": related_features,
    "noise": noise,
    "attention": attention,
    "learned": learned_features,
    "neurons": edited_neurons,
}
"""The families, from the adapters' own kind of feature to another kind."""
