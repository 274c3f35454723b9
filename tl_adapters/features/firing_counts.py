"""What is counted of a batch's firings: how often, where, how strongly; and which of them are kept as examples.

The strongest firing of each feature in each document, and those whose hash is among the largest (a uniform sample), are
candidates for examples. Only candidates have their surroundings looked up; a feature's threshold keeps them few.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_adapters.data.chat_format import TRACE_REGIONS
from tl_adapters.features.layer_statistics import (
    BUCKETS,
    DECILES,
    SUMS,
    Examples,
    LayerStatistics,
    best,
    bucket,
    group_starts,
    joined,
    rank_within,
)
from tl_adapters.features.store_files import StoreDescription

AT_ONCE = 20_000
"""Candidates whose neighbours are looked up together."""


@dataclass(frozen=True)
class TokenBatch:
    """Documents padded on the right, and what is known of each of their tokens; flat tensors are [batch * pos]."""

    tokens: Int[Tensor, "batch pos"]
    document: Tensor  # [batch]: number in the part
    length: Tensor  # [batch]
    identity: Tensor  # [batch]: hash of each document's tokens
    domain: Tensor  # [batch]
    region: Tensor  # flat; -1 at padding
    tenth: Tensor  # flat; -1 outside the thinking


class Counts:
    """Running statistics of all layers at once: the features of a layer follow those of the one before."""

    def __init__(self, description: StoreDescription, n_domains: int) -> None:
        self.description, options = description, description.options
        n, long = description.n_flat, torch.long
        self.count, self.total = torch.zeros(n, dtype=long), torch.zeros(n, dtype=torch.float64)
        self.region, self.tenth, self.domain, self.histogram = (
            torch.zeros(n, width, dtype=long) for width in (len(TRACE_REGIONS), DECILES, n_domains, BUCKETS)
        )
        self.region_tokens, self.tenth_tokens, self.domain_tokens = (
            torch.zeros(width, dtype=long) for width in (len(TRACE_REGIONS), DECILES, n_domains)
        )
        width = options.before + 1 + options.after
        self.top = _Best(options.examples, n, Examples.none(width, 0))
        self.sample = _Best(options.sample, n, Examples.none(width, options.neighbours))
        self.seed = _mixed(torch.tensor(options.seed))

    def add(self, batch: TokenBatch, token: Tensor, feature: Tensor, value: Tensor) -> None:
        """One batch's firings, sorted by feature and then token."""
        row, position = token // batch.tokens.shape[1], token % batch.tokens.shape[1]
        _tally(self.count, feature)
        self.total.index_add_(0, feature, value.double())
        _tally(self.region, feature, batch.region[token])
        _tally(self.domain, feature, batch.domain[row])
        _tally(self.histogram, feature, bucket(value))
        tenth = batch.tenth[token]
        thinking = tenth >= 0
        _tally(self.tenth, feature[thinking], tenth[thinking])
        _tally(self.region_tokens, batch.region[batch.region >= 0])
        _tally(self.tenth_tokens, batch.tenth[batch.tenth >= 0])
        self.domain_tokens.index_add_(0, batch.domain, batch.length)

        drawn = _mixed(batch.identity[row] ^ _mixed(position * self.description.n_flat + feature ^ self.seed))
        # A positive float's bits are ordered as it is; between equals the hash decides, not the order of documents.
        size = (value.view(torch.int32).long() << 32) | ((drawn >> 32) & 0xFFFFFFFF)
        fired = _Firings(batch, self.description, token, feature, value, row, position)
        of_document = _is_best(group_starts(feature, row), size)
        wanted = self.top.wanted(feature, size, of_document)
        self.top.add(fired.examples(wanted, size[wanted], others=0))
        drawn = (drawn >> 1) & 0x7FFFFFFFFFFFFFFF
        wanted = self.sample.wanted(feature, drawn)
        self.sample.add(fired.examples(wanted, drawn[wanted], others=self.description.options.neighbours))

    def layers(self) -> dict[int, LayerStatistics]:
        """The statistics, layer by layer."""
        n = self.description.n_features
        ranked = {"top": self.top.result(), "sample": self.sample.result()}
        found = {}
        for place, layer in enumerate(self.description.layers):
            here = slice(place * n, (place + 1) * n)
            mine: dict[str, Any] = {name: getattr(self, name)[here] for name in SUMS}
            for which, examples in ranked.items():
                start, stop = torch.searchsorted(examples.feature, torch.tensor([here.start, here.stop]))
                columns = [column[start:stop] for column in examples]
                mine[which] = Examples(columns[0] - here.start, *columns[1:])
            found[layer] = LayerStatistics(**mine)
        return found


class _Best:
    """The k best firings of each feature so far. Candidates wait until there are enough of them to be worth sorting."""

    def __init__(self, k: int, n_flat: int, none: Examples) -> None:
        self.k, self.kept, self.waiting, self.n_waiting = k, none, [none], 0
        self.threshold = torch.full((n_flat,), -1, dtype=torch.long)

    def wanted(self, feature: Tensor, key: Tensor, among: Tensor | None = None) -> Tensor:
        """Indices of the firings (``among`` those marked) that may be among the best: at most k of each feature."""
        above = key >= self.threshold[feature]
        candidates = (above if among is None else above & among).nonzero()[:, 0]
        order, rank = rank_within(feature[candidates], key[candidates])
        return candidates[order[rank < self.k]]

    def add(self, candidates: Examples) -> None:
        """Firings that `wanted` chose."""
        self.waiting.append(candidates)
        self.n_waiting += len(candidates.feature)
        if self.n_waiting > max(20_000, len(self.kept.feature) // 4):
            self.result()

    def result(self) -> Examples:
        """The best of all."""
        if self.n_waiting:
            self.kept = best(joined([self.kept, *self.waiting]), self.k)
            self.waiting, self.n_waiting = [], 0
            _, rank = rank_within(self.kept.feature, self.kept.key)
            last = rank == self.k - 1
            self.threshold[self.kept.feature[last].long()] = self.kept.key[last]
        return self.kept


@dataclass(frozen=True)
class _Firings:
    """A batch's firings, sorted by feature and then token, and how to look around in them."""

    batch: TokenBatch
    description: StoreDescription
    token: Tensor
    feature: Tensor
    value: Tensor
    row: Tensor
    position: Tensor

    def examples(self, chosen: Tensor, key: Tensor, others: int) -> Examples:
        """The chosen firings with their surroundings."""
        return Examples(
            self.feature[chosen].int(),
            key,
            self.value[chosen],
            self.batch.document[self.row[chosen]].int(),
            self.position[chosen].int(),
            self._window(chosen),
            self._beside(chosen, others),
        )

    def _window(self, chosen: Tensor) -> Tensor:
        """[n, width]: the same feature's activations around each chosen firing.

        In this order they stand next to it: as many places away as there are tokens between, at most.
        """
        before, after = self.description.options.before, self.description.options.after
        width, n = before + 1 + after, len(self.token)
        place = chosen[:, None] + torch.arange(-before, after + 1)
        inside = (place >= 0) & (place < n)
        place = place.clamp(0, max(0, n - 1))
        column = self.token[place] - self.token[chosen, None] + before
        same = (self.feature[place] == self.feature[chosen, None]) & (self.row[place] == self.row[chosen, None])
        column = torch.where(inside & same & (column >= 0) & (column < width), column, width)
        windows = torch.zeros(len(chosen), width + 1).scatter_(1, column, self.value[place])
        return windows[:, :width].clamp(max=torch.finfo(torch.float16).max).half()

    def _beside(self, chosen: Tensor, others: int) -> Tensor:
        """[n, others]: the strongest other features on the same token, -1 where there are fewer."""
        if not others or not len(chosen):
            return torch.full((len(chosen), others), -1, dtype=torch.int32)
        looked_at = torch.zeros(self.batch.tokens.numel(), dtype=torch.bool)
        near = looked_at.index_fill_(0, self.token[chosen], True)[self.token].nonzero()[:, 0]
        near = near[self.token[near].argsort(stable=True)]
        return torch.cat([self._strongest(part, near, others) for part in chosen.split(AT_ONCE)])

    def _strongest(self, chosen: Tensor, near: Tensor, others: int) -> Tensor:
        """`_beside` of some; ``near`` holds the firings on all of their tokens, by token."""
        here, tokens = self.token[chosen], self.token[near]
        start, stop = torch.searchsorted(tokens, here), torch.searchsorted(tokens, here, right=True)
        place = start[:, None] + torch.arange(int((stop - start).max()))
        firing = near[place.clamp(max=len(near) - 1)]
        another = (place < stop[:, None]) & (firing != chosen[:, None])
        size = torch.where(another, self.value[firing], 0.0)
        strongest = size.topk(min(others, size.shape[1]))
        found = torch.where(strongest.values > 0, self.feature[firing.gather(1, strongest.indices)], -1)
        return torch.nn.functional.pad(found, (0, others - found.shape[1]), value=-1).int()


def _is_best(group: Tensor, key: Tensor) -> Tensor:
    """True at the entry of each group that has the largest key."""
    best_key = torch.full_like(key, -1).scatter_reduce_(0, group, key, "amax")
    return key == best_key[group]


def _tally(counts: Tensor, index: Tensor, column: Tensor | None = None) -> None:
    """Count occurrences of ``index``, or of pairs (index, column)."""
    flat = index if column is None else index * counts.shape[1] + column
    counts.view(-1).index_add_(0, flat, torch.ones_like(flat))


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 64 bit integers that scrambles all of them (the finaliser of SplitMix64)."""
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
