"""A Hugging Face model from a folder or the hub: its configuration read, its files checked, its weights loaded."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tl_adapters.checkpoints.architectures import (
    ARCHITECTURES,
    AUTHORS_CHECKPOINT_SUFFIX,
    UnsupportedModelError,
    architecture_name,
)
from tl_adapters.checkpoints.model_checks import require_representable, require_stock_code, require_stock_files
from tl_adapters.checkpoints.model_files import CheckpointError, locate, read_config
from tl_adapters.checkpoints.tokenizers import load_tokenizer, warn_of_other_ids

log = logging.getLogger(__name__)


def load_config(folder: Path, without_adapters: bool = False) -> PretrainedConfig:
    """The folder's configuration.

    ``without_adapters`` takes a checkpoint of the paper's authors as the hybrid that it holds.
    Raises CheckpointError, UnsupportedModelError.
    """
    require_stock_code(read_config(folder), folder)
    architecture = architecture_name(read_config(folder))
    if architecture.endswith(AUTHORS_CHECKPOINT_SUFFIX) and not without_adapters:
        raise UnsupportedModelError(
            f"{folder} is a whole replacement model of the paper's authors ({architecture}): read its adapters with "
            "from_authors, or the pair with authors_pair."
        )
    if architecture.removesuffix(AUTHORS_CHECKPOINT_SUFFIX) not in ARCHITECTURES:
        # Said here, since transformers fails in its own words on a model type it does not know.
        raise UnsupportedModelError(
            f"{folder} is of architecture {architecture}; supported: {', '.join(ARCHITECTURES)}."
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.architectures = [architecture.removesuffix(AUTHORS_CHECKPOINT_SUFFIX)]
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
    architecture = require_representable(config)
    require_stock_files(folder, config)
    hf_model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype or "auto",
        use_safetensors=True,
        output_loading_info=True,
        trust_remote_code=False,
        attn_implementation="eager" if architecture.eager_attention else None,
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


@torch.no_grad()
def move_model(
    hf_model: PreTrainedModel, device: torch.device | str | None, dtype: torch.dtype | None
) -> PreTrainedModel:
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
