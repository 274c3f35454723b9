"""Which weights were these? Short content hashes, so that files of one model are never used with another's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

SAMPLES = 1024
"""Values read of each tensor: any training moves some of them, and a 7B model is done in a second."""


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """16 hex digits of the names, shapes and `SAMPLES` evenly spaced values of named tensors, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        places = torch.arange(0, tensor.numel(), max(1, tensor.numel() // SAMPLES), device=tensor.device)[:SAMPLES]
        # Indexed, not flattened: weights are transposed views, and flattening one copies it.
        sample = tensor.detach()[torch.unravel_index(places, tensor.shape)].to("cpu", torch.float32)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
