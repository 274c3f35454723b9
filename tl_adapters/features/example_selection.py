"""Selects the firings that are kept as examples: the strongest of each feature, and a uniform random sample.

The candidates of a batch are the strongest firing of each feature in each document, and the firings with the largest
hashes. The activations around a firing, and the other features on its token, are looked up for candidates only, and a
threshold per feature keeps these few.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from tl_adapters.features.document_batches import TokenBatch
from tl_adapters.features.firing_reader import Firings
from tl_adapters.features.layer_statistics import RankedFirings, best_firings, concatenated, rank_within_feature
from tl_adapters.features.store_description import StoreDescription

_CANDIDATES_AT_ONCE = 20_000
"""Candidates whose co-activating features are looked up together, which bounds memory."""
_MIN_PENDING = 20_000
"""Candidates that are collected before they are sorted."""


class BestFirings:
    """Keeps the k best firings of each feature; candidates are collected until there are enough to be worth sorting.

    Args:
        k: firings kept of each feature.
        total_features: number of features of all layers.
        none: no firings, with the widths of the columns.
    """

    def __init__(self, k: int, total_features: int, none: RankedFirings) -> None:
        self._k, self._best, self._pending, self._n_pending = k, none, [none], 0
        self._threshold = torch.full((total_features,), -1, dtype=torch.long)

    def candidates(
        self, feature: Int[Tensor, "n"], key: Int[Tensor, "n"], eligible: Tensor | None = None
    ) -> Int[Tensor, "m"]:
        """Indices of the (eligible) firings that may be among the best: at most k of each feature."""
        above = key >= self._threshold[feature]
        candidates = (above if eligible is None else above & eligible).nonzero()[:, 0]
        order, rank = rank_within_feature(feature[candidates], key[candidates])
        return candidates[order[rank < self._k]]

    def add(self, candidates: RankedFirings) -> None:
        """Add firings that `candidates` selected."""
        self._pending.append(candidates)
        self._n_pending += len(candidates.feature)
        if self._n_pending > max(_MIN_PENDING, len(self._best.feature) // 4):
            self.result()

    def result(self) -> RankedFirings:
        """The best of all firings that were added."""
        if self._n_pending:
            self._best = best_firings(concatenated([self._best, *self._pending]), self._k)
            self._pending, self._n_pending = [], 0
            _, rank = rank_within_feature(self._best.feature, self._best.key)
            last = rank == self._k - 1
            self._threshold[self._best.feature[last].long()] = self._best.key[last]
        return self._best


@dataclass(frozen=True)
class BatchFirings:
    """The firings of a batch, with a lookup of the activations around each and of the other features on its token."""

    batch: TokenBatch
    description: StoreDescription
    firings: Firings
    """Sorted by feature and then token."""
    row: Int[Tensor, "n"]
    """Row of each firing in the batch."""
    position: Int[Tensor, "n"]
    """Position of each firing in its document."""

    def ranked(self, chosen: Int[Tensor, "m"], key: Int[Tensor, "m"], n_coactivating: int) -> RankedFirings:
        """The chosen firings with their windows and co-activating features.

        Args:
            chosen: indices of firings.
            key: the sort key of each.
            n_coactivating: other features to record with each.
        """
        return RankedFirings(
            self.firings.feature[chosen].int(),
            key,
            self.firings.value[chosen],
            self.batch.document[self.row[chosen]].int(),
            self.position[chosen].int(),
            self._windows(chosen),
            self._coactivating(chosen, n_coactivating),
        )

    def _windows(self, chosen: Tensor) -> Tensor:
        """[n, width]: the same feature's activations around each chosen firing.

        The firings are sorted by feature and token, so those of a window lie next to the chosen one: at most as many
        entries away as there are tokens between.
        """
        token, feature, value = self.firings
        before, after = self.description.options.before, self.description.options.after
        width, n = before + 1 + after, len(token)
        entry = chosen[:, None] + torch.arange(-before, after + 1)
        exists = (entry >= 0) & (entry < n)
        entry = entry.clamp(0, max(0, n - 1))
        column = token[entry] - token[chosen, None] + before
        same = (feature[entry] == feature[chosen, None]) & (self.row[entry] == self.row[chosen, None])
        column = torch.where(exists & same & (column >= 0) & (column < width), column, width)
        windows = torch.zeros(len(chosen), width + 1).scatter_(1, column, value[entry])
        return windows[:, :width].clamp(max=torch.finfo(torch.float16).max).half()

    def _coactivating(self, chosen: Tensor, n_others: int) -> Tensor:
        """[n, n_others]: the strongest other features on the same token, -1 where there are fewer."""
        if not n_others or not len(chosen):
            return torch.full((len(chosen), n_others), -1, dtype=torch.int32)
        token = self.firings.token
        has_chosen = torch.zeros(self.batch.tokens.numel(), dtype=torch.bool).index_fill_(0, token[chosen], True)
        on_tokens = has_chosen[token].nonzero()[:, 0]
        on_tokens = on_tokens[token[on_tokens].argsort(stable=True)]
        return torch.cat(
            [self._strongest_others(some, on_tokens, n_others) for some in chosen.split(_CANDIDATES_AT_ONCE)]
        )

    def _strongest_others(self, chosen: Tensor, on_tokens: Tensor, n_others: int) -> Tensor:
        """`_coactivating` of some firings; ``on_tokens`` are the firings on all of their tokens, sorted by token."""
        chosen_token, sorted_token = self.firings.token[chosen], self.firings.token[on_tokens]
        start = torch.searchsorted(sorted_token, chosen_token)
        stop = torch.searchsorted(sorted_token, chosen_token, right=True)
        entry = start[:, None] + torch.arange(int((stop - start).max()))
        firing = on_tokens[entry.clamp(max=len(on_tokens) - 1)]
        is_other = (entry < stop[:, None]) & (firing != chosen[:, None])
        size = torch.where(is_other, self.firings.value[firing], 0.0)
        strongest = size.topk(min(n_others, size.shape[1]))
        others = torch.where(strongest.values > 0, self.firings.feature[firing.gather(1, strongest.indices)], -1)
        return torch.nn.functional.pad(others, (0, n_others - others.shape[1]), value=-1).int()


def is_best_of_group(group: Int[Tensor, "n"], key: Int[Tensor, "n"]) -> Tensor:
    """True at the entries that have the largest key of their group."""
    best_key = torch.full_like(key, -1).scatter_reduce_(0, group, key, "amax")
    return key == best_key[group]


def mixed_bits(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """A bijection of 64-bit integers that scrambles their bits (the finalizer of SplitMix64)."""
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
