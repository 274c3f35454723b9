"""What a training run keeps on disk, so that it can be killed at any moment and go on as if it had not been.

    config.json        the whole configuration (RunConfig)
    run.json           an id, versions, and fingerprints of the pair and the data it was started with
    metrics.jsonl      a line every log_every steps; no clock in it, so a resumed run writes the same bytes
    validation.jsonl   likewise for the held-out documents
    checkpoints/       the last few; gone when the run is done
    adapters/          the result; there only when the run is done

Everything but the two .jsonl files appears whole under its name or not at all, and those are cut back to the last
checkpoint when a run is resumed. One process works in a run folder at a time.
"""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.config import RunConfig
from tl_adapters.errors import UserError
from tl_adapters.utils.files import FolderExistsError, new_folder, remove_partials, room_for, write_text
from tl_adapters.utils.results import versions
from tl_adapters.utils.strict_json import dumps

METRICS_FILE, VALIDATION_FILE = "metrics.jsonl", "validation.jsonl"


log = logging.getLogger(__name__)


class RunFolderError(UserError, RuntimeError):
    """A folder that no run can go on in; the message says why."""


def require_new(path: Path) -> None:
    """Raises FolderExistsError where there is something already; to be asked before hours of loading."""
    if path.exists():
        raise FolderExistsError(
            f"{path} exists already; choose another name, or go on with that run: tl-adapters train --resume {path}"
        )


class RunFolder:
    """One run's folder, held by this process until `release`. Make one with `create` or `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.config = RunConfig.load(path / "config.json")
            record = json.loads((path / "run.json").read_text())
            self.id, self.fingerprints = str(record["id"]), dict(record["fingerprints"])
        except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise RunFolderError(f"{path} is not the folder of a training run: {error}") from error
        self._lock = FileLock(path / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise RunFolderError(
                f"Another process is training in {path}. Wait for it or stop it; two runs need two folders."
            ) from None

    @classmethod
    def create(cls, path: str | Path, config: RunConfig, fingerprints: Mapping[str, str]) -> RunFolder:
        """A new folder. Raises FolderExistsError where there is one already."""
        path = Path(path)
        require_new(path)
        record = {"id": uuid.uuid4().hex[:12], "versions": versions(), "fingerprints": dict(fingerprints)}
        with new_folder(path) as out:
            (out / "config.json").write_text(dumps(config.to_dict(), indent=1) + "\n")
            (out / "run.json").write_text(dumps(record, indent=1) + "\n")
            (out / METRICS_FILE).touch()
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The folder of an earlier run. Raises RunFolderError."""
        if not Path(path).is_dir():
            raise RunFolderError(f"{path} is no folder; there is no run to go on with.")
        return cls(Path(path))

    def release(self) -> None:
        """Let other processes work here."""
        self._lock.release()

    def require_same(self, fingerprints: Mapping[str, str]) -> None:
        """Raises RunFolderError where pair or data are not those the run was started with.

        What an earlier version did not record is not compared; that is said.
        """
        if unknown := [what.replace("_", " ") for what in fingerprints if what not in self.fingerprints]:
            log.warning(
                "%s was started by a version that recorded nothing of %s; that they are what they were then is not "
                "checked.",
                self.path,
                ", ".join(unknown),
            )
        for what, was in self.fingerprints.items():
            now = fingerprints.get(what)
            if now != was:
                raise RunFolderError(
                    f"{self.path} was started with other {what.replace('_', ' ')} (fingerprint {was}, now {now}); "
                    "going on would be neither run. Give the pair and the data it was started with."
                )

    # -- lines ----------------------------------------------------------------------------------------------------

    def append(self, file: str, line: Mapping[str, Any]) -> None:
        """Add a line to one of the .jsonl files. Raises DiskFullError."""
        with room_for(self.path / file), (self.path / file).open("a") as out:
            out.write(dumps(dict(line)) + "\n")

    def _cut_lines(self, file: str, step: int) -> None:
        if (self.path / file).is_file():
            kept = []
            for line in (self.path / file).read_text().splitlines(keepends=True):
                try:
                    later = json.loads(line)["step"] > step
                except json.JSONDecodeError:  # the process died while it wrote this one
                    break
                if later:
                    break
                kept.append(line)
            write_text(self.path / file, "".join(kept))

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def save_checkpoint(
        self, step: int, adapters: AdapterSet, optimizer: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint whole, then drop those beyond ``keep_checkpoints``. Raises DiskFullError."""
        where = self._checkpoint(step)
        if not where.exists():
            with new_folder(where) as out:
                adapters.save_pretrained(out / "adapters")
                save_file(dict(optimizer), out / "optimizer.safetensors")
                (out / "state.json").write_text(dumps(dict(state)))
        for old in self.checkpoints[: -self.config.training.keep_checkpoints]:
            shutil.rmtree(old)

    @property
    def checkpoints(self) -> list[Path]:
        """Checkpoints, the oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*"))

    def _checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:08d}"

    def load_checkpoint(self) -> tuple[AdapterSet, dict[str, Tensor], dict[str, Any]] | None:
        """Adapters, optimiser tensors and state of the latest checkpoint; None where the run had not come so far.

        What was written after it is dropped: lines, and whatever a killed process left half-written.
        """
        for name in (METRICS_FILE, VALIDATION_FILE, "adapters"):
            remove_partials(self.path / name)
        remove_partials(self.path / "checkpoints" / "step-*")
        checkpoints = self.checkpoints
        if not checkpoints:
            self._cut_lines(METRICS_FILE, 0)
            self._cut_lines(VALIDATION_FILE, 0)
            return None
        where = checkpoints[-1]
        state = json.loads((where / "state.json").read_text())
        for file in (METRICS_FILE, VALIDATION_FILE):
            self._cut_lines(file, state["step"])
        return AdapterSet.from_pretrained(where / "adapters"), load_file(where / "optimizer.safetensors"), state

    def result(self) -> AdapterSet | None:
        """The adapters of a run that is done."""
        adapters = self.path / "adapters"
        return AdapterSet.from_pretrained(adapters) if adapters.is_dir() else None

    def spent(self) -> tuple[int, float]:
        """Tokens and seconds that a finished run was trained with; of runs of earlier versions, the tokens alone."""
        record = json.loads((self.path / "run.json").read_text())
        if "spent" in record:
            return int(record["spent"]["tokens"]), float(record["spent"]["seconds"])
        lines = (self.path / METRICS_FILE).read_text().splitlines()
        return (int(json.loads(lines[-1])["tokens"]) if lines else 0), 0.0

    def finish(self, adapters: AdapterSet, tokens: int, seconds: float) -> None:
        """Write the result, and what it took; checkpoints are no longer needed. Raises DiskFullError."""
        if not (self.path / "adapters").is_dir():
            record = json.loads((self.path / "run.json").read_text())
            record["spent"] = {"tokens": tokens, "seconds": seconds}
            write_text(self.path / "run.json", dumps(record, indent=1) + "\n")
            adapters.save_pretrained(self.path / "adapters")
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
        (self.path / ".lock").unlink(missing_ok=True)
