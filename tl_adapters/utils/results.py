"""results.json: the measurements of a run, one block per stage, with versions, seeds and seconds."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field

from tl_adapters.utils.files import is_plain_name, locked, next_free_name, require_writable, write_text
from tl_adapters.utils.reading import STRICT, Record, as_record, read_json_object
from tl_adapters.utils.strict_json import dumps

log = logging.getLogger(__name__)

Block = Mapping[str, Any]
"""A block of results.json: what one stage of a run measured."""
RESULTS_SCHEMA_VERSION: Literal[1] = 1
RESULTS_FILE = "results.json"
OUTPUT_FILES = "files"
"""Block of results.json: name of each file that a stage wrote -> the name that it got, and its last two hashes."""
_PACKAGES = ("tl-adapters", "torch", "transformer-lens", "sae-lens", "transformers", "safetensors")
_ADVICE = "Restore it from a copy, or remove it and run the stages of the run again."


class _Block(Record):
    """Fields that a later stage reads; other keys of a block are kept as they are."""

    model_config = ConfigDict(**{**STRICT, "extra": "allow"}, frozen=True)


class MeasuredValue(_Block):
    """A measurement (`Measurement`)."""

    value: float | None


class PairBlock(_Block):
    """The models of a run."""

    base: str
    target: str
    fingerprints: dict[str, str] = Field(default_factory=dict)


class TrainBlock(_Block):
    """What training has cost."""

    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    n_features: int | None = None


class OpenedBlock(_Block):
    """Where adapters come from that were not trained in this run."""

    name: str
    revision: str | None = None
    n_features: int
    fingerprint: str


class KlBlock(_Block):
    """KL from the target."""

    hybrid: MeasuredValue
    replacement: MeasuredValue


class FaithfulnessBlock(_Block):
    """How close the replacement is to the target."""

    kl: KlBlock
    top1_agreement: MeasuredValue
    l0: tuple[MeasuredValue, ...]


class BehaviorBlock(_Block):
    """Accuracy, length and hesitation rate of models and routes."""

    recovered: dict[str, MeasuredValue] = Field(default_factory=dict)


class AttributionBlock(_Block):
    """The graphs of a run."""

    moments: tuple[dict[str, Any], ...] = ()


def _require_plain_name(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError("it is not the name of a file within the run folder")
    return name


class OutputFile(Record):
    """A file that a stage wrote."""

    file: Annotated[str, AfterValidator(_require_plain_name)]
    sha256: tuple[str, ...]
    """Hashes of what the stage wrote last and before."""


class Results(_Block):
    """results.json. The keys are those of the first release; unknown blocks are kept."""

    schema_version: Literal[1]
    seeds: tuple[int, ...] = (0,)
    seconds: dict[str, float] = Field(default_factory=dict)
    """Seconds of each stage."""
    versions: dict[str, str | None] = Field(default_factory=dict)
    pair: PairBlock | None = None
    train: TrainBlock | None = None
    opened: OpenedBlock | None = None
    faithfulness: FaithfulnessBlock | None = None
    baselines: dict[str, Any] | None = None
    behaviour: BehaviorBlock | None = None
    features: dict[str, Any] = Field(default_factory=dict)
    labels: dict[str, Any] | None = None
    attribution: AttributionBlock | None = None
    moment_graphs: tuple[str, ...] = ()
    """Names of the graphs that the stage attribution has written or was about to write."""
    hesitation: dict[str, Any] | None = None
    benchmarks: dict[str, dict[str, Any]] = Field(default_factory=dict)
    files: dict[str, OutputFile] = Field(default_factory=dict)


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that results depend on; None for one that is not installed."""
    found_versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found_versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found_versions[package] = None
    return found_versions


def read_results(folder: str | Path) -> dict[str, Any]:
    """The blocks of a run's results.json; only the schema version where there is no file yet.

    Raises UnreadableFileError for a file that is damaged, or that a newer version of the package has written.
    """
    path = Path(folder) / RESULTS_FILE
    if not os.path.lexists(path):
        return {"schema_version": RESULTS_SCHEMA_VERSION}
    results = read_json_object(path, _ADVICE)
    as_record(Results, results, str(path), _ADVICE)
    return results


@contextmanager
def changed_results(folder: str | Path) -> Iterator[dict[str, Any]]:
    """The blocks of results.json, to be changed in place; they are written at the end of the block.

    Other processes wait meanwhile, so that no block of theirs is lost; keep the block short. Raises NotFiniteJsonError
    where a number is NaN or infinite (an undefined value must be None), FolderBusyError and WriteError.
    """
    path = Path(folder) / RESULTS_FILE
    with locked(path):
        results = read_results(folder)
        if not path.is_file():
            results[OUTPUT_FILES] = {}
        yield results
        write_text(path, dumps({name: plain(block) for name, block in results.items()}, indent=1) + "\n")


def write_results(folder: str | Path, **blocks: Any) -> dict[str, Any]:
    """Add or replace blocks of results.json and return all blocks. Dataclasses are written as mappings.

    A block that depends on the one that is there is changed by `changed_results`. Raises what that raises.
    """
    with changed_results(folder) as results:
        results.update({name: plain(block) for name, block in blocks.items()})
    return results


def write_output(folder: str | Path, name: str, text: str) -> Path:
    """Write a file of a stage into a run folder and return its path.

    A file of that name that no stage wrote, or that was changed since, stays as it is; the next free name is taken,
    such as report-2.html, and a log line says so. What the stages wrote is known by its hash, which results.json keeps.
    In a folder without results.json the file is replaced, because the caller has named it. Raises WriteError.
    """
    folder = Path(folder)
    path = folder / name
    if (folder / RESULTS_FILE).is_file():
        with changed_results(folder) as results:
            known = results.get(OUTPUT_FILES, {}).get(name, {"file": name, "sha256": []})
            path = folder / known["file"]
            # Runs of the first release kept no hashes.
            if path.exists() and OUTPUT_FILES in results and _sha256(path.read_bytes()) not in known["sha256"]:
                log.info("%s was not written by a stage of this run, or was changed, and stays as it is.", path)
                path, known = next_free_name(folder / name, path.suffix), {"sha256": []}
            # The earlier hash is kept too: a process may be killed before the new file has its name.
            hashes = [*known["sha256"][-1:], _sha256(text.encode())]
            results.setdefault(OUTPUT_FILES, {})[name] = {"file": path.name, "sha256": hashes}
    write_text(path, text)
    return path


def output_file(folder: str | Path, name: str) -> Path:
    """The path of what `write_output` wrote under a name."""
    return Path(folder) / read_results(folder).get(OUTPUT_FILES, {}).get(name, {}).get("file", name)


def is_own_output(folder: str | Path, name: str) -> bool:
    """Whether a file is as `write_output` has written it, and not changed or replaced since."""
    path, known = output_file(folder, name), read_results(folder).get(OUTPUT_FILES, {}).get(name, {})
    return path.is_file() and _sha256(path.read_bytes()) in known.get("sha256", [])


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def plain(value: Any, null: bool = False) -> Any:
    """``value`` as mappings and lists, which JSON can hold.

    A dataclass field whose metadata has "optional" is left out where it has its default; one whose metadata has a
    "json_key" is written under that key. With ``null`` NaN becomes null, for files whose reader turns it back into NaN;
    otherwise it stays, and writing it raises an error.
    """
    if is_dataclass(value) and not isinstance(value, type):
        items = ((f, getattr(value, f.name)) for f in fields(value))
        written = ((f, item) for f, item in items if not (f.metadata.get("optional") and item == f.default))
        return {f.metadata.get("json_key", f.name): plain(item, null) for f, item in written}
    if isinstance(value, dict):
        return {str(key): plain(item, null) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, null) for item in value]
    if null and isinstance(value, float) and math.isnan(value):
        return None
    return value


@contextmanager
def stage(folder: Path, name: str) -> Iterator[None]:
    """Measure the seconds of a stage and add them to results.json; raises WriteError before it where that cannot be."""
    require_writable(folder)
    log.info("%s ...", name)
    began = time.perf_counter()
    yield
    seconds = round(time.perf_counter() - began, 1)
    with changed_results(folder) as results:
        results["seconds"] = {**results.get("seconds", {}), name: seconds}
    log.info("%s: %.0f s", name, seconds)
