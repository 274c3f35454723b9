"""Named ways to run a pair: its routes, and routes with features ablated, rescaled, inserted or negated.

A `Variant` is a name and a context manager of a pair, so that one prompt can be completed, or one behavior measured, by
several variants of the same model. Any context manager of a pair can be a variant; these are common ones.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.interventions.feature_edits import ablated, feature_indices, gated, inserted, negated, scaled
from tl_adapters.models.paired_model import PairedModel

MAX_LISTED_FEATURES = 3
"""The number of features that the name of a variant lists; further ones are counted."""


@dataclass(frozen=True)
class FeatureFactors:
    """A route on which the activation of every feature is multiplied by a factor."""

    route: str
    """A route of `models.routed_mlp.ROUTES`."""
    factors: tuple[tuple[FeatureId, float], ...] = ()
    """Features, each with its factor."""
    others: float = 1.0
    """The factor of all other features."""
    decoder_bias: bool = True
    """Whether the adapters add their decoder bias."""

    @property
    def unchanged(self) -> bool:
        """Whether all features stay as they are."""
        return not self.factors and self.others == 1

    def by_layer(
        self, adapters: AdapterSet, *, device: torch.device | None = None
    ) -> dict[int, Float[Tensor, "n_features"]]:
        """The factors of all features, of every layer with adapters.

        Args:
            adapters: the adapters that the features belong to.
            device: where the factors are moved, all at once.

        Raises ArgumentError, InterventionError and ForeignFeaturesError as `feature_edits.feature_indices` does.
        """
        feature_indices(adapters, [feature for feature, _ in self.factors])
        layers = adapters.layer_indices
        rows = torch.full((len(layers), adapters.n_features), self.others)
        for feature, factor in self.factors:
            rows[layers.index(feature[0]), feature[1]] = factor
        return dict(zip(layers, rows.to(device), strict=True))

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that another route, or other factors, do not have."""
        factors = sorted({(tuple(feature), factor) for feature, factor in self.factors})
        return _digest([self.route, factors, self.others, self.decoder_bias])


@dataclass(frozen=True)
class Variant:
    """One way to run a pair."""

    name: str
    """The name under which results are shown."""
    entered: Callable[[PairedModel], AbstractContextManager[Any]]
    """A function of a pair that returns the context manager within which the pair's model is this variant."""
    factors: FeatureFactors | None = None
    """The same as factors of features, by which another engine can compute it; None where it is not of this kind."""

    @property
    def slug(self) -> str:
        """The name without characters that the name of a folder or of a served model cannot hold."""
        return re.sub(r"[^\w.+-]+", "-", self.name).strip("-")

    def named_apart(self) -> Variant:
        """The same variant with a name that is unique to its features, also where it does not list all of them."""
        features = sorted({tuple(feature) for feature, _ in self.factors.factors}) if self.factors else []
        if len(features) <= MAX_LISTED_FEATURES:
            return self
        return replace(self, name=f"{self.name} ({_digest(features)})")


def on_route(route: str) -> Variant:
    """A route (`models.routed_mlp.ROUTES`) without changes."""
    return Variant(route, lambda pair: pair.routed(route), FeatureFactors(route))


def without(features: Sequence[FeatureId]) -> Variant:
    """The replacement with ``features`` ablated."""
    return Variant(
        f"replacement without {_listed(features)}",
        _replacement(lambda pair: ablated(pair, features)),
        FeatureFactors("replacement", _each(features, 0.0)),
    )


def rescaled(features: Sequence[FeatureId], factor: float) -> Variant:
    """The replacement with ``features`` multiplied by ``factor``."""
    return Variant(
        f"replacement with {factor:g} x {_listed(features)}",
        _replacement(lambda pair: scaled(pair, features, factor)),
        FeatureFactors("replacement", _each(features, factor)),
    )


def with_only(features: Sequence[FeatureId], strength: float = 1.0) -> Variant:
    """The hybrid with ``strength`` times ``features`` added, and nothing else of the adapters."""
    return Variant(
        f"hybrid with only {'' if strength == 1 else f'{strength:g} x '}{_listed(features)}",
        lambda pair: inserted(pair, features, strength),
        FeatureFactors("replacement", _each(features, strength), others=0.0, decoder_bias=False),
    )


def with_negated(features: Sequence[FeatureId]) -> Variant:
    """The target with half of the contribution of ``features`` subtracted from its MLPs (`feature_edits.negated`)."""
    return Variant(
        f"target less {_listed(features)}",
        lambda pair: negated(pair, features),
        FeatureFactors("target+adapter", _each(features, -0.5), others=0.0, decoder_bias=False),
    )


def multiplied(name: str, factors: FeatureFactors) -> Variant:
    """A variant of any factors."""

    def entered(pair: PairedModel) -> Any:
        gates = factors.by_layer(pair.installed_adapters(), device=pair.device)
        return gated(pair, gates, factors.route, factors.decoder_bias)

    return Variant(name, entered, factors)


def _each(features: Sequence[FeatureId], factor: float) -> tuple[tuple[FeatureId, float], ...]:
    return tuple((feature, factor) for feature in features)


def _digest(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:8]


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
