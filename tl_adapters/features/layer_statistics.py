"""The statistics of one layer's features, as tensors: counts, sums, histograms and ranked firings.

Each statistic either adds up over documents (counts, sums, histograms) or keeps the k best firings of each feature by a
key that depends on the firing alone: the activation for the top examples, and a hash of seed, document, position and
feature for the random ones (the k largest of uniform draws are a uniform sample). So the statistics of several sets of
documents merge, in any order, into those of one pass over all documents (`store_parts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_adapters.checkpoints.tensor_fields import TensorField, floats, whole_numbers

N_DECILES = 10
"""The thinking of each trace is divided into this many equal stretches."""
N_BUCKETS, BUCKETS_PER_OCTAVE, LOWEST_OCTAVE = 96, 4, -10
"""The histogram of activations has buckets of a quarter octave, from 2^-10 to 2^14; activations beyond are counted in
the outermost buckets."""


def histogram_bucket(values: Float[Tensor, "n"]) -> Int[Tensor, "n"]:
    """The histogram bucket of each (positive) activation."""
    octave = torch.log2(values.double()) - LOWEST_OCTAVE
    return (octave * BUCKETS_PER_OCTAVE).floor().long().clamp(0, N_BUCKETS - 1)


def histogram_edges() -> Float[Tensor, "edges"]:
    """The edges of the histogram's buckets, one more than there are buckets."""
    return torch.exp2(torch.arange(N_BUCKETS + 1, dtype=torch.float64) / BUCKETS_PER_OCTAVE + LOWEST_OCTAVE)


class RankedFirings(NamedTuple):
    """At most k firings of every feature, sorted by feature and then by falling key."""

    feature: Int[Tensor, "n"]
    """Index of the feature in its layer; during collection, its number counted through all layers."""
    key: Int[Tensor, "n"]
    """Sort key: the best firings have the largest."""
    value: Float[Tensor, "n"]
    """Activation in decoder-norm units."""
    document: Int[Tensor, "n"]
    """Number of the document in the part."""
    position: Int[Tensor, "n"]
    """Position in the document."""
    window: Float[Tensor, "n width"]
    """Activations of the same feature on the tokens around the firing (float16)."""
    coactivating: Int[Tensor, "n others"]
    """The strongest other features on the same token, of all layers (layer x features + index); -1 fills up."""

    @classmethod
    def none(cls, width: int, others: int) -> RankedFirings:
        """No firings, with windows of ``width`` tokens and ``others`` co-activating features."""
        empty = lambda dtype, *shape: torch.zeros(0, *shape, dtype=dtype)  # noqa: E731
        int32, long = torch.int32, torch.int64
        return cls(
            empty(int32), empty(long), empty(torch.float32), empty(int32), empty(int32),
            empty(torch.float16, width), empty(int32, others),
        )  # fmt: skip

    def of_feature(self, index: int) -> RankedFirings:
        """The firings of one feature."""
        return self.between(index, index + 1)

    def between(self, first: int, stop: int) -> RankedFirings:
        """The firings of the features from ``first`` to before ``stop``."""
        bounds = torch.tensor([first, stop], dtype=self.feature.dtype)
        start, end = torch.searchsorted(self.feature, bounds)
        return RankedFirings(*(column[start:end] for column in self))


def concatenated(parts: Sequence[RankedFirings]) -> RankedFirings:
    """All firings of several sets, unsorted."""
    return RankedFirings(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def rank_within_feature(feature: Int[Tensor, "n"], key: Int[Tensor, "n"]) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"]]:
    """The order by feature and then by falling key, and the rank of each entry of that order within its feature."""
    order = key.argsort(descending=True, stable=True)
    order = order[feature[order].argsort(stable=True)]
    return order, torch.arange(len(order)) - group_starts(feature[order])


def group_starts(*sorted_by: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    """For entries that are sorted into groups of equal values, the index at which each entry's group starts."""
    n = len(sorted_by[0])
    begins = torch.zeros(n, dtype=torch.bool)
    for column in sorted_by:
        begins[1:] |= column[1:] != column[:-1]
    return torch.where(begins, torch.arange(n), 0).cummax(0).values


def best_firings(firings: RankedFirings, k: int) -> RankedFirings:
    """The k best firings of each feature, sorted."""
    order, rank = rank_within_feature(firings.feature, firings.key)
    return RankedFirings(*(column[order[rank < k]] for column in firings))


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of the features of one layer. Activations are in decoder-norm units."""

    firings: Int[Tensor, "n"]
    """Tokens on which each feature fires."""
    summed_activation: Float[Tensor, "n"]
    """Sum of each feature's activations (float64)."""
    region_firings: Int[Tensor, "n regions"]
    """Firings by region of the trace (`data.trace_regions.TRACE_REGIONS`)."""
    decile_firings: Int[Tensor, "n deciles"]
    """Firings by decile of the thinking."""
    domain_firings: Int[Tensor, "n domains"]
    """Firings by domain of the document."""
    histogram: Int[Tensor, "n buckets"]
    """Firings by bucket of the activation."""
    top: RankedFirings
    """The strongest firings of each feature, at most one per document."""
    sample: RankedFirings
    """A uniform random sample of each feature's firings."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by their names in a store's files."""
        sums = {name: getattr(self, attribute) for attribute, name in SUMMED_TENSORS.items()}
        ranked = {
            f"{ranking}.{_COLUMN_NAMES.get(column, column)}": tensor
            for ranking in RANKINGS
            for column, tensor in getattr(self, ranking)._asdict().items()
        }
        return {name: tensor.contiguous() for name, tensor in (sums | ranked).items()}

    @classmethod
    def fields(cls, regions: int, domains: int, documents: int) -> dict[str, TensorField]:
        """The tensors of a store's files, by their names there, for so many regions, domains and documents."""
        summed = {
            "firings": whole_numbers("features"),
            "summed_activation": floats("features"),
            "region_firings": whole_numbers("features", regions),
            "decile_firings": whole_numbers("features", N_DECILES),
            "domain_firings": whole_numbers("features", domains),
            "histogram": whole_numbers("features", N_BUCKETS),
        }
        ranked = {
            "feature": lambda n: whole_numbers(n, below="features"),
            "key": lambda n: whole_numbers(n, lowest=None),
            "value": floats,
            "document": lambda n: whole_numbers(n, below=documents),
            "position": whole_numbers,
            "window": lambda n: floats(n, "width", finite=False),  # half precision ends at 65,504
            "coactivating": lambda n: whole_numbers(n, f"{n} others", lowest=-1),
        }
        return {SUMMED_TENSORS[name]: field for name, field in summed.items()} | {
            f"{ranking}.{_COLUMN_NAMES.get(column, column)}": field(ranking)
            for ranking in RANKINGS
            for column, field in ranked.items()
        }

    def contradiction(self, document_lengths: Int[Tensor, "documents"]) -> str | None:
        """What in the statistics cannot be: counts that do not add up, or examples in no order or in no document."""
        for name in ("region_firings", "domain_firings", "histogram"):
            if not torch.equal(getattr(self, name).sum(1), self.firings.long()):
                return f"{SUMMED_TENSORS[name]} does not add up to the counts of firings"
        for name in RANKINGS:
            ranked: RankedFirings = getattr(self, name)
            if bool((ranked.feature.diff() < 0).any()):
                return f"{name}.feature is not sorted"
            if bool((ranked.position >= document_lengths[ranked.document.long()]).any()):
                return f"{name}.position is beyond the end of its document"
        return None

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LayerStatistics:
        """The inverse of `tensors`."""
        attributes: dict[str, Any] = {attribute: tensors[name] for attribute, name in SUMMED_TENSORS.items()}
        for ranking in RANKINGS:
            names = (_COLUMN_NAMES.get(column, column) for column in RankedFirings._fields)
            attributes[ranking] = RankedFirings(*(tensors[f"{ranking}.{name}"] for name in names))
        return cls(**attributes)


SUMMED_TENSORS = {
    "firings": "count",
    "summed_activation": "total",
    "region_firings": "region",
    "decile_firings": "tenth",
    "domain_firings": "domain",
    "histogram": "histogram",
}
"""Attributes of `LayerStatistics` that add up over documents, and their names in a store's files."""
RANKINGS = ("top", "sample")
"""Attributes of `LayerStatistics` that keep the best firings by a key."""
_COLUMN_NAMES = {"coactivating": "beside"}
"""Columns of `RankedFirings` that have another name in a store's files."""
