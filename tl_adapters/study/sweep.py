"""Sweeps: sparsity against faithfulness over the values of some training options.

1. The points are the product of the grid's values; every configuration is built before anything is loaded.
2. The pair, the documents and the held-out text are opened once. For the model organism the text is the target's own
   greedy answers to problems of the tune split (a sweep selects options, so it must not see the report split), which
   target and hybrid answer once; for other pairs it is a file of documents, or what the configuration holds out.
3. Each point is a run folder, bit for bit what `train_run` makes, and its adapters are measured: L0, KL, NMSE, alive
   features, and for the model organism the share of the accuracy that they recover.
4. The Pareto front holds the points for which no other point has both a lower L0 and a lower KL.

    sweep.json    the configuration, the grid, the held-out text, the points that are done; no times
    sweep.html    the points as plots and a table
    local.sparsity_weight-0.1_n_features-128/ ...    the run folders

A point is done when sweep.json lists it. A sweep that was stopped or killed resumes from the last saved training state
and produces the same file; a finished sweep can be extended by more values. Another configuration is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt

from tl_adapters import organism
from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.config import RunConfig, TrainingConfig
from tl_adapters.data.batching import TracesInMemory
from tl_adapters.data.documents import EncodedDocuments
from tl_adapters.data.traces import Trace
from tl_adapters.errors import UserError
from tl_adapters.evaluation.faithfulness import DocumentSums, features_block
from tl_adapters.evaluation.response_metrics import correctness, measure_responses
from tl_adapters.generation.responses import Response, respond, traces_of
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.pages.sweep_page import Sweep, SweepPoint, points_on_front, read_sweep_point, write_sweep_page
from tl_adapters.study.evaluation_stages import faithfulness_stage
from tl_adapters.study.grid import grid_configurations, swept_option
from tl_adapters.study.open_run import open_data, open_held_out, open_pair
from tl_adapters.study.train import train_stage
from tl_adapters.training.trainer import Trainer, TrainingInterrupted
from tl_adapters.utils.bootstrap import bootstrap_ratio, bootstrap_ratio_of_ratios, bootstrap_recovered
from tl_adapters.utils.clustered_intervals import event_rate
from tl_adapters.utils.files import FolderExistsError, alone_in, new_folder, write_text
from tl_adapters.utils.measurement import Measurement
from tl_adapters.utils.printing import command
from tl_adapters.utils.reading import Record, UnreadableFileError, as_record, read_json_object
from tl_adapters.utils.results import plain, read_results, versions
from tl_adapters.utils.strict_json import dumps

log = logging.getLogger(__name__)

SWEEP_SCHEMA_VERSION: Literal[1] = 1
SWEEP_FILE = "sweep.json"


class SweepError(UserError, ValueError):
    """A sweep that cannot start or continue in this folder; the message says why."""


def sweep(
    config: RunConfig,
    folder: str | Path,
    grid: Mapping[str, Sequence[Any]],
    *,
    held_out: str | None = None,
    documents: int = 300,
    device: str = "auto",
    progress: bool = True,
) -> Sweep:
    """Trains and measures adapters for every combination of ``grid``, in a new folder or one to be continued.

    Args:
        config: the pair, the data, and every option outside the grid.
        folder: folder of the sweep, with one run folder per point.
        grid: option of `TrainingConfig` -> its values, such as {"local.sparsity_weight": [0.1, 0.4]}.
        held_out: a .jsonl file or a dataset's name to measure on; None for problems of the model organism, or for what
            the configuration holds out (``data.validation_fraction`` or ``data.validation_split``).
        documents: the largest number of held-out problems or documents.
        device: where to run; "auto" is the first available of cuda, mps and cpu.
        progress: show progress bars.

    Returns:
        Every finished point in ``folder``, earlier ones first; a list that a notebook shows as plots and a table.

    Raises:
        ConfigError: an unknown option or an impossible value; raised before anything is loaded.
        GridError: an empty grid, or a value twice.
        SweepError: there is no held-out text, or the folder is another sweep's.
        FolderExistsError: ``folder`` exists and is not a sweep's.
        FolderBusyError: another process is writing to ``folder``.
        TrainingInterrupted: upon Ctrl-C; finished points are kept.
    """
    folder = Path(folder)
    runs = grid_configurations(config, grid)
    grid = {swept_option(name): values for name, values in grid.items()}
    request: dict[str, Any] = {
        "config": config.to_dict(),
        "grid": {option: [plain(value) for value in values] for option, values in grid.items()},
        "held_out": held_out,
        "documents": documents,
    }
    _require_text(config, held_out, documents)
    if folder.exists():
        _read(folder)  # raises where the folder is not a sweep's
    else:
        with new_folder(folder) as out:
            _write(out, {"schema_version": SWEEP_SCHEMA_VERSION, **request, "versions": versions(), "points": []})
    with alone_in(folder):
        record = _read(folder)
        _require_same(folder, _settings(record), _settings(request))
        record["grid"] = {
            option: request["grid"][option] for option in record["grid"]
        }  # which may hold more values now
        runs = grid_configurations(config, record["grid"])
        _train_and_measure(_SharedInputs(config, held_out, documents, device, progress), folder, record, runs)
        return Sweep(read_sweep_point(point) for point in record["points"])


def resume_sweep(folder: str | Path, device: str = "auto", progress: bool = True) -> Sweep:
    """Continues a sweep that was stopped, with its own options. Raises what `sweep` raises."""
    record = _read(Path(folder))
    config = RunConfig.from_record(record["config"])
    options = dict(held_out=record["held_out"], documents=record["documents"])
    return sweep(config, folder, record["grid"], **options, device=device, progress=progress)


# -- the points -------------------------------------------------------------------------------------------------------


class _SharedInputs:
    """Inputs that all points share: pair, documents, held-out text, and answers of the routes without adapters.

    Each is opened when it is first read, because a sweep that is done needs none of them.
    """

    def __init__(self, config: RunConfig, held_out: str | None, documents: int, device: str, progress: bool) -> None:
        self.config, self.held_out, self.documents = config, held_out, documents
        self.device, self.progress = device, progress
        self._data: dict[Any, tuple[EncodedDocuments, list[Trace]]] = {}

    @cached_property
    def pair(self) -> PairedModel:
        return open_pair(self.config, self.device)

    def data(self, training: TrainingConfig) -> tuple[EncodedDocuments, list[Trace]]:
        """The training documents, and those that the configuration holds out of them."""
        key = (training.seed, training.count)
        if key not in self._data:
            documents = open_data(replace(self.config, training=training), self.pair)
            documents.log_survey()
            self._data[key] = documents, documents.validation()
        return self._data[key]

    @cached_property
    def problems(self) -> list[organism.Problem]:
        """Problems of the model organism; empty where the text comes from a file or the pair is another."""
        is_organism = self.held_out is None and not self.config.target
        return organism.problems("tune", self.documents) if is_organism else []

    def answer(self, route: str) -> list[Response]:
        """Responses to the problems on a route."""
        with self.pair.routed(route):
            return respond(self.pair.model, self.problems)

    @cached_property
    def known_answers(self) -> dict[str, list[Response]]:
        """Responses of the routes without adapters."""
        return {route: self.answer(route) for route in ("target", "hybrid")} if self.problems else {}

    @cached_property
    def text(self) -> tuple[list[Trace], str]:
        """The held-out traces and the name of their split. Raises SweepError where there are none."""
        if self.problems:
            traces, split = traces_of(self.known_answers["target"], self.pair.model.tokenizer), "tune"
        elif self.held_out is None:
            # Only the response is measured, so only documents that have one count.
            config = replace(self.config, training=replace(self.config.training, count=("thinking", "answer")))
            traces, split = open_data(config, self.pair).validation(), "validation"
        else:
            traces = open_held_out(self.config, self.held_out, self.pair).traces()
            split = Path(self.held_out).name
        if not traces:
            raise SweepError(
                "There is no held-out document to measure on; give a larger file, or raise data.validation_fraction."
            )
        return traces[: self.documents], split


def _train_and_measure(
    shared: _SharedInputs, folder: Path, record: dict[str, Any], runs: Mapping[str, RunConfig]
) -> None:
    """Makes the points that are not done yet; sweep.json and the page are written after each."""
    done = {point["name"] for point in record["points"]}.intersection(runs)
    todo = {name: run for name, run in runs.items() if name not in done}
    try:
        if todo:
            _require_fingerprints(folder, record, shared, todo.values())
            record["behaviour"] = plain(
                {route: measure_responses(r, shared.text[1]) for route, r in shared.known_answers.items()}
            )
        _write(folder, record)
        for name, run in todo.items():
            log.info("point %d of %d: %s", len(done) + 1, len(runs), name)
            record["points"].append(plain(_point(shared, run, folder / name, list(record["grid"]))))
            done.add(name)
            _write(folder, record)
    except KeyboardInterrupt as stop:
        raise TrainingInterrupted(
            f"Stopped with {len(done)} of {len(runs)} points done; the next one resumes from its last saved "
            f"state. Continue with: {command('sweep', resume=folder)}"
        ) from stop


def _point(shared: _SharedInputs, run: RunConfig, folder: Path, swept: Sequence[str]) -> SweepPoint:
    traces, split = shared.text
    if (
        "train" in read_results(folder) and (folder / "adapters").is_dir()
    ):  # the sweep was stopped while it measured this point
        shared.pair.load_adapters(AdapterSet.from_pretrained(folder / "adapters"))
    else:
        train_stage(_trainer(shared, run, folder), folder)
    sums = faithfulness_stage(shared.pair, traces, folder, split)
    origin = (split, (run.training.seed,))
    counts = features_block(sums)
    return SweepPoint(
        name=folder.name,
        options={option: attrgetter(option)(run.training) for option in swept},
        **_measurements(sums, *origin),
        recovered=_recovered(shared, *origin) if shared.problems else None,
        features=counts["total"],
        alive=counts["alive"],
        tokens=counts["tokens"],
    )


def _trainer(shared: _SharedInputs, run: RunConfig, folder: Path) -> Trainer:
    data, validation = shared.data(run.training)
    if folder.exists():
        return Trainer.resume(shared.pair, data, folder, validation=validation, progress=shared.progress)
    return Trainer(
        shared.pair, data, run.training, folder, validation=validation, origin=run, progress=shared.progress
    )  # fmt: skip


def _measurements(sums: DocumentSums, split: str, seeds: tuple[int, ...]) -> dict[str, Measurement]:
    kl, hybrid = ((sums.kl[name], sums.positions) for name in ("replacement", "hybrid"))
    error, nats = (sums.error[:, -1], sums.energy[:, -1]), "nats per response token"
    estimates = {
        "l0": (event_rate(sums.active.mean(1), sums.tokens), "active features per response token and layer"),
        "kl": (bootstrap_ratio(*kl), nats),
        "kl_hybrid": (bootstrap_ratio(*hybrid), nats),
        "kl_of_hybrid": (bootstrap_ratio_of_ratios(kl, hybrid), "KL of the replacement over KL of the hybrid"),
        "nmse": (bootstrap_ratio(*error), "squared error over squares, after the last layer"),
    }
    n = len(sums.tokens)
    return {name: estimate.measurement(n, unit, split, seeds) for name, (estimate, unit) in estimates.items()}


def _recovered(shared: _SharedInputs, split: str, seeds: tuple[int, ...]) -> Measurement:
    target, hybrid = (correctness(shared.known_answers[route]) for route in ("target", "hybrid"))
    estimate = bootstrap_recovered(correctness(shared.answer("replacement")), hybrid, target)
    return estimate.measurement(len(target), "share of the accuracy gained over the hybrid", split, seeds)


# -- the record -------------------------------------------------------------------------------------------------------


class SweepRecord(Record):
    """sweep.json."""

    schema_version: Literal[1]
    config: dict[str, Any]
    """The configuration of all points, as `RunConfig.to_dict` gives it."""
    grid: dict[str, tuple[Any, ...]]
    """Swept option -> its values."""
    held_out: str | None
    documents: PositiveInt
    versions: dict[str, str | None]
    points: tuple[SweepPoint, ...]
    """The points that are done."""
    front: tuple[str, ...] = ()
    """Names of the points on the Pareto front."""
    fingerprints: dict[str, str] = Field(default_factory=dict)
    """What the points were made from."""
    behaviour: dict[str, Any] = Field(default_factory=dict)
    """Rates of the routes without adapters, for the model organism."""


def _write(folder: Path, record: dict[str, Any]) -> None:
    """Writes sweep.json and the page."""
    points = [read_sweep_point(point) for point in record["points"]]
    record = {**record, "front": [point.name for point in points_on_front(points)]}
    write_text(folder / SWEEP_FILE, dumps(record, indent=1) + "\n")
    write_sweep_page(folder, record, points)


def _read(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise SweepError(f"There is no folder {folder}, so there is no sweep to continue.")
    if not (folder / SWEEP_FILE).is_file():
        raise FolderExistsError(
            f"{folder} exists and holds no {SWEEP_FILE}, so it is not a sweep's; choose another folder."
        )
    path = folder / SWEEP_FILE
    try:
        record = read_json_object(path)
        as_record(SweepRecord, record, str(path))
    except UnreadableFileError as error:
        raise SweepError(str(error)) from error
    try:
        grid_configurations(RunConfig.from_record(record["config"]), record["grid"])
    except UserError as error:
        raise SweepError(f"{path}: {error}") from error
    return record


def _settings(request: dict[str, Any]) -> dict[str, Any]:
    """Settings that two sweeps in one folder must share, by dotted option; the swept options are left out."""
    config = _flat(
        RunConfig.from_record(request["config"]).to_dict(), ""
    )  # newer options than the record's get defaults
    swept = tuple(f"training.{option}" for option in request["grid"])
    return {
        **{key: value for key, value in config.items() if key not in swept and not key.startswith(_below(swept))},
        "swept": sorted(request["grid"]),
        "held_out": request["held_out"],
        "documents": request["documents"],
    }


def _below(options: Sequence[str]) -> tuple[str, ...]:
    """How the dotted names of options within options begin."""
    return tuple(f"{option}." for option in options)


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _require_fingerprints(
    folder: Path, record: dict[str, Any], shared: _SharedInputs, todo: Iterable[RunConfig]
) -> None:
    """Records the fingerprints of weights and documents. Raises SweepError where earlier ones differ."""
    current = dict(shared.pair.fingerprints)
    if not shared.problems:
        current["held-out text"] = TracesInMemory(shared.text[0]).fingerprint
    for run in todo:
        which = f"training data (seed {run.training.seed}, {'+'.join(run.training.count)})"
        for part, value in shared.data(run.training)[0].fingerprints.items():
            current[which if part == "data" else f"{part.replace('_', ' ')} of {which}"] = value
    now = {f"fingerprint of {what}": value for what, value in current.items()}
    known = record.get("fingerprints", {})
    _require_same(
        folder, {key: known[key] for key in now if key in known}, {key: now[key] for key in now if key in known}
    )
    record["fingerprints"] = {**known, **now}


def _require_same(folder: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    keys = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    if keys:
        differences = "; ".join(f"{key} was {was.get(key)!r}, now {now.get(key)!r}" for key in keys)
        raise SweepError(
            f"{folder} holds a sweep of another configuration: {differences}. Give the same configuration, or choose "
            "another folder."
        )


def _require_text(config: RunConfig, held_out: str | None, documents: int) -> None:
    if documents < 1:
        raise SweepError(f"documents is {documents}; give a whole number of at least 1.")
    data = config.data
    if config.target and held_out is None and not (data.validation_fraction or data.validation_split):
        raise SweepError(
            "There is no text to measure on; give a .jsonl file of held-out prompts and responses or a dataset "
            "(--held-out on the command line), or set data.validation_fraction."
        )
