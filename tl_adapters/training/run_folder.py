"""The folder of a training run, from which a run that was killed at any time resumes as if it had not been.

    config.json        the whole configuration (RunConfig)
    run.json           an id, versions, and fingerprints of the pair and the data that the run was started with
    metrics.jsonl      a line every log_every steps, without times, so that a resumed run writes the same bytes
    validation.jsonl   the same for the held-out documents
    checkpoints/       the last training states: adapters, optimizer and counters; deleted when the run has finished
    adapters/          the result; present only when the run has finished

Except for the two .jsonl files, everything is written completely before it gets its name. The .jsonl files are cut
back to the latest training state when a run is resumed. A run folder is locked by the process that works in it.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.file_hashes import file_hash
from tl_adapters.config import RunConfig
from tl_adapters.errors import UserError
from tl_adapters.utils.files import (
    FolderBusyError,
    FolderExistsError,
    alone_in,
    append_text,
    new_folder,
    remove_own,
    write_tensors,
    write_text,
)
from tl_adapters.utils.results import versions
from tl_adapters.utils.strict_json import dumps

METRICS_FILE, VALIDATION_FILE = "metrics.jsonl", "validation.jsonl"
_STATE_FOLDER = "step-{:08d}"
_DAMAGED = (UserError, SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError)

log = logging.getLogger(__name__)


class RunFolderError(UserError, RuntimeError):
    """Raised for a folder in which no run can start or resume; the message says why."""


def require_new(path: Path) -> None:
    """Raises FolderExistsError if ``path`` exists, so that this is known before models are loaded."""
    if path.exists():
        raise FolderExistsError(
            f"{path} exists already; choose another name, or resume that run: tl-adapters train --resume {path}"
        )


def _read_state(folder: Path) -> tuple[AdapterSet, dict[str, Tensor], dict[str, Any]]:
    """Adapters, optimizer tensors and counters of a training state. Raises one of _DAMAGED where it is damaged."""
    counters = json.loads((folder / "state.json").read_text())
    if folder.name != _STATE_FOLDER.format(counters["step"]):
        raise ValueError(f"state.json is that of step {counters['step']}")
    if missing := [name for name in ("tokens", "seconds", "order") if name not in counters]:
        raise ValueError(f"state.json lacks {missing[0]}")
    optimizer = folder / "optimizer.safetensors"
    if file_hash(optimizer) != counters.pop("optimizer_sha256", file_hash(optimizer)):  # new in the second release
        raise ValueError("the content of optimizer.safetensors is not the one that was written")
    return AdapterSet.from_pretrained(folder / "adapters"), load_file(optimizer), counters


class RunFolder:
    """The folder of one run, locked by this process until `release`. Made by `create` or `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.config = RunConfig.load(path / "config.json")
            record = json.loads((path / "run.json").read_text())
            self.id, self.fingerprints = str(record["id"]), dict(record["fingerprints"])
        except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise RunFolderError(f"{path} is not the folder of a training run: {error}") from error
        self._lock = ExitStack()
        try:
            self._lock.enter_context(alone_in(path))
        except FolderBusyError:
            raise RunFolderError(
                f"Another process is training in {path}. Wait for it or stop it; two runs need two folders."
            ) from None

    @classmethod
    def create(cls, path: str | Path, config: RunConfig, fingerprints: Mapping[str, str]) -> RunFolder:
        """Makes the folder of a new run. Raises FolderExistsError if ``path`` exists."""
        path = Path(path)
        require_new(path)
        record = {"id": uuid.uuid4().hex[:12], "versions": versions(), "fingerprints": dict(fingerprints)}
        with new_folder(path) as out:
            write_text(out / "config.json", dumps(config.to_dict(), indent=1) + "\n")
            write_text(out / "run.json", dumps(record, indent=1) + "\n")
            write_text(out / METRICS_FILE, "")
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Opens the folder of an earlier run. Raises RunFolderError if it is none, or another process works in it."""
        if not Path(path).is_dir():
            raise RunFolderError(f"There is no folder {path}, so there is no run to resume.")
        return cls(Path(path))

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
        append_text(self.path / file, dumps(dict(line)) + "\n")

    def _cut_lines(self, file: str, step: int) -> None:
        """Delete the lines of a .jsonl file that were written after ``step``."""
        if (self.path / file).is_file():
            lines = []
            for line in (self.path / file).read_text().splitlines(keepends=True):
                try:
                    later = json.loads(line)["step"] > step
                except json.JSONDecodeError:  # the process was killed while it wrote this line
                    break
                if later:
                    break
                lines.append(line)
            write_text(self.path / file, "".join(lines))

    # -- training states ------------------------------------------------------------------------------------------

    def save_training_state(
        self, step: int, adapters: AdapterSet, optimizer: Mapping[str, Tensor], counters: Mapping[str, Any]
    ) -> None:
        """Save the state after a step, then delete the oldest states beyond ``keep_checkpoints``.

        Args:
            step: steps done.
            adapters: the adapters.
            optimizer: the optimizer's tensors by name.
            counters: everything else that `load_training_state` is to return, as JSON can hold it.

        Raises:
            WriteError: the disk is full, or refuses; earlier states are kept.
        """
        folder = self.path / "checkpoints" / _STATE_FOLDER.format(step)
        if not folder.exists():
            with new_folder(folder) as out:
                adapters.save_pretrained(out / "adapters")
                write_tensors(out / "optimizer.safetensors", optimizer)
                hashed = {"optimizer_sha256": file_hash(out / "optimizer.safetensors")}
                write_text(out / "state.json", dumps({**counters, **hashed}))
        for old in self.training_states[: -self.config.training.keep_checkpoints]:
            remove_own(old)

    @property
    def training_states(self) -> list[Path]:
        """Folders of the saved training states, the oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*"))

    def load_training_state(self) -> tuple[AdapterSet, dict[str, Tensor], dict[str, Any]] | None:
        """Adapters, optimizer tensors and counters of the latest training state; None if there is none yet.

        A state that is damaged is passed over for the one before it, which a warning says. The lines that were written
        after the state are deleted. Raises RunFolderError where all states are damaged.
        """
        state = self._newest_readable_state()
        for file in (METRICS_FILE, VALIDATION_FILE):
            self._cut_lines(file, 0 if state is None else state[2]["step"])
        return state

    def _newest_readable_state(self) -> tuple[AdapterSet, dict[str, Tensor], dict[str, Any]] | None:
        """The newest training state that can be read, and None where there is none at all; damaged ones are removed.

        Raises RunFolderError where there are training states and all are damaged.
        """
        damaged: dict[Path, Exception] = {}
        for folder in reversed(self.training_states):
            try:
                state = _read_state(folder)
            except _DAMAGED as error:
                damaged[folder] = error
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
        record = json.loads((self.path / "run.json").read_text())
        if "spent" in record:
            return int(record["spent"]["tokens"]), float(record["spent"]["seconds"])
        lines = (self.path / METRICS_FILE).read_text().splitlines()
        return (int(json.loads(lines[-1])["tokens"]) if lines else 0), 0.0

    def finish(self, adapters: AdapterSet, tokens: int, seconds: float) -> None:
        """Save the trained adapters, tokens and seconds, and delete the training states. Raises WriteError."""
        if not (self.path / "adapters").is_dir():
            record = json.loads((self.path / "run.json").read_text())
            record["spent"] = {"tokens": tokens, "seconds": seconds}
            write_text(self.path / "run.json", dumps(record, indent=1) + "\n")
            adapters.save_pretrained(self.path / "adapters")
        remove_own(self.path / "checkpoints")
