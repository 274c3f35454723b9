"""Figures with confidence intervals: bootstrap over documents or problems, never over tokens.

Tokens of one document are not independent, so a document is the unit that is drawn. Every figure here is a ratio
of sums (a KL per token, a rate per 1,000 tokens, an accuracy per problem), resampled together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

DRAWS = 1000


@dataclass(frozen=True)
class Figure:
    """One measured number as results.json holds it."""

    value: float
    """The estimate from all documents."""
    low: float
    """2.5 % point of the bootstrap."""
    high: float
    """97.5 % point of the bootstrap."""
    n: int
    """Documents or problems."""
    unit: str
    """What the value is measured in."""
    split: str
    """Which problems or documents: train, select, tune or report."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the adapters measured."""


def bootstrap_ratio(
    numerators: Float[Tensor, "n"], denominators: Float[Tensor, "n"], seed: int = 0
) -> tuple[float, float, float]:
    """Sum over sum, with its 95 % percentile interval over draws of documents.

    The same ``seed`` draws the same documents, so two figures over one list of documents are paired.
    """
    numerators, denominators = numerators.double(), denominators.double()
    draws = _draws(len(numerators), seed)
    ratios = numerators[draws].sum(1) / denominators[draws].sum(1)
    low, high = torch.nanquantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(numerators.sum() / denominators.sum()), low, high


def bootstrap_ratio_of_ratios(
    top: tuple[Float[Tensor, "n"], Float[Tensor, "n"]],
    bottom: tuple[Float[Tensor, "n"], Float[Tensor, "n"]],
    seed: int = 0,
) -> tuple[float, float, float]:
    """One ratio of sums over another, paired by document (partial against full KL, say)."""
    (a, b), (c, d) = ([t.double() for t in pair] for pair in (top, bottom))
    draws = _draws(len(a), seed)
    ratios = (a[draws].sum(1) / b[draws].sum(1)) / (c[draws].sum(1) / d[draws].sum(1))
    low, high = torch.nanquantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float((a.sum() / b.sum()) / (c.sum() / d.sum())), low, high


def bootstrap_recovered(
    replacement: Float[Tensor, "n"], floor: Float[Tensor, "n"], target: Float[Tensor, "n"], seed: int = 0
) -> tuple[float, float, float]:
    """(replacement - floor) / (target - floor) of accuracies, paired by problem."""
    scores = torch.stack([replacement, floor, target]).double()
    r, f, t = scores[:, _draws(scores.shape[1], seed)].mean(-1)
    low, high = torch.nanquantile((r - f) / (t - f), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    r, f, t = scores.mean(-1)
    return float((r - f) / (t - f)), low, high


@lru_cache(maxsize=4)  # a block of results draws the same documents for every figure
def _draws(n: int, seed: int) -> Tensor:
    return torch.randint(n, (DRAWS, n), generator=torch.Generator().manual_seed(seed))
