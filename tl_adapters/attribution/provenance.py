"""The models and adapters that an attribution graph was made with, and the check that a pair is the same."""

from __future__ import annotations

from typing import Any

from tl_adapters.attribution.graph import AttributionGraph, GraphError
from tl_adapters.checkpoints.fingerprints import differing
from tl_adapters.checkpoints.model_reference import published_name
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.results import versions


def provenance(pair: PairedModel) -> dict[str, Any]:
    """What `AttributionGraph.about` records of a pair.

    It is the route, the models' names (of a folder without its path), weight fingerprints, vocabulary size and library
    versions.
    """
    return {
        "route": "replacement",
        "base": published_name(pair.base_id),
        "target": published_name(pair.target_id),
        "fingerprints": _fingerprints(pair),
        "d_vocab": pair.model.cfg.d_vocab,
        "versions": versions(),
    }


def require_same_pair(pair: PairedModel, graph: AttributionGraph) -> None:
    """Raises GraphError if the graph was made with other models or adapters than the pair's, by weight fingerprint."""
    differs = differing(graph.about.get("fingerprints") or {}, _fingerprints(pair))
    if differs:
        raise GraphError(
            f"The graph was made with another pair (the weight fingerprints of {' and '.join(differs)} differ), so its "
            "feature indices do not refer to this pair's features. Open the pair that the graph was made with, or "
            "attribute the prompt again with this pair."
        )


def _fingerprints(pair: PairedModel) -> dict[str, str]:
    return {**pair.fingerprints, **pair.installed_adapters().fingerprints}
