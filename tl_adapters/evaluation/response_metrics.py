"""Behaviour: problems with checkable answers, solved by any model; accuracy, length and hesitation with intervals.

A *response* is every generated token, thinking included, without the end token. One that reaches the limit counts
with its length, and as wrong; it is *looping* where it ends in one block of tokens said again and again. The
*hesitation rate* is the number of "wait", in any case, per 1,000 response tokens; other words are counted only when
asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_adapters.data.hesitation_words import HESITATION_RATE_WORDS
from tl_adapters.evaluation.behaviors import Behavior, counts
from tl_adapters.generation.responses import THINK_OPENS, Response
from tl_adapters.utils.bootstrap import bootstrap_ratio
from tl_adapters.utils.clustered_intervals import clustered_share, event_rate
from tl_adapters.utils.measurement import Interval

# A problem may also say how long its answers may be, as ``max_new_tokens``.


@dataclass(frozen=True)
class Rate:
    """Behaviour of one model on a list of problems."""

    n: int
    """Problems."""
    accuracy: float
    """Share answered rightly."""
    length: float
    """Mean response length in tokens."""
    hesitation_per_1k: float | None
    """Hesitations per 1,000 response tokens; None where no response has a token."""
    truncated: float
    """Share of responses cut at the limit."""
    think_opened: float
    """Share of responses that open their thinking."""
    ci: dict[str, Interval]
    """Intervals of all five."""
    split: str
    """Split of the problems."""
    looping: float = 0.0
    """Share of responses that were cut while they said one block of tokens again and again."""
    near_ties_per_1k: float = 0.0
    """Per 1,000 response tokens, those whose choice was closer than rounding."""


def correctness(responses: Sequence[Response]) -> Float[Tensor, "n"]:
    """1 for each right answer, 0 for each wrong one."""
    return torch.tensor([float(r.correct) for r in responses], dtype=torch.float64)


def rate(
    responses: Sequence[Response],
    split: str,
    words: Sequence[str] | Behavior = HESITATION_RATE_WORDS,
    problems: Sequence[int] | None = None,
    cluster_size: float = 1.0,
    sets: int = 1,
) -> Rate:
    """Summarise responses, with intervals over problems.

    Args:
        responses: of one model; not none.
        split: of the problems.
        words: what counts as a hesitation: words and phrases, or a behavior that counts itself.
        problems: number of the problem that each response answers; None is one response to each. Where a problem is
            answered several times its responses are drawn together, and ``accuracy`` is pass@1.
        together: hesitations of a problem that has any, where that is known: where none is said, its rate's upper end
            takes them to come so many at a time (`intervals.event_rate`).
        sets: how many sets of features, drawn themselves, gave the responses, which stand set after set. Their choice
            is then part of the intervals.
    """
    lengths = torch.tensor([len(r.tokens) for r in responses], dtype=torch.float64)
    said = torch.tensor(counts(responses, words), dtype=torch.float64)
    opened = torch.tensor([float(THINK_OPENS in r.text) for r in responses], dtype=torch.float64)
    cut = torch.tensor([float(r.truncated) for r in responses], dtype=torch.float64)
    places = torch.arange(len(responses)) if problems is None else torch.tensor(problems).unique(return_inverse=True)[1]
    n, ones = int(places.max()) + 1, torch.ones_like(lengths)

    def by_problem(values: Float[Tensor, "n"]) -> Float[Tensor, "*sets n_problems"]:
        found = torch.zeros(sets, n, dtype=torch.float64)
        for row, of, these in zip(found, places.chunk(sets), values.chunk(sets), strict=True):
            row.index_add_(0, of, these)
        return found if sets > 1 else found[0]

    total = by_problem(ones)
    figures = {
        "accuracy": clustered_share(by_problem(correctness(responses)), total),
        "length": bootstrap_ratio(by_problem(lengths), total),
        "hesitation_per_1k": event_rate(by_problem(said), by_problem(lengths), cluster_size).scaled(1000),
        "truncated": clustered_share(by_problem(cut), total),
        "think_opened": clustered_share(by_problem(opened), total),
    }
    values: dict[str, Any] = {name: estimate.value for name, estimate in figures.items()}
    return Rate(
        n=n,
        **values,
        ci={name: estimate.interval for name, estimate in figures.items()},
        split=split,
        looping=sum(r.looping for r in responses) / len(responses),
        near_ties_per_1k=1000 * sum(r.near_ties for r in responses) / max(1, sum(len(r.tokens) for r in responses)),
    )
