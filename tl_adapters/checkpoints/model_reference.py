"""A model as a user gives it (folder, hub name or object): checked and unwrapped, its name and configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeAlias

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import PreTrainedModel

from tl_adapters.checkpoints.architectures import ARCHITECTURES, UnsupportedModelError
from tl_adapters.checkpoints.model_files import commit_of, locate, read_config
from tl_adapters.organism import BUILTIN

ModelReference: TypeAlias = str | Path | PreTrainedModel
"""A folder, a hub name, or a Hugging Face model already loaded."""
GivenModel: TypeAlias = str | Path | nn.Module
"""What a user may give: like a ModelReference, but compiled, in DataParallel, or not a complete causal model."""
_DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


def resolve_model(model: GivenModel, role: str) -> ModelReference:
    """The model in the form that the rest of the package takes: a name unchanged, an object unwrapped and checked.

    The name of the model's class is entered into its configuration, where models that were made in memory may lack it.

    Args:
        model: what the user gave.
        role: "base" or "target".

    Raises:
        UnsupportedModelError: anything but a complete causal language model of Hugging Face; the message names what
            to give instead.
    """
    if isinstance(model, (str, Path)):
        return model
    unwrapped: Any = model
    while isinstance(unwrapped, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(
        unwrapped, "_orig_mod"
    ):
        unwrapped = unwrapped._orig_mod if hasattr(unwrapped, "_orig_mod") else unwrapped.module
    _require_plain_model(unwrapped, role)
    _require_loaded_weights(unwrapped, role)
    name = next((cls.__name__ for cls in type(unwrapped).__mro__ if cls.__name__ in ARCHITECTURES), None)
    if name is None:
        inner = unwrapped.get_output_embeddings() is None
        raise UnsupportedModelError(
            f"The {role} is a {type(unwrapped).__name__}"
            + (", the inner model without an unembedding; load it with AutoModelForCausalLM" if inner else "")
            + f". Supported: {', '.join(ARCHITECTURES)}."
        )
    unwrapped.config.architectures = [name]
    return unwrapped


def _require_plain_model(model: nn.Module, role: str) -> None:
    """Raises UnsupportedModelError for LoRA weights, a model inside TransformerLens, or any other module."""
    modules = {type(module).__module__.partition(".")[0] for module in model.modules()}
    if "peft" in modules or hasattr(model, "merge_and_unload"):
        raise UnsupportedModelError(
            f"The {role} has adapters of the peft library in it (such as LoRA), whose effect its weights do not "
            f"contain. Merge them: peft.PeftModel's merge_and_unload() returns the {role} to give here (open a folder "
            "with an adapter with peft.AutoPeftModelForCausalLM.from_pretrained)."
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


def _require_loaded_weights(model: nn.Module, role: str) -> None:
    """Raises UnsupportedModelError for quantized, offloaded or distributed weights."""
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
    """The id or folder of a model, as adapter sets record it."""
    return model.config.name_or_path if isinstance(model, PreTrainedModel) else str(model)


def model_config(model: ModelReference) -> dict[str, Any]:
    """The content of the model's config.json. Raises CheckpointError."""
    return model.config.to_dict() if isinstance(model, PreTrainedModel) else read_config(locate(model, weights=False))


def model_commit(model: ModelReference) -> str | None:
    """The model's commit on the hub; None for a local folder or an object."""
    return None if isinstance(model, PreTrainedModel) else commit_of(locate(model, weights=False))


def published_name(reference: str, revision: str | None = None) -> str:
    """A model or data set as files for other people name it: by its hub name, or as ``./FOLDER`` without its path.

    A path says how somebody's machine is laid out and who works there, and is of no use on another. Which folder is
    meant is known from the weight fingerprints beside the name.

    Args:
        reference: a hub name, a folder, a file, or other text, which stays as it is.
        revision: its commit on the hub, where one is recorded: then it is a hub name.
    """
    parts = reference.replace("\\", "/").rstrip("/").split("/")
    cached = [part for part in parts[:-1] if part.startswith(("models--", "datasets--"))]
    if cached:  # a folder of the hub's cache
        return cached[-1].partition("--")[2].replace("--", "/", 1)
    if not reference or reference in BUILTIN:
        return reference
    repository = reference.partition("@")[0]  # what follows is the revision, whose commit is recorded beside the name
    if revision is not None and is_hub_name(repository):
        return repository
    if os.path.exists(reference):
        return f"./{Path(reference).resolve().name}"
    elsewhere = len(parts) > 1 and (not is_hub_name(repository) or reference.endswith(_DATA_SUFFIXES))
    return f"./{parts[-1]}" if elsewhere else reference


def is_hub_name(name: str) -> bool:
    """Whether ``name`` has the form of a repository's name on the hub: NAME or USER/NAME."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
