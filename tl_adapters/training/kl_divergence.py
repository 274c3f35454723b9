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
LOGPROBS_AT_ONCE_CPU = 2**18
"""Log-probabilities that are computed at a time on a CPU, so that they stay in its cache: 1 MB of them in float32."""


def logprob_rows_at_once(n: int, d_vocab: int, device: torch.device) -> int:
    """The number of rows, of ``n`` rows of logits, of which log-probabilities are computed at a time on a device."""
    return n if device.type != "cpu" else min(n, max(1, LOGPROBS_AT_ONCE_CPU // d_vocab))


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
    Of the size of a chunk's logits there are then two more tensors, logits and their gradient. On a CPU what else is
    computed from logits is made of a few rows at a time.

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
        self.chunks, self.at_once = _chunks(len(self.rows), rows_at_once), min(rows_at_once, len(self.rows))
        self._keeps, self._n_kept = False, 0
        self._room: tuple[Tensor, Tensor] | None = None

    def kl(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, ""]:
        """`kl_from_residual` of a model's final residual stream."""
        value: Tensor = _KLFromResidual.apply(self, resid)
        return value

    def kl_and_gradient(
        self, chunk: slice, rows: Float[Tensor, "n d_model"], with_gradient: bool
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "n d_model"] | None]:
        """The sum of the KL divergences of a chunk's tokens, and its gradient at a model's ``rows`` if it is wanted.

        The chunk's logits are let go on return, before the next chunk's are made.
        """
        target_logprobs, to_logits = self._logprobs(chunk)
        with torch.set_grad_enabled(with_gradient):
            rows = rows.requires_grad_(with_gradient)
            logits = self.unembed(rows)
        sums = []
        for piece in _pieces(logits):
            logprobs = F.log_softmax(at_least_float32(logits.detach()[piece]), -1)
            probs, room = target_logprobs[piece].exp(), to_logits[piece]
            sums.append(torch.sub(target_logprobs[piece], logprobs, out=room).mul_(probs).sum())
            if with_gradient:  # d KL(p || softmax(z)) / dz = softmax(z) - p
                torch.sub(logprobs.exp_(), probs, out=room)
        kl = torch.stack(sums).sum()
        return kl, torch.autograd.grad(logits, rows, to_logits.to(logits.dtype))[0] if with_gradient else None

    @torch.no_grad()
    def _logprobs(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """The target's log-probabilities at the tokens of a chunk, not to be changed, and room for as many numbers."""
        if self._room is not None and chunk.start < self._n_kept:
            return self._room[0][chunk], self._room[1][: len(self.rows[chunk])]
        logits = self.unembed(self.rows[chunk])
        n = len(logits)
        if self._room is None:
            self._room = self._new_room(logits)
        ours, other = self._room
        logprobs = ours[chunk] if self._keeps else ours[:n]
        for piece in _pieces(logits):
            torch.log_softmax(logits[piece], -1, logprobs.dtype, out=logprobs[piece])
        self._n_kept = chunk.start + n if self._keeps else 0
        return logprobs, other[:n]

    def _new_room(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Room for log-probabilities of the target and for a chunk's gradient, of which one piece of memory is made.

        It stays while the object does: large tensors that come and go between smaller ones leave gaps in the memory of
        a CPU, which the process does not give back.
        """
        n, dtype = len(self.rows), torch.promote_types(logits.dtype, torch.float32)
        self._keeps = self.several and n * logits.shape[1] <= LOGPROBS_KEPT
        n = n if self._keeps else self.at_once
        room = logits.new_empty(n + self.at_once, logits.shape[1], dtype=dtype)
        return room[:n], room[n:]


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


def _pieces(logits: Float[Tensor, "n d_vocab"]) -> list[slice]:
    """The rows of logits of which log-probabilities are computed at a time."""
    return _chunks(len(logits), logprob_rows_at_once(len(logits), logits.shape[1], logits.device))
