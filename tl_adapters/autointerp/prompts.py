"""Features and stretches of documents as a judge reads them: JSON, in which no token can be mistaken for a mark.

A unit's number, layer and kind are never shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from tl_adapters.autointerp.endpoint import Messages
from tl_adapters.features.feature import Example, Feature
from tl_adapters.features.store import FeatureStore

STRENGTHS = 10
"""Activations are told as whole numbers from 1 to this, the unit's largest."""


def firing_excerpt(example: Example, largest: float) -> list[str | dict[str, str | int]]:
    """A stretch of text with every run of tokens on which the feature fires as an object, and how strongly it does.

    A character that several tokens spell fires as strongly as the strongest of them.
    """
    texts = example.texts
    pieces = [("".join(texts[s]), max(example.values[s])) for s in _characters(texts)]
    found: list[str | dict[str, str | int]] = []
    for fires, run in groupby(pieces, key=lambda piece: piece[1] > 0):
        tokens, values = zip(*run, strict=True)
        text = "".join(tokens)
        strength = math.ceil(STRENGTHS * max(values) / largest) if fires else 0
        found.append({"fires": text, "strength": max(1, min(STRENGTHS, strength))} if fires else text)
    return found


def asked_excerpt(example: Example) -> dict[str, str]:
    """A stretch of text with one token apart, which says nothing of whether a feature fires on it.

    Where several tokens spell one character, that character stands apart.
    """
    texts = example.texts
    here = next(s for s in _characters(texts) if s.start <= example.token_index < s.stop)
    before, token, after = texts[: here.start], texts[here], texts[here.stop :]
    return {"before": "".join(before), "token": "".join(token), "after": "".join(after)}


def _characters(texts: Sequence[str]) -> list[slice]:
    """The tokens in groups that spell whole characters: what goes on with a character joins the token before."""
    starts = [i for i, text in enumerate(texts) if text or i == 0]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(texts)], strict=True)]


def profile(feature: Feature, examples: Sequence[Example]) -> dict[str, Any]:
    """What a judge is shown of a feature: examples, the tokens it moves, and where in a trace it fires."""
    return {
        "excerpts": [firing_excerpt(example, feature.max) for example in examples],
        "raises_the_probability_of": [token for token, effect in feature.top_logits if effect > 0],
        "lowers_the_probability_of": [token for token, effect in feature.bottom_logits if effect < 0],
        "fires_on_percent_of_all_tokens": _percent(feature.density),
        "percent_of_its_firings_by_part_of_the_text": {r: _percent(share) for r, share in feature.region_share.items()},
        "fires_on_percent_of_tokens_by_subject": {name: _percent(share) for name, share in feature.domains.items()},
    }


def excerpt_at(store: FeatureStore, document: int, position: int) -> Example:
    """The stretch of a document around a token, as wide as the store's examples; no activation in it is known."""
    documents, options = store.part.documents, store.about.options
    start, stop = documents.start[document : document + 2].tolist()
    first, last = max(0, position - options.before), min(stop - start, position + options.after + 1)
    ids = tuple(documents.tokens[start + first : start + last].tolist())
    tokens = tuple(store.vocabulary[token] for token in ids)
    return Example(tokens, ids, (0.0,) * len(ids), position - first, document, position)


def question(task: str, shown: Any) -> Messages:
    """What is asked: the task in words, and what it is about as JSON (with what UTF-8 cannot hold replaced)."""
    content = json.dumps(shown, ensure_ascii=False).encode("utf-8", "replace").decode("utf-8")
    return [{"role": "system", "content": task}, {"role": "user", "content": content}]


def _percent(share: float) -> float:
    return float(f"{100 * share:.2g}")
