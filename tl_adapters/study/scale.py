"""How much of everything a study does."""

from __future__ import annotations

from dataclasses import dataclass, field

from tl_adapters.circuits.study import StudyOptions
from tl_adapters.config import TrainingConfig
from tl_adapters.study.hesitation import BUILTIN_PROBLEM_COUNTS
from tl_adapters.study.open_run import BUILTIN_TRACES


@dataclass(frozen=True)
class Scale:
    """How much of everything a study does. The defaults are the full demo's."""

    training_traces: int = BUILTIN_TRACES
    """Training documents of the built-in pair."""
    problems: int = 1_000
    """Held-out problems whose answers are compared between models."""
    documents: int = 1_800
    """Greedy traces of the target for KL, NMSE, L0 and alive features; the first ``problems`` are the same."""
    baseline_documents: int = 200
    """Of these, how many the baselines are measured on."""
    max_new_tokens: int = 160
    """The limit of an answer."""
    hesitation: tuple[int, int] = BUILTIN_PROBLEM_COUNTS
    """Problems that the hesitation circuit is chosen on, and others that it is reported on."""
    circuit: StudyOptions = field(default_factory=StudyOptions)
    """How much of the circuit is measured."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Options of the training run."""
