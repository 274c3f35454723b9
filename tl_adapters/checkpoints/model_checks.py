"""Checks that TransformerLens represents a model exactly: of its configuration, its code and its tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from tl_adapters.checkpoints.architectures import Architecture, UnsupportedModelError, require_supported
from tl_adapters.checkpoints.model_files import PROJECTIONS, CheckpointError, require_unquantized, tensor_shapes
from tl_adapters.errors import first_line

ROPE_TYPES = ("default", "llama3")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
"""MLP activations that transformers and TransformerLens compute alike, under these names."""
_OWN_IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "grouped_mm")
"""Implementations of attention and experts that are part of transformers, or of a library that a user has installed."""


def mlp_activation(config: PretrainedConfig) -> str:
    """The name of the MLP's activation function, which Gemma's configuration has under another key."""
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """The type and parameters of the rotary embedding."""
    return dict(getattr(config, "rope_parameters", None) or {})


def require_representable(config: PretrainedConfig) -> Architecture:
    """The record of the configuration's architecture.

    Raises UnsupportedModelError, naming what TransformerLens would silently leave out: it would be another model.
    """
    architecture = require_supported(config)

    def refuse(option: str, instead: str) -> None:
        raise UnsupportedModelError(
            f"{config.name_or_path or 'The model'}: {option} is not represented by TransformerLens's "
            f"{architecture.name}: the model would not be exact; "
            f"{instead}."
        )

    rope = rope_parameters(config)
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        refuse(f"rope_type {rope['rope_type']!r}", f"supported rope types: {', '.join(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        refuse(f"partial_rotary_factor {rope['partial_rotary_factor']}", "supported is 1.0")
    for option in ("use_sliding_window", "attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if getattr(config, option, False):
            refuse(f"{option}=True", "supported is False")
    if getattr(config, "quantization_config", None):
        refuse("quantization_config (quantized weights)", "load the checkpoint in bfloat16 or float32")
    if mlp_activation(config) not in ACTIVATIONS:
        refuse(f"activation {mlp_activation(config)!r}", f"supported: {', '.join(ACTIVATIONS)}")
    return architecture


def require_stock_code(config: Mapping[str, Any], name: str | Path) -> None:
    """Raises UnsupportedModelError for a config.json that names code or weights of its own, which are never used.

    Besides modeling code, these are a kernel for attention or experts, and a file of weights under another name.
    """
    auto_map = config.get("auto_map") or {}
    named = [str(auto_map[key]) for key in ("AutoModelForCausalLM", "AutoModel") if key in auto_map]
    if named:
        raise UnsupportedModelError(
            f"The auto_map in config.json of {name} names modeling code of its own ({named[0]}). Such code is never "
            "run here, and without it the model may differ. If its weights are those of a stock architecture, "
            "load it with transformers and trust_remote_code=False, and give the model in place of its name."
        )
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation", "transformers_weights"):
        value = config.get(key)
        if value is not None and value not in _OWN_IMPLEMENTATIONS:
            raise UnsupportedModelError(
                f"config.json of {name} has {key} {value!r}: code or weights of its own are never used here. Remove "
                "that entry if the model is a stock one without it."
            )


def require_plain_mlps(config: Mapping[str, Any], tensors: Iterable[str], name: str | Path) -> None:
    """Checks that MLPs consist of their three matrices only, as `require_representable` checks a whole model.

    Args:
        config: the content of config.json.
        tensors: names of all tensors of the checkpoint.
        name: the model's name in messages.

    Raises:
        UnsupportedModelError: quantized or biased MLPs, or modeling code of its own.
    """
    require_stock_code(config, name)
    if config.get("quantization_config"):
        raise UnsupportedModelError(
            f"{name} has quantized weights (quantization_config in its configuration), whose stored numbers are not "
            "the weights. Give the checkpoint in bfloat16 or float32."
        )
    weights = {f".mlp.{projection}.": f".mlp.{projection}.weight" for projection in PROJECTIONS}
    for tensor in tensors:
        for part, weight in weights.items():
            if part in tensor and not tensor.endswith(weight):
                raise UnsupportedModelError(
                    f"{name} has the tensor {tensor}: its MLPs are more than their three weight matrices (a bias, "
                    "scales of quantized weights, LoRA), and only these are read. Give a plain checkpoint in bfloat16 "
                    "or float32, with LoRA merged."
                )


def stock_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model that ``config`` describes on the meta device: names, shapes and classes, without memory.

    Raises UnsupportedModelError, and CheckpointError where transformers cannot build it.
    """
    config = copy.deepcopy(config)
    model_class = getattr(transformers, require_representable(config).name)
    try:
        with torch.device("meta"):
            return model_class(config)
    except Exception as error:  # whatever a number that makes no sense leads to
        raise CheckpointError(
            f"config.json of {config.name_or_path or 'the model'} describes no model that transformers can build "
            f"({type(error).__name__}: {first_line(error)}). Get its config.json again."
        ) from error


def require_stock_files(folder: Path, config: PretrainedConfig) -> None:
    """Raises CheckpointError where the tensors in a folder are not those of a model of its configuration."""
    require_unquantized(folder)
    expected = {name: tuple(tensor.shape) for name, tensor in stock_model(config).state_dict().items()}
    for name, shape in tensor_shapes(folder).items():
        if name in expected and shape != expected[name]:
            raise CheckpointError(
                f"{name} of {folder} has shape {shape}, and by its config.json {expected[name]}. Correct config.json "
                "(vocab_size where embeddings were resized), or save the model again with save_pretrained."
            )
        module = name.rpartition(".")[0]
        if name not in expected and f"{module}.weight" in expected:
            raise CheckpointError(
                f"{folder} has the tensor {name}, which a {config.architectures[0]} of this configuration does not "
                "have: a bias, or a scale of quantized weights, would be left out. Give a checkpoint that its "
                "config.json describes."
            )
