"""A source's documents as traces: training windows, held-out documents, a survey, and fingerprints."""

from __future__ import annotations

import datetime
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import islice
from typing import Any

from tl_adapters.config import REGIONS, DataConfig, Region
from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.data.columns import UnusableRows
from tl_adapters.data.conversations import Conversation, Document
from tl_adapters.data.sources import DocumentReader, ReaderPosition, StreamedReader, open_reader
from tl_adapters.data.template_differences import template_differences
from tl_adapters.data.traces import DataError, Trace

log = logging.getLogger(__name__)


@dataclass
class DataStatistics:
    """Counts and lengths of the first documents of a source (`EncodedDocuments.survey`)."""

    documents: int = 0
    """Documents that were surveyed."""
    used: int = 0
    """Documents that are trained on."""
    truncated: int = 0
    """Documents longer than max_tokens that were cut."""
    dropped: int = 0
    """Documents longer than max_tokens that were dropped."""
    nothing_counts: int = 0
    """Documents that were dropped because the objective counts none of their tokens."""
    held_out: int = 0
    """Documents that are held out for validation."""
    without_thinking: int = 0
    """Documents that are used and hold no thinking."""
    bad_rows: int = 0
    """Rows that were dropped because they hold no conversation or the chat template refuses it."""
    tokens: dict[str, int] | None = None
    """Number of tokens by region, over the documents that are used."""
    lengths: dict[str, int] | None = None
    """Shortest, median, 90th percentile and longest length of the documents that are used, in tokens."""

    def __str__(self) -> str:
        lengths = ", ".join(f"{name} {value:,}" for name, value in (self.lengths or {}).items())
        tokens = ", ".join(f"{name} {value:,}" for name, value in (self.tokens or {}).items())
        return (
            f"{self.used:,} of {self.documents:,} documents are used (too long: {self.truncated:,} truncated, "
            f"{self.dropped:,} dropped; held out {self.held_out:,}; nothing to count {self.nothing_counts:,}; without "
            f"thinking {self.without_thinking:,}; unusable rows dropped {self.bad_rows:,}). Length in tokens: "
            f"{lengths}. Tokens: {tokens}."
        )


_NOT_FINGERPRINTED = (
    "source", "domain_column", "survey_documents", "validation_documents", "bad_rows", "template_date"
)  # fmt: skip
"""Options that do not change the traces: where the file is, what is only counted, what is dropped."""
_SINCE_0_2 = ("thinking_column", "system_column")
"""Options that version 0.1 did not have: they are fingerprinted only if set, so that runs of 0.1 can be resumed."""
FINGERPRINTED_DOCUMENTS = 64
"""Number of documents whose token ids are in the fingerprint, which a changed template, tokenizer or file changes."""


class EncodedDocuments:
    """The documents of a reader as traces: `windows` yields those trained on, `validation` those held out.

    Args:
        reader: yields the conversations.
        chat: the target's chat format.
        config: how long documents are handled, the size of a window, the share that is held out.
        max_tokens: the target's context length; the configuration may name a smaller limit.
        seed: seed of the documents' order.
        count: the regions that the objective counts.
        validation: yields the held-out documents, instead of a share of ``reader``'s.

    Raises:
        DataError: the chat template refuses one of the kinds of conversation in a file, and such rows are an error.
    """

    def __init__(
        self,
        reader: DocumentReader,
        chat: ChatFormat,
        config: DataConfig,
        max_tokens: int,
        seed: int = 0,
        count: Sequence[Region] = REGIONS,
        validation: DocumentReader | None = None,
    ) -> None:
        self._reader, self._chat, self._config, self._seed, self._count = reader, chat, config, seed, tuple(count)
        self._max_tokens = min(config.max_tokens or max_tokens, max_tokens)
        self._validation_reader = validation
        # Rows that the template refuses; the reader counts those that it cannot read.
        self._bad_rows = UnusableRows(config)
        for conversation in getattr(reader, "example_of_roles", {}).values():
            self._document(conversation)  # a refusal is reported now, not after hours of training

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprint of each thing that the traces depend on: options, files, chat template, rendered documents.

        "data" is the one fingerprint that version 0.1 recorded, so that its runs can be resumed.
        """
        config, chat, tokenizer = self._config, self._chat, self._chat.tokenizer
        options = {key: value for key, value in asdict(config).items() if key not in _NOT_FINGERPRINTED}
        options = {key: value for key, value in options.items() if key not in _SINCE_0_2 or value is not None}
        facts = {
            **options,
            "reader": self._reader.fingerprint,
            "max_tokens": self._max_tokens,
            "count": self._count,
            "chat": (tokenizer.chat_template, chat.turn_end, sorted(tokenizer.get_vocab().items())),
        }
        chat_fields = {f.name: getattr(chat, f.name) for f in fields(chat) if f.name != "tokenizer"}
        with self._reader.bad_rows.ignored(), self._bad_rows.ignored():  # they are reported in training
            rows = islice(self._reader.read("fingerprint", None), FINGERPRINTED_DOCUMENTS)
            traces = chat.tokenize([document for row, _ in rows if (document := self._document(row)) is not None])
        return {
            "data": _hashed(sorted(facts.items())),
            "data_files": self._reader.files,
            "chat_template": _hashed([str(tokenizer.chat_template), *sorted(map(repr, chat_fields.items()))]),
            "rendered_text": _hashed([trace.tokens for trace in traces]),
        }

    @property
    def fingerprint(self) -> str:
        """Identifies the set of documents."""
        return _hashed(sorted(self.fingerprints.items()))

    @property
    def template_date(self) -> datetime.date | None:
        """The date that the chat template writes into every document; None if it writes none."""
        return self._chat.date

    def with_date(self, date: datetime.date) -> EncodedDocuments:
        """The same documents with another date, if the chat template writes one."""
        if self._chat.date in (None, date):
            return self
        chat = ChatFormat.of(self._chat.tokenizer, self._chat.think_start, self._chat.think_end, date)
        return EncodedDocuments(
            self._reader, chat, self._config, self._max_tokens, self._seed, self._count, self._validation_reader
        )

    def warning(self, statistics: DataStatistics) -> str | None:
        """A warning if the target thinks before it answers and no document of a `survey` holds thinking, else None."""
        if not statistics.used or statistics.without_thinking < statistics.used or not self._chat.writes_thinking:
            return None
        return (
            f"None of the {statistics.used:,} documents has thinking, and the target thinks before it answers "
            f"({self._chat.think_start} ... {self._chat.think_end}): adapters would learn from answers alone. Name the "
            "column that holds the thinking (data.thinking_column), or the tags around it (data.think_start, "
            "data.think_end)."
        )

    def log_survey(self) -> DataStatistics:
        """Logs and returns the statistics of `survey`, with warnings about the chat template and missing thinking."""
        statistics = self.survey()
        log.info("%s", statistics)
        warnings = [difference.message for difference in template_differences(self._chat) if not difference.intended]
        for warning in [*warnings, self.warning(statistics)]:
            if warning:
                log.warning("%s", warning)
        return statistics

    def windows(self, epoch: int, position: ReaderPosition) -> Iterator[tuple[ReaderPosition, list[Trace]]]:
        """Like `TraceSource.windows`. Raises DataError if an epoch leaves no document to train on."""
        documents = self._reader.read(f"{self._seed}-documents-{epoch}", position)
        any_traces = position is not None
        while window := list(islice(documents, self._config.shuffle_window)):
            start, position = position, window[-1][1]
            traces = self._encode([c for c, _ in window if not self._held_out(c)], DataStatistics())
            if traces:
                any_traces = True
                yield start, traces
        if not any_traces:
            raise DataError(
                f"{self._config.source} leaves nothing to train on: every document is held out, longer than "
                f"{self._max_tokens} tokens, without a token in {list(self._count)}, or a row that cannot be used "
                f"({self._unusable_rows:,} were dropped)."
            )

    def traces(self) -> list[Trace]:
        """All documents that are trained on, in one list. Raises DataError if there are none."""
        return [trace for _, window in self.windows(0, None) for trace in window]

    def validation(self) -> list[Trace]:
        """The held-out documents, at most ``validation_documents`` of them."""
        config = self._config
        if self._validation_reader is not None:
            documents = (c for c, _ in self._validation_reader.read(f"{self._seed}-validation", None))
        elif config.validation_fraction:
            # Four times as many rows as are needed on average; the limit matters for an endless stream.
            limit = int(4 * config.validation_documents / config.validation_fraction)
            rows = islice(self._reader.read(f"{self._seed}-documents-0", None), limit)
            documents = (c for c, _ in rows if self._held_out(c))
        else:
            return []
        return self._encode(list(islice(documents, config.validation_documents)), DataStatistics())

    def survey(self) -> DataStatistics:
        """Counts and lengths of the first documents, to be shown before training starts."""
        statistics = DataStatistics()
        # If long documents are an error, all documents are read now, so that it is raised before training starts.
        # A streamed dataset may be endless.
        read_all = self._config.too_long == "refuse" and not isinstance(self._reader, StreamedReader)
        limit = None if read_all else self._config.survey_documents
        conversations = [c for c, _ in islice(self._reader.read(f"{self._seed}-documents-0", None), limit)]
        statistics.documents = len(conversations)
        training = [c for c in conversations if not self._held_out(c)]
        statistics.held_out = len(conversations) - len(training)
        traces = self._encode(training, statistics)
        statistics.used, statistics.bad_rows = len(traces), self._unusable_rows
        statistics.without_thinking = sum(trace.thinking_length == 0 for trace in traces)
        lengths = sorted(len(trace.tokens) for trace in traces)
        if lengths:
            quantile = lambda share: lengths[min(len(lengths) - 1, int(share * len(lengths)))]  # noqa: E731
            statistics.lengths = {
                "shortest": lengths[0],
                "median": quantile(0.5),
                "90 %": quantile(0.9),
                "longest": lengths[-1],
            }
            prompt, thinking = (sum(getattr(t, f"{r}_length") for t in traces) for r in ("prompt", "thinking"))
            rest = sum(lengths) - prompt - thinking
            statistics.tokens = {"prompt": prompt, "thinking": thinking, "answer": rest}
        return statistics

    def _held_out(self, conversation: Conversation) -> bool:
        """True for a share of all questions that is chosen by their hash, whatever the seed."""
        if not self._config.validation_fraction or self._validation_reader is not None:
            return False
        question = next(m["content"] for m in conversation if m["role"] == "user")
        share = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") / 2**64
        return share < self._config.validation_fraction

    @property
    def _unusable_rows(self) -> int:
        return len(self._reader.bad_rows.rows) + len(self._bad_rows.rows)

    def _location(self, conversation: Conversation) -> str:
        return str(getattr(conversation, "location", self._config.source))

    def _document(self, conversation: Conversation) -> Document | None:
        """The conversation as text; None if the template refuses it and such rows are dropped."""
        try:
            return self._chat.document(conversation)
        except DataError as error:
            self._bad_rows.add(self._location(conversation), error)
            return None

    def _encode(self, conversations: Sequence[Conversation], statistics: DataStatistics) -> list[Trace]:
        """Traces of the conversations that are used, long ones cut or dropped; counts are added to ``statistics``."""
        used = []
        documents = [(self._location(c), d) for c in conversations if (d := self._document(c)) is not None]
        for (location, _), trace in zip(documents, self._chat.tokenize([d for _, d in documents]), strict=True):
            if len(trace.tokens) > self._max_tokens:
                if self._config.too_long == "refuse":
                    raise DataError(
                        f"A document of {self._config.source} has {len(trace.tokens):,} tokens; max_tokens (or the "
                        f"target's context) is {self._max_tokens:,}. It is {location}. Set too_long to truncate or "
                        "drop."
                    )
                if self._config.too_long == "drop":
                    statistics.dropped += 1
                    continue
                statistics.truncated += 1
                trace = trace.cut(self._max_tokens)
            if trace.has_counted_tokens(self._count):
                used.append(trace)
            else:
                statistics.nothing_counts += 1
        return used


def _hashed(facts: Sequence[Any]) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def open_documents(
    config: DataConfig, chat: ChatFormat, max_tokens: int, seed: int = 0, count: Sequence[Region] = REGIONS
) -> EncodedDocuments:
    """The documents that a configuration names, as traces.

    Args:
        config: names the source, its columns and what is held out.
        chat: the target's chat format.
        max_tokens: the target's context length.
        seed: seed of the documents' order.
        count: the regions that the objective counts.

    Raises:
        DataError: the source cannot be opened, or a row cannot be used and such rows are an error.
    """
    validation = open_reader(config, config.validation_split) if config.validation_split else None
    return EncodedDocuments(open_reader(config), chat, config, max_tokens, seed, count, validation)
