"""What features are called by rules that need no model.

Four questions are asked of every feature, and its label says each "yes":

1. *hesitation*: does it raise or lower a hesitation word (vocabulary.py) more than an ordinary feature moves any token
   (somewhat less is enough where it moves no other token more), or fire mostly on such words?
2. *output*: do few tokens take its effect on the logits (kurtosis), and does it move them more than an ordinary
   feature moves any?
3. *input*: does it fire mostly on few token types, whatever their case and the spaces around them? Judged on the
   uniform sample of its firings: the strongest alone would call half of all features that.
4. *region*: are most of its firings in one region of the trace, which is not itself most of the trace?

The category is the first of these that holds, in this order (`CATEGORIES`): what a feature does to the text comes
before where it fires, and the more special before the more general. "unlabelled" if none does.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.data.hesitation_words import HESITATION_WORDS
from tl_adapters.data.words import is_word
from tl_adapters.features.feature import Example, Feature, Label
from tl_adapters.features.store import FeatureStore
from tl_adapters.utils.arguments import texts
from tl_adapters.utils.bootstrap import bootstrap_strata
from tl_adapters.utils.measurement import Estimate, Measurement
from tl_adapters.utils.share_intervals import share, share_interval

CATEGORIES = ("hesitation", "output", "input", "region", "unlabelled")
"""Categories of the rules; of several that hold the first counts."""
SOURCE = "rules"
"""Who gave these labels."""
MOSTLY_SHARE, MOSTLY_LOWER_BOUND = 0.8, 0.5
"""Mostly: this share of the firings, and more than half of them with 97.5 % confidence (four of four, 8 of 9, 9 of 11):
a label names what one sees nearly every time, and three firings prove nothing."""
FEW = 3
"""Token types that a label names: more than three are no "few" that one can say in a line."""
REGION_MOST = 0.5
"""A region with more of all tokens than this is most of the trace: firing there is no property."""
OUTPUT_KURTOSIS = 3.0
"""Excess kurtosis of a Laplace distribution. A direction that means nothing has about 0 in a large vocabulary."""
OVER_CHANCE = 1.5
"""Effects stand out if they are larger, by this factor, than the largest of as many normal draws (sqrt(2 ln n) standard
deviations: 4.9 for a vocabulary of 152,000)."""
OVER_ORDINARY = 2.0
"""And larger, by this factor, than the largest effect of the median feature: few tokens of a small vocabulary may be in
use at all, and then every direction moves some of them much."""
OVER_ORDINARY_LEADING = 1.5
"""The same for a hesitation word that is what a feature raises, or lowers, most of all: that of all tokens it is one of
these words is evidence too. (Of 2,000 directions that mean nothing in the built-in pair, none was called hesitation
and 8 output.)"""
POPULATION = 20
"""Features without which no median is taken."""


def label_by_rules(store: FeatureStore, words: Sequence[str] = HESITATION_WORDS) -> dict[FeatureId, Label]:
    """Label every alive feature of a store by rules and write it there; what a model or a person gave is kept.

    Returns the rules' labels, also of those that keep another one.
    """
    found = rule_labels(store.features(store.ids()), store.region_tokens, words)
    others = {id for id, label in store.labels.items() if label.source != SOURCE}
    store.set_labels({id: label for id, label in found.items() if id not in others})
    return found


def rule_labels(
    features: Iterable[Feature], region_tokens: Mapping[str, int], words: Sequence[str] = HESITATION_WORDS
) -> dict[FeatureId, Label]:
    """A label for every feature. Give all alive ones at once: what is ordinary is measured on them.

    Args:
        features: of one store.
        region_tokens: region of the trace to its tokens, as the store counts them.
        words: what counts as hesitation.
    """
    words = texts(words, "words")
    found = [_evidence(feature, region_tokens, words) for feature in features]
    ordinary = median(evidence.strongest for evidence in found) if len(found) >= POPULATION else 0.0
    return {evidence.id: _label(evidence, ordinary, words) for evidence in found}


def quoted(token: str) -> str:
    """A token's text in quotation marks, in one line, with everything odd in it escaped as in JSON."""
    return json.dumps(token, ensure_ascii=not token.isprintable())


@dataclass(frozen=True)
class _Evidence:
    """What the rules need to know of one feature, so that not all of every feature is held at once."""

    id: FeatureId
    fires_on: tuple[str, ...]
    on_hesitation: bool
    strongest_on: str
    region: str
    effects: tuple[tuple[str, float], ...]  # in standard deviations over the vocabulary; largest first
    kurtosis: float
    chance: float

    @property
    def strongest(self) -> float:
        return max((abs(effect) for _, effect in self.effects), default=0.0)

    def leads(self, sign: float, words: Sequence[str]) -> bool:
        """Is the strongest effect of that sign one on a hesitation word?"""
        return any(is_word(token, words) for token, z in [e for e in self.effects if e[1] * sign > 0][:1])


def _evidence(feature: Feature, region_tokens: Mapping[str, int], words: Sequence[str]) -> _Evidence:
    fired = [_token(example) for example in feature.random_examples]
    hesitating = [token for token in fired if is_word(token, words)]
    on_hesitation = _most(len(hesitating), len(fired))
    fires_on = _types(hesitating)[:FEW] if on_hesitation else _few_types(fired, FEW)
    strongest = _few_types([_token(example) for example in feature.top_examples], 1)
    effects = {word: effect for word, effect in feature.effects.items() if is_word(word, words)}
    effects |= dict(feature.top_logits) | dict(feature.bottom_logits)
    spread = feature.effect_spread or math.inf  # what writes nothing moves nothing
    n_tokens = sum(n for _, _, n in feature.effect_histogram)
    return _Evidence(
        feature.id,
        tuple(fires_on),
        on_hesitation,
        strongest[0] if strongest and _kind(strongest[0]) not in map(_kind, fires_on) else "",
        _region(feature, region_tokens),
        tuple(sorted(((token, effect / spread) for token, effect in effects.items()), key=lambda e: -abs(e[1]))),
        feature.effect_kurtosis,
        OVER_CHANCE * math.sqrt(2 * math.log(max(n_tokens, 2))),
    )


def _label(evidence: _Evidence, ordinary: float, words: Sequence[str]) -> Label:
    high, enough = (max(evidence.chance, over * ordinary) for over in (OVER_ORDINARY, OVER_ORDINARY_LEADING))
    standing_out = [(token, z) for token, z in evidence.effects if abs(z) >= high]
    hesitating = [
        (token, z)
        for token, z in evidence.effects
        if is_word(token, words) and (abs(z) >= high or (abs(z) >= enough and evidence.leads(z, words)))
    ]
    concentrated = evidence.kurtosis >= OUTPUT_KURTOSIS
    parts = []
    for verb, sign in (("promotes", 1), ("suppresses", -1)):
        moved = [token for token, z in standing_out if z * sign > 0][:FEW] if concentrated else []
        moved += [token for token, z in hesitating if z * sign > 0 and token not in moved][:FEW]
        if moved:
            parts.append(f"{verb} {', '.join(map(quoted, moved))}")
    if evidence.fires_on:
        parts.append(f"fires on {', '.join(map(quoted, evidence.fires_on))}")
    if evidence.strongest_on:
        parts.append(f"strongest on {quoted(evidence.strongest_on)}")
    if evidence.region:
        parts.append(f"in the region {evidence.region}")
    holds = {
        "hesitation": bool(hesitating) or evidence.on_hesitation,
        "output": concentrated and bool(standing_out),
        "input": bool(evidence.fires_on),
        "region": bool(evidence.region),
        "unlabelled": True,
    }
    return Label("; ".join(parts), next(name for name in CATEGORIES if holds[name]), SOURCE)


def _most(hits: int, n: int) -> bool:
    return n > 0 and hits / n >= MOSTLY_SHARE and share_interval(hits, n)[0] > MOSTLY_LOWER_BOUND


def _token(example: Example) -> str:
    return example.tokens[example.token_index]


def _kind(token: str) -> str:
    """Spellings of one word are one type; what is only space is itself."""
    return token.strip().casefold() or token


def _types(tokens: Sequence[str]) -> list[str]:
    """The commonest spelling of each type, commonest type first."""
    spelled: dict[str, Counter[str]] = defaultdict(Counter)
    for token in tokens:
        spelled[_kind(token)][token] += 1
    order = sorted(spelled, key=lambda kind: -spelled[kind].total())
    return [spelled[kind].most_common(1)[0][0] for kind in order]


def _few_types(tokens: Sequence[str], few: int) -> list[str]:
    """The commonest types, as few of them as make most of the tokens; none if it takes more than ``few``."""
    counts = sorted(Counter(map(_kind, tokens)).values(), reverse=True)
    enough = (k for k in range(1, few + 1) if _most(sum(counts[:k]), len(tokens)))
    return _types(tokens)[: next(enough, 0)]


def _region(feature: Feature, region_tokens: Mapping[str, int]) -> str:
    if not feature.region_share:
        return ""
    region, share = max(feature.region_share.items(), key=lambda item: item[1])
    of_all = region_tokens.get(region, 0) / max(sum(region_tokens.values()), 1)
    return region if of_all <= REGION_MOST and _most(round(share * feature.firings), feature.firings) else ""


@dataclass(frozen=True)
class CategoryShare:
    """How many features are of one category."""

    count: int
    """Labelled features of it."""
    share: Measurement
    """Of the labelled features; a share's interval."""
    weighted: Measurement
    """Of all alive features: each layer's share, weighted by its alive features; bootstrap within layers."""
    by_layer: dict[int, float]
    """Layer to the share of its labelled features."""


def label_shares(
    labels: Mapping[FeatureId, Label],
    alive: Iterable[FeatureId],
    categories: Sequence[str] = CATEGORIES,
    *,
    split: str = "",
    seed: int = 0,
) -> dict[str, CategoryShare]:
    """Share of each of ``categories`` among alive features, of labels of all or of some of them.

    Intervals take features as draws from what another training would have found. A bootstrap of none is certain of
    none: where a category has no feature, or all, its weighted interval is a share's, for the number of features that
    weights as unequal are worth (one over the sum of weight squared over number). A layer without a labelled feature
    takes no part. Labels of other categories do not count; empty where none does.
    """
    alive = set(alive)
    n_alive = Counter(id.layer for id in alive)
    given: dict[int, list[str]] = defaultdict(list)
    for id, label in labels.items():
        if id in alive and label.category in categories:
            given[id.layer].append(label.category)
    layers = sorted(given)
    return {c: _share(c, {la: given[la] for la in layers}, n_alive, split, seed) for c in categories if layers}


def _share(
    category: str, given: Mapping[int, Sequence[str]], n_alive: Mapping[int, int], split: str, seed: int
) -> CategoryShare:
    hits = {layer: torch.tensor([float(c == category) for c in found]) for layer, found in given.items()}
    weights = [n_alive[layer] for layer in given]
    count, n = sum(int(h.sum()) for h in hits.values()), sum(map(len, given.values()))
    weighted = bootstrap_strata(list(hits.values()), weights, seed)
    if count in (0, n):
        worth = sum(weights) ** 2 / sum(w * w / len(h) for w, h in zip(weights, hits.values(), strict=True))
        value = float(count > 0)
        weighted = Estimate(value, *share_interval(value * worth, worth))
    return CategoryShare(
        count,
        share(count, n).measurement(n, "share of labelled features", split),
        weighted.measurement(n, "share of alive features", split),
        {layer: float(h.mean()) for layer, h in hits.items()},
    )
