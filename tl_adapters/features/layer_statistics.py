"""Statistics of features over some documents, and how those of several sets of documents become one.

Everything in a part either adds up (counts, sums, histograms) or is the k best of each feature by a key that depends
on the firing alone: the activation, for the strongest examples, and a hash of seed, document, position and feature,
for the random ones (the k smallest of uniform draws are a uniform sample). So parts merge in any order, from any
number of processes, to what one pass over all documents would have given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tl_adapters.features.feature import FeatureStoreError
from tl_adapters.utils.files import new_folder
from tl_adapters.utils.strict_json import dumps

DECILES = 10
BUCKETS, BUCKETS_PER_OCTAVE, LOWEST_OCTAVE = 96, 4, -10
"""Histogram of activations: quarter octaves from 2^-10 to 2^14; what lies beyond counts in the outermost."""
PART_FILE, DOCUMENTS_FILE = "part.json", "documents.safetensors"


def bucket(values: Float[Tensor, "n"]) -> Int[Tensor, "n"]:
    """Bucket of each (positive) activation."""
    octave = torch.log2(values.double()) - LOWEST_OCTAVE
    return (octave * BUCKETS_PER_OCTAVE).floor().long().clamp(0, BUCKETS - 1)


def bucket_edges() -> Float[Tensor, "edges"]:
    """Edges of the buckets, one more than there are."""
    return torch.exp2(torch.arange(BUCKETS + 1, dtype=torch.float64) / BUCKETS_PER_OCTAVE + LOWEST_OCTAVE)


class Examples(NamedTuple):
    """At most k firings of every feature, sorted by feature and then by key, the best first."""

    feature: Int[Tensor, "n"]
    """Index of the feature in its layer (while collecting: among all layers')."""
    key: Int[Tensor, "n"]
    """What the best have most of."""
    value: Float[Tensor, "n"]
    """Activation in decoder-norm units."""
    document: Int[Tensor, "n"]
    """Number of the document in the part."""
    position: Int[Tensor, "n"]
    """In the document."""
    window: Float[Tensor, "n width"]
    """Activations around it (float16)."""
    beside: Int[Tensor, "n others"]
    """The strongest others that fire there, of all layers (layer x features + index); -1 where there are fewer."""

    @classmethod
    def none(cls, width: int, others: int) -> Examples:
        """No firings."""
        empty = lambda dtype, *shape: torch.zeros(0, *shape, dtype=dtype)  # noqa: E731
        int32, long = torch.int32, torch.int64
        return cls(
            empty(int32), empty(long), empty(torch.float32), empty(int32), empty(int32),
            empty(torch.float16, width), empty(int32, others),
        )  # fmt: skip


def joined(parts: Sequence[Examples]) -> Examples:
    """All of them, unsorted."""
    return Examples(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def rank_within(feature: Int[Tensor, "n"], key: Int[Tensor, "n"]) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"]]:
    """The order by feature and then by falling key, and each one's rank within its feature in that order."""
    order = key.argsort(descending=True, stable=True)
    order = order[feature[order].argsort(stable=True)]
    return order, torch.arange(len(order)) - group_starts(feature[order])


def group_starts(*sorted_by: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    """Of entries that stand in groups of equal values, where each one's group begins."""
    n = len(sorted_by[0])
    begins = torch.zeros(n, dtype=torch.bool)
    for column in sorted_by:
        begins[1:] |= column[1:] != column[:-1]
    return torch.where(begins, torch.arange(n), 0).cummax(0).values


def best(examples: Examples, k: int) -> Examples:
    """The k best of each feature, sorted."""
    order, rank = rank_within(examples.feature, examples.key)
    return Examples(*(column[order[rank < k]] for column in examples))


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of the features of one layer. Activations are in decoder-norm units."""

    count: Int[Tensor, "n"]
    """Tokens on which each fires."""
    total: Float[Tensor, "n"]
    """Sum of its activations (float64)."""
    region: Int[Tensor, "n regions"]
    """Firings by region of the trace (chat.TRACE_REGIONS)."""
    tenth: Int[Tensor, "n tenths"]
    """Firings by tenth of the thinking."""
    domain: Int[Tensor, "n domains"]
    """Firings by domain of the document."""
    histogram: Int[Tensor, "n buckets"]
    """Firings by bucket of the activation."""
    top: Examples
    """Its strongest firings, one for each document at most."""
    sample: Examples
    """A uniform random sample of its firings."""

    def tensors(self) -> dict[str, Tensor]:
        """By name, as they are written."""
        plain = {name: getattr(self, name) for name in SUMS}
        ranked = {f"{which}.{k}": v for which in RANKED for k, v in getattr(self, which)._asdict().items()}
        return {name: tensor.contiguous() for name, tensor in (plain | ranked).items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> LayerStatistics:
        """The inverse of `tensors`."""
        found: dict[str, Any] = {name: tensors[name] for name in SUMS}
        for which in RANKED:
            found[which] = Examples(*(tensors[f"{which}.{name}"] for name in Examples._fields))
        return cls(**found)


SUMS = ("count", "total", "region", "tenth", "domain", "histogram")
RANKED = ("top", "sample")


@dataclass(frozen=True)
class Documents:
    """The documents that examples are windows of."""

    tokens: Int[Tensor, "total"]
    """Of all documents, one after another."""
    region: Int[Tensor, "total"]
    """Region of each."""
    start: Int[Tensor, "documents_and_end"]
    """Where each document begins, and where the last one ends."""
    identity: Int[Tensor, "documents"]
    """Hash of each document: by it one is known again, and never counted twice."""

    def __len__(self) -> int:
        return len(self.start) - 1


@dataclass(frozen=True)
class PartTotals:
    """What a part's counts are shares of."""

    covers: list[str]
    """Hashes of the sets of documents in it."""
    documents: int
    """How many."""
    region: list[int]
    """Tokens by region of the trace."""
    tenth: list[int]
    """Tokens by tenth of the thinking."""
    domains: list[str]
    """Names of the domains."""
    domain: list[int]
    """Tokens by domain."""

    @property
    def tokens(self) -> int:
        """All tokens."""
        return sum(self.region)


class Part:
    """Statistics over some documents, in memory or in a folder that is read a layer at a time."""

    def __init__(
        self,
        totals: PartTotals,
        documents: Documents | None,
        layers: Mapping[int, LayerStatistics],
        folder: Path | None,
    ) -> None:
        self.totals, self.folder = totals, folder
        self._documents, self._layers = documents, layers

    @classmethod
    def open(cls, folder: Path) -> Part:
        """Read what `write_part` wrote. Raises FeatureStoreError."""
        try:
            totals = PartTotals(**json.loads((folder / PART_FILE).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise FeatureStoreError(f"{folder} is no part of a feature store ({error}); collect it again.") from error
        return cls(totals, None, {}, folder)

    @property
    def documents(self) -> Documents:
        """The documents."""
        if self._documents is None:
            self._documents = Documents(**self._read(DOCUMENTS_FILE))
        return self._documents

    def layer(self, layer: int) -> LayerStatistics:
        """Statistics of one layer."""
        return self._layers[layer] if layer in self._layers else LayerStatistics.of(self._read(layer_file(layer)))

    def _read(self, file: str) -> dict[str, Tensor]:
        assert self.folder is not None
        try:
            with safe_open(self.folder / file, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors and the system raise in several classes
            raise FeatureStoreError(
                f"{self.folder / file} is missing or damaged ({error}); collect it again."
            ) from error


def layer_file(layer: int) -> str:
    """Name of a layer's file."""
    return f"layer_{layer}.safetensors"


def write_part(folder: Path, part: Part, layers: Sequence[int]) -> Part:
    """Write a part whole, a layer at a time, and open it. Raises DiskFullError, FolderExistsError."""
    with new_folder(folder) as out:
        for layer in layers:
            save_file(part.layer(layer).tensors(), out / layer_file(layer))
        save_file({name: tensor.contiguous() for name, tensor in vars(part.documents).items()}, out / DOCUMENTS_FILE)
        (out / PART_FILE).write_text(dumps(asdict(part.totals)))
    return Part.open(folder)


class MergedPart(Part):
    """Several parts as one; layers are merged when they are asked for.

    Args:
        parts: with different documents.
        k: examples kept of each feature, by kind ("top", "sample").
    """

    def __init__(self, parts: Sequence[Part], k: Mapping[str, int]) -> None:
        self._parts, self._k = parts, k
        every = [part.totals for part in parts]
        names = sorted({name for totals in every for name in totals.domains})
        self._places = [torch.tensor([names.index(d) for d in t.domains], dtype=torch.long) for t in every]
        domain = torch.zeros(len(names), dtype=torch.long)
        for totals, places in zip(every, self._places, strict=True):
            domain.index_add_(0, places, torch.tensor(totals.domain, dtype=torch.long))
        add = lambda counts: torch.tensor(counts).sum(0).tolist()  # noqa: E731
        covers = sorted(hash_ for totals in every for hash_ in totals.covers)
        totals = PartTotals(
            covers,
            sum(totals.documents for totals in every),
            add([totals.region for totals in every]),
            add([totals.tenth for totals in every]),
            names,
            domain.tolist(),
        )
        starts = torch.tensor([0, *(totals.documents for totals in every)]).cumsum(0)
        self._first_document = starts[:-1].tolist()
        super().__init__(totals, _joined_documents([part.documents for part in parts]), {}, None)

    def layer(self, layer: int) -> LayerStatistics:
        """Statistics of one layer over all documents."""
        every = [part.layer(layer) for part in self._parts]
        merged: dict[str, Any] = {}
        for name in SUMS:
            if name == "domain":
                shape = (len(every[0].count), len(self.totals.domains))
                merged[name] = torch.zeros(shape, dtype=torch.int64)
                for one, places in zip(every, self._places, strict=True):
                    merged[name].index_add_(1, places, one.domain)
            else:
                merged[name] = torch.stack([getattr(one, name) for one in every]).sum(0)
        for which in RANKED:
            shifted = [
                examples._replace(document=examples.document + first)
                for examples, first in zip((getattr(one, which) for one in every), self._first_document, strict=True)
            ]
            merged[which] = best(joined(shifted), self._k[which])
        return LayerStatistics(**merged)


def _joined_documents(every: Sequence[Documents]) -> Documents:
    starts = torch.cat([documents.start.diff() for documents in every]).cumsum(0)
    return Documents(
        torch.cat([documents.tokens for documents in every]),
        torch.cat([documents.region for documents in every]),
        torch.cat([torch.zeros(1, dtype=starts.dtype), starts]),
        torch.cat([documents.identity for documents in every]),
    )
