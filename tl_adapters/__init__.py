"""tl_adapters: what did reasoning training change inside this model? Transcoder adapters for TransformerLens."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported when first asked for: `import tl_adapters` costs nothing, torch and transformer_lens cost seconds.
_HOMES = {
    "AdapterSet": "adapter",
    "AttributionGraph": "graphs",
    "Behaviour": "moments",
    "Circuit": "circuits",
    "DataConfig": "config",
    "DifferenceTarget": "attribution",
    "Endpoint": "endpoint",
    "FeatureId": "adapter",
    "FeatureStore": "feature_store",
    "FeatureTarget": "attribution",
    "LogitTarget": "attribution",
    "LossWeights": "config",
    "PairedModel": "paired",
    "RunConfig": "config",
    "StoreOptions": "store_files",
    "Subject": "subjects",
    "Trainer": "training",
    "TrainingConfig": "config",
    "TranscoderAdapter": "transcoder",
    "analyze_behaviour": "hesitation",
    "analyze_hesitation": "hesitation",
    "attach": "attaching",
    "attached": "attaching",
    "attribute": "attribution",
    "authors_pair": "authors",
    "auto_interpret": "interpreting",
    "benchmark_run": "benchmarking",
    "builtin_subject": "subjects",
    "collect_features": "collecting",
    "detach": "attaching",
    "encode_traces": "chat",
    "explain_difference": "validity",
    "find_circuit": "circuit_finding",
    "find_moments": "moments",
    "from_authors": "authors",
    "from_saelens": "formats",
    "frozen": "freezing",
    "generate_variants": "variants",
    "hesitation_tokens": "vocabulary",
    "judge": "judging",
    "label_by_rules": "labels",
    "label_shares": "labels",
    "load_problems": "tasks",
    "plant_features": "planting",
    "planted_test": "planting",
    "pull": "hub",
    "push_to_hub": "hub",
    "search_circuit": "circuit_search",
    "seed_agreement": "matching",
    "show_features": "feature_views",
    "stream_agreement": "streams",
    "to_authors": "authors",
    "to_saelens": "formats",
    "train": "training",
    "write_feature_pages": "feature_pages",
    "write_graph": "graph_pages",
    "write_hybrid": "mixing",
}

__all__ = ["AdapterSet", "AttributionGraph", "Behaviour", "Circuit", "DataConfig", "DifferenceTarget"]
__all__ += ["Endpoint", "FeatureId", "FeatureStore", "FeatureTarget", "LogitTarget", "LossWeights"]
__all__ += ["PairedModel", "RunConfig", "StoreOptions", "Subject", "Trainer", "TrainingConfig"]
__all__ += ["TranscoderAdapter", "analyze_behaviour", "analyze_hesitation", "attach", "attached"]
__all__ += ["attribute", "authors_pair", "auto_interpret", "benchmark_run", "builtin_subject"]
__all__ += ["collect_features", "detach", "encode_traces", "explain_difference", "find_circuit"]
__all__ += ["find_moments", "from_authors", "from_saelens", "frozen", "generate_variants"]
__all__ += ["hesitation_tokens", "judge", "label_by_rules", "label_shares", "load_problems"]
__all__ += ["plant_features", "planted_test", "pull", "push_to_hub", "search_circuit", "seed_agreement"]
__all__ += ["show_features", "stream_agreement", "to_authors", "to_saelens", "train", "write_feature_pages"]
__all__ += ["write_graph", "write_hybrid"]

if TYPE_CHECKING:
    from tl_adapters.adapter import AdapterSet, FeatureId
    from tl_adapters.attaching import attach, attached, detach
    from tl_adapters.attribution import DifferenceTarget, FeatureTarget, LogitTarget, attribute
    from tl_adapters.authors import authors_pair, from_authors, to_authors
    from tl_adapters.benchmarking import benchmark_run
    from tl_adapters.chat import encode_traces
    from tl_adapters.circuit_finding import find_circuit
    from tl_adapters.circuit_search import search_circuit
    from tl_adapters.circuits import Circuit
    from tl_adapters.collecting import collect_features
    from tl_adapters.config import DataConfig, LossWeights, RunConfig, TrainingConfig
    from tl_adapters.endpoint import Endpoint
    from tl_adapters.feature_pages import write_feature_pages
    from tl_adapters.feature_store import FeatureStore
    from tl_adapters.feature_views import show_features
    from tl_adapters.formats import from_saelens, to_saelens
    from tl_adapters.freezing import frozen
    from tl_adapters.graph_pages import write_graph
    from tl_adapters.graphs import AttributionGraph
    from tl_adapters.hesitation import analyze_behaviour, analyze_hesitation
    from tl_adapters.hub import pull, push_to_hub
    from tl_adapters.interpreting import auto_interpret
    from tl_adapters.judging import judge
    from tl_adapters.labels import label_by_rules, label_shares
    from tl_adapters.matching import seed_agreement
    from tl_adapters.mixing import write_hybrid
    from tl_adapters.moments import Behaviour, find_moments
    from tl_adapters.paired import PairedModel
    from tl_adapters.planting import plant_features, planted_test
    from tl_adapters.store_files import StoreOptions
    from tl_adapters.streams import stream_agreement
    from tl_adapters.subjects import Subject, builtin_subject
    from tl_adapters.tasks import load_problems
    from tl_adapters.training import Trainer, train
    from tl_adapters.transcoder import TranscoderAdapter
    from tl_adapters.validity import explain_difference
    from tl_adapters.variants import generate_variants
    from tl_adapters.vocabulary import hesitation_tokens


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"tl_adapters.{_HOMES[name]}"), name)
    raise AttributeError(f"tl_adapters has no {name!r}; it has {', '.join(_HOMES)}.")


def __dir__() -> list[str]:
    return sorted(_HOMES)
