"""Metrics of a model's responses to problems: accuracy, length, hesitation rate and others, with 95 % intervals.

A *response* is every generated token, thinking included, without the end token. A response that is truncated at the
limit counts with its length, and as wrong; it is *looping* where it ends in one block of tokens again and again. The
*hesitation rate* is the number of occurrences of "wait", in any case, per 1,000 response tokens; other words are
counted only on request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.data.hesitation_words import HESITATION_RATE_WORDS
from tl_adapters.evaluation.behaviors import GivenBehavior, counts
from tl_adapters.generation.responses import Response
from tl_adapters.utils.bootstrap import bootstrap_ratio
from tl_adapters.utils.clustered_intervals import clustered_share, event_rate
from tl_adapters.utils.measurement import Interval


@dataclass(frozen=True)
class ResponseMetrics:
    """Metrics of one model's responses to a list of problems."""

    n: int
    """Number of problems."""
    accuracy: float
    """Share of right answers."""
    length: float
    """Mean response length in tokens."""
    hesitation_per_1k: float | None
    """Hesitations per 1,000 response tokens; None where no response has a token."""
    truncated: float
    """Share of responses that were cut at the limit."""
    think_opened: float
    """Share of responses that open their thinking themselves."""
    ci: dict[str, Interval]
    """Intervals of the five metrics above."""
    split: str
    """Split of the problems."""
    looping: float = 0.0
    """Share of responses that were cut at the limit and end in one block of tokens again and again."""
    near_ties_per_1k: float = 0.0
    """Tokens per 1,000 response tokens whose choice was closer than rounding."""


def correctness(responses: Sequence[Response]) -> Float[Tensor, "n"]:
    """1 for each right answer, 0 for each wrong one."""
    return torch.tensor([float(r.correct) for r in responses], dtype=torch.float64)


def measure_responses(
    responses: Sequence[Response],
    split: str,
    behavior: GivenBehavior = HESITATION_RATE_WORDS,
    problems: Sequence[int] | None = None,
    cluster_size: float = 1.0,
    sets: int = 1,
) -> ResponseMetrics:
    """Metrics of responses, with intervals over problems.

    Args:
        responses: of one model, at least one.
        split: of the problems.
        behavior: what counts as a hesitation, as `Behavior.of` takes it.
        problems: for each response, the number of its problem; None is one response to each problem. Where a problem
            has several responses they are resampled together, and ``accuracy`` is pass@1.
        cluster_size: number of hesitations of a problem that has any, as measured elsewhere. Where no response
            hesitates, the upper end of the rate assumes that hesitations occur so many at a time (`event_rate`).
        sets: number of randomly drawn feature sets that gave the responses, which are ordered set by set. The intervals
            then cover the choice of sets too.
    """
    lengths = torch.tensor([len(r.tokens) for r in responses], dtype=torch.float64)
    hesitations = torch.tensor(counts(responses, behavior), dtype=torch.float64)
    opened = torch.tensor([float(ChatFormat.think_start in r.text) for r in responses], dtype=torch.float64)
    truncated = torch.tensor([float(r.truncated) for r in responses], dtype=torch.float64)
    indices = torch.arange(len(responses))
    if problems is not None:
        indices = torch.tensor(problems).unique(return_inverse=True)[1]
    n_problems = int(indices.max()) + 1

    def by_problem(values: Float[Tensor, "n"]) -> Float[Tensor, "*sets n_problems"]:
        sums = torch.zeros(sets, n_problems, dtype=torch.float64)
        for row, row_indices, row_values in zip(sums, indices.chunk(sets), values.chunk(sets), strict=True):
            row.index_add_(0, row_indices, row_values)
        return sums if sets > 1 else sums[0]

    totals = by_problem(torch.ones_like(lengths))
    estimates = {
        "accuracy": clustered_share(by_problem(correctness(responses)), totals),
        "length": bootstrap_ratio(by_problem(lengths), totals),
        "hesitation_per_1k": event_rate(by_problem(hesitations), by_problem(lengths), cluster_size).scaled(1000),
        "truncated": clustered_share(by_problem(truncated), totals),
        "think_opened": clustered_share(by_problem(opened), totals),
    }
    values: dict[str, Any] = {name: estimate.value for name, estimate in estimates.items()}
    return ResponseMetrics(
        n=n_problems,
        **values,
        ci={name: estimate.interval for name, estimate in estimates.items()},
        split=split,
        looping=sum(r.looping for r in responses) / len(responses),
        near_ties_per_1k=1000 * sum(r.near_ties for r in responses) / max(1, sum(len(r.tokens) for r in responses)),
    )
