r"""Problems with known answers from the hub: which they are, how they are asked, and how an answer is checked.

    task           dataset                                        asked with       right if
    builtin        the built-in pair's own, report split          nothing          exactly the answer
    gsm8k          openai/gsm8k, main, test                       the instruction  equal by math-verify
    math500        HuggingFaceH4/MATH-500, test                   the instruction  equal by math-verify
    amc23          math-ai/amc23, test                            the instruction  equal by math-verify
    aime24         HuggingFaceH4/aime_2024, train                 the instruction  equal by math-verify
    aime25         math-ai/aime25, test                           the instruction  equal by math-verify
    gpqa_diamond   Idavidrein/gpqa, gpqa_diamond, train (gated)   four choices     the letter

The instruction is the one DeepSeek-R1's authors recommend: "Please reason step by step, and put your final answer
within \boxed{}." What counts is the last \boxed{} after the thinking; where there is none, what math-verify takes for
the answer there (a base model was never taught to box). The choices A to D of GPQA are shuffled by a seed, each
question by itself; the letter is read from the last box too, and where there is none, from what is called the answer,
or else the last letter that stands alone. A dataset may also be a local file or folder of the same
columns, for machines without a network.
"""

from __future__ import annotations

import difflib
import importlib.util
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_adapters import organism
from tl_adapters.errors import UserError
from tl_adapters.evaluation.math_equality import equal
from tl_adapters.generation.responses import Checkable

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
"""What follows every question."""
LETTERS = "ABCD"
BUILTIN = "builtin"
BUILTIN_PROBLEMS = 1_000
"""Problems of the built-in pair's report split, where no limit is given."""
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class TaskError(UserError, ValueError):
    """A task that is not known, or whose problems cannot be had."""


@dataclass(frozen=True)
class MathProblem:
    """A question whose answer is a mathematical expression."""

    asked: str
    """The question, without the instruction."""
    answer: str
    """The right answer, as LaTeX."""

    @property
    def question(self) -> str:
        """What the user asks, instruction included."""
        return f"{self.asked}\n{INSTRUCTION}"

    def solved_by(self, response: str) -> bool:
        """True if the last box after the thinking, or else what is found there without one, equals the answer."""
        said = after_thinking(response)
        box = last_boxed(said)
        if box is None:
            return equal(rf"\boxed{{{self.answer}}}", said)
        found = tidied(box)
        return _bare(found) == _bare(tidied(self.answer)) or equal(rf"\boxed{{{self.answer}}}", rf"\boxed{{{found}}}")


@dataclass(frozen=True)
class ChoiceProblem:
    """A question with four choices."""

    asked: str
    """The question, without choices and instruction."""
    choices: tuple[str, str, str, str]
    """In the order shown."""
    letter: str
    """Of the right one."""

    @property
    def question(self) -> str:
        """What the user asks, choices and instruction included."""
        shown = "\n".join(f"{letter}) {choice}" for letter, choice in zip(LETTERS, self.choices, strict=True))
        instruction = INSTRUCTION.replace("final answer", "final answer, one letter of A to D,")
        return f"{self.asked}\n\n{shown}\n\n{instruction}"

    def solved_by(self, response: str) -> bool:
        r"""True if the answer after the thinking is the letter: \boxed{B}, \boxed{\text{Option (B)}}, \boxed{B) ...}.

        Without a box: "the answer is B", a last line that begins with the letter alone, or the last letter alone.
        """
        said = after_thinking(response)
        box = last_boxed(said)
        return (_letter_without_box(said) if box is None else _letter_in(box)) == self.letter


@dataclass(frozen=True)
class Task:
    """Where a task's problems are and what becomes of a row."""

    source: str
    """Dataset of the hub."""
    subset: str | None
    """Its configuration, where it has several."""
    split: str
    """Its split."""
    columns: tuple[str, ...]
    """Columns that are read."""
    problem: Callable[[Mapping[str, str], int], Checkable]
    """A row, and a seed, to its problem."""
    checked_by: str | None = "math_verify"
    """Package of an extra that the check needs."""


@dataclass(frozen=True)
class Problems:
    """A task's problems, loaded."""

    task: str
    """Name of the task."""
    source: str
    """Where they came from."""
    split: str
    """The split they are."""
    problems: Sequence[Checkable]
    """In the order of the dataset."""


def _math(question: str) -> Callable[[Mapping[str, str], int], Checkable]:
    return lambda row, seed: MathProblem(row[question], row["answer"])


def _gsm8k(row: Mapping[str, str], seed: int) -> Checkable:
    _, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise TaskError("its answer has no ####, after which the number stands")
    return MathProblem(row["question"], answer.strip().replace(",", ""))


_GPQA = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def _gpqa(row: Mapping[str, str], seed: int) -> Checkable:
    asked = row["Question"].strip()
    order = random.Random(f"{seed}-{asked}").sample(range(4), 4)
    a, b, c, d = (row[_GPQA[place]].strip() for place in order)
    return ChoiceProblem(asked, (a, b, c, d), LETTERS[order.index(0)])


TASKS = {
    "gsm8k": Task("openai/gsm8k", "main", "test", ("question", "answer"), _gsm8k),
    "math500": Task("HuggingFaceH4/MATH-500", None, "test", ("problem", "answer"), _math("problem")),
    "amc23": Task("math-ai/amc23", None, "test", ("question", "answer"), _math("question")),
    "aime24": Task("HuggingFaceH4/aime_2024", None, "train", ("problem", "answer"), _math("problem")),
    "aime25": Task("math-ai/aime25", None, "test", ("problem", "answer"), _math("problem")),
    "gpqa_diamond": Task("Idavidrein/gpqa", "gpqa_diamond", "train", ("Question", *_GPQA), _gpqa, checked_by=None),
}


def require_task(name: str) -> None:
    """Raises TaskError where the task is unknown or its check not installed; loads nothing."""
    if name != BUILTIN and name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise TaskError(f"No task is called {name!r}.{hint} Known are {', '.join((BUILTIN, *TASKS))}.")
    package = None if name == BUILTIN else TASKS[name].checked_by
    if package and importlib.util.find_spec(package) is None:
        raise TaskError(
            f"The answers of {name} are checked by {package.replace('_', '-')}, which is not installed. Run: "
            'pip install "tl-adapters[benchmarks]"'
        )


def load_problems(name: str, source: str | None = None, *, limit: int | None = None, seed: int = 0) -> Problems:
    """A task's problems.

    Args:
        name: of the task.
        source: a local .jsonl, .json, .csv or .parquet file, or a folder with a copy of the dataset; None is the hub.
        limit: the first so many of them.
        seed: of the order of choices.

    Raises TaskError, which says what was found instead of the dataset, its columns or an answer.
    """
    require_task(name)
    if limit is not None and limit < 1:
        raise TaskError(f"The limit is {limit}; allowed is a whole number >= 1.")
    if name == BUILTIN:
        if source is not None:
            raise TaskError(f"{BUILTIN} is made, not read; leave out {source}.")
        made = organism.problems("report", limit or BUILTIN_PROBLEMS)
        return Problems(name, "the built-in pair's problems", "report", made)
    task = TASKS[name]
    table, where = _table(name, task, source), source or task.source
    if missing := [column for column in task.columns if column not in table.column_names]:
        raise TaskError(
            f"{where} has no column {', '.join(missing)}; {name} reads {', '.join(task.columns)}, and found were "
            f"{', '.join(table.column_names) or 'none'}."
        )
    n = len(table) if limit is None else min(limit, len(table))
    if n == 0:
        raise TaskError(f"{where} holds no problems.")
    problems = [_problem(task, table[i], f"{where}, row {i}", seed) for i in range(n)]
    return Problems(name, where, task.split, problems)


def _problem(task: Task, record: Mapping[str, Any], where: str, seed: int) -> Checkable:
    row = {column: "" if record[column] is None else str(record[column]) for column in task.columns}
    if empty := [column for column, text in row.items() if not text.strip()]:
        raise TaskError(f"{where}: {', '.join(empty)} is empty.")
    try:
        return task.problem(row, seed)
    except TaskError as error:
        raise TaskError(f"{where}: {error}.") from error


def _table(name: str, task: Task, source: str | None) -> Any:
    import datasets  # a second to import, and the built-in problems need none of it

    datasets.disable_progress_bars()
    path = None if source is None else Path(source)
    if path is not None and not path.exists():
        raise TaskError(f"{source} is no file or folder; give a copy of {task.source}, or only {name} for the hub's.")
    try:
        if path is None or path.is_dir():
            return datasets.load_dataset(source or task.source, task.subset, split=task.split)
        if path.suffix not in _BUILDERS:
            raise TaskError(f"{path} is no file of a kind that is read; allowed are {', '.join(_BUILDERS)}.")
        return datasets.load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train")
    except TaskError:
        raise
    except Exception as error:  # the library raises a dozen classes for a network, a login, a name or a file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if path is not None:
            raise TaskError(f"{path} cannot be read: {reason}") from error
        if "gated" in str(error):
            what_next = f"Accept its terms on https://huggingface.co/datasets/{task.source} and log in (HF_TOKEN)"
        else:
            what_next = "Check the network"
        raise TaskError(
            f"The hub did not give {task.source} ({reason}). {what_next}, or give a copy: {name}=FILE with columns "
            f"{', '.join(task.columns)}."
        ) from error


def after_thinking(response: str) -> str:
    """What follows the last end of thinking; all of it, where there is none."""
    return response.rpartition("</think>")[2]


def last_boxed(text: str) -> str | None:
    r"""What stands in the last whole \boxed{...} or \fbox{...}, braces within it balanced; None where there is none.

    A box without braces, \boxed 5, holds what follows up to a space.
    """
    for opening in reversed(list(re.finditer(r"\\(?:boxed|fbox)(?:\s*\{|\s+([^\s{}\\]+)|(\d+))", text))):
        if unbraced := opening[1] or opening[2]:
            return unbraced
        depth = 1
        for mark in re.finditer(r"\\.|[{}]", text[opening.end() :], re.DOTALL):  # an escaped brace is no brace
            depth += {"{": 1, "}": -1}.get(mark[0], 0)
            if depth == 0:
                return text[opening.end() : opening.end() + mark.start()]
    return None


_SPACE = r"(?:\\[ ,;:!]|~|\s)"
"""What LaTeX writes as a space."""
_WRITTEN = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|boldsymbol)\s*"
"""What sets the font of an answer."""


def tidied(answer: str) -> str:
    r"""An answer without what is no part of it: $...$ or \(...\) around it, marks after it, spaces in numbers."""
    text = re.sub(rf"(?:{_SPACE}|[.,;:])+$", "", re.sub(rf"^{_SPACE}+", "", answer))
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inside = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and inside and closing not in inside:
            return tidied(inside)
    return re.sub(rf"(?<!\d)\d{{1,3}}(?:{_SPACE}+\d{{3}})+(?!\d)", lambda m: re.sub(_SPACE, "", m[0]), text)


def _bare(answer: str) -> str:
    """Without what sets its font."""
    inside = re.fullmatch(rf"{_WRITTEN}\{{([^{{}}]*)\}}", answer.strip())
    return answer.strip() if inside is None else tidied(inside[1])


_AROUND = rf"(?:{_SPACE}|{_WRITTEN}|\\[()]|[$*_({{}}\[:\"']|(?i:the|correct|answer|option|choice|letter|is)\b)*"
"""What may stand before a letter that is an answer."""
_LETTER = rf"([{LETTERS}])(?![A-Za-z])"
_ANOTHER = rf"(?!{_SPACE}*(?:[,/&]|and|or){_SPACE}*[({{]*[{LETTERS}](?![A-Za-z]))"
"""Two letters are no choice."""


def _letter_in(box: str) -> str | None:
    found = re.match(_AROUND + _LETTER + _ANOTHER, box)
    return None if found is None else found[1]


def _letter_without_box(said: str) -> str | None:
    """Of "answer is B", the last one; else of a last line that begins with B alone; else the last letter alone."""
    if named := re.findall(rf"(?i:\banswer\b){_AROUND}{_LETTER}{_ANOTHER}", said):
        return str(named[-1])
    last = (said.strip().splitlines() or [""])[-1]
    if line := re.match(rf"[\s*_(\[\"']*{_LETTER}(?:[\s*_)\].:\"']*$|[).:*])", last):
        return line[1]
    alone = re.findall(rf"(?<![A-Za-z'\u2019\\]){_LETTER}(?!['\u2019])(?!(?<=A)\s+[a-z])", said)  # not "A dog"
    return str(alone[-1]) if alone else None
