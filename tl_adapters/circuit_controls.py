"""What a circuit is held against: other features that are active where it is, and cheaper ways to stop a word.

* random sets of the same size, each feature replaced by another of its layer whose activation mass at the same places
  (moments and boundaries together) is nearest, drawn among the nearest five. Where a circuit is the most active set
  there is, no other set has its mass: so the share of the mass that each set holds is reported beside it;
* a harder one: several times as many features, the most active of the others at those places, whatever their layer;
* the word's logits set to minus infinity, or lowered by the gap;
* a difference-of-means direction of the residual stream (moments less boundaries) taken off everywhere, at the layer
  and with the coefficient that stop the word best on the select split;
* equally many neurons of the base's MLPs, those with the largest activation times gradient at the moments, off;
* the same search run for the token that most often comes at the boundaries instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_adapters.adapter import FeatureId
from tl_adapters.behaviors import Words, first_tokens
from tl_adapters.moments import Moments, final_residual, margins_from
from tl_adapters.paired import PairedModel
from tl_adapters.variants import Variant

NEAREST = 5
"""A feature's stand-in is drawn among so many."""
COEFFICIENTS = (0.5, 1.0, 2.0, 4.0)
"""Coefficients of the steering vector that are tried."""
TRIED_DOCUMENTS = 60
"""Documents on which steering is chosen and neurons are ranked."""


def matched_features(
    chosen: Sequence[FeatureId],
    mass: Float[Tensor, "n_layers n_features"],
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
        distance = (mass[layer, candidates].clamp(min=1e-6).log() - mass[layer, index].clamp(min=1e-6).log()).abs()
        near = candidates[distance.argsort()[:NEAREST]]
        pick = int(near[torch.randint(len(near), (1,), generator=generator)])
        free[layer, pick] = False
        found.append(FeatureId(layer, pick))
    return found


def most_active_others(
    chosen: Sequence[FeatureId],
    mass: Float[Tensor, "n_layers n_features"],
    alive: Bool[Tensor, "n_layers n_features"],
    n: int,
) -> list[FeatureId]:
    """The ``n`` alive features outside a set with the largest mass (all of them, where there are fewer)."""
    free = alive.clone()
    for f in chosen:
        free[f] = False
    best = mass.masked_fill(~free, -torch.inf).flatten().topk(min(n, int(free.sum()))).indices.tolist()
    return [FeatureId(i // mass.shape[1], i % mass.shape[1]) for i in best]


def shifted_logits(words: Words | Sequence[int], by: float) -> Variant:
    """The replacement with the words' logits changed by so much; minus infinity bans them.

    Of phrases it is the tokens that begin them, whatever comes after these (`banning` bans the phrases).
    The change comes before a soft cap, where the model has one: banned words then have the lowest logit there is.
    """

    @contextmanager
    def entered(pair: PairedModel) -> Iterator[Any]:
        def shift(module: object, inputs: object, logits: Tensor) -> Tensor:
            change = torch.zeros(logits.shape[-1], dtype=logits.dtype, device=logits.device)
            change[list(first_tokens(words))] = by
            return logits + change

        handle = pair.model.unembed.register_forward_hook(shift)
        try:
            with pair.routed("replacement") as model:
                yield model
        finally:
            handle.remove()

    return Variant("words banned" if by == -torch.inf else f"words' logits {by:+.1f}", entered)


def steered(layer: int, direction: Float[Tensor, "d_model"], coefficient: float) -> Variant:
    """The replacement with a direction taken off the residual stream after a layer, everywhere."""

    def take_off(resid: Tensor, hook: HookPoint) -> Tensor:
        return resid - coefficient * direction.to(resid)

    @contextmanager
    def entered(pair: PairedModel) -> Iterator[Any]:
        hooks = [(f"blocks.{layer}.hook_resid_post", take_off)]
        with pair.routed("replacement") as model, model.hooks(fwd_hooks=hooks):
            yield model

    return Variant(f"steered at layer {layer}, {coefficient:g} times", entered)


def without_neurons(neurons: Sequence[tuple[int, int]]) -> Variant:
    """The replacement with neurons (layer, index) of the base's MLPs off."""
    by_layer: dict[int, list[int]] = {}
    for layer, index in neurons:
        by_layer.setdefault(layer, []).append(index)

    def off(acts: Tensor, hook: HookPoint, layer: int) -> Tensor:
        index = torch.tensor(by_layer[layer], device=acts.device)
        return acts.index_fill(-1, index, 0.0)

    @contextmanager
    def entered(pair: PairedModel) -> Iterator[Any]:
        hooks = [(f"blocks.{layer}.mlp.hook_post", partial(off, layer=layer)) for layer in by_layer]
        with pair.routed("replacement") as model, model.hooks(fwd_hooks=hooks):
            yield model

    return Variant(f"without {len(neurons)} neurons", entered)


@torch.no_grad()
def best_steering(pair: PairedModel, moments: Moments) -> Variant:
    """Difference of means at the layer and coefficient after which the word comes least at the moments.

    Where there is no boundary the moments are held against all other places of the response.
    """
    batch = moments.with_moments(TRIED_DOCUMENTS).to(pair.model.W_E.device)
    with pair.routed("replacement"), pair.recorded("hook_resid_post") as resid:
        final_residual(pair, batch.tokens)
    tried, others = [], batch.boundary if bool(batch.boundary.any()) else batch.predicting & ~batch.moment
    for layer in range(pair.n_layers):
        direction = resid[layer][batch.moment].mean(0) - resid[layer][others].mean(0)
        for coefficient in COEFFICIENTS:
            variant = steered(layer, direction, coefficient)
            with variant.entered(pair):
                said = margins_from(pair, final_residual(pair, batch.tokens), batch, batch.moment).sigmoid()
            # The weakest that does it: a stronger push costs more elsewhere.
            tried.append((round(float(said.mean()), 2), coefficient, layer, variant))
    return min(tried, key=lambda t: t[:3])[3]


def strongest_neurons(pair: PairedModel, moments: Moments, n: int) -> list[tuple[int, int]]:
    """(layer, index) of the base MLP's neurons whose activations, times the margin's gradient, are largest in sum."""
    batch = moments.with_moments(TRIED_DOCUMENTS).to(pair.model.W_E.device)
    d_mlp, device = pair.model.cfg.d_mlp, pair.model.W_E.device
    gates = torch.ones(pair.n_layers, d_mlp, device=device, requires_grad=True)

    def multiply(acts: Tensor, hook: HookPoint, layer: int) -> Tensor:
        return acts * gates[layer].to(acts)

    hooks = [(f"blocks.{layer}.mlp.hook_post", partial(multiply, layer=layer)) for layer in range(pair.n_layers)]
    with torch.enable_grad(), pair.routed("replacement"), pair.model.hooks(fwd_hooks=hooks):
        said = margins_from(pair, final_residual(pair, batch.tokens), batch, batch.moment)
        (effect,) = torch.autograd.grad(said.sum(), gates)
    best = effect.flatten().topk(min(n, effect.numel())).indices.tolist()
    return [(i // d_mlp, i % d_mlp) for i in best]


def commonest_alternative(moments: Moments) -> int | None:
    """The token that most often comes at the boundaries, where the words do not; None where there is no boundary.

    A token with which a phrase begins is none: it comes at moments, too.
    """
    there = moments.coming[moments.boundary]
    there = there[~torch.isin(there, torch.tensor(first_tokens(moments.words), dtype=torch.long, device=there.device))]
    return int(there.mode().values) if len(there) else None
