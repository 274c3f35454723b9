"""Fingerprints: short content hashes of weights, which keep files of one model from being used with another's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

K = TypeVar("K")

HASHED_VALUES = 1024
"""Values of each tensor that are hashed. Any training changes some of them; a 7B model takes about a second."""


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """16 hex digits of the names, shapes and `HASHED_VALUES` evenly spaced values of named tensors, in order."""
    return fingerprints({"": tensors})[""]


def fingerprints(groups: Mapping[K, Iterable[tuple[str, Tensor]]]) -> dict[K, str]:
    """`fingerprint` of several groups of named tensors, with one copy from each device for all of them."""
    named, samples = [], []
    for key, tensors in groups.items():
        for name, tensor in tensors:  # of which only these values stay, as an offloaded one is read for them alone
            named.append((key, f"{name}{tuple(tensor.shape)}"))
            samples.append(_sampled(tensor))
    digests = {key: hashlib.sha256() for key in groups}
    for (key, title), values in zip(named, _to_host(samples), strict=True):
        digests[key].update(title.encode())
        digests[key].update(values.numpy().tobytes())
    return {key: digest.hexdigest()[:16] for key, digest in digests.items()}


def _sampled(tensor: Tensor) -> Tensor:
    """The values of a tensor that are hashed, in float32 on its device."""
    step = max(1, tensor.numel() // HASHED_VALUES)
    positions = torch.arange(0, tensor.numel(), step, device=tensor.device)[:HASHED_VALUES]
    # Indexing copies these values only, while flattening a transposed view would copy the whole weight.
    return tensor.detach()[torch.unravel_index(positions, tensor.shape)].to(torch.float32)


def _to_host(samples: list[Tensor]) -> list[Tensor]:
    """The samples on the CPU, with one copy per device."""
    on_host = list(samples)
    for device in {sample.device for sample in samples if sample.device.type != "cpu"}:
        indices = [i for i, sample in enumerate(samples) if sample.device == device]
        joined = torch.cat([samples[i] for i in indices]).cpu()
        for i, values in zip(indices, joined.split([len(samples[i]) for i in indices]), strict=True):
            on_host[i] = values.contiguous()
    return on_host


def differing(recorded: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
    """Names of the fingerprints that both sides have and that differ.

    Fingerprints of a target ("target...") and of a base ("base_mlps") are compared only where both sides computed them
    in the same dtype ("dtype", "base_dtype"), since a cast changes every value. Adapters have a fingerprint of the set
    ("adapters") and one per layer ("adapters.N"); where both sides have those of layers, only these are compared, so
    that a part of a set matches the whole set.
    """
    both = recorded.keys() & present.keys()
    for dtype, prefix in (("dtype", "target"), ("base_dtype", "base_mlps")):
        if dtype in both and recorded[dtype] != present[dtype]:
            both = {name for name in both if not name.startswith(prefix)}
    if any(name.startswith("adapters.") for name in both):
        both = both - {"adapters"}
    return sorted(name for name in both - {"dtype", "base_dtype"} if recorded[name] != present[name])
