"""Reads which features fire on a batch of tokens, on the replacement's or the target's residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_adapters.adapters.finite_weights import NotFiniteError
from tl_adapters.adapters.transcoder import row_norms
from tl_adapters.features.document_batches import TokenBatch
from tl_adapters.features.feature import ResidualStream
from tl_adapters.features.logit_effects import decoder_rows
from tl_adapters.features.store_description import StoreDescription
from tl_adapters.models.finite_activations import finite_blocks
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel

MLP_INPUT_HOOK = "mlp.hook_in"
NEURON_HOOK = "mlp.hook_post"


@contextmanager
def features_read_on(pair: PairedModel, stream: ResidualStream) -> Iterator[None]:
    """Route the model so that the adapters' hook points fire with what they read on a residual stream.

    On the target's stream, the adapters read the inputs of the target's MLPs and add nothing to their outputs.
    """

    def encode(x: Tensor, hook: HookPoint, layer: int) -> None:
        mlp = pair.mlps[layer]
        assert mlp.adapter is not None
        mlp.adapter.encode(x if mlp.adapter_scale is None else x * mlp.adapter_scale)

    layers = pair.installed_adapters().layer_indices if stream == "target" else []
    hooks = [(f"blocks.{layer}.{MLP_INPUT_HOOK}", partial(encode, layer=layer)) for layer in layers]
    with pair.routed(stream), pair.model.hooks(fwd_hooks=hooks):
        yield


class Firings(NamedTuple):
    """All firings on a batch, one row each."""

    token: Int[Tensor, "n"]
    """Index of the token in the flattened batch."""
    feature: Int[Tensor, "n"]
    """Number of the feature, counted through all layers."""
    value: Float[Tensor, "n"]
    """Activation in decoder-norm units."""


class FiringReader:
    """Reads the firings of all features, or of the target's MLP neurons, in one forward pass per batch.

    Hooks take the few per cent of activations that are not zero out of each layer's dense activations at once, so
    nothing dense is kept.

    Args:
        pair: the pair, with adapters.
        description: the layers, features and residual stream to read.
    """

    def __init__(self, pair: PairedModel, description: StoreDescription) -> None:
        self._pair, self._description = pair, description
        layers = description.layers
        rows_by_layer = decoder_rows(pair, description.kind, layers)
        self._norms = {layer: row_norms(rows).float() for layer, rows in rows_by_layer}
        all_rows_nonzero = torch.stack([(norms > 0).all() for norms in self._norms.values()]).tolist()
        self._has_zero_rows = {layer: not nonzero for layer, nonzero in zip(layers, all_rows_nonzero, strict=True)}

    def read(self, batch: TokenBatch) -> Firings:
        """The firings on a batch, on the CPU, sorted by feature and then token.

        Raises:
            NotFiniteError: an activation is NaN or infinite; the message names layer and document.
        """
        pair = self._pair
        layer_firings: list[Firings] = []
        device, documents = pair.device, batch.document.tolist()
        real = (batch.region >= 0).view(batch.tokens.shape)
        resid, name = pair.embed(batch.tokens.to(device)), f"The {self._description.stream}'s residual stream"
        checked = finite_blocks(pair.model, pair.n_layers, real.to(device), documents, name, resid)
        with self._appending_to(layer_firings), checked:
            pair.run_blocks(resid, 0, pair.n_layers)
        firings = Firings(*(torch.cat(column).cpu() for column in zip(*layer_firings, strict=True)))
        self._require_finite(batch, firings)
        order = firings.feature.argsort(stable=True)  # within a layer, the firings come sorted by token
        order = order[batch.region[firings.token[order]] >= 0]
        return Firings(*(column[order] for column in firings))

    def _require_finite(self, batch: TokenBatch, firings: Firings) -> None:
        """Check the activations, which may be infinite even where the residual stream that adapters read is not."""
        bad = (~torch.isfinite(firings.value) & (batch.region[firings.token] >= 0)).nonzero()[:, 0]
        if len(bad):
            row, position = divmod(int(firings.token[bad[0]]), batch.tokens.shape[1])
            layer_number, index = divmod(int(firings.feature[bad[0]]), self._description.n_features)
            raise NotFiniteError(
                f"Layer {self._description.layers[layer_number]}, {self._description.kind} {index}, document "
                f"{int(batch.document[row])} (from 0), position {position}: the activation is NaN or infinite. Run the "
                "models in bfloat16 or float32 (dtype=, --dtype); where they are, look at the weights of this layer."
            )

    @contextmanager
    def _appending_to(self, layer_firings: list[Firings]) -> Iterator[None]:
        """Hooks that append each layer's firings, on the model's device.

        `nonzero` waits for the device once per layer and batch; this is the price of keeping nothing dense.
        """
        pair, description = self._pair, self._description

        def append(acts: Tensor, hook: HookPoint, layer_number: int, layer: int) -> None:
            firings = self._firings(acts, layer)
            numbered = firings.feature + layer_number * description.n_features
            layer_firings.append(firings._replace(feature=numbered))

        hook_name = NEURON_HOOK if description.kind == "neuron" else ACTS_HOOK
        hooks = [
            (f"blocks.{layer}.{hook_name}", partial(append, layer_number=number, layer=layer))
            for number, layer in enumerate(description.layers)
        ]
        neurons = description.kind == "neuron"
        routed = pair.routed("target") if neurons else features_read_on(pair, description.stream)
        with routed, pair.model.hooks(fwd_hooks=hooks):
            yield

    def _firings(self, acts: Tensor, layer: int) -> Firings:
        """The firings of one layer, with features numbered within the layer."""
        norms, n_features = self._norms[layer], self._description.n_features
        neurons = self._description.kind == "neuron"
        if neurons:  # of each token, the neurons that write most
            size = acts.flatten(0, 1).clamp(min=0).float() * norms
            n_strongest = min(self._description.options.neurons_per_token, n_features)
            strongest = size.topk(n_strongest, dim=-1)
            acts = torch.zeros_like(size).scatter_(1, strongest.indices, strongest.values)
            norms = torch.ones_like(norms)
        flat = acts.flatten()
        nonzero = flat.nonzero()[:, 0]
        index = nonzero % n_features
        value = flat[nonzero].float() * norms[index]
        if self._has_zero_rows[layer] and not neurons:  # a feature with a decoder row of zeros writes nothing
            nonzero, index, value = (column[value > 0] for column in (nonzero, index, value))
        return Firings(nonzero // n_features, index, value)
