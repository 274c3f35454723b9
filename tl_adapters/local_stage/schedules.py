"""Schedules of both training stages as functions of the step: learning rate and weight of the sparsity term."""

from __future__ import annotations

import math

from tl_adapters.config import TrainingConfig


def warmup_cosine(step: int, steps: int, warmup_fraction: float) -> float:
    """Factor of the peak learning rate at ``step`` (from 0): a linear rise, then a cosine to 0."""
    warmup = max(1.0, warmup_fraction * steps)
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def linear_warmup(step: int, steps: int, fraction: float) -> float:
    """Factor of the sparsity term's weight at ``step`` (from 0): a linear rise to 1 over a fraction of the steps."""
    return min(1.0, (step + 1) / max(1.0, fraction * steps))


def sparsity_weight(config: TrainingConfig, step: int) -> float:
    """Weight of the sparsity term at ``step`` (from 0): of L1 for relu, of L0 for jumprelu, else 0."""
    weight = {"relu": config.l1_weight, "jumprelu": config.l0_weight}.get(config.activation, 0.0)
    return weight * linear_warmup(step, config.steps, config.l1_warmup_fraction)
