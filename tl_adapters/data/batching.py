"""From documents to the batches of a run, in an order that is a pure function of seed and step.

Documents are taken a window at a time: encoded in the target's chat format, cut or dropped where they are too long,
shuffled, and bucketed by length so that little is padding. Each has its own row, so nothing leaks from one document
to the next. Where a run stands is a window's beginning and the steps since, so a stopped run reads on from there.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tl_adapters.config import REGIONS, DataConfig, Region
from tl_adapters.data.chat_format import ChatFormat, Conversation, Document
from tl_adapters.data.sources import BadRows, Position, Reader, Stream, open_reader
from tl_adapters.data.traces import Batch, DataError, Trace, collate, rows_by_length

log = logging.getLogger(__name__)


@runtime_checkable
class TraceSource(Protocol):
    """Training documents, a window at a time."""

    @property
    def fingerprint(self) -> str:
        """Tells one set of documents from another."""
        ...

    def windows(self, epoch: int, position: Position) -> Iterator[tuple[Position, list[Trace]]]:
        """The windows of an epoch from ``position`` (a window's beginning) on, each with where it begins."""
        ...


class TracesInMemory:
    """A list of traces: one window."""

    def __init__(self, traces: Sequence[Trace], count: Sequence[Region] = REGIONS) -> None:
        self._traces = [trace for trace in traces if trace.counts(count)]
        if not self._traces:
            raise DataError(
                f"None of the {len(traces)} traces has a token to learn from: count is {list(count)}."
                if traces
                else "Training needs at least one trace; got none."
            )
        if len(self._traces) < len(traces):
            log.warning("%d traces are left out: nothing in them counts.", len(traces) - len(self._traces))
        digest = hashlib.sha256()
        for trace in self._traces:
            facts = [len(trace.tokens), trace.prompt_length, trace.thinking_length, *trace.tokens]
            digest.update(np.array(facts, dtype=np.int64).tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    def windows(self, epoch: int, position: Position) -> Iterator[tuple[Position, list[Trace]]]:
        """As `TraceSource.windows`."""
        yield None, self._traces


@dataclass
class DataStatistics:
    """What a survey of the first documents found."""

    documents: int = 0
    """Documents looked at."""
    used: int = 0
    """Of these, how many are trained on."""
    truncated: int = 0
    """Longer than max_tokens, and cut."""
    dropped: int = 0
    """Longer than max_tokens, and left out."""
    nothing_counts: int = 0
    """Without a token that the objective counts, and left out."""
    held_out: int = 0
    """Kept for validation."""
    without_thinking: int = 0
    """Used, but with no thinking part."""
    bad_rows: int = 0
    """No conversations, or refused by the chat template, and left out."""
    tokens: dict[str, int] | None = None
    """Tokens by region, of the documents used."""
    lengths: dict[str, int] | None = None
    """Shortest, median, 90th percentile and longest, in tokens, of the documents used."""

    def __str__(self) -> str:
        lengths = ", ".join(f"{name} {value:,}" for name, value in (self.lengths or {}).items())
        tokens = ", ".join(f"{name} {value:,}" for name, value in (self.tokens or {}).items())
        return (
            f"{self.used:,} of {self.documents:,} documents are used (too long: {self.truncated:,} truncated, "
            f"{self.dropped:,} dropped; held out {self.held_out:,}; nothing to count {self.nothing_counts:,}; without "
            f"thinking {self.without_thinking:,}; unusable rows left out {self.bad_rows:,}). Length in tokens: "
            f"{lengths}. Tokens: {tokens}."
        )


_CHANGES_NO_TRACE = (
    "source", "domain_column", "survey_documents", "validation_documents", "bad_rows", "template_date"
)  # fmt: skip
_SINCE_0_2 = ("thinking_column", "system_column")
"""Options that a run of 0.1 did not have: where they are not set, its fingerprint stays what it was."""
RENDERED = 64
"""Documents whose token ids are in the fingerprint: what a template, a tokenizer or changed data makes of them."""


class EncodedDocuments:
    """A reader's documents as traces: what `windows` trains on and `validation` holds out.

    Args:
        reader: gives the conversations.
        chat: the target's chat format.
        config: what happens to long documents, how large a window is, what is held out.
        max_tokens: the target's context length, where the configuration names no limit of its own.
        seed: of the documents' order.
        count: the regions that the objective counts.
        validation: gives held-out documents instead of a share of ``reader``'s.
    """

    def __init__(
        self,
        reader: Reader,
        chat: ChatFormat,
        config: DataConfig,
        max_tokens: int,
        seed: int = 0,
        count: Sequence[Region] = REGIONS,
        validation: Reader | None = None,
    ) -> None:
        self._reader, self._chat, self._config, self._seed, self._count = reader, chat, config, seed, tuple(count)
        self._max_tokens = min(config.max_tokens or max_tokens, max_tokens)
        self._validation_reader = validation
        self._bad_rows = BadRows(config)  # those that the template refuses; the reader has its own
        for conversation in getattr(reader, "kinds", {}).values():
            self._document(conversation)  # a template that refuses a kind of row is said now, not after hours

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """What the traces were made from, part by part: options, files, chat template, and how it renders some.

        "data" is what a run of version 0.1 recorded, so that such a run can be taken up.
        """
        config, chat, tokenizer = self._config, self._chat, self._chat.tokenizer
        # What the traces depend on: not where the file lies, nor what is only looked at.
        options = {key: value for key, value in asdict(config).items() if key not in _CHANGES_NO_TRACE}
        options = {key: value for key, value in options.items() if key not in _SINCE_0_2 or value is not None}
        facts = {
            **options,
            "reader": self._reader.fingerprint,
            "max_tokens": self._max_tokens,
            "count": self._count,
            "chat": (tokenizer.chat_template, chat.turn_end, sorted(tokenizer.get_vocab().items())),
        }
        probed = {f.name: getattr(chat, f.name) for f in fields(chat) if f.name != "tokenizer"}
        with self._reader.bad_rows.ignored(), self._bad_rows.ignored():  # they are met where they are read
            rendered = [document for document, _ in islice(self._reader.read("fingerprint", None), RENDERED)]
            traces = chat.tokenize([d for c in rendered if (d := self._document(c)) is not None])
        return {
            "data": _hashed(sorted(facts.items())),
            "data_files": self._reader.files,
            "chat_template": _hashed([str(tokenizer.chat_template), *sorted(map(repr, probed.items()))]),
            "rendered_text": _hashed([trace.tokens for trace in traces]),
        }

    @property
    def fingerprint(self) -> str:
        """Tells one set of documents from another."""
        return _hashed(sorted(self.fingerprints.items()))

    @property
    def template_date(self) -> datetime.date | None:
        """The date that the chat template writes into every document; None where it writes none."""
        return self._chat.date

    def dated(self, date: datetime.date) -> EncodedDocuments:
        """The same documents with another date in them, where the chat template writes one."""
        if self._chat.date in (None, date):
            return self
        chat = ChatFormat.of(self._chat.tokenizer, self._chat.think_start, self._chat.think_end, date)
        return EncodedDocuments(
            self._reader, chat, self._config, self._max_tokens, self._seed, self._count, self._validation_reader
        )

    def warning(self, statistics: DataStatistics) -> str | None:
        """What to know of documents of which `survey` found ``statistics``: that the target thinks and none of them."""
        if not statistics.used or statistics.without_thinking < statistics.used or not self._chat.writes_thinking:
            return None
        return (
            f"None of the {statistics.used:,} documents has thinking, and the target thinks before it answers "
            f"({self._chat.think_start} ... {self._chat.think_end}): adapters would learn from answers alone. Name the "
            "column that holds the thinking (data.thinking_column), or the tags around it (data.think_start, "
            "data.think_end)."
        )

    def log_survey(self) -> DataStatistics:
        """What `survey` finds, logged; and what to know of it, each as a warning of its own."""
        statistics = self.survey()
        log.info("%s", statistics)
        warnings = [difference.says for difference in self._chat.differences() if not difference.meant]
        for says in [*warnings, self.warning(statistics)]:
            if says:
                log.warning("%s", says)
        return statistics

    def windows(self, epoch: int, position: Position) -> Iterator[tuple[Position, list[Trace]]]:
        """As `TraceSource.windows`. Raises DataError where an epoch leaves nothing to train on."""
        documents = self._reader.read(f"{self._seed}-documents-{epoch}", position)
        found = position is not None
        while taken := list(islice(documents, self._config.shuffle_window)):
            begins, position = position, taken[-1][1]
            traces = self._encode([c for c, _ in taken if not self._held_out(c)], DataStatistics())
            if traces:
                found = True
                yield begins, traces
        if not found:
            raise DataError(
                f"{self._config.source} leaves nothing to train on: every document is held out, longer than "
                f"{self._max_tokens} tokens, without a token in {list(self._count)}, or a row that cannot be used "
                f"({self._unusable:,} were left out)."
            )

    def traces(self) -> list[Trace]:
        """All of them at once. Raises DataError where there are none."""
        return [trace for _, window in self.windows(0, None) for trace in window]

    def validation(self) -> list[Trace]:
        """The held-out documents, as many as the configuration asks for at most."""
        config = self._config
        if self._validation_reader is not None:
            documents = (c for c, _ in self._validation_reader.read(f"{self._seed}-validation", None))
        elif config.validation_fraction:
            # Enough to find so many at this share, and a bound on what is read of an endless stream.
            within = int(4 * config.validation_documents / config.validation_fraction)
            read = islice(self._reader.read(f"{self._seed}-documents-0", None), within)
            documents = (c for c, _ in read if self._held_out(c))
        else:
            return []
        return self._encode(list(islice(documents, config.validation_documents)), DataStatistics())

    def survey(self) -> DataStatistics:
        """Lengths, truncation and regions of the first documents, counted before training starts."""
        statistics = DataStatistics()
        # Where a long document is an error, it is one now, not in the middle of the night; a stream has no end.
        all_of_them = self._config.too_long == "refuse" and not isinstance(self._reader, Stream)
        within = None if all_of_them else self._config.survey_documents
        conversations = [c for c, _ in islice(self._reader.read(f"{self._seed}-documents-0", None), within)]
        statistics.documents = len(conversations)
        kept = [c for c in conversations if not self._held_out(c)]
        statistics.held_out = len(conversations) - len(kept)
        traces = self._encode(kept, statistics)
        statistics.used, statistics.bad_rows = len(traces), self._unusable
        statistics.without_thinking = sum(trace.thinking_length == 0 for trace in traces)
        lengths = sorted(len(trace.tokens) for trace in traces)
        if lengths:
            at = lambda share: lengths[min(len(lengths) - 1, int(share * len(lengths)))]  # noqa: E731
            statistics.lengths = {"shortest": lengths[0], "median": at(0.5), "90 %": at(0.9), "longest": lengths[-1]}
            prompt, thinking = (sum(getattr(t, f"{r}_length") for t in traces) for r in ("prompt", "thinking"))
            rest = sum(lengths) - prompt - thinking
            statistics.tokens = {"prompt": prompt, "thinking": thinking, "answer": rest}
        return statistics

    def _held_out(self, conversation: Conversation) -> bool:
        if not self._config.validation_fraction or self._validation_reader is not None:
            return False
        question = next(m["content"] for m in conversation if m["role"] == "user")
        share = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") / 2**64
        return share < self._config.validation_fraction

    @property
    def _unusable(self) -> int:
        return len(self._reader.bad_rows.rows) + len(self._bad_rows.rows)

    def _where(self, conversation: Conversation) -> str:
        return str(getattr(conversation, "where", self._config.source))

    def _document(self, conversation: Conversation) -> Document | None:
        """The conversation as text; None where the template refuses it and such rows are dropped."""
        try:
            return self._chat.document(conversation)
        except DataError as error:
            self._bad_rows.meet(self._where(conversation), error)
            return None

    def _encode(self, conversations: Sequence[Conversation], statistics: DataStatistics) -> list[Trace]:
        kept = []
        found = [(self._where(c), d) for c in conversations if (d := self._document(c)) is not None]
        for (where, _), trace in zip(found, self._chat.tokenize([d for _, d in found]), strict=True):
            if len(trace.tokens) > self._max_tokens:
                if self._config.too_long == "refuse":
                    raise DataError(
                        f"A document of {self._config.source} has {len(trace.tokens):,} tokens; max_tokens (or the "
                        f"target's context) is {self._max_tokens:,}. It is {where}. Set too_long to truncate or drop."
                    )
                if self._config.too_long == "drop":
                    statistics.dropped += 1
                    continue
                statistics.truncated += 1
                trace = trace.cut(self._max_tokens)
            if trace.counts(self._count):
                kept.append(trace)
            else:
                statistics.nothing_counts += 1
        return kept


def _hashed(facts: Sequence[Any]) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def open_documents(
    config: DataConfig, chat: ChatFormat, max_tokens: int, seed: int = 0, count: Sequence[Region] = REGIONS
) -> EncodedDocuments:
    """The documents that a configuration names. Raises DataError."""
    validation = open_reader(config, config.validation_split) if config.validation_split else None
    return EncodedDocuments(open_reader(config), chat, config, max_tokens, seed, count, validation)


class BatchOrder:
    """The batches of a training run: ``order[step]`` depends on source, seed and step alone.

    Each window is shuffled, its traces batched with neighbours in length, and the batches shuffled; at the end of the
    source a new epoch begins.
    """

    def __init__(
        self, source: TraceSource, tokens_per_batch: int, seed: int, count: Sequence[Region] = REGIONS
    ) -> None:
        self._source, self._tokens_per_batch, self._seed, self._count = source, tokens_per_batch, seed, tuple(count)
        self._go_to({"epoch": 0, "window": 0, "first_step": 0, "source": None})

    @property
    def position(self) -> dict[str, Any]:
        """Where the current window begins, as JSON can hold it; `restore` goes back there."""
        return dict(self._position)

    def restore(self, position: dict[str, Any]) -> None:
        """Go to where `position` was read."""
        self._go_to(position)

    def _go_to(self, position: dict[str, Any]) -> None:
        self._position = dict(position)
        self._windows = self._source.windows(position["epoch"], position["source"])
        self._groups = self._shuffled(next(self._windows))

    def _shuffled(self, window: tuple[Position, list[Trace]]) -> list[list[Trace]]:
        self._position["source"], window_traces = window
        epoch, number = self._position["epoch"], self._position["window"]
        rng = random.Random(f"{self._seed}-order-{epoch}" + (f"-{number}" if number else ""))
        traces = rng.sample(window_traces, len(window_traces))
        groups = [[traces[i] for i in rows] for rows in rows_by_length(traces, self._tokens_per_batch)]
        rng.shuffle(groups)
        return groups

    def _next_window(self) -> None:
        first_step = self._position["first_step"] + len(self._groups)
        window = next(self._windows, None)
        if window is None:
            self._go_to({"epoch": self._position["epoch"] + 1, "window": 0, "first_step": first_step, "source": None})
        else:
            self._position |= {"window": self._position["window"] + 1, "first_step": first_step}
            self._groups = self._shuffled(window)

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        if step < self._position["first_step"]:
            self._go_to({"epoch": 0, "window": 0, "first_step": 0, "source": None})
        while step >= self._position["first_step"] + len(self._groups):
            self._next_window()
        return collate(self._groups[step - self._position["first_step"]], self._count)
