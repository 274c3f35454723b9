"""Named ways to run a pair: its routes, and routes with features ablated, rescaled, inserted or negated.

A `Variant` is a name and a context manager of a pair, so that one prompt can be completed, or one behavior measured, by
several variants of the same model. Any context manager of a pair can be a variant; these are common ones.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.interventions.feature_edits import ablated, inserted, negated, scaled
from tl_adapters.models.paired_model import PairedModel

MAX_LISTED_FEATURES = 3
"""The number of features that the name of a variant lists; further ones are counted."""


@dataclass(frozen=True)
class Variant:
    """One way to run a pair."""

    name: str
    """The name under which results are shown."""
    entered: Callable[[PairedModel], AbstractContextManager[Any]]
    """A function of a pair that returns the context manager within which the pair's model is this variant."""

    @property
    def slug(self) -> str:
        """The name without characters that the name of a folder or of a served model cannot hold."""
        return re.sub(r"[^\w.+-]+", "-", self.name).strip("-")

    def named_by(self, features: Iterable[FeatureId]) -> Variant:
        """The same variant with a name that is unique to ``features``, also where it does not list all of them."""
        unique = sorted({FeatureId(*feature) for feature in features})
        if len(unique) <= MAX_LISTED_FEATURES:
            return self
        digest = hashlib.sha256(repr([tuple(feature) for feature in unique]).encode()).hexdigest()[:8]
        return replace(self, name=f"{self.name} ({digest})")


def on_route(route: str) -> Variant:
    """A route (`models.routed_mlp.ROUTES`) without changes."""
    return Variant(route, lambda pair: pair.routed(route))


def without(features: Sequence[FeatureId]) -> Variant:
    """The replacement with ``features`` ablated."""
    return Variant(f"replacement without {_listed(features)}", _replacement(lambda pair: ablated(pair, features)))


def rescaled(features: Sequence[FeatureId], factor: float) -> Variant:
    """The replacement with ``features`` multiplied by ``factor``."""
    name = f"replacement with {factor:g} x {_listed(features)}"
    return Variant(name, _replacement(lambda pair: scaled(pair, features, factor)))


def with_only(features: Sequence[FeatureId], strength: float = 1.0) -> Variant:
    """The hybrid with ``strength`` times ``features`` added, and nothing else of the adapters."""
    name = f"hybrid with only {'' if strength == 1 else f'{strength:g} x '}{_listed(features)}"
    return Variant(name, lambda pair: inserted(pair, features, strength))


def with_negated(features: Sequence[FeatureId]) -> Variant:
    """The target with half of the contribution of ``features`` subtracted from its MLPs (`feature_edits.negated`)."""
    return Variant(f"target less {_listed(features)}", lambda pair: negated(pair, features))


def _listed(features: Sequence[FeatureId]) -> str:
    """The first features as text, and the number of further ones."""
    first = ", ".join(f"{layer}.{index}" for layer, index in features[:MAX_LISTED_FEATURES])
    return first if len(features) <= MAX_LISTED_FEATURES else f"{first} and {len(features) - MAX_LISTED_FEATURES} more"


def _replacement(
    change: Callable[[PairedModel], AbstractContextManager[Any]],
) -> Callable[[PairedModel], AbstractContextManager[Any]]:
    """The replacement route with a change, as a function of a pair that returns the context manager."""

    @contextmanager
    def entered(pair: PairedModel) -> Iterator[Any]:
        with pair.routed("replacement"), change(pair) as model:
            yield model

    return entered
