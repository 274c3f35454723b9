"""L0: how many features are active per token at a layer. Every L0 of the package is counted by these functions.

A feature is active at a token where its activation is above zero. L0 is the mean number of active features per token;
the caller's mask says over which tokens (response tokens, all tokens, or the tokens that the training loss counts).
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_adapters.adapters.active_features import ActiveFeatures


def active_counts(
    acts: Float[Tensor, "batch pos n_features"] | ActiveFeatures, mask: Bool[Tensor, "batch pos"]
) -> Int[Tensor, "batch"]:
    """The number of active features of each sequence at one layer, summed over the tokens of ``mask``.

    Divided by the number of those tokens this is L0. The sums are what is accumulated over batches, and what intervals
    over documents are computed from.
    """
    per_token = acts.counts() if isinstance(acts, ActiveFeatures) else (acts > 0).sum(-1)
    return (per_token * mask).sum(-1)


def l0(
    acts: Float[Tensor, "batch pos n_features"] | ActiveFeatures, mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """L0 at one layer: the mean number of active features over the tokens of ``mask``."""
    return active_counts(acts, mask).sum() / mask.sum()
