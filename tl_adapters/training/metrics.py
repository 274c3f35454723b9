"""Where a run's metrics are written: the progress bar, metrics.jsonl and validation.jsonl, and the tracker."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tl_adapters.config import TrainingConfig
from tl_adapters.training.objective import TERM_NAMES, StepTerms
from tl_adapters.training.run_folder import METRICS_FILE, VALIDATION_FILE, RunFolder
from tl_adapters.training.trackers import Tracker, open_tracker


@dataclass(frozen=True)
class MetricsWriter:
    """Writes the metrics of a run to all places at once; made by `open_metrics`."""

    folder: RunFolder | None
    """The run folder; None for a run in memory."""
    bar: Any
    """The progress bar; `bar.update` counts a step."""
    tracker: Tracker
    """The tracker that the configuration names."""

    def write_terms(self, step: int, tokens: int, lr: float, terms: StepTerms) -> None:
        """Write the terms of a step, which include L0, with the tokens so far and the learning rate."""
        assert terms.l0 is not None
        values = {name: float(getattr(terms, name)) for name in ("total", *TERM_NAMES)}
        mean_l0 = sum(terms.l0) / len(terms.l0)
        self.bar.set_postfix(
            {"kl": f"{values['output_kl']:.4f}", "nmse": f"{values['nmse']:.4f}", "l0": f"{mean_l0:.1f}"}, refresh=False
        )
        if self.folder is not None:
            self.folder.append(METRICS_FILE, {"step": step, "tokens": tokens, "lr": lr, **values, "l0": terms.l0})
        by_layer = {f"l0/layer_{layer}": value for layer, value in enumerate(terms.l0)}
        self.tracker.log(step, {**values, "lr": lr, "l0": mean_l0, "tokens": float(tokens), **by_layer})

    def write_validation(self, step: int, terms: Mapping[str, Any]) -> None:
        """Write the terms on held-out documents (`held_out_terms`)."""
        if self.folder is not None:
            self.folder.append(VALIDATION_FILE, {"step": step, **terms})
        self.tracker.log(step, {f"validation/{name}": terms[name] for name in ("output_kl", "nmse")})


@contextmanager
def open_metrics(
    folder: RunFolder | None, config: TrainingConfig, first_step: int, progress: bool
) -> Iterator[MetricsWriter]:
    """Opens the progress bar and the tracker of a run.

    Args:
        folder: the run folder; None for a run in memory.
        config: the options, which name the tracker.
        first_step: steps done already.
        progress: show the progress bar.

    Raises:
        TrackerError: the tracker does not start.
    """
    # If the output is a file instead of a terminal, a line every ten seconds is enough.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    bar = tqdm(total=config.steps, initial=first_step, desc="train", disable=not progress, mininterval=interval)
    with bar:
        tracker = open_tracker(
            config.tracker,
            folder.path if folder else Path(),
            folder.id if folder else "",
            folder.config.to_dict() if folder else {},
            first_step=first_step,
            project=config.tracker_project,
        )
        try:
            yield MetricsWriter(folder, bar, tracker)
        finally:
            tracker.close()
