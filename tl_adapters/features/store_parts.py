"""Parts of a feature store: statistics over some of the documents, and their merging into one.

Statistics of disjoint sets of documents merge, in any order, into those of one pass over all documents
(`layer_statistics`). So a store can be collected in several parts, by several processes, and documents can be added.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import safe_open
from torch import Tensor

from tl_adapters.features.feature import FeatureStoreError
from tl_adapters.features.layer_statistics import RANKINGS, SUMMED_TENSORS, LayerStatistics, best_firings, concatenated
from tl_adapters.utils.files import new_folder, write_tensors, write_text
from tl_adapters.utils.strict_json import dumps

PART_FILE, DOCUMENTS_FILE = "part.json", "documents.safetensors"


@dataclass(frozen=True)
class Documents:
    """The documents of a part, from which the examples are cut."""

    tokens: Int[Tensor, "total"]
    """Tokens of all documents, one document after another."""
    region: Int[Tensor, "total"]
    """Trace region of each token."""
    start: Int[Tensor, "documents_and_end"]
    """Index at which each document starts, and at which the last one ends."""
    identity: Int[Tensor, "documents"]
    """Hash of each document, so that a document is recognized and never counted twice."""

    def __len__(self) -> int:
        return len(self.start) - 1

    def span(self, document: int) -> slice:
        """The tokens of one document, as a slice of ``tokens`` and ``region``."""
        return slice(*self.start[document : document + 2].tolist())

    def window(self, document: int, position: int, before: int, after: int) -> tuple[int, tuple[int, ...]]:
        """The window of a document around a position, cut at the document's ends.

        Returns:
            The position of the window's first token, and the token ids.
        """
        span = self.span(document)
        first, stop = max(0, position - before), min(span.stop - span.start, position + after + 1)
        return first, tuple(self.tokens[span.start + first : span.start + stop].tolist())


@dataclass(frozen=True)
class DocumentTotals:
    """Numbers of documents and tokens of a part, which its counts of firings are shares of."""

    document_sets: list[str]
    """Hashes of the sets of documents that the part covers."""
    documents: int
    """Number of documents."""
    region_tokens: list[int]
    """Tokens by region of the trace."""
    decile_tokens: list[int]
    """Tokens by decile of the thinking."""
    domains: list[str]
    """Names of the domains."""
    domain_tokens: list[int]
    """Tokens by domain."""

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(self.region_tokens)

    def to_json(self) -> dict[str, Any]:
        """The totals as part.json holds them."""
        return {key: getattr(self, attribute) for attribute, key in _TOTALS_KEYS.items()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> DocumentTotals:
        """The totals that `to_json` wrote. Raises KeyError or TypeError for anything else."""
        if set(record) != set(_TOTALS_KEYS.values()):
            raise KeyError(f"keys {sorted(record)} instead of {sorted(_TOTALS_KEYS.values())}")
        return cls(**{attribute: record[key] for attribute, key in _TOTALS_KEYS.items()})


_TOTALS_KEYS = {
    "document_sets": "covers",
    "documents": "documents",
    "region_tokens": "region",
    "decile_tokens": "tenth",
    "domains": "domains",
    "domain_tokens": "domain",
}
"""Attributes of `DocumentTotals`, and their keys in part.json."""


class StorePart:
    """Statistics over some documents, in memory or in a folder that is read one layer at a time."""

    def __init__(
        self,
        totals: DocumentTotals,
        documents: Documents | None,
        layers: Mapping[int, LayerStatistics],
        folder: Path | None,
    ) -> None:
        self.totals, self.folder = totals, folder
        self._documents, self._layers = documents, layers

    @classmethod
    def open(cls, folder: Path) -> StorePart:
        """Open the part that `write_part` wrote. Raises FeatureStoreError."""
        try:
            totals = DocumentTotals.from_json(json.loads((folder / PART_FILE).read_text()))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise FeatureStoreError(
                f"{folder} is not a part of a feature store ({error}); collect it again."
            ) from error
        return cls(totals, None, {}, folder)

    @property
    def documents(self) -> Documents:
        """The documents of the part."""
        if self._documents is None:
            self._documents = Documents(**self._read(DOCUMENTS_FILE))
        return self._documents

    def layer(self, layer: int) -> LayerStatistics:
        """The statistics of one layer."""
        if layer in self._layers:
            return self._layers[layer]
        return LayerStatistics.from_tensors(self._read(layer_file(layer)))

    def _read(self, file: str) -> dict[str, Tensor]:
        assert self.folder is not None
        try:
            with safe_open(self.folder / file, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors and the system raise exceptions of several classes
            raise FeatureStoreError(
                f"{self.folder / file} is missing or damaged ({error}); collect it again."
            ) from error


def layer_file(layer: int) -> str:
    """Name of a layer's file."""
    return f"layer_{layer}.safetensors"


def write_part(folder: Path, part: StorePart, layers: Sequence[int]) -> StorePart:
    """Write a part one layer at a time, so that the folder appears only when it is complete, and open it.

    Raises DiskFullError and FolderExistsError.
    """
    with new_folder(folder) as out:
        for layer in layers:
            write_tensors(out / layer_file(layer), part.layer(layer).tensors())
        write_tensors(out / DOCUMENTS_FILE, vars(part.documents))
        write_text(out / PART_FILE, dumps(part.totals.to_json()))
    return StorePart.open(folder)


class MergedStorePart(StorePart):
    """Several parts as one; the statistics of a layer are merged when they are asked for.

    Args:
        parts: parts of different documents.
        k: firings kept of each feature, by ranking ("top", "sample").
    """

    def __init__(self, parts: Sequence[StorePart], k: Mapping[str, int]) -> None:
        self._parts, self._k = parts, k
        part_totals = [part.totals for part in parts]
        domains = sorted({name for totals in part_totals for name in totals.domains})
        self._domain_indices = [
            torch.tensor([domains.index(name) for name in totals.domains], dtype=torch.long) for totals in part_totals
        ]
        domain_tokens = torch.zeros(len(domains), dtype=torch.long)
        for totals, indices in zip(part_totals, self._domain_indices, strict=True):
            domain_tokens.index_add_(0, indices, torch.tensor(totals.domain_tokens, dtype=torch.long))
        add = lambda counts: torch.tensor(counts).sum(0).tolist()  # noqa: E731
        merged = DocumentTotals(
            document_sets=sorted(hash_ for totals in part_totals for hash_ in totals.document_sets),
            documents=sum(totals.documents for totals in part_totals),
            region_tokens=add([totals.region_tokens for totals in part_totals]),
            decile_tokens=add([totals.decile_tokens for totals in part_totals]),
            domains=domains,
            domain_tokens=domain_tokens.tolist(),
        )
        starts = torch.tensor([0, *(totals.documents for totals in part_totals)]).cumsum(0)
        self._first_document = starts[:-1].tolist()
        super().__init__(merged, _concatenated_documents([part.documents for part in parts]), {}, None)

    def layer(self, layer: int) -> LayerStatistics:
        """The statistics of one layer over all documents."""
        statistics = [part.layer(layer) for part in self._parts]
        merged: dict[str, Any] = {}
        for name in SUMMED_TENSORS:
            if name == "domain_firings":  # the parts may name different domains
                shape = (len(statistics[0].firings), len(self.totals.domains))
                merged[name] = torch.zeros(shape, dtype=torch.int64)
                for one, indices in zip(statistics, self._domain_indices, strict=True):
                    merged[name].index_add_(1, indices, one.domain_firings)
            else:
                merged[name] = torch.stack([getattr(one, name) for one in statistics]).sum(0)
        for ranking in RANKINGS:
            rankings = (getattr(one, ranking) for one in statistics)
            renumbered = [
                firings._replace(document=firings.document + first)
                for firings, first in zip(rankings, self._first_document, strict=True)
            ]
            merged[ranking] = best_firings(concatenated(renumbered), self._k[ranking])
        return LayerStatistics(**merged)


def _concatenated_documents(parts: Sequence[Documents]) -> Documents:
    starts = torch.cat([documents.start.diff() for documents in parts]).cumsum(0)
    return Documents(
        torch.cat([documents.tokens for documents in parts]),
        torch.cat([documents.region for documents in parts]),
        torch.cat([torch.zeros(1, dtype=starts.dtype), starts]),
        torch.cat([documents.identity for documents in parts]),
    )


def current_parts(folder: Path) -> list[StorePart]:
    """The parts in a store's folder, without those whose documents a merged part covers too."""
    parts = [StorePart.open(path) for path in sorted(folder.glob("part-*")) if path.is_dir()]
    covered = [set(part.totals.document_sets) for part in parts]
    return [part for part, mine in zip(parts, covered, strict=True) if not any(mine < other for other in covered)]


def superseded_parts(folder: Path) -> list[Path]:
    """Folders of the parts whose documents a merged part covers too, and which are no longer needed."""
    current = {part.folder for part in current_parts(folder)}
    return [path for path in folder.glob("part-*") if path.is_dir() and path not in current]
