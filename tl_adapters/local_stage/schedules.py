"""Schedules of both training stages as functions of the step: factors of the learning rate and of a weight."""

from __future__ import annotations

import math


def warmup_cosine(step: int, steps: int, warmup_fraction: float) -> float:
    """Factor of the peak learning rate at ``step`` (from 0): a linear rise, then a cosine to 0."""
    warmup = max(1.0, warmup_fraction * steps)
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def linear_warmup(step: int, steps: int, fraction: float) -> float:
    """Factor of the sparsity term's weight at ``step`` (from 0): a linear rise to 1 over a fraction of the steps."""
    return min(1.0, (step + 1) / max(1.0, fraction * steps))
