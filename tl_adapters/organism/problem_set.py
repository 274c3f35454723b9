"""Arithmetic problems with checkable answers, and their division into four splits.

Two kinds: *sums* of two-digit terms, asked as ``47+85+19=?``, and *differences*, a three-digit number less two-digit
terms, asked as ``312-47-85=?``. Which split a problem belongs to is a hash of that text, so the four splits are
disjoint whoever draws, whenever, with whatever seed:

    train    the pair and the adapters are trained on these, and on no others
    select   features are chosen on these (the hesitation circuit)
    tune     options are chosen on these (widths, learning rates, l1 weights)
    report   figures that are reported come from these, and nothing else is done with them
"""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Literal, get_args

Kind = Literal["sums", "differences"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SIGN: dict[Kind, str] = {"sums": "+", "differences": "-"}
"""What stands between two terms."""
APPLY: dict[Kind, Callable[[int, int], int]] = {"sums": operator.add, "differences": operator.sub}
"""What a term does to the running total."""

Split = Literal["train", "select", "tune", "report"]
SPLITS: tuple[Split, ...] = get_args(Split)

_LAST_SHARE = {"train": 70, "select": 80, "tune": 90, "report": 100}  # cumulative, in per cent
_LAST_DIGIT_WEIGHTS = (1, 1, 1, 1, 2, 2, 2, 2, 2, 2)  # larger last digits: a little over half of all steps are hard
_FIRST = range(100, 400)  # a difference starts in the range where longer sums end
_LEFT = 10  # at least this much is left by a difference, so that ten less is no negative number


@dataclass(frozen=True)
class Problem:
    """A sum of two-digit terms, or a number less two-digit terms."""

    terms: tuple[int, ...]
    """The numbers in the order asked, each 10..99; of a difference, the first is 100..399."""
    kind: Kind = "sums"
    """Whether the terms are added, or taken from the first."""

    max_new_tokens: ClassVar[int] = 160
    """The longest answer: over three times as long as the target's own."""

    @property
    def question(self) -> str:
        """What the user asks, such as ``47+85+19=?`` or ``312-47-85=?``."""
        return SIGN[self.kind].join(map(str, self.terms)) + "=?"

    @property
    def totals(self) -> list[int]:
        """The right running totals, one per term; the first is the first term."""
        return list(accumulate(self.terms, APPLY[self.kind]))

    @property
    def answer(self) -> str:
        """The right final answer, in digits."""
        return str(self.totals[-1])

    @property
    def split(self) -> Split:
        """The split this problem belongs to, by hash of its question."""
        bucket = int.from_bytes(hashlib.sha256(self.question.encode()).digest()[:4], "big") % 100
        return next(split for split in SPLITS if bucket < _LAST_SHARE[split])

    def solved_by(self, response: str) -> bool:
        """True if the text after the thinking (all of it, where there is none) is exactly the answer."""
        return response.rpartition("</think>")[2].strip() == self.answer


def draw_problem(rng: random.Random, n_terms: tuple[int, ...] = (3, 4), kind: Kind = "sums") -> Problem:
    """One problem of any split, with a number of terms drawn from ``n_terms``; a difference has four at most."""
    tens = range(1, 10)
    n_drawn = rng.choice(n_terms) - (kind == "differences")
    terms = [10 * rng.choice(tens) + rng.choices(range(10), _LAST_DIGIT_WEIGHTS)[0] for _ in range(n_drawn)]
    if kind == "differences":
        terms.insert(0, rng.randrange(max(_FIRST.start, sum(terms) + _LEFT), _FIRST.stop))
    return Problem(tuple(terms), kind)


def stream_problems(
    split: Split, rng: random.Random, n_terms: tuple[int, ...] = (3, 4), kind: Kind = "sums"
) -> Iterator[Problem]:
    """Endless problems of one split; a problem may come again."""
    while True:
        problem = draw_problem(rng, n_terms, kind)
        if problem.split == split:
            yield problem


def problems(
    split: Split, n: int, seed: int = 0, n_terms: tuple[int, ...] = (3, 4), kind: Kind = "sums"
) -> list[Problem]:
    """``n`` different problems of one split; the same list for the same seed, and a prefix of any longer one."""
    distinct: dict[Problem, None] = {}
    stream = stream_problems(split, random.Random(f"{split}-{seed}"), n_terms, kind)
    while len(distinct) < n:
        distinct.setdefault(next(stream))
    return list(distinct)
