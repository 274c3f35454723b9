"""The tokens by which a layer's features are revised, with the activations of every feature and what they leave.

Activations are sparse, so they are kept as the active tokens of each feature and their values. A change of one feature
then costs as much as it has active tokens, and one product with the inputs where its encoder changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_adapters.adapters.transcoder import row_norms
from tl_adapters.local_stage.encoder_fit import Encoder
from tl_adapters.local_stage.local_layer import LocalLayer

TOKENS_AT_ONCE = 2**14
"""Number of tokens that are encoded at a time."""
MIN_FIRINGS = 3
"""A feature with fewer active tokens counts as unused."""


class LayerTokens:
    """Tokens of a layer, the activations of its features there, and what the adapter leaves of the difference.

    Args:
        layer: the layer; its features are changed through this object, which keeps all parts up to date.
        x: inputs in the layer's coordinates.
        d: differences in the layer's coordinates.
    """

    @torch.no_grad()
    def __init__(self, layer: LocalLayer, x: Float[Tensor, "n d_model"], d: Float[Tensor, "n d_model"]) -> None:
        self.layer, self.x, self.d = layer, x, d
        self.residual = torch.empty_like(d)
        """What the adapter leaves of the difference, [n, d_model]."""
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute activations and residual again from the adapter."""
        adapter = self.layer.adapter
        features, tokens, values = [], [], []
        for start in range(0, len(self.x), TOKENS_AT_ONCE):
            part = slice(start, start + TOKENS_AT_ONCE)
            acts = adapter.encode(self.x[part])
            left = torch.sub(self.d[part], adapter.b_dec, out=self.residual[part])
            left.addmm_(acts, adapter.W_dec, alpha=-1)
            by_feature = acts.T.contiguous()
            feature, token = _active(by_feature)
            features.append(feature)
            tokens.append(token + start)
            values.append(by_feature[feature, token])
        feature, order = torch.cat(features).sort(stable=True)
        sizes = torch.bincount(feature, minlength=adapter.n_features).tolist()
        self.tokens = list(torch.cat(tokens)[order].split(sizes))
        """The active tokens of every feature."""
        self.values = list(torch.cat(values)[order].split(sizes))
        """The activations there."""

    @property
    def n(self) -> int:
        """Number of tokens."""
        return len(self.x)

    @torch.no_grad()
    def encoded(self, encoders: Sequence[Encoder]) -> Float[Tensor, "k n"]:
        """Pre-activations that these encoders have on all tokens."""
        if not encoders:
            return self.x.new_empty(0, self.n)
        weights, biases = (torch.stack(parts) for parts in zip(*encoders, strict=True))
        return torch.addmm(biases[:, None], weights, self.x.T)

    def activations(self, feature: int) -> Float[Tensor, "n"]:
        """A feature's activations on all tokens."""
        acts = self.x.new_zeros(self.n)
        acts[self.tokens[feature]] = self.values[feature]
        return acts

    @torch.no_grad()
    def energy(self) -> Float[Tensor, "n_features"]:
        """The energy of what every feature writes; 0 for an unused feature."""
        squares = [
            values.square().sum() if len(values) >= MIN_FIRINGS else values.new_zeros(()) for values in self.values
        ]
        return torch.stack(squares) * row_norms(self.layer.adapter.W_dec).square()

    @torch.no_grad()
    def gain(self, feature: int) -> float:
        """By how much the squared error would rise without a feature."""
        values, direction = self.values[feature], self.layer.adapter.W_dec[feature]
        left = self.residual.index_select(0, self.tokens[feature]) @ direction
        return float(values @ (2 * left + values * direction.square().sum()))

    @torch.no_grad()
    def silence(self, feature: int) -> None:
        """Make a feature inactive on every token."""
        self._leave(feature, 1)
        self.tokens[feature], self.values[feature] = self.tokens[feature][:0], self.values[feature][:0]
        self.layer.silence(torch.tensor([feature]))

    @torch.no_grad()
    def replace(
        self, feature: int, encoder: Encoder, direction: Float[Tensor, "d_model"], acts: Float[Tensor, "n"]
    ) -> None:
        """Give a feature another encoder, with these activations, and another decoder."""
        self._leave(feature, 1)
        self.layer.replace(feature, encoder, direction)
        self._activate(feature, acts)
        self._leave(feature, -1)

    @torch.no_grad()
    def set_encoder(self, feature: int, encoder: Encoder, acts: Float[Tensor, "n"]) -> Int[Tensor, "k"]:
        """Change a feature's encoder to one with these activations; returns the tokens whose residual changed."""
        adapter, before = self.layer.adapter, self.tokens[feature]
        self._leave(feature, 1)
        adapter.W_enc[:, feature], adapter.b_enc[feature] = encoder.w, encoder.b
        self._activate(feature, acts)
        self._leave(feature, -1)
        return torch.cat([before, self.tokens[feature]]).unique()

    @torch.no_grad()
    def set_decoder(self, feature: int, direction: Float[Tensor, "d_model"]) -> None:
        """Change what a feature writes; its encoder stays."""
        self._leave(feature, 1)
        self.layer.adapter.W_dec[feature] = direction
        self._leave(feature, -1)

    def _activate(self, feature: int, acts: Tensor) -> None:
        (self.tokens[feature],) = _active(acts)
        self.values[feature] = acts[self.tokens[feature]]

    def _leave(self, feature: int, sign: int) -> None:
        """Add what a feature writes to the residual, or subtract it."""
        # On a CPU index_add_ and index_select take a fraction of the time of indexing with a tensor.
        written = self.values[feature][:, None] * self.layer.adapter.W_dec[feature]
        self.residual.index_add_(0, self.tokens[feature], written, alpha=sign)


def _active(acts: Tensor) -> tuple[Tensor, ...]:
    """Indices of activations that are not 0; on a CPU truth values are searched four times as fast as numbers."""
    return (acts != 0).nonzero(as_tuple=True)
