"""Log-probabilities of given texts: those of a continuation after a context, in batches.

A *continuation* is a text that is scored, whereas a completion (`completions`) is one that the model generates. The
model runs with its current route and hooks. Rows are padded on the right, where causal attention never reads, so no
value depends on the other rows of its batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tl_adapters.data.traces import DataError, Trace, collate, rows_by_length


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds one continuation."""

    log_probability: float
    """Sum over the continuation's tokens, in nats."""
    greedy: bool
    """Whether every token of the continuation is the likeliest at its position."""


@runtime_checkable
class ScoringEngine(Protocol):
    """A model that another engine runs, and that scores texts."""

    longest_text: int
    """Tokens of context and continuation together, at most."""

    def score(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        """The likelihood of every (context, continuation), in batches of the engine's own."""
        ...


def longest_text(model: Any) -> int:
    """Tokens of context and continuation together that a model can score; it does not read the last one."""
    return model.longest_text if isinstance(model, ScoringEngine) else model.cfg.n_ctx + 1


def log_likelihoods(
    model: Any, texts: Sequence[tuple[Sequence[int], Sequence[int]]], tokens_per_batch: int = 2048
) -> Iterator[tuple[int, Likelihood]]:
    """Index and likelihood of every (context, continuation), short ones first.

    Args:
        model: a HookedTransformer or TransformerBridge, or a `ScoringEngine`.
        texts: token ids; no context is empty, and each pair has at most `longest_text` tokens.
        tokens_per_batch: of a forward pass, padding included; an engine has batches of its own.

    Raises DataError for a context that is empty, or a pair that does not fit.
    """
    longest = longest_text(model)
    for context, continuation in texts:
        if not context or len(context) + len(continuation) > longest:
            raise DataError(
                f"A context has {len(context)} tokens and its continuation {len(continuation)}; a context must have 1 "
                f"or more, and both together at most {longest}."
            )
    if isinstance(model, ScoringEngine):
        yield from enumerate(model.score(texts))
        return
    # The last token is only predicted, so the model does not read it.
    traces = [Trace((*context, *continuation)[:-1], 0) for context, continuation in texts]
    for rows in rows_by_length(traces, tokens_per_batch):
        logits = _logits(model, [traces[row] for row in rows])
        for i, row in enumerate(rows):
            context, continuation = texts[row]
            start = len(context) - 1
            yield row, _likelihood(logits[i, start : start + len(continuation)], continuation)


@torch.no_grad()
def _logits(model: Any, traces: Sequence[Trace]) -> Float[Tensor, "batch pos d_vocab"]:
    batch = collate(traces).to(model.W_E.device)
    # The mask is explicit, because TransformerLens infers one from token ids where the tokenizer pads on the left.
    return model(batch.tokens, attention_mask=batch.real.long())


def _likelihood(logits: Float[Tensor, "pos d_vocab"], continuation: Sequence[int]) -> Likelihood:
    tokens = torch.tensor(list(continuation), dtype=torch.long, device=logits.device)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_probabilities = wide.log_softmax(-1).gather(-1, tokens[:, None])
    return Likelihood(float(log_probabilities.sum()), bool((wide.argmax(-1) == tokens).all()))
