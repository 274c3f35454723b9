"""A feature's name: its layer, its index, and, where it is known, the set of adapters that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tl_adapters.errors import UserError


class FeatureId(NamedTuple):
    """One feature of an adapter set. Means something only together with the set: seeds number features anew."""

    layer: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody misses on a pair


class OwnedFeatureId(FeatureId):
    """A FeatureId that knows the adapters it is a number of, and is equal to one that does not.

    Circuits and feature stores give their features out like this, so wherever these reach a pair, alone or in any
    list, `AdapterSet.require_own` refuses those of other adapters.
    """

    adapters: str | None = None
    """Fingerprint of the layer's adapter or of the whole set; "" for what is no feature of adapters."""

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
    """Features of other adapters than those they are asked of: a feature is a number of one set."""
