"""Documents whose tokens are of very different frequencies, as those of real text are."""

import torch

from tl_adapters.data.traces import Trace


def skewed_traces(n: int = 300, seed: int = 0, vocab: int = 61) -> list[Trace]:
    """Documents whose tokens are of very different frequencies."""
    generator = torch.Generator().manual_seed(seed)
    shares = 1 / torch.arange(1, vocab).double()
    return [
        Trace(tuple((1 + torch.multinomial(shares, 20 + i % 5, True, generator=generator)).tolist()), 3)
        for i in range(n)
    ]
