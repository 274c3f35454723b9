"""The share of each category among a store's features, estimated from the labels of some or all of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.autointerp.rule_labels import RULE_CATEGORIES
from tl_adapters.features.feature import Label
from tl_adapters.utils.bootstrap import bootstrap_strata
from tl_adapters.utils.measurement import Estimate, Measurement
from tl_adapters.utils.notebook import ResultRecord
from tl_adapters.utils.share_intervals import share, share_interval


@dataclass(frozen=True)
class CategoryShare(ResultRecord):
    """Number and share of the features of one category."""

    count: int
    """Number of labeled features of the category."""
    share: Measurement
    """Share of the labeled features, with a binomial interval."""
    weighted: Measurement
    """Share of all alive features: each layer's, weighted by its alive features, with a bootstrap within layers."""
    by_layer: dict[int, float]
    """Share of each layer's labeled features."""


def label_shares(
    labels: Mapping[FeatureId, Label],
    alive: Iterable[FeatureId],
    categories: Sequence[str] = RULE_CATEGORIES,
    *,
    split: str = "",
    seed: int = 0,
) -> dict[str, CategoryShare]:
    """The share of each category among alive features, from the labels of all or some of them.

    The intervals treat features as draws from those that another training would have found. A bootstrap over features
    none (or all) of which are of a category is certain of that share. In this case the weighted interval is a binomial
    one, for the effective number of features under unequal weights, (sum w)^2 / sum(w^2 / n) over layers of weight w
    with n labeled features. Layers without a labeled feature are left out, and labels of other categories do not count.

    Args:
        labels: labels of features.
        alive: all alive features.
        categories: the categories to count.
        split: name of the documents in the measurements.
        seed: seed of the bootstrap.

    Returns:
        The share of each category; empty where no label is of any.
    """
    alive = set(alive)
    n_alive = Counter(id.layer for id in alive)
    by_layer: dict[int, list[str]] = defaultdict(list)
    for id, label in labels.items():
        if id in alive and label.category in categories:
            by_layer[id.layer].append(label.category)
    in_order = {layer: by_layer[layer] for layer in sorted(by_layer)}
    return {category: _share(category, in_order, n_alive, split, seed) for category in categories if in_order}


def _share(
    category: str, by_layer: Mapping[int, Sequence[str]], n_alive: Mapping[int, int], split: str, seed: int
) -> CategoryShare:
    hits = {layer: torch.tensor([float(c == category) for c in given]) for layer, given in by_layer.items()}
    weights = [n_alive[layer] for layer in by_layer]
    count, n = sum(int(h.sum()) for h in hits.values()), sum(map(len, by_layer.values()))
    weighted = bootstrap_strata(list(hits.values()), weights, seed)
    if count in (0, n):
        n_effective = sum(weights) ** 2 / sum(w * w / len(h) for w, h in zip(weights, hits.values(), strict=True))
        value = float(count > 0)
        weighted = Estimate(value, *share_interval(value * n_effective, n_effective))
    return CategoryShare(
        count,
        share(count, n).measurement(n, "share of labelled features", split),
        weighted.measurement(n, "share of alive features", split),
        {layer: float(h.mean()) for layer, h in hits.items()},
    )
