"""Figures with 95 % confidence intervals. The document or problem is the unit that is drawn, never the token.

Which interval a figure has depends on what it is:

* a *share* of independent things (right answers, features of a kind): Wilson's score interval, and the exact one of
  Clopper and Pearson where nothing or everything happened. A bootstrap of no event would be certain of none;
* a *share of clustered things* (several answers to a problem, tokens of a document): a bootstrap over clusters, and the
  share's interval on the number of clusters where all of them agree;
* a *difference of two shares of the same problems*: Newcombe's method 10 (Statistics in Medicine 17:2635, 1998), with
  McNemar's exact test beside it; of averages over several answers, a bootstrap over problems;
* a *rate of events* (hesitations per token): a bootstrap over problems, and the exact Poisson bound (Garwood,
  Biometrika 28:437, 1936) where no event was seen;
* a *ratio* of two of these: a bootstrap that draws both together. Draws in which the denominator is 0, or has not the
  sign that it has in all of the data, have no value. They are counted (`Estimate.undefined`) and taken to lie beyond
  both ends of the interval, so that it widens; where they are more than 2.5 % there is no end, and no interval;
* a *mean over sets* that were drawn themselves (random features, say): sets and documents are both drawn (the
  pigeonhole bootstrap; Owen, Annals of Applied Statistics 1:386, 2007). Such tensors have a first axis "sets".

`scipy.stats.bootstrap` answers NaN where a draw has no value instead of counting it, and draws anew for each figure;
here all figures of a block share one drawing of documents, so that they are paired. The two agree where every draw has
a value (a test holds them together).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from scipy.stats import binomtest  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor

from tl_adapters.errors import UserError

DRAWS = 1000
TAIL = 0.025
"""Of the draws, beyond each end of an interval."""
_Z95 = 1.959963984540054
"""97.5 % point of the normal distribution."""
_ZERO = 1e-12
"""A sum of less than this share of its terms' sizes is 0."""


OPTIONAL = {"optional": True}
"""Metadata of fields that a file leaves out where they have their default (`results.plain`)."""


class IntervalError(UserError, ValueError):
    """Numbers that no figure can be made of."""


@dataclass(frozen=True)
class Measurement:
    """One measured number as results.json holds it."""

    value: float | None
    """The estimate from all documents; None where there is none, such as a ratio over nothing."""
    low: float | None
    """Lower end of the 95 % interval; None where there is no interval."""
    high: float | None
    """Upper end of the 95 % interval."""
    n: int
    """Documents or problems."""
    unit: str
    """What the value is measured in."""
    split: str
    """Which problems or documents: train, select, tune or report."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the adapters measured."""
    undefined: float = field(default=0.0, metadata=OPTIONAL)
    """Share of the bootstrap's draws that have no value; not written where there is none."""
    reason: str = field(default="", metadata=OPTIONAL)
    """Why there is no value or no interval, or what the interval is where it is not the usual one."""

    def __post_init__(self) -> None:
        for name in ("value", "low", "high"):
            if (number := getattr(self, name)) is not None and not math.isfinite(number):
                raise IntervalError(f"A figure's {name} is {number} ({self.unit}); what has no value is None.")


@dataclass(frozen=True)
class SetsMeasurement(Measurement):
    """The mean over sets that were drawn themselves; the interval covers the choice of sets and of documents."""

    draws: int = 0
    """How many sets."""
    min: float | None = None
    """The smallest of the sets' values."""
    max: float | None = None
    """The largest of the sets' values."""


@dataclass(frozen=True)
class OutcomesMeasurement(Measurement):
    """A share with the outcomes themselves, so that two models asked the same things can be compared pair by pair."""

    outcomes: str = ""
    """1 or 0 for each thing, in their order."""


@dataclass(frozen=True)
class Estimate:
    """A value with its interval, before it is said what of."""

    value: float | None
    """None where there is none."""
    low: float | None
    """None where there is no interval."""
    high: float | None
    """None where there is no interval."""
    undefined: float = 0.0
    """Share of the bootstrap's draws that have no value."""
    reason: str = ""
    """Why there is no value or no interval, or what the interval is where it is not the usual one."""

    def figure(self, n: int, unit: str, split: str, seeds: tuple[int, ...] = (0,)) -> Measurement:
        """As results.json holds it; arguments as the fields of `Measurement`."""
        return Measurement(self.value, self.low, self.high, n, unit, split, seeds, self.undefined, self.reason)

    def scaled(self, factor: float, shift: float = 0.0) -> Estimate:
        """The estimate of factor * x + shift; a negative factor exchanges the ends."""
        value, low, high = (None if x is None else factor * x + shift for x in (self.value, self.low, self.high))
        return Estimate(value, *((high, low) if factor < 0 else (low, high)), self.undefined, self.reason)


# -- shares -----------------------------------------------------------------------------------------------------------


def unseen(n: float) -> float:
    """The largest share that may well leave no trace in ``n`` independent draws: Clopper and Pearson's upper end."""
    return 1 - TAIL ** (1 / n)


def share_interval(hits: float, n: float) -> tuple[float, float]:
    """95 % interval of a share: Wilson's, or Clopper and Pearson's for none and for all. [0, 1] for no draws.

    Both may be fractions (a mean of shares over ``n`` problems; an effective number of draws), which scipy's
    ``binomtest`` does not take; for whole numbers the two agree.
    """
    if n <= 0:
        return 0.0, 1.0
    if hits <= 0:
        return 0.0, unseen(n)
    if hits >= n:
        return 1 - unseen(n), 1.0
    return _wilson(hits, n)


def _wilson(hits: float, n: float) -> tuple[float, float]:
    part, extra = hits / n, _Z95**2 / n
    middle = (part + extra / 2) / (1 + extra)
    half = _Z95 / (1 + extra) * math.sqrt(part * (1 - part) / n + extra / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def share(hits: float, n: float) -> Estimate:
    """``hits`` of ``n`` independent things, with `share_interval`; no value for none of none."""
    if n <= 0:
        return Estimate(None, None, None, reason="there is nothing of which it could be a share")
    return Estimate(hits / n, *share_interval(hits, n))


def clustered_share(
    hits: Float[Tensor, "*sets n"], totals: Float[Tensor, "*sets n"] | None = None, seed: int = 0
) -> Estimate:
    """Hits over totals, where those of one document or problem are not independent of each other.

    Args:
        hits: what counts, by cluster.
        totals: of how many, by cluster; 1 each by default.
        seed: of the draws.

    Clusters that each are all or none, of equal size, make it a `share` of them. Where all clusters have one share a
    bootstrap says nothing; then it is the interval of that share in as many independent draws as there are clusters,
    which is wider than theirs.
    """
    hits = hits.double()
    totals = torch.ones_like(hits) if totals is None else totals.double()
    counted = totals > 0
    shares = (hits / totals)[counted]
    n = int(counted.reshape(-1, counted.shape[-1]).any(0).sum())
    if n == 0:
        return share(0, 0)
    alike = float(totals[counted].max()) == float(totals[counted].min())
    if hits.ndim == 1 and alike and bool(((shares == 0) | (shares == 1)).all()):
        return share(float(shares.sum()), n)
    if float(shares.max() - shares.min()) < _ZERO:
        value = float(shares[0])
        return Estimate(value, *share_interval(value * n, n), reason=f"all {n} agree: the interval of a share of {n}")
    return bootstrap_ratio(hits, totals, seed)


def paired_difference(a: Float[Tensor, "*sets n"], b: Float[Tensor, "n"], seed: int = 0) -> Estimate:
    """Mean of ``a`` less mean of ``b``, two models' scores (0 to 1) on the same problems.

    For outcomes of 0 and 1 Newcombe's method 10; where no problem differs, what share of them may differ unseen. For
    averages of several answers a bootstrap over problems.
    """
    a, b = a.double(), b.double()
    n, difference = len(b), a - b
    if n == 0:
        return Estimate(None, None, None, reason="no problem was answered by both")
    if not bool(difference.any()):
        return Estimate(0.0, -unseen(n), unseen(n), reason=f"none of {n} differs: the share of those that may, unseen")
    if a.ndim == 1 and bool(torch.isin(torch.cat([a, b]), torch.tensor([0.0, 1.0], dtype=torch.float64)).all()):
        return newcombe(*(int(((a == x) & (b == y)).sum()) for x, y in ((1, 1), (1, 0), (0, 1), (0, 0))))
    if float(difference.max() - difference.min()) < _ZERO:
        return clustered_share((difference + 1) / 2, seed=seed).scaled(2, -1)
    return bootstrap_ratio(difference, torch.ones_like(b), seed)


def newcombe(both: int, first: int, second: int, neither: int) -> Estimate:
    """Difference of two shares of the same things, by Newcombe's paired score interval (method 10).

    Args:
        both, first, second, neither: how many have it in both, in one only, and in neither.

    Statistics in Medicine 17:2635 (1998): Wilson's intervals of the two shares, put together with their correlation,
    which is corrected for continuity.
    """
    n = both + first + second + neither
    p, q = (both + first) / n, (both + second) / n
    (p_low, p_high), (q_low, q_high) = (_wilson(k, n) for k in (both + first, both + second))
    product = (both + first) * (second + neither) * (both + second) * (first + neither)
    excess = both * neither - first * second
    corrected = max(excess - n / 2, 0.0) if excess > 0 else excess
    phi = corrected / math.sqrt(product) if product else 0.0

    def joined(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    return Estimate(p - q, p - q - joined(p - p_low, q_high - q), p - q + joined(q - q_low, p_high - p))


def mcnemar(a: str, b: str) -> float:
    """Exact two-sided p-value of "the two have the same share", for outcomes (1 or 0) of the same things.

    McNemar's test, by the binomial distribution of the pairs that differ; 1 where none does.
    """
    first, second = (sum(pair == one for pair in zip(a, b, strict=True)) for one in (("1", "0"), ("0", "1")))
    return float(binomtest(first, first + second).pvalue) if first + second else 1.0


# -- rates of events --------------------------------------------------------------------------------------------------


def most_events(together: float = 1.0) -> float:
    """The expected number of events that may well show none: the exact two-sided 95 % Poisson bound, 3.69.

    Events that come ``together`` so many at a time (all in one problem) are one event of that size.
    """
    return -math.log(TAIL) * together


def event_rate(
    events: Float[Tensor, "*sets n"], exposure: Float[Tensor, "*sets n"], together: float = 1.0, seed: int = 0
) -> Estimate:
    """Events over exposure (tokens), by problem; where there is no event the upper end is the exact Poisson bound.

    Args:
        events, exposure: by problem.
        together: events of a problem that has any, measured where there are some (`events_together`). Without such a
            measurement events are taken to come one by one.
        seed: of the draws.
    """
    total = float(_whole(exposure))
    if total <= 0 or bool(events.any()):
        return bootstrap_ratio(events, exposure, seed)
    reason = f"none in {total:,.0f}: the exact Poisson bound, events coming {together:.3g} at a time"
    return Estimate(0.0, 0.0, most_events(together) / total, reason=reason)


def events_together(events: Float[Tensor, "*sets n"]) -> float:
    """Mean number of events in the problems that have any; 1 where none has."""
    return max(1.0, float(events[events > 0].double().mean())) if bool(events.any()) else 1.0


def change_of_ratio(
    top: tuple[Float[Tensor, "*sets n"], Float[Tensor, "*sets n"]],
    bottom: tuple[Float[Tensor, "n"], Float[Tensor, "n"]],
    seed: int = 0,
) -> Estimate:
    """One ratio of sums over another, less 1: the relative change of a rate or a mean, paired by problem.

    * No value where the ratio at the bottom is 0.
    * Where no problem differs: up to as many as may differ unseen, each taken to lose or to double what is counted.
    * Where nothing is left at the top: the Poisson bound of what may be left, events coming together as they do at the
      bottom, over the lower end of the bottom's own interval.
    """
    n = len(bottom[0])
    estimate = bootstrap_ratio_of_ratios(top, bottom, seed).scaled(1, -1)
    if estimate.value is None or n < 2:
        return estimate
    if all(bool((x == y).all()) for x, y in zip(top, bottom, strict=True)):
        return Estimate(0.0, -unseen(n), unseen(n), reason=f"none of {n} differs: the share of those that may, unseen")
    if bool(top[0].any()):
        return estimate
    least = bootstrap_ratio(*bottom, seed).low
    if not least:
        return Estimate(-1.0, None, None, reason="none is left of what only a few of the problems had")
    left = event_rate(*top, events_together(bottom[0]), seed)
    assert left.high is not None
    return Estimate(-1.0, -1.0, left.high / least - 1, reason=left.reason)


# -- bootstrap --------------------------------------------------------------------------------------------------------


def bootstrap_ratio(
    numerators: Float[Tensor, "*sets n"], denominators: Float[Tensor, "... n"], seed: int = 0
) -> Estimate:
    """Sum over sum, with its 95 % percentile interval over draws of documents.

    The same ``seed`` draws the same documents, so two figures over one list of documents are paired.
    """
    top, bottom = (_Sums.of(x, seed) for x in (numerators, denominators))
    return _estimate(top / bottom, numerators.shape[-1])


def bootstrap_ratio_of_ratios(
    top: tuple[Float[Tensor, "*sets n"], Float[Tensor, "*sets n"]],
    bottom: tuple[Float[Tensor, "n"], Float[Tensor, "n"]],
    seed: int = 0,
) -> Estimate:
    """One ratio of sums over another, paired by document (partial against full KL, say)."""
    a, b, c, d = (_Sums.of(x, seed) for x in (*top, *bottom))
    return _estimate((a / b) / (c / d), bottom[0].shape[-1])


def bootstrap_recovered(
    replacement: Float[Tensor, "n"], floor: Float[Tensor, "n"], target: Float[Tensor, "n"], seed: int = 0
) -> Estimate:
    """(replacement - floor) / (target - floor) of accuracies, paired by problem."""
    r, f, t = (x.double() for x in (replacement, floor, target))
    return _estimate(_Sums.of(r - f, seed) / _Sums.of(t - f, seed), len(r))


@dataclass(frozen=True)
class _Sums:
    """A sum over all documents, and over those of each draw; NaN where there is no value."""

    whole: Tensor
    drawn: Float[Tensor, "draws"]
    scale: Tensor
    """Sum of the absolute values: what is far below it is 0, since sums of thirds do not cancel exactly."""

    @classmethod
    def of(cls, values: Float[Tensor, "*sets n"], seed: int) -> _Sums:
        values = values.double()
        n = values.shape[-1]
        if bad := int((~values.isfinite()).reshape(-1, n).any(0).sum()):
            raise IntervalError(
                f"{bad} of {n} documents or problems have a number that is not finite, so nothing can be said of their "
                "sum. Look at the model's weights and its dtype."
            )
        documents = _draws(values.shape[-1], seed)
        scale = _whole(values.abs())
        if values.ndim == 1:
            return cls(values.sum(), values[documents].sum(1), scale)
        means = _set_draws(len(values), seed) @ values
        return cls(_whole(values), means.gather(1, documents).sum(1), scale)

    def __truediv__(self, other: _Sums) -> _Sums:
        """NaN where the denominator is 0, or has another sign than in all of the data."""
        least = _ZERO * other.scale
        nan = torch.full_like(self.drawn, math.nan)
        whole = torch.where(other.whole.abs() > least, self.whole / other.whole, nan[0])
        drawn = torch.where(other.drawn * other.whole.sign() > least, self.drawn / other.drawn, nan)
        return _Sums(whole, drawn, whole.abs())


def _whole(values: Float[Tensor, "*sets n"]) -> Tensor:
    """Sum over documents of the mean over sets."""
    return values.double().reshape(-1, values.shape[-1]).mean(0).sum()


def _estimate(ratio: _Sums, n: int) -> Estimate:
    """A statistic with its percentile interval; draws without a value lie beyond both ends."""
    known = ratio.drawn[ratio.drawn.isfinite()]
    missing = len(ratio.drawn) - len(known)
    undefined = missing / len(ratio.drawn)
    if not bool(ratio.whole.isfinite()):
        return Estimate(None, None, None, undefined, "the denominator is 0")
    value = float(ratio.whole)
    if n < 2:
        return Estimate(value, None, None, undefined, "an interval takes two documents or problems, and there is one")
    beyond = TAIL * (len(ratio.drawn) - 1) - missing
    if beyond < 0:
        reason = f"{undefined:.1%} of the draws have no value: their denominator is 0 or of another sign"
        return Estimate(value, None, None, undefined, reason)
    at = beyond / (len(known) - 1)
    low, high = known.quantile(torch.tensor([at, 1 - at], dtype=torch.float64)).tolist()
    return Estimate(value, low, high, undefined)


def _percentiles(value: float, drawn: Float[Tensor, "draws"], n: int) -> Estimate:
    whole = torch.tensor(value, dtype=torch.float64)
    return _estimate(_Sums(whole, drawn, whole.abs()), n)


def bootstrap_strata(values: Sequence[Float[Tensor, "_"]], weights: Sequence[float], seed: int = 0) -> Estimate:
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
    return _percentiles(value, drawn, sum(map(len, values)))


def bootstrap_difference(a: Float[Tensor, "n"], b: Float[Tensor, "m"], seed: int = 0) -> Estimate:
    """Mean of ``a`` less mean of ``b``, with its 95 % percentile interval; the two are drawn independently.

    Where all of ``a`` or all of ``b`` agree (scores from 0 to 1), the two means' own intervals are put together, as
    Newcombe does with those of independent shares (Statistics in Medicine 17:873, 1998).
    """
    value = float(a.double().mean() - b.double().mean())
    if all(float(v.max() - v.min()) >= _ZERO for v in (a, b)):
        generator = torch.Generator().manual_seed(seed)
        means = [v.double()[torch.randint(len(v), (DRAWS, len(v)), generator=generator)].mean(1) for v in (a, b)]
        return _percentiles(value, means[0] - means[1], min(len(a), len(b)))
    below_a, above_a, below_b, above_b = (width for v in (a, b) for width in _widths(clustered_share(v, seed=seed)))
    return Estimate(value, value - math.hypot(below_a, above_b), value + math.hypot(above_a, below_b))


def _widths(estimate: Estimate) -> tuple[float, float]:
    """From the value down to the lower end, and up to the upper one; 1 where a share has no interval."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return 1.0, 1.0
    return estimate.value - estimate.low, estimate.high - estimate.value


def bootstrap_kappa(first: Int[Tensor, "n"], second: Int[Tensor, "n"], seed: int = 0) -> Estimate:
    """Cohen's kappa of two ratings of the same things, with its 95 % percentile interval over the things.

    Agreement beyond chance: 1 is always, 0 as often as two raters who draw from their own shares would. No value where
    both give everything the same rating, and no interval where they always agree (`share` bounds that agreement).
    """
    n_ratings = int(torch.cat([first, second]).max()) + 1

    def kappa(draws: Tensor) -> Tensor:
        a, b = first[draws], second[draws]
        shares = [torch.stack([(x == k).double().mean(-1) for k in range(n_ratings)]) for x in (a, b)]
        chance = (shares[0] * shares[1]).sum(0)
        return ((a == b).double().mean(-1) - chance) / (1 - chance)

    estimate = _percentiles(float(kappa(torch.arange(len(first)))), kappa(_draws(len(first), seed)), len(first))
    if estimate.value is None:
        return Estimate(None, None, None, estimate.undefined, "both give everything the same rating")
    if bool((first == second).all()):
        return Estimate(estimate.value, None, None, estimate.undefined, "all agree, so a bootstrap is certain of it")
    return estimate


@lru_cache(maxsize=4)  # a block of results draws the same documents for every figure
def _draws(n: int, seed: int) -> Tensor:
    return torch.randint(n, (DRAWS, n), generator=torch.Generator().manual_seed(seed))


@lru_cache(maxsize=4)
def _set_draws(n: int, seed: int) -> Float[Tensor, "draws n"]:
    """Weights of the sets in each draw: how often each was drawn, over how many there are."""
    drawn = torch.randint(n, (DRAWS, n), generator=torch.Generator().manual_seed(seed + 1))
    return torch.nn.functional.one_hot(drawn, n).sum(1).double() / n
