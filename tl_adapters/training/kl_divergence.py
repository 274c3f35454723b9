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

LOGPROBS_KEPT = 2**24
"""Log-probabilities of a target that are kept between divergences: 64 MB of them in float32."""


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
    return TargetDistributions(target_resid, mask, unembed, rows_at_once).kl(resid)


class TargetDistributions:
    """The target's next-token distributions at the tokens of a mask, for several KL divergences from them.

    Where all their logarithms are at most `LOGPROBS_KEPT` numbers they are computed once, else for every divergence.

    Args:
        resid: the target's final residual stream.
        mask: the tokens.
        unembed: final norm and unembedding.
        rows_at_once: number of tokens whose logits are formed at a time.
    """

    def __init__(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        mask: Bool[Tensor, "batch pos"],
        unembed: Unembed,
        rows_at_once: int,
    ) -> None:
        self.rows, self.mask, self.unembed = resid[mask], mask, unembed
        self.chunks = _chunks(len(self.rows), rows_at_once)
        self._kept: dict[int, Tensor] = {}

    def kl(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, ""]:
        """`kl_from_residual` of a model's final residual stream."""
        value: Tensor = _KLFromResidual.apply(self, resid)
        return value

    @torch.no_grad()
    def logprobs(self, chunk: slice) -> Float[Tensor, "n d_vocab"]:
        """The target's log-probabilities at the tokens of a chunk; not to be changed in place."""
        if chunk.start in self._kept:
            return self._kept[chunk.start]
        logprobs = F.log_softmax(at_least_float32(self.unembed(self.rows[chunk])), -1)
        if len(self.rows) * logprobs.shape[1] <= LOGPROBS_KEPT:
            self._kept[chunk.start] = logprobs
        return logprobs


class _KLFromResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, target: TargetDistributions, resid: Tensor) -> Tensor:
        rows, with_gradient = resid.detach()[target.mask], ctx.needs_input_grad[1]
        grads, sums = torch.zeros_like(rows), [at_least_float32(rows.new_zeros(()))]
        for chunk in target.chunks:
            with torch.set_grad_enabled(with_gradient):
                row = rows[chunk].requires_grad_(with_gradient)
                logits = target.unembed(row)
            logprobs = at_least_float32(logits.detach())  # in place, as nothing but their gradient is read again
            logprobs -= logprobs.logsumexp(-1, keepdim=True)
            target_logprobs = target.logprobs(chunk)
            probs = target_logprobs.exp()
            sums.append((target_logprobs - logprobs).mul_(probs).sum())
            if with_gradient:  # d KL(p || softmax(z)) / dz = softmax(z) - p
                to_logits = logprobs.exp_().sub_(probs).to(logits.dtype)
                grads[chunk] = torch.autograd.grad(logits, row, to_logits)[0]
        ctx.save_for_backward(grads / len(rows), target.mask)
        return (wide(torch.stack(sums)).sum() / len(rows)).to(sums[0].dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor]:
        grads, mask = ctx.saved_tensors
        out = grads.new_zeros(*mask.shape, grads.shape[-1])
        out[mask] = grads * grad_outputs[0].to(grads.dtype)
        return None, out


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
