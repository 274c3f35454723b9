"""The tokens that the local stage trains on: what every layer's MLP reads in the target, and the difference there."""

from __future__ import annotations

import torch
from torch import Tensor

from tl_adapters.data.traces import Batch
from tl_adapters.models.paired_model import PairedModel


class TokenBuffer:
    """The latest tokens of a stream: what every layer's MLP reads in the target, and the difference there.

    Both are kept in the dtype of the model; the difference is computed in float32 before it is rounded, which changes
    each of its entries by at most one part in 256.

    Args:
        pair: base and target.
        capacity: number of tokens that are kept.
    """

    def __init__(self, pair: PairedModel, capacity: int) -> None:
        self.pair, self.capacity, self.seen = pair, capacity, 0
        shape, dtype = (capacity, pair.model.cfg.d_model), pair.model.cfg.dtype
        self.x = [torch.empty(shape, dtype=dtype, device=pair.device) for _ in pair.mlps]
        self.d = [torch.empty(shape, dtype=dtype, device=pair.device) for _ in pair.mlps]

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    @property
    def full(self) -> bool:
        """Whether new tokens overwrite old ones."""
        return self.seen >= self.capacity

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Run the target on a batch and keep its counted tokens, in the place of the oldest ones."""
        pair, batch = self.pair, batch.to(self.pair.device)
        with pair.routed("target"), pair.recorded("mlp.hook_in") as inputs:
            pair.run_blocks(pair.embed(batch.tokens), 0, pair.n_layers)
        rows = batch.counted.nonzero(as_tuple=True)
        n = min(len(rows[0]), self.capacity)
        places = torch.arange(self.seen, self.seen + n, device=pair.device) % self.capacity
        for layer, mlp in enumerate(pair.mlps):
            x = inputs[layer][rows][:n]
            self.x[layer][places] = mlp.adapter_input(x).to(x.dtype)
            self.d[layer][places] = mlp.difference(x).to(x.dtype)
        self.seen += n

    def draw(self, layer: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and differences of n tokens of a layer, drawn at random with replacement."""
        rows = torch.randint(len(self), (n,), generator=generator).to(self.x[layer].device)
        return self.x[layer][rows], self.d[layer][rows]

    def sample(self, layer: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and differences of at most n different tokens of a layer, drawn at random."""
        rows = torch.randperm(len(self), generator=generator)[:n].to(self.x[layer].device)
        return self.x[layer][rows], self.d[layer][rows]
