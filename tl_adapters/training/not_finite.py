"""Where a training step is not finite: the first activation, else the first gradient, that is NaN or infinite."""

from __future__ import annotations

import torch

from tl_adapters.adapters.finite_weights import NotFiniteError
from tl_adapters.data.traces import Batch
from tl_adapters.models.finite_activations import by_layer_name, require_finite_activations
from tl_adapters.models.paired_model import PairedModel


@torch.no_grad()
def describe_not_finite(pair: PairedModel, batch: Batch) -> str:
    """A sentence that locates the first NaN or infinity of a step and says what to change.

    Args:
        pair: with adapters that hold the step's gradients.
        batch: the step's batch, on the models' device.
    """
    try:
        for route in ("target", "replacement"):
            with pair.routed(route):
                streams = by_layer_name(pair.residual_streams(batch.tokens))
            require_finite_activations(streams, batch.real, range(len(batch.tokens)), f"In this batch, the {route}")
    except NotFiniteError as error:
        return str(error)
    adapters = pair.installed_adapters()
    for layer, adapter in zip(adapters.layer_indices, adapters, strict=True):
        for name, weight in adapter.named_parameters():
            if weight.grad is not None and not bool(torch.isfinite(weight.grad).all()):
                return (
                    f"The activations are finite; the first gradient that is not: layer {layer}, {name}. Lower lr, or "
                    "look at the data of this step."
                )
    return "All activations and gradients are finite; lower lr or grad_clip."
