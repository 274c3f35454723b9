"""The entry point, which tells vLLM the names of the model classes; vLLM imports their module when it loads one."""

from __future__ import annotations

from tl_adapters.checkpoints.architectures import ARCHITECTURES
from tl_adapters.vllm_plugin.served_conditions import SERVED_PREFIX

SERVED_ARCHITECTURES = tuple(ARCHITECTURES)
"""The architectures of which `models` has a class; the export refuses others."""


def register() -> None:
    """Register the model classes. vLLM calls this in each of its processes, possibly more than once."""
    from vllm import ModelRegistry

    for name in SERVED_ARCHITECTURES:
        served = f"{SERVED_PREFIX}{name}"
        ModelRegistry.register_model(served, f"tl_adapters.vllm_plugin.models:{served}")
