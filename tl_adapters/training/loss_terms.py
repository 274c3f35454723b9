"""The NMSE and sparsity terms of the training objective, as functions of tensors (arXiv 2602.20904, section 3.2).

The divergence terms are in `training.kl_divergence`. Padding never counts. With r the residual stream of the
replacement, r* that of the target, f the activations of the features and T the tokens that count:

    NMSE of one layer       sum_T ||r - r*||^2 / sum_T ||r*||^2
    L1 of one layer         mean_T sum_f f ||W_dec[f]||
    L0 of one layer         mean_T sum_f [f > 0]

The local term reads d, the difference of the two MLPs' outputs where both read what the target's MLP reads, and the
adapter's output there. It is no part of the paper's objective:

    local term of one layer     sum_T ||T(x) - d||^2 / sum_T ||d||^2 + weight * sparsity

where sparsity is the L1 over the root of mean_T ||d||^2 for relu, and the L0 for jumprelu.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_adapters.adapters.active_features import ActiveFeatures
from tl_adapters.utils.precision import at_least_float32


def nmse_term(
    target_resid: Float[Tensor, "batch pos d_model"],
    resid: Float[Tensor, "batch pos d_model"],
    mask: Bool[Tensor, "batch pos"],
) -> Float[Tensor, ""]:
    """NMSE of one layer: the sum of squared differences over the sum of squares of the target.

    Term 4 of the objective is the mean of this over the residual stream at the embedding (where it is 0) and after
    every layer.

    Args:
        target_resid: the target's residual stream.
        resid: the replacement's.
        mask: the tokens that count.
    """
    weights = mask[..., None].to(at_least_float32(resid[:0]).dtype)
    target = at_least_float32(target_resid)
    error = ((at_least_float32(resid) - target).square() * weights).sum()
    return error / (target.square() * weights).sum()


def l1_term(
    acts: Float[Tensor, "batch pos n_features"] | ActiveFeatures,
    decoder_norms: Float[Tensor, "n_features"],
    mask: Bool[Tensor, "batch pos"],
) -> Float[Tensor, ""]:
    """L1 of one layer, the sparsity term of relu adapters: mean of the summed activations times decoder norms.

    Term 5 of the objective is the sum of this over the layers.

    Args:
        acts: activations of the features.
        decoder_norms: norm of each feature's decoder row.
        mask: the tokens that count.
    """
    return _mean_over(acts @ decoder_norms.to(acts.dtype), mask)


def l0_term(active: Float[Tensor, "batch pos n_features"], mask: Bool[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """L0 of one layer, the sparsity term of jumprelu adapters: mean number of active features (arXiv 2407.14435).

    Args:
        active: 1 or 0, with a gradient to the thresholds (`activation_functions.step`).
        mask: the tokens that count.
    """
    return _mean_over(active.sum(-1, dtype=torch.promote_types(active.dtype, torch.float32)), mask)


def local_term(
    output: Float[Tensor, "batch pos d_model"],
    difference: Float[Tensor, "batch pos d_model"],
    sparsity: Float[Tensor, ""],
    mask: Bool[Tensor, "batch pos"],
    sparsity_weight: float,
    in_units_of_difference: bool,
) -> Float[Tensor, ""]:
    """The local term of one layer; 0 where the two MLPs do not differ on any token that counts.

    Args:
        output: T(x), the adapter's output.
        difference: MLP_target(x) - MLP_base(x).
        sparsity: `l1_term` or `l0_term` of the adapter's activations.
        mask: the tokens that count.
        sparsity_weight: weight of the sparsity.
        in_units_of_difference: divide the sparsity by the root mean square of the difference's length, as an L1 needs.
    """
    energy = _mean_over(difference.square().sum(-1), mask)
    differs = energy > 0
    energy = torch.where(differs, energy, 1.0)
    error = _mean_over((output - difference).square().sum(-1), mask) / energy
    in_units = sparsity / energy.sqrt() if in_units_of_difference else sparsity
    return torch.where(differs, error + sparsity_weight * in_units, 0.0)


def _mean_over(per_token: Tensor, mask: Tensor) -> Tensor:
    per_token = at_least_float32(per_token)  # activations may be in bfloat16, sums may not
    return (per_token * mask.to(per_token.dtype)).sum() / mask.sum()
