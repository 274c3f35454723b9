"""The feature store: statistics, examples, logit effects and labels of features, with what they were collected on.

Its files are described in `store_files`. Layers are read when they are asked for, so the store of a large model opens
at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.checkpoints.fingerprints import differing
from tl_adapters.features.feature import ALIVE_FIRINGS, Example, Feature, FeatureStoreError, Label
from tl_adapters.features.layer_records import TABLE_COLUMNS, LayerRecords
from tl_adapters.features.layer_statistics import LayerStatistics
from tl_adapters.features.logit_effects import LayerEffects
from tl_adapters.features.store_description import COLLECT_AGAIN, StoreDescription
from tl_adapters.features.store_files import (
    AGREEMENT_FILE,
    FEATURE_TABLE_FILE,
    LABELS_FILE,
    read_agreement,
    read_description,
    read_effects,
    read_labels,
    read_vocabulary,
    remove_feature_table,
)
from tl_adapters.features.store_parts import StorePart, current_parts
from tl_adapters.features.stream_agreement import LayerAgreement
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.files import locked, write_table, write_text
from tl_adapters.utils.notebook import data_frame, tables_view
from tl_adapters.utils.results import plain
from tl_adapters.utils.strict_json import dumps

if TYPE_CHECKING:
    from pandas import DataFrame


class FeatureStore:
    """Statistics, examples, logit effects and labels of features; `collect_features` makes it.

    `table` gives the columns of an index over all features, and `feature` everything on one.

    Args:
        about: the features, models and documents of the store.
        part: statistics over all documents.
        effects: logit effects by layer; a layer that is missing is read from the folder.
        vocabulary: text of every token id.
        folder: where the store is kept; None for a store in memory.

    Raises FeatureStoreError, as does all that reads the folder, for files that are damaged or of other features.
    """

    def __init__(
        self,
        about: StoreDescription,
        part: StorePart,
        effects: Mapping[int, LayerEffects],
        vocabulary: Sequence[str],
        folder: Path | None = None,
    ) -> None:
        self.about, self.folder, self.part, self.vocabulary = about, folder, part, vocabulary
        self._effects = effects
        self._last_layer: tuple[int, LayerStatistics, LayerEffects] | None = None
        self.labels: dict[FeatureId, Label] = {}
        self.agreement: list[dict[str, Any]] = []
        if folder is not None and (folder / AGREEMENT_FILE).is_file():
            self.agreement = read_agreement(folder / AGREEMENT_FILE)
        if folder is not None and (folder / LABELS_FILE).is_file():
            self.labels = _labels_of(about, folder / LABELS_FILE)

    @classmethod
    def load(cls, folder: str | Path) -> FeatureStore:
        """Open the store in a folder. Raises FeatureStoreError where there is none, or only unmerged parts of one."""
        folder = Path(folder)
        about = read_description(folder)
        parts = current_parts(folder)
        if len(parts) != 1:
            raise FeatureStoreError(
                f"{folder} holds {len(parts)} parts that are not merged: its collection was stopped, or is shared by "
                "several processes. Run it again with the same arguments; it continues after the last part."
            )
        vocabulary, totals, tokens = read_vocabulary(folder), parts[0].totals, parts[0].documents.tokens
        if len(totals.region_tokens) != len(about.regions) or (len(tokens) and int(tokens.max()) >= len(vocabulary)):
            raise FeatureStoreError(
                f"{folder} holds files of several stores: {len(about.regions)} regions and a vocabulary of "
                f"{len(vocabulary):,} tokens, and documents with {len(totals.region_tokens)} regions and other tokens. "
                f"{COLLECT_AGAIN}"
            )
        return cls(about, parts[0], {}, vocabulary, folder)

    def __repr__(self) -> str:
        return (
            f"FeatureStore of {self.about.total_features:,} {self.about.kind}s in {len(self.about.layers)} layers: "
            f"{len(self.ids()):,} alive over {self.documents:,} documents, {self.tokens:,} tokens"
        )

    def to_dict(self) -> dict[str, Any]:
        """What it was collected on, and its totals, as JSON values; the features are in `to_pandas`."""
        return plain(self.about) | {"documents": self.documents, "tokens": self.tokens, "alive": len(self.ids())}

    def _repr_html_(self) -> str:
        alive, layers = (self.firings >= ALIVE_FIRINGS).sum(1).tolist(), self.about.layers
        l0 = (self.firings.sum(1) / max(1, self.tokens)).tolist()
        rows = [[str(layer), f"{n:,}", f"{active:.3g}"] for layer, n, active in zip(layers, alive, l0, strict=True)]
        regions = ["region", "tokens"], [[name, f"{n:,}"] for name, n in self.region_tokens.items()]
        return tables_view(([repr(self)], []), (["layer", "alive", "active per token (L0)"], rows), regions)

    # -- totals ---------------------------------------------------------------------------------------------------

    @property
    def documents(self) -> int:
        """Number of documents that the store was collected on."""
        return self.part.totals.documents

    @property
    def tokens(self) -> int:
        """Number of tokens that the store was collected on."""
        return self.part.totals.tokens

    @property
    def region_tokens(self) -> dict[str, int]:
        """Number of tokens by region of the trace."""
        return dict(zip(self.about.regions, self.part.totals.region_tokens, strict=True))

    @cached_property
    def firings(self) -> Tensor:
        """[layers, n_features]: tokens on which each feature fires; layers in the order of ``about.layers``."""
        return torch.stack([self.layer(layer)[0].firings for layer in self.about.layers])

    def layer(self, layer: int) -> tuple[LayerStatistics, LayerEffects]:
        """Statistics and logit effects of one layer; the last layer that was read stays in memory.

        Raises:
            FeatureStoreError: the store has no such layer, or its file is missing or damaged.
        """
        if self._last_layer is None or self._last_layer[0] != layer:
            if layer not in self.about.layers:
                raise FeatureStoreError(f"The store has no layer {layer}; it has {self.about.layers}.")
            effects = self._effects.get(layer) or read_effects(self.folder, layer, self.about, len(self.vocabulary))
            statistics = self.part.layer(layer)
            self._require_shape(layer, statistics)
            self._last_layer = (layer, statistics, effects)
        return self._last_layer[1], self._last_layer[2]

    def _require_shape(self, layer: int, statistics: LayerStatistics) -> None:
        """Raises FeatureStoreError where the statistics of a layer are of another number of features or windows."""
        options = self.about.options
        widths = {statistics.top.window.shape[1], statistics.sample.window.shape[1]}
        coactivating = [ranked.coactivating for ranked in (statistics.top, statistics.sample)]
        others = max((int(features.max()) for features in coactivating if features.numel()), default=-1)
        if (
            len(statistics.firings) != self.about.n_features
            or widths != {options.before + 1 + options.after}
            or others >= self.about.total_features
        ):
            raise FeatureStoreError(
                f"The file of layer {layer} in {self.part.folder} has {len(statistics.firings)} features and windows "
                f"of {sorted(widths)} tokens; the store has {self.about.n_features} features per layer and windows of "
                f"{options.before + 1 + options.after}. {COLLECT_AGAIN}"
            )

    def _records(self, layer: int) -> LayerRecords:
        return LayerRecords(self.about, self.part, self.vocabulary, self.labels, layer, *self.layer(layer))

    def require_features_of(self, pair: PairedModel) -> None:
        """Check that these are features of the pair's adapters, and were read in its models.

        Fingerprints are compared and names are not: models may have been moved, and adapters of some layers of a set
        match a store of the whole set.

        Raises FeatureStoreError where they are not, and PairMismatchError where the pair has no adapters.
        """
        recorded, current = self.about.fingerprints, {**pair.fingerprints, **pair.installed_adapters().fingerprints}
        differs = differing(recorded, current)
        ours, theirs = recorded.get("adapters"), current["adapters"]
        if self.about.kind != "feature" or ours is None or any(name.startswith("adapters") for name in differs):
            raise FeatureStoreError(
                f"The store holds {self.about.kind}s of adapters {ours}, and these adapters are {theirs}: feature "
                "indices have a meaning within one set of adapters only. "
                "Collect a store of these (tl-adapters features RUN)."
            )
        if differs:
            raise FeatureStoreError(
                f"The store was collected in a pair whose {' and '.join(differs)} differ from this pair's (by "
                "fingerprint). Collect a store of this pair (tl-adapters features RUN)."
            )

    # -- features -------------------------------------------------------------------------------------------------

    def ids(self, min_firings: int = ALIVE_FIRINGS) -> list[FeatureId]:
        """Ids of the features that fired at least so often, by layer and index."""
        layer_and_index = (self.firings >= min_firings).nonzero().tolist()
        return [self.about.owned_id(self.about.layers[number], index) for number, index in layer_and_index]

    def features(self, ids: Iterable[FeatureId | tuple[int, int]]) -> Iterator[Feature]:
        """The records of many features; fast where the ids are sorted by layer.

        Raises:
            FeatureStoreError: a feature does not exist.
        """
        densities = self.firings.double().flatten() / max(1, self.tokens)
        for id in (FeatureId(*pair) for pair in ids):
            records = self._records(id.layer)
            if not 0 <= id.index < self.about.n_features:
                raise FeatureStoreError(
                    f"There is no feature {id.layer}.{id.index}; a layer has {self.about.n_features}, from 0."
                )
            yield records.feature(id.index, densities)

    def feature(self, id: FeatureId | tuple[int, int]) -> Feature:
        """The record of one feature. Raises FeatureStoreError where it does not exist."""
        return next(self.features([id]))

    def region_of(self, example: Example) -> str:
        """Trace region of the token that an example was chosen for."""
        documents = self.part.documents
        return self.about.regions[int(documents.region[int(documents.start[example.document]) + example.position])]

    def document(self, number: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Token ids of a whole document, and the trace region of each."""
        documents = self.part.documents
        span = documents.span(number)
        names = tuple(self.about.regions[code] for code in documents.region[span].tolist())
        return tuple(documents.tokens[span].tolist()), names

    def excerpt(self, document: int, position: int) -> Example:
        """The window of a document around a position, as wide as the examples; its activations are given as 0."""
        options = self.about.options
        first, ids = self.part.documents.window(document, position, options.before, options.after)
        tokens = self.part.documents.texts(document, ids, position - first, self.vocabulary)
        return Example(tokens, ids, (0.0,) * len(ids), position - first, document, position)

    def table(self, min_firings: int = ALIVE_FIRINGS) -> dict[str, list[Any]]:
        """Columns of an index over the features that fired at least so often, sorted by layer and index.

        layer, index, firings, density, mean, max, decoder_norm; region and region_share (the region with most of the
        firings, and their share); top_logits and bottom_logits (three tokens); fires_on (the commonest tokens of the
        random sample, at most three); effects (one list, in the order of ``about.words``); label and category.
        """
        columns: dict[str, list[Any]] = {name: [] for name in TABLE_COLUMNS}
        for layer in self.about.layers:
            for name, values in self._records(layer).table(min_firings).items():
                columns[name] += values
        return columns

    def to_pandas(self, min_firings: int = ALIVE_FIRINGS) -> DataFrame:
        """The `table` as a DataFrame, with a row per feature."""
        return data_frame(self.table(min_firings))

    def write_parquet(self, path: str | Path | None = None) -> Path:
        """Write the `table` of all features, also of those that never fired, as a Parquet file; return its path.

        pandas, polars and DuckDB read it. A store in a folder keeps features.parquet there up to date by itself. The
        metadata of its schema has "words", the JSON list of tokens that the column effects refers to.

        Raises:
            FeatureStoreError: the store is in memory, and no path is given.
        """
        if path is None and self.folder is None:
            raise FeatureStoreError("This store is in memory; give the path of the file to write.")
        path = Path(path) if path is not None else self.folder / FEATURE_TABLE_FILE  # type: ignore[operator]
        with locked(path):
            if self.folder is not None and (self.folder / LABELS_FILE).is_file():  # others may have labeled since
                self.labels = _labels_of(self.about, self.folder / LABELS_FILE)
            layers = (self._records(layer).table(0) for layer in self.about.layers)
            write_table(path, TABLE_COLUMNS, layers, {"words": dumps(self.about.words)})
        return path

    def set_agreement(self, agreement: Sequence[LayerAgreement]) -> None:
        """Set ``agreement`` to the records of `stream_agreement`, and write them to the store's folder, if any."""
        self.agreement = plain(agreement)
        if self.folder is not None:
            write_text(self.folder / AGREEMENT_FILE, dumps(self.agreement, indent=1) + "\n")

    def set_labels(self, labels: Mapping[FeatureId, Label]) -> None:
        """Label features, and write the labels to the store's folder, if any. Other features keep their labels."""
        if self.folder is None:
            self.labels = dict(sorted({**self.labels, **labels}.items()))
            return
        path = self.folder / LABELS_FILE
        with locked(path):  # another process may have labeled features since the store was loaded
            earlier = read_labels(path) if path.is_file() else {}
            self.labels = dict(sorted({**self.labels, **earlier, **labels}.items()))
            record = {f"{id.layer}.{id.index}": asdict(label) for id, label in self.labels.items()}
            remove_feature_table(self.folder)
            write_text(path, dumps(record, indent=0) + "\n")
        self.write_parquet()


def _labels_of(about: StoreDescription, path: Path) -> dict[FeatureId, Label]:
    """The labels in a store's file. Raises FeatureStoreError for one of a feature that the store does not have."""
    labels = read_labels(path)
    for id in labels:
        if id.layer not in about.layers or id.index >= about.n_features:
            raise FeatureStoreError(
                f"{path} labels the feature {id.layer}.{id.index}, and the store has layers {about.layers} of "
                f"{about.n_features} features. Remove the file and label the features again."
            )
    return labels
