"""Weights of a model that Accelerate has distributed over devices, of which some are read only for each use.

Accelerate keeps offloaded weights in the CPU's memory or in the model's files. In the modules are placeholders on the
meta device, whose values are there only while a module's own forward runs. `stored` reads such a weight at any time.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def is_dispatched(model: nn.Module) -> bool:
    """Whether Accelerate moves the inputs of some module of this model."""
    return any("_hf_hook" in module.__dict__ for module in model.modules())


def is_offloaded(module: nn.Module) -> bool:
    """Whether Accelerate reads a module's own weights for each use."""
    return bool(getattr(module.__dict__.get("_hf_hook"), "offload", False))


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: for an offloaded one the device that Accelerate moves its weights to."""
    device = getattr(module.__dict__.get("_hf_hook"), "execution_device", None)
    if device is None:
        return next(module.parameters()).device
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def stored(module: Any, name: str = "weight") -> Tensor:
    """A weight of a module, or of the one that a bridge's component wraps, with its values wherever they are kept."""
    inner = getattr(module, "original_component", None)
    inner = module if inner is None else inner
    weight: Tensor = getattr(inner, name)
    if weight is None or not weight.is_meta or not is_offloaded(inner):
        return weight
    values: Tensor = inner._hf_hook.weights_map[name]
    return values.detach().to(execution_device(inner), weight.dtype)


def offload(module: nn.Module, weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Let a module read its own parameters from ``weights`` for each use, in their dtype, to compute on ``device``.

    A tensor of a safetensors file is a view of that file, so that nothing of it stays in memory.
    """
    hook = _hooks().AlignDevicesHook(execution_device=device, offload=True, weights_map=dict(weights))
    _hooks().add_hook_to_module(module, hook)


def take_hook(module: nn.Module) -> Any:
    """Takes Accelerate's hook off a module and returns it; None if there is none.

    The hook calls the forward method that the module had when it was added. A module whose class is to change gets it
    again afterwards (`give_hook`), or it would compute as before.
    """
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:
        _hooks().remove_hook_from_module(module)
        del module.__dict__["forward"]
    return hook


def give_hook(module: nn.Module, hook: Any) -> None:
    """Adds a hook that `take_hook` has returned."""
    if hook is not None:
        _hooks().add_hook_to_module(module, hook)


def _hooks() -> Any:
    """Accelerate's module of hooks, which only models with a device map need."""
    return importlib.import_module("accelerate.hooks")
