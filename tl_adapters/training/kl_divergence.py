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
    return TargetDistributions(target_resid, mask, unembed, rows_at_once, several=False).kl(resid)


class TargetDistributions:
    """The target's next-token distributions at the tokens of a mask, for KL divergences from them.

    For several divergences their logarithms are computed once where all of them are at most `LOGPROBS_KEPT` numbers.

    Args:
        resid: the target's final residual stream.
        mask: the tokens.
        unembed: final norm and unembedding.
        rows_at_once: number of tokens whose logits are formed at a time.
        several: whether more than one divergence is asked for.
    """

    def __init__(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        mask: Bool[Tensor, "batch pos"],
        unembed: Unembed,
        rows_at_once: int,
        several: bool,
    ) -> None:
        self.rows, self.mask, self.unembed, self.several = resid[mask], mask, unembed, several
        self.chunks = _chunks(len(self.rows), rows_at_once)
        self._kept: Tensor | None = None
        self._n_kept = 0

    def kl(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, ""]:
        """`kl_from_residual` of a model's final residual stream."""
        value: Tensor = _KLFromResidual.apply(self, resid)
        return value

    def kl_and_gradient(
        self, chunk: slice, rows: Float[Tensor, "n d_model"], with_gradient: bool
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "n d_model"] | None]:
        """The sum of the KL divergences of a chunk's tokens, and its gradient at a model's ``rows`` if it is wanted.

        What is of the size of the chunk's logits is let go on return, before the next chunk's are made.
        """
        target_logprobs = self._logprobs(chunk)
        with torch.set_grad_enabled(with_gradient):
            rows = rows.requires_grad_(with_gradient)
            logits = self.unembed(rows)
        logprobs = F.log_softmax(at_least_float32(logits.detach()), -1)
        probs = target_logprobs.exp()
        kl = (target_logprobs - logprobs).mul_(probs).sum()
        if not with_gradient:
            return kl, None
        to_logits = logprobs.exp_().sub_(probs).to(logits.dtype)  # d KL(p || softmax(z)) / dz = softmax(z) - p
        return kl, torch.autograd.grad(logits, rows, to_logits)[0]

    @torch.no_grad()
    def _logprobs(self, chunk: slice) -> Tensor:
        """The target's log-probabilities at the tokens of a chunk; not to be changed in place."""
        if self._kept is not None and chunk.start < self._n_kept:
            return self._kept[chunk]
        logprobs = F.log_softmax(at_least_float32(self.unembed(self.rows[chunk])), -1)
        if self.several and len(self.rows) * logprobs.shape[1] <= LOGPROBS_KEPT:
            if self._kept is None:  # one piece of memory, as pieces kept between others leave gaps
                self._kept = logprobs.new_empty(len(self.rows), logprobs.shape[1])
            self._kept[chunk], self._n_kept = logprobs, chunk.start + len(logprobs)
            return self._kept[chunk]
        return logprobs


class _KLFromResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, target: TargetDistributions, resid: Tensor) -> Tensor:
        rows, with_gradient = resid.detach()[target.mask], ctx.needs_input_grad[1]
        grads, sums = torch.zeros_like(rows), [at_least_float32(rows.new_zeros(()))]
        for chunk in target.chunks:
            kl, grad = target.kl_and_gradient(chunk, rows[chunk], with_gradient)
            sums.append(kl)
            if grad is not None:
                grads[chunk] = grad
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
