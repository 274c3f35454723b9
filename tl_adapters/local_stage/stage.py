"""The local stage of all layers: their tokens, their runs, and the threads in which layers are trained side by side.

A layer reads the shared tokens and changes nothing outside itself, and each of its operations runs on one thread of its
worker. Results therefore do not depend on the number of workers, bit for bit. Threads do as well as processes here:
nearly all of the time is spent in operations that release Python's lock. A worker takes one step of a layer, then one
of the layer that has waited longest, so that none is idle where the layers cannot be divided evenly among them.

Of several processes of one launch, each trains its share of the layers and keeps the tokens of these alone, and all of
them read every batch. They are given each other's layers where a state or the whole model needs them.

With `LocalConfig.streaming`, one forward pass of the target and of the base's MLPs per batch feeds all layers, and the
oldest tokens leave the buffer. Otherwise the tokens that are collected first are the data, as in a data set.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import TypeVar

import torch
from torch import Tensor

from tl_adapters.adapters.finite_weights import NotFiniteError
from tl_adapters.adapters.transcoder import TranscoderAdapter
from tl_adapters.config import LocalConfig, TrainingConfig
from tl_adapters.data.batching import BatchOrder
from tl_adapters.local_stage.layer_run import LayerRun
from tl_adapters.local_stage.local_layer import LocalLayer
from tl_adapters.local_stage.regression_data import RegressionData
from tl_adapters.local_stage.schedules import warmup_cosine
from tl_adapters.local_stage.token_buffer import StreamPosition, TokenStream
from tl_adapters.local_stage.whitening import LayerCoordinates
from tl_adapters.processes import processes
from tl_adapters.utils.precision import tf32_products

STEPS_AT_ONCE = 10
"""Most steps that layers take before they wait for each other, and so before a stop or a save."""

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class LocalProgress:
    """What the last step of the local stage has shown, by layer."""

    lr: float
    """Learning rate."""
    tokens: int
    """Tokens that the model has read for the stage."""
    error: list[float]
    """Share of the difference's energy that the adapter leaves."""
    sparsity: list[float]
    """Sparsity penalty per token, before its weight."""
    l0: list[float]
    """Active features per token."""
    alive: list[int]
    """Number of features that were active on some token of the last steps (`layer_run.ALIVE_STEPS`)."""


class LocalStage:
    """The local stage of all layers. Fills the buffer and measures the layers' coordinates, or goes on from a state.

    Args:
        data: what the layers are regressed on.
        order: the batches, from the first one on.
        config: options of training.
        local: options of the local stage.
        step: steps done already.
        state: tensors of an earlier `state`, by name; None starts a new stage.
        position: where the tokens of that state were read.
        on_batch: called after every batch that fills the buffer, with the tokens in it and those that it will hold.
    """

    def __init__(
        self,
        data: RegressionData,
        order: BatchOrder,
        config: TrainingConfig,
        local: LocalConfig,
        *,
        step: int = 0,
        state: Mapping[str, Tensor] | None = None,
        position: StreamPosition | None = None,
        on_batch: Callable[[int, int], object] = lambda tokens, capacity: None,
    ) -> None:
        self.local, self.step, self._tf32 = local, step, config.adapter_precision == "tf32"
        own = processes().mine(range(data.n_layers))
        devices, self._workers = workers_and_devices(data.device, local.workers, max(1, len(own)))
        # A process without a layer reads one, by which it knows how many tokens there are.
        read = None if processes().count == 1 else own or [0]

        def stream() -> TokenStream:
            if position is None:
                return TokenStream.fill(data, order, local.max_tokens, devices, on_batch, read)
            return TokenStream.resume(data, order, position, devices, on_batch, read)

        self._stream = processes().together(stream)
        buffer = self._stream.buffer
        # Where an epoch fits into the buffer, new batches would bring no new tokens.
        self._streams = local.streaming and buffer.capacity == local.max_tokens
        states = [_of_layer(state, layer) if state else None for layer in range(data.n_layers)]

        def run(layer: int, coordinates: LayerCoordinates | None = None) -> LayerRun:
            return LayerRun(layer, buffer, config, local, states[layer], coordinates)

        self._own: list[LayerRun] = processes().together(lambda: self._side_by_side(run, own))
        self._whole = processes().count == 1
        self.layers: list[LayerRun] = self._own if self._whole else []
        for layer in () if self._whole else range(data.n_layers):
            mine = next((each for each in self._own if each.index == layer), None)
            coordinates = None if state else _shared_coordinates(mine, layer, data.d_model, data.device)
            self.layers.append(mine or run(layer, coordinates))

    @property
    def finished(self) -> bool:
        """True if no step is left."""
        return self.step == self.local.steps

    def advance(self, most: int = STEPS_AT_ONCE) -> int:
        """Take at most so many steps and return their number, which is at least 1. Raises NotFiniteError."""
        return processes().together(lambda: self._advance(most))

    def _advance(self, most: int) -> int:
        until = min(self.step + most, self.step + STEPS_AT_ONCE, self.local.steps)
        first, spans = self.step, [range(self.step, until)]
        if self._streams:
            spans = [range(step, step + 1) for step in range(self.step, until)]
        for steps in spans:
            if self._streams:
                self._stream.read_until(self.local.max_tokens + steps.stop * self.local.tokens_per_step)
            with tf32_products(self._tf32):
                self._in_turns(run.advance(steps) for run in self._own)
        self.step, self._whole = until, processes().count == 1
        for run in self._own:
            if run.terms is not None and not bool(run.terms.error.isfinite()):
                raise NotFiniteError(f"The error of layer {run.index} is not finite. Lower training.local.lr.")
        return until - first

    def finish(
        self,
        adapters: Iterable[TranscoderAdapter],
        on_layer: Callable[[], object] = lambda: None,
        between: Callable[[], object] = lambda: None,
    ) -> None:
        """Finish the features of every layer after the last step, and write the weights to the adapters.

        Args:
            adapters: adapters that read and write the residual stream as it is.
            on_layer: called when a layer is done, by its worker.
            between: called before each part of the work on a layer; it may raise an exception to stop.
        """

        def finish(run: LayerRun) -> Iterator[None]:
            between()
            for _ in run.finish():
                yield
                between()
            on_layer()

        processes().together(lambda: self._in_turns(finish(run) for run in self._own))
        self._whole = processes().count == 1
        self.write_to(adapters)

    def write_to(self, adapters: Iterable[TranscoderAdapter]) -> None:
        """Write the weights as they are now to adapters that read and write the residual stream as it is."""
        self._exchange()
        for run, adapter in zip(self.layers, adapters, strict=True):
            run.layer.write_to(adapter)

    @torch.no_grad()
    def _exchange(self) -> None:
        """Give every process the layers of the others as they are now."""
        if not self._whole:
            for run in self.layers:
                processes().receive(run.trained(), owner=run.index % processes().count)
            self._whole = True

    @property
    def trained(self) -> list[LocalLayer]:
        """The layers as they are trained, in their own coordinates."""
        return [run.layer for run in self.layers]

    @property
    def tokens(self) -> int:
        """Tokens that the model has read for the stage."""
        return self._stream.buffer.seen

    def progress(self) -> LocalProgress:
        """What the last step has shown; zeros for a layer whose two MLPs do not differ."""
        local, shown = self.local, torch.zeros(4, len(self.layers), dtype=torch.float64)
        for run in self._own:
            last = [] if run.terms is None else [run.terms.error, run.terms.sparsity, run.terms.l0]
            shown[: len(last), run.index] = torch.tensor([float(term) for term in last], dtype=torch.float64)
            shown[3, run.index] = run.alive
        error, sparsity, l0, alive = processes().total(shown).tolist()
        lr = local.lr * warmup_cosine(self.step - 1, local.steps, local.warmup_fraction)
        return LocalProgress(lr, self.tokens, error, sparsity, l0, [int(n) for n in alive])

    # -- state --------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """The tensors from which the stage goes on, each named "layer.name"."""
        self._exchange()
        return {f"{run.index}.{name}": value for run in self.layers for name, value in run.state().items()}

    @property
    def position(self) -> StreamPosition:
        """Where the tokens in the buffer were read."""
        return self._stream.position

    # -- workers ------------------------------------------------------------------------------------------------------

    def _side_by_side(self, function: Callable[[Given], Made], values: Iterable[Given]) -> list[Made]:
        """The function's results for all values, computed by the workers."""
        with one_thread_per_operation():
            if self._workers == 1:
                return [function(value) for value in values]
            with ThreadPoolExecutor(self._workers) as pool:
                return list(pool.map(function, values))

    def _in_turns(self, layers: Iterable[Iterator[None]]) -> None:
        """Let the workers exhaust the iterators of all layers, each in the order in which it waits for its turn."""
        waiting, failed = deque(layers), Event()

        def work(worker: int) -> None:
            while waiting and not failed.is_set():
                try:
                    layer = waiting.popleft()
                except IndexError:  # other workers have the layers that are left
                    return
                try:
                    for _ in layer:
                        waiting.append(layer)
                        break
                except BaseException:
                    failed.set()  # the other workers need not go on
                    raise

        self._side_by_side(work, range(self._workers))


def _shared_coordinates(own: LayerRun | None, layer: int, d_model: int, device: torch.device) -> LayerCoordinates:
    """The coordinates of a layer, which the process that trains it has measured."""
    if own is not None:
        tensors = own.layer.coordinates.tensors()
    else:
        size = torch.zeros((), dtype=torch.float64)
        tensors = {"mean": torch.zeros(d_model), "matrix": torch.zeros(d_model, d_model), "size": size}
    processes().receive(tensors.values(), owner=layer % processes().count)
    return LayerCoordinates.of_tensors(tensors, device)


def _of_layer(state: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    prefix = f"{layer}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def workers_and_devices(device: torch.device, workers: int | None, n_layers: int) -> tuple[list[torch.device], int]:
    """The devices on which layers are trained, and the number of layers that are trained at the same time.

    Args:
        device: of the model.
        workers: `LocalConfig.workers`.
        n_layers: layers of the model.
    """
    if device.type == "cpu":
        return [device], min(workers or torch.get_num_threads(), n_layers)
    there = torch.cuda.device_count() if device.type == "cuda" and processes().count == 1 else 1
    first, n = device.index or 0, min(workers or 1, there, n_layers)
    if there == 1 or n == 1:
        return [device], n
    return [torch.device("cuda", (first + i) % there) for i in range(n)], n


@contextmanager
def one_thread_per_operation() -> Iterator[None]:
    """PyTorch computes each operation on the CPU in the thread that calls it, in threads that start within, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
