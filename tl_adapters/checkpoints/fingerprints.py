"""Which weights were these? Short content hashes, so that files of one model are never used with another's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

K = TypeVar("K")

HASHED_VALUES = 1024
"""Values read of each tensor: any training moves some of them, and a 7B model is done in a second."""


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """16 hex digits of the names, shapes and `HASHED_VALUES` evenly spaced values of named tensors, in order."""
    return fingerprints({"": tensors})[""]


def fingerprints(groups: Mapping[K, Iterable[tuple[str, Tensor]]]) -> dict[K, str]:
    """`fingerprint` of several groups of named tensors, with one copy from each device for all of them."""
    named = [(key, name, tensor) for key, tensors in groups.items() for name, tensor in tensors]
    digests = {key: hashlib.sha256() for key in groups}
    for (key, name, tensor), values in zip(named, _to_host([_sampled(t) for _, _, t in named]), strict=True):
        digests[key].update(f"{name}{tuple(tensor.shape)}".encode())
        digests[key].update(values.numpy().tobytes())
    return {key: digest.hexdigest()[:16] for key, digest in digests.items()}


def _sampled(tensor: Tensor) -> Tensor:
    places = torch.arange(0, tensor.numel(), max(1, tensor.numel() // HASHED_VALUES), device=tensor.device)[
        :HASHED_VALUES
    ]
    # Indexed, not flattened: weights are transposed views, and flattening one copies it.
    return tensor.detach()[torch.unravel_index(places, tensor.shape)].to(torch.float32)


def _to_host(samples: list[Tensor]) -> list[Tensor]:
    """The samples on the CPU, those of each device in one copy."""
    found = list(samples)
    for device in {sample.device for sample in samples if sample.device.type != "cpu"}:
        there = [i for i, sample in enumerate(samples) if sample.device == device]
        joined = torch.cat([samples[i] for i in there]).cpu()
        for i, values in zip(there, joined.split([len(samples[i]) for i in there]), strict=True):
            found[i] = values.contiguous()
    return found


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
