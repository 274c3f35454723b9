"""Problems answered by a model as it is: drawn answers kept batch by batch, and figures with intervals over problems.

1. Problems are grouped by length into batches; each batch is answered once for every sample.
2. Every answer draws from a generator that only the seed, the sample and the problem's number determine.
3. Its answers are on the disk, whole, before the next batch begins. So a run that was stopped goes on after its last
   whole batch, and has in the end the very answers of one never stopped; more samples can be added to it later.
4. pass@1 is the mean over problems of the share of right answers; intervals are over problems.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, cycle
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tl_adapters.data.hesitation_words import HESITATION_RATE_WORDS
from tl_adapters.errors import UserError
from tl_adapters.evaluation.behaviors import Behavior
from tl_adapters.evaluation.response_metrics import rate
from tl_adapters.generation.decoding import CompletionError, Decoding
from tl_adapters.generation.generation_config import decoding_of, end_tokens
from tl_adapters.generation.responses import Checkable, Response, answer_limit, respond, rows_at_once
from tl_adapters.utils.files import alone_in, room_for, write_text
from tl_adapters.utils.measurement import Interval
from tl_adapters.utils.strict_json import dumps

SETTINGS, ANSWERS = "settings.json", "answers.jsonl"


class AnsweringError(UserError, ValueError):
    """Options that cannot be used, or answers that were begun with others."""


@dataclass(frozen=True)
class Sampling:
    """How problems are answered. What is None is taken from the problems and the model (`Sampling.chosen`)."""

    samples: int = 1
    """Answers to each problem."""
    temperature: float | None = None
    """0 takes the likeliest token; None is generation_config.json's (DeepSeek-R1's authors use 0.6)."""
    top_p: float | None = None
    """Drawn are only the likeliest tokens that hold so much probability; None likewise (they use 0.95)."""
    top_k: int | None = None
    """Drawn are only so many of the likeliest tokens, 0 is all; None likewise."""
    max_new_tokens: int | None = None
    """Longest answer, one that is cut there is wrong; None is what the problems or else the model name
    (`benchmarks.answer_limit`)."""
    batch_size: int | None = None
    """Problems at a time; None is as many as such long answers leave room for (`benchmarks.rows_at_once`)."""
    seed: int = 0
    """Of everything drawn."""
    prefill: str = ""
    """What the model is made to begin with."""

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise AnsweringError(f"{name} is {value}; allowed is a whole number >= 1.")
        try:
            _ = self.decoding
        except CompletionError as error:
            raise AnsweringError(str(error)) from error
        if self.temperature == 0 and self.samples > 1:
            raise AnsweringError(f"At temperature 0 all {self.samples} samples are one; give a temperature above 0.")

    @property
    def decoding(self) -> Decoding:
        """How tokens are chosen, greedy where that is open."""
        return Decoding(self.temperature or 0.0, 1.0 if self.top_p is None else self.top_p, self.top_k or 0)

    def chosen(self, model: Any, problems: Sequence[Checkable]) -> Sampling:
        """These, with nothing left open: what is None is what the problems and the model say.

        Raises AnsweringError for several samples of a model that answers greedily.
        """
        limit = answer_limit(model, problems) if self.max_new_tokens is None else self.max_new_tokens
        how = decoding_of(model, self.temperature, self.top_p, self.top_k)
        return replace(
            self,
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=how.top_k,
            max_new_tokens=limit,
            batch_size=self.batch_size or rows_at_once(limit),
        )


@dataclass(frozen=True)
class Answer:
    """One answer to one problem."""

    problem: int
    """Its number, in the order of the dataset."""
    sample: int
    """Which of its answers, from 0."""
    response: Response
    """What the model said."""


@dataclass(frozen=True)
class Score:
    """What one model makes of one task."""

    n: int
    """Problems."""
    samples: int
    """Answers to each."""
    pass_at_1: float
    """Mean over problems of the share of right answers."""
    length: float
    """Mean response length in tokens."""
    hesitation_per_1k: float | None
    """Hesitations per 1,000 response tokens; None where no response has a token."""
    truncated: float
    """Share of responses cut at the limit."""
    think_opened: float
    """Share of responses that open their thinking themselves."""
    ci: dict[str, Interval]
    """Intervals of all five."""
    words: tuple[str, ...]
    """What counts as a hesitation: words and phrases, or the name of the function that finds it."""
    split: str
    """Split of the problems."""
    looping: float = 0.0
    """Share of responses that were cut while they said one block of tokens again and again."""
    near_ties_per_1k: float = 0.0
    """Per 1,000 response tokens, those whose choice was closer than rounding."""


def score(answers: Sequence[Answer], split: str, words: Sequence[str] | Behavior = HESITATION_RATE_WORDS) -> Score:
    """Summarise answers, with intervals over problems; hesitations are the words, or what a behavior counts."""
    found = rate([a.response for a in answers], split, words, [a.problem for a in answers])
    return Score(
        n=found.n,
        samples=len(answers) // found.n,
        pass_at_1=found.accuracy,
        length=found.length,
        hesitation_per_1k=found.hesitation_per_1k,
        truncated=found.truncated,
        think_opened=found.think_opened,
        ci={"pass_at_1" if name == "accuracy" else name: interval for name, interval in found.ci.items()},
        words=words.counted if isinstance(words, Behavior) else tuple(words),
        split=split,
        looping=found.looping,
        near_ties_per_1k=found.near_ties_per_1k,
    )


def answer(
    model: Any,
    problems: Sequence[Checkable],
    sampling: Sampling,
    folder: str | Path,
    about: Mapping[str, Any],
    progress: bool = True,
) -> list[Answer]:
    """Answers to all problems, with whatever route and hooks the model has now; sample by sample.

    Args:
        model: a HookedTransformer or TransformerBridge with its tokenizer.
        problems: not none.
        sampling: how they are answered.
        folder: settings.json and answers.jsonl are kept here; what an earlier run has answered is taken from there.
        about: what the model is now, as JSON can hold it. An earlier run must have been the same.
        progress: show a bar.

    Raises AnsweringError where the folder holds answers of other problems, options or models; FolderBusyError where
    another process is at work in it; DiskFullError.
    """
    folder, sampling = Path(folder), sampling.chosen(model, problems)
    batches = _batches(problems, sampling.batch_size)
    todo = [(sample, number) for sample in range(sampling.samples) for number in range(len(batches))]
    options = {name: value for name, value in asdict(sampling).items() if name != "samples"}  # more can come later
    asked = hashlib.sha256("\0".join(problem.question for problem in problems).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        facts = {**about, "n": len(problems), "problems": asked, **options, "ends": end_tokens(model)}
        _require_same(folder / SETTINGS, facts)
        found = _kept(folder / ANSWERS, [len(batch) for batch in batches])
        done = min(len(found), len(todo))
        for sample, number in tqdm(todo[done:], initial=done, total=len(todo), disable=not progress, unit="batch"):
            said = respond(
                model,
                [problems[i] for i in batches[number]],
                max_new_tokens=sampling.max_new_tokens,
                batch_size=sampling.batch_size,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=sampling.seed,
                keys=[(i, sample) for i in batches[number]],
                prefill=sampling.prefill,
            )
            batch = [Answer(i, sample, response) for i, response in zip(batches[number], said, strict=True)]
            _append(folder / ANSWERS, [_as_record(one, problems[one.problem].question) for one in batch])
            found.append(batch)
    return list(chain(*found[: len(todo)]))


def _batches(problems: Sequence[Checkable], batch_size: int | None) -> list[list[int]]:
    """Numbers of the problems, the shortest first, so that little is padding."""
    batch_size = batch_size or len(problems)
    order = sorted(range(len(problems)), key=lambda i: len(problems[i].question))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _require_same(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings, or compare them with those that are there."""
    now = json.loads(json.dumps(settings))
    if not path.is_file():
        write_text(path, dumps(now, indent=1) + "\n")
        return
    was = json.loads(path.read_text(encoding="utf-8"))
    if other := [name for name in {**was, **now} if was.get(name) != now.get(name)]:
        raise AnsweringError(
            f"{path.parent} holds answers with {other[0]} {was.get(other[0])!r}, and now it is {now.get(other[0])!r}. "
            "Give the same, or another folder (--out)."
        )


def _as_record(one: Answer, question: str) -> dict[str, Any]:
    response = asdict(one.response)
    text, correct, truncated = (response.pop(name) for name in ("text", "correct", "truncated"))
    facts = {"problem": one.problem, "sample": one.sample, "correct": correct, "truncated": truncated}
    return {**facts, "question": question, "text": text, **response}


def _from_record(record: Mapping[str, Any]) -> Answer:
    said = Response(
        tuple(record["prompt"]),
        tuple(record["tokens"]),
        record["text"],
        record["truncated"],
        record["correct"],
        record.get("end"),  # not there in answers of the first release
        record.get("near_ties", 0),
    )
    return Answer(record["problem"], record["sample"], said)


def _append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add lines, and return when they are on the disk. Raises DiskFullError."""
    with room_for(path), path.open("a", encoding="utf-8") as file:
        file.write("".join(dumps(record) + "\n" for record in records))
        file.flush()
        os.fsync(file.fileno())


def _kept(path: Path, sizes: Sequence[int]) -> list[list[Answer]]:
    """The whole batches that are there; what a killed process left of another is cut off."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    answers: list[Answer] = []
    for line in lines:
        try:
            answers.append(_from_record(json.loads(line)))
        except (ValueError, KeyError):
            break
    batches, n = [], 0
    for size in cycle(sizes):
        if n + size > len(answers):
            break
        batches.append(answers[n : n + size])
        n += size
    write_text(path, "".join(line + "\n" for line in lines[:n]))
    return batches
