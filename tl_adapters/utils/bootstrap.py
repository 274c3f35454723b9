"""Bootstrap estimates of ratios and means, with documents or problems as the resampled unit, never tokens.

All intervals are 95 % percentile intervals. All measurements of a block draw the same documents (the same ``seed`` and
number of documents give the same draws), so they are paired. Two cases need care:

* *Undefined draws.* A draw of a ratio is undefined where its denominator is 0, or has another sign than in the whole
  data. Undefined draws are counted (`Estimate.undefined`) and treated as if they lay beyond both ends of the interval,
  which widens it; where they are more than 2.5 % of all draws there is no interval.
* *Sets that were drawn themselves* (random features, for example). Tensors then have a first axis "sets", and sets and
  documents are both resampled (the pigeonhole bootstrap; Owen, Annals of Applied Statistics 1:386, 2007).

`scipy.stats.bootstrap` returns NaN where a draw is undefined instead of counting it, and draws anew for each statistic.
The two agree where every draw is defined (a test compares them).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_adapters.utils.measurement import Estimate, IntervalError
from tl_adapters.utils.share_intervals import TAIL_PROBABILITY

BOOTSTRAP_DRAWS = 1000
RELATIVE_ZERO = 1e-12
"""A sum counts as 0 where it is below this share of the sum of its terms' absolute values."""


def bootstrap_ratio(
    numerators: Float[Tensor, "*sets n"], denominators: Float[Tensor, "... n"], seed: int = 0
) -> Estimate:
    """Sum of the numerators over the sum of the denominators, both by document."""
    top, bottom = (_Sums.of(x, seed) for x in (numerators, denominators))
    return _percentile_estimate(top / bottom, numerators.shape[-1])


def bootstrap_ratio_of_ratios(
    top: tuple[Float[Tensor, "*sets n"], Float[Tensor, "*sets n"]],
    bottom: tuple[Float[Tensor, "n"], Float[Tensor, "n"]],
    seed: int = 0,
) -> Estimate:
    """One ratio of sums over another, paired by document (partial over full KL, for example)."""
    a, b, c, d = (_Sums.of(x, seed) for x in (*top, *bottom))
    return _percentile_estimate((a / b) / (c / d), bottom[0].shape[-1])


def bootstrap_recovered(
    replacement: Float[Tensor, "n"], floor: Float[Tensor, "n"], target: Float[Tensor, "n"], seed: int = 0
) -> Estimate:
    """(replacement - floor) / (target - floor) of accuracies, paired by problem."""
    r, f, t = (x.double() for x in (replacement, floor, target))
    return _percentile_estimate(_Sums.of(r - f, seed) / _Sums.of(t - f, seed), len(r))


def bootstrap_strata(values: Sequence[Float[Tensor, "_"]], weights: Sequence[float], seed: int = 0) -> Estimate:
    """Weighted mean of the means of strata; values are resampled within each stratum.

    Args:
        values: one tensor for each stratum (layer), none of them empty.
        weights: of the strata (features in each layer); they are normalized to sum to 1.
        seed: of the draws; each stratum has its own.
    """
    total = sum(weights)
    value, drawn = 0.0, torch.zeros(BOOTSTRAP_DRAWS, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for stratum, weight in zip(values, weights, strict=True):
        value += weight / total * float(stratum.double().mean())
        drawn += weight / total * _resampled_means(stratum, generator)
    return _estimate_from_draws(value, drawn, sum(map(len, values)))


def bootstrap_independent_means(a: Float[Tensor, "n"], b: Float[Tensor, "m"], seed: int = 0) -> Estimate:
    """Mean of ``a`` minus mean of ``b``; the two are resampled independently of each other."""
    generator = torch.Generator().manual_seed(seed)
    means = [_resampled_means(x, generator) for x in (a, b)]
    value = float(a.double().mean() - b.double().mean())
    return _estimate_from_draws(value, means[0] - means[1], min(len(a), len(b)))


def bootstrap_kappa(first: Int[Tensor, "n"], second: Int[Tensor, "n"], seed: int = 0) -> Estimate:
    """Cohen's kappa of two ratings of the same items, which are resampled.

    Kappa is the agreement beyond chance: 1 where the ratings always agree, 0 where they agree as often as two raters
    who draw from their own shares would. It is undefined where both give every item the same rating, and has no
    interval where they always agree (`share` bounds that agreement).
    """
    n_ratings = int(torch.cat([first, second]).max()) + 1

    def kappa(draws: Tensor) -> Tensor:
        a, b = first[draws], second[draws]
        shares = [torch.stack([(x == k).double().mean(-1) for k in range(n_ratings)]) for x in (a, b)]
        chance = (shares[0] * shares[1]).sum(0)
        return ((a == b).double().mean(-1) - chance) / (1 - chance)

    value = float(kappa(torch.arange(len(first))))
    estimate = _estimate_from_draws(value, kappa(_document_draws(len(first), seed)), len(first))
    if estimate.value is None:
        return Estimate(None, None, None, estimate.undefined, "both give every item the same rating")
    if bool((first == second).all()):
        return Estimate(estimate.value, None, None, estimate.undefined, "all agree, so a bootstrap shows no variation")
    return estimate


def sum_of_set_means(values: Float[Tensor, "*sets n"]) -> Float[Tensor, ""]:
    """Sum over documents of the mean over sets."""
    return values.double().reshape(-1, values.shape[-1]).mean(0).sum()


@dataclass(frozen=True)
class _Sums:
    """A sum over all documents and over those of each draw; NaN where it is undefined."""

    whole: Float[Tensor, ""]
    drawn: Float[Tensor, "draws"]
    scale: Float[Tensor, ""]
    """Sum of the absolute values: a sum far below it counts as 0, since sums of thirds do not cancel exactly."""

    @classmethod
    def of(cls, values: Float[Tensor, "*sets n"], seed: int) -> _Sums:
        values = values.double()
        n = values.shape[-1]
        if bad := int((~values.isfinite()).reshape(-1, n).any(0).sum()):
            raise IntervalError(
                f"The values of {bad} of {n} documents or problems are not finite, so their sum is undefined. Check "
                "the model's weights and its dtype."
            )
        documents = _document_draws(n, seed)
        scale = sum_of_set_means(values.abs())
        if values.ndim == 1:
            return cls(values.sum(), values[documents].sum(1), scale)
        means = _set_weights(len(values), seed) @ values
        return cls(sum_of_set_means(values), means.gather(1, documents).sum(1), scale)

    def __truediv__(self, other: _Sums) -> _Sums:
        """NaN where the denominator is 0, or has another sign than in the whole data."""
        least = RELATIVE_ZERO * other.scale
        nan = torch.full_like(self.drawn, math.nan)
        whole = torch.where(other.whole.abs() > least, self.whole / other.whole, nan[0])
        drawn = torch.where(other.drawn * other.whole.sign() > least, self.drawn / other.drawn, nan)
        return _Sums(whole, drawn, whole.abs())


def _percentile_estimate(ratio: _Sums, n: int) -> Estimate:
    """A statistic with its percentile interval; undefined draws count as lying beyond both ends."""
    defined = ratio.drawn[ratio.drawn.isfinite()]
    n_undefined = len(ratio.drawn) - len(defined)
    undefined = n_undefined / len(ratio.drawn)
    if not bool(ratio.whole.isfinite()):
        return Estimate(None, None, None, undefined, "the denominator is 0")
    value = float(ratio.whole)
    if n < 2:
        reason = "an interval requires two documents or problems, and there is one"
        return Estimate(value, None, None, undefined, reason)
    beyond = TAIL_PROBABILITY * (len(ratio.drawn) - 1) - n_undefined
    if beyond < 0:
        reason = f"{undefined:.1%} of the draws are undefined: their denominator is 0 or of another sign"
        return Estimate(value, None, None, undefined, reason)
    tail = beyond / (len(defined) - 1)
    low, high = defined.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(value, low, high, undefined)


def _estimate_from_draws(value: float, drawn: Float[Tensor, "draws"], n: int) -> Estimate:
    whole = torch.tensor(value, dtype=torch.float64)
    return _percentile_estimate(_Sums(whole, drawn, whole.abs()), n)


def _resampled_means(values: Float[Tensor, "n"], generator: torch.Generator) -> Float[Tensor, "draws"]:
    draws = torch.randint(len(values), (BOOTSTRAP_DRAWS, len(values)), generator=generator)
    return values.double()[draws].mean(1)


@lru_cache(maxsize=4)  # all measurements of a block draw the same documents
def _document_draws(n: int, seed: int) -> Int[Tensor, "draws n"]:
    return torch.randint(n, (BOOTSTRAP_DRAWS, n), generator=torch.Generator().manual_seed(seed))


@lru_cache(maxsize=4)
def _set_weights(n: int, seed: int) -> Float[Tensor, "draws n"]:
    """Weights of the sets in each draw: how often each set was drawn, divided by the number of sets."""
    drawn = torch.randint(n, (BOOTSTRAP_DRAWS, n), generator=torch.Generator().manual_seed(seed + 1))
    return torch.nn.functional.one_hot(drawn, n).sum(1).double() / n
