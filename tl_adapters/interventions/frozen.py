"""What an intervention still reaches while the rest of the model is held as it was: for mediation and direct effects.

`frozen` records one pass, the reference, and holds parts of every later pass to it:

    attention    patterns: who reads from whom; what is read still flows
    norms        the scales that norms divide by (post-norms, QK norms and the final norm too)
    mlps         the neurons of the MLP that computes, base's or target's; adapters stay free
    features     activations of chosen features: effects that go through them are taken out
    layers       the only blocks through which an effect spreads; every other block, in all its parts, writes what it
                 wrote in the reference

Interventions nested within come later and win, also over what is held: the change itself is always written. What
template features do by way of output features is total - direct, where nothing but those is held in addition:

    with pair.routed("replacement"), frozen(pair, tokens) as model, ablated(pair, template):
        total = model(tokens)
    with pair.routed("replacement"), frozen(pair, tokens, features=output) as model, ablated(pair, template):
        direct = model(tokens)

With attention, norms and mlps held the model is linear but for the adapters' own activation functions: it is
`linear.FrozenModel` with its linearisation "frozen_mlp", and interventions give that graph's edges. (circuit-tracer's
constrained_layers go the other way round: they name the layers whose MLPs are held. All of them there are attention,
norms, mlps and every feature here.)
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
"""The hook point of the neurons of whichever MLP computes, within a block."""
PLANTED_ACTS_HOOK = "mlp.planted.hook_sae_acts_post"
"""The hook point of planted features, within a block: they are part of the target's MLP."""


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
    """Hold parts of the model to what they are on ``tokens``, for the length of a block.

    The reference is recorded on entering, on the routes and under the interventions that are there then. Within the
    block passes may be over other tokens of the same shape, and gradients flow through what is not held. With nothing
    intervened a pass over ``tokens`` is the reference: to rounding on a HookedTransformer; on a TransformerBridge,
    which computes a norm with a held scale itself and warns of it, to the float32 of Hugging Face's norms.

    Args:
        pair: with adapters, routed as it will be within the block.
        tokens: what the reference is recorded on; padding on the right needs no mask.
        attention: hold attention patterns.
        norms: hold the scales of norms.
        mlps: hold the neurons of MLPs. An MLP that is held writes the same whatever it reads.
        features: hold the activations of these.
        layers: blocks through which effects spread, such as ``range(4, 8)``; None is all of them. In every other
            block the attention's output, the MLP's neurons and all adapter activations are held, so that it writes
            what it wrote in the reference, and above that only what is intervened on in it: in the end
            ``layers=range(0)`` leaves an intervention its direct write to the residual stream. A post-norm that is
            not held (``norms=False``) still rescales that write.
        attention_mask: as the model takes it; give the same to passes within the block.

    Memory: per layer batch x heads x pos^2 for patterns, batch x pos x d_mlp for neurons.

    Raises InterventionError for features or layers that are not there, and within the block for a pass of another
    shape (so text cannot be generated) or on a route with adapters that the reference had off.
    """
    chosen = [f if isinstance(f, FeatureId) else FeatureId(*f) for f in features]  # an owned one stays one
    free = range(pair.n_layers) if layers is None else layers
    if bad := sorted(set(free) - set(range(pair.n_layers))):
        raise InterventionError(f"There are no layers {bad}; the model has 0 to {pair.n_layers - 1}.")
    held = _held_points(pair, attention, norms, mlps, free)
    activations = {feature.layer: f"blocks.{feature.layer}.{ACTS_HOOK}" for feature in chosen}
    reference = _record(pair, tokens, attention_mask, {*held, *activations.values()})

    def hold(value: Tensor, hook: HookPoint, name: str) -> Tensor:
        if name not in reference:
            raise InterventionError(
                f"{name} is held, and was not computed in the reference; enter frozen() on the route that is used "
                "within it."
            )
        if value.shape != reference[name].shape:
            raise InterventionError(
                f"The reference was recorded over {' x '.join(map(str, tokens.shape))} tokens, and this pass has "
                f"another shape ({name}: {tuple(value.shape)}, not {tuple(reference[name].shape)}); pass sequences of "
                "the same number and length, and generate text outside frozen()."
            )
        return reference[name]

    source = {layer: reference[name] for layer, name in activations.items() if name in reference}
    hooks = [(name, partial(hold, name=name)) for name in held]
    with pair.model.hooks(fwd_hooks=hooks), patched(pair, chosen, source) as model:
        yield model


def _held_points(pair: PairedModel, attention: bool, norms: bool, mlps: bool, free: Sequence[int]) -> list[str]:
    """Names of the hook points to hold."""
    neurons = [NEURONS_HOOK] if pair.planted is None else [NEURONS_HOOK, PLANTED_ACTS_HOOK]
    names = [name for name in pair.model.hook_dict if norms and name.endswith(".hook_scale")]
    for layer in range(pair.n_layers):
        if layer in free:
            parts = ["attn.hook_pattern"] * attention + neurons * mlps
        else:
            parts = ["hook_attn_out", *neurons, ACTS_HOOK]
        names += [f"blocks.{layer}.{part}" for part in parts]
    return names


@torch.no_grad()
def _record(pair: PairedModel, tokens: Tensor, attention_mask: Tensor | None, names: set[str]) -> dict[str, Tensor]:
    """What the named hook points hold on ``tokens``; those that do not fire are left out."""
    found: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: HookPoint, name: str) -> None:
        found[name] = value

    device = pair.model.W_E.device
    mask = None if attention_mask is None else attention_mask.to(device)
    with pair.model.hooks(fwd_hooks=[(name, partial(keep, name=name)) for name in names]):
        pair.model(tokens.to(device), attention_mask=mask, return_type=None)
    return found
