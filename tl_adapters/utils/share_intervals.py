"""Closed-form 95 % intervals of shares and counts of independent items.

* A share has Wilson's score interval, or the exact interval of Clopper and Pearson where none or all of the items
  count: a bootstrap of zero events would give an interval of zero width.
* A difference of two shares of the same items has the interval of Newcombe's method 10 (Statistics in Medicine 17:2635,
  1998); `mcnemar` gives the exact p-value of their equality.
* A number of events of which none was observed has the exact Poisson bound (Garwood, Biometrika 28:437, 1936).
"""

from __future__ import annotations

import math

from scipy.stats import binomtest  # type: ignore[import-untyped,unused-ignore]

from tl_adapters.utils.measurement import Estimate

TAIL_PROBABILITY = 0.025
"""Probability beyond each end of a 95 % interval."""
_Z_975 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


def unseen_share(n: float) -> float:
    """Clopper and Pearson's upper bound of a share of which ``n`` independent draws show nothing."""
    return 1 - TAIL_PROBABILITY ** (1 / n)


def share_interval(hits: float, n: float) -> tuple[float, float]:
    """95 % interval of a share: Wilson's, or Clopper and Pearson's for 0 and for all hits; (0, 1) for no draws.

    Both arguments may be fractions (a mean of shares over ``n`` problems, an effective number of draws), which scipy's
    ``binomtest`` does not accept; for whole numbers the two agree.
    """
    if n <= 0:
        return 0.0, 1.0
    if hits <= 0:
        return 0.0, unseen_share(n)
    if hits >= n:
        return 1 - unseen_share(n), 1.0
    return _wilson(hits, n)


def _wilson(hits: float, n: float) -> tuple[float, float]:
    part, extra = hits / n, _Z_975**2 / n
    middle = (part + extra / 2) / (1 + extra)
    half = _Z_975 / (1 + extra) * math.sqrt(part * (1 - part) / n + extra / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def share(hits: float, n: float) -> Estimate:
    """The share of ``hits`` among ``n`` independent items, with `share_interval`; undefined for 0 items."""
    if n <= 0:
        return Estimate(None, None, None, reason="there are no items to take a share of")
    return Estimate(hits / n, *share_interval(hits, n))


def newcombe(both: int, first: int, second: int, neither: int) -> Estimate:
    """Difference of two shares of the same items, by Newcombe's paired score interval (method 10).

    Wilson's intervals of the two shares are combined with their correlation, which is corrected for continuity
    (Statistics in Medicine 17:2635, 1998).

    Args:
        both, first, second, neither: number of items that count in both, in the first or second only, and in neither.
    """
    n = both + first + second + neither
    p, q = (both + first) / n, (both + second) / n
    (p_low, p_high), (q_low, q_high) = (_wilson(k, n) for k in (both + first, both + second))
    product = (both + first) * (second + neither) * (both + second) * (first + neither)
    excess = both * neither - first * second
    corrected = max(excess - n / 2, 0.0) if excess > 0 else excess
    phi = corrected / math.sqrt(product) if product else 0.0

    def combined(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    return Estimate(p - q, p - q - combined(p - p_low, q_high - q), p - q + combined(q - q_low, p_high - p))


def mcnemar(a: str, b: str) -> float:
    """Exact two-sided p-value of McNemar's test that two shares of the same items are equal.

    It follows from the binomial distribution of the pairs that differ, and is 1 where no pair differs.

    Args:
        a, b: one character per item, 1 or 0 (`OutcomesMeasurement.outcomes`).
    """
    first, second = (sum(pair == outcome for pair in zip(a, b, strict=True)) for outcome in (("1", "0"), ("0", "1")))
    return float(binomtest(first, first + second).pvalue) if first + second else 1.0


def most_unseen_events(cluster_size: float = 1.0) -> float:
    """The largest expected number of events of which none may be seen: the exact two-sided 95 % Poisson bound, 3.69.

    Events that occur in clusters of ``cluster_size`` (all of them in one problem) count as one event of that size.
    """
    return -math.log(TAIL_PROBABILITY) * cluster_size
