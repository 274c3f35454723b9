"""Training of adapters: Adam on the five-term objective, one cut per step (arXiv 2602.20904, section 3.2 and appendix).

    for each step:
        learning rate: linear warm-up, then a cosine to zero;  weight of the sparsity term: linear warm-up
        draw a batch of traces and a cut
        loss and gradient of the objective (objective.py)
        clip the gradient, take a step, update the thresholds

Schedules, batches and cuts are pure functions of the seed and the step. The state of a run is therefore its weights,
the optimizer's moments and a few counters, and a run that is stopped or killed resumes from its last saved training
state bit for bit (run_folder.py).
"""

from __future__ import annotations

import datetime
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.config import RunConfig, TrainingConfig
from tl_adapters.data.batching import BatchOrder, TracesInMemory, TraceSource
from tl_adapters.data.chat_template import set_template_date
from tl_adapters.data.documents import EncodedDocuments
from tl_adapters.data.traces import Batch, Trace, batches_by_length, readable_traces, require_embedded
from tl_adapters.errors import UserError
from tl_adapters.local_stage.schedules import sparsity_weight, warmup_cosine
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.training.metrics import MetricsWriter, open_metrics
from tl_adapters.training.not_finite import describe_not_finite
from tl_adapters.training.objective import (
    TERM_NAMES,
    StepTerms,
    held_out_terms,
    require_trainable,
    shared_prefix_step,
)
from tl_adapters.training.run_folder import RunFolder
from tl_adapters.training.stop_signals import stop_signals
from tl_adapters.training.trackers import require_tracker
from tl_adapters.training.training_state import (
    OrderPosition,
    TrainingCounters,
    TrainingState,
    moments_by_name,
    restore_moments,
)
from tl_adapters.utils.files import WriteError

THRESHOLD_WINDOW = 0.05
"""Share of the steps over which batchtopk's threshold is a running mean. At the end of the cosine the weights hardly
change, so that the threshold fits the final adapters."""


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
        DataError: there is no document to train on.
        PrecisionError: the models are in float16.
        TrackerError: the configuration names a tracker that is not installed.
    """

    folder: RunFolder | None
    _fingerprints: dict[str, str]

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
        self._set_up(pair, traces, config, validation, progress)
        if folder is not None:
            run_config = replace(origin or _origin_of(pair), training=config)
            if (date := self._template_date) is not None:
                run_config = replace(run_config, data=replace(run_config.data, template_date=date.isoformat()))
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
            trainer._set_up(pair, traces, run.config.training, validation, progress)
            run.require_same(trainer._fingerprints)
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
        self.pair, self.config, self.progress = pair, config, progress
        self.folder = None
        source: TraceSource
        if isinstance(traces, TraceSource):
            source = traces
        else:
            source = TracesInMemory(readable_traces(traces, pair.model.cfg), config.count)
        self._template_date = source.template_date if isinstance(source, EncodedDocuments) else None
        set_template_date(pair.model.tokenizer, self._template_date)
        self.order = BatchOrder(source, config.tokens_per_batch, config.seed, config.count)
        require_embedded(self.order[0].tokens, pair.model.cfg.d_vocab, "The first batch")
        held_out = readable_traces(validation, pair.model.cfg)
        held_out = [trace for trace in held_out if trace.has_counted_tokens(config.count)]
        self.validation = [batch for _, batch in batches_by_length(held_out, config.tokens_per_batch, config.count)]
        self.adapters = pair.new_adapters(
            config.n_features,
            seed=config.seed,
            activation=config.activation,
            k=config.k if config.activation in ("topk", "batchtopk") else None,
            bandwidth=config.bandwidth,
        )
        self.optimizer = torch.optim.Adam(
            self.adapters.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), fused=True
        )
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        documents = source.fingerprints if isinstance(source, EncodedDocuments) else {"data": source.fingerprint}
        self._fingerprints = {**pair.fingerprints, **documents}

    @property
    def finished(self) -> bool:
        """True if no step is left."""
        return self.step == self.config.steps

    def run(self, on_step: Callable[[int, StepTerms], None] | None = None) -> AdapterSet:
        """Train to the last step and return the adapters, which are saved in the run folder if there is one.

        Args:
            on_step: called after every step with its number (from 1) and its terms.

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
                self._loop(stop, metrics, on_step)
            if self.folder is not None:
                self.folder.finish(self.adapters, self.tokens, self.seconds)
        except WriteError as error:
            raise TrainingError(f"Stopped at step {self.step}: {error}{self._how_to_resume()}") from error
        except Exception:
            if self.folder is not None and self.step == 0:
                self.folder.discard_new()  # the same command can be given again
            raise
        finally:
            if self.folder is not None:
                self.folder.release()
        return self.adapters

    def _loop(
        self, stop: threading.Event, metrics: MetricsWriter, on_step: Callable[[int, StepTerms], None] | None
    ) -> None:
        config, start = self.config, time.perf_counter() - self.seconds
        while self.step < config.steps:
            last = self.step + 1 == config.steps
            log_this = (self.step + 1) % config.log_every == 0 or last
            terms = self._one_step(want_l0=log_this)
            self.step += 1
            self.seconds = time.perf_counter() - start
            if on_step is not None:
                on_step(self.step, terms)
            if log_this:
                metrics.write_terms(self.step, self.tokens, self.optimizer.param_groups[0]["lr"], terms)
            if self.validation and (self.step % config.validate_every == 0 or last):
                metrics.write_validation(self.step, held_out_terms(self.pair, self.validation))
            if stop.is_set():
                self._save_state()
                raise TrainingInterrupted(f"Stopped at step {self.step} of {config.steps}.{self._how_to_resume()}")
            if self.step % config.checkpoint_every == 0 and not last:
                self._save_state()
            metrics.bar.update()

    def _one_step(self, want_l0: bool) -> StepTerms:
        config, step = self.config, self.step
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * warmup_cosine(step, config.steps, config.warmup_fraction)
        weights = config.loss_weights
        batch = self.order[step]
        # The batch is still on the CPU, where this check costs nothing.
        require_embedded(batch.tokens, self.pair.model.cfg.d_vocab, f"The batch of step {step + 1}")
        batch = batch.to(self.pair.device)
        cut = random.Random(f"{config.seed}-cut-{step}").randint(weights.lowest_cut, self.pair.n_layers)
        terms = shared_prefix_step(self.pair, batch, cut, weights, sparsity_weight(config, step), want_l0)
        norm = torch.nn.utils.clip_grad_norm_(self.adapters.parameters(), config.grad_clip)
        if not bool(torch.isfinite(terms.total) & torch.isfinite(norm)):
            raise TrainingError(self._not_finite_message(terms, float(norm), batch))
        self.optimizer.step()
        self.optimizer.zero_grad()
        rate = min(1.0, 1 / (THRESHOLD_WINDOW * config.steps))
        for index, adapter in enumerate(self.adapters):
            adapter.settle_threshold(None if terms.smallest_active is None else terms.smallest_active[index], rate)
        self.tokens += int(batch.real.sum())
        return terms

    def _not_finite_message(self, terms: StepTerms, norm: float, batch: Batch) -> str:
        names = [name for name in TERM_NAMES if not math.isfinite(float(getattr(terms, name)))]
        what = ", ".join(names) or f"the gradient's norm ({norm})"
        saved = ""
        if self.folder is not None and not (self.folder.is_new and self.step == 0):
            latest = [path.name for path in self.folder.training_states][-1:]
            saved = f" Saved in {self.folder.path}: {latest[0] if latest else 'no training state yet'}."
        return f"Step {self.step + 1}: {what} is not finite. {describe_not_finite(self.pair, batch)}{saved}"

    def _how_to_resume(self) -> str:
        if self.folder is None:
            return " The run has no folder, so it cannot be resumed; the pair holds the adapters as they are now."
        path = self.folder.path
        return f" Resume with: tl-adapters train --resume {path} (or Trainer.resume(pair, traces, {str(path)!r}))."

    # -- training states ------------------------------------------------------------------------------------------

    def _save_state(self) -> None:
        if self.folder is not None:
            counters = TrainingCounters(
                step=self.step, tokens=self.tokens, seconds=self.seconds, order=OrderPosition(**self.order.position)
            )
            state = TrainingState(self.adapters, moments_by_name(self.optimizer), counters)
            self.folder.save_training_state(state)

    def _restore(self, run: RunFolder) -> None:
        """Continue from the latest training state of a run folder, or from its result if the run has finished."""
        self.folder = run
        result = run.result()
        if result is not None:  # the run has finished, and may have been killed while it deleted its training states
            self.adapters.load_state_dict(result.state_dict())
            self.step, self.tokens, self.seconds = self.config.steps, *run.tokens_and_seconds()
            return
        state = run.load_training_state(self.adapters)
        if state is None:  # the run was killed before its first saved state, so it starts again from the seed
            return
        self.adapters.load_state_dict(state.adapters.state_dict())
        restore_moments(self.optimizer, state.moments)
        counters = state.counters
        self.order.restore(counters.order.model_dump())
        self.step, self.tokens, self.seconds = counters.step, counters.tokens, counters.seconds


def _origin_of(pair: PairedModel) -> RunConfig:
    """A configuration that names the models of a pair, if both have a name."""
    named = bool(pair.base_id and pair.target_id)
    return RunConfig(base=pair.base_id, target=pair.target_id) if named else RunConfig()


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

    Raises: as `Trainer` and `Trainer.run`.
    """
    config = replace(config or TrainingConfig(), **options)
    return Trainer(pair, traces, config, folder, validation=validation, progress=progress).run()
