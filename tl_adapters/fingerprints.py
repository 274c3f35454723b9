"""Which weights were these? Short content hashes, so that files of one model are never used with another's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

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


def differing(recorded: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
    """Names of the fingerprints that both sides have and that differ.

    Those of a target ("target...") and of a base ("base_mlps") are compared only where both sides took them in the same
    dtype ("dtype", "base_dtype"): a cast changes every value. Of adapters ("adapters", and "adapters.N" of single
    layers) those of the layers are compared where both sides have them, so that some layers of a set are known as
    layers of that set.
    """
    both = recorded.keys() & present.keys()
    for dtype, of_it in (("dtype", "target"), ("base_dtype", "base_mlps")):
        if dtype in both and recorded[dtype] != present[dtype]:
            both = {name for name in both if not name.startswith(of_it)}
    if any(name.startswith("adapters.") for name in both):
        both = both - {"adapters"}
    return sorted(name for name in both - {"dtype", "base_dtype"} if recorded[name] != present[name])
