"""Where documents come from: a jsonl file or a dataset of the hub, read in an order that can be taken up again.

A *reader* yields (conversation, position after it). In random order it is a permutation drawn from a seed, and the
position a number; a streamed dataset keeps its own order, and its position is what the datasets library gives.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tl_adapters.config import DataConfig
from tl_adapters.data.chat_format import THINKING_FIELDS, Conversation, Message
from tl_adapters.data.traces import DataError

log = logging.getLogger(__name__)

Position = Any
"""Where a reader stands; JSON can hold it, and None is the beginning."""

CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
PROMPT_COLUMNS = ("prompt", "question", "problem")
RESPONSE_COLUMNS = ("response", "completion", "generation")
THINKING_COLUMNS = THINKING_FIELDS
SYSTEM_COLUMNS = ("system",)
DOMAIN_COLUMNS = ("domain",)
_ROLES = {"human": "user", "gpt": "assistant"}


LOGGED = 5
"""Rows that are dropped are logged one by one, up to so many; all are counted."""
_HEAD = 2**22
"""Bytes of a local data file that are hashed; with its size they tell a file that changed."""


class Turns(list[Message]):
    """A conversation that knows which row it is of."""

    def __init__(self, turns: Sequence[Message], where: str) -> None:
        super().__init__(turns)
        self.where = where


class BadRows:
    """Rows that cannot be used: the first is an error, or all are left out and counted."""

    def __init__(self, config: DataConfig) -> None:
        self.drop = config.bad_rows == "drop"
        self.rows: dict[str, str] = {}
        """The rows that were left out, and why."""
        self._ignored = False

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """Within it rows that cannot be used are passed over, neither counted nor an error."""
        self._ignored = True
        try:
            yield
        finally:
            self._ignored = False

    def meet(self, where: str, error: DataError) -> None:
        """Count a row that cannot be used. Raises DataError, with the row's place and what to do, unless dropping."""
        if self._ignored:
            return
        says = str(error) if str(error).startswith(where) else f"{where}: {error}"
        says += "" if says.endswith(".") else "."
        if not self.drop:
            raise DataError(
                f"{says} Mend the row, or leave such rows out and have them counted (data.bad_rows: drop; --bad-rows "
                "drop, also with train --resume)."
            ) from error
        if where not in self.rows:
            self.rows[where] = says
            if len(self.rows) <= LOGGED:
                log.warning("Left out: %s", says)


@runtime_checkable
class Reader(Protocol):
    """Documents in an order that depends on the seed alone."""

    fingerprint: str
    """Tells one set of documents from another."""
    files: str
    """What the documents were read from, as far as it can be told: content of local files, commit of the hub's."""
    bad_rows: BadRows
    """The rows that could not be read."""

    def read(self, seed: str, position: Position) -> Iterator[tuple[Conversation, Position]]:
        """Documents from ``position`` on, each with the position after it."""
        ...


def open_reader(config: DataConfig, split: str | None = None) -> Reader:
    """The reader of a source: a .jsonl file, or a dataset of the hub. Raises DataError.

    Args:
        config: names the source and its columns.
        split: of a hub dataset, instead of the configuration's.
    """
    columns = Columns(config)
    if Path(config.source).suffix == ".jsonl" or Path(config.source).is_file():
        return RandomAccess(JsonlFile(config.source), columns)
    dataset = _load_dataset(config, split or config.split)
    files = _data_files(config, split or config.split)
    if config.streaming:
        facts = (config.source, config.subset, split or config.split, config.revision)
        return Stream(dataset, columns, ", ".join(fact for fact in facts if fact), files)
    return RandomAccess(HubTable(dataset, config.source, files), columns)


class Columns:
    """How a record becomes a conversation."""

    def __init__(self, config: DataConfig) -> None:
        self._conversation = [config.conversation_column] if config.conversation_column else CONVERSATION_COLUMNS
        self._prompt = [config.prompt_column] if config.prompt_column else PROMPT_COLUMNS
        self._response = [config.response_column] if config.response_column else RESPONSE_COLUMNS
        self._domain = [config.domain_column] if config.domain_column else DOMAIN_COLUMNS
        self._thinking = [config.thinking_column] if config.thinking_column else THINKING_COLUMNS
        self._system = [config.system_column] if config.system_column else SYSTEM_COLUMNS
        self.bad_rows = BadRows(config)
        self._prefers_pairs = config.prompt_column is not None

    def conversation(self, record: Any, where: str) -> Conversation:
        """The record's turns. Raises DataError, which says ``where``."""
        if not isinstance(record, Mapping):
            raise DataError(f"{where}: {type(record).__name__} is no record; a line is a JSON object.")
        turns = None if self._prefers_pairs else _first(record, self._conversation)
        if turns is None:
            prompt, response = _first(record, self._prompt), _first(record, self._response)
            if prompt is None or response is None:
                raise DataError(
                    f"{where}: no question and response in columns {', '.join(map(str, record))}. Known are "
                    f"{', '.join(PROMPT_COLUMNS)} with {', '.join(RESPONSE_COLUMNS)}, or turns in "
                    f"{', '.join(CONVERSATION_COLUMNS)}; name others by prompt_column, response_column or "
                    "conversation_column."
                )
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        turns = self._with_columns(turns, record)
        messages = _checked(turns, where)
        domain = _first(record, self._domain)
        if domain is not None:
            messages = [*messages[:-1], {**messages[-1], "domain": str(domain)}]
        return Turns(messages, where)

    def _with_columns(self, turns: Any, record: Mapping[str, Any]) -> Any:
        """Turns with what stands in columns beside them: the system turn, and the thinking of the last."""
        if not isinstance(turns, (list, tuple)) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
            return turns
        thought, system = _first(record, self._thinking), _first(record, self._system)
        if thought is not None and not any(turns[-1].get(field) for field in THINKING_FIELDS):
            turns = [*turns[:-1], {**turns[-1], THINKING_FIELDS[0]: thought}]
        if system not in (None, "") and turns[0].get("role", turns[0].get("from")) != "system":
            turns = [{"role": "system", "content": system}, *turns]
        return turns

    def read(self, record: Any, where: str) -> Conversation | None:
        """As `conversation`; None for a row that cannot be used and is dropped."""
        try:
            return self.conversation(record, where)
        except DataError as error:
            self.bad_rows.meet(where, error)
            return None


def _first(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _checked(turns: Any, where: str) -> Conversation:
    if not isinstance(turns, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f"{where}: turns are {type(turns).__name__}; allowed is a list of {{role, content}}.")
    messages = []
    for turn in turns:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        thought = next((turn[field] for field in THINKING_FIELDS if turn.get(field)), None)
        if content is None and thought is not None:
            content = ""  # cut off while it thought
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"{where}: a turn holds {sorted(turn)}; role and content must be text.")
        if not isinstance(thought, str | None):
            raise DataError(f"{where}: a turn's thinking is {type(thought).__name__}; it must be text.")
        for text in (content, thought or ""):
            _require_unicode(text, where)
        message = {"role": _ROLES.get(role, role), "content": content}
        messages.append(message if thought is None else {**message, THINKING_FIELDS[0]: thought})
    roles = [message["role"] for message in messages]
    if "user" not in roles or roles[-1] != "assistant":
        raise DataError(f"{where}: roles are {roles}; the last turn must be an assistant's response to a user.")
    if not (messages[-1]["content"] + messages[-1].get(THINKING_FIELDS[0], "")).strip():
        raise DataError(f"{where}: the response is empty.")
    return messages


def _require_unicode(text: str, where: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a character; no tokenizer can read it
            raise DataError(f"{where}: {error}; the text is not Unicode.") from error


class JsonlFile:
    """The records of a .jsonl file, one object a line; only their places in the file are held."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{path} is no file; give a .jsonl file, or the name of a dataset on the hub.")
        self._lines: list[tuple[int, int]] = []  # number, offset
        digest, offset = hashlib.sha256(), 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    self._lines.append((number, offset))
                digest.update(line)
                offset += len(line)
        self.fingerprint = self.files = digest.hexdigest()[:16]
        if not self._lines:
            raise DataError(f"{path} holds no traces.")

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> tuple[Any, str]:
        """A record, and the words that say where it stands."""
        number, offset = self._lines[index]
        where = f"{self.path}, line {number}"
        with self.path.open("rb") as file:
            file.seek(offset)
            line = file.readline()
        try:
            return json.loads(line), where
        except (ValueError, RecursionError) as error:
            raise DataError(
                f'{where}: {error}. A line is {{"prompt": "...", "response": "<think>..."}} or {{"messages": [...]}}.'
            ) from error


class HubTable:
    """The records of a downloaded dataset."""

    def __init__(self, dataset: Any, name: str, files: str) -> None:
        self._dataset, self._name, self.files = dataset, name, files
        self.fingerprint = str(dataset._fingerprint)
        if len(dataset) == 0:
            raise DataError(f"{name} holds no traces.")

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Any, str]:
        """A record, and the words that say where it stands."""
        return self._dataset[index], f"{self._name}, row {index}"


class PairList:
    """(question, response) pairs in memory as records."""

    def __init__(self, pairs: Sequence[tuple[str, str]], name: str) -> None:
        self._pairs, self._name = pairs, name
        self.fingerprint = self.files = hashlib.sha256(repr(pairs).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[Any, str]:
        """A record, and the words that say where it stands."""
        question, response = self._pairs[index]
        return {"prompt": question, "response": response}, f"{self._name}, pair {index}"


class RandomAccess:
    """A reader in random order: position n is the n-th document of the seed's permutation."""

    def __init__(self, records: JsonlFile | HubTable | PairList, columns: Columns) -> None:
        self._records, self._columns = records, columns
        self.fingerprint, self.files, self.bad_rows = records.fingerprint, records.files, columns.bad_rows
        self.kinds: dict[tuple[Any, ...], Conversation] = {}
        """Of a file: a conversation of each sequence of roles, so that a chat template can be tried on every kind."""
        if isinstance(records, JsonlFile):  # a malformed line is said before hours of training, not after
            for index in range(len(records)):
                if (found := self._conversation(index)) is not None:
                    self.kinds.setdefault(tuple(message["role"] for message in found), found)

    def __len__(self) -> int:
        return len(self._records)

    def _conversation(self, index: int) -> Conversation | None:
        try:
            record, where = self._records[index]
        except DataError as error:  # no JSON; the message says which line
            self.bad_rows.meet(str(error).partition(": ")[0], error)
            return None
        return self._columns.read(record, where)

    def read(self, seed: str, position: Position) -> Iterator[tuple[Conversation, Position]]:
        """As `Reader.read`."""
        order = random.Random(seed).sample(range(len(self._records)), len(self._records))
        for place in range(position or 0, len(order)):
            if (found := self._conversation(order[place])) is not None:
                yield found, place + 1


class Stream:
    """A reader of a streamed dataset, in the dataset's own order whatever the seed."""

    def __init__(self, dataset: Any, columns: Columns, name: str, files: str) -> None:
        self._dataset, self._columns, self._name, self.files = dataset, columns, name, files
        self.bad_rows = columns.bad_rows
        self.fingerprint = hashlib.sha256(name.encode()).hexdigest()[:16]
        self._beginning = dataset.state_dict()

    def read(self, seed: str, position: Position) -> Iterator[tuple[Conversation, Position]]:
        """As `Reader.read`; ``seed`` changes nothing."""
        dataset = copy.deepcopy(self._dataset)  # a dataset has one place to stand at, and readings may overlap
        begun = position if position is None or "row" in position else {"state": position, "row": None}
        begun = begun or {"state": self._beginning, "row": 0}
        dataset.load_state_dict(begun["state"])
        for n, record in enumerate(dataset):
            row = None if begun["row"] is None else begun["row"] + n
            # An earlier version kept no number: then rows are counted from where the run was taken up.
            place = f"row {row}" if row is not None else f"row {n} after the run was taken up"
            if (found := self._columns.read(record, f"{self._name}, {place}")) is not None:
                yield found, {"state": dataset.state_dict(), "row": None if row is None else row + 1}


def _load_dataset(config: DataConfig, split: str) -> Any:
    import datasets  # a second to import, and only hub data needs it

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(
            config.source, config.subset, split=split, revision=config.revision, streaming=config.streaming
        )
    except Exception as error:  # the library raises a dozen classes for what the user named wrongly
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{config.source} (subset {config.subset}, split {split}) is neither a .jsonl file nor a dataset that the "
            f"hub gave: {reason}"
        ) from error


def _data_files(config: DataConfig, split: str) -> str:
    """Hash of the files of a dataset's split: name, size and beginning of local ones, name and commit of the hub's.

    "" where the datasets library does not say which files they are.
    """
    import datasets

    try:
        builder = datasets.load_dataset_builder(config.source, config.subset, revision=config.revision)
        files = dict(builder.config.data_files or {})
        of_split = next((found for name, found in files.items() if str(name) == split.partition("[")[0]), None)
        paths = [str(path) for found in ([of_split] if of_split is not None else files.values()) for path in found]
    except Exception as error:  # a dozen classes, as above; the documents themselves were found
        log.warning("Which files %s has cannot be told, so a change of them goes unnoticed: %s", config.source, error)
        return ""
    return hashlib.sha256(repr(sorted(map(_file_facts, paths))).encode()).hexdigest()[:16] if paths else ""


def _file_facts(path: str) -> tuple[str, ...]:
    """What tells a data file: of the hub's its address, which names the commit; of a local one size and beginning."""
    local = Path(path)
    if not local.is_file():
        return (path,)
    with local.open("rb") as file:
        head = hashlib.sha256(file.read(_HEAD)).hexdigest()
    return (local.name, str(local.stat().st_size), head)
