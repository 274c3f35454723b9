"""A model as a user gives it, a folder, a hub name or one in memory: its config, its name, and a base's MLPs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tl_adapters.checkpoints.architectures import ARCHITECTURES, UnsupportedModelError
from tl_adapters.checkpoints.compatibility import PairMismatchError, compare_configs, compare_vocabularies, require_fit
from tl_adapters.checkpoints.fingerprints import fingerprint
from tl_adapters.checkpoints.model_checks import require_plain_mlps
from tl_adapters.checkpoints.model_files import (
    MLP_KEY,
    PROJECTIONS,
    commit_of,
    locate,
    mlp_tensor_names,
    read_config,
    read_tensors,
    read_vocabulary,
    require_unscaled,
    tensor_shapes,
)

log = logging.getLogger(__name__)

ModelReference: TypeAlias = str | Path | PreTrainedModel
"""A folder, a hub name, or a Hugging Face model already loaded."""
GivenModel: TypeAlias = str | Path | nn.Module
"""The same before `resolve` has looked at it: a model may be compiled or in DataParallel, or be no whole model."""
MLPTensors: TypeAlias = Mapping[str, Tensor]
"""One MLP's weights as Hugging Face names them: gate_proj, up_proj, down_proj."""


def resolve(model: GivenModel, role: str) -> ModelReference:
    """A model as the rest of this package takes it: a name as it is, a model in memory unwrapped and looked at.

    The configuration of a model that was made in memory is given the name of its class, which it may lack.

    Args:
        model: what the user gave.
        role: "base" or "target".

    Raises:
        UnsupportedModelError: what is no whole causal language model of Hugging Face, with what to give instead.
    """
    if isinstance(model, (str, Path)):
        return model
    found: Any = model
    while isinstance(found, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(found, "_orig_mod"):
        found = found._orig_mod if hasattr(found, "_orig_mod") else found.module
    _refuse_wrapped(found, role)
    _refuse_parameters(found, role)
    name = next((cls.__name__ for cls in type(found).__mro__ if cls.__name__ in ARCHITECTURES), None)
    if name is None:
        inner = found.get_output_embeddings() is None
        raise UnsupportedModelError(
            f"The {role} is a {type(found).__name__}"
            + (", the inner model without an unembedding; load it with AutoModelForCausalLM" if inner else "")
            + f". Supported: {', '.join(ARCHITECTURES)}."
        )
    found.config.architectures = [name]
    return found


def _refuse_wrapped(model: nn.Module, role: str) -> None:
    modules = {type(module).__module__.partition(".")[0] for module in model.modules()}
    if "peft" in modules or hasattr(model, "merge_and_unload"):
        raise UnsupportedModelError(
            f"The {role} has adapters of the peft library in it (LoRA and the like), and its weights do not hold what "
            f"they compute. Merge them: peft.PeftModel's merge_and_unload() returns the {role} to give here (a folder "
            "with an adapter is opened by peft.AutoPeftModelForCausalLM.from_pretrained)."
        )
    if "transformer_lens" in modules:
        raise UnsupportedModelError(
            f"The {role} is a model of TransformerLens, or inside a TransformerBridge (which changes the Hugging Face "
            "model that it wraps). Give a folder, a hub name or a Hugging Face model loaded anew; adapters go into a "
            "model of TransformerLens with attach(model, adapters, base=...)."
        )
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"The {role} is a {type(model).__name__}; give a folder, a hub name or a model that "
            "AutoModelForCausalLM.from_pretrained returns."
        )


def _refuse_parameters(model: nn.Module, role: str) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise UnsupportedModelError(
                f"{name} of the {role} is {str(parameter.dtype).removeprefix('torch.')}: these are quantized numbers, "
                "not the weights. Load the model in bfloat16 or float32."
            )
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if "meta" in devices and (role == "base" or len(devices) > 1):
        raise UnsupportedModelError(
            f"The {role} has parameters without values (offloaded by device_map, or made on the meta device). Load it "
            "whole, without device_map, or give its folder or hub name."
        )
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"The {role} is spread over {', '.join(devices)}; load it on one device, without device_map."
        )


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
    """The base's MLP weights per layer, as they are stored; nothing else of it is read.

    Raises CheckpointError; UnsupportedModelError for MLPs that are more than their weights (see `require_plain_mlps`).
    """
    names = mlp_tensor_names(n_layers)
    if isinstance(base, PreTrainedModel):
        require_plain_mlps({**base.config.to_dict(), "auto_map": None}, _own_names(base), "The base")
        # Through the modules, not state_dict(): a parametrized weight is there under other names.
        tensors = {name: base.get_submodule(name.removesuffix(".weight")).weight.detach() for name in names}
    else:
        folder = locate(base)
        require_plain_folder(folder, read_config(folder), tensor_shapes(folder), names)
        tensors = read_tensors(folder, names)
    return [{name: tensors[MLP_KEY.format(layer, name)] for name in PROJECTIONS} for layer in range(n_layers)]


def _own_names(model: PreTrainedModel) -> Iterable[str]:
    return (name for name in model.state_dict() if ".parametrizations." not in name)


def require_plain_folder(
    folder: Path, config: Mapping[str, Any], tensors: Iterable[str], names: Sequence[str] = ()
) -> None:
    """Refuse a base whose MLPs, as transformers would load them, are not the matrices in its files.

    Args:
        folder: of the base.
        config: its config.json.
        tensors: names of all its tensors.
        names: of those that will be read, where their files are in ``folder``.

    Raises:
        CheckpointError, UnsupportedModelError.
    """
    require_plain_mlps(config, tensors, folder)
    if names:
        require_unscaled(folder, names)


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
