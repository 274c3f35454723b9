"""Training adapters: Adam on the five-term objective, one cut a step (arXiv 2602.20904, section 3.2 and appendix).

    for each step:
        learning rate: linear warm-up, then a cosine to zero;  weight of the sparsity term: linear warm-up
        draw a batch of traces and a cut
        value and gradient of the objective (objective.py)
        clip, step, and bring the thresholds along

Schedules, batches and cuts are pure functions of seed and step, so where a run stands is its weights, the optimiser's
moments and a few counters: a run that is stopped or killed goes on from its last checkpoint bit for bit
(runfolder.py).
"""

from __future__ import annotations

import datetime
import logging
import math
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.config import RunConfig, TrainingConfig
from tl_adapters.data.batching import BatchOrder, TracesInMemory, TraceSource
from tl_adapters.data.chat_template import set_template_date
from tl_adapters.data.documents import EncodedDocuments
from tl_adapters.data.traces import Batch, Trace, batches_by_length, readable_traces, require_embedded
from tl_adapters.errors import UserError
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.training.objective import StepTerms, held_out_terms, require_trainable, shared_prefix_step
from tl_adapters.training.run_folder import METRICS_FILE, VALIDATION_FILE, RunFolder
from tl_adapters.training.trackers import open_tracker, require_tracker
from tl_adapters.utils.files import DiskFullError
from tl_adapters.utils.finite import NotFiniteError, by_layer_name, require_finite_activations

log = logging.getLogger(__name__)

THRESHOLD_WINDOW = 0.05
"""Share of the steps that batchtopk's threshold is a running mean of: at the end of the cosine, when weights hardly
move any more, so that the threshold fits the adapters that come out."""
TERMS = ("output_kl", "forward_bridge", "backward_bridge", "nmse", "sparsity")


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the message says why and what is kept."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C (or SIGTERM) between two steps; the message says what is kept and how to go on."""


def warmup_cosine(step: int, steps: int, warmup_fraction: float) -> float:
    """Factor of the peak learning rate at ``step`` (from 0): linear rise, then a cosine to 0."""
    warmup = max(1.0, warmup_fraction * steps)
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def linear_warmup(step: int, steps: int, fraction: float) -> float:
    """Factor of the sparsity term's weight at ``step`` (from 0): linear rise to 1."""
    return min(1.0, (step + 1) / max(1.0, fraction * steps))


def sparsity_weight(config: TrainingConfig, step: int) -> float:
    """Weight of the sparsity term at ``step`` (from 0): of relu's L1 or jumprelu's L0; topk and batchtopk have none."""
    weight = {"relu": config.l1_weight, "jumprelu": config.l0_weight}.get(config.activation, 0.0)
    return weight * linear_warmup(step, config.steps, config.l1_warmup_fraction)


class Trainer:
    """One training run. ``pair`` gets fresh adapters, which `run` trains.

    Args:
        pair: base and target; its weights stay frozen.
        traces: the training documents: a list, or a source that reads them as they are needed.
        config: the options.
        folder: the run folder to make; None trains in memory and writes nothing.
        validation: held-out documents, measured every ``validate_every`` steps.
        origin: where pair and data come from, recorded so that the command line can go on with the run.
        progress: show a progress bar.

    Raises:
        FolderExistsError: ``folder`` exists; `Trainer.resume` goes on with a run.
        DataError: there is nothing to train on.
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
            whole = replace(origin or _origin(pair), training=config)
            if (date := self._template_date) is not None:
                whole = replace(whole, data=replace(whole.data, template_date=date.isoformat()))
            self.folder = RunFolder.create(folder, whole, self._fingerprints)

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
        """Go on from the latest checkpoint of a run folder, as if it had never stopped.

        Raises RunFolderError where ``folder`` is no run's, another process works in it, or ``pair`` or ``traces`` are
        not those the run was started with.
        """
        run = RunFolder.open(folder)
        trainer = cls.__new__(cls)
        try:
            if isinstance(traces, EncodedDocuments) and run.config.data.template_date is not None:
                traces = traces.with_date(datetime.date.fromisoformat(run.config.data.template_date))
            trainer._set_up(pair, traces, run.config.training, validation, progress)
            run.require_same(trainer._fingerprints)
            trainer._go_on_in(run)
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
        require_trainable(pair)
        require_tracker(config.tracker)  # now: an extra that is missing leaves no folder behind
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
        require_embedded(
            self.order[0].tokens, pair.model.cfg.d_vocab, "The first batch"
        )  # now: no run folder is left behind
        held_out = [
            trace for trace in readable_traces(validation, pair.model.cfg) if trace.has_counted_tokens(config.count)
        ]
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
        """There is no step left."""
        return self.step == self.config.steps

    def run(self, on_step: Callable[[int, StepTerms], None] | None = None) -> AdapterSet:
        """Train to the end and return the adapters; with a folder, they are saved there.

        Raises TrainingError where a term is not finite or the disk is full, and TrainingInterrupted upon Ctrl-C; the
        last checkpoint is kept.
        """
        try:
            with _stop_signals() as stop, self._progress_bar() as bar, self._tracker() as tracker:
                self._loop(stop, bar, tracker, on_step)
            if self.folder is not None:
                self.folder.finish(self.adapters, self.tokens, self.seconds)
        except DiskFullError as error:
            raise TrainingError(f"Stopped at step {self.step}: {error}{self._how_to_go_on()}") from error
        finally:
            if self.folder is not None:
                self.folder.release()
        return self.adapters

    def _loop(self, stop: threading.Event, bar: Any, tracker: Any, on_step: Any) -> None:
        config, began = self.config, time.perf_counter() - self.seconds
        while self.step < config.steps:
            last = self.step + 1 == config.steps
            log_this = (self.step + 1) % config.log_every == 0 or last
            terms = self._one_step(want_l0=log_this)
            self.step += 1
            self.seconds = time.perf_counter() - began
            if on_step is not None:
                on_step(self.step, terms)
            if log_this:
                self._record(terms, bar, tracker)
            if self.validation and (self.step % config.validate_every == 0 or last):
                self._validate(tracker)
            if stop.is_set():
                self._save_checkpoint()
                raise TrainingInterrupted(f"Stopped at step {self.step} of {config.steps}.{self._how_to_go_on()}")
            if self.step % config.checkpoint_every == 0 and not last:
                self._save_checkpoint()
            bar.update()

    def _one_step(self, want_l0: bool) -> StepTerms:
        config, step = self.config, self.step
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * warmup_cosine(step, config.steps, config.warmup_fraction)
        weights = config.loss_weights
        batch = self.order[step]
        require_embedded(
            batch.tokens, self.pair.model.cfg.d_vocab, f"The batch of step {step + 1}"
        )  # on the CPU still, where it costs nothing
        batch = batch.to(self.pair.model.W_E.device)
        cut = random.Random(f"{config.seed}-cut-{step}").randint(weights.lowest_cut, self.pair.n_layers)
        terms = shared_prefix_step(self.pair, batch, cut, weights, sparsity_weight(config, step), want_l0)
        norm = torch.nn.utils.clip_grad_norm_(self.adapters.parameters(), config.grad_clip)
        if not bool(torch.isfinite(terms.total) & torch.isfinite(norm)):
            raise TrainingError(self._not_finite(terms, float(norm), batch))
        self.optimizer.step()
        self.optimizer.zero_grad()
        rate = min(1.0, 1 / (THRESHOLD_WINDOW * config.steps))
        for index, adapter in enumerate(self.adapters):
            adapter.settle_threshold(None if terms.smallest is None else terms.smallest[index], rate)
        self.tokens += int(batch.real.sum())
        return terms

    def _not_finite(self, terms: StepTerms, norm: float, batch: Batch) -> str:
        bad = [name for name in TERMS if not math.isfinite(float(getattr(terms, name)))]
        what = ", ".join(bad) or f"the gradient's norm ({norm})"
        kept = ""
        if self.folder is not None:
            last = [path.name for path in self.folder.checkpoints][-1:]
            kept = f" Kept in {self.folder.path}: {last[0] if last else 'no checkpoint yet'}."
        where = self._where_not_finite(batch) or "The forward passes are finite: lower lr, or grad_clip."
        return f"Step {self.step + 1}: {what} is not finite. {where}{kept}"

    @torch.no_grad()
    def _where_not_finite(self, batch: Batch) -> str:
        """Route, layer and document of the step's batch where activations are not finite; "" where all are."""
        try:
            for route in ("target", "replacement"):
                with self.pair.routed(route):
                    streams = by_layer_name(self.pair.residual_streams(batch.tokens))
                require_finite_activations(streams, batch.real, range(len(batch.tokens)), f"In this batch, the {route}")
        except NotFiniteError as error:
            return str(error)
        bad = [
            f"layer {layer}, {name}"
            for layer, adapter in zip(self.adapters.layer_indices, self.adapters, strict=True)
            for name, weight in adapter.named_parameters()
            if weight.grad is not None and not bool(torch.isfinite(weight.grad).all())
        ]
        return f"The first gradient that is not: {bad[0]}. Lower lr, or look at the data of this step." if bad else ""

    def _how_to_go_on(self) -> str:
        if self.folder is None:
            return " The run has no folder, so it cannot be taken up again; the pair holds the adapters as they are."
        path = self.folder.path
        return f" Go on with: tl-adapters train --resume {path} (or Trainer.resume(pair, traces, {str(path)!r}))."

    # -- what is recorded -----------------------------------------------------------------------------------------

    def _record(self, terms: StepTerms, bar: Any, tracker: Any) -> None:
        assert terms.l0 is not None
        values = {name: float(getattr(terms, name)) for name in ("total", *TERMS)}
        lr = self.optimizer.param_groups[0]["lr"]
        mean_l0 = sum(terms.l0) / len(terms.l0)
        bar.set_postfix(
            {"kl": f"{values['output_kl']:.4f}", "nmse": f"{values['nmse']:.4f}", "l0": f"{mean_l0:.1f}"}, refresh=False
        )
        if self.folder is not None:
            line = {"step": self.step, "tokens": self.tokens, "lr": lr, **values, "l0": terms.l0}
            self.folder.append(METRICS_FILE, line)
        by_layer = {f"l0/layer_{layer}": value for layer, value in enumerate(terms.l0)}
        tracker.log(self.step, {**values, "lr": lr, "l0": mean_l0, "tokens": float(self.tokens), **by_layer})

    def _validate(self, tracker: Any) -> None:
        found = held_out_terms(self.pair, self.validation)
        if self.folder is not None:
            self.folder.append(VALIDATION_FILE, {"step": self.step, **found})
        tracker.log(self.step, {f"validation/{name}": found[name] for name in ("output_kl", "nmse")})

    def _progress_bar(self) -> Any:
        # Where the output is a file, not a terminal, a line every ten seconds is enough.
        interval = 0.1 if sys.stderr.isatty() else 10.0
        return tqdm(
            total=self.config.steps, initial=self.step, desc="train", disable=not self.progress, mininterval=interval
        )

    @contextmanager
    def _tracker(self) -> Iterator[Any]:
        folder, name = self.folder, self.config.tracker
        if folder is None and name != "none":
            raise TrainingError(f"tracker is {name!r}, but the run has no folder to keep its id in; give folder=.")
        where = folder.path if folder else Path()
        whole = folder.config.to_dict() if folder else {}
        tracker = open_tracker(
            name, where, folder.id if folder else "", whole, first_step=self.step, project=self.config.tracker_project
        )
        try:
            yield tracker
        finally:
            tracker.close()

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        if self.folder is None:
            return
        moments = {
            f"{index}.{key}": value.contiguous()
            for index, entries in self.optimizer.state_dict()["state"].items()
            for key, value in entries.items()
        }
        state = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "order": self.order.position}
        self.folder.save_checkpoint(self.step, self.adapters, moments, state)

    def _go_on_in(self, run: RunFolder) -> None:
        self.folder = run
        result = run.result()
        if result is not None:  # done, and perhaps killed while it cleaned up
            self.adapters.load_state_dict(result.state_dict())
            self.step, self.tokens, self.seconds = self.config.steps, *run.spent()
            return
        found = run.load_checkpoint()
        if found is None:  # killed before the first checkpoint: everything is a function of the seed
            return
        adapters, tensors, state = found
        self.adapters.load_state_dict(adapters.state_dict())
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            index, key = name.split(".", 1)
            moments.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.order.restore(state["order"])
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]


def _origin(pair: PairedModel) -> RunConfig:
    both = bool(pair.base_id and pair.target_id)
    return RunConfig(base=pair.base_id, target=pair.target_id) if both else RunConfig()


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that a run stops between two steps; a second Ctrl-C stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread hears signals
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        log.warning("Stopping after this step; once more stops at once, and loses what came after the last checkpoint.")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    """Train adapters for ``pair``: `Trainer` in one call; keyword options replace fields of ``config``."""
    config = replace(config or TrainingConfig(), **options)
    return Trainer(pair, traces, config, folder, validation=validation, progress=progress).run()
