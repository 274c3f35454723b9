"""The problems on which a behavior is studied: some to choose on, others to report on, and what can be checked.

Features are chosen on the select problems, and every figure is of the report problems. More is known about the problems
of the model organism than about others: which steps were wrong, and how to write a wrong step into an answer.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.generation.responses import Checkable, Response
from tl_adapters.interventions.variants import Variant
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.organism import Kind, problems, traces
from tl_adapters.organism.census import corrects, with_injected_slip, written_steps
from tl_adapters.organism.problem_set import KINDS
from tl_adapters.utils.arguments import choice

LONGEST_CHECK = 24
"""Tokens within which a check of the model organism ends: a word and a line of one-digit tokens take 13."""


@dataclass(frozen=True)
class Injection:
    """A wrong step written into the model's answer."""

    problem: Checkable
    """The problem that is answered."""
    prefill: str
    """The beginning of the answer; its last step is wrong."""
    corrected: Callable[[str], bool]
    """From the text that follows to whether it begins by correcting the step."""
    n_tokens: int | None = None
    """Number of tokens that decide it; None generates the whole answer."""


@runtime_checkable
class AnsweringEngine(Protocol):
    """What computes the answers of a study."""

    def entered(self, pair: PairedModel, variant: Variant) -> AbstractContextManager[Any]:
        """The model of a variant, as `generation.responses.respond` takes it, within a block."""
        ...

    def facts(self) -> dict[str, Any]:
        """What computed the answers, for results.json; empty for our own engine."""
        ...


class OwnEngine:
    """Answers by the pair itself."""

    def entered(self, pair: PairedModel, variant: Variant) -> AbstractContextManager[Any]:
        """The pair's model within the variant."""
        return variant.entered(pair)

    def facts(self) -> dict[str, Any]:
        """Nothing."""
        return {}


@dataclass(frozen=True)
class Subject:
    """The problems of a study, and what can be checked in answers to them."""

    select: Sequence[Checkable]
    """Problems on which the circuit is chosen."""
    report: Sequence[Checkable]
    """Problems on which figures are reported; disjoint from ``select``."""
    prefill: str = ChatFormat.think_start
    """Text that opens the thinking of a hybrid, which would not open it itself."""
    slipped: Callable[[Any, Response], bool] | None = None
    """From a problem and the target's answer to whether the answer contains a wrong step."""
    injections: Sequence[Injection] = ()
    """Wrong steps that are written into answers to report problems."""
    held_out: Sequence[str] = ()
    """Other words of the behavior, on which nothing is chosen."""
    signs: dict[str, str] = field(default_factory=dict)
    """Signs of the behavior other than its words: name -> a regular expression that is counted in answers."""
    max_new_tokens: int | None = None
    """Longest answer; None takes the limit of the problems or else of the model (`responses.response_limit`)."""
    temperature: float | None = None
    """Temperature of answers; 0 takes the likeliest tokens, None takes the temperature of generation_config.json."""
    engine: AnsweringEngine = field(default_factory=OwnEngine)
    """What computes the answers."""
    republish: bool = True
    """Whether pages and files of the study may show the problems' texts and the answers to them."""


def builtin_subject(
    n_select: int, n_report: int, kind: Kind = "sums", *, seed: int = 0, max_new_tokens: int | None = None
) -> Subject:
    """Return the problems of the model organism, or of one that the recipe made with another kind of problem.

    Args:
        n_select: problems to choose on.
        n_report: problems to report on.
        kind: "sums" or "differences".
        seed: of the wrong steps that are injected.
        max_new_tokens: longest answer; None takes the problems' own limit.

    Raises ArgumentError for an unknown kind.
    """
    choice(kind, KINDS, "kind")
    report = problems("report", n_report, kind=kind)
    rng = random.Random(f"injections-{seed}")
    injections = []
    for problem in report:
        text, step = with_injected_slip(problem, rng)
        prefill = text.removeprefix(traces.prompt(problem))
        injections.append(Injection(problem, prefill, partial(corrects, step=step), LONGEST_CHECK))
    return Subject(
        problems("select", n_select, kind=kind),
        report,
        slipped=lambda problem, response: any(step.wrong for step in written_steps(problem, response.text)),
        injections=injections,
        held_out=("Hmm", "No"),
        signs={"another word": r"(?i)\b(?:hmm|no)\b", "a check without a word": r"(?m)^\d[+-]\d+="},
        max_new_tokens=max_new_tokens,
        temperature=0.0,
    )


def halves(
    all_problems: Sequence[Checkable],
    max_new_tokens: int | None = None,
    prefill: str = ChatFormat.think_start,
    republish: bool = True,
) -> Subject:
    """Divide any problems into select and report problems by a hash of the question, whatever their order."""
    bits = [hashlib.sha256(p.question.encode()).digest()[0] % 2 for p in all_problems]
    return Subject(
        [p for p, bit in zip(all_problems, bits, strict=True) if bit == 0],
        [p for p, bit in zip(all_problems, bits, strict=True) if bit == 1],
        prefill,
        max_new_tokens=max_new_tokens,
        republish=republish,
    )


def kinds_at(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """Classify each hesitation by the last number before it and the last number that follows in its line.

    It is a "correction" where they differ, a "re-check" where they are equal, and a "restart" where no number follows.

    Args:
        text: of an answer.
        spans: (start, stop) of each hesitation in characters, from left to right. What follows a hesitation ends at
            the next one.
    """
    kinds = []
    for i, (start, stop) in enumerate(spans):
        before = re.findall(r"\d+", text[:start])
        end = spans[i + 1][0] if i + 1 < len(spans) else len(text)
        after = re.findall(r"\d+", text[stop : max(stop, end)].split("\n", 1)[0])
        if not after or not before:
            kinds.append("restart")
        else:
            kinds.append("re-check" if after[-1] == before[-1] else "correction")
    return kinds
