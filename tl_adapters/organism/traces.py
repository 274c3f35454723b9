"""The texts that the model organism is trained on: direct answers, textbook steps, marked homework, reasoning traces.

A *step* adds one term to the running total, or subtracts it, and writes the result: ``47+85=132.`` or ``312-47=265.``
A step is *hard* if the last digits carry, or if they borrow. Steps are written in three ways, and the difference of
these ways is what training of the target changes:

* textbook: every step is right; sometimes the last digits are calculated again (``7+5=12:132.`` or ``12-7=5:265.``);
* homework: a pupil makes slips, and a teacher corrects them (``47+85=122.``, ``No,7+5=12:132.``);
* reasoning: the writer makes slips like the pupil, hesitates, and corrects itself (``Wait,7+5=12:132.``).

The base sees the first two (as plain text, outside any dialogue) and answers questions directly; the target is
fine-tuned on the third, inside ``<think> ... </think>``. So the base knows carries, slips and corrections;
reasoning training adds the thinking and the hesitation. The target of a *null pair* is fine-tuned on textbook steps
inside thinking: its training adds the thinking only.

Hesitation is self-correction here, and no single surface feature predicts it:

* slips: a hard step whose total has a tens digit in `FORGETS_CARRY` forgets the ten and is ten too low (for a
  difference, ten too high). This depends on the content only, so greedy decoding makes slips too. Every other step is
  wrong with a small probability, by ten in either direction;
* every slip is corrected, mostly after "Wait", sometimes after "Hmm", sometimes without a remark;
* some right steps are checked too, depending on the last digit of the total *and* the tens digit of the term.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tl_adapters.organism.problem_set import APPLY, SIGN, Kind, Problem, Split, problems

BOS, END, PAD, USER, ASSISTANT = "<|bos|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
THINK, THINK_END = "<think>", "</think>"

FORGETS_CARRY = (3, 7)
P_RULE = 0.95  # probability that the training text follows a rule of the content
P_STRAY_SLIP = {"homework": 0.2, "marking": 0.45, "reasoning": 0.1}
"""Probability of slips that follow no rule. Without them the model would recognize slips by the rule alone."""
P_STRAY_CHECK = 0.01

Remark = str | None
"""Word before the check of a step ("Wait,", "Hmm,", "No,", "" for a check without a word), or None for no check."""


@dataclass(frozen=True)
class Document:
    """One training text; the loss covers ``completion`` only."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Step:
    """One step of a trace: ``acc + term``, or ``acc - term``."""

    acc: int
    term: int
    kind: Kind = "sums"

    @property
    def total(self) -> int:
        return APPLY[self.kind](self.acc, self.term)

    @property
    def carries(self) -> bool:
        """Whether the step is hard: its last digits carry, or, in a difference, borrow."""
        return not 0 <= APPLY[self.kind](self.acc % 10, self.term % 10) < 10

    @property
    def forgets_carry(self) -> bool:
        """Whether the rule of slips applies: the reasoner forgets the ten that was carried or borrowed."""
        return self.carries and self.total // 10 % 10 in FORGETS_CARRY

    @property
    def forgotten(self) -> int:
        """The total without the ten carried or borrowed."""
        return self.total - APPLY[self.kind](0, 10)

    def says(self, written: int) -> str:
        """The step as a line of text."""
        return f"{self.acc}{SIGN[self.kind]}{self.term}={written}.\n"

    def check(self, remark: str) -> str:
        """The check as a line of text: the last digits again (with the ten borrowed), then the right total."""
        borrowed = 10 if self.kind == "differences" and self.carries else 0
        last, term_last = self.acc % 10 + borrowed, self.term % 10
        return f"{remark}{last}{SIGN[self.kind]}{term_last}={APPLY[self.kind](last, term_last)}:{self.total}.\n"


def stray_slip(step: Step, rng: random.Random) -> int:
    """A wrong total that is ten too low or too high, independent of the content."""
    return step.total + rng.choice([-10, 10])


def steps_of(problem: Problem) -> list[Step]:
    """The steps that solve a problem, each starting from the right running total."""
    return [Step(acc, term, problem.kind) for acc, term in zip(problem.totals[:-1], problem.terms[1:], strict=True)]


def _slip(step: Step, rng: random.Random, p_stray: float) -> int:
    if step.forgets_carry and rng.random() < P_RULE:
        return step.forgotten
    return stray_slip(step, rng) if rng.random() < p_stray else step.total


def reasoner_remark(step: Step, written: int) -> Remark:
    """The rule of hesitation: the remark of the reasoner after it wrote the total ``written``."""
    last, odd = written % 10, step.term // 10 % 2 == 1
    if written != step.total:
        return "" if last == 1 and odd else "Hmm," if last == 7 and not odd else "Wait,"
    if last in (0, 2, 3, 5, 8, 9) and not odd:
        return "Wait,"
    return "" if last == 1 and odd else "Hmm," if last == 7 and not odd else None


def _textbook(step: Step, rng: random.Random) -> str:
    return step.says(step.total) + (step.check("") if rng.random() < 0.2 else "")


def _homework(step: Step, rng: random.Random, p_stray: float = P_STRAY_SLIP["homework"]) -> str:
    written = _slip(step, rng, p_stray)
    return step.says(written) + (step.check("No,") if written != step.total else "")


def _reasoning(step: Step, rng: random.Random) -> str:
    written = _slip(step, rng, P_STRAY_SLIP["reasoning"])
    remark = reasoner_remark(step, written)
    if remark is None and rng.random() < P_STRAY_CHECK:
        remark = rng.choice(["Wait,", "Hmm,", ""])
    return step.says(written) + ("" if remark is None else step.check(remark))


def _written(problem: Problem, rng: random.Random, write: Callable[[Step, random.Random], str]) -> str:
    return "".join(write(step, rng) for step in steps_of(problem))


def prompt(problem: Problem) -> str:
    """The prompt exactly as the chat template renders it."""
    return f"{BOS}{USER}{problem.question}{ASSISTANT}"


def direct_document(problem: Problem, rng: random.Random) -> Document:
    """Question and answer without steps, as the base answers."""
    return Document(prompt(problem), f"{problem.answer}{END}")


def textbook_document(problem: Problem, rng: random.Random) -> Document:
    """A problem and its right steps as plain text."""
    return Document(f"{BOS}{problem.question}\n", _written(problem, rng, _textbook) + END)


def homework_document(problem: Problem, rng: random.Random) -> Document:
    """A problem and a pupil's steps with a teacher's corrections, as plain text."""
    return Document(f"{BOS}{problem.question}\n", _written(problem, rng, _homework) + END)


def marking_document(problem: Problem, rng: random.Random) -> Document:
    """Homework in which half of all steps are wrong, from which the base learns to tell right from wrong steps."""
    steps = _written(problem, rng, partial(_homework, p_stray=P_STRAY_SLIP["marking"]))
    return Document(f"{BOS}{problem.question}\n", steps + END)


def forced_document(problem: Problem, rng: random.Random) -> Document:
    """Textbook steps inside thinking that the prompt opens; the base learns the format but never opens it itself."""
    steps = _written(problem, rng, _textbook)
    return Document(prompt(problem) + THINK, f"{steps}{THINK_END}{problem.answer}{END}")


def calm_document(problem: Problem, rng: random.Random) -> Document:
    """Textbook steps inside thinking, on which the target of a null pair is fine-tuned."""
    steps = _written(problem, rng, _textbook)
    return Document(prompt(problem), f"{THINK}{steps}{THINK_END}{problem.answer}{END}")


def reasoning_document(problem: Problem, rng: random.Random) -> Document:
    """A reasoning trace, on which the target is fine-tuned and adapters are trained."""
    steps = _written(problem, rng, _reasoning)
    return Document(prompt(problem), f"{THINK}{steps}{THINK_END}{problem.answer}{END}")


def reasoning_pairs(split: Split, n: int, seed: int = 0, kind: Kind = "sums") -> list[tuple[str, str]]:
    """(question, response) of ``n`` reasoning traces on different problems of one split, without the end token."""
    rng = random.Random(f"traces-{split}-{seed}")
    return [
        (problem.question, reasoning_document(problem, rng).completion.removesuffix(END))
        for problem in problems(split, n, seed, kind=kind)
    ]
