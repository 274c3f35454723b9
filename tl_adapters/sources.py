"""Where documents come from: a jsonl file or a dataset of the hub, read in an order that can be taken up again.

A *reader* yields (conversation, position after it). In random order it is a permutation drawn from a seed, and the
position a number; a streamed dataset keeps its own order, and its position is what the datasets library gives.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tl_adapters.chat import Conversation
from tl_adapters.config import DataConfig
from tl_adapters.data import DataError

Position = Any
"""Where a reader stands; JSON can hold it, and None is the beginning."""

CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
PROMPT_COLUMNS = ("prompt", "question", "problem")
RESPONSE_COLUMNS = ("response", "completion", "generation")
DOMAIN_COLUMNS = ("domain",)
_ROLES = {"human": "user", "gpt": "assistant"}


@runtime_checkable
class Reader(Protocol):
    """Documents in an order that depends on the seed alone."""

    fingerprint: str
    """Tells one set of documents from another."""

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
    if config.streaming:
        facts = (config.source, config.subset, split or config.split, config.revision)
        return Stream(dataset, columns, ", ".join(fact for fact in facts if fact))
    return RandomAccess(HubTable(dataset, config.source), columns)


class Columns:
    """How a record becomes a conversation."""

    def __init__(self, config: DataConfig) -> None:
        self._conversation = [config.conversation_column] if config.conversation_column else CONVERSATION_COLUMNS
        self._prompt = [config.prompt_column] if config.prompt_column else PROMPT_COLUMNS
        self._response = [config.response_column] if config.response_column else RESPONSE_COLUMNS
        self._domain = [config.domain_column] if config.domain_column else DOMAIN_COLUMNS
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
        messages = _checked(turns, where)
        domain = _first(record, self._domain)
        return messages if domain is None else [*messages[:-1], {**messages[-1], "domain": str(domain)}]


def _first(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _checked(turns: Any, where: str) -> Conversation:
    if not isinstance(turns, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f"{where}: turns are {type(turns).__name__}; allowed is a list of {{role, content}}.")
    messages = []
    for turn in turns:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"{where}: a turn holds {sorted(turn)}; role and content must be text.")
        if not content.isascii():
            try:
                content.encode()
            except UnicodeEncodeError as error:  # JSON can spell half a character; no tokenizer can read it
                raise DataError(f"{where}: {error}; the text is not Unicode.") from error
        messages.append({"role": _ROLES.get(role, role), "content": content})
    roles = [message["role"] for message in messages]
    if "user" not in roles or roles[-1] != "assistant":
        raise DataError(f"{where}: roles are {roles}; the last turn must be an assistant's response to a user.")
    if not messages[-1]["content"].strip():
        raise DataError(f"{where}: the response is empty.")
    return messages


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
        self.fingerprint = digest.hexdigest()[:16]
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

    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset, self._name = dataset, name
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
        self.fingerprint = hashlib.sha256(repr(pairs).encode()).hexdigest()[:16]

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
        self.fingerprint = records.fingerprint
        if isinstance(records, JsonlFile):  # a malformed line is said before hours of training, not after
            for index in range(len(records)):
                self._conversation(index)

    def __len__(self) -> int:
        return len(self._records)

    def _conversation(self, index: int) -> Conversation:
        return self._columns.conversation(*self._records[index])

    def read(self, seed: str, position: Position) -> Iterator[tuple[Conversation, Position]]:
        """As `Reader.read`."""
        order = random.Random(seed).sample(range(len(self._records)), len(self._records))
        for place in range(position or 0, len(order)):
            yield self._conversation(order[place]), place + 1


class Stream:
    """A reader of a streamed dataset, in the dataset's own order whatever the seed."""

    def __init__(self, dataset: Any, columns: Columns, name: str) -> None:
        self._dataset, self._columns, self._name = dataset, columns, name
        self.fingerprint = hashlib.sha256(name.encode()).hexdigest()[:16]
        self._beginning = dataset.state_dict()

    def read(self, seed: str, position: Position) -> Iterator[tuple[Conversation, Position]]:
        """As `Reader.read`; ``seed`` changes nothing."""
        dataset = copy.deepcopy(self._dataset)  # a dataset has one place to stand at, and readings may overlap
        dataset.load_state_dict(position or self._beginning)
        for record in dataset:
            yield self._columns.conversation(record, self._name), dataset.state_dict()


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
