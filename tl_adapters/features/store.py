"""The feature store: what was collected of every feature, with what it was collected on.

Its files are those of `store_files`. Layers are read when they are asked for: a store of a large model opens at once.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.checkpoints.fingerprints import differing
from tl_adapters.features.feature import (
    ALIVE_FIRINGS,
    QUANTILES,
    CoactivatingFeature,
    Example,
    Feature,
    FeatureStoreError,
    Label,
)
from tl_adapters.features.layer_statistics import (
    BUCKETS,
    Examples,
    LayerStatistics,
    MergedPart,
    Part,
    bucket_edges,
    write_part,
)
from tl_adapters.features.logit_effects import LayerEffects
from tl_adapters.features.store_files import (
    AGREEMENT_FILE,
    LABELS_FILE,
    VOCABULARY_FILE,
    StoreDescription,
    effects_of,
    held_elsewhere,
    parts_in,
    read_description,
    read_effects,
    read_labels,
    read_plain,
    vocabulary_of,
)
from tl_adapters.features.stream_agreement import LayerAgreement
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.files import write_text
from tl_adapters.utils.results import plain
from tl_adapters.utils.strict_json import dumps

NEIGHBOURS = 8
"""Neighbours told of each feature."""


class FeatureStore:
    """Statistics, examples, effects and labels of features; `collecting.collect_features` makes it.

    `table` gives the columns of an index over all features, `feature` everything of one.
    """

    def __init__(
        self,
        about: StoreDescription,
        part: Part,
        effects: Mapping[int, LayerEffects],
        vocabulary: Sequence[str],
        folder: Path | None = None,
    ) -> None:
        self.about, self.folder, self.part, self.vocabulary = about, folder, part, vocabulary
        self._effects = effects
        self._held: tuple[int, LayerStatistics, LayerEffects] | None = None
        self.labels: dict[FeatureId, Label] = {}
        self.agreement: list[dict[str, Any]] = []
        if folder is not None and (folder / AGREEMENT_FILE).is_file():
            self.agreement = read_plain(folder / AGREEMENT_FILE)
        if folder is not None and (folder / LABELS_FILE).is_file():
            self.labels = read_labels(folder / LABELS_FILE)

    @classmethod
    def load(cls, folder: str | Path) -> FeatureStore:
        """Open a store. Raises FeatureStoreError where there is none, or only parts of one."""
        folder = Path(folder)
        about = read_description(folder)
        parts = parts_in(folder)
        if len(parts) != 1:
            raise FeatureStoreError(
                f"{folder} holds {len(parts)} parts that are not merged: its collection was stopped, or is shared by "
                "several processes. Run it again with the same arguments; it goes on where it stands."
            )
        return cls(about, parts[0], {}, read_plain(folder / VOCABULARY_FILE), folder)

    # -- totals ---------------------------------------------------------------------------------------------------

    @property
    def documents(self) -> int:
        """Documents it was collected on."""
        return self.part.totals.documents

    @property
    def tokens(self) -> int:
        """Tokens it was collected on."""
        return self.part.totals.tokens

    @property
    def region_tokens(self) -> dict[str, int]:
        """Tokens by region of the trace."""
        return dict(zip(self.about.regions, self.part.totals.region, strict=True))

    @cached_property
    def firings(self) -> Tensor:
        """[layers, n_features]: tokens on which each feature fires; layers in the order of ``about.layers``."""
        return torch.stack([self.layer(layer)[0].count for layer in self.about.layers])

    def layer(self, layer: int) -> tuple[LayerStatistics, LayerEffects]:
        """Statistics and effects of one layer; the layer asked for last is held. Raises FeatureStoreError."""
        if self._held is None or self._held[0] != layer:
            if layer not in self.about.layers:
                raise FeatureStoreError(f"The store has no layer {layer}; it has {self.about.layers}.")
            effects = self._effects.get(layer) or read_effects(self.folder, layer)
            self._held = (layer, self.part.layer(layer), effects)
        return self._held[1], self._held[2]

    def require_features_of(self, pair: PairedModel) -> None:
        """Raises FeatureStoreError where these are not the features of the pair's adapters, or not read in its models.

        Fingerprints are compared, never names: models may have been moved, and some layers of a set know its store.
        """
        recorded, here = self.about.fingerprints, {**pair.fingerprints, **pair.installed_adapters().fingerprints}
        differs = differing(recorded, here)
        ours, theirs = recorded.get("adapters"), here["adapters"]
        if self.about.kind != "feature" or ours is None or any(name.startswith("adapters") for name in differs):
            raise FeatureStoreError(
                f"The store holds {self.about.kind}s of adapters {ours}, and these are {theirs}: a feature is a number "
                "of one set. Collect a store of these (tl-adapters features RUN)."
            )
        if differs:
            raise FeatureStoreError(
                f"The store was read in a pair whose {' and '.join(differs)} are others than here (by fingerprint). "
                "Collect a store of this pair (tl-adapters features RUN)."
            )

    # -- features -------------------------------------------------------------------------------------------------

    def ids(self, min_firings: int = ALIVE_FIRINGS) -> list[FeatureId]:
        """Features that fired at least so often, by layer and index."""
        found = (self.firings >= min_firings).nonzero().tolist()
        return [self.about.own(self.about.layers[place], index) for place, index in found]

    def features(self, ids: Iterable[FeatureId]) -> Iterator[Feature]:
        """Many of them; quick where they are sorted by layer."""
        densities = self.firings.double().flatten() / max(1, self.tokens)
        for id in ids:
            yield self._feature(id, densities)

    def feature(self, id: FeatureId | tuple[int, int]) -> Feature:
        """Everything of one feature. Raises FeatureStoreError where there is none of that number."""
        return next(self.features([FeatureId(*id)]))

    def _feature(self, id: FeatureId, densities: Tensor) -> Feature:
        statistics, effects = self.layer(id.layer)
        if not 0 <= id.index < self.about.n_features:
            raise FeatureStoreError(f"There is no feature {id.layer}.{id.index}; a layer has {self.about.n_features}.")
        i, totals = id.index, self.part.totals
        count = int(statistics.count[i])
        region = statistics.region[i].tolist()
        edges = bucket_edges().tolist()
        histogram = statistics.histogram[i]
        filled = histogram.nonzero()[:, 0].tolist()
        low, high = effects.range[i].tolist()
        bins = effects.histogram[i].tolist()
        step = (high - low) / len(bins)
        top, sample = _of(statistics.top, i), _of(statistics.sample, i)
        of_tokens = lambda counts, tokens: tuple(c / max(1, n) for c, n in zip(counts, tokens, strict=True))  # noqa: E731
        return Feature(
            id=self.about.own(*id),
            kind=self.about.kind,
            firings=count,
            density=count / max(1, self.tokens),
            mean=float(statistics.total[i]) / max(1, count),
            max=float(top.value.max()) if len(top.value) else 0.0,
            decoder_norm=float(effects.norm[i]),
            quantiles=_quantiles(histogram),
            histogram=tuple((edges[b], edges[b + 1], int(histogram[b])) for b in range(filled[0], filled[-1] + 1))
            if filled
            else (),
            regions=dict(zip(self.about.regions, of_tokens(region, totals.region), strict=True)),
            region_share={name: c / max(1, count) for name, c in zip(self.about.regions, region, strict=True)},
            thinking_deciles=of_tokens(statistics.tenth[i].tolist(), totals.tenth),
            domains={
                name: share
                for name, share in zip(
                    totals.domains, of_tokens(statistics.domain[i].tolist(), totals.domain), strict=True
                )
                if name
            },
            top_logits=self._tokens(effects.top_tokens[i], effects.top[i]),
            bottom_logits=self._tokens(effects.bottom_tokens[i], effects.bottom[i]),
            effects=dict(zip(self.about.words, effects.words[i].tolist(), strict=True)),
            effect_spread=float(effects.spread[i]),
            effect_kurtosis=float(effects.kurtosis[i]),
            effect_histogram=tuple((low + b * step, low + (b + 1) * step, n) for b, n in enumerate(bins)),
            top_examples=self._examples(top),
            random_examples=tuple(sorted(self._examples(sample), key=lambda e: -e.values[e.token_index])),
            coactivating=self._neighbours(sample, densities),
            label=self.labels.get(id),
        )

    def _tokens(self, tokens: Tensor, effects: Tensor) -> tuple[tuple[str, float], ...]:
        return tuple((self.vocabulary[t], e) for t, e in zip(tokens.tolist(), effects.tolist(), strict=True))

    def _examples(self, examples: Examples) -> tuple[Example, ...]:
        documents, options = self.part.documents, self.about.options
        found = []
        for value, document, position, window in zip(
            examples.value.tolist(), examples.document.tolist(), examples.position.tolist(), examples.window.tolist(),
            strict=True,
        ):  # fmt: skip
            start, stop = documents.start[document : document + 2].tolist()
            first, last = max(0, position - options.before), min(stop - start, position + options.after + 1)
            ids = tuple(documents.tokens[start + first : start + last].tolist())
            values = window[options.before - (position - first) :][: len(ids)]
            at = position - first
            values[at] = value  # exactly; around it half precision does
            found.append(Example(tuple(self.vocabulary[t] for t in ids), ids, tuple(values), at, document, position))
        return tuple(found)

    def _neighbours(self, sample: Examples, densities: Tensor) -> tuple[CoactivatingFeature, ...]:
        flat, counts = sample.beside[sample.beside >= 0].long().unique(return_counts=True)
        share = counts / max(1, len(sample.feature))
        order = (share - densities[flat]).argsort(descending=True, stable=True)[:NEIGHBOURS]
        return tuple(
            CoactivatingFeature(self.about.id_of(int(flat[i])), float(share[i]), float(densities[flat[i]]))
            for i in order.tolist()
            if share[i] > densities[flat[i]]
        )

    def region_of(self, example: Example) -> str:
        """Region of the trace of the token that an example was chosen for."""
        documents = self.part.documents
        return self.about.regions[int(documents.region[int(documents.start[example.document]) + example.position])]

    def document(self, number: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Token ids of a whole document, and the region of each."""
        documents = self.part.documents
        here = slice(*documents.start[number : number + 2].tolist())
        names = tuple(self.about.regions[code] for code in documents.region[here].tolist())
        return tuple(documents.tokens[here].tolist()), names

    def table(self, min_firings: int = ALIVE_FIRINGS) -> dict[str, list[Any]]:
        """Columns of an index over the features that fired at least so often, sorted by layer and index.

        layer, index, firings, density, mean, max, decoder_norm; region and region_share (where most of its firings
        lie, and how many of them); top_logits and bottom_logits (three tokens); fires_on (the commonest tokens of its
        random sample, at most three); effects (one list, in the order of ``about.words``); label and category.
        """
        columns: dict[str, list[Any]] = {name: [] for name in TABLE_COLUMNS}
        for layer in self.about.layers:
            statistics, effects = self.layer(layer)
            chosen = (statistics.count >= min_firings).nonzero()[:, 0]
            count = statistics.count[chosen].double()
            share, region = (statistics.region[chosen] / count[:, None].clamp(min=1)).max(-1)
            strongest = torch.zeros(len(statistics.count)).scatter_reduce_(
                0, statistics.top.feature.long(), statistics.top.value, "amax"
            )
            labels = [self.labels.get(FeatureId(layer, index)) for index in chosen.tolist()]
            words = lambda tokens: [[self.vocabulary[t] for t in row] for row in tokens[chosen, :3].tolist()]  # noqa: B023, E731
            for name, values in {
                "layer": [layer] * len(chosen),
                "index": chosen.tolist(),
                "firings": statistics.count[chosen].tolist(),
                "density": (count / max(1, self.tokens)).tolist(),
                "mean": (statistics.total[chosen] / count.clamp(min=1)).tolist(),
                "max": strongest[chosen].tolist(),
                "decoder_norm": effects.norm[chosen].tolist(),
                "region": [self.about.regions[i] for i in region.tolist()],
                "region_share": share.tolist(),
                "top_logits": words(effects.top_tokens),
                "bottom_logits": words(effects.bottom_tokens),
                "fires_on": self._commonest(statistics.sample, chosen),
                "effects": effects.words[chosen].tolist(),
                "label": [label.text if label else "" for label in labels],
                "category": [label.category if label else "" for label in labels],
            }.items():
                columns[name] += values
        return columns

    def _commonest(self, sample: Examples, chosen: Tensor) -> list[list[str]]:
        documents, n_vocab = self.part.documents, len(self.vocabulary)
        tokens = documents.tokens[documents.start[sample.document.long()] + sample.position.long()].long()
        pairs, counts = (sample.feature.long() * n_vocab + tokens).unique(return_counts=True)
        pairs = pairs[counts.argsort(descending=True, stable=True)]
        found: dict[int, list[str]] = {}
        for feature, token in zip((pairs // n_vocab).tolist(), (pairs % n_vocab).tolist(), strict=True):
            if len(words := found.setdefault(feature, [])) < 3:
                words.append(self.vocabulary[token])
        return [found.get(index, []) for index in chosen.tolist()]

    def set_agreement(self, agreement: Sequence[LayerAgreement]) -> None:
        """Keep how far the two streams agree (`streams.stream_agreement`), as plain records in ``agreement``."""
        self.agreement = plain(agreement)
        if self.folder is not None:
            write_text(self.folder / AGREEMENT_FILE, dumps(self.agreement, indent=1) + "\n")

    def set_labels(self, labels: Mapping[FeatureId, Label]) -> None:
        """Name features; what others are called stays. Written to the store's folder, where it has one."""
        self.labels = dict(sorted({**self.labels, **labels}.items()))
        if self.folder is not None:
            record = {f"{id.layer}.{id.index}": asdict(label) for id, label in self.labels.items()}
            write_text(self.folder / LABELS_FILE, dumps(record, indent=0) + "\n")


TABLE_COLUMNS = (
    "layer", "index", "firings", "density", "mean", "max", "decoder_norm", "region", "region_share", "top_logits",
    "bottom_logits", "fires_on", "effects", "label", "category",
)  # fmt: skip
"""Columns of `FeatureStore.table`."""


def _of(examples: Examples, index: int) -> Examples:
    start, stop = torch.searchsorted(examples.feature, torch.tensor([index, index + 1], dtype=examples.feature.dtype))
    return Examples(*(column[start:stop] for column in examples))


def _quantiles(histogram: Tensor) -> tuple[tuple[float, float], ...]:
    """Quantiles of the activations, each within its bucket in proportion on the logarithmic scale."""
    total = float(histogram.sum())
    if not total:
        return ()
    below = histogram.double().cumsum(0)
    edges = bucket_edges().log2()
    found = []
    for share in QUANTILES:
        b = min(int(torch.searchsorted(below, share * total)), BUCKETS - 1)
        inside = 1 - (float(below[b]) - share * total) / float(histogram[b])
        found.append((share, float(torch.exp2(edges[b] + inside * (edges[b + 1] - edges[b])))))
    return tuple(found)


def finish(
    pair: PairedModel, description: StoreDescription, parts: Sequence[Part], folder: str | Path | None
) -> FeatureStore:
    """All parts as one store, in the folder or in memory."""
    k = {"top": description.options.examples, "sample": description.options.sample}
    merged = parts[0] if len(parts) == 1 else MergedPart(sorted(parts, key=lambda p: p.totals.covers), k)
    if folder is None:
        vocabulary = vocabulary_of(pair)
        whole = Part(merged.totals, merged.documents, {n: merged.layer(n) for n in description.layers}, None)
        return FeatureStore(description, whole, dict(effects_of(pair, description)), vocabulary)
    folder = Path(folder)
    if len(parts) > 1:
        name = hashlib.sha256("".join(merged.totals.covers).encode()).hexdigest()[:16]
        write_part(folder / f"part-{name}", merged, description.layers)
    for folder_of_part in held_elsewhere(folder):  # only now: whoever is killed before finds both, and takes the larger
        shutil.rmtree(folder_of_part)
    return FeatureStore.load(folder)
