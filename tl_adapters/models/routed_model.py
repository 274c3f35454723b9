"""RoutedModel: a TransformerLens model whose MLPs are routed, the routes of its layers, and parts of it run alone.

`PairedModel` extends it with the identity of base and target, with adapters and with changes of their features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformer_lens.hook_points import HookPoint

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.checkpoints.base_mlps import MLPTensors, require_shapes
from tl_adapters.checkpoints.compatibility import PairMismatchError
from tl_adapters.models.build import backend_of
from tl_adapters.models.routed_mlp import ROUTES, Route, RoutedMLP
from tl_adapters.utils.arguments import whole_numbers

LOGITS_AT_ONCE = 2**24
"""Most logits that are formed at a time: 64 MB of them in float32."""
LOGITS_AT_ONCE_CPU = 2**22
"""The same on a CPU, whose products lose little by it, unless these are fewer than `ROWS_AT_ONCE_CPU` rows."""
ROWS_AT_ONCE_CPU = 128
"""Rows below which a product with the unembedding on a CPU mostly waits for that matrix to be read."""

Made = TypeVar("Made")


def run_again_in_backward(function: Callable[..., Made], *args: Any) -> Made:
    """The function's result, of whose computation nothing is kept for the backward pass but the arguments."""
    with set_checkpoint_early_stop(False):  # so that the second run cleans up as the first one does
        made: Made = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return made


def kept_per_token(d_model: int, d_mlp: int, d_attention: int, n_patterns: int, post_norms: bool) -> int:
    """Numbers that a block of frozen weights keeps of a token for a gradient to its input, without its adapter.

    Args:
        d_model: width of the residual stream, which norms keep.
        d_mlp: neurons of the gated MLP, of which three factors are kept.
        d_attention: width of queries, keys and values together.
        n_patterns: heads times tokens of the text, where scores are soft-capped and so in no fused kernel; else 0.
        post_norms: whether attention and MLP have a norm after them, too.
    """
    return (6 if post_norms else 4) * d_model + d_attention + 3 * d_mlp + 4 * n_patterns


def rows_at_once(d_vocab: int, device: torch.device) -> int:
    """The number of rows of logits to form at a time on a device."""
    most = max(1, LOGITS_AT_ONCE // d_vocab)
    if device.type != "cpu":
        return most
    return max(LOGITS_AT_ONCE_CPU // d_vocab, min(ROWS_AT_ONCE_CPU, most))


class RoutedModel:
    """A TransformerLens model in which every MLP can be replaced by the base's and can have an adapter added.

    Args:
        model: the target, a HookedTransformer or a TransformerBridge; its MLPs are changed in place.
        base_mlps: the base's MLPs, a mapping per layer; None for a model whose adapters are added to its own MLPs.
        ln2_weights: the target's second-norm weights per layer, needed where ``model`` has them folded into its MLPs.
    """

    def __init__(
        self, model: Any, base_mlps: Sequence[MLPTensors] | None, ln2_weights: Sequence[Tensor] | None = None
    ) -> None:
        self.backend = backend_of(model)
        self.model = model
        self.adapters: AdapterSet | None = None
        self.planted: AdapterSet | None = None
        self.released = False
        self.has_base = base_mlps is not None
        if base_mlps is not None:
            require_shapes(base_mlps, self.backend.hf_config)
        for layer in range(self.n_layers):
            folded = base_mlps is not None and self.backend.second_norm(layer) is None
            if folded and ln2_weights is None:
                raise PairMismatchError(
                    "The model's second norms are folded into its MLPs. The base's MLPs need the weights of those "
                    "norms, which are not known. Load the model with from_pretrained_no_processing, or attach adapters "
                    "that carry the target's norms."
                )
            scale = ln2_weights[layer].to(self.device, model.cfg.dtype) if folded and ln2_weights else None
            self.backend.install(layer, dict(base_mlps[layer]) if base_mlps is not None else None, scale)
        self.backend.name_hooks()

    @property
    def device(self) -> torch.device:
        """The device on which the model takes its tokens; the only one of its weights unless it has a device map."""
        return self.backend.device

    @property
    def n_layers(self) -> int:
        """The number of layers of the model."""
        return self.model.cfg.n_layers

    @property
    def mlps(self) -> list[RoutedMLP]:
        """The routed MLP of every layer."""
        return self.backend.mlps

    def place_adapters(self, adapters: AdapterSet, scales: Mapping[int, Tensor | None]) -> None:
        """Put adapters on the device of their layers and into their MLPs.

        Args:
            adapters: the set, which has been checked.
            scales: by layer that has an adapter, the factor from the MLP's input to the adapter's, [d_model]; None
                where they are the same.
        """
        self.adapters = adapters
        for layer, mlp in enumerate(self.mlps):
            mlp.adapter = mlp.adapter_scale = None
            if layer in scales:
                device, scale = self.backend.layer_device(layer), scales[layer]
                mlp.adapter = adapters[layer].to(device)
                dtype = torch.promote_types(adapters[layer].W_enc.dtype, torch.float32)
                mlp.adapter_scale = None if scale is None else scale.to(device, dtype)
        self.backend.name_hooks()

    # -- routes ---------------------------------------------------------------------------------------------------

    @property
    def routes(self) -> list[Route]:
        """The route of every layer."""
        return [mlp.route for mlp in self.mlps]

    def installed_adapters(self) -> AdapterSet:
        """The adapters in place. Raises PairMismatchError where there are none."""
        if self.adapters is None:
            raise PairMismatchError(
                "This pair has no adapters yet; call load_adapters(...) or new_adapters(...) first."
            )
        return self.adapters

    def route_layers(self, route: str | Route, layers: Sequence[int] | range | None = None) -> None:
        """Set the route of ``layers`` (all, if None) permanently. `routed` sets it for a block and restores it.

        Raises ValueError for an unknown route, PairMismatchError for an adapter route without adapters or a base route
        without a base, and ArgumentError for layers that the model does not have.
        """
        if isinstance(route, str):
            if route not in ROUTES:
                raise ValueError(f"No route {route!r}; known routes are {', '.join(ROUTES)}.")
            route = ROUTES[route]
        n = self.n_layers
        mlps, chosen = self.mlps, range(n) if layers is None else whole_numbers(layers, n, "layers (only=)")
        if route.base_mlp and not self.has_base:
            raise PairMismatchError(
                "This model was given no base: its adapters are added to its own MLPs. Its routes are 'target' and "
                "'target+adapter'; for the others attach with base=."
            )
        if route.adapter and (missing := [layer for layer in chosen if mlps[layer].adapter is None]):
            self.installed_adapters()
            raise PairMismatchError(
                f"There are no adapters of layers {missing}. Route the layers that have adapters with only=, or load "
                "the whole set."
            )
        for layer in chosen:
            mlps[layer].route = route

    @contextmanager
    def routed(
        self,
        route: str | Route | None = None,
        *,
        first: int | None = None,
        last: int | None = None,
        only: Sequence[int] | None = None,
    ) -> Iterator[Any]:
        """Route the model for the length of a block; afterwards every layer has the route it had before.

        Args:
            route: one route for the chosen layers, "replacement" if None.
            first: the number of layers from the bottom that take the route; the others are the target's (partial
                replacement).
            last: the same from the top.
            only: the layers that take the route; the others are the target's.

        Raises what `route_layers` raises, and ValueError for several of ``first``, ``last`` and ``only``.
        """
        chosen = [c is not None for c in (first, last, only)]
        if sum(chosen) > 1 or (route is None and not any(chosen)):
            raise ValueError("routed() takes a route, or exactly one of first=, last= and only= (with or without one).")
        n = self.n_layers
        if (first is not None and not 0 <= first <= n) or (last is not None and not 0 <= last <= n):
            raise ValueError(f"first= and last= count layers, from 0 to {n}; got first={first}, last={last}.")
        layers = range(n)
        if first is not None:
            layers = range(first)
        elif last is not None:
            layers = range(n - last, n)
        before = self.routes
        try:
            if any(chosen):
                self.route_layers("target")
            self.route_layers(route or "replacement", layers if only is None else only)
            yield self.model
        finally:
            for mlp, previous in zip(self.mlps, before, strict=True):
                mlp.route = previous

    def release(self) -> Any:
        """Take everything out of the model again and return it as it was before: weights, classes, hook points.

        Raises PairMismatchError where that was done already.
        """
        if self.released:
            raise PairMismatchError("This pair was taken out of its model already (detach); attach the adapters again.")
        for layer in range(self.n_layers):
            self.backend.uninstall(layer)
        self.backend.name_hooks()
        self.adapters, self.planted, self.released = None, None, True
        return self.model

    # -- running parts of the model -------------------------------------------------------------------------------

    def embed(
        self, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream before block 0."""
        return self.backend.embed(tokens, attention_mask)

    def run_blocks(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        start: int,
        stop: int,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        *,
        recompute: bool = False,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after blocks start..stop-1 have run on ``resid``, on the present routes.

        With ``recompute`` only the residual stream between blocks is kept for the backward pass, which computes every
        block again and so has to run on the same routes and under the same hooks. It raises RuntimeError otherwise.
        """
        if not recompute:
            return self.backend.run_blocks(resid, start, stop, attention_mask)
        for layer in range(start, stop):
            resid = run_again_in_backward(self._run_unchanged, resid, layer, attention_mask, self._changes_of(layer))
        return resid

    def _changes_of(self, layer: int) -> tuple[Route, frozenset[int]]:
        """The route of a block and the hooks on it, by their numbers."""
        points = [module for module in self.model.blocks[layer].modules() if isinstance(module, HookPoint)]
        return self.mlps[layer].route, frozenset(handle.hook.id for point in points for handle in point.fwd_hooks)

    def _run_unchanged(
        self, resid: Tensor, layer: int, attention_mask: Tensor | None, before: tuple[Route, frozenset[int]]
    ) -> Tensor:
        """The residual stream after a block, which has to have the route and hooks that it had before."""
        if self._changes_of(layer) != before:
            raise RuntimeError(
                f"Block {layer} has other routes or hooks in the backward pass than it had in the forward pass, which "
                "is computed again there. Take gradients inside the `with` blocks in which the model ran."
            )
        return self.backend.run_blocks(resid, layer, layer + 1, attention_mask)

    def residual_streams(self, tokens: Int[Tensor, "batch pos"]) -> list[Float[Tensor, "batch pos d_model"]]:
        """The residual stream at the embedding and after every layer, on the present routes. No left padding."""
        streams = [self.embed(tokens)]
        for layer in range(self.n_layers):
            streams.append(self.run_blocks(streams[-1], layer, layer + 1))
        return streams

    @contextmanager
    def recorded(self, point: str) -> Iterator[dict[int, Tensor]]:
        """Layer to the latest value, with its graph, at ``blocks.{layer}.{point}``, for the length of a block."""
        latest: dict[int, Tensor] = {}

        def keep(value: Tensor, hook: HookPoint, layer: int) -> None:
            latest[layer] = value

        hooks = [(f"blocks.{layer}.{point}", partial(keep, layer=layer)) for layer in range(self.n_layers)]
        with self.model.hooks(fwd_hooks=hooks):
            yield latest

    def unembed(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """Final norm and unembedding; logits are in float32 at least.

        A bfloat16 or float16 model itself rounds logits to its own dtype (bfloat16 to steps of 0.125 around 20). That
        rounding is larger than many of the divergences measured in this package.
        """
        flat = resid.flatten(0, -2)[None]
        # squeeze, not [0]: the gradient of an index is a new tensor of zeros with the gradient in it
        return self.backend.unembed(flat).squeeze(0).unflatten(0, resid.shape[:-1])

    def read_by_unembedding(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The input of the unembedding: the final norm's output, in float32 at least."""
        weight, eps = self.backend.norm("ln_final"), self.model.cfg.eps
        resid = resid.to(torch.promote_types(resid.dtype, torch.float32))
        normalized = resid / (resid.square().mean(-1, keepdim=True) + eps).sqrt()
        return normalized if weight is None else normalized * weight.to(resid)

    @property
    def rows_at_once(self) -> int:
        """The number of rows of logits to form at a time."""
        return rows_at_once(self.model.cfg.d_vocab, self.device)
