"""Labels of features by rules that need no model.

Four rules are tested on every feature, and its label lists each one that holds:

1. *hesitation*: it raises or lowers a hesitation word (`data.hesitation_words`) more than the median feature moves any
   token (a smaller effect is enough if it moves no other token more), or it fires mostly on such words.
2. *output*: few tokens take most of its logit effect (high kurtosis), and it moves them more than the median feature
   moves any token.
3. *input*: it fires mostly on few token types, whatever their case and the spaces around them. This is judged on the
   uniform sample of its firings; by the top examples alone, half of all features would be input features.
4. *region*: most of its firings are in one region of the trace, which does not itself make up most of the trace.

The category is the first rule that holds, in this order (`RULE_CATEGORIES`): what a feature does to the text comes
before where it fires, and the more specific before the more general. It is "unlabelled" if no rule holds.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.data.hesitation_words import HESITATION_WORDS
from tl_adapters.data.words import is_word
from tl_adapters.features.feature import Example, Feature, Label
from tl_adapters.features.store import FeatureStore
from tl_adapters.utils.arguments import texts
from tl_adapters.utils.share_intervals import share_interval

RULE_CATEGORIES = ("hesitation", "output", "input", "region", "unlabelled")
"""Categories of the rules. If several rules hold, the first counts."""
RULES_SOURCE = "rules"
"""The `Label.source` of labels by rules."""
MOSTLY_SHARE, MOSTLY_LOWER_BOUND = 0.8, 0.5
"""A feature fires "mostly" on something if at least this share of its firings are on it, and if the share is above the
bound with 97.5 % confidence (4 of 4, 8 of 9, 9 of 11). So a label names what is seen nearly every time, and three
firings are not enough."""
MAX_TOKEN_TYPES = 3
"""Token types that a label names at most, so that it fits in a line."""
MAX_REGION_TOKENS = 0.5
"""A region with a larger share of all tokens is most of the trace, and firing mostly in it says nothing."""
OUTPUT_KURTOSIS = 3.0
"""Excess kurtosis of a Laplace distribution. Random directions have about 0 in a large vocabulary."""
CHANCE_FACTOR = 1.5
"""An effect stands out if it exceeds, by this factor, the largest of as many normal draws (sqrt(2 ln n) standard
deviations: 4.9 for a vocabulary of 152,000),"""
MEDIAN_FACTOR = 2.0
"""and, by this factor, the largest effect of the median feature: where a model uses few tokens of a small vocabulary,
every direction has large effects on some of them."""
MEDIAN_FACTOR_LEADING = 1.5
"""`MEDIAN_FACTOR` for a hesitation word that is the token which a feature raises, or lowers, most: that this token is a
hesitation word is evidence too. (Of 2,000 random directions in the model organism, none was labeled hesitation and 8
were labeled output.)"""
MIN_FEATURES_FOR_MEDIAN = 20
"""With fewer features, effects are not compared with the median feature."""


def label_by_rules(store: FeatureStore, words: Sequence[str] = HESITATION_WORDS) -> dict[FeatureId, Label]:
    """Label every alive feature of a store by rules, and write the labels to the store.

    Features that a model or a person has labeled keep their labels in the store.

    Args:
        store: the store.
        words: hesitation words.

    Returns:
        The rules' labels of all alive features, including those that keep another label.

    Raises ArgumentError where ``words`` is not a sequence of texts, and FeatureStoreError for damaged files.
    """
    labels = rule_labels(store.features(store.ids()), store.region_tokens, words)
    labeled_otherwise = {id for id, label in store.labels.items() if label.source != RULES_SOURCE}
    store.set_labels({id: label for id, label in labels.items() if id not in labeled_otherwise})
    return labels


def rule_labels(
    features: Iterable[Feature], region_tokens: Mapping[str, int], words: Sequence[str] = HESITATION_WORDS
) -> dict[FeatureId, Label]:
    """A label for every feature.

    Args:
        features: all alive features of one store, since effects are compared with the median feature.
        region_tokens: number of tokens by region of the trace, as the store counts them.
        words: hesitation words.
    """
    words = texts(words, "words")
    evidence = [_evidence(feature, region_tokens, words) for feature in features]
    enough = len(evidence) >= MIN_FEATURES_FOR_MEDIAN
    median_effect = median(e.largest_effect for e in evidence) if enough else 0.0
    return {e.id: _label(e, median_effect, words) for e in evidence}


def quoted(token: str) -> str:
    """A token's text in quotation marks and in one line, with what cannot be printed escaped as in JSON."""
    return json.dumps(token, ensure_ascii=not token.isprintable())


@dataclass(frozen=True)
class _Evidence:
    """The properties of one feature that the rules test, so that the whole records are not all in memory at once."""

    id: FeatureId
    fires_on: tuple[str, ...]  # the few token types that make up most of its firings, if there are such
    on_hesitation: bool  # whether it fires mostly on hesitation words
    strongest_on: str  # the token type of most top examples, unless it is in fires_on
    region: str  # the region of most firings, unless it is most of the trace
    effects: tuple[tuple[str, float], ...]  # in standard deviations over the vocabulary; largest first
    kurtosis: float
    chance_effect: float  # an effect above this is not expected by chance

    @property
    def largest_effect(self) -> float:
        return max((abs(effect) for _, effect in self.effects), default=0.0)

    def leads_with(self, words: Sequence[str], sign: float) -> bool:
        """Whether the largest effect of that sign is on one of the words."""
        return any(is_word(token, words) for token, z in [e for e in self.effects if e[1] * sign > 0][:1])


def _evidence(feature: Feature, region_tokens: Mapping[str, int], words: Sequence[str]) -> _Evidence:
    fired_on = [_token(example) for example in feature.random_examples]
    hesitation = [token for token in fired_on if is_word(token, words)]
    on_hesitation = _is_mostly(len(hesitation), len(fired_on))
    fires_on = _types(hesitation)[:MAX_TOKEN_TYPES] if on_hesitation else _few_types(fired_on, MAX_TOKEN_TYPES)
    strongest = _few_types([_token(example) for example in feature.top_examples], 1)
    effects = {word: effect for word, effect in feature.effects.items() if is_word(word, words)}
    effects |= dict(feature.top_logits) | dict(feature.bottom_logits)
    spread = feature.effect_spread or math.inf  # a feature with a decoder row of zeros has no effects
    n_tokens = sum(n for _, _, n in feature.effect_histogram)
    return _Evidence(
        id=feature.id,
        fires_on=tuple(fires_on),
        on_hesitation=on_hesitation,
        strongest_on=strongest[0] if strongest and _type(strongest[0]) not in map(_type, fires_on) else "",
        region=_region(feature, region_tokens),
        effects=tuple(sorted(((t, effect / spread) for t, effect in effects.items()), key=lambda e: -abs(e[1]))),
        kurtosis=feature.effect_kurtosis,
        chance_effect=CHANCE_FACTOR * math.sqrt(2 * math.log(max(n_tokens, 2))),
    )


def _label(evidence: _Evidence, median_effect: float, words: Sequence[str]) -> Label:
    threshold, leading_threshold = (
        max(evidence.chance_effect, factor * median_effect) for factor in (MEDIAN_FACTOR, MEDIAN_FACTOR_LEADING)
    )
    outstanding = [(token, z) for token, z in evidence.effects if abs(z) >= threshold]
    on_words = [
        (token, z)
        for token, z in evidence.effects
        if is_word(token, words)
        and (abs(z) >= threshold or (abs(z) >= leading_threshold and evidence.leads_with(words, z)))
    ]
    concentrated = evidence.kurtosis >= OUTPUT_KURTOSIS
    parts = []
    for verb, sign in (("promotes", 1), ("suppresses", -1)):
        moved = [token for token, z in outstanding if z * sign > 0][:MAX_TOKEN_TYPES] if concentrated else []
        moved += [token for token, z in on_words if z * sign > 0 and token not in moved][:MAX_TOKEN_TYPES]
        if moved:
            parts.append(f"{verb} {', '.join(map(quoted, moved))}")
    if evidence.fires_on:
        parts.append(f"fires on {', '.join(map(quoted, evidence.fires_on))}")
    if evidence.strongest_on:
        parts.append(f"strongest on {quoted(evidence.strongest_on)}")
    if evidence.region:
        parts.append(f"in the region {evidence.region}")
    holds = {
        "hesitation": bool(on_words) or evidence.on_hesitation,
        "output": concentrated and bool(outstanding),
        "input": bool(evidence.fires_on),
        "region": bool(evidence.region),
        "unlabelled": True,
    }
    return Label("; ".join(parts), next(name for name in RULE_CATEGORIES if holds[name]), RULES_SOURCE)


def _is_mostly(hits: int, n: int) -> bool:
    return n > 0 and hits / n >= MOSTLY_SHARE and share_interval(hits, n)[0] > MOSTLY_LOWER_BOUND


def _token(example: Example) -> str:
    return example.tokens[example.token_index]


def _type(token: str) -> str:
    """The type of a token: all spellings of a word are one type, and white space is a type of its own."""
    return token.strip().casefold() or token


def _types(tokens: Sequence[str]) -> list[str]:
    """The commonest spelling of each type, commonest type first."""
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    for token in tokens:
        spellings[_type(token)][token] += 1
    order = sorted(spellings, key=lambda type_: -spellings[type_].total())
    return [spellings[type_].most_common(1)[0][0] for type_ in order]


def _few_types(tokens: Sequence[str], most_types: int) -> list[str]:
    """The commonest types, as few as make up most of the tokens; none if it takes more than ``most_types``."""
    counts = sorted(Counter(map(_type, tokens)).values(), reverse=True)
    enough = (k for k in range(1, most_types + 1) if _is_mostly(sum(counts[:k]), len(tokens)))
    return _types(tokens)[: next(enough, 0)]


def _region(feature: Feature, region_tokens: Mapping[str, int]) -> str:
    """The region that holds most of the firings, unless it is most of the trace; "" if there is none."""
    if not feature.region_share:
        return ""
    region, share = max(feature.region_share.items(), key=lambda item: item[1])
    of_all = region_tokens.get(region, 0) / max(sum(region_tokens.values()), 1)
    mostly = _is_mostly(round(share * feature.firings), feature.firings)
    return region if of_all <= MAX_REGION_TOKENS and mostly else ""
