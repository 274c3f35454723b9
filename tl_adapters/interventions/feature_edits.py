"""Context managers that change feature activations while the model runs: ablation, scaling, clamping, patching.

Every function is a context manager over hooks. Within it `run_with_cache`, `generate` and all other passes compute with
the changed activations, and afterwards the model is as before. They compose by nesting; the outer one is applied first.

    ablated, scaled, clamped, added, patched    change the given features, and no others
    inserted                                    the hybrid with the given features only, without the decoder bias
    negated                                     the target with the given features subtracted from its MLPs (section 5
                                                of arXiv 2602.20904: scale -0.5; -1 gave incoherent text there)

The first five work on the route of the pair where it has adapters on, in all layers or some. On a route without
adapters, such as the target that a pair is on when it is opened, no feature is there to be changed: within the block
the model is then the replacement (`on_adapters`).

Ablations keep the decoder bias; insertions and negations leave it out, since it does not belong to any feature.
Activations are the raw ones of the hook point; those of a feature store are these times ``decoder_norm``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.errors import UserError
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel
from tl_adapters.models.routed_mlp import ROUTES, Route
from tl_adapters.utils.arguments import HasFeatures, feature_pairs
from tl_adapters.utils.renamed import renamed_arguments

RECONSTRUCTION_HOOK = "mlp.adapter.hook_sae_recons"
"""The hook point of an adapter's output, within a block."""
FeaturePairs = Iterable[FeatureId | tuple[int, int]]
"""Layer and index of each feature."""
Features = FeaturePairs | HasFeatures
"""Layer and index of each feature; or a circuit, for its promoting features."""
Positions = Sequence[int] | None
"""Positions in each sequence, from 0 at its first token after padding on the left. In a generation with a cache these
are positions of the prompt, and generated tokens are not changed. None means all positions, generated ones too."""
Edit = Callable[[Float[Tensor, "batch pos n"], int], Float[Tensor, "batch pos n"]]
"""A function of the chosen features' activations and their layer that returns the changed activations."""


class InterventionError(UserError, ValueError):
    """Features, positions or values with which a model cannot be changed."""


def ablated(pair: PairedModel, features: Features, positions: Positions = None) -> Any:
    """The replacement with the given features set to zero.

    Raises:
        InterventionError: features do not exist or positions are negative; within the block, a pass from the first
            token is shorter than the given positions.
        ArgumentError: a value is not a feature.
        ForeignFeaturesError: a feature belongs to other adapters.
        PairMismatchError: the pair has no adapters.
    """
    return edited(pair, features, lambda acts, layer: torch.zeros_like(acts), positions)


def scaled(pair: PairedModel, features: Features, factor: float, positions: Positions = None) -> Any:
    """The replacement with the given features multiplied by ``factor``. Raises what `ablated` raises."""
    return edited(pair, features, lambda acts, layer: acts * factor, positions)


def clamped(pair: PairedModel, features: Features, value: float, positions: Positions = None) -> Any:
    """The replacement with the given features set to ``value``, active or not. Raises what `ablated` raises."""
    return edited(pair, features, lambda acts, layer: torch.full_like(acts, value), positions)


def added(pair: PairedModel, features: Features, value: float, positions: Positions = None) -> Any:
    """The replacement with ``value`` added to the given features, along their decoders. Raises as `ablated`."""
    return edited(pair, features, lambda acts, layer: acts + value, positions)


def patched(
    pair: PairedModel,
    features: Features,
    source: Mapping[int, Float[Tensor, "batch pos n_features"]],
    positions: Positions = None,
) -> Any:
    """The model with the given features set to their activations in another run.

    Args:
        pair: a pair with adapters.
        features: layer and index of each feature.
        source: all activations of the other run by layer, as recorded at ``hook_sae_acts_post``
            (`PairedModel.recorded`).
        positions: the positions that are patched, from the same positions of the source; None is all.

    Raises:
        InterventionError: features do not exist or the source lacks their layers; within the block, a pass has another
            shape than the source.
        UserError: whatever `ablated` raises.
    """
    return edited(pair, features, patch_edit(pair, features, source), positions)


def patch_edit(
    pair: PairedModel, features: Features, source: Mapping[int, Float[Tensor, "batch pos n_features"]]
) -> Edit:
    """The change of `patched`. Raises InterventionError where the source lacks layers."""
    chosen, device = indices_by_layer(pair, features), pair.device
    if missing := sorted(set(chosen) - set(source)):
        raise InterventionError(f"The source has no activations of layers {missing}; record them in the other run.")

    # Selected and moved once, not in every pass within the block.
    selected = {layer: source[layer][..., index.to(source[layer].device)].to(device) for layer, index in chosen.items()}

    def change(acts: Tensor, layer: int) -> Tensor:
        patch = selected[layer]
        if patch.shape != acts.shape:
            raise InterventionError(
                f"The source has activations of shape {tuple(source[layer].shape[:2])} (batch, pos) and this pass is "
                f"{tuple(acts.shape[:2])}; patch a pass over sequences of the same lengths."
            )
        return patch.to(acts)

    return change


@contextmanager
def edited(pair: PairedModel, features: Features, edit: Edit, positions: Positions = None) -> Iterator[Any]:
    """The replacement with the activations of the given features changed by ``edit``.

    Args and Raises: as `edited_on_route`. On a route with adapters the route stays as it is.
    """
    with on_adapters(pair), edited_on_route(pair, features, edit, positions) as model:
        yield model


def on_adapters(pair: PairedModel) -> AbstractContextManager[Any]:
    """The pair's route where it has adapters on, in all layers or some; otherwise the one that adds all adapters.

    That is the replacement in the layers that have adapters, and "target+adapter" for a pair without a base.
    """
    if any(route.adapter for route in pair.routes):
        return nullcontext()
    layers = pair.installed_adapters().layer_indices
    return pair.routed("replacement" if pair.has_base else "target+adapter", only=layers)


@contextmanager
def edited_on_route(pair: PairedModel, features: Features, edit: Edit, positions: Positions = None) -> Iterator[Any]:
    """The model on its route, with the activations of the given features changed by ``edit`` where adapters are on.

    Args:
        pair: a pair with adapters; the route may change within the block.
        features: layer and index of each feature.
        edit: the function that changes the activations.
        positions: the positions that are changed; None is all.

    Raises:
        InterventionError: features do not exist or positions are negative; within the block, a pass from the first
            token is shorter than the given positions (in a generation, the pass over the prompt).
    """
    chosen = indices_by_layer(pair, features, pair.device)
    edited_positions = None if positions is None else torch.tensor(list(positions), dtype=torch.long)
    if edited_positions is not None and len(edited_positions) and int(edited_positions.min()) < 0:
        raise InterventionError(
            f"Position {int(edited_positions.min())} is negative; positions count from 0 at the first token, so the "
            "last of n is n - 1."
        )
    nowhere = edited_positions is not None and not len(edited_positions)
    mask = None if edited_positions is None or nowhere else _PositionMask(pair, list(chosen), edited_positions)

    def change(acts: Tensor, hook: HookPoint, layer: int) -> Tensor:
        index = chosen[layer]
        new = edit(acts[..., index], layer)
        if mask is not None:
            new = torch.where(mask.of_pass(layer, acts)[..., None], new, acts[..., index])
        return acts if nowhere else acts.index_copy(-1, index, new)

    hooks = [(f"blocks.{layer}.{ACTS_HOOK}", partial(change, layer=layer)) for layer in chosen]
    with nullcontext() if mask is None else mask, pair.model.hooks(fwd_hooks=hooks):
        yield pair.model


class _PositionMask:
    """A mask of the tokens at given positions of their sequences, for every pass within the block.

    Positions follow from the arguments of the blocks: those of a HookedTransformer get the cache and the mask of all
    tokens so far, those of a TransformerBridge get position ids.
    """

    def __init__(self, pair: PairedModel, layers: Sequence[int], positions: Int[Tensor, "n"]) -> None:
        self.last, self.positions = int(positions.max()), positions.to(pair.device)
        self.blocks = {layer: pair.model.blocks[layer] for layer in layers}
        self.arguments: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> None:
        self.handles = [
            block.register_forward_pre_hook(partial(self._record_arguments, layer), with_kwargs=True)
            for layer, block in self.blocks.items()
        ]

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _record_arguments(self, layer: int, block: Any, args: Any, kwargs: dict[str, Any]) -> None:
        entry, cache = kwargs.get("past_kv_cache_entry"), kwargs.get("past_key_values")
        n_cached = entry.past_keys.shape[1] if entry is not None else cache.get_seq_length(layer) if cache else 0
        self.arguments[layer] = {
            "n_cached": n_cached,
            "position_ids": kwargs.get("position_ids"),
            "attention_mask": kwargs.get("attention_mask"),
        }

    def of_pass(self, layer: int, acts: Tensor) -> Bool[Tensor, "batch pos"]:
        """True at the given positions in the current pass. Raises InterventionError if the first pass is too short."""
        arguments, (batch, length) = self.arguments[layer], acts.shape[:2]
        n_cached = arguments["n_cached"]
        if n_cached == 0 and self.last >= length:
            raise InterventionError(
                f"Position {self.last} is to be changed, and this pass has {length} positions; give positions of the "
                "sequence that the model reads, which is the prompt when text is generated with a cache."
            )
        positions = arguments["position_ids"]
        if positions is None:
            positions = torch.arange(n_cached, n_cached + length, device=acts.device)[None]
            if arguments["attention_mask"] is not None:
                padding = (arguments["attention_mask"].cumsum(-1) == 0).sum(-1, keepdim=True)
                positions = positions - padding.to(acts.device)
        return torch.isin(positions, self.positions.to(positions.device)).to(acts.device).expand(batch, -1)


@contextmanager
def gated(
    pair: PairedModel,
    gates: Mapping[int, Float[Tensor, "n_features"]],
    route: str | Route = "replacement",
    decoder_bias: bool = True,
) -> Iterator[Any]:
    """A route on which every feature activation is multiplied by its gate. Gradients flow to the gates.

    Args:
        pair: a pair with adapters.
        gates: a gate per feature for every layer that has adapters; 1 leaves a feature unchanged, 0 ablates it.
        route: a route with adapters on.
        decoder_bias: whether the adapters add their decoder bias.
    """
    adapters, device = pair.installed_adapters(), pair.device
    gates = {layer: gates[layer].to(device) for layer in adapters.layer_indices}  # moved once, not in every pass

    def multiply(acts: Tensor, hook: HookPoint, layer: int) -> Tensor:
        return acts * gates[layer].to(acts)

    def without_bias(out: Tensor, hook: HookPoint, layer: int) -> Tensor:
        return out - adapters[layer].b_dec.to(out)

    hooks: list[tuple[str, Any]] = [
        (f"blocks.{layer}.{ACTS_HOOK}", partial(multiply, layer=layer)) for layer in adapters.layer_indices
    ]
    if not decoder_bias:
        hooks += [
            (f"blocks.{layer}.{RECONSTRUCTION_HOOK}", partial(without_bias, layer=layer))
            for layer in adapters.layer_indices
        ]
    with_adapters = ROUTES[route] if isinstance(route, str) else route
    with pair.routed(with_adapters._replace(adapter=False)) as model, model.hooks(fwd_hooks=hooks):
        pair.route_layers(with_adapters, adapters.layer_indices)  # `routed` restores these routes too
        yield model


def only(
    pair: PairedModel, features: Features, route: str | Route, factor: float = 1.0, decoder_bias: bool = False
) -> Any:
    """A route on which the adapters have the given features and no others.

    Args:
        pair: a pair with adapters.
        features: layer and index of each feature; without any, adapters add their decoder bias or nothing.
        route: a route with adapters on.
        factor: the factor by which the activations are multiplied.
        decoder_bias: whether the adapters add their decoder bias.

    Raises:
        InterventionError: features do not exist.
        ArgumentError: a value is not a feature.
        ForeignFeaturesError: a feature belongs to other adapters.
        PairMismatchError: the pair has no adapters, or no base for this route.
    """
    chosen = indices_by_layer(pair, features)
    adapters = pair.installed_adapters()
    gates = torch.zeros(pair.n_layers, adapters.n_features)
    for layer, index in chosen.items():
        gates[layer, index] = factor
    return gated(pair, dict(enumerate(gates.to(pair.device))), route, decoder_bias)


def inserted(pair: PairedModel, features: Features, factor: float = 1.0) -> Any:
    """The hybrid with the given features added, and nothing else of the adapters. Raises what `only` raises."""
    return only(pair, features, "replacement", factor)


@renamed_arguments(scale="factor")
def negated(pair: PairedModel, features: Features, factor: float = -0.5) -> Any:
    """The target with ``factor`` times the given features added to its MLPs. Raises what `only` raises."""
    return only(pair, features, "target+adapter", factor)


def indices_by_layer(pair: PairedModel, features: Features, device: torch.device | None = None) -> dict[int, Tensor]:
    """`feature_indices` of a pair's adapters. Every intervention checks its features here."""
    return feature_indices(pair.installed_adapters(), features, device)


def feature_indices(adapters: AdapterSet, features: Features, device: torch.device | None = None) -> dict[int, Tensor]:
    """The indices of the given features by layer, sorted and without duplicates.

    Args:
        adapters: the adapters that the features belong to.
        features: layer and index of each feature.
        device: the device to which the indices are moved, all at once.

    Raises:
        ArgumentError: a value is not a feature.
        InterventionError: the adapters do not have a feature.
        ForeignFeaturesError: a feature belongs to other adapters.
    """
    features = feature_pairs(features)
    adapters.require_own(features)
    unique = sorted({FeatureId(*feature) for feature in features})
    unknown = [f for f in unique if f.layer not in adapters.layer_indices or not 0 <= f.index < adapters.n_features]
    if unknown:
        names = ", ".join(f"{f.layer}.{f.index}" for f in unknown[:5])
        raise InterventionError(
            f"There are no features {names}; the adapters have {adapters.n_features}, from 0, in each of the layers "
            f"{adapters.layer_indices}."
        )
    sizes = Counter(f.layer for f in unique)
    indices = torch.tensor([f.index for f in unique], dtype=torch.long, device=device)
    return dict(zip(sizes, indices.split(list(sizes.values())), strict=True))
