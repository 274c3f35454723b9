"""Running counts of firings by feature, trace region, decile of the thinking, domain and size, with their examples."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_adapters.data.trace_regions import TRACE_REGIONS
from tl_adapters.features.document_batches import TokenBatch
from tl_adapters.features.example_selection import BatchFirings, BestFirings, is_best_of_group, mixed_bits
from tl_adapters.features.firing_reader import Firings
from tl_adapters.features.layer_statistics import (
    N_BUCKETS,
    N_DECILES,
    SUMMED_TENSORS,
    LayerStatistics,
    RankedFirings,
    group_starts,
    histogram_bucket,
)
from tl_adapters.features.store_description import StoreDescription


class FiringCounts:
    """Running statistics of the features of all layers, which are numbered through all layers.

    Args:
        description: the features, and how many examples are kept.
        n_domains: number of domains of the documents.
    """

    def __init__(self, description: StoreDescription, n_domains: int) -> None:
        self.description, options = description, description.options
        n, long = description.total_features, torch.long
        self.firings, self.summed_activation = torch.zeros(n, dtype=long), torch.zeros(n, dtype=torch.float64)
        self.region_firings, self.decile_firings, self.domain_firings, self.histogram = (
            torch.zeros(n, width, dtype=long) for width in (len(TRACE_REGIONS), N_DECILES, n_domains, N_BUCKETS)
        )
        self.region_tokens, self.decile_tokens, self.domain_tokens = (
            torch.zeros(width, dtype=long) for width in (len(TRACE_REGIONS), N_DECILES, n_domains)
        )
        width = options.before + 1 + options.after
        self._top = BestFirings(options.examples, n, RankedFirings.none(width, 0))
        self._sample = BestFirings(options.sample, n, RankedFirings.none(width, options.coactivating))
        self._seed_bits = mixed_bits(torch.tensor(options.seed))

    def add(self, batch: TokenBatch, firings: Firings) -> None:
        """Add the firings on a batch, sorted by feature and then token."""
        token, feature, value = firings
        row, position = token // batch.tokens.shape[1], token % batch.tokens.shape[1]
        _tally(self.firings, feature)
        self.summed_activation.index_add_(0, feature, value.double())
        _tally(self.region_firings, feature, batch.region[token])
        _tally(self.domain_firings, feature, batch.domain[row])
        _tally(self.histogram, feature, histogram_bucket(value))
        decile = batch.decile[token]
        in_thinking = decile >= 0
        _tally(self.decile_firings, feature[in_thinking], decile[in_thinking])
        _tally(self.region_tokens, batch.region[batch.region >= 0])
        _tally(self.decile_tokens, batch.decile[batch.decile >= 0])
        self.domain_tokens.index_add_(0, batch.domain, batch.length)
        self._select_examples(BatchFirings(batch, self.description, firings, row, position))

    def _select_examples(self, in_batch: BatchFirings) -> None:
        """Keep the strongest firings and those with the largest hash, which are a uniform sample.

        The hash depends on seed, document, position and feature alone, so the sample is the same whatever the order of
        the documents.
        """
        _, feature, value = in_batch.firings
        number = in_batch.position * self.description.total_features + feature
        random_bits = mixed_bits(in_batch.batch.identity[in_batch.row] ^ mixed_bits(number ^ self._seed_bits))
        # The bits of positive floats are ordered as the floats are. Between equal activations the hash decides.
        strength = (value.view(torch.int32).long() << 32) | ((random_bits >> 32) & 0xFFFFFFFF)
        strongest_of_document = is_best_of_group(group_starts(feature, in_batch.row), strength)
        chosen = self._top.candidates(feature, strength, strongest_of_document)
        self._top.add(in_batch.ranked(chosen, strength[chosen], n_coactivating=0))
        random_key = (random_bits >> 1) & 0x7FFFFFFFFFFFFFFF
        chosen = self._sample.candidates(feature, random_key)
        n_coactivating = self.description.options.coactivating
        self._sample.add(in_batch.ranked(chosen, random_key[chosen], n_coactivating))

    def layers(self) -> dict[int, LayerStatistics]:
        """The statistics of each layer."""
        n = self.description.n_features
        rankings = {"top": self._top.result(), "sample": self._sample.result()}
        statistics = {}
        for number, layer in enumerate(self.description.layers):
            first, stop = number * n, (number + 1) * n
            columns: dict[str, Any] = {name: getattr(self, name)[first:stop] for name in SUMMED_TENSORS}
            for name, ranking in rankings.items():
                of_layer = ranking.between(first, stop)
                columns[name] = of_layer._replace(feature=of_layer.feature - first)
            statistics[layer] = LayerStatistics(**columns)
        return statistics


def _tally(counts: Tensor, index: Int[Tensor, "n"], column: Int[Tensor, "n"] | None = None) -> None:
    """Count occurrences of ``index``, or of pairs (index, column)."""
    flat = index if column is None else index * counts.shape[1] + column
    counts.view(-1).index_add_(0, flat, torch.ones_like(flat))
