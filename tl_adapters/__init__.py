"""tl_adapters: what did reasoning training change inside this model? Transcoder adapters for TransformerLens."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported when first asked for: `import tl_adapters` costs nothing, torch and transformer_lens cost seconds.
_HOMES = {
    "AdapterSet": "adapter",
    "AttributionGraph": "graphs",
    "DataConfig": "config",
    "DifferenceTarget": "attribution",
    "FeatureId": "adapter",
    "FeatureTarget": "attribution",
    "LogitTarget": "attribution",
    "LossWeights": "config",
    "PairedModel": "paired",
    "RunConfig": "config",
    "Trainer": "training",
    "TrainingConfig": "config",
    "TranscoderAdapter": "adapter",
    "attach": "attaching",
    "attached": "attaching",
    "attribute": "attribution",
    "authors_pair": "authors",
    "detach": "attaching",
    "encode_traces": "chat",
    "explain_difference": "validity",
    "from_authors": "authors",
    "from_saelens": "formats",
    "pull": "hub",
    "push_to_hub": "hub",
    "to_authors": "authors",
    "to_saelens": "formats",
    "train": "training",
    "write_graph": "graph_pages",
    "write_hybrid": "mixing",
}

__all__ = ["AdapterSet", "AttributionGraph", "DataConfig", "DifferenceTarget", "FeatureId", "FeatureTarget"]
__all__ += ["LogitTarget", "LossWeights", "PairedModel", "RunConfig", "Trainer", "TrainingConfig", "TranscoderAdapter"]
__all__ += ["attach", "attached", "attribute", "authors_pair", "detach", "encode_traces", "explain_difference"]
__all__ += ["from_authors", "from_saelens", "pull", "push_to_hub", "to_authors", "to_saelens", "train", "write_graph"]
__all__ += ["write_hybrid"]

if TYPE_CHECKING:
    from tl_adapters.adapter import AdapterSet, FeatureId, TranscoderAdapter
    from tl_adapters.attaching import attach, attached, detach
    from tl_adapters.attribution import DifferenceTarget, FeatureTarget, LogitTarget, attribute
    from tl_adapters.authors import authors_pair, from_authors, to_authors
    from tl_adapters.chat import encode_traces
    from tl_adapters.config import DataConfig, LossWeights, RunConfig, TrainingConfig
    from tl_adapters.formats import from_saelens, to_saelens
    from tl_adapters.graph_pages import write_graph
    from tl_adapters.graphs import AttributionGraph
    from tl_adapters.hub import pull, push_to_hub
    from tl_adapters.mixing import write_hybrid
    from tl_adapters.paired import PairedModel
    from tl_adapters.training import Trainer, train
    from tl_adapters.validity import explain_difference


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"tl_adapters.{_HOMES[name]}"), name)
    raise AttributeError(f"tl_adapters has no {name!r}; it has {', '.join(_HOMES)}.")


def __dir__() -> list[str]:
    return sorted(_HOMES)
