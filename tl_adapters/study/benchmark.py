"""Benchmarks as a stage of a study: a variant of the pair answers tasks, and results.json gets the scores.

A variant is a route, the replacement without some features, or the hybrid with only some features. The answers of each
task and variant have a folder of their own (`sampled_responses`), so successive commands fill one table.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.config import RunConfig
from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.errors import UserError
from tl_adapters.evaluation.behaviors import Behavior, GivenBehavior
from tl_adapters.evaluation.sampled_responses import ResponseOptions, TaskScore, sample_responses, score_responses
from tl_adapters.evaluation.tasks import ORGANISM_TASK, TASKS, load_problems, require_task
from tl_adapters.generation.generation_config import DEFAULT_MAX_NEW_TOKENS, end_tokens
from tl_adapters.interop.vllm_run import opened_engine
from tl_adapters.interventions.variants import Variant, on_route, with_only, without
from tl_adapters.models.routed_mlp import ROUTES
from tl_adapters.study.open_run import is_organism_run, open_run, require_adapters, set_run_date
from tl_adapters.utils.devices import GivenDevice, GivenDtype
from tl_adapters.utils.files import require_writable
from tl_adapters.utils.notebook import RecordTable, ResultRecord
from tl_adapters.utils.renamed import renamed_arguments
from tl_adapters.utils.results import changed_results, plain

log = logging.getLogger(__name__)

BENCHMARKS_FOLDER = "benchmarks"
"""Name of the folder of answers in a run, and of the block in its results.json."""


class BenchmarkError(UserError, ValueError):
    """Tasks or a variant on which a run cannot be measured."""


@dataclass(frozen=True)
class BenchmarkResult(ResultRecord):
    """The score of one variant on one task."""

    task: str
    """Name of the task."""
    variant: str
    """Name of the variant that answered."""
    score: TaskScore
    """Accuracy, length and hesitation rate of the answers."""
    folder: Path
    """Folder of the answers."""
    sampling: ResponseOptions
    """Options of the answers, all of them resolved."""

    def row(self) -> dict[str, Any]:
        """The names, and the figures of the score."""
        return {"task": self.task, "variant": self.variant, **self.score.row()}

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**super().to_dict(), "folder": str(self.folder)}


@dataclass(frozen=True)
class BenchmarkVariant:
    """Which variant answers: a route, the replacement without some features, or the hybrid with only some features.

    Raises BenchmarkError for an unknown route, and for features that need another one.
    """

    route: str = "replacement"
    """A route of `models.routed_mlp.ROUTES`."""
    ablate: tuple[FeatureId, ...] = ()
    """Features to ablate; with the route replacement only."""
    insert: tuple[FeatureId, ...] = ()
    """Features to insert as the only ones; with the route hybrid only."""
    strength: float = 1.0
    """Factor on the inserted features' activations, such as a circuit's ``strength``."""

    def __post_init__(self) -> None:
        for name, route in (("ablate", "replacement"), ("insert", "hybrid")):
            if getattr(self, name) and (self.route != route or (self.ablate and self.insert)):
                raise BenchmarkError(
                    f"Features to {name} need the route {route}; got the route {self.route}"
                    f"{' and features to ablate and to insert' if self.ablate and self.insert else ''}."
                )
        if self.route not in ROUTES:
            raise BenchmarkError(f"There is no route {self.route!r}; the routes are {', '.join(ROUTES)}.")

    @property
    def variant(self) -> Variant:
        """The variant to enter; its name is unique to its set of features."""
        if self.ablate:
            return without(sorted({*self.ablate})).named_apart()
        if self.insert:
            return with_only(sorted({*self.insert}), self.strength).named_apart()
        return on_route(self.route)

    def as_record(self) -> dict[str, Any]:
        """The record that the settings of the answers hold."""
        named = {"ablate": self.ablate, "insert": self.insert}
        return {
            "route": self.route,
            "strength": self.strength,
            **{k: [f"{f.layer}.{f.index}" for f in sorted(v)] for k, v in named.items()},
        }


@renamed_arguments(words="behavior", limit="n")
def benchmark_run(
    run: str | Path,
    tasks: Mapping[str, str | None] | None = None,
    variant: BenchmarkVariant | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    open_thinking: bool = False,
    n: int | None = None,
    behavior: GivenBehavior = None,
    out: str | Path | None = None,
    engine: str | None = None,
    device: GivenDevice = None,
    dtype: GivenDtype | None = None,
    progress: bool = True,
) -> RecordTable[BenchmarkResult]:
    """Measures a run's pair on tasks and adds the scores to the block benchmarks of its results.json.

    Args:
        run: folder of a run that train or demo made.
        tasks: name of each task -> a local copy of its dataset, or None for the hub's. By default the built-in problems
            of the model organism.
        variant: which variant answers; by default the replacement.
        options: fields of `ResponseOptions` that override the defaults. The built-in problems are answered greedily;
            tasks of the hub are answered as generation_config.json says, in up to `DEFAULT_MAX_NEW_TOKENS` tokens.
        open_thinking: end the prompt with the tag that opens the thinking, where the template does not.
        n: use only the first ``n`` problems of each task; None is all.
        behavior: what counts as a hesitation: a `Behavior`, a word or phrase, or several; None is hesitation.
        out: folder of the answers, by default ``benchmarks`` in the run. Answers that are there already are kept.
        engine: None is our own, "vllm" vLLM in this process, and an address a `vllm serve`.
        device, dtype: of the models, as in `load`.
        progress: show progress bars.

    Raises BenchmarkError, TaskError, SamplingError, VllmError, and what opening a run raises.
    """
    run, behavior = Path(run), Behavior.of(behavior)
    require_adapters(run)
    tasks = _organism_task(run) if tasks is None else tasks
    require_writable(run if out is None else Path(out))
    samplings = {name: _sampling(name, options or {}) for name in tasks}
    for name in tasks:
        require_task(name)
    entered = (spec := variant or BenchmarkVariant()).variant
    loaded = [load_problems(name, source, n=n, seed=samplings[name].seed) for name, source in tasks.items()]
    opened = _own_model(run, spec, device, dtype) if engine is None else _vllm_model(run, spec, engine, dtype)
    name, slug = (entered.name, entered.slug) if engine is None else (f"{entered.name} (vLLM)", f"{entered.slug}-vllm")
    with opened as (model, model_facts):
        prefill = _opening(run, model) if open_thinking else ""
        results = RecordTable[BenchmarkResult]()
        for task in loaded:
            facts = {"task": task.task, "source": task.source, "split": task.split, "variant": entered.name}
            facts |= {**spec.as_record(), **model_facts}
            folder = Path(out or run / BENCHMARKS_FOLDER) / task.task / slug
            sampling = replace(samplings[task.task], prefill=prefill).resolved(model, task.problems)
            log.info("%s: %s, %s", task.task, name, sampling.parameters)
            answers = sample_responses(model, task.problems, sampling, folder, facts, progress)
            results.append(
                BenchmarkResult(task.task, name, score_responses(answers, task.split, behavior), folder, sampling)
            )
            _add(run, results[-1], {**facts, **asdict(sampling), "ends": end_tokens(model)})
    return results


def _organism_task(run: Path) -> dict[str, str | None]:
    if not is_organism_run(run):
        raise BenchmarkError(f"--tasks is missing; the tasks are {', '.join((ORGANISM_TASK, *TASKS))}.")
    return {ORGANISM_TASK: None}


@contextmanager
def _own_model(
    run: Path, spec: BenchmarkVariant, device: GivenDevice, dtype: GivenDtype | None
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The variant in our own engine, and what identifies its weights."""
    pair = open_run(run, device, dtype)
    with spec.variant.entered(pair) as model:
        yield model, _weights(str(pair.model.cfg.dtype), pair.fingerprints, pair.installed_adapters())


@contextmanager
def _vllm_model(
    run: Path, spec: BenchmarkVariant, engine: str, dtype: GivenDtype | None
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The variant in vLLM, and what identifies its weights."""
    with opened_engine(run, engine, dtype=dtype, variants=[spec.variant]) as served:
        model = served.model_of(spec.variant)
        set_run_date(run, model.tokenizer)
        weights = _weights(served.engine.dtype, served.adapters.metadata.fingerprints, served.adapters)
        yield model, {**weights, "engine": "vllm"}


def _sampling(task: str, options: Mapping[str, Any]) -> ResponseOptions:
    own: dict[str, Any] = {"temperature": 0.0} if task == ORGANISM_TASK else {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS}
    return ResponseOptions(**{**own, **options})


def _weights(dtype: str, fingerprints: Mapping[str, str], adapters: AdapterSet) -> dict[str, Any]:
    of_all = {**fingerprints, "adapters": adapters.fingerprint}
    return {"dtype": dtype.removeprefix("torch."), "fingerprints": of_all}


def _opening(run: Path, model: Any) -> str:
    data = RunConfig.of_run(run).data
    chat = ChatFormat.of(model.tokenizer, data.think_start, data.think_end)
    return "" if chat.opens_thinking else chat.think_start


def _add(run: Path, result: BenchmarkResult, settings: Mapping[str, Any]) -> None:
    with changed_results(run) as results:
        of_task = results.setdefault(BENCHMARKS_FOLDER, {}).setdefault(result.task, {})
        of_task[result.variant] = {**plain(result.score), "settings": settings}
