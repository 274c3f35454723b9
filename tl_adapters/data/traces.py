"""Traces and batches: token ids, the region of each position, and the positions that count.

A `Trace` is one document. A `Batch` pads several traces to one width and holds the region of every position. Padding
never counts. The last token of a document predicts no other, so it is left out of every divergence. Every document has
its own row, so that no position attends to another document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_adapters.config import REGIONS, Region
from tl_adapters.errors import UserError
from tl_adapters.utils.arguments import items, token_ids
from tl_adapters.utils.renamed import renamed_attributes


class DataError(UserError, ValueError):
    """Raised for documents that cannot be used; the message names the document, or the file and the line."""


@renamed_attributes(counts="has_counted_tokens")
@dataclass(frozen=True)
class Trace:
    """One document of prompt and response."""

    tokens: tuple[int, ...]
    """Token ids of the whole document in the target's chat format, end token included."""
    prompt_length: int
    """Number of tokens of the prompt; the others are the response, thinking included."""
    thinking_length: int = 0
    """Number of tokens of the response that are thinking, tags included; the rest is the answer."""
    domain: str = ""
    """Subject of the document (math, code, ...), where the data names one."""
    republish: bool = True
    """Whether its text may be shown in public. Graphs, pages and exports leave it out otherwise."""

    def __repr__(self) -> str:
        parts = [f"prompt {self.prompt_length:,}", f"response {len(self.tokens) - self.prompt_length:,}"]
        parts += [f"of which thinking {self.thinking_length:,}"] * bool(self.thinking_length)
        parts += [f"domain {self.domain}"] * bool(self.domain) + ["not to be republished"] * (not self.republish)
        return f"Trace of {len(self.tokens):,} tokens: {', '.join(parts)}"

    def cut(self, max_tokens: int | None) -> Trace:
        """The trace, or its first ``max_tokens`` tokens if it is longer; None cuts nothing."""
        if max_tokens is None or len(self.tokens) <= max_tokens:
            return self
        prompt = min(self.prompt_length, max_tokens)
        thinking = min(self.thinking_length, max_tokens - prompt)
        return replace(self, tokens=self.tokens[:max_tokens], prompt_length=prompt, thinking_length=thinking)

    def has_counted_tokens(self, count: Sequence[Region] = REGIONS) -> bool:
        """True if another token predicts one of the regions in ``count``."""
        answer = self.prompt_length + self.thinking_length
        spans = {"prompt": (0, self.prompt_length), "thinking": (self.prompt_length, answer)}
        spans["answer"] = (answer, len(self.tokens))
        return any(max(start, 1) < stop for start, stop in (spans[name] for name in count))


_PADDING, _PROMPT, _THINKING, _ANSWER = range(4)
_CODES: dict[Region, int] = {"prompt": _PROMPT, "thinking": _THINKING, "answer": _ANSWER}


@dataclass(frozen=True)
class Batch:
    """Documents padded on the right to one width.

    Causal attention does not see the padding to the right, so a forward pass over a batch needs no attention mask.
    Without one, fused attention and rotary embeddings are fastest.
    """

    tokens: Int[Tensor, "batch pos"]
    """Token ids, 0 at padding."""
    region: Int[Tensor, "batch pos"]
    """Region of each position: 0 is padding, 1 prompt, 2 thinking, 3 answer."""
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
        """True at the tokens of the counted regions, over which the objective averages NMSE, sparsity and L0."""
        counted = torch.zeros_like(self.real)
        for name in self.count:
            counted |= self.region == _CODES[name]
        return counted

    @property
    def predicting(self) -> Bool[Tensor, "batch pos"]:
        """True where the next token exists and counts; the objective averages its divergences over these positions."""
        return self.real & _next(self.counted)

    @property
    def predicting_response(self) -> Bool[Tensor, "batch pos"]:
        """True where the next token belongs to the response."""
        return self.real & _next(self.response)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(self.tokens.to(device), self.region.to(device), self.count)


def _next(mask: Tensor) -> Tensor:
    """The mask shifted by one position, so that each position holds the value of the next."""
    shifted = torch.zeros_like(mask)
    shifted[:, :-1] = mask[:, 1:]
    return shifted


GivenPrompt = str | Sequence[int] | Tensor | Trace
"""How a prompt is given to a function: as a text, as token ids, or as a document."""


def prompt_token_ids(
    model: Any, prompt: GivenPrompt, error: type[UserError] = DataError, what: str = "prompt"
) -> Int[Tensor, "pos"]:
    """The token ids of a prompt, [pos]. Text is tokenized as it is, without special tokens being added.

    Args:
        model: a model with its configuration (``cfg``) and tokenizer.
        prompt: a text, token ids (also with one row), or a document, of which all tokens are taken.
        error: what is raised where the prompt is empty, longer than the context, or a text for a model without a
            tokenizer.
        what: name of the argument in errors.

    Raises ArgumentError for several prompts and for values that are not token ids, and ``error``.
    """
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise error(f"This model has no tokenizer; give the {what} as token ids.")
        ids = list(model.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    else:
        ids = token_ids(prompt.tokens if isinstance(prompt, Trace) else prompt, model.cfg.d_vocab, what)
    if not 0 < len(ids) <= model.cfg.n_ctx:
        raise error(f"The {what} has {len(ids)} tokens; the model's context is 1 to {model.cfg.n_ctx:,}.")
    return torch.tensor(ids, dtype=torch.long)


def readable_traces(traces: Any, cfg: Any) -> list[Trace]:
    """The traces as a list, after checking that a model can read every one of them.

    Args:
        traces: traces, as `encode_traces` returns them.
        cfg: the TransformerLens configuration of the model, of which the context (``n_ctx``) and the vocabulary
            (``d_vocab``) are read.

    Raises:
        ArgumentError: ``traces`` holds anything but traces.
        DataError: a trace is empty, longer than the context, or holds ids without an embedding.
    """
    advice = "give the traces that encode_traces or traces_of returns"
    checked = items(traces, Trace, "traces", advice)
    for number, trace in enumerate(checked):
        if not 0 < len(trace.tokens) <= cfg.n_ctx:
            raise DataError(
                f"Document {number} has {len(trace.tokens):,} tokens; the model reads 1 to {cfg.n_ctx:,}. Cut it "
                "(encode_traces(..., max_tokens=...), or too_long in the data's configuration) or leave it out."
            )
        require_embedded(torch.tensor(trace.tokens), cfg.d_vocab, f"Document {number}")
    return checked


def require_embedded(tokens: Int[Tensor, "*shape"], d_vocab: int, what: str) -> None:
    """Raises DataError if ``tokens``, which are those of ``what``, hold ids outside 0 to ``d_vocab`` - 1."""
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < d_vocab:
        outside = tokens[(tokens < 0) | (tokens >= d_vocab)].unique().tolist()
        ids = f"token id{'s' if len(outside) > 1 else ''} {', '.join(map(str, outside[:5]))}"
        raise DataError(
            f"{what} holds the {ids}; the model has embeddings for 0 to {d_vocab - 1:,}. Encode the documents with the "
            "model's own tokenizer."
        )


def collate(traces: Sequence[Trace], count: Sequence[Region] = REGIONS) -> Batch:
    """A batch of traces, padded on the right to the longest. Raises DataError if there is none."""
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


def rows_by_length(traces: Sequence[Trace], tokens_per_batch: int) -> list[list[int]]:
    """Groups of traces of similar length, each of at most ``tokens_per_batch`` tokens, padding included.

    Returns the indices of each group's traces in the list. A trace longer than the limit is a group of its own.
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
    """Every trace once, in batches of similar length, each with the indices of its rows in the list."""
    for rows in rows_by_length(traces, tokens_per_batch):
        yield rows, collate([traces[i] for i in rows], count)
