"""KL divergence per token, from logits or from residual streams, without all logits in memory at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tl_adapters.utils.precision import at_least_float32, wide

Unembed = Callable[[Tensor], Tensor]
"""Function from [n, d_model] to logits [n, d_vocab]: final norm, unembedding and soft cap."""


def kl_per_token(
    target_logits: Float[Tensor, "*batch d_vocab"], logits: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(target || model) of the next-token distributions in nats, computed in float32 or wider.

    Rounding in float32 is below 1e-5 nats (and 1e-5 of the value) and is the only source of negative values; they are
    not clamped, which would bias means. Logits of a low-precision model should come from `PairedModel.unembed`.
    """
    target_logprobs, logprobs = (F.log_softmax(at_least_float32(x), -1) for x in (target_logits, logits))
    return (target_logprobs.exp() * (target_logprobs - logprobs)).sum(-1)


def masked_kl(
    target_logits: Float[Tensor, "batch pos d_vocab"],
    logits: Float[Tensor, "batch pos d_vocab"],
    mask: Bool[Tensor, "batch pos"],
) -> Float[Tensor, ""]:
    """Mean of KL(target || model) over the tokens of the mask, as in terms 1 to 3 of the loss."""
    return kl_per_token(target_logits[mask], logits[mask]).mean()


def kl_from_residual(
    target_resid: Float[Tensor, "batch pos d_model"],
    resid: Float[Tensor, "batch pos d_model"],
    mask: Bool[Tensor, "batch pos"],
    unembed: Unembed,
    rows_at_once: int,
) -> Float[Tensor, ""]:
    """`masked_kl` from final residual streams, without a tensor of shape [batch, pos, d_vocab].

    The unembedding is frozen, so the gradient at ``resid`` is computed in chunks during the forward pass and only this
    gradient is stored for the backward pass: for 7.5k tokens and a vocabulary of 152k, the logits alone would take
    4.6 GB per model.
    """
    value: Tensor = _KLFromResidual.apply(target_resid, resid, mask, unembed, rows_at_once)
    return value


class _KLFromResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, target_resid: Tensor, resid: Tensor, mask: Tensor, unembed: Unembed, rows_at_once: int
    ) -> Tensor:
        targets, rows = target_resid[mask], resid.detach()[mask]
        grads, sums = torch.zeros_like(rows), [at_least_float32(rows.new_zeros(()))]
        for chunk in _chunks(len(rows), rows_at_once):
            with torch.no_grad():
                target_logprobs = F.log_softmax(at_least_float32(unembed(targets[chunk])), -1)
            with torch.set_grad_enabled(ctx.needs_input_grad[1]):
                row = rows[chunk].requires_grad_(ctx.needs_input_grad[1])
                logits = unembed(row)
            logprobs = F.log_softmax(at_least_float32(logits.detach()), -1)
            probs = target_logprobs.exp()
            sums.append((probs * (target_logprobs - logprobs)).sum())
            if ctx.needs_input_grad[1]:  # d KL(p || softmax(z)) / dz = softmax(z) - p
                grads[chunk] = torch.autograd.grad(logits, row, (logprobs.exp() - probs).to(logits.dtype))[0]
        ctx.save_for_backward(grads / len(rows), mask)
        return (wide(torch.stack(sums)).sum() / len(rows)).to(sums[0].dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor, None, None, None]:
        grads, mask = ctx.saved_tensors
        out = grads.new_zeros(*mask.shape, grads.shape[-1])
        out[mask] = grads * grad_outputs[0].to(grads.dtype)
        return None, out, None, None, None


def token_kl_from_residual(
    target_resid: Float[Tensor, "n d_model"], resid: Float[Tensor, "n d_model"], unembed: Unembed, rows_at_once: int
) -> Float[Tensor, "n"]:
    """KL(target || model) of each token from final residual streams, in chunks and without gradient."""
    with torch.no_grad():
        chunks = _chunks(len(resid), rows_at_once)
        parts = [kl_per_token(unembed(target_resid[c]), unembed(resid[c])) for c in chunks]
    return torch.cat(parts) if parts else resid.new_zeros(0)


def _chunks(n: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, n, size)]
