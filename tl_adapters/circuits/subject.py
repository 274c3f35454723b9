"""What a behaviour is studied on: problems for choosing, others for reporting, and what can be checked in an answer.

Features are chosen on the select problems and every figure is of the report problems. Of the built-in kind of problem
more is known than of others: which steps were wrong, and how to write a wrong one into the model's answer.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tl_adapters.data.words import word_pattern
from tl_adapters.generation.responses import THINK_OPENS, Checkable, Response
from tl_adapters.organism import Kind, problems, traces
from tl_adapters.organism.census import corrects, with_injected_slip, written_steps


@dataclass(frozen=True)
class Injection:
    """A wrong step written into the model's answer."""

    problem: Checkable
    """What was asked."""
    prefill: str
    """The thinking so far; its last step is wrong."""
    corrected: Callable[[str], bool]
    """Of the text that goes on: does it begin by setting the step right?"""


@dataclass(frozen=True)
class Subject:
    """Problems and checks of one study."""

    select: Sequence[Checkable]
    """On which the circuit is chosen."""
    report: Sequence[Checkable]
    """On which it is reported; none of the others."""
    prefill: str = THINK_OPENS
    """What opens the thinking of a hybrid that would not open it itself."""
    slipped: Callable[[Any, Response], bool] | None = None
    """Did this answer of the target contain a wrong step?"""
    injections: Sequence[Injection] = ()
    """Wrong steps to be corrected, of report problems."""
    held_out: Sequence[str] = ()
    """Other words of the behaviour, which nothing is chosen on."""
    signs: dict[str, str] = field(default_factory=dict)
    """Other signs of the behaviour than its words: name to a regular expression that is counted in answers."""
    max_new_tokens: int | None = None
    """The limit of an answer; None is what the problems or else the model name (`benchmarks.answer_limit`)."""
    temperature: float | None = None
    """At which answers are drawn, 0 takes the likeliest tokens; None is generation_config.json's."""


def builtin_subject(
    n_select: int, n_report: int, kind: Kind = "sums", seed: int = 0, max_new_tokens: int | None = None
) -> Subject:
    """The problems of the built-in pair (or of one that the recipe made of another kind)."""
    report = problems("report", n_report, kind=kind)
    rng = random.Random(f"injections-{seed}")
    injections = []
    for problem in report:
        text, step = with_injected_slip(problem, rng)
        prefill = text.removeprefix(traces.prompt(problem))
        injections.append(Injection(problem, prefill, partial(corrects, step=step)))
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


def halves(asked: Sequence[Checkable], max_new_tokens: int | None = None, prefill: str = THINK_OPENS) -> Subject:
    """Any problems, divided by a hash of the question: one half selects, the other reports, whatever their order."""
    bits = [hashlib.sha256(p.question.encode()).digest()[0] % 2 for p in asked]
    return Subject(
        [p for p, bit in zip(asked, bits, strict=True) if bit == 0],
        [p for p, bit in zip(asked, bits, strict=True) if bit == 1],
        prefill,
        max_new_tokens=max_new_tokens,
    )


def kinds_of_hesitation(text: str, words: Sequence[str]) -> list[str]:
    """What each hesitation leads to, where words say where it is (`kinds_at`)."""
    return kinds_at(text, [match.span() for match in word_pattern(words).finditer(text)])


def kinds_at(text: str, places: Sequence[tuple[int, int]]) -> list[str]:
    """What each hesitation leads to, told by the last number before it and the last one that follows in its line.

    "correction" where they differ, "re-check" where they are equal, "restart" where no number follows.

    Args:
        text: of an answer.
        places: (start, stop) of each hesitation, from left to right. What follows ends at the next of them, too.
    """
    found = []
    for i, (start, stop) in enumerate(places):
        before = re.findall(r"\d+", text[:start])
        upto = places[i + 1][0] if i + 1 < len(places) else len(text)
        after = re.findall(r"\d+", text[stop : max(stop, upto)].split("\n", 1)[0])
        if not after or not before:
            found.append("restart")
        else:
            found.append("re-check" if after[-1] == before[-1] else "correction")
    return found
