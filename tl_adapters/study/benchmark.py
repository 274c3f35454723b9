"""A run's pair on tasks: which variant of it answers, and what is written into the run's results.json.

A variant is a route, the replacement without some features, or the hybrid with only some. Every task and variant has
a folder of answers of its own (see answering.py), so one command after another fills a table.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.config import Dtype, RunConfig
from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.data.hesitation_words import HESITATION_RATE_WORDS
from tl_adapters.errors import UserError
from tl_adapters.evaluation.behaviors import Behavior
from tl_adapters.evaluation.sampled_answers import Sampling, Score, answer, score
from tl_adapters.evaluation.tasks import BUILTIN, TASKS, load_problems, require_task
from tl_adapters.generation.generation_config import LONGEST_ANSWER, end_tokens
from tl_adapters.interventions.variants import MAX_LISTED_FEATURES, Variant, on_route, with_only, without
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.models.routed_mlp import ROUTES
from tl_adapters.study.open_run import is_builtin, open_run, require_adapters
from tl_adapters.utils.results import plain, read_results, write_results

log = logging.getLogger(__name__)

BENCHMARKS_FOLDER = "benchmarks"
"""Folder of answers within a run, and block of its results.json."""


class BenchmarkError(UserError, ValueError):
    """Tasks, or a variant, that a run cannot be measured on."""


@dataclass(frozen=True)
class Measured:
    """One task, measured."""

    task: str
    """Its name."""
    variant: str
    """Who answered."""
    score: Score
    """What came out."""
    folder: Path
    """Where the answers are."""
    sampling: Sampling
    """How it was answered, with nothing left open."""


@dataclass(frozen=True)
class Answerer:
    """Who answers: a route, the replacement without some features, or the hybrid with only some."""

    route: str = "replacement"
    """A route of `routing.ROUTES`."""
    ablate: tuple[FeatureId, ...] = ()
    """Features taken out; only of the replacement."""
    insert: tuple[FeatureId, ...] = ()
    """The only features there are; only on the hybrid."""
    strength: float = 1.0
    """How strongly they fire there, such as a circuit's ``strength``."""

    def __post_init__(self) -> None:
        for name, route in (("ablate", "replacement"), ("insert", "hybrid")):
            if getattr(self, name) and (self.route != route or (self.ablate and self.insert)):
                raise BenchmarkError(
                    f"Features to {name} go with the route {route} alone; got the route {self.route}"
                    f"{' and features for both' if self.ablate and self.insert else ''}."
                )
        if self.route not in ROUTES:
            raise BenchmarkError(f"No route is called {self.route!r}; known are {', '.join(ROUTES)}.")

    @property
    def variant(self) -> Variant:
        """What to enter, under a name that no other set of features has."""
        features = sorted({*self.ablate, *self.insert})
        if not features:
            return on_route(self.route)
        found = without(features) if self.ablate else with_only(features, self.strength)
        digest = hashlib.sha256(repr([tuple(feature) for feature in features]).encode()).hexdigest()[:8]
        return found if len(features) <= MAX_LISTED_FEATURES else replace(found, name=f"{found.name} ({digest})")

    def as_record(self) -> dict[str, Any]:
        """As settings hold it."""
        named = {"ablate": self.ablate, "insert": self.insert}
        return {
            "route": self.route,
            "strength": self.strength,
            **{k: [f"{f.layer}.{f.index}" for f in sorted(v)] for k, v in named.items()},
        }


def benchmark_run(
    run: Path,
    tasks: Mapping[str, str | None] | None = None,
    answerer: Answerer | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    open_thinking: bool = False,
    limit: int | None = None,
    words: Sequence[str] | Behavior = HESITATION_RATE_WORDS,
    out: Path | None = None,
    device: str = "auto",
    dtype: Dtype | None = None,
    progress: bool = True,
) -> list[Measured]:
    """Measure a run's pair on tasks and add them to the block benchmarks of its results.json.

    Args:
        run: a folder that train or demo made.
        tasks: name to a local copy, or None for the hub's; by default the built-in problems, for the built-in pair.
        answerer: who answers; by default the replacement.
        options: fields of `Sampling` that are to differ from the task's and the model's: the built-in problems are
            answered greedily, tasks of the hub as generation_config.json says and in up to `LONGEST_ANSWER` tokens.
        open_thinking: make the model begin with the tag that opens the thinking, where the template does not.
        limit: the first so many problems of each task.
        words: what counts as a hesitation: words and phrases, or a behavior (a function may find it).
        out: folder of the answers; ``benchmarks`` in the run by default. What is there already is not asked again.
        device: where the models go; "auto" is the first there is of cuda, mps and cpu.
        dtype: of the models; the run's by default.
        progress: show bars.

    Raises BenchmarkError, TaskError, AnsweringError, and what opening a run raises.
    """
    require_adapters(run)
    if tasks is None:
        if not is_builtin(run):
            raise BenchmarkError(f"Name tasks to measure on (--tasks); known are {', '.join((BUILTIN, *TASKS))}.")
        tasks = {BUILTIN: None}
    samplings = {name: _sampling(name, options or {}) for name in tasks}
    for name in tasks:
        require_task(name)
    who = answerer or Answerer()
    loaded = [load_problems(name, source, limit=limit, seed=samplings[name].seed) for name, source in tasks.items()]
    pair = open_run(run, device, dtype)
    about = {"variant": who.variant.name, **who.as_record(), **_model(pair)}
    prefill = _opening(run, pair) if open_thinking else ""
    measured = []
    for task in loaded:
        folder = (out or run / BENCHMARKS_FOLDER) / task.task / _slug(who.variant.name)
        sampling = replace(samplings[task.task], prefill=prefill).chosen(pair.model, task.problems)
        facts = {"task": task.task, "source": task.source, "split": task.split, **about}
        log.info("%s: %s, %s", task.task, who.variant.name, sampling.decoding)
        with who.variant.entered(pair) as model:
            answers = answer(model, task.problems, sampling, folder, facts, progress)
        found = score(answers, task.split, words)
        settings = {**facts, **asdict(sampling), "ends": end_tokens(pair.model)}
        _add(run, task.task, who.variant.name, {**plain(found), "settings": settings})
        measured.append(Measured(task.task, who.variant.name, found, folder, sampling))
    return measured


def _sampling(task: str, options: Mapping[str, Any]) -> Sampling:
    own: dict[str, Any] = {"temperature": 0.0} if task == BUILTIN else {"max_new_tokens": LONGEST_ANSWER}
    return Sampling(**{**own, **options})


def _model(pair: PairedModel) -> dict[str, Any]:
    fingerprints = {**pair.fingerprints, "adapters": pair.installed_adapters().fingerprint}
    return {"dtype": str(pair.model.cfg.dtype).removeprefix("torch."), "fingerprints": fingerprints}


def _opening(run: Path, pair: PairedModel) -> str:
    data = RunConfig.load(run / "config.json").data
    chat = ChatFormat.of(pair.model.tokenizer, data.think_start, data.think_end)
    return "" if chat.opens_thinking else chat.think_start


def _slug(name: str) -> str:
    return re.sub(r"[^\w.+]+", "-", name).strip("-")


def _add(run: Path, task: str, variant: str, block: Mapping[str, Any]) -> None:
    found = read_results(run).get(BENCHMARKS_FOLDER, {})
    write_results(run, **{BENCHMARKS_FOLDER: {**found, task: {**found.get(task, {}), variant: block}}})
