"""Intervals: their coverage, pairing and reproducibility, and agreement with published values."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.stats import binom, binomtest

from tl_adapters.utils.bootstrap import BOOTSTRAP_DRAWS, bootstrap_ratio, bootstrap_ratio_of_ratios, bootstrap_recovered
from tl_adapters.utils.clustered_intervals import (
    change_of_ratio,
    clustered_share,
    difference_of_means,
    event_cluster_size,
    event_rate,
    paired_difference,
)
from tl_adapters.utils.measurement import Estimate
from tl_adapters.utils.share_intervals import mcnemar, newcombe, share, share_interval, unseen_share


def ends(estimate: Estimate) -> tuple[float | None, float | None]:
    return estimate.low, estimate.high


# -- shares -----------------------------------------------------------------------------------------------------------


def test_a_share_agrees_with_scipys_wilson_and_exact_intervals() -> None:
    for n in (1, 2, 7, 30, 1000):
        for hits in {0, 1, n // 3, n // 2, n - 1, n}:
            expected = binomtest(hits, n).proportion_ci(method="exact" if hits in (0, n) else "wilson")
            assert share_interval(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
            assert share(hits, n).value == hits / n


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (0, 10, 0, 0.3085), (0, 1000, 0, 0.003682)],
)
def test_published_intervals_of_shares(hits: int, n: int, low: float, high: float) -> None:
    """Wilson's from Newcombe (1998a); Clopper and Pearson's of none."""
    assert share_interval(hits, n) == pytest.approx((low, high), abs=6e-5)
    assert share_interval(n - hits, n) == pytest.approx((1 - high, 1 - low), abs=6e-5)


def test_a_share_of_no_items_is_undefined() -> None:
    assert share_interval(0, 0) == (0, 1)
    found = share(0, 0)
    assert (found.value, *ends(found)) == (None, None, None) and "no items" in found.reason


@pytest.mark.parametrize("n", [30, 300])
def test_intervals_of_shares_cover(n: int) -> None:
    """Coverage computed exactly from the binomial distribution, at single shares and on average."""
    intervals = np.array([share_interval(hits, n) for hits in range(n + 1)])
    coverages = []
    for p in np.linspace(0.02, 0.98, 49):
        covers = (intervals[:, 0] <= p) & (p <= intervals[:, 1])
        coverages.append(float(binom.pmf(np.arange(n + 1), n, p) @ covers))
    assert np.mean(coverages) >= 0.945 and min(coverages) >= 0.91


def test_a_share_of_clusters() -> None:
    """Answers to one problem are not independent: ten times the same answers are no more evidence than one."""
    once = torch.tensor([1.0, 0, 1, 1, 0, 1])
    assert clustered_share(once) == clustered_share(10 * once, torch.full((6,), 10.0)) == share(4, 6)
    mixed = clustered_share(torch.tensor([5.0, 2, 4, 5, 1, 3]), torch.full((6,), 5.0))
    assert mixed == bootstrap_ratio(torch.tensor([5.0, 2, 4, 5, 1, 3]), torch.full((6,), 5.0))
    for agreed in (0.0, 2.0, 5.0):
        found = clustered_share(torch.full((6,), agreed), torch.full((6,), 5.0))
        assert found.value == agreed / 5 and ends(found) == pytest.approx(share_interval(6 * agreed / 5, 6))
    unequal = clustered_share(torch.tensor([3.0, 7.0]), torch.tensor([3.0, 7.0]))
    assert unequal.value == 1 and unequal.low == pytest.approx(1 - unseen_share(2)) and "2 agree" in unequal.reason
    assert clustered_share(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])) == share(1, 1)


# -- differences of shares of the same items ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "value", "low", "high"),
    [
        ((36, 12, 2, 0), 0.2, 0.0569, 0.3404),
        ((20, 12, 2, 16), 0.2, 0.0562, 0.3292),
        ((1, 1, 7, 12), -0.2857, -0.507, -0.026),
        ((59, 6, 16, 80), -0.0621, -0.1186, -0.0046),
    ],
    ids=["Newcombe 1998b", "Newcombe 1998b, also", "Bentur 2009", "Cavo 2012"],
)
def test_published_paired_differences(counts: tuple[int, int, int, int], value: float, low: float, high: float) -> None:
    """The last two as in Fagerland, Lydersen and Laake, Statistics in Medicine 33:2850 (2014)."""
    found = newcombe(*counts)
    assert (found.value, *ends(found)) == pytest.approx((value, low, high), abs=5e-4)
    both, first, second, neither = counts
    swapped = newcombe(both, second, first, neither)
    assert (swapped.value, *ends(swapped)) == pytest.approx((-found.value, -found.high, -found.low))


@pytest.mark.parametrize("n", [30, 300])
@pytest.mark.parametrize("cells", [(0.7, 0.1, 0.05, 0.15), (0.45, 0.05, 0.05, 0.45), (0.85, 0.1, 0.02, 0.03)])
def test_paired_differences_cover(n: int, cells: tuple[float, ...]) -> None:
    drawn = np.random.default_rng(0).multinomial(n, cells, size=2000)
    truth = cells[1] - cells[2]
    found = [newcombe(*map(int, counts)) for counts in drawn]
    assert np.mean([e.low <= truth <= e.high for e in found]) >= 0.93


def test_the_difference_of_two_models_on_the_same_problems() -> None:
    a = torch.tensor([1.0] * 20 + [1.0] * 12 + [0.0] * 2 + [0.0] * 16)
    b = torch.tensor([1.0] * 20 + [0.0] * 12 + [1.0] * 2 + [0.0] * 16)
    assert paired_difference(a, b) == newcombe(20, 12, 2, 16)
    same = paired_difference(a, a.clone())
    assert (same.value, *ends(same)) == (0, -unseen_share(50), unseen_share(50)), (
        "exact: what share of 50 may differ unseen"
    )
    averaged = a.clone()
    averaged[0] = 0.5
    assert paired_difference(averaged, b) == bootstrap_ratio(averaged.double() - b.double(), torch.ones(50))
    shifted = paired_difference(torch.full((50,), 0.75), torch.full((50,), 0.25))
    assert shifted.value == 0.5 and shifted.low < 0.4 and shifted.high > 0.6, "not certain because all agree"
    assert paired_difference(torch.zeros(0), torch.zeros(0)).value is None


def test_mcnemars_exact_test() -> None:
    """McNemar's, of Cavo (2012): 6 against 16."""
    a, b = "1" * 59 + "1" * 6 + "0" * 16 + "0" * 80, "1" * 59 + "0" * 6 + "1" * 16 + "0" * 80
    assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(0.0525, abs=5e-5)
    assert mcnemar(a, a) == 1


def test_difference_of_means_where_all_of_one_group_agree() -> None:
    """All right against all wrong, ten each: Newcombe's interval of independent shares, with exact ends."""
    found = difference_of_means(torch.ones(10), torch.zeros(10))
    assert found.value == 1 and found.low == pytest.approx(1 - math.hypot(unseen_share(10), unseen_share(10)))


# -- rates ------------------------------------------------------------------------------------------------------------


def test_no_event_has_the_exact_poisson_bound() -> None:
    tokens = torch.full((50,), 20.0)
    found = event_rate(torch.zeros(50), tokens)
    assert (found.value, found.low) == (0, 0)
    assert found.high == pytest.approx(scipy.stats.chi2.ppf(0.975, 2) / 2 / 1000) and "1,000" in found.reason
    assert scipy.stats.poisson.cdf(0, found.high * 1000) == pytest.approx(0.025)
    together = event_cluster_size(torch.tensor([0.0, 3.0, 5.0]))
    assert together == 4 and event_rate(torch.zeros(50), tokens, together).high == pytest.approx(4 * found.high)
    assert event_cluster_size(torch.zeros(3)) == 1
    some = torch.zeros(50)
    some[3] = 2
    assert event_rate(some, tokens) == bootstrap_ratio(some, tokens)


def test_a_rate_without_exposure_is_undefined() -> None:
    found = event_rate(torch.zeros(5), torch.zeros(5))
    assert found.value is None and found.reason and found.undefined == 1


# -- bootstrap --------------------------------------------------------------------------------------------------------


def test_a_ratio_is_of_sums_not_a_mean_of_ratios() -> None:
    found = bootstrap_ratio(torch.tensor([1.0, 9.0]), torch.tensor([10.0, 10.0]))
    assert found.value == 0.5 and found.low == 0.1 and found.high == 0.9


def test_the_interval_has_its_nominal_coverage() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        sample = torch.randn(60, generator=generator) + 3
        found = bootstrap_ratio(sample, torch.ones(60))
        covered += found.low <= 3 <= found.high
    assert 175 <= covered <= 199  # 95 % of 200 is 190


def test_it_agrees_with_scipys_bootstrap_where_every_draw_is_defined() -> None:
    rng = np.random.default_rng(0)
    bottom = rng.gamma(4.0, size=80)
    top = bottom * rng.gamma(2.0, size=80)
    ratio = lambda x, y, axis: x.sum(axis) / y.sum(axis)  # noqa: E731
    theirs = scipy.stats.bootstrap(
        (top, bottom), ratio, paired=True, vectorized=True, method="percentile", n_resamples=20_000, random_state=0
    ).confidence_interval
    ours = bootstrap_ratio(torch.tensor(top), torch.tensor(bottom))
    width = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.06 * width and abs(ours.high - theirs.high) < 0.06 * width
    assert ours.undefined == 0


def test_pairing_by_document() -> None:
    generator = torch.Generator().manual_seed(0)
    x, n = torch.rand(100, generator=generator) * 100, torch.ones(100)
    found = bootstrap_ratio_of_ratios((1.1 * x, n), (x, n))
    assert abs(found.value - 1.1) < 1e-6 and found.high - found.low < 1e-6


def test_recovered() -> None:
    target, floor = torch.ones(50), torch.zeros(50)
    replacement = torch.tensor([1.0] * 40 + [0.0] * 10)
    found = bootstrap_recovered(replacement, floor, target)
    assert found.value == 0.8 and 0.6 < found.low < 0.8 < found.high < 0.95
    assert bootstrap_recovered(replacement, floor, target) == found


def test_undefined_draws_are_counted_and_widen_the_interval() -> None:
    """One document of eight holds the whole denominator; a draw lacks it with a probability of (7/8)^8."""
    top, bottom = torch.ones(8), torch.tensor([1.0] + [0.0] * 7)
    found = bootstrap_ratio(top, bottom)
    assert found.value == 8 and ends(found) == (None, None)
    assert found.undefined == pytest.approx((7 / 8) ** 8, abs=0.05) and "draws" in found.reason
    bottom[:4] = 1.0
    few = bootstrap_ratio(top, bottom)
    assert 0 < few.undefined == pytest.approx((1 / 2) ** 8, abs=0.006)
    drawn = torch.randint(8, (BOOTSTRAP_DRAWS, 8), generator=torch.Generator().manual_seed(0))
    ratios = (8 / bottom[drawn].sum(1).double()).sort().values.numpy()  # infinity where there is no value
    assert few.high == pytest.approx(np.quantile(ratios, 0.975, method="linear")), "beyond the upper end"
    assert few.low <= np.quantile(ratios[np.isfinite(ratios)], 0.025), "and beyond the lower one"


def test_a_denominator_that_changes_its_sign_gives_no_interval() -> None:
    """A model that gained two answers and lost one: the share recovered of that can be any number."""
    target = torch.tensor([1.0, 1.0, 0.0] + [1.0] * 20)
    hybrid = torch.tensor([0.0, 0.0, 1.0] + [1.0] * 20)
    found = bootstrap_recovered(hybrid, hybrid, target)
    assert found.value == 0 and ends(found) == (None, None) and 0.2 < found.undefined < 0.6
    equal = bootstrap_recovered(hybrid, target, target)
    assert equal.value is None and "denominator is 0" in equal.reason
    thirds = torch.tensor([1 / 3, 2 / 3, 1.0])
    assert bootstrap_recovered(thirds, thirds, thirds.flip(0)).value is None, "thirds cancel"


def test_one_document_has_no_interval() -> None:
    found = bootstrap_ratio(torch.tensor([3.0]), torch.tensor([4.0]))
    assert found.value == 0.75 and ends(found) == (None, None) and "two" in found.reason


def test_the_choice_of_sets_is_part_of_the_interval() -> None:
    """Eight sets of very different effect, a hundred documents: over documents alone it would be far too narrow."""
    generator = torch.Generator().manual_seed(0)
    ones, covered, narrow = torch.ones(100), 0, 0
    for seed in range(100):
        effects = torch.randn(8, 1, generator=generator) + torch.randn(8, 100, generator=generator) + 5
        found, alone = bootstrap_ratio(effects, ones, seed), bootstrap_ratio(effects.mean(0), ones, seed)
        assert found.value == pytest.approx(alone.value)
        covered += found.low <= 5 <= found.high
        narrow += alone.low <= 5 <= alone.high
    assert covered >= 85 and narrow < 40
    same = bootstrap_ratio(effects[:1].expand(4, -1), ones)
    once = bootstrap_ratio(effects[0], ones)
    assert (same.value, *ends(same)) == pytest.approx((once.value, *ends(once))), "sets that are one"


# -- changes ----------------------------------------------------------------------------------------------------------


def test_a_change_is_a_ratio_minus_one() -> None:
    generator = torch.Generator().manual_seed(0)
    (a, b), (c, d) = torch.rand(2, 2, 40, generator=generator)
    found, ratio = change_of_ratio((a, b), (c, d)), bootstrap_ratio_of_ratios((a, b), (c, d))
    assert (found.value, *ends(found)) == (ratio.value - 1, ratio.low - 1, ratio.high - 1)


def test_no_change_in_few_problems_has_a_wide_interval() -> None:
    counts, lengths = torch.tensor([1.0, 0, 2, 1, 0]), torch.full((5,), 20.0)
    same = change_of_ratio((counts.clone(), lengths.clone()), (counts, lengths))
    assert (same.value, *ends(same)) == (0, -unseen_share(5), unseen_share(5)) and unseen_share(5) > 0.5


def test_a_rate_that_falls_to_zero_has_an_upper_bound() -> None:
    counts, lengths = torch.tensor([2.0, 0, 2, 2, 0] * 20), torch.full((100,), 20.0)
    gone = change_of_ratio((torch.zeros(100), lengths), (counts, lengths))
    least = bootstrap_ratio(counts, lengths).low
    assert (gone.value, gone.low) == (-1, -1)
    assert gone.high == pytest.approx(-1 + 2 * -math.log(0.025) / 2000 / least), "two at a time, as before"
    rare = torch.zeros(100)
    rare[0] = 1.0
    unknown = change_of_ratio((torch.zeros(100), lengths), (rare, lengths))
    assert unknown.value == -1 and ends(unknown) == (None, None) and unknown.reason
    assert change_of_ratio((counts, lengths), (torch.zeros(100), lengths)).value is None


def test_the_same_numbers_give_the_same_interval() -> None:
    x = torch.rand(30, generator=torch.Generator().manual_seed(1))
    assert len({repr(bootstrap_ratio(x, torch.ones(30))) for _ in range(3)}) == 1
    assert (
        len({repr(bootstrap_ratio(x.expand(n, -1), torch.ones(30))) for n, _ in itertools.product([3], range(3))}) == 1
    )
