"""A feature's name: its layer, its index, and, where it is known, the set of adapters that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tl_adapters.errors import UserError


class FeatureId(NamedTuple):
    """One feature of an adapter set. It has a meaning only together with its set: other seeds have other features."""

    layer: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody misses on a pair


class OwnedFeatureId(FeatureId):
    """A FeatureId that records its adapters; it compares equal to one that does not.

    Circuits and feature stores return their features like this, so that `AdapterSet.require_own` can refuse features
    of other adapters wherever they are passed to a pair.
    """

    adapters: str | None = None
    """Fingerprint of the layer's adapter or of the whole set; "" for neurons, which belong to no adapters."""

    def __new__(cls, layer: int, index: int, adapters: str | None = None) -> OwnedFeatureId:
        """As FeatureId, with the fingerprint."""
        self = super().__new__(cls, layer, index)
        self.adapters = adapters
        return self

    def __repr__(self) -> str:
        return f"FeatureId(layer={self.layer}, index={self.index})"


def owned(id: FeatureId | tuple[int, int], fingerprints: Mapping[str, str]) -> OwnedFeatureId:
    """The feature as one of the adapters of ``fingerprints`` (`AdapterSet.fingerprints`)."""
    layer, index = id
    return OwnedFeatureId(layer, index, fingerprints.get(f"adapters.{layer}", fingerprints.get("adapters", "")))


class ForeignFeaturesError(UserError, ValueError):
    """Features of other adapters than those in use; a feature's index has a meaning in one set only."""
