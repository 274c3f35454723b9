"""95 % intervals of shares, differences and rates whose items are clustered in documents or problems.

Tokens of a document, and several responses to a problem, are not independent of each other, so documents and problems
are the unit of every interval. A bootstrap (`bootstrap`) shows no variation where all clusters agree or where no event
was observed; each function here then gives the exact interval of `share_intervals` instead:

* a *share of clustered items*: a bootstrap over clusters, and the share's interval for the number of clusters where
  all of them agree;
* a *difference of two shares of the same problems*: Newcombe's method 10 (Statistics in Medicine 17:2635, 1998), and a
  bootstrap over problems for averages over several responses;
* a *rate of events* (hesitations per token): a bootstrap over problems, and the exact Poisson bound (Garwood,
  Biometrika 28:437, 1936) where no event was observed;
* a *relative change of a rate*: a bootstrap that draws the problems of both rates together.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from tl_adapters.utils.bootstrap import (
    RELATIVE_ZERO,
    bootstrap_independent_means,
    bootstrap_ratio,
    bootstrap_ratio_of_ratios,
    sum_of_set_means,
)
from tl_adapters.utils.measurement import Estimate
from tl_adapters.utils.share_intervals import (
    most_unseen_events,
    newcombe,
    share,
    share_interval,
    unseen_share,
)


def clustered_share(
    hits: Float[Tensor, "*sets n"], totals: Float[Tensor, "*sets n"] | None = None, seed: int = 0
) -> Estimate:
    """Sum of hits over sum of totals, where the items of one document or problem depend on each other.

    Clusters of equal size that each are all or none give the `share` of those clusters. Where all clusters have the
    same share, the interval is that of this share in as many independent draws as there are clusters, which is wider
    than theirs.

    Args:
        hits: number of items that count, by cluster.
        totals: number of items, by cluster; 1 each by default.
        seed: of the draws.
    """
    hits = hits.double()
    totals = torch.ones_like(hits) if totals is None else totals.double()
    nonempty = totals > 0
    shares = (hits / totals)[nonempty]
    n = int(nonempty.reshape(-1, nonempty.shape[-1]).any(0).sum())
    if n == 0:
        return share(0, 0)
    equal_sizes = float(totals[nonempty].max()) == float(totals[nonempty].min())
    if hits.ndim == 1 and equal_sizes and bool(((shares == 0) | (shares == 1)).all()):
        return share(float(shares.sum()), n)
    if float(shares.max() - shares.min()) < RELATIVE_ZERO:
        value = float(shares[0])
        return Estimate(value, *share_interval(value * n, n), reason=f"all {n} agree: the interval of a share of {n}")
    return bootstrap_ratio(hits, totals, seed)


def paired_difference(a: Float[Tensor, "*sets n"], b: Float[Tensor, "n"], seed: int = 0) -> Estimate:
    """Mean of ``a`` minus mean of ``b``, the scores (0 to 1) of two models on the same problems.

    Outcomes of 0 and 1 have the interval of Newcombe's method 10, and averages over several responses a bootstrap over
    problems. Where no problem differs, the interval is the largest share that may differ unseen.
    """
    a, b = a.double(), b.double()
    n, difference = len(b), a - b
    if n == 0:
        return Estimate(None, None, None, reason="no problem was answered by both")
    if not bool(difference.any()):
        return _no_difference(n)
    if a.ndim == 1 and bool(torch.isin(torch.cat([a, b]), torch.tensor([0.0, 1.0], dtype=torch.float64)).all()):
        return newcombe(*(int(((a == x) & (b == y)).sum()) for x, y in ((1, 1), (1, 0), (0, 1), (0, 0))))
    if float(difference.max() - difference.min()) < RELATIVE_ZERO:
        return clustered_share((difference + 1) / 2, seed=seed).scaled(2, -1)
    return bootstrap_ratio(difference, torch.ones_like(b), seed)


def difference_of_means(a: Float[Tensor, "n"], b: Float[Tensor, "m"], seed: int = 0) -> Estimate:
    """Mean of ``a`` minus mean of ``b``, the scores (0 to 1) of two independent groups.

    Where all of ``a`` or all of ``b`` agree, the intervals of the two means are combined, as Newcombe does with those
    of independent shares (Statistics in Medicine 17:873, 1998); otherwise both groups are resampled.
    """
    if all(float(x.max() - x.min()) >= RELATIVE_ZERO for x in (a, b)):
        return bootstrap_independent_means(a, b, seed)
    value = float(a.double().mean() - b.double().mean())
    below_a, above_a, below_b, above_b = (width for x in (a, b) for width in _widths(clustered_share(x, seed=seed)))
    return Estimate(value, value - math.hypot(below_a, above_b), value + math.hypot(above_a, below_b))


def event_rate(
    events: Float[Tensor, "*sets n"], exposure: Float[Tensor, "*sets n"], cluster_size: float = 1.0, seed: int = 0
) -> Estimate:
    """Events over exposure (tokens); where no event was observed the upper end is the exact Poisson bound.

    Args:
        events, exposure: by problem.
        cluster_size: number of events in a problem that has any, measured where there are some (`event_cluster_size`).
            By default events are taken to occur one by one.
        seed: of the draws.
    """
    total = float(sum_of_set_means(exposure))
    if total <= 0 or bool(events.any()):
        return bootstrap_ratio(events, exposure, seed)
    reason = f"none in {total:,.0f}: the exact Poisson bound, for events that occur {cluster_size:.3g} at a time"
    return Estimate(0.0, 0.0, most_unseen_events(cluster_size) / total, reason=reason)


def event_cluster_size(events: Float[Tensor, "*sets n"]) -> float:
    """Mean number of events in the problems that have any; 1 where none has."""
    return max(1.0, float(events[events > 0].double().mean())) if bool(events.any()) else 1.0


def change_of_ratio(
    top: tuple[Float[Tensor, "*sets n"], Float[Tensor, "*sets n"]],
    bottom: tuple[Float[Tensor, "n"], Float[Tensor, "n"]],
    seed: int = 0,
) -> Estimate:
    """One ratio of sums over another, minus 1: the relative change of a rate or a mean, paired by problem.

    * It is undefined where the bottom ratio is 0.
    * Where no problem differs, as many problems as may differ unseen are each taken to lose or to double their count.
    * Where the top numerator is 0, the upper end is the Poisson bound of the top rate, with events clustered as they
      are at the bottom, over the lower end of the bottom's interval.
    """
    n = len(bottom[0])
    estimate = bootstrap_ratio_of_ratios(top, bottom, seed).scaled(1, -1)
    if estimate.value is None or n < 2:
        return estimate
    if all(bool((x == y).all()) for x, y in zip(top, bottom, strict=True)):
        return _no_difference(n)
    if bool(top[0].any()):
        return estimate
    bottom_low = bootstrap_ratio(*bottom, seed).low
    if not bottom_low:
        return Estimate(-1.0, None, None, reason="no events are left, and only a few of the problems had any")
    remaining = event_rate(*top, event_cluster_size(bottom[0]), seed)
    assert remaining.high is not None
    return Estimate(-1.0, -1.0, remaining.high / bottom_low - 1, reason=remaining.reason)


def _no_difference(n: int) -> Estimate:
    unseen = unseen_share(n)
    return Estimate(0.0, -unseen, unseen, reason=f"none of {n} differs: the largest share that may differ unseen")


def _widths(estimate: Estimate) -> tuple[float, float]:
    """Distance from the value down to the lower end and up to the upper end; 1 where a share has no interval."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return 1.0, 1.0
    return estimate.value - estimate.low, estimate.high - estimate.value
