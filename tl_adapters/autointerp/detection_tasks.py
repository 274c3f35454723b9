"""Draws the examples that a feature is explained from, and the excerpts of other documents that test the explanation.

Invariants: no document is used for both; each negative (a token on which the feature does not fire) lies in the trace
region of one firing, as near to its position as the documents searched allow; no negative is known to be a firing, or
likely to be one.

A store holds a sample of the firings only. How likely it is that a token is a firing that the store does not hold is
estimated from the sample: the number of unknown firings, times the share of the sample on tokens of that type in that
region, divided by the number of such tokens. For types that the sample lacks, the share of firings on all of them
together is that of types seen once (the Good-Turing estimate), spread over the region. So a feature that always fires
on "=" never has an "=" among its negatives; a feature that does so at times may. Features that depend on position fire
more often on negatives than this estimate says: on adapters trained on the model organism, 1.3 % of the negatives were
expected to be firings and 2.6 % were (423 of 16,020).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.features.feature import Example, Feature
from tl_adapters.features.store import FeatureStore
from tl_adapters.utils.share_intervals import share_interval

EXPLANATION_EXAMPLES = 8
"""Top activating examples that an explanation is made from, and as many random ones."""
MAX_POSITIVES, MIN_POSITIVES = 10, 4
"""Firings to test on, with as many negatives. A feature with fewer than the minimum is not tested, because its score
could only take a handful of values."""
MAX_FIRING_PROBABILITY = 0.2
"""A token is no negative if the upper end of the 95 % interval of its probability to be a firing exceeds this: each
negative that is a firing after all costs a right explanation a point."""
DOCUMENTS_SEARCHED = 64
"""Documents in which a negative for one firing is searched."""
NEAR_TOKENS, NEAR_SHARE = 4, 0.1
"""The search for a negative stops within this many tokens of the firing's position, or within this share of it."""


@dataclass(frozen=True)
class DetectionTask:
    """The examples that a feature is explained from, and the excerpts that the explanation is tested on."""

    feature: Feature
    """The feature."""
    explanation_examples: tuple[Example, ...]
    """Examples to explain the feature from, in random order."""
    excerpts: tuple[Example, ...]
    """Firings and negatives, shuffled; the question is about one token of each."""
    fires: tuple[bool, ...]
    """For each excerpt, whether it is a firing."""
    counterpart: tuple[int, ...]
    """For each excerpt, the index of its counterpart: the negative of a firing, or the firing of a negative."""
    expected_firing_negatives: float
    """Expected share of the negatives on which the feature fires although the store does not hold the firing."""


class TokenCounts:
    """How often each token occurs in each trace region of a store's documents."""

    def __init__(self, store: FeatureStore) -> None:
        documents, self._n_vocab = store.part.documents, len(store.vocabulary)
        pairs, counts = (documents.region.long() * self._n_vocab + documents.tokens.long()).unique(return_counts=True)
        self._counts = dict(zip(pairs.tolist(), counts.tolist(), strict=True))

    def of(self, region: int, token: int) -> int:
        """Number of tokens with that id in the region with that number."""
        return self._counts.get(region * self._n_vocab + token, 0)


def detection_tasks(store: FeatureStore, ids: Iterable[FeatureId], seed: int = 0) -> Iterator[DetectionTask | str]:
    """The task of each feature, or the reason why it cannot be tested."""
    counts = TokenCounts(store)
    for feature in store.features(ids):
        yield detection_task(store, feature, counts, seed)


def detection_task(store: FeatureStore, feature: Feature, counts: TokenCounts, seed: int = 0) -> DetectionTask | str:
    """The task of one feature, or the reason why it cannot be tested; the same for the same seed."""
    generator = random.Random(f"{seed} {feature.kind} {feature.name}")
    documents = sorted({example.document for example in feature.random_examples})
    generator.shuffle(documents)
    test_documents = set(documents[: (len(documents) + 1) // 2])
    positives = _spread([e for e in feature.random_examples if e.document in test_documents], MAX_POSITIVES)
    explanation_examples = _explanation_examples(feature, test_documents, generator)
    if len(positives) < MIN_POSITIVES or not explanation_examples:
        return "too few firings, or in too few documents"
    excluded = {e.document for e in explanation_examples} | set(documents) - test_documents
    negatives = NegativeSampler(store, feature, counts, excluded, test_documents)
    matched = [(e, negative) for e in positives if (negative := negatives.matching(e, generator)) is not None]
    if len(matched) < MIN_POSITIVES:
        return "too few tokens like its firings on which it does not fire"
    excerpts = [positive for positive, _ in matched] + [negative for _, negative in matched]
    order = list(range(len(excerpts)))
    generator.shuffle(order)
    index_of = {excerpt: index for index, excerpt in enumerate(order)}
    return DetectionTask(
        feature,
        tuple(explanation_examples),
        tuple(excerpts[i] for i in order),
        tuple(i < len(matched) for i in order),
        tuple(index_of[(i + len(matched)) % len(excerpts)] for i in order),
        sum(negatives.firing_probability(*negatives.type_of(e))[0] for _, e in matched) / len(matched),
    )


def _explanation_examples(feature: Feature, test_documents: set[int], generator: random.Random) -> list[Example]:
    top = [e for e in feature.top_examples if e.document not in test_documents][:EXPLANATION_EXAMPLES]
    in_top = {(e.document, e.position) for e in top}
    rest = [
        e
        for e in feature.random_examples
        if e.document not in test_documents and (e.document, e.position) not in in_top
    ]
    examples = [*top, *generator.sample(rest, min(EXPLANATION_EXAMPLES, len(rest)))]
    generator.shuffle(examples)
    return examples


def _spread(examples: Sequence[Example], n: int) -> list[Example]:
    """At most n examples, evenly spaced in the order from the strongest to the weakest."""
    ordered = sorted(examples, key=lambda e: (-e.values[e.token_index], e.document, e.position))
    if len(ordered) <= n:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (n - 1))] for i in range(n)]


def known_firings(feature: Feature) -> set[tuple[int, int]]:
    """(document, position) of every firing that the feature's examples show."""
    return {
        (e.document, e.position - e.token_index + i)
        for e in (*feature.top_examples, *feature.random_examples)
        for i, value in enumerate(e.values)
        if value > 0
    }


class NegativeSampler:
    """Draws negatives: tokens like a feature's firings on which it does not fire, as far as the store shows.

    Args:
        store: the store of the feature.
        feature: the feature.
        counts: of the store's tokens.
        excluded: documents from which no negative is taken.
        used: documents that are searched last; each document that a negative was taken from is added.
    """

    def __init__(
        self, store: FeatureStore, feature: Feature, counts: TokenCounts, excluded: set[int], used: set[int]
    ) -> None:
        self._store, self._feature, self._counts = store, feature, counts
        self._excluded, self._used = excluded, set(used)
        self._unavailable = known_firings(feature)
        self._n_unknown = max(0, feature.firings - len(self._unavailable))
        self._n_sampled = len(feature.random_examples)
        self._sampled_types = Counter(self.type_of(e) for e in feature.random_examples)
        self._n_seen_once = sum(count == 1 for count in self._sampled_types.values())
        self._exceptions: dict[int, tuple[bool, Tensor]] = {}

    def matching(self, positive: Example, generator: random.Random) -> Example | None:
        """The negative in the region of a firing that is nearest to its position among the documents searched."""
        n_documents = self._store.documents
        region, position = self.type_of(positive)[0], positive.position
        near = max(NEAR_TOKENS, NEAR_SHARE * position)
        likely, exceptions = self._exceptional_types(region)
        if likely and not len(exceptions):
            return None
        sampled = generator.sample(range(n_documents), min(n_documents, 2 * DOCUMENTS_SEARCHED))
        candidates = [document for document in sampled if document not in self._excluded]
        best: tuple[int, int, int] | None = None
        for document in sorted(candidates, key=lambda d: d in self._used)[:DOCUMENTS_SEARCHED]:
            positions = self.unlikely_positions(document, region)
            nearest_first = positions[(positions - position).abs().argsort(stable=True)].tolist()
            nearest = next((p for p in nearest_first if (document, p) not in self._unavailable), None)
            if nearest is not None and (best is None or abs(nearest - position) < best[0]):
                best = (abs(nearest - position), document, nearest)
            if best is not None and best[0] <= near:
                break
        if best is None:
            return None
        self._used.add(best[1])
        self._unavailable.add(best[1:])  # so that no token is drawn twice
        return self._store.excerpt(*best[1:])

    def firing_probability(self, region: int, token: int) -> tuple[float, float]:
        """Probability that a token of this type in this region is a firing that the store does not hold.

        Returns:
            The estimate, and the upper end of its 95 % interval.
        """
        if (region, token) in self._sampled_types:
            hits, share, n_tokens = self._sampled_types[region, token], 1.0, self._counts.of(region, token)
        else:
            name = self._store.about.regions[region]
            hits, share = self._n_seen_once, self._feature.region_share[name]
            n_tokens = self._store.region_tokens[name]
        scale = self._n_unknown * share / n_tokens
        upper = share_interval(hits, self._n_sampled)[1]
        return min(1.0, scale * hits / self._n_sampled), min(1.0, scale * upper)

    def unlikely_positions(self, document: int, region: int) -> Int[Tensor, "n"]:
        """Positions in a region of a document on which the feature is not likely to fire."""
        documents = self._store.part.documents
        span = documents.span(document)
        likely, exceptions = self._exceptional_types(region)
        unlikely = torch.isin(documents.tokens[span], exceptions, invert=not likely)
        return ((documents.region[span] == region) & unlikely).nonzero()[:, 0]

    def _exceptional_types(self, region: int) -> tuple[bool, Int[Tensor, "n"]]:
        """Whether the feature is likely to fire on types that its sample lacks, and the types that are exceptions."""
        if region not in self._exceptions:
            likely = self.firing_probability(region, -1)[1] > MAX_FIRING_PROBABILITY
            in_region = [token for type_region, token in self._sampled_types if type_region == region]
            exceptions = [
                token
                for token in in_region
                if (self.firing_probability(region, token)[1] > MAX_FIRING_PROBABILITY) != likely
            ]
            self._exceptions[region] = likely, torch.tensor(exceptions, dtype=torch.int32)
        return self._exceptions[region]

    def type_of(self, example: Example) -> tuple[int, int]:
        """Number of the region, and id, of the token that an example was chosen for."""
        region = self._store.about.regions.index(self._store.region_of(example))
        return region, example.token_ids[example.token_index]
