"""tl_adapters: what did reasoning training change inside this model? Transcoder adapters for TransformerLens."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported when first asked for: `import tl_adapters` costs nothing, torch and transformer_lens cost seconds.
_HOMES = {
    "AdapterSet": "adapters.adapter_set",
    "AttributionGraph": "attribution.graph",
    "Behaviour": "circuits.onsets",
    "Circuit": "circuits.circuit",
    "DataConfig": "config",
    "DifferenceTarget": "attribution.targets",
    "Endpoint": "autointerp.endpoint",
    "FeatureId": "adapters.feature_id",
    "FeatureStore": "features.store",
    "FeatureTarget": "attribution.targets",
    "LogitTarget": "attribution.targets",
    "LossWeights": "config",
    "PairedModel": "models.paired_model",
    "RunConfig": "config",
    "StoreOptions": "features.store_files",
    "Subject": "circuits.subject",
    "Trainer": "training.trainer",
    "TrainingConfig": "config",
    "TranscoderAdapter": "adapters.transcoder",
    "analyze_behaviour": "circuits.study",
    "analyze_hesitation": "circuits.study",
    "attach": "models.attach",
    "attached": "models.attach",
    "attribute": "attribution.attribute",
    "authors_pair": "interop.authors_checkpoint",
    "auto_interpret": "autointerp.detection",
    "benchmark_run": "study.benchmark",
    "builtin_subject": "circuits.subject",
    "collect_features": "features.collect",
    "detach": "models.attach",
    "encode_traces": "data.chat_format",
    "explain_difference": "attribution.validation",
    "find_circuit": "circuits.find",
    "find_moments": "circuits.onsets",
    "from_authors": "interop.authors_checkpoint",
    "from_saelens": "interop.saelens",
    "frozen": "interventions.frozen",
    "generate_variants": "generation.compare_variants",
    "hesitation_tokens": "data.hesitation_words",
    "judge": "autointerp.judge",
    "label_by_rules": "autointerp.rule_labels",
    "label_shares": "autointerp.rule_labels",
    "load_problems": "evaluation.tasks",
    "plant_features": "evaluation.planted_features",
    "planted_test": "evaluation.planted_features",
    "pull": "interop.hub",
    "push_to_hub": "interop.hub",
    "search_circuit": "circuits.search",
    "seed_agreement": "evaluation.feature_matching",
    "show_features": "features.notebook_view",
    "stream_agreement": "features.stream_agreement",
    "to_authors": "interop.authors_checkpoint",
    "to_saelens": "interop.saelens",
    "train": "training.trainer",
    "write_feature_pages": "pages.feature_pages",
    "write_graph": "pages.graph_page",
    "write_hybrid": "interop.hybrid_checkpoint",
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
    from tl_adapters.adapters.adapter_set import AdapterSet
    from tl_adapters.adapters.feature_id import FeatureId
    from tl_adapters.adapters.transcoder import TranscoderAdapter
    from tl_adapters.attribution.attribute import attribute
    from tl_adapters.attribution.graph import AttributionGraph
    from tl_adapters.attribution.targets import DifferenceTarget, FeatureTarget, LogitTarget
    from tl_adapters.attribution.validation import explain_difference
    from tl_adapters.autointerp.detection import auto_interpret
    from tl_adapters.autointerp.endpoint import Endpoint
    from tl_adapters.autointerp.judge import judge
    from tl_adapters.autointerp.rule_labels import label_by_rules, label_shares
    from tl_adapters.circuits.circuit import Circuit
    from tl_adapters.circuits.find import find_circuit
    from tl_adapters.circuits.onsets import Behaviour, find_moments
    from tl_adapters.circuits.search import search_circuit
    from tl_adapters.circuits.study import analyze_behaviour, analyze_hesitation
    from tl_adapters.circuits.subject import Subject, builtin_subject
    from tl_adapters.config import DataConfig, LossWeights, RunConfig, TrainingConfig
    from tl_adapters.data.chat_format import encode_traces
    from tl_adapters.data.hesitation_words import hesitation_tokens
    from tl_adapters.evaluation.feature_matching import seed_agreement
    from tl_adapters.evaluation.planted_features import plant_features, planted_test
    from tl_adapters.evaluation.tasks import load_problems
    from tl_adapters.features.collect import collect_features
    from tl_adapters.features.notebook_view import show_features
    from tl_adapters.features.store import FeatureStore
    from tl_adapters.features.store_files import StoreOptions
    from tl_adapters.features.stream_agreement import stream_agreement
    from tl_adapters.generation.compare_variants import generate_variants
    from tl_adapters.interop.authors_checkpoint import authors_pair, from_authors, to_authors
    from tl_adapters.interop.hub import pull, push_to_hub
    from tl_adapters.interop.hybrid_checkpoint import write_hybrid
    from tl_adapters.interop.saelens import from_saelens, to_saelens
    from tl_adapters.interventions.frozen import frozen
    from tl_adapters.models.attach import attach, attached, detach
    from tl_adapters.models.paired_model import PairedModel
    from tl_adapters.pages.feature_pages import write_feature_pages
    from tl_adapters.pages.graph_page import write_graph
    from tl_adapters.study.benchmark import benchmark_run
    from tl_adapters.training.trainer import Trainer, train


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"tl_adapters.{_HOMES[name]}"), name)
    raise AttributeError(f"tl_adapters has no {name!r}; it has {', '.join(_HOMES)}.")


def __dir__() -> list[str]:
    return sorted(_HOMES)
