"""Whitened coordinates of the inputs of one MLP: mean 0 and covariance close to the identity.

The inputs of an MLP have a covariance whose eigenvalues span several orders of magnitude. An encoder that is trained in
these coordinates moves along the large directions only, so the local stage trains it in whitened ones and converts its
weights afterwards, which changes no activation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_adapters.utils.precision import host_float64, wide

ROWS_AT_ONCE = 2**14
"""Number of rows whose products are summed at a time."""


class RunningCovariance:
    """Mean and covariance of rows that are added in parts; nothing but their sums is kept."""

    def __init__(self, d_model: int) -> None:
        self.n = 0
        self._sum = torch.zeros(d_model, dtype=torch.float64)
        self._products = torch.zeros(d_model, d_model, dtype=torch.float64)

    def add(self, x: Float[Tensor, "n d_model"]) -> None:
        """Add rows."""
        for part in x.split(ROWS_AT_ONCE):
            rows = wide(part)
            self._sum += host_float64(rows.sum(0))
            self._products += host_float64(rows.T @ rows)
        self.n += len(x)

    @property
    def mean(self) -> Float[Tensor, "d_model"]:
        """The mean of all rows, in float64 on the CPU."""
        return self._sum / self.n

    @property
    def covariance(self) -> Float[Tensor, "d_model d_model"]:
        """The covariance of all rows, in float64 on the CPU."""
        return self._products / self.n - torch.outer(self.mean, self.mean)


@dataclass(frozen=True)
class Whitening:
    """The map x -> (x - mean) @ matrix to whitened coordinates."""

    mean: Float[Tensor, "d_model"]
    """Mean of the inputs."""
    matrix: Float[Tensor, "d_model d_model"]
    """Eigenvectors of the covariance as columns, each over the root of its shrunk eigenvalue."""

    @classmethod
    def of(cls, inputs: RunningCovariance, shrinkage: float) -> Whitening:
        """The whitening of inputs with these moments, in float32.

        Args:
            inputs: mean and covariance.
            shrinkage: share of the largest eigenvalue that is added to every eigenvalue, above 0, so that directions
                in which the inputs hardly vary are not scaled up to noise.
        """
        values, vectors = torch.linalg.eigh(inputs.covariance)
        values = values.clamp(min=0)
        matrix = vectors * (values + shrinkage * values.max()).rsqrt()
        return cls(inputs.mean.float(), matrix.float())

    def to(self, device: torch.device) -> Whitening:
        """The same whitening on a device."""
        return Whitening(self.mean.to(device), self.matrix.to(device))

    def __call__(self, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """Inputs in whitened coordinates."""
        return (x - self.mean) @ self.matrix

    def encoder(
        self, W_enc: Float[Tensor, "d_model n_features"], b_enc: Float[Tensor, "n_features"]
    ) -> tuple[Float[Tensor, "d_model n_features"], Float[Tensor, "n_features"]]:
        """Encoder and bias for inputs as they are, from those for whitened ones; pre-activations are equal."""
        converted = self.matrix @ W_enc
        return converted, b_enc - self.mean @ converted
