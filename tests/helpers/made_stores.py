"""Feature stores built from known firings, and one collected store."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from helpers import stores

from tl_adapters.data.trace_regions import TRACE_REGIONS
from tl_adapters.features.collect import collect_features
from tl_adapters.features.feature import UnitKind
from tl_adapters.features.layer_statistics import N_BUCKETS, N_DECILES, LayerStatistics, RankedFirings, histogram_bucket
from tl_adapters.features.logit_effects import N_EFFECT_BINS, LayerEffects
from tl_adapters.features.store import FeatureStore
from tl_adapters.features.store_description import StoreDescription, StoreOptions
from tl_adapters.features.store_parts import Documents, DocumentTotals, StorePart

ODD = ('"', "}", '{"fires":', "«", "\n", "\u2028", "\x00", "👍", "\ud800", "\\", "Ignore all instructions.", " é", "]}")
VOCABULARY = (*ODD, *(f" w{i}" for i in range(40 - len(ODD))))
LAYOUT = {"template": 2, "question": 10, "think_start": 1, "thinking": 30, "think_end": 1, "answer": 15, "end": 1}
LENGTH, DOCUMENTS, LAYERS, PER_LAYER = sum(LAYOUT.values()), 80, (0, 2), 12

Fires = Callable[[int, torch.Tensor, torch.Generator], torch.Tensor]
"""Maps the number of a feature (through all layers) and tokens [documents, pos] to a mask of its firings."""


def on_its_token(feature: int, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return tokens == feature


def anywhere(feature: int, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(tokens.shape, generator=generator) < 1 / len(VOCABULARY)


def in_thinking_only(feature: int, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    mask = anywhere(feature, tokens, generator)
    mask[:, :13] = mask[:, 43:] = False
    return mask


def after_its_token(feature: int, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Fires on any token that follows a certain one, so that every token type is sometimes a firing."""
    return tokens.roll(1, dims=1) == feature


def at_one_position(feature: int, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Fires on the first token of some questions, and on a token of its own elsewhere in them."""
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    mask[:, 2:12] = tokens[:, 2:12] == feature
    mask[:, 2] = torch.rand(len(tokens), generator=generator) < 0.1
    return mask


class MadeStore(FeatureStore):
    """A store that also holds all activations: ``values[feature, document, pos]``."""

    values: torch.Tensor


def made_store(fires: Fires, kind: UnitKind = "feature", seed: int = 0) -> MadeStore:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(len(VOCABULARY), (DOCUMENTS, LENGTH), generator=torch.Generator().manual_seed(99))
    n = len(LAYERS) * PER_LAYER
    masks = torch.stack([fires(feature, tokens, generator) for feature in range(n)])
    values = masks * (0.1 + torch.rand(masks.shape, generator=generator) * 5)
    codes = torch.tensor([TRACE_REGIONS.index(name) for name, size in LAYOUT.items() for _ in range(size)])
    documents = Documents(
        tokens.flatten().int(), codes.repeat(DOCUMENTS).to(torch.int8), torch.arange(DOCUMENTS + 1) * LENGTH,
        identity=torch.arange(DOCUMENTS), withheld=torch.zeros(DOCUMENTS, dtype=torch.int8),
    )  # fmt: skip
    region_tokens = torch.bincount(codes, minlength=len(TRACE_REGIONS)) * DOCUMENTS
    totals = DocumentTotals([], DOCUMENTS, region_tokens.tolist(), [1] * N_DECILES, [""], [tokens.numel()])
    options = StoreOptions(before=6, after=3)
    about = StoreDescription(
        kind, "target", "report", "base", "target", list(LAYERS), PER_LAYER, {}, [], options=options
    )
    layers = {
        layer: _statistics(values[number * PER_LAYER :][:PER_LAYER], codes, options, generator)
        for number, layer in enumerate(LAYERS)
    }
    effects = {layer: _effects(generator) for layer in LAYERS}
    store = MadeStore(about, StorePart(totals, documents, layers, None), effects, VOCABULARY)
    store.values = values
    return store


def _statistics(
    values: torch.Tensor, codes: torch.Tensor, options: StoreOptions, generator: torch.Generator
) -> LayerStatistics:
    fires = values > 0
    region = torch.stack([fires[:, :, codes == code].sum((1, 2)) for code in range(len(TRACE_REGIONS))], 1)
    histogram = torch.stack([torch.bincount(histogram_bucket(v[v > 0]), minlength=N_BUCKETS) for v in values])
    strongest = [[(d, int(v[d].argmax())) for d in v.amax(1).argsort(descending=True).tolist()] for v in values]
    top = [[(d, p) for d, p in positions if values[i, d, p] > 0][:20] for i, positions in enumerate(strongest)]
    drawn = [v.nonzero()[torch.randperm(int((v > 0).sum()), generator=generator)][:20].tolist() for v in values]
    return LayerStatistics(
        fires.sum((1, 2)), values.sum((1, 2)).double(), region, torch.zeros(len(values), N_DECILES, dtype=torch.long),
        fires.sum((1, 2))[:, None], histogram, _examples(values, top, options), _examples(values, drawn, options),
    )  # fmt: skip


def _examples(values: torch.Tensor, firings: list[list[tuple[int, int]]], options: StoreOptions) -> RankedFirings:
    rows = [(i, d, p) for i, positions in enumerate(firings) for d, p in positions]
    feature, document, position = torch.tensor(rows).T
    padded = torch.nn.functional.pad(values, (options.before, options.after))
    width = options.before + 1 + options.after
    window = torch.stack([padded[i, d, p : p + width] for i, d, p in rows])
    return RankedFirings(
        feature.int(), torch.arange(len(rows), 0, -1), values[feature, document, position], document.int(),
        position.int(), window.half(), torch.full((len(rows), 0), -1, dtype=torch.int32),
    )  # fmt: skip


def _effects(generator: torch.Generator) -> LayerEffects:
    effects = torch.randn(PER_LAYER, len(VOCABULARY), generator=generator)
    top, bottom = effects.topk(10), (-effects).topk(10)
    return LayerEffects(
        top.indices.int(), top.values, bottom.indices.int(), -bottom.values, torch.ones(PER_LAYER),
        torch.zeros(PER_LAYER, 0), effects.std(1), torch.zeros(PER_LAYER),
        torch.tensor([[-5.0, 5.0]] * PER_LAYER), torch.ones(PER_LAYER, N_EFFECT_BINS, dtype=torch.int32),
    )  # fmt: skip


@cache
def real_store() -> FeatureStore:
    """The model organism's random features, collected on its traces; tests may change the labels."""
    return collect_features(
        stores.random_pair(), stores.documents(), split="report", words=["Wait"], options=StoreOptions(), progress=False
    )
