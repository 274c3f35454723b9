"""Sums and logits that are exact enough in every dtype and on every device.

MPS has no float64 and GPUs are slow in it: sums are made in float64 on the CPU, and in float32 on devices, where a
float64 model keeps its own dtype. What is added up over batches goes to the CPU first (`host_float64`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

SLICE = 2**24
"""Elements of a weight that are cast to float32 at a time: 64 MB."""


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32 where it is in bfloat16 or float16; otherwise as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


def wide(x: Tensor) -> Tensor:
    """``x`` in the dtype that sums over it are made in: float64 on the CPU, float32 at least elsewhere."""
    on_cpu = x.device.type == "cpu"
    return x.to(torch.float64 if on_cpu else torch.promote_types(x.dtype, torch.float32))


def host_float64(x: Tensor) -> Tensor:
    """``x`` on the CPU in float64, moved before it is cast."""
    return x.cpu().double()


def linear_in_float32(
    x: Float[Tensor, "*batch d_model"], weight: Float[Tensor, "d_vocab d_model"], bias: Tensor | None = None
) -> Float[Tensor, "*batch d_vocab"]:
    """x @ weight.T + bias with products, sums and result in float32; gradients reach ``x`` only.

    A matrix product of bfloat16 rounds its result to 8 bits: logits of 20 come in steps of 0.125, which alone makes a
    divergence of about 1e-3 nats. The weight is cast in slices, so that no copy of it is ever held.

    Args:
        x: what the unembedding reads, in any dtype.
        weight: frozen, as nn.Linear has it.
        bias: [d_vocab] or None.
    """
    out: Tensor = _LinearInFloat32.apply(x.flatten(0, -2), weight)
    out = out.unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias.float()


class _LinearInFloat32(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight, ctx.dtype = weight.detach(), x.dtype
        if _accumulates_in_float32(weight.device, weight.dtype):
            return torch.mm(x.to(weight.dtype), ctx.weight.T, out_dtype=torch.float32)
        rows, out = x.float(), x.new_empty(len(x), len(weight), dtype=torch.float32)
        for start, part in _slices(ctx.weight):
            out[:, start : start + len(part)] = rows @ part.T
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        if _accumulates_in_float32(ctx.weight.device, ctx.weight.dtype):
            total = torch.mm(grads[0].to(ctx.weight.dtype), ctx.weight, out_dtype=torch.float32)
        else:
            total = grads[0].new_zeros(len(grads[0]), ctx.weight.shape[1])
            for start, part in _slices(ctx.weight):
                total += grads[0][:, start : start + len(part)] @ part
        return total.to(ctx.dtype), None


def _slices(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows in float32) of a weight, slice by slice."""
    size = max(1, SLICE // weight.shape[1])
    for start in range(0, len(weight), size):
        yield start, weight[start : start + size].float()


@cache
def _accumulates_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Can a matrix product of ``dtype`` have a float32 result here, as CUDA has since torch 2.8? Tried out, once."""
    if device.type != "cuda":
        return False
    try:
        ones = torch.ones(16, 16, device=device, dtype=dtype)
        found = torch.mm(ones * 3, ones + 2**-7, out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        return False
    return found.dtype == torch.float32 and float(found[0, 0]) == 16 * 3 * (1 + 2**-7)


@contextmanager
def float32_logits(module: nn.Module, weight: Tensor, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A low-precision unembedding computes ``forward`` for the length of a block; hooks on it fire as always."""
    if weight.dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
