"""Sums and logits with enough precision for every dtype and device.

MPS has no float64, and GPUs are slow in it. Sums are therefore computed in float64 on the CPU, and on other devices in
float32, or in float64 for a float64 model. Sums over batches are moved to the CPU first (`host_float64`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

CAST_ELEMENTS = 2**24
"""Number of elements of a weight that are cast to float32 at a time (64 MB)."""


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32 where it is in bfloat16 or float16; otherwise unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


def wide(x: Tensor) -> Tensor:
    """``x`` in the dtype in which sums over it are computed: float64 on the CPU, float32 or wider elsewhere."""
    on_cpu = x.device.type == "cpu"
    return x.to(torch.float64 if on_cpu else torch.promote_types(x.dtype, torch.float32))


def host_float64(x: Tensor) -> Tensor:
    """``x`` on the CPU in float64; it is moved before it is cast."""
    return x.cpu().double()


def adapter_dtype(model: torch.dtype, device: torch.device, precision: str = "auto") -> torch.dtype | None:
    """The dtype in which adapters with float32 weights compute beside a model; None is the weights' own.

    On a GPU a product in float32 takes about ten times as long as one in bfloat16, so that float32 adapters would cost
    a model in bfloat16 more time than all the rest of it.

    Args:
        model: dtype of the model.
        device: where both compute.
        precision: as `TrainingConfig.adapter_precision`.
    """
    by_default = device.type == "cuda" and model == torch.bfloat16
    return torch.bfloat16 if precision == "bfloat16" or (precision == "auto" and by_default) else None


@contextmanager
def tf32_products(enabled: bool) -> Iterator[None]:
    """Within this context a GPU computes products of float32 with 10 bits (TF32), if that is enabled."""
    before = torch.get_float32_matmul_precision()
    if enabled:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def product_in_float32(x: Float[Tensor, "*batch n"], weight: Float[Tensor, "n m"]) -> Float[Tensor, "*batch m"]:
    """x @ weight as float32 computes it, for a weight in any dtype; without gradients.

    Where the device sums products of bfloat16 in float32, ``x`` is split into three parts in bfloat16 whose sum it is,
    to float32's last bit. Products of two numbers in bfloat16 are exact in float32, so three such products are as exact
    as one in float32 and, on a GPU, take a third of its time; an ``x`` in bfloat16 needs only one.
    """
    if weight.dtype != torch.bfloat16 or not _accumulates_in_float32(weight.device, weight.dtype):
        dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
        return x.to(dtype) @ weight.to(dtype)
    rows = x.flatten(0, -2)
    part = rows.to(torch.bfloat16)
    product = torch.mm(part, weight, out_dtype=torch.float32)
    if x.dtype != torch.bfloat16:
        for _ in range(2):
            rows = rows - part
            part = rows.to(torch.bfloat16)
            product += torch.mm(part, weight, out_dtype=torch.float32)
    return product.unflatten(0, x.shape[:-1])


def linear_in_float32(
    x: Float[Tensor, "*batch d_model"], weight: Float[Tensor, "d_vocab d_model"], bias: Tensor | None = None
) -> Float[Tensor, "*batch d_vocab"]:
    """x @ weight.T + bias with products, sums and result in float32; only ``x`` gets a gradient.

    A matrix product in bfloat16 rounds its result to 8 bits: logits near 20 are multiples of 0.125, which alone causes
    a KL divergence of about 1e-3 nats. The weight is cast in slices, so that no whole copy of it is in memory.

    Args:
        x: input of the unembedding, in any dtype.
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
    """(index of the first row, rows in float32) for each slice of a weight."""
    size = max(1, CAST_ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), size):
        yield start, weight[start : start + size].float()


@cache
def _accumulates_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a matrix product of ``dtype`` can have a float32 result, as on CUDA since torch 2.8; tested once."""
    if device.type != "cuda":
        return False
    try:
        ones = torch.ones(16, 16, device=device, dtype=dtype)
        product = torch.mm(ones * 3, ones + 2**-7, out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        return False
    return product.dtype == torch.float32 and float(product[0, 0]) == 16 * 3 * (1 + 2**-7)


@contextmanager
def float32_logits(module: nn.Module, weight: Tensor, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the forward of a low-precision unembedding within a block; its hooks fire as usual."""
    if weight.dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    before = module.__dict__.get("forward")  # of a model that Accelerate has distributed
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before
