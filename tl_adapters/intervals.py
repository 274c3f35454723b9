"""Figures with confidence intervals: bootstrap over documents or problems, never over tokens.

Tokens of one document are not independent, so a document is the unit that is drawn. Every figure here is a ratio
of sums (a KL per token, a rate per 1,000 tokens, an accuracy per problem), resampled together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

DRAWS = 1000
_Z95 = 1.959963984540054
"""97.5 % point of the normal distribution."""


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


def wilson(hits: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: ``hits`` of ``n`` independent draws. All of [0, 1] for no draws."""
    if n <= 0:
        return 0.0, 1.0
    share, extra = hits / n, _Z95**2 / n
    middle = (share + extra / 2) / (1 + extra)
    half = _Z95 / (1 + extra) * math.sqrt(share * (1 - share) / n + extra / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_strata(
    values: Sequence[Float[Tensor, "_"]], weights: Sequence[float], seed: int = 0
) -> tuple[float, float, float]:
    """Weighted mean of the strata's means, with its 95 % percentile interval over draws within every stratum.

    Args:
        values: one tensor for each stratum (layer), none of them empty.
        weights: of the strata (features in each layer); their sum is made 1.
        seed: of the draws. Every stratum has draws of its own.
    """
    total = sum(weights)
    value, drawn = 0.0, torch.zeros(DRAWS, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for stratum, weight in zip(values, weights, strict=True):
        stratum = stratum.double()
        draws = torch.randint(len(stratum), (DRAWS, len(stratum)), generator=generator)
        value += weight / total * float(stratum.mean())
        drawn += weight / total * stratum[draws].mean(1)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return value, low, high


def bootstrap_difference(a: Float[Tensor, "n"], b: Float[Tensor, "m"], seed: int = 0) -> tuple[float, float, float]:
    """Mean of ``a`` less mean of ``b``, with its 95 % percentile interval; the two are drawn independently."""
    generator = torch.Generator().manual_seed(seed)
    means = [v.double()[torch.randint(len(v), (DRAWS, len(v)), generator=generator)].mean(1) for v in (a, b)]
    low, high = torch.quantile(means[0] - means[1], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(a.double().mean() - b.double().mean()), low, high


def bootstrap_kappa(first: Int[Tensor, "n"], second: Int[Tensor, "n"], seed: int = 0) -> tuple[float, float, float]:
    """Cohen's kappa of two ratings of the same things, with its 95 % percentile interval over the things.

    Agreement beyond chance: 1 is always, 0 as often as two raters who draw from their own shares would. NaN where
    both give everything the same rating.
    """
    n_ratings = int(torch.cat([first, second]).max()) + 1

    def kappa(draws: Tensor) -> Tensor:
        a, b = first[draws], second[draws]
        shares = [torch.stack([(x == k).double().mean(-1) for k in range(n_ratings)]) for x in (a, b)]
        chance = (shares[0] * shares[1]).sum(0)
        return ((a == b).double().mean(-1) - chance) / (1 - chance)

    low, high = torch.nanquantile(
        kappa(_draws(len(first), seed)), torch.tensor([0.025, 0.975], dtype=torch.float64)
    ).tolist()
    return float(kappa(torch.arange(len(first)))), low, high


@lru_cache(maxsize=4)  # a block of results draws the same documents for every figure
def _draws(n: int, seed: int) -> Tensor:
    return torch.randint(n, (DRAWS, n), generator=torch.Generator().manual_seed(seed))
