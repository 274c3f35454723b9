"""The folder of a training run, from which a run that was killed at any time resumes as if it had not been.

    config.json        the whole configuration (RunConfig)
    run.json           an id, versions, and fingerprints of the pair and the data that the run was started with
    metrics.jsonl      a line every log_every steps, without times, so that a resumed run writes the same bytes
    local_metrics.jsonl    the same for the steps of the local stage
    validation.jsonl   the same for the held-out documents
    checkpoints/       the last training states: adapters, optimizer and counters; deleted when the run has finished
    adapters/          the result; present only when the run has finished

Except for the .jsonl files, everything is written completely before it gets its name. The .jsonl files are cut
back to the latest training state when a run is resumed. A run folder is locked by the process that works in it.

Of several processes of one launch, which all see the folder, the main one holds the lock and writes.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.config import RunConfig
from tl_adapters.errors import UserError
from tl_adapters.processes import everywhere, processes
from tl_adapters.training.training_state import TrainingState, local_steps, state_folder
from tl_adapters.utils.files import (
    FolderBusyError,
    FolderExistsError,
    alone_in,
    append_text,
    new_folder,
    remove_own,
    write_text,
)
from tl_adapters.utils.printing import command
from tl_adapters.utils.reading import Record, read_record, read_record_lines, read_text
from tl_adapters.utils.results import versions
from tl_adapters.utils.strict_json import dumps

METRICS_FILE, LOCAL_METRICS_FILE, VALIDATION_FILE = "metrics.jsonl", "local_metrics.jsonl", "validation.jsonl"

log = logging.getLogger(__name__)


_ADVICE = "Restore the file from a copy, or train again in another folder."


class TrainingCost(Record):
    """What a finished run has cost."""

    tokens: NonNegativeInt
    seconds: NonNegativeFloat


class RunRecord(Record):
    """run.json."""

    schema_version: Literal[1] = 1
    id: str
    """The name of the run in a tracker."""
    versions: dict[str, str | None]
    """Versions of the packages with which the run was started."""
    fingerprints: dict[str, str]
    """What the run depends on -> its fingerprint."""
    spent: TrainingCost | None = None
    """None until the run has finished, and for runs of earlier versions."""


class MetricsLine(Record):
    """A line of metrics.jsonl: the terms of one step of the end-to-end stage."""

    step: PositiveInt
    tokens: NonNegativeInt
    """Tokens so far."""
    lr: float
    total: float
    output_kl: float
    forward_bridge: float
    backward_bridge: float
    nmse: float
    sparsity: float
    local: float | None = None
    """None where the local term is not part of the objective."""
    l0: tuple[float, ...]
    """L0 of each layer."""


class LocalMetricsLine(Record):
    """A line of local_metrics.jsonl: one step of the local stage; lists are by layer."""

    step: PositiveInt
    tokens: NonNegativeInt
    """Tokens that the target has read for the stage so far."""
    lr: float
    error: tuple[float, ...]
    """Share of the difference's energy that the adapter leaves."""
    sparsity: tuple[float, ...]
    """Sparsity penalty per token, before its weight."""
    l0: tuple[float, ...]
    """L0."""
    alive: tuple[NonNegativeInt, ...]
    """Number of features that were active in one of the last steps."""


class ValidationLine(Record):
    """A line of validation.jsonl: the terms on held-out documents after a step."""

    step: PositiveInt
    output_kl: float
    nmse: float
    l0: tuple[float, ...]
    """L0 of each layer."""
    tokens: NonNegativeInt
    """Tokens that count."""


_LINES: dict[str, type[MetricsLine | LocalMetricsLine | ValidationLine]] = {
    METRICS_FILE: MetricsLine,
    LOCAL_METRICS_FILE: LocalMetricsLine,
    VALIDATION_FILE: ValidationLine,
}


class RunFolderError(UserError, RuntimeError):
    """Raised for a folder in which no run can start or resume; the message says why."""


def require_new(path: Path) -> None:
    """Raises FolderExistsError if ``path`` exists, so that this is known before models are loaded."""
    if path.exists():
        raise FolderExistsError(
            f"{path} exists already; choose another name, or resume that run: {command('train', resume=path)}"
        )


class RunFolder:
    """The folder of one run, locked by this process until `release`. Made by `create` or `open`.

    All processes of one launch call the methods that write, `create` and `open`, and wait for the main one.
    """

    is_new: bool = False
    """Whether this process has made the folder, and saved no training state in it yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.config, record = processes().together(lambda: (RunConfig.of_run(path), self._record()))
        except UserError as error:
            raise RunFolderError(f"{path} is not the folder of a training run, or it is damaged: {error}") from error
        self.id, self.fingerprints = record.id, record.fingerprints
        self._lock = ExitStack()
        try:
            processes().on_main(lambda: self._lock.enter_context(alone_in(path)))  # `release` waits for nobody
        except FolderBusyError:
            raise everywhere(
                RunFolderError(
                    f"Another process is training in {path}. Wait for it or stop it; two runs need two folders."
                )
            ) from None

    def _record(self) -> RunRecord:
        return read_record(RunRecord, self.path / "run.json", _ADVICE)

    @classmethod
    def create(cls, path: str | Path, config: RunConfig, fingerprints: Mapping[str, str]) -> RunFolder:
        """Makes the folder of a new run. Raises FolderExistsError if ``path`` exists."""
        path = Path(path)
        record = RunRecord(id=uuid.uuid4().hex[:12], versions=versions(), fingerprints=dict(fingerprints))

        def make() -> None:
            require_new(path)
            with new_folder(path) as out:
                write_text(out / "config.json", dumps(config.to_dict(), indent=1) + "\n")
                write_text(out / "run.json", record.json_text())
                write_text(out / METRICS_FILE, "")

        processes().on_main(make)
        run = cls(path)
        run.is_new = True
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Opens the folder of an earlier run. Raises RunFolderError if it is none, or another process works in it."""
        if not Path(path).is_dir():
            raise everywhere(
                RunFolderError(
                    f"There is no folder {path}, so there is no run to resume; a new run takes --out in place of "
                    "--resume."
                )
            )
        return cls(Path(path))

    def discard_new(self) -> None:
        """Remove a folder that this process has made and in which nothing can be resumed; others stay."""
        if self.is_new and processes().is_main:
            remove_own(self.path)

    def release(self) -> None:
        """Unlock the folder for other processes."""
        self._lock.close()

    def require_same(self, fingerprints: Mapping[str, str]) -> None:
        """Raises RunFolderError if the pair or the data differ from those that the run was started with.

        Fingerprints that an earlier version did not record are not compared; a warning names them.
        """
        if unknown := [what.replace("_", " ") for what in fingerprints if what not in self.fingerprints]:
            log.warning(
                "%s was started by a version that did not record a fingerprint of %s, so whether they are the same is "
                "not checked.",
                self.path,
                ", ".join(unknown),
            )
        for what, was in self.fingerprints.items():
            now = fingerprints.get(what)
            if now != was:
                raise RunFolderError(
                    f"{self.path} was started with other {what.replace('_', ' ')} (fingerprint {was}, now {now}); "
                    "resuming would mix two runs. Give the pair and the data it was started with."
                )

    # -- lines ----------------------------------------------------------------------------------------------------

    def append(self, file: str, line: Mapping[str, Any]) -> None:
        """Append a line to one of the .jsonl files. Raises WriteError."""
        processes().on_main(lambda: append_text(self.path / file, dumps(dict(line)) + "\n"))

    def _cut_lines(self, file: str, step: int) -> None:
        """Delete the lines of a .jsonl file that were written after ``step``. Raises UnreadableFileError."""
        path = self.path / file
        if path.is_file():
            lines = read_record_lines(_LINES[file], path, _ADVICE, partial_end=True)
            kept = sum(line.step <= step for line in lines)
            texts = [text for text in read_text(path, _ADVICE).split("\n") if text.strip()]
            write_text(path, "".join(f"{text}\n" for text in texts[:kept]))

    # -- training states ------------------------------------------------------------------------------------------

    def save_training_state(self, state: TrainingState) -> None:
        """Save a training state, then delete the oldest states beyond ``keep_checkpoints``.

        Raises WriteError where the disk is full, or refuses; earlier states are kept.
        """
        folder = self.path / "checkpoints" / state_folder(state.counters.step)

        def save() -> None:
            if not folder.exists():
                with new_folder(folder) as out:
                    state.save(out)
            for old in self.training_states[: -self.config.training.keep_checkpoints]:
                remove_own(old)

        processes().on_main(save)

    @property
    def training_states(self) -> list[Path]:
        """Folders of the saved training states, the oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*"))

    def load_training_state(self, like: AdapterSet) -> TrainingState | None:
        """The latest training state; None if there is none yet.

        A state that is damaged is passed over for the one before it, which a warning says. The lines that were written
        after the state are deleted.

        Args:
            like: adapters with the names and shapes of those that the run trains.

        Raises:
            RunFolderError: all states are damaged.
            UnreadableFileError: a line of a .jsonl file is damaged.
        """
        state = processes().together(lambda: self._mended(like) if processes().is_main else None)
        return processes().together(lambda: state if processes().is_main else self._newest_readable_state(like))

    def _mended(self, like: AdapterSet) -> TrainingState | None:
        """The newest readable training state; damaged ones, and lines that were written after it, are removed."""
        state, config = self._newest_readable_state(like), self.config.training
        step = state.counters.step if state else 0
        for file in _LINES:
            # What is measured on held-out documents after the local stage is measured after its last state was saved.
            later = file == VALIDATION_FILE and step == local_steps(config) > 0
            self._cut_lines(file, step - later)
        return state

    def _newest_readable_state(self, like: AdapterSet) -> TrainingState | None:
        """The newest training state that can be read, and None where there is none at all; damaged ones are removed.

        Raises RunFolderError where there are training states and all are damaged.
        """
        damaged: dict[Path, str] = {}
        for folder in reversed(self.training_states):
            try:
                state = TrainingState.load(folder, like, self.config.training)
            except UserError as error:
                damaged[folder] = str(error).rstrip(" .")
                continue
            for path, reason in damaged.items():
                log.warning("%s is damaged (%s); going back to %s.", path, reason, folder.name)
                remove_own(path)  # it would otherwise stand where the run saves that step again
            return state
        if damaged:
            path, reason = next(iter(damaged.items()))
            raise RunFolderError(
                f"Every training state of {self.path} is damaged; the newest is {path} ({reason}). Copy the folder "
                f"again, or remove {self.path / 'checkpoints'}: the run then starts again from its first step."
            )
        return None

    def result(self) -> AdapterSet | None:
        """The trained adapters of a run that has finished, else None."""
        adapters = self.path / "adapters"
        return AdapterSet.from_pretrained(adapters) if adapters.is_dir() else None

    def tokens_and_seconds(self) -> tuple[int, float]:
        """Number of tokens and seconds of a finished run's training; 0 seconds for runs of earlier versions."""
        if (spent := self._record().spent) is not None:
            return spent.tokens, spent.seconds
        lines = read_record_lines(MetricsLine, self.path / METRICS_FILE, _ADVICE, partial_end=True)
        return (lines[-1].tokens if lines else 0), 0.0

    def finish(self, adapters: AdapterSet, tokens: int, seconds: float) -> None:
        """Save the trained adapters, tokens and seconds, and delete the training states. Raises WriteError."""

        def finish() -> None:
            if not (self.path / "adapters").is_dir():
                record = self._record().model_copy(update={"spent": TrainingCost(tokens=tokens, seconds=seconds)})
                write_text(self.path / "run.json", record.json_text())
                adapters.save_pretrained(self.path / "adapters")
            remove_own(self.path / "checkpoints")

        processes().on_main(finish)
