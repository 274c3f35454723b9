"""A model as a user gives it, a folder, a hub name or one in memory: its config, its name, and a base's MLPs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor
from transformers import PreTrainedModel

from tl_adapters.checkpoints import (
    MLP_KEY,
    PROJECTIONS,
    commit_of,
    locate,
    mlp_tensor_names,
    read_config,
    read_tensors,
    read_vocabulary,
)
from tl_adapters.compatibility import PairMismatchError, compare_configs, compare_vocabularies, require_fit
from tl_adapters.fingerprints import fingerprint

log = logging.getLogger(__name__)

ModelReference: TypeAlias = str | Path | PreTrainedModel
"""A folder, a hub name, or a Hugging Face model already loaded."""
MLPTensors: TypeAlias = Mapping[str, Tensor]
"""One MLP's weights as Hugging Face names them: gate_proj, up_proj, down_proj."""


def model_name(model: ModelReference) -> str:
    """Id or folder of a model, as adapters record it."""
    return model.config.name_or_path if isinstance(model, PreTrainedModel) else str(model)


def model_config(model: ModelReference) -> dict[str, Any]:
    """What its config.json says. Raises CheckpointError."""
    return model.config.to_dict() if isinstance(model, PreTrainedModel) else read_config(locate(model, weights=False))


def model_commit(model: ModelReference) -> str | None:
    """The hub commit it is of, where it comes from there."""
    return None if isinstance(model, PreTrainedModel) else commit_of(locate(model, weights=False))


def require_pair(base: ModelReference, target: ModelReference) -> None:
    """Refuse what does not fit and warn of what differs, before a weight is read. Raises PairMismatchError."""
    findings = compare_configs(model_config(base), model_config(target))
    if not isinstance(base, PreTrainedModel) and not isinstance(target, PreTrainedModel):
        base_vocabulary, vocabulary = (read_vocabulary(locate(m, weights=False)) for m in (base, target))
        if base_vocabulary and vocabulary:
            findings += compare_vocabularies(base_vocabulary, vocabulary)
    require_fit(findings)
    for finding in findings:
        if finding.level == "warning":
            log.warning("%s", finding)


def read_base_mlps(base: ModelReference, n_layers: int) -> list[MLPTensors]:
    """The base's MLP weights per layer, as they are stored; nothing else of it is read. Raises CheckpointError."""
    names = mlp_tensor_names(n_layers)
    if isinstance(base, PreTrainedModel):
        state = base.state_dict()
        tensors = {name: state[name].detach() for name in names}
    else:
        tensors = read_tensors(locate(base), names)
    return [{name: tensors[MLP_KEY.format(layer, name)] for name in PROJECTIONS} for layer in range(n_layers)]


def base_fingerprint(base_mlps: Sequence[MLPTensors]) -> str:
    """Content hash of a base's MLPs, as they are stored."""
    return fingerprint((f"{layer}.{name}", mlp[name]) for layer, mlp in enumerate(base_mlps) for name in PROJECTIONS)


def require_shapes(base_mlps: Sequence[MLPTensors], target: Mapping[str, Any]) -> None:
    """Raises PairMismatchError where the base's MLPs are not of the target's number and shape."""
    if len(base_mlps) != target["num_hidden_layers"]:
        raise PairMismatchError(f"The base has {len(base_mlps)} layers; the target {target['num_hidden_layers']}.")
    wide = (target["intermediate_size"], target["hidden_size"])
    for name, expected in (("gate_proj", wide), ("up_proj", wide), ("down_proj", wide[::-1])):
        for mlp in base_mlps:
            if tuple(mlp[name].shape) != expected:
                raise PairMismatchError(
                    f"The base's {name} has shape {tuple(mlp[name].shape)}; the target's {expected}."
                )
