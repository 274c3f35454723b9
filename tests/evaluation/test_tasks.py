"""Tasks: the problem made from a row of each dataset, which answers are right, and errors of loading."""

import json
import sys
import threading
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers.loopback_hub import LoopbackHub, hub  # noqa: F401  # a fixture
from helpers.loopback_server import Response

from tl_adapters.evaluation import math_equality, tasks
from tl_adapters.evaluation.tasks import (
    CHOICE_LETTERS,
    INSTRUCTION,
    ORGANISM_TASK,
    TASKS,
    ChoiceProblem,
    MathProblem,
    TaskError,
    last_boxed,
    load_problems,
    require_task,
)

SUM = {"question": "What is 1,000+80?", "problem": "What is 1,000+80?", "answer": "1080"}
ROWS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(TASKS, SUM),
    "gsm8k": {"question": SUM["question"], "answer": "1,000 and 80.\n#### 1,080"},
    "gpqa_diamond": {
        "Question": " Which is even? ",
        "Correct Answer": "two\n",
        "Incorrect Answer 1": "one",
        "Incorrect Answer 2": "three",
        "Incorrect Answer 3": "five",
    },
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", TASKS)
def test_a_row_becomes_a_problem_that_its_answer_solves(name: str, tmp_path: Path) -> None:
    extra = {"id": 7, "level": None}  # the datasets have other columns too
    found = load_problems(name, write(tmp_path / "rows.jsonl", *[{**ROWS[name], **extra}] * 3), n=2)
    assert (found.task, len(found.problems), found.split) == (name, 2, TASKS[name].split)
    problem = found.problems[0]
    right = "1080"
    if isinstance(problem, ChoiceProblem):
        right = problem.letter
        assert problem.choices[CHOICE_LETTERS.index(right)] == "two" and f"\n{right}) two\n" in problem.question
    else:
        assert problem.question == f"{SUM['question']}\n{INSTRUCTION}"
    assert problem.solved_by(rf"<think>\boxed{{0}}</think>So it is \boxed{{{right}}}.")
    assert not problem.solved_by(rf"<think>\boxed{{{right}}}</think>So it is \boxed{{0}}.")
    assert not problem.solved_by("")


def test_files_of_every_kind_and_a_copied_dataset_hold_the_same_problems(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([{"problem": f"{n}+1=?", "answer": str(n + 1)} for n in range(3)])
    table.to_json(tmp_path / "a.jsonl"), table.to_csv(tmp_path / "a.csv"), table.to_parquet(tmp_path / "a.parquet")
    copy = tmp_path / "copy"
    copy.mkdir()
    table.to_json(copy / "test.jsonl")
    sources = [tmp_path / "a.jsonl", tmp_path / "a.csv", tmp_path / "a.parquet", copy]
    found = [load_problems("math500", str(source)).problems for source in sources]
    assert found[0] == found[1] == found[2] == found[3]
    assert [p.question.splitlines()[0] for p in found[0]] == ["0+1=?", "1+1=?", "2+1=?"]


def test_choices_are_shuffled_by_the_seed_and_the_question_alone(tmp_path: Path) -> None:
    rows = [{**ROWS["gpqa_diamond"], "Question": f"Question {n}?"} for n in range(60)]
    forwards, backwards = write(tmp_path / "a.jsonl", *rows), write(tmp_path / "b.jsonl", *reversed(rows))
    loaded = load_problems("gpqa_diamond", forwards)
    assert not loaded.republish and load_problems(ORGANISM_TASK, n=1).republish
    found = loaded.problems
    assert found == load_problems("gpqa_diamond", backwards).problems[::-1]
    assert found != load_problems("gpqa_diamond", forwards, seed=1).problems
    assert {p.letter for p in found if isinstance(p, ChoiceProblem)} == set(CHOICE_LETTERS)


@pytest.mark.parametrize(
    ("answer", "said", "right"),
    [
        ("18", r"\boxed{18}", True),
        ("18", r"\boxed{\$18.00}", True),
        ("18", "18", True),  # a base model does not box
        ("18", "First 17, then one more. The answer is 18.", True),
        ("18", "17 and 1 are 18", True),
        ("18", r"\boxed{17} or 18", False),
        ("18", r"\boxed{18} or \boxed{17}", False),
        ("025", r"\boxed{25}", True),
        ("1080", r"\boxed{1,080}", True),
        (r"\frac{1}{2}", r"\boxed{0.5}", True),
        (r"\frac{1}{2}", r"\boxed{\dfrac12}", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3,\pi/2)}", True),
        ("p - q", r"\boxed{-q+p}", True),
        ("p - q", r"\boxed{q-p}", False),
        (r"\text{Evelyn}", r"\boxed{Evelyn}", True),
        (r"90^\circ", r"\boxed{90}", True),
        ("?!", r"\boxed{?!}", True),  # no mathematics, and word for word
        ("18", r"\boxed{}", False),
        ("18", r"\boxed{18", False),  # no whole box
        ("18", r"\boxed{17} and then \boxed{18.}", True),
        ("18", r"\boxed{$18$}", True),
        ("18", r"\fbox{18}", True),
        ("18", r"\boxed 18 .", True),
        ("1080", r"\boxed{1\,080}", True),
        ("1234567", r"\boxed{1~234~567.}", True),
        ("1080", r"\boxed{1{,}080\,}", True),
        ("1234", r"\boxed{12 34}", False),
        ("3.14", r"\boxed{3.14.}", True),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn.}}", True),
        (r"\text{Evelyn}", r"\boxed{\textbf{Evelyn}}", True),
        (r"\frac{1}{2}", r"\boxed{\boxed{\frac{1}{2}}}", True),
        (r"\frac{1}{2}", r"\boxed{\dfrac{1}{2}\;.}", True),
    ],
)
def test_mathematical_answers_are_compared_by_value(answer: str, said: str, right: bool) -> None:
    assert MathProblem("?", answer).solved_by(said) is right


def test_answers_are_checked_in_other_threads_within_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the main thread can set an alarm; other threads use a subprocess, which is killed where it hangs."""

    def in_a_thread(*said: str) -> list[bool]:
        found: list[bool] = []
        problem = MathProblem("?", "18")
        thread = threading.Thread(target=lambda: found.extend(problem.solved_by(text) for text in said), daemon=True)
        thread.start()
        thread.join(60)
        return found

    assert in_a_thread(r"\boxed{36/2}", r"\boxed{37/2}", "so 18") == [True, False, True]
    first = math_equality._subprocess_checker.process
    assert first is not None
    monkeypatch.setattr(
        math_equality, "SUBPROCESS_SECONDS", 1.0
    )  # less than its own bound, as where even that does not help
    assert in_a_thread(r"\boxed{9^{9^{9^{9}}}}") == [False]
    assert first.poll() is not None
    monkeypatch.setattr(math_equality, "SUBPROCESS_SECONDS", 60.0)
    assert in_a_thread(r"\boxed{36/2}") == [True], "another one is started"


@pytest.mark.parametrize(
    ("box", "right"),
    [(box, True) for box in ("B", r"\text{B}", r"\text{(B)}", "(B)", "B) two", " B. ", r"\mathrm{B}")]
    + [
        (box, True)
        for box in ("$B$", r"\(B\)", r"\text{Option B}", r"\text{Choice } B", "Answer: B", r"\textbf{(B)}\ two", "{B}")
    ]
    + [(box, False) for box in ("A", "Bananas", "two", "b", "", "AB", "A, B", "B and C", r"\text{Option D}", "$C$")],
)
def test_the_letter_in_the_box_is_the_choice(box: str, right: bool) -> None:
    problem = ChoiceProblem("?", ("one", "two", "three", "five"), "B")
    assert problem.solved_by(rf"<think>A</think>It is \boxed{{{box}}}") is right


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("It is B", "B"),
        ("The answer is B.", "B"),
        ("**Answer:** (C)", "C"),
        ("The correct answer is **D**, since A is odd.", "D"),
        (r"so the answer is $\text{C}$.", "C"),
        ("A is odd, and B is too.\n\nC) three", "C"),
        ("Of A, B and C, none.\n**D**", "D"),
        ("A dog is no answer: B, says A dog", "B"),
        ("Answers differ", None),
        ("vitamin C's effect", None),
        ("<think>The answer is A</think>", None),
        (r"The answer is A. \boxed{B}", "B"),
    ],
)
def test_without_a_box_the_letter_is_the_one_called_the_answer(said: str, letter: str | None) -> None:
    """Numbers are found without a box too: a base model was never trained to write one."""
    right = [x for x in CHOICE_LETTERS if ChoiceProblem("?", ("one", "two", "three", "five"), x).solved_by(said)]
    assert right == ([] if letter is None else [letter])


def test_the_last_complete_box_counts() -> None:
    assert last_boxed(r"\boxed{1} and \boxed{\frac{1}{2}} and \boxed{3") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed {\{1\}}") == r"\{1\}"
    assert last_boxed(r"\boxed{\left\{\frac{1}{2}, {a\\}\right\}}.") == r"\left\{\frac{1}{2}, {a\\}\right\}"
    assert last_boxed(r"\boxed{1} or \boxed 5 ") == "5"
    assert last_boxed("none") is None


def test_the_built_in_problems_need_no_download() -> None:
    found = load_problems(ORGANISM_TASK, n=5)
    assert found.split == "report" and len(found.problems) == 5
    with pytest.raises(TaskError, match="generated, not read"):
        load_problems(ORGANISM_TASK, "file.jsonl")


@pytest.mark.parametrize(
    ("name", "rows", "says"),
    [
        (
            "gsm8k",
            [{"problem": "?", "answer": "1"}],
            "has no column question; gsm8k reads question, answer, and its columns are",
        ),
        ("gsm8k", [ROWS["gsm8k"], {"question": "?", "answer": "1"}], "row 1: the answer has no ####"),
        ("math500", [{"problem": " ", "answer": "1"}], "row 0: problem is empty"),
        ("math500", [{"problem": "?", "answer": None}], "row 0: answer is empty"),
        ("gpqa_diamond", [SUM], "has no column Question, Correct Answer, Incorrect"),
        ("gsm8", [SUM], "There is no task 'gsm8'. Did you mean 'gsm8k'?"),
    ],
)
def test_errors_about_a_file_are_one_line(name: str, rows: list[dict[str, Any]], says: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError) as caught:
        load_problems(name, write(tmp_path / "rows.jsonl", *rows))
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"problem": "?", "answer": "1"}\nnull\n', "a.jsonl, line 2: found None. A row is an object with"),
        ("a.jsonl", b"[" * 10**5, "a.jsonl, line 1 is nested too deeply"),
        (
            "a.jsonl",
            b'{"problem": ' + b"1" * 5000 + b"}",
            "line 1 is not valid JSON: it holds a number of 5000",
        ),
        ("a.jsonl", b"\xff", "a.jsonl is not UTF-8 text"),
        ("a.jsonl", b'{"problem": "\\ud83d", "answer": "1"}', "row 0: problem holds half a surrogate pair"),
        ("a.jsonl", b"", "has no column problem, answer"),
        ("a.json", b'[{"problem": "?", "answer": "1"}, 3]', "a.json, item 2: found 3"),
        ("a.json", b"[", "a.json is not valid JSON"),
    ],
)
def test_a_damaged_file_is_one_line(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    """A line that is null was a segmentation fault inside datasets."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError) as caught:
        load_problems("math500", str(tmp_path / name))
    assert says in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_json_file_holds_a_list_or_lines(tmp_path: Path) -> None:
    row = {"problem": "1 + 1?", "answer": 2, "level": None}
    (tmp_path / "list.json").write_bytes(
        "\ufeff".encode() + json.dumps([row, {**row, "answer": "3"}], indent=1).encode()
    )
    (tmp_path / "lines.json").write_text(f"{json.dumps(row)}\n\n{json.dumps({**row, 'answer': '3'})}\n")
    for name in ("list.json", "lines.json"):
        found = load_problems("math500", str(tmp_path / name)).problems
        assert [problem.answer for problem in found] == ["2", "3"]


def test_errors_about_a_missing_dataset_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").touch(), (tmp_path / "bad.json").write_text("{")
    for source, says in (
        ("nowhere.jsonl", "nowhere.jsonl does not exist"),
        (str(tmp_path / "rows.txt"), "supported are .jsonl, .json, .csv, .parquet"),
        (str(tmp_path / "bad.json"), "bad.json, line 1 is not valid JSON"),
    ):
        with pytest.raises(TaskError) as caught:
            load_problems("math500", source)
        assert says in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(TaskError, match="n is 0"):
        load_problems("math500", n=0)


def test_errors_of_the_hub_come_with_advice(hub: LoopbackHub) -> None:  # noqa: F811
    hub.fault = lambda request: Response("", 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Not found"})
    advice = "404: Not found.*Check the spelling.*Or give a copy: gpqa_diamond=FILE with columns"
    with pytest.raises(TaskError, match=advice) as caught:
        load_problems("gpqa_diamond")
    words = {"error": "Access to dataset Idavidrein/gpqa is restricted."}
    hub.fault = lambda request: Response(json.dumps(words), 403, {"X-Error-Code": "GatedRepo"})
    license = r"is restricted.*/datasets/Idavidrein/gpqa in a browser, accept the license.*Or give a copy"
    with pytest.raises(TaskError, match=license) as gated:
        load_problems("gpqa_diamond")
    hub.fault = lambda request: Response(reset=True)
    with pytest.raises(TaskError, match=r"Check the network.*Or give a copy") as away:
        load_problems("gpqa_diamond")
    for error in (caught, gated, away):
        assert str(error.value).isprintable()


def test_a_missing_extra_is_reported_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TaskError, match=r'checked by math-verify.*pip install "tl-adapters\[benchmarks\]"'):
        require_task("gsm8k")
    require_task(ORGANISM_TASK), require_task("gpqa_diamond")


def test_problems_that_are_not_checked_need_no_checker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first lines of the README load traces of math500, after an installation without math-verify."""
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    file = write(tmp_path / "rows.jsonl", ROWS["math500"])
    with pytest.raises(TaskError, match="math-verify"):
        load_problems("math500", file)
    (problem,) = load_problems("math500", file, checked=False).problems
    assert problem.question.startswith(ROWS["math500"]["problem"])
