"""Where a run's metrics are written: the progress bar, the .jsonl files and the tracker."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tl_adapters.config import TrainingConfig
from tl_adapters.local_stage.stage import LocalProgress
from tl_adapters.processes import processes
from tl_adapters.training.objective import StepTerms
from tl_adapters.training.run_folder import LOCAL_METRICS_FILE, METRICS_FILE, VALIDATION_FILE, RunFolder
from tl_adapters.training.trackers import Tracker, open_tracker


class MetricsWriter:
    """Writes the metrics of a run to all places at once; made by `open_metrics`.

    Args:
        folder: the run folder; None for a run in memory.
        tracker: the tracker that the configuration names.
        progress: show progress bars.
    """

    def __init__(self, folder: RunFolder | None, tracker: Tracker, progress: bool) -> None:
        self._folder, self._tracker, self._progress = folder, tracker, progress
        self.bar = tqdm(disable=True)
        """The present progress bar."""

    def new_bar(self, description: str, total: int, done: int = 0) -> None:
        """Close the present progress bar and show another."""
        self.bar.close()
        # If the output is a file instead of a terminal, a line every ten seconds is enough.
        interval = 0.1 if sys.stderr.isatty() else 10.0
        self.bar = tqdm(total=total, initial=done, desc=description, disable=not self._progress, mininterval=interval)

    def write_terms(self, step: int, tokens: int, lr: float, terms: StepTerms) -> None:
        """Write the terms of a step, which include L0, with the tokens so far and the learning rate."""
        assert terms.l0 is not None
        values = {"total": float(terms.total), **{name: float(term) for name, term in terms.by_name().items()}}
        mean_l0 = _mean(terms.l0)
        self.bar.set_postfix(
            {"kl": f"{values['output_kl']:.4f}", "nmse": f"{values['nmse']:.4f}", "l0": f"{mean_l0:.1f}"}, refresh=False
        )
        self._append(METRICS_FILE, {"step": step, "tokens": tokens, "lr": lr, **values, "l0": terms.l0})
        by_layer = {f"l0/layer_{layer}": value for layer, value in enumerate(terms.l0)}
        self._tracker.log(step, {**values, "lr": lr, "l0": mean_l0, "tokens": float(tokens), **by_layer})

    def write_local(self, step: int, progress: LocalProgress) -> None:
        """Write what a step of the local stage has shown."""
        by_name = asdict(progress)
        self.bar.set_postfix(
            {"error": f"{_mean(progress.error):.3f}", "l0": f"{_mean(progress.l0):.2f}", "alive": sum(progress.alive)},
            refresh=False,
        )
        self._append(LOCAL_METRICS_FILE, {"step": step, **by_name})
        by_layer = {
            f"local_{name}/layer_{layer}": float(value)
            for name in ("error", "sparsity", "l0", "alive")
            for layer, value in enumerate(by_name[name])
        }
        means = {f"local_{name}": _mean(by_name[name]) for name in ("error", "sparsity", "l0")}
        alive = {"local_alive": float(sum(progress.alive))}
        self._tracker.log(step, {"lr": progress.lr, "tokens": float(progress.tokens), **means, **alive, **by_layer})

    def write_validation(self, step: int, terms: Mapping[str, Any]) -> None:
        """Write the terms on held-out documents (`held_out_terms`)."""
        self._append(VALIDATION_FILE, {"step": step, **terms})
        self._tracker.log(step, {f"validation/{name}": terms[name] for name in ("output_kl", "nmse")})

    def _append(self, file: str, line: Mapping[str, Any]) -> None:
        if self._folder is not None:
            self._folder.append(file, line)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@contextmanager
def open_metrics(
    folder: RunFolder | None, config: TrainingConfig, first_step: int, progress: bool
) -> Iterator[MetricsWriter]:
    """Opens the tracker of a run, in the main process alone, and closes it with the progress bar.

    Args:
        folder: the run folder; None for a run in memory.
        config: the options, which name the tracker.
        first_step: steps done already.
        progress: show progress bars.

    Raises:
        TrackerError: the tracker does not start.
    """
    tracker = processes().together(
        lambda: open_tracker(
            config.tracker if processes().is_main else "none",
            folder.path if folder else Path(),
            folder.id if folder else "",
            folder.config.to_dict() if folder else {},
            first_step=first_step,
            project=config.tracker_project,
        )
    )
    metrics = MetricsWriter(folder, tracker, progress)
    try:
        yield metrics
    finally:
        metrics.bar.close()
        tracker.close()
