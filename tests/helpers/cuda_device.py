"""A real GPU behind the names of `pretended_device`, for the tests that ``make gpu`` runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

CUDA_IS_TESTED = os.environ.get("TL_ADAPTERS_TEST_CUDA") == "1"
"""Whether tests run on the GPU of this machine, too."""


class CudaDevice:
    """The first GPU."""

    name = torch.device("cuda")
    float64 = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block that runs on the CPU, as tensors are made there unless a device is named."""
        yield

    def hold(self, *things: nn.Module | Tensor) -> None:
        """Put modules (parameters and buffers) and tensors on the GPU, where they stand."""
        for thing in things:
            if isinstance(thing, nn.Module):
                thing.to(self.name)
            else:
                thing.data = thing.data.to(self.name)

    def holds(self, tensor: Tensor) -> bool:
        """Is it on the GPU?"""
        return tensor.device.type == "cuda"
