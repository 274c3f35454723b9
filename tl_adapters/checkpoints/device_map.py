"""The parts of a model over several devices: a device map checked, or made from the memory of this machine.

A device map names a device for each part of a model that does not fit one: a GPU, the CPU, or "disk", where weights
stay in the model's files and are read at each use. Accelerate puts the parts there.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias, get_args

import torch
from transformers import PretrainedConfig

from tl_adapters.checkpoints.model_checks import stock_model
from tl_adapters.config import DevicePlan
from tl_adapters.errors import UserError
from tl_adapters.utils.devices import AUTO, resolve_device

DeviceMap: TypeAlias = str | Mapping[str, str | int | torch.device]
"""A way to make a device map ("auto"), or a device for each part of the model by its name in Hugging Face's model."""
MaxMemory: TypeAlias = Mapping[int | str, int | str]
"""The most memory to use of each device: {0: "70GiB", "cpu": "100GiB"}."""
PLANS = get_args(DevicePlan)
"""Names of ways in which Accelerate makes a device map."""
DISK = "disk"
"""The device whose weights stay in the model's files."""


class MappedDevices(NamedTuple):
    """A device map as a user gives it (`resolve_device_map`)."""

    device_map: DeviceMap
    """A plan, or a device per part."""
    max_memory: MaxMemory | None
    """The most memory of each device that a plan uses."""


class DeviceMapError(UserError, ValueError):
    """A device map that a model cannot be opened with."""


def require_accelerate() -> None:
    """Raises DeviceMapError where Accelerate is not installed."""
    if importlib.util.find_spec("accelerate") is None:
        raise DeviceMapError("device_map= needs the library accelerate: pip install accelerate.")


def resolve_device_map(
    config: PretrainedConfig,
    device_map: DeviceMap,
    dtype: torch.dtype | None = None,
    max_memory: MaxMemory | None = None,
) -> dict[str, str | int]:
    """The device of every part of a model: its embedding, each layer, final norm, rotary tables and unembedding.

    Args:
        config: the model's configuration.
        device_map: one of `PLANS`, or a device per part: the number or name of a device of this machine, or "disk".
            A name stands for all parts below it ("model.layers", "model", ""), unless they are named themselves.
        dtype: of the weights, from which a plan computes their size; None is the configuration's.
        max_memory: the most bytes that a plan uses of each device; None is what is free.

    Raises DeviceMapError, and DeviceError for a device that this machine does not have.
    """
    require_accelerate()
    if isinstance(device_map, str):
        given: Mapping[str, str | int | torch.device] = _planned(config, device_map, dtype, max_memory)
    elif max_memory is not None:
        raise DeviceMapError(f"max_memory= limits a plan ({', '.join(PLANS)}); leave it out beside a map of devices.")
    else:
        given = device_map
    if not isinstance(given, Mapping) or not given:
        raise DeviceMapError(
            f"device_map is {device_map!r}; allowed are {', '.join(map(repr, PLANS))}, or a mapping of parts to "
            'devices, such as {"model.embed_tokens": 0, "model.layers.0": "cpu", "model.layers.1": "disk", ...}.'
        )
    parts = _parts(config)
    _require_known(given, parts, config)
    devices = {name: _device(name, device) for name, device in given.items()}
    resolved = {}
    for part in parts:
        names = [name for name in devices if not name or part == name or part.startswith(f"{name}.")]
        if names:
            resolved[part] = devices[max(names, key=len)]
    if "model.embed_tokens" in resolved:
        resolved.setdefault("model.rotary_emb", resolved["model.embed_tokens"])
        if config.tie_word_embeddings:
            resolved.setdefault("lm_head", resolved["model.embed_tokens"])
    if missing := [part for part in parts if part not in resolved]:
        raise DeviceMapError(
            f"The device map has no device for {_listed(missing)}. Name every part of the model: {_listed(parts)}; a "
            'name such as "model.layers" stands for all below it.'
        )
    if config.tie_word_embeddings and resolved["lm_head"] != resolved["model.embed_tokens"]:
        raise DeviceMapError(
            f"The device map puts model.embed_tokens on {resolved['model.embed_tokens']} and lm_head on "
            f"{resolved['lm_head']}, which are one matrix in this model; give them one device."
        )
    return resolved


def _parts(config: PretrainedConfig) -> list[str]:
    """Names of the parts that a device map places, in the order in which a pass uses them."""
    layers = [f"model.layers.{layer}" for layer in range(config.num_hidden_layers)]
    return ["model.embed_tokens", "model.rotary_emb", *layers, "model.norm", "lm_head"]


def _require_known(given: Mapping[str, object], parts: list[str], config: PretrainedConfig) -> None:
    """Raises DeviceMapError for a name that is no part of the model, or that is inside one of its layers."""
    unknown = [name for name in given if name not in (*parts, "", "model", "model.layers")]
    if not unknown:
        return
    modules = {name for name, _ in stock_model(config).named_modules()}
    if all(name in modules for name in unknown):
        raise DeviceMapError(
            f"The device map names {_listed(unknown)}, inside a layer. A layer is on one device whole: name "
            f"{unknown[0].rpartition('.layers.')[0]}.layers.{unknown[0].rpartition('.layers.')[2].partition('.')[0]}."
        )
    raise DeviceMapError(
        f"The device map names {_listed([name for name in unknown if name not in modules])}, which this model does not "
        f"have. Its parts are {_listed(parts)}."
    )


def _listed(names: list[str]) -> str:
    """Names in a message: all of a few, else the first and the last."""
    return ", ".join(names if len(names) <= 8 else [*names[:4], "...", *names[-3:]])


def _device(name: str, device: str | int | torch.device) -> str | int:
    """A device as Accelerate takes it: "disk", "cpu", the number of a GPU. Raises DeviceMapError, DeviceError."""
    if device == DISK:
        return DISK
    if isinstance(device, bool) or not isinstance(device, str | int | torch.device) or device in (AUTO, ""):
        raise DeviceMapError(
            f"The device map has {device!r} for {name!r}; allowed are the number of a GPU, the name of a device "
            f'("cuda:0", "cpu") and "{DISK}".'
        )
    resolved = resolve_device(f"cuda:{device}" if isinstance(device, int) else device)
    return resolved.type if resolved.type != "cuda" else resolved.index or 0


def _planned(
    config: PretrainedConfig, plan: str, dtype: torch.dtype | None, max_memory: MaxMemory | None
) -> dict[str, str | int]:
    """The device map that Accelerate makes by a plan, for a model whose MLPs are there twice, the target's and base's.

    Accelerate leaves a tenth of the memory of the last device free, and adapters, activations and optimizer come on
    top of the weights, so ``max_memory`` should leave room for them.
    """
    if plan not in PLANS:
        raise DeviceMapError(
            f"device_map is {plan!r}; allowed are {', '.join(map(repr, PLANS))}, or a mapping of parts to devices. One "
            "device for all is device=."
        )
    accelerate: Any = importlib.import_module("accelerate.utils")
    model = stock_model(config)
    for layer in model.model.layers:
        layer.mlp.base = copy.deepcopy(layer.mlp)
    options = {"no_split_module_classes": sorted(model._no_split_modules or ())}
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    limits = None
    if max_memory is not None:  # a configuration's file has the numbers of GPUs as text
        limits = {int(name) if str(name).isdecimal() else name: most for name, most in max_memory.items()}
    try:
        if plan == "sequential":
            limits = accelerate.get_max_memory(limits)
        else:
            low = plan == "balanced_low_0"
            limits = accelerate.get_balanced_memory(model, max_memory=limits, dtype=dtype, low_zero=low, **options)
        return dict(accelerate.infer_auto_device_map(model, max_memory=limits, dtype=dtype, **options))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DeviceMapError(
            f"Accelerate makes no device map from max_memory {dict(max_memory or {})} ({error}). Its keys are numbers "
            'of GPUs and "cpu", its values bytes or sizes such as "20GiB".'
        ) from error
