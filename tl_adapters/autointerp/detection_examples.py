"""Trials of a description: examples to describe a feature from, and excerpts of other documents to test it on.

Laws: no document is in both; each token that is to be passed over stands in the region of the trace of one firing, as
near to its position as the documents drawn have one; none of them is known to fire, or likely to.

A store knows a sample of the firings only, so how likely a token is to fire unknown to it is estimated from the sample:
the feature's unknown firings, times the share of its sample on tokens of that type in that region, over how many such
tokens there are. For a type that the sample lacks, the share of firings on all such types is that of types seen once
(Good and Turing), spread over the region. A feature that always fires on "=" is so never asked to pass over an "=";
one that does so at times may be. Features that keep to positions fire more often there than this says: on adapters
trained on the built-in pair, 1.3 % of the others were expected to fire and 2.6 % did (423 of 16,020).
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
from tl_adapters.autointerp.prompts import excerpt_at
from tl_adapters.features.feature import Example, Feature
from tl_adapters.features.store import FeatureStore
from tl_adapters.utils.share_intervals import share_interval

DESCRIBING = 8
"""Strongest examples to describe from, and as many random ones."""
TESTED, FEWEST = 10, 4
"""Firings to test on, and as many others; with fewer than the latter a feature is not tested: its score would be one of
a handful of fractions."""
MOST_UNSURE = 0.2
"""A token that fires with more chance than this, at the upper end of the estimate's 95 % interval, is not used: every
one that fires after all costs a right description a point."""
DOCUMENTS_DRAWN = 64
"""Documents in which a token like a firing is looked for."""
NEAR = (4, 0.1)
"""Near enough to stop looking: so many tokens from the firing's position, or that share of it."""


@dataclass(frozen=True)
class DetectionExample:
    """What a feature is described from, and what the description is tested on."""

    feature: Feature
    """The feature."""
    describing: tuple[Example, ...]
    """Examples to describe from, in a random order."""
    excerpts: tuple[Example, ...]
    """Firings and others, shuffled; in each one token is asked about."""
    fires: tuple[bool, ...]
    """Which of them are firings."""
    matched: tuple[int, ...]
    """For each excerpt the place, among them, of its counterpart: a firing's other, an other's firing."""
    unsure: float
    """Expected share of the others on which the feature fires unknown to the store."""


class TokenCounts:
    """How often each token stands in each region of a store's documents."""

    def __init__(self, store: FeatureStore) -> None:
        documents, self.width = store.part.documents, len(store.vocabulary)
        pairs, counts = (documents.region.long() * self.width + documents.tokens.long()).unique(return_counts=True)
        self._counts = dict(zip(pairs.tolist(), counts.tolist(), strict=True))

    def of(self, region: int, token: int) -> int:
        """Tokens of that id in the region of that number."""
        return self._counts.get(region * self.width + token, 0)


def detection_examples_of(
    store: FeatureStore, ids: Iterable[FeatureId], seed: int = 0
) -> Iterator[DetectionExample | str]:
    """A trial of each feature, or why there can be none."""
    counts = TokenCounts(store)
    for feature in store.features(ids):
        yield trial_of(store, feature, counts, seed)


def trial_of(store: FeatureStore, feature: Feature, counts: TokenCounts, seed: int = 0) -> DetectionExample | str:
    """A trial of one feature, or why there can be none; the same for the same seed."""
    generator = random.Random(f"{seed} {feature.kind} {feature.name}")
    documents = sorted({example.document for example in feature.random_examples})
    generator.shuffle(documents)
    testing = set(documents[: (len(documents) + 1) // 2])
    positives = _spread([e for e in feature.random_examples if e.document in testing], TESTED)
    describing = _describing(feature, testing, generator)
    if len(positives) < FEWEST or not describing:
        return "too few firings, or in too few documents"
    others = Others(store, feature, counts, {e.document for e in describing} | set(documents) - testing, testing)
    found = [(positive, other) for positive in positives if (other := others.like(positive, generator)) is not None]
    if len(found) < FEWEST:
        return "too few tokens like its firings on which it does not fire"
    both = [positive for positive, _ in found] + [other for _, other in found]
    order = list(range(len(both)))
    generator.shuffle(order)
    place = {which: i for i, which in enumerate(order)}
    return DetectionExample(
        feature,
        tuple(describing),
        tuple(both[i] for i in order),
        tuple(i < len(found) for i in order),
        tuple(place[(i + len(found)) % len(both)] for i in order),
        sum(others.chance(*others.type_of(other))[0] for _, other in found) / len(found),
    )


def _describing(feature: Feature, testing: set[int], generator: random.Random) -> list[Example]:
    top = [e for e in feature.top_examples if e.document not in testing][:DESCRIBING]
    seen = {(e.document, e.position) for e in top}
    rest = [e for e in feature.random_examples if e.document not in testing and (e.document, e.position) not in seen]
    chosen = [*top, *generator.sample(rest, min(DESCRIBING, len(rest)))]
    generator.shuffle(chosen)
    return chosen


def _spread(examples: Sequence[Example], n: int) -> list[Example]:
    """At most n of them, evenly over the strengths from the strongest to the weakest."""
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


class Others:
    """Tokens like a feature's firings on which it does not fire, as far as the store knows.

    Args:
        away: documents that none is taken from.
        used: documents that come last; those that tokens were taken from are added.
    """

    def __init__(
        self, store: FeatureStore, feature: Feature, counts: TokenCounts, away: set[int], used: set[int]
    ) -> None:
        self.store, self.feature, self.counts, self.away, self.used = store, feature, counts, away, set(used)
        self.known = known_firings(feature)
        self.unknown = max(0, feature.firings - len(self.known))
        self.n = len(feature.random_examples)
        self.types = Counter(self.type_of(e) for e in feature.random_examples)
        self.once = sum(count == 1 for count in self.types.values())
        self._odd: dict[int, tuple[bool, Tensor]] = {}

    def like(self, positive: Example, generator: random.Random) -> Example | None:
        """A token in the region of a firing, as near to its position as one of the documents drawn has it."""
        n = self.store.documents
        code, at = self.type_of(positive)[0], positive.position
        near = max(NEAR[0], NEAR[1] * at)
        likely, odd = self._odd_types(code)
        if likely and not len(odd):
            return None
        drawn = [d for d in generator.sample(range(n), min(n, 2 * DOCUMENTS_DRAWN)) if d not in self.away]
        best: tuple[int, int, int] | None = None
        for document in sorted(drawn, key=lambda d: d in self.used)[:DOCUMENTS_DRAWN]:
            places = self.unlikely(document, code)
            nearest = places[(places - at).abs().argsort(stable=True)].tolist()
            free = next((p for p in nearest if (document, p) not in self.known), None)
            if free is not None and (best is None or abs(free - at) < best[0]):
                best = (abs(free - at), document, free)
            if best is not None and best[0] <= near:
                break
        if best is None:
            return None
        self.used.add(best[1])
        self.known.add(best[1:])  # none twice
        return excerpt_at(self.store, *best[1:])

    def chance(self, region: int, token: int) -> tuple[float, float]:
        """Chance that the feature fires on a token of this type in this region, unknown to the store.

        The estimate, and the upper end of its interval.
        """
        if (region, token) in self.types:
            hits, share, tokens = self.types[region, token], 1.0, self.counts.of(region, token)
        else:
            name = self.store.about.regions[region]
            hits, share, tokens = self.once, self.feature.region_share[name], self.store.region_tokens[name]
        scale = self.unknown * share / tokens
        return min(1.0, scale * hits / self.n), min(1.0, scale * share_interval(hits, self.n)[1])

    def unlikely(self, document: int, region: int) -> Int[Tensor, "n"]:
        """Positions in a region of a document on which the feature is not likely to fire."""
        documents = self.store.part.documents
        start, stop = documents.start[document : document + 2].tolist()
        likely, odd = self._odd_types(region)
        unlikely = torch.isin(documents.tokens[start:stop], odd, invert=not likely)
        return ((documents.region[start:stop] == region) & unlikely).nonzero()[:, 0]

    def _odd_types(self, region: int) -> tuple[bool, Int[Tensor, "n"]]:
        """Is the feature likely to fire on types that its sample lacks, and the types of which the contrary holds."""
        if region not in self._odd:
            likely = self.chance(region, -1)[1] > MOST_UNSURE
            seen = [token for where, token in self.types if where == region]
            odd = [token for token in seen if (self.chance(region, token)[1] > MOST_UNSURE) != likely]
            self._odd[region] = likely, torch.tensor(odd, dtype=torch.int32)
        return self._odd[region]

    def type_of(self, example: Example) -> tuple[int, int]:
        """Number of the region, and id, of the token that an example was chosen for."""
        return self.store.about.regions.index(self.store.region_of(example)), example.token_ids[example.token_index]
