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

`frozen_by_block` measures the same of ablations, for long texts: block by block, so that the patterns of one block only
are in memory at a time.

With attention, norms and mlps held, the model is linear except for the adapters' own activation functions: it is the
linearized replacement model with constant base MLPs (`attribution.relp.LinearizedModel`, "frozen_mlp"), and
interventions give the edges of that graph. (circuit-tracer's constrained_layers are the reverse: they name the layers
whose MLPs are held. All of them there correspond to attention, norms, mlps and every feature here.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.interventions.feature_edits import (
    FeaturePairs,
    Features,
    InterventionError,
    ablated,
    edited_on_route,
    indices_by_layer,
    on_adapters,
    patch_edit,
    patched,
)
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel
from tl_adapters.utils.arguments import feature_pairs

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
        ArgumentError, ForeignFeaturesError: a value is not a feature, or one of other adapters.
    """
    # A FeatureId keeps its set.
    chosen = [f if isinstance(f, FeatureId) else FeatureId(*f) for f in feature_pairs(features)]
    free_layers = range(pair.n_layers) if layers is None else layers
    if unknown := sorted(set(free_layers) - set(range(pair.n_layers))):
        raise InterventionError(f"There are no layers {unknown}; the model has 0 to {pair.n_layers - 1}.")
    held = _held_hook_points(pair, attention, norms, mlps, free_layers)
    activations = {feature.layer: f"blocks.{feature.layer}.{ACTS_HOOK}" for feature in chosen}
    reference = _recorded(pair, tokens, attention_mask, {*held, *activations.values()})
    source = {layer: reference[name] for layer, name in activations.items() if name in reference}
    holding = pair.model.hooks(fwd_hooks=_holding(held, reference, tokens.shape))
    with holding, edited_on_route(pair, chosen, patch_edit(pair, chosen, source)) as model:
        yield model


def _holding(names: Sequence[str], reference: dict[str, Tensor], shape: Sequence[int]) -> list[tuple[str, Any]]:
    """Hooks that hold the values at these points, which a pass over tokens of this shape has given."""
    return [(name, partial(_hold, name=name, reference=reference, shape=shape)) for name in names]


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
    names = [name for name in pair.model.hook_dict if norms and _is_scale(name)]
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
    device = pair.device
    mask = None if attention_mask is None else attention_mask.to(device)
    with _recording(pair, names, values):
        pair.model(tokens.to(device), attention_mask=mask, return_type=None)
    return values


def _recording(pair: PairedModel, names: Iterable[str], values: dict[str, Tensor]) -> Any:
    """The model, whose next pass writes the values at the named hook points to ``values``."""

    def record(value: Tensor, hook: HookPoint, name: str) -> None:
        values[name] = value

    return pair.model.hooks(fwd_hooks=[(name, partial(record, name=name)) for name in names])


class FrozenChange(NamedTuple):
    """An ablation in a pass in which attention and norms are held at their values without it."""

    ablated: FeaturePairs
    """Features whose activations are 0."""
    held: FeaturePairs = ()
    """Features whose activations are held too."""


class FrozenPasses(NamedTuple):
    """What `frozen_by_block` gives: the residual streams after the last block, and how they are read."""

    reference: Float[Tensor, "batch pos d_model"]
    """Without a change."""
    changed: dict[str, Float[Tensor, "batch pos d_model"]]
    """Under every change, by its name."""
    pair: PairedModel
    """The pair."""

    def logits(self, name: str, row: Tensor, position: Tensor) -> Float[Tensor, "n d_vocab"]:
        """Logits under a change at some positions, with the final norm's scale held."""
        chosen = self.reference[row, position], self.changed[name][row, position]
        names = [name for name in self.pair.model.hook_dict if _is_scale(name) and not name.startswith("blocks.")]
        reference: dict[str, Tensor] = {}
        with _recording(self.pair, names, reference):
            self.pair.unembed(chosen[0])
        with self.pair.model.hooks(fwd_hooks=_holding(names, reference, chosen[0].shape[:-1])):
            return self.pair.unembed(chosen[1])


@torch.no_grad()
def frozen_by_block(
    pair: PairedModel, tokens: Int[Tensor, "batch pos"], changes: Mapping[str, FrozenChange]
) -> FrozenPasses:
    """Ablations with attention and norms held, of which one block's patterns are in memory at a time.

    Every block runs on the stream without a change and then on each changed one, which takes its patterns and scales.

    Args:
        pair: a pair with adapters, on the route that is meant; the replacement, where that has no adapters on.
        tokens: padding on the right only.
        changes: by name.

    Raises InterventionError for features that do not exist, and ForeignFeaturesError for those of other adapters.
    """
    for features in (features for change in changes.values() for features in change):
        indices_by_layer(pair, features)  # all of them here, since a block sees those of its layer only
    reference_stream = pair.embed(tokens.to(pair.device))
    streams = dict.fromkeys(changes, reference_stream)
    with on_adapters(pair):
        for layer in range(pair.n_layers):
            block = f"blocks.{layer}."
            names = [
                f"{block}attn.hook_pattern",
                *(n for n in pair.model.hook_dict if _is_scale(n) and n.startswith(block)),
            ]
            reference: dict[str, Tensor] = {}
            with _recording(pair, [*names, f"{block}{ACTS_HOOK}"], reference):
                before, reference_stream = reference_stream, pair.run_blocks(reference_stream, layer, layer + 1)
            source = {layer: reference[f"{block}{ACTS_HOOK}"]} if f"{block}{ACTS_HOOK}" in reference else {}
            for name, change in changes.items():
                of_layer = [[f for f in features if f[0] == layer] for features in change]
                if streams[name] is before and not of_layer[0]:
                    streams[name] = reference_stream  # nothing is changed so far
                    continue
                hooks = _holding(names, reference, tokens.shape)
                with pair.model.hooks(fwd_hooks=hooks), patched(pair, of_layer[1], source), ablated(pair, of_layer[0]):
                    streams[name] = pair.run_blocks(streams[name], layer, layer + 1)
    return FrozenPasses(reference_stream, streams, pair)


def _is_scale(name: str) -> bool:
    return name.endswith(".hook_scale")
