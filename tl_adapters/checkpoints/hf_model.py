"""A Hugging Face model from a folder or the hub: its configuration read, its files checked, its weights loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tl_adapters.checkpoints.architectures import (
    AUTHORS_CHECKPOINT_SUFFIX,
    UnsupportedModelError,
    architecture_name,
    require_supported,
)
from tl_adapters.checkpoints.device_map import MappedDevices, resolve_device_map
from tl_adapters.checkpoints.model_checks import require_representable, require_stock_code, require_stock_files
from tl_adapters.checkpoints.model_files import CheckpointError, locate, read_config
from tl_adapters.checkpoints.tokenizers import load_tokenizer, warn_of_other_ids
from tl_adapters.errors import UserError, first_line
from tl_adapters.utils.devices import GivenDtype, resolve_dtype

log = logging.getLogger(__name__)


def load_config(folder: Path, without_adapters: bool = False) -> PretrainedConfig:
    """The configuration of the model in a folder.

    With ``without_adapters``, a checkpoint of the paper's authors is read as the hybrid that it contains.
    Raises CheckpointError, UnsupportedModelError.
    """
    content = read_config(folder)
    require_stock_code(content, folder)
    architecture = architecture_name(content)
    if architecture.endswith(AUTHORS_CHECKPOINT_SUFFIX) and not without_adapters:
        raise UnsupportedModelError(
            f"{folder} is a whole replacement model of the paper's authors ({architecture}): read its adapters with "
            "from_authors, or the pair with authors_pair."
        )
    # transformers chooses its classes by model_type, and knows many more of them than are supported.
    stock = architecture.removesuffix(AUTHORS_CHECKPOINT_SUFFIX)
    require_supported({**content, "architectures": [stock]}, str(folder))
    with _loading(folder, "config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.architectures = [stock]
    return config


@contextmanager
def _loading(folder: Path, what: str) -> Iterator[None]:
    """Within this context, whatever transformers raises about files becomes a CheckpointError with its first line."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises two dozen classes for files that it cannot use
        raise CheckpointError(
            f"transformers cannot load {what} of {folder} ({type(error).__name__}: {first_line(error)}). Get the files "
            "again, or save the model again with save_pretrained."
        ) from error


def load_hf_model(
    name: str | Path,
    *,
    dtype: GivenDtype | None = None,
    device: torch.device | str | MappedDevices | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    without_adapters: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A Hugging Face model with its tokenizer, checked before any weight is read.

    Args:
        name: folder or hub name.
        dtype: of the weights, torch.bfloat16 or "bfloat16"; None keeps the stored dtype.
        device: where the weights go, `MappedDevices` if to several devices; None is the CPU.
        tokenizer: used instead of the folder's own.
        without_adapters: read a checkpoint of the paper's authors without its adapters, as the hybrid.

    Raises UnsupportedModelError, CheckpointError, TokenizerError, DeviceError, DeviceMapError.
    """
    folder, dtype = locate(name), resolve_dtype(dtype)
    config = load_config(folder, without_adapters)
    architecture = require_representable(config)
    require_stock_files(folder, config)
    mapped = device if isinstance(device, MappedDevices) else None
    parts = None if mapped is None else resolve_device_map(config, mapped.device_map, dtype, mapped.max_memory)
    with _loading(folder, "the weights"):
        hf_model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
            device_map=parts,
            attn_implementation="eager" if architecture.eager_attention else None,
        )
    if missing := sorted(info["missing_keys"]):
        # transformers would initialize these at random and only log it.
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors of a {config.architectures[0]}, such as {missing[0]}; "
            "it is not a complete checkpoint."
        )
    hf_model.config.name_or_path = str(name)
    if tokenizer is None:
        tokenizer = load_tokenizer(folder)
    else:
        warn_of_other_ids(tokenizer, folder)
    return hf_model if isinstance(device, MappedDevices) else hf_model.to(device or "cpu"), tokenizer


@torch.no_grad()
def move_model(
    hf_model: PreTrainedModel, device: torch.device | str | None, dtype: torch.dtype | None
) -> PreTrainedModel:
    """Moves a model to a device and casts its parameters, in place; None leaves device or dtype unchanged.

    Unlike the model's own ``.to(dtype)``, this does not cast buffers: with rotary frequencies in bfloat16, angles are
    off by tenths of a radian after a thousand positions. Where an earlier cast rounded these frequencies, or the factor
    of Gemma's embedding, the exact values are restored with a warning.
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
    """Restores, with a warning, constants that a cast of the whole model rounded, from its configuration."""
    rotary, embedding = hf_model.model.rotary_emb, hf_model.model.embed_tokens
    exact = {(rotary, "inv_freq"): type(rotary)(hf_model.config).inv_freq}
    if hasattr(embedding, "scalar_embed_scale"):
        exact[embedding, "embed_scale"] = torch.tensor(embedding.scalar_embed_scale)
    for (module, name), values in exact.items():
        present = getattr(module, name)
        values = values.to(present.device)
        rounded = (values.to(dtype).to(present.dtype) for dtype in (torch.bfloat16, torch.float16))
        if torch.equal(values, present.to(values.dtype)) or not any(torch.equal(low, present) for low in rounded):
            continue  # exact, or changed on purpose in another way
        log.warning(
            "A cast of the whole model had rounded its %s (rotary frequencies are then off by tenths of a radian at a "
            "thousand positions). It is exact again, as transformers' own dtype= keeps it.",
            name,
        )
        setattr(module, name, values)
        if module is rotary:
            rotary.original_inv_freq = values
