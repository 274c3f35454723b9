"""The encoders of a layer's features, fitted one at a time to what the other features leave to each.

Gradient steps see a feature that is active on one token of ten thousand in every fifth batch only. Its decoder
direction is found, but its encoder is not exact. Here every feature's encoder is fitted to all of its tokens and to
the tokens nearest to its boundary, which is a convex problem (encoder_fit.py), and a fit counts only if the error
falls.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_adapters.adapters.transcoder import row_norms
from tl_adapters.local_stage.encoder_fit import Encoder, fit_encoder
from tl_adapters.local_stage.local_layer import LocalLayer

SMALLEST_ACTIVATION = 0.05
"""Least length along a feature's direction, in units of the root mean square, that the feature should explain."""
OWN_SHARE = 0.5
"""A token belongs to a feature if this share of what the others leave of it is along the feature's direction."""
NEAR_BOUNDARY = -0.5
"""Pre-activation in decoder-norm units above which a token that is not the feature's is close to its boundary."""
GROUP_TOKENS = 6_000
"""Most tokens of each group (the feature's own, those near its boundary, all others) to which an encoder is fitted."""
LARGEST_WEIGHT = 30.0
"""Most tokens for which one of the others stands."""
MIN_TOKENS = 8
"""A feature with fewer tokens of its own is left as it is."""
DECODER_RIDGE = 1e-4
"""Ridge of the decoders' least squares, as a share of every feature's own energy."""


@torch.no_grad()
def polish_features(
    layer: LocalLayer, x: Float[Tensor, "n d_model"], d: Float[Tensor, "n d_model"], generator: torch.Generator
) -> int:
    """Fit every feature's encoder once, those that write most first, then all decoders together.

    Args:
        layer: the layer, whose adapter changes.
        x: tokens in the layer's coordinates.
        d: differences in the layer's coordinates.
        generator: draws the tokens to which encoders are fitted.

    Returns: the number of encoders that were changed.
    """
    state = _State(layer, x, d)
    changed = 0
    for feature in state.energy.argsort(descending=True).tolist():
        if (encoder := state.fitted(feature, generator)) is not None:
            changed += state.step_towards(feature, encoder)
    _fit_decoders(layer, state.acts, d)
    return changed


class _State:
    """Activations of all features and the residual, both kept up to date while encoders change."""

    def __init__(self, layer: LocalLayer, x: Tensor, d: Tensor) -> None:
        self.adapter, self.x = layer.adapter, x
        self.acts = self.adapter.encode(x)
        self.residual = d - self.adapter.decode(self.acts)
        self.lengths = self.residual.square().sum(1)
        self.norms = row_norms(self.adapter.W_dec)
        self.energy = self.acts.square().sum(0) * self.norms.square()

    def fitted(self, feature: int, generator: torch.Generator) -> Encoder | None:
        """The encoder of a feature for what the other features leave along its direction."""
        adapter, norm = self.adapter, self.norms[feature]
        if float(norm) == 0:
            return None
        size = self.acts[:, feature] * norm
        along = self.residual @ (adapter.W_dec[feature] / norm)
        wanted = along + size
        own = (wanted > SMALLEST_ACTIVATION) & (wanted.square() > OWN_SHARE * (self.lengths + size * (along + wanted)))
        if int(own.sum()) < MIN_TOKENS:
            return None
        pre = (self.x @ adapter.W_enc[:, feature] + adapter.b_enc[feature]) * norm
        near = ~own & (pre > NEAR_BOUNDARY)
        groups = [_draw(tokens, generator) for tokens in (own, near, ~own & ~near)]
        rows = torch.cat([rows for rows, _ in groups])
        weights = torch.cat([torch.full((len(rows),), weight, device=rows.device) for rows, weight in groups])
        start = Encoder(adapter.W_enc[:, feature] * norm, adapter.b_enc[feature] * norm)
        targets = torch.where(own[rows], wanted[rows], 0.0)
        fit = fit_encoder(self.x[rows], targets, weights=weights, start=start, steps=12)
        return None if fit is None else Encoder(fit.w / norm, fit.b / norm)

    def step_towards(self, feature: int, encoder: Encoder) -> bool:
        """Change a feature's encoder by the longest step that lowers the error; whether there was one."""
        adapter, decoder, acts = self.adapter, self.adapter.W_dec[feature], self.acts[:, feature]
        old = self.x @ adapter.W_enc[:, feature] + adapter.b_enc[feature]
        new = self.x @ encoder.w + encoder.b
        for share in (1.0, 0.5, 0.2):
            change = torch.relu(old.lerp(new, share)) - acts
            rows = change.nonzero()[:, 0]
            written = change[rows, None] * decoder
            gain = (2 * self.residual[rows] * written - written.square()).sum(1)
            if float(gain.sum()) > 0:
                self.residual[rows] -= written
                self.lengths[rows] -= gain
                self.acts[:, feature] += change
                adapter.W_enc[:, feature].lerp_(encoder.w, share)
                adapter.b_enc[feature].lerp_(encoder.b, share)
                return True
        return False


def _draw(tokens: Bool[Tensor, "n"], generator: torch.Generator) -> tuple[Int[Tensor, "k"], float]:
    """At most `GROUP_TOKENS` of the tokens, and the number of tokens for which each stands."""
    rows = tokens.nonzero()[:, 0]
    drawn = rows[torch.randperm(len(rows), generator=generator)[:GROUP_TOKENS].to(rows.device)]
    return drawn, min(LARGEST_WEIGHT, len(rows) / max(1, len(drawn)))


def _fit_decoders(layer: LocalLayer, acts: Tensor, d: Tensor) -> None:
    """All decoders of active features by least squares; the bias stays."""
    adapter = layer.adapter
    alive = (acts > 0).sum(0) >= MIN_TOKENS
    active = acts[:, alive]
    gram = active.T @ active
    gram += torch.diag(DECODER_RIDGE * gram.diagonal())
    adapter.W_dec[alive] = torch.linalg.solve(gram, active.T @ (d - adapter.b_dec))
