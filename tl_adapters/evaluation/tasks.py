r"""Tasks of problems with known answers: where they come from, how they are asked, and how an answer is checked.

    task           dataset                                        prompt           an answer is right if
    builtin        the model organism's own, report split         question only    it is exactly the answer
    gsm8k          openai/gsm8k, main, test                       and instruction  equal by math-verify
    math500        HuggingFaceH4/MATH-500, test                   and instruction  equal by math-verify
    amc23          math-ai/amc23, test                            and instruction  equal by math-verify
    aime24         HuggingFaceH4/aime_2024, train                 and instruction  equal by math-verify
    aime25         math-ai/aime25, test                           and instruction  equal by math-verify
    gpqa_diamond   Idavidrein/gpqa, gpqa_diamond, train (gated)   and choices      it is the letter

The instruction is the one that DeepSeek-R1's authors recommend: "Please reason step by step, and put your final answer
within \boxed{}." The answer is the content of the last \boxed{} after the thinking; where there is none, it is what
math-verify extracts from that text (a base model was never trained to write a box). The choices A to D of GPQA are
shuffled by a seed, for each question separately. Their letter is read from the last box too; where there is none, it is
the letter that the text calls the answer, or else the last letter that stands alone. A dataset may also be a local file
or folder with the same columns, for machines without a network.
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
from tl_adapters.checkpoints.hub_client import dataset_builder, hub_errors, load_table
from tl_adapters.errors import UserError
from tl_adapters.evaluation.math_equality import equal
from tl_adapters.generation.responses import Checkable
from tl_adapters.utils.notebook import ResultRecord
from tl_adapters.utils.reading import UnreadableFileError, read_json, read_json_lines, read_text, shown
from tl_adapters.utils.renamed import renamed_arguments

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
"""Text that is appended to every question."""
CHOICE_LETTERS = "ABCD"
ORGANISM_TASK = "builtin"
BUILTIN_PROBLEMS = 1_000
"""Number of problems of the model organism's report split where no limit is given."""
_FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Endings of files of problems, and what datasets calls their formats."""


class TaskError(UserError, ValueError):
    """A task that is unknown, or whose problems cannot be loaded."""


@dataclass(frozen=True)
class MathProblem:
    """A question whose answer is a mathematical expression."""

    text: str
    """The question without the instruction."""
    answer: str
    """The right answer in LaTeX."""

    @property
    def question(self) -> str:
        """The text of the user's turn, with the instruction."""
        return f"{self.text}\n{INSTRUCTION}"

    def solved_by(self, response: str) -> bool:
        """Whether the answer after the thinking, in its last box or without one, equals the right answer."""
        final_text, right = after_thinking(response), rf"\boxed{{{self.answer}}}"
        box = last_boxed(final_text)
        if box is None:
            return equal(right, final_text)
        given = normalize_latex(box)
        same = _without_font(given) == _without_font(normalize_latex(self.answer))
        return same or equal(right, rf"\boxed{{{given}}}")


@dataclass(frozen=True)
class ChoiceProblem:
    """A question with four choices."""

    text: str
    """The question without the choices and the instruction."""
    choices: tuple[str, str, str, str]
    """The choices in the order shown."""
    letter: str
    """Letter of the right choice."""

    @property
    def question(self) -> str:
        """The text of the user's turn, with the choices and the instruction."""
        shown = "\n".join(f"{letter}) {choice}" for letter, choice in zip(CHOICE_LETTERS, self.choices, strict=True))
        instruction = INSTRUCTION.replace("final answer", "final answer, one letter of A to D,")
        return f"{self.text}\n\n{shown}\n\n{instruction}"

    def solved_by(self, response: str) -> bool:
        r"""Whether the answer after the thinking is the letter: \boxed{B}, \boxed{\text{Option (B)}}, \boxed{B) ...}.

        Without a box it is that of "the answer is B", of a last line that begins with it, or the last letter alone.
        """
        final_text = after_thinking(response)
        box = last_boxed(final_text)
        return (_letter_without_box(final_text) if box is None else _letter_in_box(box)) == self.letter


@dataclass(frozen=True)
class Task:
    """The dataset of a task, and how its rows become problems."""

    source: str
    """Name of the dataset on the Hugging Face Hub."""
    subset: str | None
    """Configuration of the dataset; None where it has only one."""
    split: str
    """Split of the dataset."""
    columns: tuple[str, ...]
    """Columns that are read from it."""
    problem: Callable[[Mapping[str, str], int], Checkable]
    """From a row and a seed to the problem."""
    checked_by: str | None = "math_verify"
    """Package that the check needs, from an extra; None where it needs none."""
    republish: bool = True
    """Whether its texts may be shown in public; the authors of GPQA ask not to, so that models do not learn them."""


@dataclass(frozen=True)
class Problems(ResultRecord):
    """The loaded problems of a task."""

    task: str
    """Name of the task."""
    source: str
    """The dataset, or the local file or folder."""
    split: str
    """Split of the dataset."""
    problems: Sequence[Checkable]
    """The problems in the order of the dataset."""

    def __repr__(self) -> str:
        return f"Problems: {len(self.problems):,} of {self.task}, split {self.split} of {self.source}"

    def row(self) -> dict[str, Any]:
        """The names, and the number of problems."""
        return {"task": self.task, "source": self.source, "split": self.split, "problems": len(self.problems)}

    def to_dict(self) -> dict[str, Any]:
        """`row` as JSON values, without the texts of the problems."""
        return self.row()

    @property
    def republish(self) -> bool:
        """Whether their texts may be shown in public."""
        return self.task not in TASKS or TASKS[self.task].republish


def _math(question: str) -> Callable[[Mapping[str, str], int], Checkable]:
    return lambda row, seed: MathProblem(row[question], row["answer"])


def _gsm8k(row: Mapping[str, str], seed: int) -> Checkable:
    _, separator, answer = row["answer"].rpartition("####")
    if not separator:
        raise TaskError("the answer has no ####, which must precede the number")
    return MathProblem(row["question"], answer.strip().replace(",", ""))


_GPQA_CHOICE_COLUMNS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def _gpqa(row: Mapping[str, str], seed: int) -> Checkable:
    question = row["Question"].strip()
    order = random.Random(f"{seed}-{question}").sample(range(4), 4)
    a, b, c, d = (row[_GPQA_CHOICE_COLUMNS[i]].strip() for i in order)
    return ChoiceProblem(question, (a, b, c, d), CHOICE_LETTERS[order.index(0)])


TASKS = {
    "gsm8k": Task("openai/gsm8k", "main", "test", ("question", "answer"), _gsm8k),
    "math500": Task("HuggingFaceH4/MATH-500", None, "test", ("problem", "answer"), _math("problem")),
    "amc23": Task("math-ai/amc23", None, "test", ("question", "answer"), _math("question")),
    "aime24": Task("HuggingFaceH4/aime_2024", None, "train", ("problem", "answer"), _math("problem")),
    "aime25": Task("math-ai/aime25", None, "test", ("problem", "answer"), _math("problem")),
    "gpqa_diamond": Task(
        "Idavidrein/gpqa",
        "gpqa_diamond",
        "train",
        ("Question", *_GPQA_CHOICE_COLUMNS),
        _gpqa,
        checked_by=None,
        republish=False,
    ),
}


def require_task(name: str, checked: bool = True) -> None:
    """Raise TaskError where the task is unknown or the package of its check is not installed; nothing is loaded.

    Args:
        name: of the task.
        checked: whether answers are going to be checked.
    """
    if name != ORGANISM_TASK and name not in TASKS:
        similar = difflib.get_close_matches(name, TASKS, n=1)
        hint = f" Did you mean {similar[0]!r}?" if similar else ""
        raise TaskError(f"There is no task {name!r}.{hint} The tasks are {', '.join((ORGANISM_TASK, *TASKS))}.")
    package = None if name == ORGANISM_TASK else TASKS[name].checked_by
    if checked and package and importlib.util.find_spec(package) is None:
        raise TaskError(
            f"The answers of {name} are checked by {package.replace('_', '-')}, which is not installed. Run: "
            'pip install "tl-adapters[benchmarks]"'
        )


@renamed_arguments(limit="n")
def load_problems(
    name: str, source: str | None = None, *, n: int | None = None, seed: int = 0, checked: bool = True
) -> Problems:
    """Load the problems of a task.

    Args:
        name: of the task.
        source: a local .jsonl, .json, .csv or .parquet file, or a folder with a copy of the dataset; None is the hub.
        n: load only so many problems, the first ones; None is all.
        seed: of the order of choices.
        checked: whether answers are going to be checked, for which some tasks need a package of their own.

    Raises TaskError where the dataset, its columns or an answer is missing, with what was found instead.
    """
    require_task(name, checked)
    if n is not None and n < 1:
        raise TaskError(f"n is {n}; it must be a whole number >= 1.")
    if name == ORGANISM_TASK:
        if source is not None:
            raise TaskError(f"The problems of {ORGANISM_TASK} are generated, not read from a file; leave out {source}.")
        generated = organism.problems("report", n or BUILTIN_PROBLEMS)
        return Problems(name, "the built-in pair's problems", "report", generated)
    task = TASKS[name]
    table, origin = _table(name, task, source), source or task.source
    if missing := [column for column in task.columns if column not in table.column_names]:
        raise TaskError(
            f"{origin} has no column {', '.join(missing)}; {name} reads {', '.join(task.columns)}, and its columns are "
            f"{', '.join(table.column_names) or 'none'}."
        )
    if not len(table):
        raise TaskError(f"{origin} has no rows.")
    problems = [
        _problem(task, table[i], f"{origin}, row {i}", seed)
        for i in range(len(table) if n is None else min(n, len(table)))
    ]
    return Problems(name, origin, task.split, problems)


def _problem(task: Task, record: Mapping[str, Any], location: str, seed: int) -> Checkable:
    row = {column: "" if record[column] is None else str(record[column]) for column in task.columns}
    for column, text in row.items():
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise TaskError(f"{location}: {column} holds half a surrogate pair, which is not text.")
    if empty := [column for column, text in row.items() if not text.strip()]:
        raise TaskError(f"{location}: {', '.join(empty)} is empty.")
    try:
        return task.problem(row, seed)
    except TaskError as error:
        raise TaskError(f"{location}: {error}.") from error


def _table(name: str, task: Task, source: str | None) -> Any:
    path = None if source is None else Path(source)
    if path is not None and not path.exists():
        raise TaskError(
            f"{source} does not exist; give a copy of {task.source}, or only {name} to load it from the hub."
        )
    if path is not None and not path.is_dir() and path.suffix not in _FILE_FORMATS:
        raise TaskError(f"The format of {path} is not supported; supported are {', '.join(_FILE_FORMATS)}.")
    with hub_errors(
        f"{task.source} cannot be loaded from the hub" if path is None else f"{path} cannot be read",
        task.source,
        error=TaskError,
        kind="dataset",
        otherwise=f"A row needs the columns {', '.join(task.columns)}.",
        instead=f"Or give a copy: {name}=FILE with columns {', '.join(task.columns)}." if path is None else "",
    ):
        if path is None or path.is_dir():
            return load_table(dataset_builder(source or task.source, task.subset, error=TaskError), task.split)
        if path.suffix in (".jsonl", ".json"):
            return _JsonTable(path, task)
        return load_table(dataset_builder(_FILE_FORMATS[path.suffix], data_files=str(path), error=TaskError), "train")


class _JsonTable:
    """The rows of a .jsonl file, or of a .json file that holds a list of them.

    They are not read by datasets, which a line such as null ends in a segmentation fault. Raises TaskError.
    """

    def __init__(self, path: Path, task: Task) -> None:
        advice = f"A row is an object with the columns {', '.join(task.columns)}."
        try:
            is_list = path.suffix == ".json" and read_text(path, advice).lstrip().startswith("[")
            rows = enumerate(read_json(path, advice), 1) if is_list else read_json_lines(path, advice)
            self._rows = []
            for number, row in rows:
                if not isinstance(row, dict):
                    place = "item" if is_list else "line"
                    raise TaskError(f"{path}, {place} {number}: found {shown(row)}. {advice}")
                self._rows.append(row)
        except UnreadableFileError as error:
            raise TaskError(str(error)) from error
        self.column_names = list(dict.fromkeys(column for row in self._rows for column in row))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**dict.fromkeys(self.column_names), **self._rows[index]}


def after_thinking(response: str) -> str:
    """The text after the last </think>; the whole response where there is none."""
    return response.rpartition("</think>")[2]


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete \boxed{...} or \fbox{...}, with balanced braces; None where there is none.

    The content of a box without braces, \boxed 5, is the text up to the next space.
    """
    for opening in reversed(list(re.finditer(r"\\(?:boxed|fbox)(?:\s*\{|\s+([^\s{}\\]+)|(\d+))", text))):
        if unbraced := opening[1] or opening[2]:
            return unbraced
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[opening.end() :], re.DOTALL):  # \\. skips escaped braces
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return text[opening.end() : opening.end() + brace.start()]
    return None


_SPACE = r"(?:\\[ ,;:!]|~|\s)"
"""A space in LaTeX."""
_FONT = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|boldsymbol)\s*"
"""A LaTeX command that sets the font of its argument."""


def normalize_latex(answer: str) -> str:
    r"""An answer without $...$ or \(...\) around it, punctuation after it, and spaces within its numbers."""
    text = re.sub(rf"(?:{_SPACE}|[.,;:])+$", "", re.sub(rf"^{_SPACE}+", "", answer))
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inside = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and inside and closing not in inside:
            return normalize_latex(inside)
    return re.sub(rf"(?<!\d)\d{{1,3}}(?:{_SPACE}+\d{{3}})+(?!\d)", lambda m: re.sub(_SPACE, "", m[0]), text)


def _without_font(answer: str) -> str:
    """An answer without a font command around it."""
    inside = re.fullmatch(rf"{_FONT}\{{([^{{}}]*)\}}", answer.strip())
    return answer.strip() if inside is None else normalize_latex(inside[1])


_BEFORE_LETTER = rf"(?:{_SPACE}|{_FONT}|\\[()]|[$*_({{}}\[:\"']|(?i:the|correct|answer|option|choice|letter|is)\b)*"
"""Text that may precede a letter that is an answer."""
_LETTER = rf"([{CHOICE_LETTERS}])(?![A-Za-z])"
_NO_SECOND_LETTER = rf"(?!{_SPACE}*(?:[,/&]|and|or){_SPACE}*[({{]*[{CHOICE_LETTERS}](?![A-Za-z]))"
"""A letter that is followed by another one is not an answer."""


def _letter_in_box(box: str) -> str | None:
    match = re.match(_BEFORE_LETTER + _LETTER + _NO_SECOND_LETTER, box)
    return None if match is None else match[1]


def _letter_without_box(text: str) -> str | None:
    """The letter of the last "answer is B", else of a last line that begins with it, else the last letter alone."""
    if named := re.findall(rf"(?i:\banswer\b){_BEFORE_LETTER}{_LETTER}{_NO_SECOND_LETTER}", text):
        return str(named[-1])
    last_line = (text.strip().splitlines() or [""])[-1]
    if match := re.match(rf"[\s*_(\[\"']*{_LETTER}(?:[\s*_)\].:\"']*$|[).:*])", last_line):
        return match[1]
    alone = re.findall(rf"(?<![A-Za-z'\u2019\\]){_LETTER}(?!['\u2019])(?!(?<=A)\s+[a-z])", text)  # not "A dog"
    return str(alone[-1]) if alone else None
