"""Groups documents into parts and batches, with the trace region, thinking decile and domain of every token.

A document is identified by a hash of its tokens. So it is counted once, however often it comes, and the same examples
are drawn from it wherever it stands in the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_adapters.data.batching import TraceSource
from tl_adapters.data.trace_regions import TRACE_REGIONS
from tl_adapters.data.traces import Trace, collate
from tl_adapters.features.layer_statistics import N_DECILES


@dataclass(frozen=True)
class TokenBatch:
    """Documents padded on the right, with the region, decile and domain of their tokens. Flat is [batch * pos]."""

    tokens: Int[Tensor, "batch pos"]
    document: Tensor  # [batch]: number of the document in the part
    length: Tensor  # [batch]: tokens of the document
    identity: Tensor  # [batch]: hash of the document's tokens
    domain: Tensor  # [batch]: index of the document's domain
    region: Tensor  # flat; -1 at padding
    decile: Tensor  # flat; -1 outside the thinking


def token_batch(
    traces: Sequence[Trace], regions: Sequence[Sequence[int]], rows: Sequence[int], domains: Sequence[str]
) -> TokenBatch:
    """The batch of some of a part's documents.

    Args:
        traces: the documents of the part.
        regions: for each document, the trace region of every token.
        rows: indices, in ``traces``, of the documents of the batch.
        domains: names of the part's domains.
    """
    tokens = collate([traces[i] for i in rows]).tokens
    region, decile = torch.full(tokens.shape, -1), torch.full(tokens.shape, -1)
    thinking = TRACE_REGIONS.index("thinking")
    for row, i in enumerate(rows):
        codes = torch.tensor(regions[i])
        region[row, : len(codes)] = codes
        in_thinking = (codes == thinking).nonzero()[:, 0]
        decile[row, in_thinking] = torch.arange(len(in_thinking)) * N_DECILES // max(1, len(in_thinking))
    return TokenBatch(
        tokens,
        document=torch.tensor(list(rows)),
        length=torch.tensor([len(traces[i].tokens) for i in rows]),
        identity=torch.tensor([document_hash(traces[i]) for i in rows]),
        domain=torch.tensor([domains.index(traces[i].domain) for i in rows]),
        region=region.flatten(),
        decile=decile.flatten(),
    )


def part_documents(traces: Sequence[Trace] | TraceSource, tokens: int) -> Iterator[list[Trace]]:
    """The documents in their order, each once, grouped into lists of at least so many tokens."""
    group: list[Trace] = []
    n_tokens = 0
    for trace in _without_repeats(iter(traces) if isinstance(traces, Sequence) else _traces_of(traces)):
        group.append(trace)
        n_tokens += len(trace.tokens)
        if n_tokens >= tokens:
            yield group
            group, n_tokens = [], 0
    if group:
        yield group


def _traces_of(source: TraceSource) -> Iterator[Trace]:
    for _, window in source.windows(0, None):
        yield from window


def _without_repeats(traces: Iterator[Trace]) -> Iterator[Trace]:
    seen: set[int] = set()
    for trace in traces:
        if (identity := document_hash(trace)) not in seen:
            seen.add(identity)
            yield trace


def document_hash(trace: Trace) -> int:
    """A hash of a document's tokens, of 64 bits, which identifies the document."""
    return int.from_bytes(_digest([trace]).digest()[:8], "big", signed=True)


def documents_hash(traces: Iterable[Trace]) -> str:
    """A hash of a set of documents, which names the part that they make."""
    return _digest(traces).hexdigest()[:16]


def _digest(traces: Iterable[Trace]) -> Any:
    digest = hashlib.sha256()
    for trace in traces:
        digest.update(repr((trace.tokens, trace.prompt_length, trace.thinking_length, trace.domain)).encode())
    return digest
