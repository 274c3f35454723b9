"""How large the difference of a layer's two MLPs is beside their rounding errors.

The difference is small beside the output of either MLP: in bfloat16 the rounding of the two outputs is 8 % of its
energy where their weights differ by 1 %. Below a ratio, an adapter would be trained on noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_adapters.models.routed_mlp import RoutedMLP
from tl_adapters.utils.precision import at_least_float32


@dataclass(frozen=True)
class SignalToNoise:
    """The difference of one layer beside the rounding of the two MLPs in the dtype of the model."""

    signal: float
    """Mean of |d(x)|^2 over tokens."""
    noise: float
    """Mean squared length of the rounding errors of both MLPs' outputs, summed."""

    @property
    def ratio(self) -> float:
        """Signal over noise; infinite for exact arithmetic."""
        return self.signal / self.noise if self.noise else float("inf")


@torch.no_grad()
def signal_to_noise(mlp: RoutedMLP, x: Float[Tensor, "n d_model"]) -> SignalToNoise:
    """How large the difference of the two MLPs is beside their rounding errors.

    Rounding errors are measured against the next wider dtype: float64 for a float32 model, else float32.

    Args:
        mlp: the MLP of one layer.
        x: its inputs in the target, in the dtype of the model.
    """
    exact = x.double() if x.dtype == torch.float32 and x.device.type != "mps" else at_least_float32(x)
    noise = sum(
        float((weights.output(x).to(exact.dtype) - weights.output(exact)).square().sum(1).mean())
        for weights in mlp.weights()
    )
    return SignalToNoise(float(mlp.difference(exact).square().sum(1).mean()), noise)
