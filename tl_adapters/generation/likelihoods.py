"""Log-probabilities of given texts: those of a continuation after a context, in batches.

A *continuation* is a text that is scored, whereas a completion (`completions`) is one that the model generates. The
model runs with its current route and hooks. Rows are padded on the right, where causal attention never reads, so no
value depends on the other rows of its batch. Logits are formed only from the first position on that predicts a
continuation of the batch, and a part of them at a time, because those of a whole text take gigabytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tl_adapters.data.traces import Batch, DataError, Trace, collate, rows_by_length
from tl_adapters.models.routed_model import rows_at_once
from tl_adapters.utils.precision import at_least_float32


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
        found = _likelihoods(model, [texts[row] for row in rows], [traces[row] for row in rows])
        yield from zip(rows, found, strict=True)


@torch.no_grad()
def _likelihoods(
    model: Any, texts: Sequence[tuple[Sequence[int], Sequence[int]]], traces: Sequence[Trace]
) -> list[Likelihood]:
    """The likelihoods of a batch of texts, of which the traces are what the model reads."""
    batch = collate(traces).to(model.W_E.device)
    first = min(len(context) for context, _ in texts) - 1  # no position before it predicts a continuation
    n = batch.tokens.shape[1] - first
    if n < 1:
        return [Likelihood(0.0, True)] * len(texts)
    starts = [len(context) - 1 - first for context, _ in texts]
    wanted = torch.zeros_like(batch.tokens[:, first:])
    for row, start, (_, continuation) in zip(wanted, starts, texts, strict=True):
        row[start : start + len(continuation)] = torch.tensor(list(continuation), device=wanted.device)
    pieces, done = list[tuple[Tensor, Tensor]](), 0
    for logits in _last_logits(model, batch, n):
        of_piece = wanted[:, done : done + logits.shape[1], None]
        log_probabilities = at_least_float32(logits).log_softmax(-1).gather(-1, of_piece)
        pieces.append((log_probabilities, logits.argmax(-1, keepdim=True) == of_piece))
        done += logits.shape[1]
    chosen, greedy = (torch.cat(parts, 1)[..., 0] for parts in zip(*pieces, strict=True))
    spans = [slice(start, start + len(continuation)) for start, (_, continuation) in zip(starts, texts, strict=True)]
    rows = zip(chosen, greedy, spans, strict=True)
    return [Likelihood(float(values[span].sum()), bool(likeliest[span].all())) for values, likeliest, span in rows]


def _last_logits(model: Any, batch: Batch, n: int) -> Iterator[Float[Tensor, "batch piece d_vocab"]]:
    """Logits at the last ``n`` positions, in pieces from left to right that are at most `rows_at_once` rows each.

    They are one piece for a TransformerBridge, whose own pass forms them, and where a module's hook reads the logits:
    that of `steering.banned` takes them for those at the last positions of the tokens.
    """
    # The mask is explicit, because TransformerLens infers one from token ids where the tokenizer pads on the left.
    options: dict[str, Any] = dict(attention_mask=batch.real.long())
    from transformer_lens.model_bridge import TransformerBridge

    if isinstance(model, TransformerBridge):
        yield model(batch.tokens, logits_to_keep=n, **options)
        return
    n_layers = model.cfg.n_layers
    residual = model(batch.tokens, stop_at_layer=n_layers, **options)[:, -n:]
    at_once = n if model.unembed._forward_hooks else rows_at_once(model.cfg.d_vocab, residual.device) // len(residual)
    for piece in residual.split(max(1, at_once), 1):
        yield model(piece, start_at_layer=n_layers)
