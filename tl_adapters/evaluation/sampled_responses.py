"""Responses sampled several times per problem, written to disk batch by batch, and the score of a task from them.

1. Problems are grouped by length into batches; each batch is completed once for every sample.
2. Every response draws from a generator that only the seed, the sample and the problem's number determine.
3. The responses of a batch are on disk before the next batch starts. A run that was stopped therefore continues after
   its last whole batch and ends with the same responses as one that was never stopped; samples can be added later.
4. pass@1 is the mean over problems of the share of right answers; intervals are over problems.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from pydantic import Field
from tqdm import tqdm

from tl_adapters.data.hesitation_words import HESITATION_RATE_WORDS
from tl_adapters.errors import UserError
from tl_adapters.evaluation.behaviors import Behavior, GivenBehavior
from tl_adapters.evaluation.response_metrics import measure_responses
from tl_adapters.generation.completions import default_batch_size
from tl_adapters.generation.generation_config import end_tokens, sampling_parameters
from tl_adapters.generation.responses import Checkable, Response, respond, response_limit
from tl_adapters.generation.sampling import GenerationError, SamplingParameters
from tl_adapters.utils.files import alone_in, append_text, make_folder, write_text
from tl_adapters.utils.measurement import Interval, Measurement
from tl_adapters.utils.notebook import ResultRecord
from tl_adapters.utils.reading import Record, read_json_object, read_record_lines, read_text, shown, unreadable_as
from tl_adapters.utils.strict_json import dumps

RESPONSE_SETTINGS_FILE = "settings.json"
RESPONSES_FILE = "answers.jsonl"


class SamplingError(UserError, ValueError):
    """Options that cannot be used, or a folder whose responses were sampled with other options."""


@dataclass(frozen=True)
class ResponseOptions:
    """How responses are sampled. Options that are None come from the problems and the model (`resolved`)."""

    samples: int = 1
    """Responses to each problem."""
    temperature: float | None = None
    """As in `SamplingParameters`; None is the value of generation_config.json (DeepSeek-R1's authors use 0.6)."""
    top_p: float | None = None
    """As in `SamplingParameters`; None is the value of generation_config.json (DeepSeek-R1's authors use 0.95)."""
    top_k: int | None = None
    """As in `SamplingParameters`; None is the value of generation_config.json."""
    max_new_tokens: int | None = None
    """Limit of a response; None is the limit of the problems or else of the model (`responses.response_limit`)."""
    batch_size: int | None = None
    """Problems per batch; None is `completions.default_batch_size`."""
    seed: int = 0
    """Seed of all random numbers."""
    prefill: str = ""
    """Text with which every response is made to begin."""

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SamplingError(f"{name} is {value}; it must be a whole number >= 1.")
        try:
            _ = self.parameters
        except GenerationError as error:
            raise SamplingError(str(error)) from error
        if self.temperature == 0 and self.samples > 1:
            raise SamplingError(
                f"At temperature 0 all {self.samples} samples are equal; set a temperature above 0, or samples to 1."
            )

    @property
    def parameters(self) -> SamplingParameters:
        """Temperature, top_p and top_k, with the defaults of greedy decoding for those that are None."""
        return SamplingParameters(self.temperature or 0.0, 1.0 if self.top_p is None else self.top_p, self.top_k or 0)

    def resolved(self, model: Any, problems: Sequence[Checkable]) -> ResponseOptions:
        """These options with every None replaced by the value of the problems or the model.

        Raises SamplingError for several samples of a model that decodes greedily.
        """
        limit = response_limit(model, problems) if self.max_new_tokens is None else self.max_new_tokens
        parameters = sampling_parameters(model, self.temperature, self.top_p, self.top_k)
        return replace(
            self,
            **asdict(parameters),
            max_new_tokens=limit,
            batch_size=self.batch_size or default_batch_size(limit),
        )


@dataclass(frozen=True)
class SampledResponse:
    """One of the responses to one problem."""

    problem: int
    """Number of the problem, in the order of the dataset."""
    sample: int
    """Number of the sample, from 0."""
    response: Response
    """The response."""


@dataclass(frozen=True)
class TaskScore(ResultRecord):
    """The score of one model on one task."""

    n: int
    """Number of problems."""
    samples: int
    """Responses to each problem."""
    pass_at_1: float
    """Mean over problems of the share of right answers."""
    length: float
    """Mean response length in tokens."""
    hesitation_per_1k: float | None
    """Hesitations per 1,000 response tokens; None where no response has a token."""
    truncated: float
    """Share of responses that were cut at the limit."""
    think_opened: float
    """Share of responses that open their thinking themselves."""
    ci: dict[str, Interval]
    """Intervals of the five metrics above."""
    words: tuple[str, ...]
    """What counts as a hesitation: words and phrases, or the name of the function that finds it."""
    split: str
    """Split of the problems."""
    looping: float = 0.0
    """Share of responses that were cut at the limit and end in one block of tokens again and again."""
    near_ties_per_1k: float = 0.0
    """Tokens per 1,000 response tokens whose choice was closer than rounding."""

    def row(self) -> dict[str, Any]:
        """The numbers of problems and samples, and the metrics with their intervals."""
        metrics = {
            name: Measurement(getattr(self, name), of.low, of.high, self.n, "", self.split, reason=of.reason)
            for name, of in self.ci.items()
        }
        return {"n": self.n, "samples": self.samples, **metrics, "looping": self.looping}


def score_responses(
    sampled: Sequence[SampledResponse], split: str, behavior: GivenBehavior = HESITATION_RATE_WORDS
) -> TaskScore:
    """The score from all samples of a task; hesitations are what a behavior counts (`Behavior.of`)."""
    behavior = Behavior.of(behavior)
    metrics = measure_responses([s.response for s in sampled], split, behavior, [s.problem for s in sampled])
    return TaskScore(
        n=metrics.n,
        samples=len(sampled) // metrics.n,
        pass_at_1=metrics.accuracy,
        length=metrics.length,
        hesitation_per_1k=metrics.hesitation_per_1k,
        truncated=metrics.truncated,
        think_opened=metrics.think_opened,
        ci={"pass_at_1" if name == "accuracy" else name: interval for name, interval in metrics.ci.items()},
        words=behavior.counted,
        split=split,
        looping=metrics.looping,
        near_ties_per_1k=metrics.near_ties_per_1k,
    )


def sample_responses(
    model: Any,
    problems: Sequence[Checkable],
    options: ResponseOptions,
    folder: str | Path,
    description: Mapping[str, Any],
    progress: bool = True,
) -> list[SampledResponse]:
    """Responses to all problems with the model's current route and hooks, ordered by sample.

    Args:
        model: a HookedTransformer or TransformerBridge with its tokenizer.
        problems: at least one.
        options: how responses are sampled.
        folder: holds settings.json and answers.jsonl; responses that an earlier run has written are read from there.
        description: identifies the model and its interventions, in values that JSON can hold; an earlier run in the
            folder must have had the same.
        progress: show a progress bar.

    Raises SamplingError where the folder holds responses to other problems, with other options or of another model;
    FolderBusyError where another process is writing to it; DiskFullError.
    """
    folder, options = Path(folder), options.resolved(model, problems)
    batches = _batches(problems, options.batch_size)
    todo = [(sample, number) for sample in range(options.samples) for number in range(len(batches))]
    settings = {**description, **_problem_settings(problems, options), "ends": end_tokens(model)}
    make_folder(folder)
    with alone_in(folder):
        _require_same(folder / RESPONSE_SETTINGS_FILE, settings)
        finished = _whole_batches(folder / RESPONSES_FILE, batches)
        done = min(len(finished), len(todo))
        for sample, number in tqdm(todo[done:], initial=done, total=len(todo), disable=not progress, unit="batch"):
            batch = _sample_batch(model, problems, batches[number], sample, options)
            records = [_as_record(one, problems[one.problem].question) for one in batch]
            append_text(folder / RESPONSES_FILE, "".join(dumps(record) + "\n" for record in records))
            finished.append(batch)
    return list(chain(*finished[: len(todo)]))


def _sample_batch(
    model: Any, problems: Sequence[Checkable], numbers: Sequence[int], sample: int, options: ResponseOptions
) -> list[SampledResponse]:
    responses = respond(
        model,
        [problems[i] for i in numbers],
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
        keys=[(i, sample) for i in numbers],
        prefill=options.prefill,
    )
    return [SampledResponse(i, sample, response) for i, response in zip(numbers, responses, strict=True)]


def _batches(problems: Sequence[Checkable], batch_size: int | None) -> list[list[int]]:
    """Numbers of the problems of each batch, the shortest first, so that little is padding."""
    batch_size = batch_size or len(problems)
    order = sorted(range(len(problems)), key=lambda i: len(problems[i].question))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _problem_settings(problems: Sequence[Checkable], options: ResponseOptions) -> dict[str, Any]:
    """The problems and the options, without the number of samples, to which more can be added later."""
    digest = hashlib.sha256("\0".join(problem.question for problem in problems).encode()).hexdigest()[:16]
    fixed = {name: value for name, value in asdict(options).items() if name != "samples"}
    return {"n": len(problems), "problems": digest, **fixed}


def _require_same(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings, or compare them with those of an earlier run."""
    current = json.loads(json.dumps(settings))
    if not path.is_file():
        write_text(path, dumps(current, indent=1) + "\n")
        return
    advice = "Use another folder (--out), or remove the file and the responses beside it."
    with unreadable_as(SamplingError):
        earlier = read_json_object(path, advice)
    if different := [name for name in {**earlier, **current} if earlier.get(name) != current.get(name)]:
        name = different[0]
        raise SamplingError(
            f"{path.parent} holds responses with {name[:60]} {shown(earlier.get(name))}, and now it is "
            f"{shown(current.get(name))}. "
            "Use the same settings, or another folder (--out)."
        )


def _as_record(sampled: SampledResponse, question: str) -> dict[str, Any]:
    response = asdict(sampled.response)
    text, correct, truncated = (response.pop(name) for name in ("text", "correct", "truncated"))
    facts = {"problem": sampled.problem, "sample": sampled.sample, "correct": correct, "truncated": truncated}
    return {**facts, "question": question, "text": text, **response}


class _ResponseRecord(Record):
    """A line of answers.jsonl."""

    problem: int = Field(ge=0)
    sample: int = Field(ge=0)
    correct: bool
    truncated: bool
    question: str
    text: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    end: int | None = None
    """Missing in files of the first release, as is the next key."""
    near_ties: int = 0

    @property
    def sampled(self) -> SampledResponse:
        """The response."""
        about = Response(
            self.prompt, self.tokens, self.text, self.truncated, self.correct, end=self.end, near_ties=self.near_ties
        )
        return SampledResponse(self.problem, self.sample, about)


def _whole_batches(path: Path, batches: Sequence[Sequence[int]]) -> list[list[SampledResponse]]:
    """The whole batches of the file; an incomplete batch, which a killed process left, is removed from it.

    Args:
        path: answers.jsonl.
        batches: numbers of the problems of each batch of a sample.

    Raises SamplingError for a damaged line before the last, and for responses to other problems than these.
    """
    if not path.is_file():
        return []
    advice = "Copy the file again, or use another folder (--out); responses before a damaged line can be kept by hand."
    with unreadable_as(SamplingError):
        lines = [line for line in read_text(path, advice).split("\n") if line.strip()]
        records = read_record_lines(_ResponseRecord, path, advice, partial_end=True)
    finished: list[list[SampledResponse]] = []
    n = 0
    for sample in count():
        for numbers in batches:
            whole = records[n : n + len(numbers)]
            if len(whole) < len(numbers):
                write_text(path, "".join(line + "\n" for line in lines[:n]))
                return finished
            if [(record.sample, record.problem) for record in whole] != [(sample, number) for number in numbers]:
                raise SamplingError(
                    f"{path}: lines {n + 1} to {n + len(numbers)} should hold sample {sample} of the problems "
                    f"{shown(list(numbers))}, and hold others. {advice}"
                )
            finished.append([record.sampled for record in whole])
            n += len(numbers)
    raise AssertionError("the loop over samples has no end")
