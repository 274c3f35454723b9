"""Parts of a feature store: statistics over some of the documents, and their merging into one.

Statistics of disjoint sets of documents merge, in any order, into those of one pass over all documents
(`layer_statistics`). So a store can be collected in several parts, by several processes, and documents can be added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from tl_adapters.checkpoints.tensor_fields import require_tensors, whole_numbers
from tl_adapters.data.tokens import WITHHELD
from tl_adapters.features.feature import FeatureStoreError
from tl_adapters.features.layer_statistics import (
    N_DECILES,
    RANKINGS,
    SUMMED_TENSORS,
    LayerStatistics,
    best_firings,
    concatenated,
)
from tl_adapters.features.store_description import COLLECT_AGAIN
from tl_adapters.utils.files import new_folder, write_tensors, write_text
from tl_adapters.utils.reading import Record, UnreadableFileError, read_record, read_tensors, unreadable_as
from tl_adapters.utils.strict_json import dumps

PART_FILE, DOCUMENTS_FILE = "part.json", "documents.safetensors"
_Count = Annotated[int, Field(ge=0, lt=2**62)]


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
    withheld: Int[Tensor, "documents"]
    """1 for a document whose text is not to be republished, else 0."""

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

    def texts(self, document: int, ids: Sequence[int], token_index: int, vocabulary: Sequence[str]) -> tuple[str, ...]:
        """The texts of a window's tokens; of a document that is withheld, only that of the token it was chosen for."""
        if not self.withheld[document]:
            return tuple(vocabulary[token] for token in ids)
        return tuple(vocabulary[token] if i == token_index else WITHHELD for i, token in enumerate(ids))


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
        return {field.alias or name: getattr(self, name) for name, field in _PartRecord.model_fields.items()}


class _PartRecord(Record):
    """part.json: the fields of `DocumentTotals` under their published keys."""

    document_sets: list[str] = Field(alias="covers")
    documents: _Count
    region_tokens: list[_Count] = Field(alias="region")
    decile_tokens: list[_Count] = Field(alias="tenth", min_length=N_DECILES, max_length=N_DECILES)
    domains: list[str]
    domain_tokens: list[_Count] = Field(alias="domain")


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
        path = folder / PART_FILE
        with unreadable_as(FeatureStoreError):
            record = read_record(_PartRecord, path, COLLECT_AGAIN)
            if len(record.domains) != len(record.domain_tokens):
                raise UnreadableFileError(
                    f"{path} has {len(record.domains)} domains and {len(record.domain_tokens)} counts. {COLLECT_AGAIN}"
                )
        return cls(DocumentTotals(**dict(record)), None, {}, folder)

    @property
    def documents(self) -> Documents:
        """The documents of the part. Raises FeatureStoreError where their file is damaged."""
        if self._documents is None:
            assert self.folder is not None
            path = self.folder / DOCUMENTS_FILE
            with unreadable_as(FeatureStoreError):
                tensors = read_tensors(path, advice=COLLECT_AGAIN)
                regions, ends = len(self.totals.region_tokens), self.totals.documents + 1
                tensors.setdefault("withheld", torch.zeros(self.totals.documents, dtype=torch.int8))
                sizes = {"documents": self.totals.documents, "ends": ends, "regions": regions}
                require_tensors(tensors, _DOCUMENT_FIELDS, path, sizes, COLLECT_AGAIN)
                start, counts = tensors["start"], tensors["region"].long().bincount(minlength=regions)
                if start[0] != 0 or start[-1] != len(tensors["tokens"]) or bool((start.diff() < 0).any()):
                    raise UnreadableFileError(
                        f"{path}: start does not divide the tokens into documents. {COLLECT_AGAIN}"
                    )
                if counts.tolist() != self.totals.region_tokens:
                    raise UnreadableFileError(
                        f"{path}: region has other counts than {self.folder / PART_FILE}. {COLLECT_AGAIN}"
                    )
            self._documents = Documents(**tensors)
        return self._documents

    def layer(self, layer: int) -> LayerStatistics:
        """The statistics of one layer. Raises FeatureStoreError where its file is damaged."""
        if layer in self._layers:
            return self._layers[layer]
        assert self.folder is not None
        path = self.folder / layer_file(layer)
        totals, lengths = self.totals, self.documents.start.diff()
        with unreadable_as(FeatureStoreError):
            tensors = read_tensors(path, advice=COLLECT_AGAIN)
            fields = LayerStatistics.fields(len(totals.region_tokens), len(totals.domains), totals.documents)
            require_tensors(tensors, fields, path, advice=COLLECT_AGAIN)
            statistics = LayerStatistics.from_tensors(tensors)
            if problem := statistics.contradiction(lengths):
                raise UnreadableFileError(f"{path}: {problem}. {COLLECT_AGAIN}")
        return statistics


_DOCUMENT_FIELDS = {
    "tokens": whole_numbers("total"),
    "region": whole_numbers("total", below="regions"),
    "start": whole_numbers("ends"),
    "identity": whole_numbers("documents", lowest=None),
    "withheld": whole_numbers("documents"),  # none in stores of earlier versions
}


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
        torch.cat([documents.withheld for documents in parts]),
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
