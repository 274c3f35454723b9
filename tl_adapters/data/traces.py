"""Traces and batches: token ids, which region of a trace each belongs to, and what counts.

A `Trace` is one document. A `Batch` pads several to one width and says what each position is; padding never counts,
and the last token of a document predicts nothing, so it is left out of every divergence. Every document has its own
row: nothing leaks from one to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_adapters.config import REGIONS, Region
from tl_adapters.errors import UserError
from tl_adapters.utils.arguments import items


class DataError(UserError, ValueError):
    """Traces that cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class Trace:
    """One document of prompt and response."""

    tokens: tuple[int, ...]
    """Token ids of the whole document, in the target's own chat format, with the end token."""
    prompt_length: int
    """How many of them are the prompt; the others are the response, thinking included."""
    thinking_length: int = 0
    """How many tokens of the response are thinking, its tags included; the rest is the answer."""
    domain: str = ""
    """What the document is about (math, code, ...), where the data says so."""

    def cut(self, max_tokens: int | None) -> Trace:
        """The trace, or its first ``max_tokens`` tokens where it is longer."""
        if max_tokens is None or len(self.tokens) <= max_tokens:
            return self
        prompt = min(self.prompt_length, max_tokens)
        thinking = min(self.thinking_length, max_tokens - prompt)
        return Trace(self.tokens[:max_tokens], prompt, thinking, self.domain)

    def counts(self, count: Sequence[Region] = REGIONS) -> bool:
        """True if a token of the regions in ``count`` is predicted by another."""
        answer = self.prompt_length + self.thinking_length
        spans = {"prompt": (0, self.prompt_length), "thinking": (self.prompt_length, answer)}
        spans["answer"] = (answer, len(self.tokens))
        return any(max(start, 1) < stop for start, stop in (spans[name] for name in count))


_PADDING, _PROMPT, _THINKING, _ANSWER = range(4)
_CODES: dict[Region, int] = {"prompt": _PROMPT, "thinking": _THINKING, "answer": _ANSWER}


@dataclass(frozen=True)
class Batch:
    """Documents padded on the right to one width.

    Causal attention never looks to the right, so a forward pass over a batch needs no attention mask, and none is
    passed: fused attention and rotary embeddings are then at their fastest. The regions are for counting.
    """

    tokens: Int[Tensor, "batch pos"]
    """Token ids; padding is 0."""
    region: Int[Tensor, "batch pos"]
    """0 at padding, 1 in the prompt, 2 in the thinking, 3 in the answer."""
    count: tuple[Region, ...] = REGIONS
    """The regions that the objective counts."""

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """True at real tokens."""
        return self.region != _PADDING

    @property
    def response(self) -> Bool[Tensor, "batch pos"]:
        """True at the tokens of the response."""
        return self.region >= _THINKING

    @property
    def counted(self) -> Bool[Tensor, "batch pos"]:
        """True at the tokens of the counted regions: what NMSE, sparsity and L0 of the objective count."""
        counted = torch.zeros_like(self.real)
        for name in self.count:
            counted |= self.region == _CODES[name]
        return counted

    @property
    def predicting(self) -> Bool[Tensor, "batch pos"]:
        """True where the next token exists and counts: what the objective's divergences count."""
        return self.real & _next(self.counted)

    @property
    def predicting_response(self) -> Bool[Tensor, "batch pos"]:
        """True where the next token belongs to the response."""
        return self.real & _next(self.response)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(self.tokens.to(device), self.region.to(device), self.count)


def _next(mask: Tensor) -> Tensor:
    ahead = torch.zeros_like(mask)
    ahead[:, :-1] = mask[:, 1:]
    return ahead


def readable_traces(traces: Any, cfg: Any) -> list[Trace]:
    """The documents, if a model of this TransformerLens configuration can read every one of them.

    Raises ArgumentError for anything but traces, and DataError, with the number of the document, for one that is
    empty, longer than the context (``cfg.n_ctx``), or holds ids that the model has no embedding for (``cfg.d_vocab``).
    """
    advice = "give the traces that encode_traces or traces_of returns"
    found = items(traces, Trace, "traces", advice)
    for number, trace in enumerate(found):
        if not 0 < len(trace.tokens) <= cfg.n_ctx:
            raise DataError(
                f"Document {number} has {len(trace.tokens):,} tokens; the model reads 1 to {cfg.n_ctx:,}. Cut it "
                "(encode_traces(..., max_tokens=...), or too_long in the data's configuration) or leave it out."
            )
        if not 0 <= min(trace.tokens) <= max(trace.tokens) < cfg.d_vocab:
            outside = next(token for token in trace.tokens if not 0 <= token < cfg.d_vocab)
            raise DataError(
                f"Document {number} holds the token id {outside}; the model has embeddings for 0 to "
                f"{cfg.d_vocab - 1:,}. Encode it with the model's own tokenizer."
            )
    return found


def collate(traces: Sequence[Trace], count: Sequence[Region] = REGIONS) -> Batch:
    """Pad traces on the right to the longest. Raises DataError for none at all."""
    if not traces:
        raise DataError("A batch needs at least one trace; got none.")
    width = max(len(t.tokens) for t in traces)
    tokens = torch.zeros(len(traces), width, dtype=torch.long)
    region = torch.zeros_like(tokens)
    for row, trace in enumerate(traces):
        n, answer = len(trace.tokens), trace.prompt_length + trace.thinking_length
        tokens[row, :n] = torch.tensor(trace.tokens)
        region[row, : trace.prompt_length] = _PROMPT
        region[row, trace.prompt_length : answer] = _THINKING
        region[row, answer:n] = _ANSWER
    return Batch(tokens, region, tuple(count))


def require_ids(batch: Batch, d_vocab: int) -> None:
    """Raises DataError where a batch has token ids that a model of ``d_vocab`` embeddings cannot read."""
    if batch.tokens.numel() and not 0 <= int(batch.tokens.min()) <= int(batch.tokens.max()) < d_vocab:
        bad = batch.tokens[(batch.tokens < 0) | (batch.tokens >= d_vocab)].unique().tolist()
        raise DataError(
            f"Documents have the token ids {bad[:5]}, and the model has embeddings of 0 to {d_vocab - 1} only. Encode "
            "them with the target's own tokenizer."
        )


def rows_by_length(traces: Sequence[Trace], tokens_per_batch: int) -> list[list[int]]:
    """Group traces of similar length into batches of at most ``tokens_per_batch`` tokens, padding included.

    Returns the positions of each batch's traces in the list. A trace longer than the limit is a batch of its own.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(traces)), key=lambda i: len(traces[i].tokens)):
        if groups and len(traces[row].tokens) * (len(groups[-1]) + 1) <= tokens_per_batch:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def batches_by_length(
    traces: Sequence[Trace], tokens_per_batch: int, count: Sequence[Region] = REGIONS
) -> Iterator[tuple[list[int], Batch]]:
    """Every trace once, in batches of similar length, each with the positions of its rows in the list."""
    for rows in rows_by_length(traces, tokens_per_batch):
        yield rows, collate([traces[i] for i in rows], count)
