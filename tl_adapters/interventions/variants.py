"""Variants of one model: its routes, and routes with features removed, rescaled or inserted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.interventions.feature_edits import ablated, inserted, negated, scaled
from tl_adapters.models.paired_model import PairedModel

MAX_LISTED_FEATURES = 3
"""Features that a variant's name lists; of more it says how many."""


@dataclass(frozen=True)
class Variant:
    """One way to run a pair."""

    name: str
    """What its text is headed with."""
    entered: Callable[[PairedModel], AbstractContextManager[Any]]
    """Of a pair: what to enter, so that its model is this variant."""


def on_route(route: str) -> Variant:
    """A route of `routing.ROUTES` as it is."""
    return Variant(route, lambda pair: pair.routed(route))


def without(features: Sequence[FeatureId]) -> Variant:
    """The replacement with ``features`` off."""
    return Variant(f"replacement without {_listed(features)}", _replacement(lambda pair: ablated(pair, features)))


def rescaled(features: Sequence[FeatureId], factor: float) -> Variant:
    """The replacement with ``features`` firing ``factor`` times as strongly."""
    name = f"replacement with {factor:g} x {_listed(features)}"
    return Variant(name, _replacement(lambda pair: scaled(pair, features, factor)))


def with_only(features: Sequence[FeatureId], strength: float = 1.0) -> Variant:
    """The hybrid with ``features`` added, firing ``strength`` times as strongly, and nothing else of the adapters."""
    name = f"hybrid with only {'' if strength == 1 else f'{strength:g} x '}{_listed(features)}"
    return Variant(name, lambda pair: inserted(pair, features, strength))


def with_negated(features: Sequence[FeatureId]) -> Variant:
    """The target with half of what ``features`` add taken off its MLPs (`interventions.negated`)."""
    return Variant(f"target less {_listed(features)}", lambda pair: negated(pair, features))


def _listed(features: Sequence[FeatureId]) -> str:
    shown = ", ".join(f"{layer}.{index}" for layer, index in features[:MAX_LISTED_FEATURES])
    return shown if len(features) <= MAX_LISTED_FEATURES else f"{shown} and {len(features) - MAX_LISTED_FEATURES} more"


def _replacement(
    change: Callable[[PairedModel], AbstractContextManager[Any]],
) -> Callable[[PairedModel], AbstractContextManager[Any]]:
    @contextmanager
    def entered(pair: PairedModel) -> Iterator[Any]:
        with pair.routed("replacement"), change(pair) as model:
            yield model

    return entered
