"""A training run: the stages that the configuration names, one after another, in a folder from which it can go on.

    local        every layer's adapter is regressed on the difference of its two MLPs (local_stage/stage.py)
    end_to_end   Adam on the five-term objective, from where the local stage ended if there is one (end_to_end_stage.py)

Steps are counted over both stages. All that is drawn at random is a pure function of the seed and the step. The state
of a run is therefore its weights, the optimizers' moments and a few counters, and a run that is stopped or killed
resumes from its last saved training state bit for bit (run_folder.py).
"""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.finite_weights import NotFiniteError
from tl_adapters.config import RunConfig, TrainingConfig
from tl_adapters.data.batching import BatchOrder, OrderPosition, TracesInMemory, TraceSource
from tl_adapters.data.chat_template import set_template_date
from tl_adapters.data.documents import EncodedDocuments
from tl_adapters.data.traces import Trace, batches_by_length, readable_traces, require_embedded
from tl_adapters.errors import UserError
from tl_adapters.local_stage.regression_data import MLPDifferences, pair_signal_to_noise
from tl_adapters.local_stage.signal_to_noise import SignalToNoise
from tl_adapters.local_stage.stage import LocalProgress, LocalStage
from tl_adapters.local_stage.token_buffer import StreamPosition
from tl_adapters.local_stage.train_local import new_adapters
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.processes import ProcessesError, everywhere, processes
from tl_adapters.training.adapter_adam import PlacedAdapter
from tl_adapters.training.end_to_end_stage import EndToEndStage
from tl_adapters.training.metrics import MetricsWriter, open_metrics
from tl_adapters.training.objective import StepTerms, held_out_terms, require_trainable
from tl_adapters.training.run_folder import RunFolder
from tl_adapters.training.stop_signals import stop_signals
from tl_adapters.training.trackers import require_tracker
from tl_adapters.training.training_state import TrainingCounters, TrainingState, local_steps
from tl_adapters.utils.files import WriteError
from tl_adapters.utils.printing import command


class TrainingError(UserError, RuntimeError):
    """Raised when training cannot continue; the message says why and what is saved."""


class TrainingInterrupted(KeyboardInterrupt):
    """Raised after Ctrl-C or SIGTERM, between two steps; the message says what is saved and how to resume."""


class Trainer:
    """One training run: `run` trains fresh adapters of ``pair``.

    Args:
        pair: base and target; their weights stay frozen.
        traces: the training documents: a list, or a source that reads them as they are needed.
        config: the options.
        folder: the run folder to make; None trains in memory and writes nothing.
        validation: held-out documents, measured every ``validate_every`` steps.
        origin: configuration of the models and the data, recorded so that the command line can resume the run.
        progress: show a progress bar.

    Raises:
        FolderExistsError: ``folder`` exists; `Trainer.resume` resumes a run.
        ArgumentError, DataError: something else than traces; no document to train on, or one that cannot be read.
        PrecisionError, ProcessesError: models in float16; processes of a launch that cannot share the steps of a run.
        TrackerError: the configuration names a tracker that is not installed.
    """

    folder: RunFolder | None
    steps: int
    """Number of steps of all stages."""
    _fingerprints: dict[str, str]
    _resumed: TrainingState | None
    """The state that the run goes on from, until its stage has taken it over."""

    def __init__(
        self,
        pair: PairedModel,
        traces: Sequence[Trace] | TraceSource,
        config: TrainingConfig,
        folder: str | Path | None = None,
        *,
        validation: Sequence[Trace] = (),
        origin: RunConfig | None = None,
        progress: bool = True,
    ) -> None:
        processes().together(lambda: self._set_up(pair, traces, config, validation, progress))
        processes().require_same((config, self._fingerprints), "options, models or documents")
        if folder is not None:
            run_config = _recorded(origin or _origin_of(pair), config, self._template_date)
            self.folder = RunFolder.create(folder, run_config, self._fingerprints)

    @classmethod
    def resume(
        cls,
        pair: PairedModel,
        traces: Sequence[Trace] | TraceSource,
        folder: str | Path,
        *,
        validation: Sequence[Trace] = (),
        progress: bool = True,
    ) -> Trainer:
        """A trainer that continues the run of a folder from its latest training state, as if it had never stopped.

        Args: as `Trainer`; the options are those in the folder.

        Raises:
            RunFolderError: ``folder`` is not a run folder, another process works in it, or ``pair`` or ``traces``
                are not those that the run was started with.
        """
        run = RunFolder.open(folder)
        trainer = cls.__new__(cls)
        try:
            if isinstance(traces, EncodedDocuments) and run.config.data.template_date is not None:
                traces = traces.with_date(datetime.date.fromisoformat(run.config.data.template_date))
            processes().together(lambda: trainer._set_up(pair, traces, run.config.training, validation, progress))
            processes().together(lambda: run.require_same(trainer._fingerprints))
            trainer._restore(run)
        except BaseException:
            run.release()
            raise
        return trainer

    def _set_up(
        self,
        pair: PairedModel,
        traces: Sequence[Trace] | TraceSource,
        config: TrainingConfig,
        validation: Sequence[Trace],
        progress: bool,
    ) -> None:
        """The state before the first step. Everything that can be refused is, so that no run folder is left behind."""
        require_trainable(pair)
        require_tracker(config.tracker)
        require_processes(config, pair.device)
        self.pair, self.config, self.progress = pair, config, progress and processes().is_main
        self.steps = local_steps(config) + (config.steps if "end_to_end" in config.stages else 0)
        self.folder = self._resumed = None
        self._has_result = False
        source: TraceSource
        if isinstance(traces, TraceSource):
            source = traces
        else:
            source = TracesInMemory(readable_traces(traces, pair.model.cfg), config.count)
        self._template_date = source.template_date if isinstance(source, EncodedDocuments) else None
        set_template_date(pair.model.tokenizer, self._template_date)
        self._source = source
        self.order = self._new_order()
        require_embedded(self.order[0].tokens, pair.model.cfg.d_vocab, "The first batch")
        held_out = readable_traces(validation, pair.model.cfg)
        held_out = [trace for trace in held_out if trace.has_counted_tokens(config.count)]
        self.validation = [batch for _, batch in batches_by_length(held_out, config.tokens_per_batch, config.count)]
        self.adapters = new_adapters(pair, config)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        documents = source.fingerprints if isinstance(source, EncodedDocuments) else {"data": source.fingerprint}
        self._fingerprints = {**pair.fingerprints, **documents}

    @property
    def finished(self) -> bool:
        """True if no step is left."""
        return self.step == self.steps

    def run(
        self,
        on_step: Callable[[int, StepTerms], None] | None = None,
        on_local_step: Callable[[int, LocalProgress], None] | None = None,
    ) -> AdapterSet:
        """Train to the last step and return the adapters, which are saved in the run folder if there is one.

        Args:
            on_step: called after every step of the end-to-end stage with its number (from 1) and its terms.
            on_local_step: called in the local stage, every few steps, with the number of the last one and what it has
                shown.

        Raises:
            TrainingError: a term is not finite, the disk is full, or a tracker is named and there is no run folder. The
                last training state is kept.
            TrainingInterrupted: Ctrl-C or SIGTERM. The state after the current step is saved.
        """
        if self.folder is None and (name := self.config.tracker) != "none":
            raise TrainingError(f"tracker is {name!r}, but the run has no folder that keeps its id; give folder=.")
        try:
            with (
                stop_signals() as stop,
                open_metrics(self.folder, self.config, self.step, self.progress) as metrics,
            ):
                run = _Process(self, stop, metrics)
                placed: list[PlacedAdapter] = []
                if not self._has_result and self.step <= local_steps(self.config) > 0:
                    placed = self._local_stage(run, on_local_step)
                if not self.finished:
                    self._end_to_end_stage(run, placed, on_step)
            if self.folder is not None:
                self.folder.finish(self.adapters, self.tokens, self.seconds)
        except WriteError as error:
            raise TrainingError(f"Stopped at step {self.step}: {error}{how_to_resume(self.folder)}") from error
        except Exception:
            if self.folder is not None and self.step == 0:
                self.folder.discard_new()  # the same command can be given again
            raise
        finally:
            if self.folder is not None:
                self.folder.release()
        return self.adapters

    # -- stages -------------------------------------------------------------------------------------------------------

    def _local_stage(self, run: _Process, on_step: Callable[[int, LocalProgress], None] | None) -> list[PlacedAdapter]:
        """Train every layer by itself; returns the adapters in the coordinates of their layers."""
        config, local, state, metrics = self.config, self.config.local, self._resumed, run.metrics
        metrics.new_bar("collect tokens", local.max_tokens)
        stage = LocalStage(
            MLPDifferences(self.pair), self._new_order(), config, local, step=self.step, on_batch=run.count_collected,
            state=None if state is None else state.tensors,
            position=None if state is None else state.counters.stream,
        )  # fmt: skip
        self._resumed = state = None
        metrics.new_bar("local stage", local.steps, self.step)
        while not stage.finished:
            with run.finite_steps():
                taken = stage.advance(run.steps_to_next_event())
            run.count(taken, stage.tokens)
            progress = stage.progress()
            if on_step is not None:
                on_step(self.step, progress)
            if self.step % config.log_every == 0 or stage.finished:
                metrics.write_local(self.step, progress)
            if not stage.finished and self.step % config.validate_every == 0:
                stage.write_to(self.adapters)
                run.validate(due=True)
            run.save_or_stop(lambda: self._local_state(stage), due=stage.finished)
            metrics.bar.update(taken)
        metrics.new_bar("finish layers", self.pair.n_layers)
        stage.finish(self.adapters, metrics.bar.update, run.stop_if_requested)
        run.count(0, stage.tokens)
        run.validate(due=True)
        return [PlacedAdapter(layer.adapter, layer.coordinates).to(self.pair.device) for layer in stage.trained]

    def _end_to_end_stage(
        self, run: _Process, placed: Sequence[PlacedAdapter], on_step: Callable[[int, StepTerms], None] | None
    ) -> None:
        config, first, tokens = self.config, local_steps(self.config), self.tokens
        tensors = None if self._resumed is None else self._resumed.tensors
        stage = EndToEndStage(self.pair, self.order, config, placed, self.step - first, tensors)
        self._resumed = tensors = None
        run.metrics.new_bar("train", config.steps, stage.step)
        while not self.finished:
            last = self.step + 1 == self.steps
            log_this = (self.step + 1) % config.log_every == 0 or last
            lr = stage.lr
            with run.finite_steps():
                terms = stage.advance(log_this)
            run.count(1, tokens + stage.tokens)
            if on_step is not None:
                on_step(self.step, terms)
            if log_this:
                run.metrics.write_terms(self.step, self.tokens, lr, terms)
            run.validate(due=self.step % config.validate_every == 0 or last)
            run.save_or_stop(lambda: self._state(stage.adam.tensors()))
            run.metrics.bar.update()

    def signal_to_noise(self) -> list[SignalToNoise] | None:
        """The difference of every layer's MLPs beside the rounding of weights, on the first of the documents."""
        return pair_signal_to_noise(self.pair, self._source)

    # -- training states ----------------------------------------------------------------------------------------------

    def _new_order(self) -> BatchOrder:
        return BatchOrder(self._source, self.config.tokens_per_batch, self.config.seed, self.config.count)

    def _local_state(self, stage: LocalStage) -> TrainingState:
        stage.write_to(self.adapters)
        return self._state(stage.state(), stage.position)

    def _state(self, tensors: Mapping[str, Tensor], stream: StreamPosition | None = None) -> TrainingState:
        order = OrderPosition(**self.order.position)
        counters = TrainingCounters(
            step=self.step, tokens=self.tokens, seconds=self.seconds, order=order, stream=stream
        )
        return TrainingState(self.adapters, tensors, counters)

    def _restore(self, run: RunFolder) -> None:
        """Continue from the latest training state of a run folder, or from its result if the run has finished."""
        self.folder = run
        result = processes().together(run.result)
        if result is not None:  # the run has finished, and may have been killed while it deleted its training states
            self.adapters.load_state_dict(result.state_dict())
            self._has_result = True
            self.step, self.tokens, self.seconds = self.steps, *run.tokens_and_seconds()
            return
        state = self._resumed = run.load_training_state(self.adapters)
        if state is None:  # the run was killed before its first saved state, so it starts again from the seed
            return
        self.adapters.load_state_dict(state.adapters.state_dict())
        counters = state.counters
        self.order.restore(counters.order.model_dump())
        self.step, self.tokens, self.seconds = counters.step, counters.tokens, counters.seconds


class _Process:
    """What one process does between the steps of a run: count them, measure, save, and stop.

    Args:
        trainer: the run.
        stop: set when the run is to stop after the current step.
        metrics: where metrics are written.
    """

    def __init__(self, trainer: Trainer, stop: threading.Event, metrics: MetricsWriter) -> None:
        self.trainer, self.stop, self.metrics = trainer, stop, metrics
        self._started = time.perf_counter() - trainer.seconds

    def steps_to_next_event(self) -> int:
        """Number of steps until something is logged, measured or saved."""
        trainer, config = self.trainer, self.trainer.config
        events = [config.log_every, config.checkpoint_every, *([config.validate_every] if trainer.validation else [])]
        return min(every - trainer.step % every for every in events)

    @contextmanager
    def finite_steps(self) -> Iterator[None]:
        """Raises TrainingError where a step within raises NotFiniteError, in this process or in another one."""
        try:
            yield
        except (NotFiniteError, ProcessesError) as error:
            folder, step = self.trainer.folder, self.trainer.step
            raise everywhere(TrainingError(f"Step {step + 1}: {error}{what_is_saved(folder, step)}")) from error

    def count(self, steps: int, tokens: int) -> None:
        """Count steps that were taken, with the number of tokens of the run so far."""
        self.trainer.step += steps
        self.trainer.tokens, self.trainer.seconds = tokens, time.perf_counter() - self._started

    def count_collected(self, tokens: int, capacity: int) -> None:
        """Show the tokens that were collected so far, of those that will be. Raises TrainingInterrupted."""
        self.metrics.bar.total = capacity
        self.metrics.bar.update(tokens - self.metrics.bar.n)
        self.stop_if_requested()

    def validate(self, due: bool) -> None:
        """Measure the adapters on the held-out documents, if it is time and there are any."""
        if due and (trainer := self.trainer).validation:
            self.metrics.write_validation(trainer.step, held_out_terms(trainer.pair, trainer.validation))

    def save_or_stop(self, state: Callable[[], TrainingState], due: bool = False) -> None:
        """Save the state after a step, if it is time or the run is to stop.

        Args:
            state: makes the state.
            due: save in any case.

        Raises TrainingInterrupted if the run is to stop.
        """
        trainer = self.trainer
        due = due or (trainer.step % trainer.config.checkpoint_every == 0 and not trainer.finished)
        stopping = processes().any(self.stop.is_set())  # a signal from here on is for the next step
        if trainer.folder is not None and (due or stopping):
            trainer.folder.save_training_state(state())
        if stopping:
            self._stop()

    def stop_if_requested(self) -> None:
        """Raises TrainingInterrupted if this process is to stop, which `Processes.together` tells the others."""
        if self.stop.is_set():
            self._stop()

    def _stop(self) -> NoReturn:
        trainer = self.trainer
        text = f"Stopped at step {trainer.step} of {trainer.steps}.{how_to_resume(trainer.folder)}"
        raise everywhere(TrainingInterrupted(text))


def require_processes(config: TrainingConfig, device: torch.device) -> None:
    """Raises ProcessesError where the processes of this launch cannot share the steps of a run, or not on a device."""
    count = processes().count
    if count == 1:
        return
    if "end_to_end" in config.stages and config.batches_per_step < count:
        raise ProcessesError(
            f"batches_per_step is {config.batches_per_step} with {count} processes, which divide the batches of a step "
            f"among them; allowed is a whole number >= {count}, and a multiple of {count} gives all of them as much to "
            f"do. Start a new run with --set training.batches_per_step={count}, or at most {config.batches_per_step} "
            f"process{'es' if config.batches_per_step > 1 else ''}."
        )
    if device.type != processes().device.type:
        raise ProcessesError(
            f"The models are on {device}, and the {count} processes of this launch exchange tensors on "
            f"{processes().device}. Leave the device out, so that each process takes its own, or set "
            "ACCELERATE_USE_CPU=true for processes on the CPU."
        )


def how_to_resume(folder: RunFolder | None) -> str:
    """A sentence that says how a run goes on."""
    if folder is None:
        return " The run has no folder, so it cannot be resumed; the pair holds the adapters as they are now."
    path = folder.path
    return f" Resume with: {command('train', resume=path)} (or Trainer.resume(pair, traces, {str(path)!r}))."


def what_is_saved(folder: RunFolder | None, step: int) -> str:
    """A sentence that names the latest training state."""
    if folder is None or (folder.is_new and step == 0):
        return ""
    latest = [path.name for path in folder.training_states][-1:]
    return f" Saved in {folder.path}: {latest[0] if latest else 'no training state yet'}."


def _origin_of(pair: PairedModel) -> RunConfig:
    """A configuration that names the models of a pair, if both have a name."""
    named = bool(pair.base_id and pair.target_id)
    return RunConfig(base=pair.base_id, target=pair.target_id) if named else RunConfig()


def _recorded(origin: RunConfig, training: TrainingConfig, date: datetime.date | None) -> RunConfig:
    """The configuration of a run as its folder keeps it, with the date that its chat template writes."""
    data = origin.data if date is None else replace(origin.data, template_date=date.isoformat())
    return replace(origin, training=training, data=data)


def train(
    pair: PairedModel,
    traces: Sequence[Trace] | TraceSource,
    config: TrainingConfig | None = None,
    folder: str | Path | None = None,
    *,
    validation: Sequence[Trace] = (),
    progress: bool = True,
    **options: Any,
) -> AdapterSet:
    """Train adapters for ``pair`` and return them: `Trainer` in one call.

    Args:
        pair: base and target; it holds the adapters afterwards.
        traces: the training documents: a list, or a source that reads them as they are needed.
        config: the options; None is the default ones.
        folder: the run folder to make; None trains in memory and writes nothing.
        validation: held-out documents, measured every ``validate_every`` steps.
        progress: show a progress bar.
        options: fields of `TrainingConfig`, which replace those of ``config``.

    Raises: as `Trainer` and `Trainer.run`; ConfigError for an option whose value is not allowed.
    """
    config = replace(config or TrainingConfig(), **options)
    return Trainer(pair, traces, config, folder, validation=validation, progress=progress).run()
