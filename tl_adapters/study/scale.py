"""The size of a study: how many documents, problems and steps each stage uses."""

from __future__ import annotations

from dataclasses import dataclass, field

from tl_adapters.circuits.study import StudyOptions
from tl_adapters.config import TrainingConfig
from tl_adapters.study.hesitation import ORGANISM_PROBLEM_COUNTS
from tl_adapters.study.open_run import ORGANISM_TRACES


@dataclass(frozen=True)
class StudyScale:
    """How many documents, problems and steps each stage of a study uses. The defaults are those of the full demo."""

    training_traces: int = ORGANISM_TRACES
    """Training documents of the model organism."""
    problems: int = 1_000
    """Held-out problems whose answers are compared between models."""
    documents: int = 1_800
    """Greedy traces of the target for KL, NMSE, L0 and alive features; the first ``problems`` of them are shared."""
    baseline_documents: int = 200
    """How many of these the baselines are measured on."""
    max_new_tokens: int = 160
    """Longest answer in tokens."""
    hesitation: tuple[int, int] = ORGANISM_PROBLEM_COUNTS
    """Problems on which the hesitation circuit is selected, and other problems on which it is reported."""
    circuit: StudyOptions = field(default_factory=StudyOptions)
    """Options of the hesitation study."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Options of the training run."""
