"""A check that weights, as they are read, hold neither NaN nor infinity."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tl_adapters.errors import UserError


class NotFiniteError(UserError, ArithmeticError):
    """Weights or activations that are NaN or infinite."""


def require_finite_weights(weights: Iterable[tuple[str, Tensor]], of: str) -> None:
    """Raise NotFiniteError with the name of the first weight that holds NaN or infinity.

    Args:
        weights: names, such as "layer 3, W_dec", and tensors on one device.
        of: the owner of the weights, with which the message begins.
    """
    named = [(name, weight.detach()) for name, weight in weights if weight.is_floating_point()]
    if not named:
        return
    finite = torch.stack([torch.isfinite(weight).all() for _, weight in named]).tolist()
    bad = [(name, weight) for (name, weight), good in zip(named, finite, strict=True) if not good]
    if bad:
        name, weight = bad[0]
        n = int((~torch.isfinite(weight)).sum())
        raise NotFiniteError(
            f"{of}: {name} holds {n:,} values of {weight.numel():,} that are NaN or infinite"
            + (f", and so do {len(bad) - 1} more tensors" if len(bad) > 1 else "")
            + ". Use an earlier checkpoint, or copy the files again; float16 overflows above 65,504, so cast to "
            "bfloat16 or float32."
        )
