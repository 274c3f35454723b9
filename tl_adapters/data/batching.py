"""The batches of a training run, in an order that is a pure function of the seed and the step.

Traces come in windows. Each window is shuffled and batched by length, so that little is padding. Every document has
its own row, so that no position attends to another document. The position of a run is the beginning of its current
window and the first step of that window, from which a stopped run goes on.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from pydantic import NonNegativeInt

from tl_adapters.config import REGIONS, Region
from tl_adapters.data.sources import ReaderPosition
from tl_adapters.data.traces import Batch, DataError, Trace, collate, rows_by_length
from tl_adapters.utils.reading import Record

log = logging.getLogger(__name__)


@runtime_checkable
class TraceSource(Protocol):
    """Training documents, one window at a time."""

    @property
    def fingerprint(self) -> str:
        """Identifies the set of documents."""
        ...

    def windows(self, epoch: int, position: ReaderPosition) -> Iterator[tuple[ReaderPosition, list[Trace]]]:
        """The windows of an epoch from ``position``, the beginning of a window, on; each with its own beginning."""
        ...


class TracesInMemory:
    """A list of traces as a source of one window. Raises DataError if no trace holds a token that counts."""

    def __init__(self, traces: Sequence[Trace], count: Sequence[Region] = REGIONS) -> None:
        self._traces = [trace for trace in traces if trace.has_counted_tokens(count)]
        if not self._traces:
            raise DataError(
                f"None of the {len(traces)} traces has a token that counts; count is {list(count)}."
                if traces
                else "Training needs at least one trace; got none."
            )
        if len(self._traces) < len(traces):
            log.warning("%d traces are left out, because none of their tokens counts.", len(traces) - len(self._traces))
        digest = hashlib.sha256()
        for trace in self._traces:
            facts = [len(trace.tokens), trace.prompt_length, trace.thinking_length, *trace.tokens]
            digest.update(np.array(facts, dtype=np.int64).tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    def windows(self, epoch: int, position: ReaderPosition) -> Iterator[tuple[ReaderPosition, list[Trace]]]:
        """Like `TraceSource.windows`."""
        yield None, self._traces


class OrderPosition(Record):
    """The beginning of the current window of documents (`BatchOrder.position`), as files keep it."""

    epoch: NonNegativeInt
    window: NonNegativeInt
    first_step: NonNegativeInt
    source: NonNegativeInt | dict[str, Any] | None
    """Position of the reader; its form is the reader's."""


class BatchOrder:
    """The batches of a training run: ``order[step]`` depends on the source, the seed and the step alone.

    Each window is shuffled, its traces are batched with others of similar length, and the batches are shuffled. At the
    end of the source a new epoch begins.

    Args:
        source: the training documents.
        tokens_per_batch: most tokens of a batch, padding included; a longer trace is a batch of its own.
        seed: seed of the order.
        count: the regions that the objective counts.
    """

    def __init__(
        self, source: TraceSource, tokens_per_batch: int, seed: int, count: Sequence[Region] = REGIONS
    ) -> None:
        self._source, self._tokens_per_batch, self._seed, self._count = source, tokens_per_batch, seed, tuple(count)
        self._go_to({"epoch": 0, "window": 0, "first_step": 0, "source": None})

    @property
    def position(self) -> dict[str, Any]:
        """The beginning of the current window, as JSON can hold it; `restore` returns to it."""
        return dict(self._position)

    def restore(self, position: dict[str, Any]) -> None:
        """Return to an earlier `position`. Raises DataError for one beyond the end of the documents."""
        try:
            self._go_to(position)
        except StopIteration:
            raise DataError(
                f"There are no documents at the position {position}, to which the run should return."
            ) from None

    def _go_to(self, position: dict[str, Any]) -> None:
        self._position = dict(position)
        self._windows = self._source.windows(position["epoch"], position["source"])
        self._groups = self._shuffled(next(self._windows))

    def _shuffled(self, window: tuple[ReaderPosition, list[Trace]]) -> list[list[Trace]]:
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
