"""The encoders of a layer's features, fitted one at a time to what the other features leave to each.

Gradient steps see a feature that is active on one token of ten thousand in every fifth batch only. Its decoder
direction is found, but its encoder is not exact. Here every feature's encoder is fitted to all of its tokens and to
the tokens nearest to its boundary, which is a convex problem (encoder_fit.py), and a fit counts only if the error
falls. Some features are fitted at a time, so that one product computes their pre-activations on all tokens.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_adapters.adapters.transcoder import row_norms
from tl_adapters.local_stage.encoder_fit import Encoder, fit_encoder
from tl_adapters.local_stage.layer_tokens import TOKENS_AT_ONCE, LayerTokens

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
FEATURES_AT_ONCE = 16
"""Number of features that are fitted before the first of them changes."""
STEPS = (1.0, 0.5, 0.2)
"""Shares of the way to a fitted encoder that are tried."""
DECODER_RIDGE = 1e-4
"""Ridge of the decoders' least squares, as a share of every feature's own energy."""


@torch.no_grad()
def polish_features(tokens: LayerTokens, generator: torch.Generator) -> int:
    """Fit every feature's encoder once, those that write most first, then all decoders together.

    Args:
        tokens: tokens of the layer whose features change.
        generator: draws the tokens to which encoders are fitted.

    Returns: the number of encoders that were changed.
    """
    energy = tokens.energy()
    order = [feature for feature in energy.argsort(descending=True).tolist() if float(energy[feature]) > 0]
    changed = 0
    for start in range(0, len(order), FEATURES_AT_ONCE):
        changed += _Block(tokens, order[start : start + FEATURES_AT_ONCE]).polish(generator)
    _fit_decoders(tokens)
    return changed


class _Block:
    """Some features, their pre-activations, and the projections of the residual on their directions.

    They are computed by one product each for all features of the block, and kept up to date while encoders change.
    """

    def __init__(self, tokens: LayerTokens, features: list[int]) -> None:
        adapter, self.tokens, self.features = tokens.layer.adapter, tokens, features
        self.norms = row_norms(adapter.W_dec[features])
        self.directions = adapter.W_dec[features] / self.norms[:, None]
        self.along = self.directions @ tokens.residual.T
        self.pre = torch.addmm(adapter.b_enc[features, None], adapter.W_enc[:, features].T, tokens.x.T)
        self.lengths = row_norms(tokens.residual).square()

    def polish(self, generator: torch.Generator) -> int:
        """Fit the encoders of all features, and take every step that lowers the error; returns their number."""
        fits = [(i, fit) for i in range(len(self.features)) if (fit := self._fitted(i, generator)) is not None]
        if not fits:
            return 0
        fitted = self.tokens.encoded([fit for _, fit in fits])
        return sum(self._step(i, fit, after) for (i, fit), after in zip(fits, fitted, strict=True))

    def _step(self, position: int, encoder: Encoder, after: Float[Tensor, "n"]) -> bool:
        """Take the longest step to a feature's fitted encoder that lowers the error, if there is one."""
        tokens, feature = self.tokens, self.features[position]
        adapter, before, acts = tokens.layer.adapter, self.pre[position], tokens.activations(feature)
        norm, along = self.norms[position], self.along[position]
        for share in STEPS:
            stepped = torch.relu(before.lerp(after, share))
            change = (stepped - acts) * norm
            if float(change @ (2 * along - change)) <= 0:
                continue
            old = Encoder(adapter.W_enc[:, feature], adapter.b_enc[feature])
            part = Encoder(old.w.lerp(encoder.w, share), old.b.lerp(encoder.b, share))
            rows = tokens.set_encoder(feature, part, stepped)
            self.along[:, rows] = self.directions @ tokens.residual.index_select(0, rows).T
            return True
        return False

    def _fitted(self, position: int, generator: torch.Generator) -> Encoder | None:
        """The encoder of a feature for what the other features leave along its direction."""
        tokens, feature, norm = self.tokens, self.features[position], self.norms[position]
        adapter, along = tokens.layer.adapter, self.along[position]
        size = tokens.activations(feature) * norm
        wanted = along + size
        own = (wanted > SMALLEST_ACTIVATION) & (wanted.square() > OWN_SHARE * (self.lengths + size * (along + wanted)))
        if int(own.sum()) < MIN_TOKENS:
            return None
        near = ~own & (self.pre[position] * norm > NEAR_BOUNDARY)
        groups = [_draw(chosen, generator) for chosen in (own, near, ~own & ~near)]
        rows = torch.cat([rows for rows, _ in groups])
        weights = torch.cat([torch.full((len(rows),), weight, device=rows.device) for rows, weight in groups])
        start = Encoder(adapter.W_enc[:, feature] * norm, adapter.b_enc[feature] * norm)
        targets = torch.where(own[rows], wanted[rows], 0.0)
        fit = fit_encoder(tokens.x.index_select(0, rows), targets, weights=weights, start=start, steps=12)
        return None if fit is None else Encoder(fit.w / norm, fit.b / norm)


def _draw(tokens: Bool[Tensor, "n"], generator: torch.Generator) -> tuple[Int[Tensor, "k"], float]:
    """At most `GROUP_TOKENS` of the tokens, and the number of tokens for which each stands."""
    rows = tokens.nonzero()[:, 0]
    drawn = rows[torch.randperm(len(rows), generator=generator)[:GROUP_TOKENS].to(rows.device)]
    return drawn, min(LARGEST_WEIGHT, len(rows) / max(1, len(drawn)))


def _fit_decoders(tokens: LayerTokens) -> None:
    """All decoders of active features by least squares; the bias stays."""
    adapter = tokens.layer.adapter
    alive = [feature for feature, active in enumerate(tokens.tokens) if len(active) >= MIN_TOKENS]
    gram = adapter.W_dec.new_zeros(len(alive), len(alive))
    products = adapter.W_dec.new_zeros(len(alive), adapter.W_dec.shape[1])
    for start in range(0, tokens.n, TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        acts = adapter.encode(tokens.x[part])[:, alive]
        gram += acts.T @ acts
        products += acts.T @ (tokens.d[part] - adapter.b_dec)
    gram += torch.diag(DECODER_RIDGE * gram.diagonal())
    for feature, direction in zip(alive, torch.linalg.solve(gram, products), strict=True):
        tokens.set_decoder(feature, direction)
