"""The tokens by which a layer's features are revised, with the activations of every feature and what they leave.

Activations are sparse, so they are kept as the active tokens of each feature and their values. A change of one feature
then costs as much as it has active tokens, and one product with the inputs where its encoder changes.
"""

from __future__ import annotations

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
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute activations and residual again from the adapter."""
        adapter = self.layer.adapter
        residual, features, tokens, values = [], [], [], []
        for start in range(0, len(self.x), TOKENS_AT_ONCE):
            part = slice(start, start + TOKENS_AT_ONCE)
            acts = adapter.encode(self.x[part])
            residual.append(self.d[part] - adapter.decode(acts))
            by_feature = acts.T
            feature, token = by_feature.nonzero(as_tuple=True)
            features.append(feature)
            tokens.append(token + start)
            values.append(by_feature[feature, token])
        self.residual = torch.cat(residual)
        """What the adapter leaves of the difference, [n, d_model]."""
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
        written = self._written(feature)
        return float((2 * self.residual[self.tokens[feature]] * written + written.square()).sum())

    @torch.no_grad()
    def silence(self, feature: int) -> None:
        """Make a feature inactive on every token."""
        self.residual[self.tokens[feature]] += self._written(feature)
        self.tokens[feature], self.values[feature] = self.tokens[feature][:0], self.values[feature][:0]
        self.layer.silence(torch.tensor([feature]))

    @torch.no_grad()
    def replace(self, feature: int, encoder: Encoder, direction: Float[Tensor, "d_model"]) -> None:
        """Give a feature another encoder and decoder."""
        self.residual[self.tokens[feature]] += self._written(feature)
        self.layer.replace(feature, encoder, direction)
        self._activate(feature, torch.relu(self.x @ encoder.w + encoder.b))
        self.residual[self.tokens[feature]] -= self._written(feature)

    @torch.no_grad()
    def set_encoder(self, feature: int, encoder: Encoder, acts: Float[Tensor, "n"]) -> Int[Tensor, "k"]:
        """Change a feature's encoder to one with these activations; returns the tokens whose residual changed."""
        adapter, before = self.layer.adapter, self.tokens[feature]
        self.residual[before] += self._written(feature)
        adapter.W_enc[:, feature], adapter.b_enc[feature] = encoder.w, encoder.b
        self._activate(feature, acts)
        self.residual[self.tokens[feature]] -= self._written(feature)
        return torch.cat([before, self.tokens[feature]]).unique()

    def _activate(self, feature: int, acts: Tensor) -> None:
        self.tokens[feature] = acts.nonzero()[:, 0]
        self.values[feature] = acts[self.tokens[feature]]

    def _written(self, feature: int) -> Tensor:
        return self.values[feature][:, None] * self.layer.adapter.W_dec[feature]
