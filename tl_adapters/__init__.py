"""tl_adapters: what did reasoning training change inside this model? Transcoder adapters for TransformerLens."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported when first asked for: `import tl_adapters` costs nothing, torch and transformer_lens cost seconds.
_HOMES = {
    "AdapterSet": "adapter",
    "FeatureId": "adapter",
    "TranscoderAdapter": "adapter",
    "PairedModel": "paired",
    "DataConfig": "config",
    "LossWeights": "config",
    "RunConfig": "config",
    "TrainingConfig": "config",
    "Trainer": "training",
    "train": "training",
    "encode_traces": "chat",
}

__all__ = ["AdapterSet", "DataConfig", "FeatureId", "LossWeights", "PairedModel", "RunConfig", "Trainer"]
__all__ += ["TrainingConfig", "TranscoderAdapter", "encode_traces", "train"]

if TYPE_CHECKING:
    from tl_adapters.adapter import AdapterSet, FeatureId, TranscoderAdapter
    from tl_adapters.chat import encode_traces
    from tl_adapters.config import DataConfig, LossWeights, RunConfig, TrainingConfig
    from tl_adapters.paired import PairedModel
    from tl_adapters.training import Trainer, train


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"tl_adapters.{_HOMES[name]}"), name)
    raise AttributeError(f"tl_adapters has no {name!r}; it has {', '.join(_HOMES)}.")


def __dir__() -> list[str]:
    return sorted(_HOMES)
