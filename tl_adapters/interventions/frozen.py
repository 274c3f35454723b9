"""Holding activations fixed during an intervention, for mediation analysis and direct effects.

`frozen` records one pass, the reference, and holds parts of every later pass at their values in it:

    attention    attention patterns; the values that are read through them are not held
    norms        the scales that norms divide by (post-norms, QK norms and the final norm too)
    mlps         the neurons of the MLP that computes, base's or target's; adapters are not held
    features     the activations of given features, so that effects through them are removed
    layers       the only blocks through which an effect spreads; every other block, in all its parts, writes what it
                 wrote in the reference

Interventions nested within `frozen` are applied later and take precedence, also over what is held: the change itself is
always written. The effect of template features that is mediated by output features is total - direct, where the direct
effect is measured with the output features held in addition:

    with pair.routed("replacement"), frozen(pair, tokens) as model, ablated(pair, template):
        total = model(tokens)
    with pair.routed("replacement"), frozen(pair, tokens, features=output) as model, ablated(pair, template):
        direct = model(tokens)

With attention, norms and mlps held, the model is linear except for the adapters' own activation functions: it is the
linearized replacement model with constant base MLPs (`attribution.relp.LinearizedModel`, "frozen_mlp"), and
interventions give the edges of that graph. (circuit-tracer's constrained_layers are the reverse: they name the layers
whose MLPs are held. All of them there correspond to attention, norms, mlps and every feature here.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.interventions.feature_edits import Features, InterventionError, patched
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel

NEURONS_HOOK = "mlp.hook_post"
"""The hook point of the neurons of the MLP that computes, within a block."""
PLANTED_ACTS_HOOK = "mlp.planted.hook_sae_acts_post"
"""The hook point of planted features, which are part of the target's MLP, within a block."""


@contextmanager
def frozen(
    pair: PairedModel,
    tokens: Int[Tensor, "batch pos"],
    *,
    attention: bool = True,
    norms: bool = True,
    mlps: bool = False,
    features: Features = (),
    layers: Sequence[int] | None = None,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> Iterator[Any]:
    """Hold parts of the model at their values on ``tokens``, within a block.

    The reference is recorded on entering, with the routes and interventions of that time. Passes within the block may
    be over other tokens of the same shape, and gradients flow through what is not held. Without an intervention a pass
    over ``tokens`` equals the reference: up to rounding on a HookedTransformer, and up to the float32 of Hugging Face's
    norms on a TransformerBridge, which recomputes a norm whose scale is held, with a warning.

    Args:
        pair: a pair with adapters, on the route that is used within the block.
        tokens: the tokens of the reference; padding on the right needs no mask.
        attention: hold attention patterns.
        norms: hold the scales of norms.
        mlps: hold the neurons of MLPs, whose output then does not depend on their input.
        features: hold the activations of these features.
        layers: the blocks through which effects spread, such as ``range(4, 8)``; None is all. In every other block the
            attention output, the neurons and all adapter activations are held, so that it adds nothing but the
            interventions in it. ``layers=range(0)`` leaves only the direct effect of an intervention on the residual
            stream, which a post-norm that is not held (``norms=False``) still rescales.
        attention_mask: as the model takes it; give the same to passes within the block.

    Memory per layer: batch x heads x pos^2 for patterns, batch x pos x d_mlp for neurons.

    Raises:
        InterventionError: features or layers do not exist; within the block, a pass has another shape (text cannot be
            generated), or its route has adapters that were off in the reference.
    """
    chosen = [f if isinstance(f, FeatureId) else FeatureId(*f) for f in features]  # a FeatureId keeps its set
    free_layers = range(pair.n_layers) if layers is None else layers
    if unknown := sorted(set(free_layers) - set(range(pair.n_layers))):
        raise InterventionError(f"There are no layers {unknown}; the model has 0 to {pair.n_layers - 1}.")
    held = _held_hook_points(pair, attention, norms, mlps, free_layers)
    activations = {feature.layer: f"blocks.{feature.layer}.{ACTS_HOOK}" for feature in chosen}
    reference = _recorded(pair, tokens, attention_mask, {*held, *activations.values()})
    source = {layer: reference[name] for layer, name in activations.items() if name in reference}
    hooks = [(name, partial(_hold, name=name, reference=reference, shape=tokens.shape)) for name in held]
    with pair.model.hooks(fwd_hooks=hooks), patched(pair, chosen, source) as model:
        yield model


def _hold(value: Tensor, hook: HookPoint, name: str, reference: dict[str, Tensor], shape: Sequence[int]) -> Tensor:
    """The value of the reference at the hook point ``name``. Raises InterventionError where it does not fit."""
    if name not in reference:
        raise InterventionError(
            f"{name} is held, and was not computed in the reference; enter frozen() on the route of later passes."
        )
    if value.shape != reference[name].shape:
        raise InterventionError(
            f"The reference was recorded over {' x '.join(map(str, shape))} tokens, and this pass has another shape "
            f"({name}: {tuple(value.shape)}, not {tuple(reference[name].shape)}); pass sequences of the same number "
            "and length, and generate text outside frozen()."
        )
    return reference[name]


def _held_hook_points(
    pair: PairedModel, attention: bool, norms: bool, mlps: bool, free_layers: Sequence[int]
) -> list[str]:
    """The names of the hook points to hold."""
    neurons = [NEURONS_HOOK] if pair.planted is None else [NEURONS_HOOK, PLANTED_ACTS_HOOK]
    names = [name for name in pair.model.hook_dict if norms and name.endswith(".hook_scale")]
    for layer in range(pair.n_layers):
        if layer in free_layers:
            parts = ["attn.hook_pattern"] * attention + neurons * mlps
        else:
            parts = ["hook_attn_out", *neurons, ACTS_HOOK]
        names += [f"blocks.{layer}.{part}" for part in parts]
    return names


@torch.no_grad()
def _recorded(pair: PairedModel, tokens: Tensor, attention_mask: Tensor | None, names: set[str]) -> dict[str, Tensor]:
    """The values at the named hook points in a pass over ``tokens``, without those that are not reached."""
    values: dict[str, Tensor] = {}

    def record(value: Tensor, hook: HookPoint, name: str) -> None:
        values[name] = value

    device = pair.device
    mask = None if attention_mask is None else attention_mask.to(device)
    with pair.model.hooks(fwd_hooks=[(name, partial(record, name=name)) for name in names]):
        pair.model(tokens.to(device), attention_mask=mask, return_type=None)
    return values
