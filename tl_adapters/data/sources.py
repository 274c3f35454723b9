"""Readers of conversations: from a .jsonl file, a dataset of the hub, or pairs in memory, in a resumable order.

A reader yields each conversation with the position after it. A shuffled reader's order is a permutation drawn from a
seed, and its position a number. A streamed dataset keeps its own order, and its position is the state that the
datasets library gives.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

from tl_adapters.checkpoints.hub_client import dataset_builder, hub_errors, load_table
from tl_adapters.config import DataConfig
from tl_adapters.data.columns import ConversationColumns, UnusableRows
from tl_adapters.data.conversations import Conversation
from tl_adapters.data.traces import DataError
from tl_adapters.utils.reading import UnreadableFileError, parse_json

log = logging.getLogger(__name__)

ReaderPosition = Any
"""The position of a reader, as JSON can hold it; None is the beginning."""

_HASHED_BYTES = 2**22
"""Number of bytes at the beginning of a local data file that are hashed; with its size they identify the file."""

_LINE_ADVICE = 'A line is {"prompt": "...", "response": "<think>..."} or {"messages": [...]}.'


@runtime_checkable
class DocumentReader(Protocol):
    """Conversations in an order that depends on the seed alone."""

    fingerprint: str
    """Identifies the set of conversations."""
    files: str
    """Identifies the files as far as possible: content of local ones, commit of the hub's; "" if unknown."""
    bad_rows: UnusableRows
    """The rows that cannot be used."""

    def read(self, seed: str, position: ReaderPosition) -> Iterator[tuple[Conversation, ReaderPosition]]:
        """Conversations from ``position`` on, each with the position after it."""
        ...


def open_reader(config: DataConfig, split: str | None = None) -> DocumentReader:
    """A reader of the source that a configuration names: a .jsonl file, or a dataset of the hub.

    Args:
        config: names the source and its columns.
        split: the split of a hub dataset; None is the configuration's.

    Raises:
        DataError: there is no such file or dataset, it holds no usable rows, or a revision is given for a file.
    """
    columns = ConversationColumns(config)
    if config.revision is not None and os.path.exists(config.source):
        raise DataError(
            f"{config.source} is on this machine and has no revisions, and data.revision is {config.revision}: leave "
            "revision out, or give the name of a dataset on the hub."
        )
    if Path(config.source).suffix == ".jsonl" or os.path.isfile(config.source):
        return ShuffledReader(JsonlRecords(config.source), columns)
    dataset, files = _load_dataset(config, split or config.split)
    if config.streaming:
        facts = (config.source, config.subset, split or config.split, config.revision)
        return StreamedReader(dataset, columns, ", ".join(fact for fact in facts if fact), files)
    return ShuffledReader(HubRecords(dataset, config.source, files), columns)


class JsonlRecords:
    """The records of a .jsonl file, one object per line; only their offsets in the file are kept in memory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not os.path.isfile(path):
            raise DataError(f"There is no file {path}; give a .jsonl file, or the name of a dataset on the hub.")
        self._lines: list[tuple[int, int]] = []  # (line number, offset in bytes)
        digest, offset = hashlib.sha256(), 0
        with self._opened() as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    self._lines.append((number, offset))
                digest.update(line)
                offset += len(line)
        self.fingerprint = self.files = digest.hexdigest()[:16]
        if not self._lines:
            raise DataError(
                f'{path} holds no traces; a line is {{"prompt": "...", "response": "..."}} or {{"messages": [...]}}.'
            )

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Any:
        """A record. Raises DataError, which names the line, for one that is no JSON."""
        offset = self._lines[index][1]
        with self._opened() as file:
            file.seek(offset)
            line = file.readline()
        try:
            # A file's first bytes may be a byte-order mark, which is no part of its text.
            return parse_json(line.decode("utf-8" if offset else "utf-8-sig"), self.location(index), _LINE_ADVICE)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.location(index)} is not UTF-8 text (byte {error.start}). {_LINE_ADVICE}") from error
        except UnreadableFileError as error:
            raise DataError(str(error)) from error

    def location(self, index: int) -> str:
        """The file and the line of a record."""
        return f"{self.path}, line {self._lines[index][0]}"

    def _opened(self) -> BinaryIO:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise DataError(f"{self.path} cannot be read ({error.strerror}).") from error


class HubRecords:
    """The records of a dataset that was downloaded from the hub."""

    def __init__(self, dataset: Any, name: str, files: str) -> None:
        self._dataset, self._name, self.files = dataset, name, files
        self.fingerprint = str(dataset._fingerprint)
        if len(dataset) == 0:
            raise DataError(f"{name} holds no traces; give another split or subset, or another dataset.")

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        """A record."""
        return self._dataset[index]

    def location(self, index: int) -> str:
        """The dataset and the row of a record."""
        return f"{self._name}, row {index}"


class PairRecords:
    """(question, response) pairs in memory, as records."""

    def __init__(self, pairs: Sequence[tuple[str, str]], name: str) -> None:
        self._pairs, self._name = pairs, name
        self.fingerprint = self.files = hashlib.sha256(repr(pairs).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Any:
        """A record."""
        question, response = self._pairs[index]
        return {"prompt": question, "response": response}

    def location(self, index: int) -> str:
        """The name of the pairs and the number of one."""
        return f"{self._name}, pair {index}"


class ShuffledReader:
    """A reader in random order: position n is the n-th conversation of the permutation drawn from the seed."""

    def __init__(self, records: JsonlRecords | HubRecords | PairRecords, columns: ConversationColumns) -> None:
        self._records, self._columns = records, columns
        self.fingerprint, self.files, self.bad_rows = records.fingerprint, records.files, columns.bad_rows
        self.example_of_roles: dict[tuple[Any, ...], Conversation] = {}
        """A conversation of each sequence of roles in a file, so that a chat template can be checked on each."""
        if isinstance(records, JsonlRecords):  # a malformed line is reported now, not after hours of training
            for index in range(len(records)):
                if (conversation := self._conversation(index)) is not None:
                    roles = tuple(message["role"] for message in conversation)
                    self.example_of_roles.setdefault(roles, conversation)

    def __len__(self) -> int:
        return len(self._records)

    def _conversation(self, index: int) -> Conversation | None:
        location = self._records.location(index)
        try:
            record = self._records[index]
        except DataError as error:  # invalid JSON
            self.bad_rows.add(location, error)
            return None
        return self._columns.read(record, location)

    def read(self, seed: str, position: ReaderPosition) -> Iterator[tuple[Conversation, ReaderPosition]]:
        """Like `DocumentReader.read`."""
        order = random.Random(seed).sample(range(len(self._records)), len(self._records))
        for number in range(position or 0, len(order)):
            if (conversation := self._conversation(order[number])) is not None:
                yield conversation, number + 1


class StreamedReader:
    """A reader of a streamed dataset, in the dataset's own order regardless of the seed."""

    def __init__(self, dataset: Any, columns: ConversationColumns, name: str, files: str) -> None:
        self._dataset, self._columns, self._name, self.files = dataset, columns, name, files
        self.bad_rows = columns.bad_rows
        self.fingerprint = hashlib.sha256(name.encode()).hexdigest()[:16]
        self._beginning = dataset.state_dict()

    def read(self, seed: str, position: ReaderPosition) -> Iterator[tuple[Conversation, ReaderPosition]]:
        """Like `DocumentReader.read`; ``seed`` has no effect."""
        dataset = copy.deepcopy(self._dataset)  # a dataset has a single position, and iterations may overlap
        start = position if position is None or "row" in position else {"state": position, "row": None}
        start = start or {"state": self._beginning, "row": 0}
        dataset.load_state_dict(start["state"])
        for n, record in enumerate(self._records(dataset)):
            row = None if start["row"] is None else start["row"] + n
            # Positions of an earlier version hold no row number: then rows are counted from where the run resumed.
            location = f"row {row}" if row is not None else f"row {n} after the run was resumed"
            if (conversation := self._columns.read(record, f"{self._name}, {location}")) is not None:
                yield conversation, {"state": dataset.state_dict(), "row": None if row is None else row + 1}

    def _records(self, dataset: Any) -> Iterator[Any]:
        """The rows of a dataset. Raises DataError where the hub does not give the next one."""
        name = self._name.partition(",")[0]
        with hub_errors(f"The hub did not give the next row of {self._name}", name, error=DataError, kind="dataset"):
            yield from dataset


def _load_dataset(config: DataConfig, split: str) -> tuple[Any, str]:
    """The dataset that a configuration names, and the hash of its files. Raises DataError."""
    what = f"{config.source} (subset {config.subset}, split {split})"
    with hub_errors(
        f"{what} is neither a .jsonl file nor a dataset that the hub returned",
        config.source,
        error=DataError,
        kind="dataset",
        otherwise="Check the names of dataset, subset and split.",
    ):
        builder = dataset_builder(config.source, config.subset, revision=config.revision, error=DataError)
        return load_table(builder, split, config.streaming), hash_of_files(builder, config.source, split)


def hash_of_files(builder: Any, name: str, split: str) -> str:
    """Hash of the data files of a split: name, size and beginning of local ones, address and commit of the hub's.

    "" if the datasets library does not tell which files they are.
    """
    try:
        files = dict(builder.config.data_files or {})
        of_split = next((of_name for name, of_name in files.items() if str(name) == split.partition("[")[0]), None)
        paths = [str(path) for names in ([of_split] if of_split is not None else files.values()) for path in names]
    except Exception as error:  # whatever a release of the library has there instead; the dataset itself was found
        log.warning("The data files of %s are not known, so a change of them goes unnoticed: %s", name, error)
        return ""
    return hashlib.sha256(repr(sorted(map(_file_facts, paths))).encode()).hexdigest()[:16] if paths else ""


def _file_facts(path: str) -> tuple[str, ...]:
    """Identifies a data file: the hub's by its address, a local one by name, size and a hash of its beginning."""
    local = Path(path)
    if not local.is_file():
        return (path,)
    with local.open("rb") as file:
        head = hashlib.sha256(file.read(_HASHED_BYTES)).hexdigest()
    return (local.name, str(local.stat().st_size), head)
