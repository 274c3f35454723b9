"""The tokens that the local stage trains on: what the adapter of every layer reads, and the output it should have.

A `TokenStream` reads batches into a `TokenBuffer`, which keeps the latest tokens. What is in the buffer depends on the
batches alone, so a stopped run saves only which batches these are, and reads them again when it is resumed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from tl_adapters.data.batching import BatchOrder, OrderPosition
from tl_adapters.data.traces import Batch, require_embedded
from tl_adapters.local_stage.regression_data import RegressionData
from tl_adapters.utils.reading import Record


class TokenBuffer:
    """The latest tokens of a stream: what the adapter of every layer reads (x), and the output it should have (d).

    Both are kept in the dtype of the model; the difference of two MLPs is computed in float32 before it is rounded,
    which changes each of its entries by at most one part in 256.

    Args:
        data: inputs and wanted outputs of a batch.
        capacity: number of tokens that are kept.
        devices: where the tokens of the layers are kept: layer i on the i-th device, beginning again after the last.
        layers: the layers, at least one; None is all of them.
    """

    def __init__(
        self,
        data: RegressionData,
        capacity: int,
        devices: Sequence[torch.device],
        layers: Sequence[int] | None = None,
    ) -> None:
        self.data, self.capacity, self.seen = data, capacity, 0
        self._layers = layers
        self.devices = [devices[layer % len(devices)] for layer in range(data.n_layers)]
        rows = [capacity if layers is None or layer in layers else 0 for layer in range(data.n_layers)]
        made = list(zip(rows, self.devices, strict=True))
        # Written once from end to end: new memory that is touched piece by piece, in all layers in turns, costs the
        # system more (for 3.7 GB 9.2 s instead of 7.2).
        self.x, self.d = (
            [torch.empty((n, data.d_model), dtype=data.dtype, device=device).zero_() for n, device in made]
            for _ in range(2)
        )

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def add(self, batch: Batch) -> None:
        """Run the model on a batch and keep its counted tokens, in the place of the oldest ones."""
        n, dtype = 0, self.data.dtype
        layers = range(self.data.n_layers) if self._layers is None else self._layers
        read = self.data.read(batch) if self._layers is None else self.data.read(batch, self._layers)
        for layer, (x, d) in zip(layers, read, strict=True):
            device, n = self.devices[layer], min(len(x), self.capacity)
            first = self.seen % self.capacity
            before_end = min(n, self.capacity - first)
            for kept, new in ((self.x[layer], x[:n].to(device, dtype)), (self.d[layer], d[:n].to(device, dtype))):
                kept[first : first + before_end] = new[:before_end]
                kept[: n - before_end] = new[before_end:]
        self.seen += n

    def draw(self, layer: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and wanted outputs of n tokens of a layer, drawn at random with replacement."""
        rows = torch.randint(len(self), (n,), generator=generator).to(self.devices[layer])
        return self._rows(layer, rows)

    def sample(self, layer: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and wanted outputs of n different tokens of a layer, drawn at random; of all if there are fewer."""
        if n >= len(self):
            return self.x[layer][: len(self)], self.d[layer][: len(self)]
        rows = torch.randperm(len(self), generator=generator)[:n].to(self.devices[layer])
        return self._rows(layer, rows)

    def _rows(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        # On a CPU index_select copies rows several times as fast as indexing with a tensor does.
        return self.x[layer].index_select(0, rows), self.d[layer].index_select(0, rows)


class BatchPlace(Record):
    """A batch whose tokens are in the buffer, and what is needed to read it again."""

    batch: NonNegativeInt
    """Its number in the order of the batches."""
    seen: NonNegativeInt
    """Tokens that were added before it."""
    order: OrderPosition
    """The beginning of the window of documents that it belongs to."""


class StreamPosition(Record):
    """Where a stream of tokens is: from this its buffer is filled again."""

    capacity: PositiveInt
    """Tokens that the buffer can hold."""
    first: BatchPlace
    """The oldest batch of which tokens are in the buffer."""
    next_batch: PositiveInt
    """Number of the batch that is read next."""


class TokenStream:
    """Reads batches into a buffer. Made by `fill` or `resume`.

    Args:
        data: inputs and wanted outputs of a batch.
        order: the batches.
        capacity: tokens that the buffer can hold.
        devices, layers: as `TokenBuffer`.
    """

    def __init__(
        self,
        data: RegressionData,
        order: BatchOrder,
        capacity: int,
        devices: Sequence[torch.device],
        layers: Sequence[int] | None = None,
    ) -> None:
        self._data, self._order = data, order
        self.buffer = TokenBuffer(data, capacity, devices, layers)
        self._next_batch = 0
        self._in_buffer: deque[BatchPlace] = deque()

    @classmethod
    def fill(
        cls,
        data: RegressionData,
        order: BatchOrder,
        max_tokens: int,
        devices: Sequence[torch.device],
        on_batch: Callable[[int, int], object],
        layers: Sequence[int] | None = None,
    ) -> TokenStream:
        """A stream whose buffer holds the tokens of one epoch, or the first ``max_tokens`` of them.

        Args: as the class, and ``on_batch``, which is called with the tokens read so far and the capacity.
        """
        batches: list[tuple[Batch, OrderPosition]] = []
        n = 0
        while n < max_tokens:
            batch = order[len(batches)]
            if order.position["epoch"] > 0:
                break
            batches.append((batch, OrderPosition(**order.position)))
            n += int(batch.counted.sum())
        stream = cls(data, order, min(n, max_tokens), devices, layers)
        for batch, position in batches:
            stream._add(batch, position)
            on_batch(stream.buffer.seen, stream.buffer.capacity)
        return stream

    @classmethod
    def resume(
        cls,
        data: RegressionData,
        order: BatchOrder,
        position: StreamPosition,
        devices: Sequence[torch.device],
        on_batch: Callable[[int, int], object],
        layers: Sequence[int] | None = None,
    ) -> TokenStream:
        """A stream that goes on from an earlier position, with the same tokens in its buffer. Args: as `fill`."""
        stream = cls(data, order, position.capacity, devices, layers)
        order.restore(position.first.order.model_dump())
        stream._next_batch, stream.buffer.seen = position.first.batch, position.first.seen
        while stream._next_batch < position.next_batch:
            stream._read()
            on_batch(stream.buffer.seen - position.first.seen, position.capacity)
        return stream

    @property
    def position(self) -> StreamPosition:
        """From where the buffer can be filled again."""
        return StreamPosition(capacity=self.buffer.capacity, first=self._in_buffer[0], next_batch=self._next_batch)

    def read_until(self, seen: int) -> None:
        """Read batches until the buffer has been given so many tokens in all."""
        while self.buffer.seen < seen:
            self._read()

    def _read(self) -> None:
        batch = self._order[self._next_batch]
        self._add(batch, OrderPosition(**self._order.position))

    def _add(self, batch: Batch, position: OrderPosition) -> None:
        number = self._next_batch
        require_embedded(batch.tokens, self._data.d_vocab, f"Batch {number + 1} of the local stage")
        self._in_buffer.append(BatchPlace(batch=number, seen=self.buffer.seen, order=position))
        self.buffer.add(batch)
        self._next_batch += 1
        oldest = self.buffer.seen - self.buffer.capacity
        while len(self._in_buffer) > 1 and self._in_buffer[1].seen <= oldest:
            self._in_buffer.popleft()
