"""Bootstrap intervals: they cover, they are paired, they are the same every time."""

import torch

from tl_adapters.intervals import bootstrap_ratio, bootstrap_ratio_of_ratios, bootstrap_recovered


def test_a_ratio_of_sums_not_a_mean_of_ratios() -> None:
    found = bootstrap_ratio(torch.tensor([1.0, 9.0]), torch.tensor([10.0, 10.0]))
    assert found.value == 0.5 and found.low == 0.1 and found.high == 0.9


def test_the_interval_covers_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        sample = torch.randn(60, generator=generator) + 3
        found = bootstrap_ratio(sample, torch.ones(60))
        covered += found.low <= 3 <= found.high
    assert 175 <= covered <= 199  # 95 % of 200 is 190


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
