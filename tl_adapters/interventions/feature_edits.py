"""Changing features while the model runs: what it does without them, with more of them, with those of another run.

Every function is a context manager over hooks: within it `run_with_cache`, `generate` and everything else see the
changed activations, and afterwards the model is as it was. They compose by nesting, the outer one first.

    ablated, scaled, clamped, added, patched    change chosen features where adapters are on, and no others
    inserted                                    the hybrid with chosen features only, without the decoder's bias
    negated                                     the target with chosen features taken off its MLPs (section 5 of
                                                arXiv 2602.20904: scale -0.5; -1 gave incoherent text there)

Ablations keep the decoder's bias, insertions and negations leave it out: it is no feature's. Activations are raw ones,
as the hook point holds them; a store's are these times ``decoder_norm``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.errors import UserError
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel
from tl_adapters.models.routed_mlp import ROUTES, Route
from tl_adapters.utils.arguments import feature_pairs

RECONSTRUCTION_HOOK = "mlp.adapter.hook_sae_recons"
"""The hook point of what an adapter adds, within a block."""
Features = Iterable[FeatureId | tuple[int, int]]
Positions = Sequence[int] | None
"""Positions in the sequence, from 0 at each row's first token that is no padding on the left. In a cached generation
these are positions of the prompt, and only they are changed. None is all positions, of what is generated too."""
Edit = Callable[[Float[Tensor, "batch pos n"], int], Float[Tensor, "batch pos n"]]
"""The chosen features' activations and their layer, to what they become."""


class InterventionError(UserError, ValueError):
    """Features, positions or values with which nothing can be done."""


def ablated(pair: PairedModel, features: Features, positions: Positions = None) -> Any:
    """Chosen features are off. Raises InterventionError."""
    return edited(pair, features, lambda acts, layer: torch.zeros_like(acts), positions)


def scaled(pair: PairedModel, features: Features, factor: float, positions: Positions = None) -> Any:
    """Chosen features fire ``factor`` times as strongly. Raises InterventionError."""
    return edited(pair, features, lambda acts, layer: acts * factor, positions)


def clamped(pair: PairedModel, features: Features, value: float, positions: Positions = None) -> Any:
    """Chosen features have one activation, whether they would fire or not. Raises InterventionError."""
    return edited(pair, features, lambda acts, layer: torch.full_like(acts, value), positions)


def added(pair: PairedModel, features: Features, value: float, positions: Positions = None) -> Any:
    """Chosen features have so much more activation: steering along their decoders. Raises InterventionError."""
    return edited(pair, features, lambda acts, layer: acts + value, positions)


def patched(
    pair: PairedModel,
    features: Features,
    source: Mapping[int, Float[Tensor, "batch pos n_features"]],
    positions: Positions = None,
) -> Any:
    """Chosen features have the activations of another run.

    Args:
        pair: with adapters.
        features: which ones.
        source: layer to all activations of that run, as ``hook_sae_acts_post`` held them (`PairedModel.recorded`).
        positions: where; the source is taken from the same positions.

    Raises InterventionError, also within the block where the pass has another shape than the source.
    """
    chosen, device = indices_by_layer(pair, features), pair.model.W_E.device
    if missing := sorted(set(chosen) - set(source)):
        raise InterventionError(f"The source has no activations of layers {missing}; record them in the other run.")

    # Taken out and moved before the block, not in every pass of it.
    taken = {layer: source[layer][..., index.to(source[layer].device)].to(device) for layer, index in chosen.items()}

    def change(acts: Tensor, layer: int) -> Tensor:
        given = taken[layer]
        if given.shape != acts.shape:
            raise InterventionError(
                f"The source has activations of shape {tuple(source[layer].shape[:2])} (batch, pos) and this pass is "
                f"{tuple(acts.shape[:2])}; patch a pass over sequences of the same lengths."
            )
        return given.to(acts)

    return edited(pair, features, change, positions)


@contextmanager
def edited(pair: PairedModel, features: Features, change: Edit, positions: Positions = None) -> Iterator[Any]:
    """Give chosen features other activations where adapters are on.

    Args:
        pair: with adapters, on whatever route it is or will be.
        features: by layer and index.
        change: what becomes of the activations.
        positions: where; None is everywhere.

    Raises InterventionError for features that the adapters do not have and for negative positions; within the block,
    for a pass from the first token on that is shorter than the positions named (of a generation, that over the prompt).
    """
    chosen = indices_by_layer(pair, features, pair.model.W_E.device)
    at = None if positions is None else torch.tensor(list(positions), dtype=torch.long)
    if at is not None and len(at) and int(at.min()) < 0:
        raise InterventionError(
            f"Position {int(at.min())} is named; positions count from 0 at the first token, so the last of n is n - 1."
        )
    places = None if at is None or not len(at) else _Places(pair, list(chosen), at)

    def hook_in(acts: Tensor, hook: HookPoint, layer: int) -> Tensor:
        index = chosen[layer]
        new = change(acts[..., index], layer)
        if places is not None:
            new = torch.where(places.hit(layer, acts)[..., None], new, acts[..., index])
        return acts if places is None and at is not None else acts.index_copy(-1, index, new)

    hooks = [(f"blocks.{layer}.{ACTS_HOOK}", partial(hook_in, layer=layer)) for layer in chosen]
    with nullcontext() if places is None else places, pair.model.hooks(fwd_hooks=hooks):
        yield pair.model


class _Places:
    """Where each token of the present pass stands in its own sequence, as the model tells its blocks.

    A HookedTransformer's block is given the cache and the mask of all tokens so far; a bridge's gets position ids.
    """

    def __init__(self, pair: PairedModel, layers: Sequence[int], wanted: Int[Tensor, "n"]) -> None:
        self.furthest, self.wanted = int(wanted.max()), wanted.to(pair.model.W_E.device)
        self.blocks = {layer: pair.model.blocks[layer] for layer in layers}
        self.told: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> None:
        self.handles = [
            block.register_forward_pre_hook(partial(self._remember, layer), with_kwargs=True)
            for layer, block in self.blocks.items()
        ]

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _remember(self, layer: int, block: Any, args: Any, told: dict[str, Any]) -> None:
        entry, cache = told.get("past_kv_cache_entry"), told.get("past_key_values")
        before = entry.past_keys.shape[1] if entry is not None else cache.get_seq_length(layer) if cache else 0
        self.told[layer] = {"before": before, "ids": told.get("position_ids"), "mask": told.get("attention_mask")}

    def hit(self, layer: int, acts: Tensor) -> Bool[Tensor, "batch pos"]:
        """Which tokens stand at a position wanted. Raises InterventionError where the first pass is too short."""
        told, (batch, length) = self.told[layer], acts.shape[:2]
        if told["before"] == 0 and self.furthest >= length:
            raise InterventionError(
                f"Position {self.furthest} is changed, and this pass has {length} positions; name positions of the "
                "sequence that is read, which is the prompt where text is generated with a cache."
            )
        positions = told["ids"]
        if positions is None:
            positions = torch.arange(told["before"], told["before"] + length, device=acts.device)[None]
            if told["mask"] is not None:
                padding = (told["mask"].cumsum(-1) == 0).sum(-1, keepdim=True)
                positions = positions - padding.to(acts.device)
        return torch.isin(positions, self.wanted.to(positions.device)).to(acts.device).expand(batch, -1)


@contextmanager
def gated(
    pair: PairedModel,
    gates: Mapping[int, Float[Tensor, "n_features"]],
    route: str | Route = "replacement",
    decoder_bias: bool = True,
) -> Iterator[Any]:
    """A route on which every activation is multiplied by its gate; gradients reach the gates.

    Args:
        pair: with adapters.
        gates: of every layer that has adapters; 1 leaves a feature as it is, 0 takes it away.
        route: one with adapters on.
        decoder_bias: keep what the adapters add whatever fires.
    """
    adapters, device = pair.installed_adapters(), pair.model.W_E.device
    gates = {layer: gates[layer].to(device) for layer in adapters.layer_indices}  # not in every pass

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
    wanted = ROUTES[route] if isinstance(route, str) else route
    with pair.routed(wanted._replace(adapter=False)) as model, model.hooks(fwd_hooks=hooks):
        pair.route_layers(wanted, adapters.layer_indices)  # `routed` puts these back too
        yield model


def only(
    pair: PairedModel, features: Features, route: str | Route, factor: float = 1.0, decoder_bias: bool = False
) -> Any:
    """A route on which adapters have the chosen features and no others.

    Args:
        pair: with adapters.
        features: by layer and index; none leaves the bias alone, where it is kept.
        route: one with adapters on.
        factor: of the activations.
        decoder_bias: keep what the adapters add whatever fires.

    Raises InterventionError.
    """
    chosen = indices_by_layer(pair, features)
    adapters = pair.installed_adapters()
    gates = torch.zeros(pair.n_layers, adapters.n_features)
    for layer, index in chosen.items():
        gates[layer, index] = factor
    return gated(pair, dict(enumerate(gates.to(pair.model.W_E.device))), route, decoder_bias)


def inserted(pair: PairedModel, features: Features, factor: float = 1.0) -> Any:
    """The hybrid with chosen features added, and nothing else of the adapters. Raises InterventionError."""
    return only(pair, features, "replacement", factor)


def negated(pair: PairedModel, features: Features, scale: float = -0.5) -> Any:
    """The target with chosen features added to its MLPs ``scale`` times, so taken off. Raises InterventionError."""
    return only(pair, features, "target+adapter", scale)


def indices_by_layer(pair: PairedModel, features: Features, device: torch.device | None = None) -> dict[int, Tensor]:
    """Layer to the indices chosen in it, each once; every intervention takes its features through here.

    They are moved to ``device`` together. Raises ArgumentError for what is not a feature, InterventionError for one
    that the adapters do not have, and ForeignFeaturesError for one of other adapters.
    """
    adapters, features = pair.installed_adapters(), feature_pairs(features)
    adapters.require_own(features)
    wanted = sorted({FeatureId(*feature) for feature in features})
    bad = [f for f in wanted if f.layer not in adapters.layer_indices or not 0 <= f.index < adapters.n_features]
    if bad:
        shown = ", ".join(f"{f.layer}.{f.index}" for f in bad[:5])
        raise InterventionError(
            f"There are no features {shown}; the adapters have {adapters.n_features}, from 0, in each of the layers "
            f"{adapters.layer_indices}."
        )
    sizes = Counter(f.layer for f in wanted)
    indices = torch.tensor([f.index for f in wanted], dtype=torch.long, device=device)
    return dict(zip(sizes, indices.split(list(sizes.values())), strict=True))
