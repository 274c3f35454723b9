"""How likely a model finds texts: the log-probability of a continuation after a context, batched.

The model is asked as it is, with whatever route and hooks it has at that time. Rows are padded on the right, where
causal attention never looks, so no value depends on what else is in its batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tl_adapters.data.traces import DataError, Trace, collate, rows_by_length


@dataclass(frozen=True)
class Likelihood:
    """Of one continuation."""

    log_probability: float
    """Sum over its tokens, in nats."""
    greedy: bool
    """Every one of them is the likeliest where it stands."""


def log_likelihoods(
    model: Any, texts: Sequence[tuple[Sequence[int], Sequence[int]]], tokens_per_batch: int = 2048
) -> Iterator[tuple[int, Likelihood]]:
    """Of every (context, continuation) its number and likelihood, short ones first.

    Args:
        model: a HookedTransformer or TransformerBridge.
        texts: token ids; a context is not empty, and both fit the model's context together.
        tokens_per_batch: in a forward pass, padding included.

    Raises DataError.
    """
    n_ctx = model.cfg.n_ctx
    for context, continuation in texts:
        if not context or len(context) + len(continuation) > n_ctx + 1:
            raise DataError(
                f"A context of {len(context)} and a continuation of {len(continuation)} tokens; allowed is a context "
                f"of 1 or more, and {n_ctx + 1} together."
            )
    # The last token is only predicted, so the model does not read it.
    traces = [Trace((*context, *continuation)[:-1], 0) for context, continuation in texts]
    for rows in rows_by_length(traces, tokens_per_batch):
        logits = _logits(model, [traces[row] for row in rows])
        for place, row in enumerate(rows):
            context, continuation = texts[row]
            begin = len(context) - 1
            yield row, _likelihood(logits[place, begin : begin + len(continuation)], continuation)


@torch.no_grad()
def _logits(model: Any, traces: Sequence[Trace]) -> Tensor:
    batch = collate(traces).to(model.W_E.device)
    # The mask is given outright: with a tokenizer that pads on the left TransformerLens would guess one from token ids.
    return model(batch.tokens, attention_mask=batch.real.long())


def _likelihood(logits: Tensor, continuation: Sequence[int]) -> Likelihood:
    tokens = torch.tensor(list(continuation), dtype=torch.long, device=logits.device)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    chosen = wide.log_softmax(-1).gather(-1, tokens[:, None])
    return Likelihood(float(chosen.sum()), bool((wide.argmax(-1) == tokens).all()))
