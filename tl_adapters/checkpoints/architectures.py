"""Which models are supported, and what of them TransformerLens represents.

Qwen2, Qwen3, Llama and Gemma 2. What TransformerLens would leave out (a bias, a rope type, a sliding window) is
refused by name: it would be a silently different model.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tl_adapters.checkpoints.model_files import (
    PROJECTIONS,
    CheckpointError,
    locate,
    read_config,
    require_unscaled,
    tensor_shapes,
)
from tl_adapters.checkpoints.tokenizers import load_tokenizer, warn_of_other_ids
from tl_adapters.errors import UserError

log = logging.getLogger(__name__)

ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM", "Gemma2ForCausalLM")
"""Supported architectures, as config.json names them."""

AUTHORS_SUFFIX = "WithTranscoder"
"""What the paper's authors append to the architecture of a model with adapters inside."""
ROPE_TYPES = ("default", "llama3")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
"""Names that mean the same function in both libraries."""


class UnsupportedModelError(UserError, ValueError):
    """A model this version cannot represent exactly; the message names the reason."""


def mlp_activation(config: PretrainedConfig) -> str:
    """The MLP's activation function; Gemma keeps it under another name."""
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """Type and parameters of the rotary embedding."""
    return dict(getattr(config, "rope_parameters", None) or {})


def require_representable(config: PretrainedConfig) -> str:
    """The architecture's name. Raises UnsupportedModelError, naming what TransformerLens would silently drop."""
    architecture = (config.architectures or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"Architecture {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}."
        )

    def refuse(what: str, instead: str) -> None:
        raise UnsupportedModelError(
            f"{what} is not represented by TransformerLens's {architecture}: the model would not be exact; {instead}."
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
        refuse("quantization_config (quantised weights)", "load the checkpoint in bfloat16 or float32")
    if mlp_activation(config) not in ACTIVATIONS:
        refuse(f"activation {mlp_activation(config)!r}", f"supported: {', '.join(ACTIVATIONS)}")
    return str(architecture)


def require_stock_code(config: Mapping[str, Any], name: str | Path) -> None:
    """Raises UnsupportedModelError for a config.json that names modeling code of its own: it is never run here."""
    auto_map = config.get("auto_map")
    named = [auto_map[k] for k in ("AutoModelForCausalLM", "AutoModel") if k in auto_map] if auto_map else []
    if named:
        raise UnsupportedModelError(
            f"The auto_map in config.json of {name} names modeling code of its own ({named[0]}). Such code is never "
            "run here, and without it the model may be another one. If its weights are those of a stock architecture, "
            "load it with transformers and trust_remote_code=False, and give the model in place of its name."
        )


def require_plain_mlps(config: Mapping[str, Any], tensors: Iterable[str], name: str | Path) -> None:
    """Refuse MLPs that are more than their three matrices, as `require_representable` does for a whole model.

    Args:
        config: what config.json says.
        tensors: names of all tensors of the checkpoint.
        name: what the message calls the model.

    Raises:
        UnsupportedModelError: quantized or biased MLPs, or modeling code of its own.
    """
    require_stock_code(config, name)
    if config.get("quantization_config"):
        raise UnsupportedModelError(
            f"{name} has quantized weights (quantization_config in its configuration), whose stored numbers are not "
            "the weights. Give the checkpoint in bfloat16 or float32."
        )
    beside = {f".mlp.{projection}.": f".mlp.{projection}.weight" for projection in PROJECTIONS}
    for tensor in tensors:
        for part, weight in beside.items():
            if part in tensor and not tensor.endswith(weight):
                raise UnsupportedModelError(
                    f"{name} has the tensor {tensor}: its MLPs are more than their three weight matrices (a bias, "
                    "scales of quantized weights, LoRA), and only these are read. Give a plain checkpoint in bfloat16 "
                    "or float32, with LoRA merged."
                )


def load_config(folder: Path, without_adapters: bool = False) -> PretrainedConfig:
    """The folder's configuration.

    ``without_adapters`` takes a checkpoint of the paper's authors as the hybrid that it holds.
    Raises CheckpointError, UnsupportedModelError.
    """
    require_stock_code(read_config(folder), folder)
    architectures = read_config(folder).get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else "none"
    if architecture.endswith(AUTHORS_SUFFIX) and not without_adapters:
        raise UnsupportedModelError(
            f"{folder} is a whole replacement model of the paper's authors ({architecture}): read its adapters with "
            "from_authors, or the pair with authors_pair."
        )
    if architecture.removesuffix(AUTHORS_SUFFIX) not in ARCHITECTURES:
        # Said here, since transformers fails in its own words on a model type it does not know.
        raise UnsupportedModelError(
            f"{folder} is of architecture {architectures}; supported: {', '.join(ARCHITECTURES)}."
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.architectures = [architecture.removesuffix(AUTHORS_SUFFIX)]
    return config


def load_hf_model(
    name: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    without_adapters: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model of a folder or hub name, with its tokenizer; tokenizer and dtype are the folder's own where None.

    ``without_adapters`` leaves out the adapters of a checkpoint of the paper's authors, which is then the hybrid.
    Everything that can be seen in config and file headers is checked before a weight is read.
    Raises UnsupportedModelError, CheckpointError.
    """
    folder = locate(name)
    config = load_config(folder, without_adapters)
    require_representable(config)
    require_stock_files(folder, config)
    hf_model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype or "auto",
        use_safetensors=True,
        output_loading_info=True,
        trust_remote_code=False,
        # Fused attention of earlier releases of transformers leaves out Gemma 2's soft cap of the scores.
        attn_implementation="eager" if getattr(config, "attn_logit_softcapping", None) else None,
    )
    if missing := sorted(info["missing_keys"]):
        # transformers would fill these at random and only log it.
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors of a {config.architectures[0]}, such as {missing[0]}; "
            "it is not a complete checkpoint."
        )
    hf_model.config.name_or_path = str(name)
    if tokenizer is None:
        tokenizer = load_tokenizer(folder)
    else:
        warn_of_other_ids(tokenizer, folder)
    return hf_model.to(device or "cpu"), tokenizer


def stock_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model that ``config`` describes, on the meta device: names, shapes and classes, and no memory."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        return getattr(transformers, require_representable(config))(config)


def require_stock_files(folder: Path, config: PretrainedConfig) -> None:
    """Raises CheckpointError where a folder's files hold other tensors than a model of its configuration has."""
    require_unscaled(folder)
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


@torch.no_grad()
def moved(hf_model: PreTrainedModel, device: torch.device | str | None, dtype: torch.dtype | None) -> PreTrainedModel:
    """``hf_model`` on that device with parameters of that dtype, in place; None leaves either as it is.

    Unlike the model's own ``.to(dtype)`` this casts no buffers. Rotary frequencies in bfloat16 make angles
    that are off by tenths of a radian at a thousand positions; where an earlier cast rounded them (or the factor of
    Gemma's embedding), they are put back, with a warning.
    """
    if device is not None:
        hf_model.to(device)
    for parameter in hf_model.parameters():
        if dtype is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    if not hf_model.model.rotary_emb.inv_freq.is_meta:
        _restore_constants(hf_model)
    return hf_model


def _restore_constants(hf_model: PreTrainedModel) -> None:
    """Put back, with a warning, what a cast of the whole model has rounded and its configuration says exactly."""
    rotary, embedding = hf_model.model.rotary_emb, hf_model.model.embed_tokens
    exact = {(rotary, "inv_freq"): type(rotary)(hf_model.config).inv_freq}
    if hasattr(embedding, "scalar_embed_scale"):
        exact[embedding, "embed_scale"] = torch.tensor(embedding.scalar_embed_scale)
    for (module, name), values in exact.items():
        here = getattr(module, name)
        values = values.to(here.device)
        rounded = (values.to(low).to(here.dtype) for low in (torch.bfloat16, torch.float16))
        if torch.equal(values, here.to(values.dtype)) or not any(torch.equal(low, here) for low in rounded):
            continue  # as it should be, or changed in another way, which is not ours to undo
        log.warning(
            "A cast of the whole model had rounded its %s (rotary frequencies are then off by tenths of a radian at a "
            "thousand positions). It is exact again, as transformers' own dtype= keeps it.",
            name,
        )
        setattr(module, name, values)
        if module is rotary:
            rotary.original_inv_freq = values
