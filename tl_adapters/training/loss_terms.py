"""The five terms of the training objective as pure functions of tensors and masks (arXiv 2602.20904, section 3.2).

In every function padding never counts, and divergences are in nats.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from tl_adapters.utils.precision import at_least_float32


def squared_error_ratio(
    target_resid: Float[Tensor, "batch pos d_model"],
    resid: Float[Tensor, "batch pos d_model"],
    mask: Bool[Tensor, "batch pos"],
) -> Float[Tensor, ""]:
    """Sum of squared differences over sum of squares of the target, over the tokens that count: one layer of NMSE.

    Term 4 is its mean over the residual stream at the embedding (where it is 0) and after every layer.
    """
    weights = mask[..., None].to(at_least_float32(resid[:0]).dtype)
    target = at_least_float32(target_resid)
    error = ((at_least_float32(resid) - target).square() * weights).sum()
    return error / (target.square() * weights).sum()


def sparsity(
    acts: Float[Tensor, "batch pos n_features"],
    decoder_norms: Float[Tensor, "n_features"],
    mask: Bool[Tensor, "batch pos"],
) -> Float[Tensor, ""]:
    """Mean over the tokens that count of sum_f f(x) ||W_dec[f]||: one layer of term 5 (the layers are summed)."""
    return _mean_over(acts @ decoder_norms.to(acts.dtype), mask)


def l0_penalty(active: Float[Tensor, "batch pos n_features"], mask: Bool[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Term 5 of jumprelu: mean over the tokens that count of the number of active features (arXiv 2407.14435).

    Args:
        active: 1 or 0, with the gradient to the thresholds (`activations.step`).
        mask: the tokens that count.
    """
    return _mean_over(active.sum(-1), mask)


def _mean_over(per_token: Tensor, mask: Tensor) -> Tensor:
    return (per_token * mask.to(per_token.dtype)).sum() / mask.sum()
