"""Whitened coordinates of the inputs of one MLP: mean 0 and covariance close to the identity; and units of its outputs.

The inputs of an MLP have a covariance whose eigenvalues span several orders of magnitude. An encoder that is trained in
these coordinates moves along the large directions only, so the local stage trains it in whitened ones and converts its
weights afterwards, which changes no activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_adapters.adapters.transcoder import TranscoderAdapter
from tl_adapters.utils.precision import host_float64, wide

_CPU = torch.device("cpu")
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
    def of(cls, inputs: RunningCovariance, shrinkage: float, device: torch.device = _CPU) -> Whitening:
        """The whitening of inputs with these moments, in float32 on the CPU.

        Args:
            inputs: mean and covariance.
            device: where eigenvectors may be computed.
            shrinkage: share of the largest eigenvalue that is added to every eigenvalue, above 0, so that directions
                in which the inputs hardly vary are not scaled up to noise.
        """
        # On a GPU, where 3,584 columns take seconds instead of a minute; MPS has neither float64 nor this function.
        covariance = inputs.covariance.to(device if device.type == "cuda" else "cpu")
        values, vectors = (part.cpu() for part in torch.linalg.eigh(covariance))
        values = values.clamp(min=0)
        matrix = vectors * (values + shrinkage * values.max()).rsqrt()
        return cls(inputs.mean.float(), matrix.float().contiguous())  # products do not depend on its layout

    def to(self, device: torch.device) -> Whitening:
        """The same whitening on a device."""
        return Whitening(self.mean.to(device), self.matrix.to(device))

    def __call__(self, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """Inputs in whitened coordinates."""
        return torch.addmm(-self.mean @ self.matrix, x, self.matrix)

    def encoder(
        self, W_enc: Float[Tensor, "d_model n_features"], b_enc: Float[Tensor, "n_features"]
    ) -> tuple[Float[Tensor, "d_model n_features"], Float[Tensor, "n_features"]]:
        """Encoder and bias for inputs as they are, from those for whitened ones; pre-activations are equal."""
        converted = self.matrix @ W_enc
        return converted, b_enc - self.mean @ converted


@dataclass(frozen=True)
class LayerCoordinates:
    """The coordinates in which the adapter of one layer is trained: whitened inputs, and outputs in units of a size.

    An adapter in these coordinates has a twin that reads and writes the residual stream as it is (`write`), and the
    gradient of the twin's weights is one of its own (`take_gradients`).
    """

    whitening: Whitening
    """Of the inputs."""
    size: float
    """Root mean square of the difference's length; the unit of the outputs."""

    def __call__(self, x: Tensor, d: Tensor) -> tuple[Float[Tensor, "n d_model"], Float[Tensor, "n d_model"]]:
        """Inputs and differences in these coordinates, in float32."""
        device = self.whitening.mean.device
        return self.whitening(x.to(device).float()), d.to(device).float() / self.size

    def to(self, device: torch.device) -> LayerCoordinates:
        """The same coordinates on a device."""
        return LayerCoordinates(self.whitening.to(device), self.size)

    @torch.no_grad()
    def write(self, adapter: TranscoderAdapter, twin: TranscoderAdapter) -> None:
        """Give the twin the weights with which it has the same activations and ``size`` times the output."""
        W_enc, b_enc = self.whitening.encoder(adapter.W_enc, adapter.b_enc)
        twin.W_enc.copy_(W_enc)
        twin.b_enc.copy_(b_enc)
        twin.W_dec.copy_(adapter.W_dec * self.size)
        twin.b_dec.copy_(adapter.b_dec * self.size)
        if hasattr(adapter, "threshold"):
            twin.threshold.copy_(adapter.threshold)

    @torch.no_grad()
    def take_gradients(self, twin: TranscoderAdapter, adapter: TranscoderAdapter) -> None:
        """Give the adapter the gradients that those of the twin mean for it, by the chain rule."""
        grads = {name: parameter.grad for name, parameter in twin.named_parameters()}
        W_enc, b_enc, W_dec, b_dec = (grads[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
        assert W_enc is not None
        assert b_enc is not None
        adapter.W_enc.grad = self.whitening.matrix.T @ (W_enc - torch.outer(self.whitening.mean, b_enc))
        adapter.b_enc.grad = b_enc.clone()
        adapter.W_dec.grad = None if W_dec is None else W_dec * self.size
        adapter.b_dec.grad = None if b_dec is None else b_dec * self.size
        if (threshold := grads.get("threshold")) is not None:
            adapter.threshold.grad = threshold.clone()

    def tensors(self) -> dict[str, Tensor]:
        """The coordinates as tensors, from which `of_tensors` makes them again."""
        size = torch.tensor(self.size, dtype=torch.float64)
        return {"mean": self.whitening.mean, "matrix": self.whitening.matrix, "size": size}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], device: torch.device) -> LayerCoordinates:
        """The inverse of `tensors`, on a device."""
        whitening = Whitening(tensors["mean"], tensors["matrix"]).to(device)
        return cls(whitening, float(tensors["size"]))
