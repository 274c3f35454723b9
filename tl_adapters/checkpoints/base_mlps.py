"""The MLP weights of the base, read from its files or from a model in memory, and checks of their shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor
from transformers import PreTrainedModel

from tl_adapters.checkpoints.compatibility import PairMismatchError
from tl_adapters.checkpoints.fingerprints import fingerprint
from tl_adapters.checkpoints.model_checks import require_plain_mlps
from tl_adapters.checkpoints.model_files import (
    MLP_KEY,
    PROJECTIONS,
    locate,
    mlp_tensor_names,
    read_config,
    read_tensors,
    require_unquantized,
    tensor_shapes,
)
from tl_adapters.checkpoints.model_reference import ModelReference

MLPTensors: TypeAlias = Mapping[str, Tensor]
"""One MLP's weights under Hugging Face's names: gate_proj, up_proj, down_proj."""


def read_base_mlps(base: ModelReference, n_layers: int) -> list[MLPTensors]:
    """The base's MLP weights per layer, in their stored dtype; no other weights of the base are read.

    Raises CheckpointError; UnsupportedModelError for MLPs that are more than their weights (see `require_plain_mlps`).
    """
    names = mlp_tensor_names(n_layers)
    if isinstance(base, PreTrainedModel):
        require_plain_mlps({**base.config.to_dict(), "auto_map": None}, _own_names(base), "The base")
        # Read from the modules, since state_dict() has a parametrized weight under other names.
        tensors = {name: base.get_submodule(name.removesuffix(".weight")).weight.detach() for name in names}
    else:
        folder = locate(base)
        require_plain_folder(folder, read_config(folder), tensor_shapes(folder), names)
        tensors = read_tensors(folder, names)
    return [{name: tensors[MLP_KEY.format(layer, name)] for name in PROJECTIONS} for layer in range(n_layers)]


def _own_names(model: PreTrainedModel) -> Iterable[str]:
    """Names of the model's tensors, without the parts of parametrized weights."""
    return (name for name in model.state_dict() if ".parametrizations." not in name)


def require_plain_folder(
    folder: Path, config: Mapping[str, Any], tensors: Iterable[str], names: Sequence[str] = ()
) -> None:
    """Checks that the base's MLPs, as transformers would load them, are the matrices in its files.

    Args:
        folder: the base's folder.
        config: the content of its config.json.
        tensors: the names of all its tensors.
        names: the tensors that will be read, if their files are in ``folder``.

    Raises:
        CheckpointError, UnsupportedModelError.
    """
    require_plain_mlps(config, tensors, folder)
    if names:
        require_unquantized(folder, names)


def base_fingerprint(base_mlps: Sequence[MLPTensors]) -> str:
    """Content hash of the base's MLP weights in their stored dtype."""
    return fingerprint((f"{layer}.{name}", mlp[name]) for layer, mlp in enumerate(base_mlps) for name in PROJECTIONS)


def require_shapes(base_mlps: Sequence[MLPTensors], target: Mapping[str, Any]) -> None:
    """Raises PairMismatchError where number or shapes of the base's MLPs differ from the target's."""
    if len(base_mlps) != target["num_hidden_layers"]:
        raise PairMismatchError(f"The base has {len(base_mlps)} layers; the target has {target['num_hidden_layers']}.")
    shape = (target["intermediate_size"], target["hidden_size"])
    for name, expected in (("gate_proj", shape), ("up_proj", shape), ("down_proj", shape[::-1])):
        for mlp in base_mlps:
            if tuple(mlp[name].shape) != expected:
                raise PairMismatchError(
                    f"The base's {name} has shape {tuple(mlp[name].shape)}; the target's has {expected}."
                )
