"""The pass of an adapter over its active features alone, for training on a CPU.

Of the features of a trained adapter about one in a hundred is active at a token. The product with the encoder is
computed whole, as it says which these are. Every other product of a training step has one factor that is zero but at
pairs of a token and an active feature: the decoder's output, and the gradients of activations, inputs, encoder and
decoder. Here they read and write only these pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

LARGEST_DENSITY = 0.05
"""The share of active features up to which this pass is faster than whole products (benchmarks/active_features.py)."""

ACTS_AT_ONCE = 2**22
"""Activations that are computed at a time, where those of a token are its own: 16 MB in float32."""


@dataclass(frozen=True)
class ActiveFeatures:
    """The activations of a layer as a list: one entry for every pair of a token and a feature that is active there."""

    values: Float[Tensor, "n"]
    """The activations, with their graph."""
    tokens: Int[Tensor, "n"]
    """The index of each entry's token among all tokens of the batch, ascending."""
    features: Int[Tensor, "n"]
    """The index of each entry's feature."""
    decoder_norms: Float[Tensor, "n_features"]
    """The norms of the decoder's rows, with their graph (`TranscoderAdapter.decoder_norms`)."""
    shape: torch.Size
    """[*batch], the shape of the tokens."""

    def __matmul__(self, weights: Float[Tensor, "n_features"]) -> Float[Tensor, "*batch"]:
        """The sum over the features of activation times weight, of every token."""
        products = self.values * weights.index_select(0, self.features)
        return products.new_zeros(self.shape.numel()).index_add(0, self.tokens, products).view(self.shape)

    def counts(self) -> Int[Tensor, "*batch"]:
        """The number of active features of every token."""
        return torch.bincount(self.tokens, minlength=self.shape.numel()).view(self.shape)

    def smallest(self, real: Bool[Tensor, "*batch"]) -> Float[Tensor, ""]:
        """The smallest activation of the real tokens; 0 if there is none."""
        values = self.values.detach()[real.flatten()[self.tokens]]
        return values.amin() if len(values) else values.new_zeros(())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations."""
        return self.values.dtype


Activations = Tensor | ActiveFeatures
"""The activations of a layer, [*batch, n_features] or as a list."""


def run_over_active(
    x: Float[Tensor, "*batch d_model"],
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    activate: Callable[[Float[Tensor, "n n_features"]], Float[Tensor, "n n_features"]] | None,
    tokens_at_once: int,
) -> tuple[ActiveFeatures, Float[Tensor, "*batch d_model"]] | None:
    """Activations and output of an adapter; None where more than `LARGEST_DENSITY` of its features are active.

    Args:
        x: what the adapter reads.
        weights: W_enc [d_model, n_features], b_enc [n_features], W_dec [n_features, d_model] and b_dec [d_model].
        activate: the activation function, which leaves a pre-activation as it is or makes it 0; None is relu.
        tokens_at_once: the number of tokens for which all features are computed at a time.
    """
    flat, (W_enc, b_enc, _, _) = x.flatten(0, -2), weights
    tokens, features, values = [], [], []
    n_active = n_computed = 0
    for start in range(0, len(flat), tokens_at_once):
        rows = flat[start : start + tokens_at_once]
        found = _active_entries(rows, W_enc, b_enc, activate)
        if found is None:
            return None
        n_active, n_computed = n_active + len(found[0]), n_computed + len(rows) * len(b_enc)
        if n_active > LARGEST_DENSITY * n_computed:
            return None
        tokens.append(found[0] + start)
        features.append(found[1])
        values.append(found[2])
    pairs = (torch.cat(tokens), torch.cat(features))
    entries, norms, output = _OverActive.apply(flat, *weights, torch.cat(values), *pairs)
    return ActiveFeatures(entries, *pairs, norms, x.shape[:-1]), output.view(x.shape)


@torch.no_grad()
def _active_entries(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, activate: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Token, feature and activation of every active pair, as `run_over_active` takes them; None where most are active.

    NaN is active, so that it is not lost.
    """
    if activate is None:
        # That pre + b > 0 is seen from pre alone. Sums and zeros for all features would take longer than the product.
        table = x @ W_enc
        active = torch.le(table, -b_enc).logical_not_()
    else:
        table = activate(torch.addmm(b_enc, x, W_enc))
        active = table != 0
    if (flat := flat_indices(active)) is None:
        return None
    tokens = flat // active.shape[1]
    features = flat - tokens * active.shape[1]
    values = table.view(-1)[flat]
    return tokens, features, values if activate is not None else values + b_enc[features]


def flat_indices(active: Bool[Tensor, "n_tokens n_features"]) -> Int[Tensor, "n"] | None:
    """The indices of all True in the flattened tensor, ascending; None where far more than `LARGEST_DENSITY` are."""
    if active.shape[1] % 8:
        return active.flatten().nonzero()[:, 0]
    # Most runs of eight bytes are zero, and eight bytes are compared with zero at once.
    words = active.view(torch.int64).flatten().nonzero()[:, 0]
    if len(words) > LARGEST_DENSITY * active.numel():
        return None
    rows, columns = active.view(-1, 8).index_select(0, words).nonzero(as_tuple=True)
    return words[rows] * 8 + columns


class _OverActive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        values: Tensor,
        tokens: Tensor,
        features: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        norms = W_dec.norm(dim=-1)
        ctx.save_for_backward(x, W_enc, W_dec, norms, values, tokens, features)
        ctx.set_materialize_grads(False)
        return values.clone(), norms, _weighted_sums(W_dec, features, _offsets(tokens, len(x)), values) + b_dec

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        x, W_enc, W_dec, norms, values, tokens, features = ctx.saved_tensors
        to_values, to_norms, to_output = grad_outputs
        if to_output is None:
            to_output = torch.zeros_like(x)
        by_token = _offsets(tokens, len(x))
        order = features.argsort(stable=True)
        by_feature, ordered = _offsets(features.index_select(0, order), len(W_dec)), tokens.index_select(0, order)
        of_output = _pair_products(to_output, W_dec, features, by_token)
        to_values = of_output if to_values is None else to_values + of_output
        to_W_dec = _weighted_sums(to_output, ordered, by_feature, values.index_select(0, order))
        if to_norms is not None:  # a row of zeros has no direction, and gets the gradient 0 as from torch's norm
            to_W_dec.addcmul_(W_dec, torch.where(norms > 0, to_norms / norms, 0.0)[:, None])
        to_W_enc = _weighted_sums(x, ordered, by_feature, to_values.index_select(0, order)).T
        to_b_enc = to_values.new_zeros(len(W_dec)).index_add_(0, features, to_values)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = _weighted_sums(W_enc.T.contiguous(), features, by_token, to_values)
        return to_x, to_W_enc, to_b_enc, to_W_dec, to_output.sum(0), None, None, None


def _offsets(indices: Tensor, n: int) -> Tensor:
    """Where the entries of each index begin among ascending ``indices``, and their number at the end: [n + 1]."""
    return torch.searchsorted(indices, torch.arange(n + 1, device=indices.device))


def _weighted_sums(rows: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """For every group of entries between two offsets, the sum of weight times row: [n_groups, d_model]."""
    return F.embedding_bag(
        indices, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )  # fmt: skip


def _pair_products(groups: Tensor, rows: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
    """For every entry the product of its group's vector with its row: the gradient of `_weighted_sums` to weights."""
    with torch.enable_grad():
        weights = groups.new_zeros(len(indices)).requires_grad_()
        return torch.autograd.grad(_weighted_sums(rows.detach(), indices, offsets, weights), weights, groups)[0]
