"""The tokens that the local stage trains on: what the adapter of every layer reads, and the output it should have."""

from __future__ import annotations

import torch
from torch import Tensor

from tl_adapters.data.traces import Batch
from tl_adapters.local_stage.regression_data import RegressionData


class TokenBuffer:
    """The latest tokens of a stream: what the adapter of every layer reads (x), and the output it should have (d).

    Both are kept in the dtype of the model; the difference of two MLPs is computed in float32 before it is rounded,
    which changes each of its entries by at most one part in 256.

    Args:
        data: inputs and wanted outputs of a batch.
        capacity: number of tokens that are kept.
    """

    def __init__(self, data: RegressionData, capacity: int) -> None:
        self.data, self.capacity, self.seen = data, capacity, 0
        shape = (capacity, data.d_model)
        self.x = [torch.empty(shape, dtype=data.dtype, device=data.device) for _ in range(data.n_layers)]
        self.d = [torch.empty(shape, dtype=data.dtype, device=data.device) for _ in range(data.n_layers)]

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    @property
    def full(self) -> bool:
        """Whether new tokens overwrite old ones."""
        return self.seen >= self.capacity

    def add(self, batch: Batch) -> None:
        """Run the model on a batch and keep its counted tokens, in the place of the oldest ones."""
        n = 0
        for layer, (x, d) in enumerate(self.data.read(batch)):
            n = min(len(x), self.capacity)
            places = torch.arange(self.seen, self.seen + n, device=x.device) % self.capacity
            self.x[layer][places] = x[:n].to(self.data.dtype)
            self.d[layer][places] = d[:n].to(self.data.dtype)
        self.seen += n

    def draw(self, layer: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and wanted outputs of n tokens of a layer, drawn at random with replacement."""
        rows = torch.randint(len(self), (n,), generator=generator).to(self.x[layer].device)
        return self.x[layer][rows], self.d[layer][rows]

    def sample(self, layer: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and wanted outputs of at most n different tokens of a layer, drawn at random."""
        rows = torch.randperm(len(self), generator=generator)[:n].to(self.x[layer].device)
        return self.x[layer][rows], self.d[layer][rows]
