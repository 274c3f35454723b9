"""Bootstrap intervals: they cover, they are paired, they are the same every time."""

import torch

from tl_adapters.intervals import bootstrap_ratio, bootstrap_ratio_of_ratios, bootstrap_recovered


def test_a_ratio_of_sums_not_a_mean_of_ratios() -> None:
    value, low, high = bootstrap_ratio(torch.tensor([1.0, 9.0]), torch.tensor([10.0, 10.0]))
    assert value == 0.5 and low == 0.1 and high == 0.9


def test_the_interval_covers_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        sample = torch.randn(60, generator=generator) + 3
        _, low, high = bootstrap_ratio(sample, torch.ones(60))
        covered += low <= 3 <= high
    assert 175 <= covered <= 199  # 95 % of 200 is 190


def test_pairing_by_document() -> None:
    generator = torch.Generator().manual_seed(0)
    x, n = torch.rand(100, generator=generator) * 100, torch.ones(100)
    value, low, high = bootstrap_ratio_of_ratios((1.1 * x, n), (x, n))
    assert abs(value - 1.1) < 1e-6 and high - low < 1e-6


def test_recovered() -> None:
    target, floor = torch.ones(50), torch.zeros(50)
    replacement = torch.tensor([1.0] * 40 + [0.0] * 10)
    value, low, high = bootstrap_recovered(replacement, floor, target)
    assert value == 0.8 and 0.6 < low < 0.8 < high < 0.95
    assert bootstrap_recovered(replacement, floor, target) == (value, low, high)
