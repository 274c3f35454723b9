"""Sums with checkable answers, and the one split of them that every figure names.

A problem is a tuple of two-digit terms, asked as ``47+85+19=?``. Which split it belongs to is a hash of
that text, so the four splits are disjoint whoever draws, whenever, with whatever seed:

    train    the pair and the adapters are trained on these, and on no others
    select   features are chosen on these (the hesitation circuit)
    tune     options are chosen on these (widths, learning rates, l1 weights)
    report   figures that are reported come from these, and nothing else is done with them
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Split = Literal["train", "select", "tune", "report"]
SPLITS: tuple[Split, ...] = get_args(Split)

_LAST_SHARE = {"train": 70, "select": 80, "tune": 90, "report": 100}  # cumulative, in per cent
_LAST_DIGIT_WEIGHTS = (1, 1, 1, 1, 2, 2, 2, 2, 2, 2)  # larger last digits: a little over half of all steps carry


@dataclass(frozen=True)
class Problem:
    """A sum of two-digit terms."""

    terms: tuple[int, ...]
    """The numbers to add, each 10..99."""

    @property
    def question(self) -> str:
        """What the user asks, such as ``47+85+19=?``."""
        return "+".join(map(str, self.terms)) + "=?"

    @property
    def answer(self) -> str:
        """The right final answer, in digits."""
        return str(sum(self.terms))

    @property
    def split(self) -> Split:
        """The split this problem belongs to, by hash of its question."""
        bucket = int.from_bytes(hashlib.sha256(self.question.encode()).digest()[:4], "big") % 100
        return next(split for split in SPLITS if bucket < _LAST_SHARE[split])

    def solved_by(self, response: str) -> bool:
        """True if the text after the thinking (all of it, where there is none) is exactly the answer."""
        return response.rpartition("</think>")[2].strip() == self.answer


def draw_problem(rng: random.Random, n_terms: tuple[int, ...] = (3, 4)) -> Problem:
    """One problem of any split, with a number of terms drawn from ``n_terms``."""
    tens = range(1, 10)
    return Problem(
        tuple(
            10 * rng.choice(tens) + rng.choices(range(10), _LAST_DIGIT_WEIGHTS)[0] for _ in range(rng.choice(n_terms))
        )
    )


def stream_problems(split: Split, rng: random.Random, n_terms: tuple[int, ...] = (3, 4)) -> Iterator[Problem]:
    """Endless problems of one split; a problem may come again."""
    while True:
        problem = draw_problem(rng, n_terms)
        if problem.split == split:
            yield problem


def problems(split: Split, n: int, seed: int = 0, n_terms: tuple[int, ...] = (3, 4)) -> list[Problem]:
    """``n`` different problems of one split; the same list for the same seed, and a prefix of any longer one."""
    distinct: dict[Problem, None] = {}
    stream = stream_problems(split, random.Random(f"{split}-{seed}"), n_terms)
    while len(distinct) < n:
        distinct.setdefault(next(stream))
    return list(distinct)
