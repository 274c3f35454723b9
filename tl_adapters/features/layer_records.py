"""Reads feature records and table columns from the statistics and logit effects of one layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.features.feature import QUANTILES, CoactivatingFeature, Example, Feature, Label
from tl_adapters.features.layer_statistics import N_BUCKETS, LayerStatistics, RankedFirings, histogram_edges
from tl_adapters.features.logit_effects import LayerEffects
from tl_adapters.features.store_description import StoreDescription
from tl_adapters.features.store_parts import StorePart

MAX_COACTIVATING = 8
"""Co-activating features that the record of a feature gives."""
TABLE_COLUMNS: Mapping[str, Any] = {
    **dict.fromkeys(("layer", "index", "firings"), int),
    **dict.fromkeys(("density", "mean", "max", "decoder_norm"), float),
    **{"region": str, "region_share": float},
    **dict.fromkeys(("top_logits", "bottom_logits", "fires_on"), list[str]),
    **{"effects": list[float], "label": str, "category": str},
}
"""Columns of `FeatureStore.table`, with the type of their values."""
_TABLE_TOKENS = 3
"""Tokens that each of the table's columns top_logits, bottom_logits and fires_on gives."""


@dataclass(frozen=True)
class LayerRecords:
    """One layer of a store, from which records and table columns are read."""

    about: StoreDescription
    """Description of the store."""
    part: StorePart
    """Totals and documents of the store."""
    vocabulary: Sequence[str]
    """Text of every token id."""
    labels: Mapping[FeatureId, Label]
    """Labels of the store's features."""
    layer: int
    """The layer."""
    statistics: LayerStatistics
    """Statistics of the layer's features."""
    effects: LayerEffects
    """Direct logit effects of the layer's features."""

    def feature(self, index: int, densities: Float[Tensor, "total_features"]) -> Feature:
        """The record of one feature.

        Args:
            index: of the feature in the layer.
            densities: share of tokens on which each feature of all layers fires.
        """
        statistics, effects, totals = self.statistics, self.effects, self.part.totals
        firings, histogram = int(statistics.firings[index]), statistics.histogram[index]
        region_firings = statistics.region_firings[index].tolist()
        regions = _rates(region_firings, totals.region_tokens)
        domains = _rates(statistics.domain_firings[index].tolist(), totals.domain_tokens)
        top, sample = statistics.top.of_feature(index), statistics.sample.of_feature(index)
        return Feature(
            id=self.about.owned_id(self.layer, index),
            kind=self.about.kind,
            firings=firings,
            density=firings / max(1, totals.tokens),
            mean=float(statistics.summed_activation[index]) / max(1, firings),
            max=float(top.value.max()) if len(top.value) else 0.0,
            decoder_norm=float(effects.norm[index]),
            quantiles=_quantiles(histogram),
            histogram=_filled_buckets(histogram),
            regions=dict(zip(self.about.regions, regions, strict=True)),
            region_share={r: n / max(1, firings) for r, n in zip(self.about.regions, region_firings, strict=True)},
            thinking_deciles=_rates(statistics.decile_firings[index].tolist(), totals.decile_tokens),
            domains={name: rate for name, rate in zip(totals.domains, domains, strict=True) if name},
            top_logits=self._tokens(effects.top_tokens[index], effects.top[index]),
            bottom_logits=self._tokens(effects.bottom_tokens[index], effects.bottom[index]),
            effects=dict(zip(self.about.words, effects.words[index].tolist(), strict=True)),
            effect_spread=float(effects.spread[index]),
            effect_kurtosis=float(effects.kurtosis[index]),
            effect_histogram=self._effect_histogram(index),
            top_examples=self._examples(top),
            random_examples=tuple(sorted(self._examples(sample), key=lambda e: -e.values[e.token_index])),
            coactivating=self._coactivating(sample, densities),
            label=self.labels.get(FeatureId(self.layer, index)),
        )

    def _tokens(self, tokens: Tensor, effects: Tensor) -> tuple[tuple[str, float], ...]:
        return tuple((self.vocabulary[t], e) for t, e in zip(tokens.tolist(), effects.tolist(), strict=True))

    def _effect_histogram(self, index: int) -> tuple[tuple[float, float, int], ...]:
        low, high = self.effects.range[index].tolist()
        counts = self.effects.histogram[index].tolist()
        width = (high - low) / len(counts)
        return tuple((low + b * width, low + (b + 1) * width, n) for b, n in enumerate(counts))

    def _examples(self, firings: RankedFirings) -> tuple[Example, ...]:
        documents, options = self.part.documents, self.about.options
        examples = []
        for value, document, position, window in zip(
            firings.value.tolist(), firings.document.tolist(), firings.position.tolist(), firings.window.tolist(),
            strict=True,
        ):  # fmt: skip
            first, ids = documents.window(document, position, options.before, options.after)
            token_index = position - first
            values = window[options.before - token_index :][: len(ids)]
            values[token_index] = value  # exact, where the window has half precision
            tokens = documents.texts(document, ids, token_index, self.vocabulary)
            examples.append(Example(tokens, ids, tuple(values), token_index, document, position))
        return tuple(examples)

    def _coactivating(self, sample: RankedFirings, densities: Tensor) -> tuple[CoactivatingFeature, ...]:
        """The features that fire on the sampled tokens more often than elsewhere, by the excess."""
        flat, counts = sample.coactivating[sample.coactivating >= 0].long().unique(return_counts=True)
        share = counts / max(1, len(sample.feature))
        order = (share - densities[flat]).argsort(descending=True, stable=True)[:MAX_COACTIVATING]
        return tuple(
            CoactivatingFeature(self.about.id_of(int(flat[i])), float(share[i]), float(densities[flat[i]]))
            for i in order.tolist()
            if share[i] > densities[flat[i]]
        )

    def table(self, min_firings: int) -> dict[str, list[Any]]:
        """The columns of `FeatureStore.table` for this layer's features that fired at least so often."""
        statistics, effects = self.statistics, self.effects
        chosen = (statistics.firings >= min_firings).nonzero()[:, 0]
        firings = statistics.firings[chosen].double()
        share, region = (statistics.region_firings[chosen] / firings[:, None].clamp(min=1)).max(-1)
        maxima = torch.zeros(len(statistics.firings)).scatter_reduce_(
            0, statistics.top.feature.long(), statistics.top.value, "amax"
        )
        labels = [self.labels.get(FeatureId(self.layer, index)) for index in chosen.tolist()]
        return {
            "layer": [self.layer] * len(chosen),
            "index": chosen.tolist(),
            "firings": statistics.firings[chosen].tolist(),
            "density": (firings / max(1, self.part.totals.tokens)).tolist(),
            "mean": (statistics.summed_activation[chosen] / firings.clamp(min=1)).tolist(),
            "max": maxima[chosen].tolist(),
            "decoder_norm": effects.norm[chosen].tolist(),
            "region": [self.about.regions[i] for i in region.tolist()],
            "region_share": share.tolist(),
            "top_logits": self._token_lists(effects.top_tokens[chosen]),
            "bottom_logits": self._token_lists(effects.bottom_tokens[chosen]),
            "fires_on": self._commonest_tokens(statistics.sample, chosen),
            "effects": effects.words[chosen].tolist(),
            "label": [label.text if label else "" for label in labels],
            "category": [label.category if label else "" for label in labels],
        }

    def _token_lists(self, tokens: Tensor) -> list[list[str]]:
        return [[self.vocabulary[t] for t in row] for row in tokens[:, :_TABLE_TOKENS].tolist()]

    def _commonest_tokens(self, sample: RankedFirings, chosen: Tensor) -> list[list[str]]:
        """The commonest tokens of each chosen feature's sampled firings, commonest first."""
        documents, n_vocab = self.part.documents, len(self.vocabulary)
        tokens = documents.tokens[documents.start[sample.document.long()] + sample.position.long()].long()
        pairs, counts = (sample.feature.long() * n_vocab + tokens).unique(return_counts=True)
        pairs = pairs[counts.argsort(descending=True, stable=True)]
        by_feature: dict[int, list[str]] = {}
        for feature, token in zip((pairs // n_vocab).tolist(), (pairs % n_vocab).tolist(), strict=True):
            if len(commonest := by_feature.setdefault(feature, [])) < _TABLE_TOKENS:
                commonest.append(self.vocabulary[token])
        return [by_feature.get(index, []) for index in chosen.tolist()]


def _rates(firings: Iterable[int], tokens: Iterable[int]) -> tuple[float, ...]:
    """Firings per token; 0 where there are no tokens."""
    return tuple(f / max(1, n) for f, n in zip(firings, tokens, strict=True))


def _filled_buckets(histogram: Tensor) -> tuple[tuple[float, float, int], ...]:
    """(low, high, firings) of every bucket from the first to the last that is not empty."""
    edges, filled = histogram_edges().tolist(), histogram.nonzero()[:, 0].tolist()
    buckets = range(filled[0], filled[-1] + 1) if filled else ()
    return tuple((edges[b], edges[b + 1], int(histogram[b])) for b in buckets)


def _quantiles(histogram: Tensor) -> tuple[tuple[float, float], ...]:
    """Quantiles of the activations, interpolated within their buckets on the logarithmic scale."""
    total = float(histogram.sum())
    if not total:
        return ()
    cumulative = histogram.double().cumsum(0)
    edges = histogram_edges().log2()
    quantiles = []
    for share in QUANTILES:
        b = min(int(torch.searchsorted(cumulative, share * total)), N_BUCKETS - 1)
        fraction = 1 - (float(cumulative[b]) - share * total) / float(histogram[b])
        quantiles.append((share, float(torch.exp2(edges[b] + fraction * (edges[b + 1] - edges[b])))))
    return tuple(quantiles)
