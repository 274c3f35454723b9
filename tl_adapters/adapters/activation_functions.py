"""The four activation functions of adapters, which decide which features are active, and their gradients.

    relu        pre where pre > 0                                (the paper's, arXiv 2602.20904; with an L1 term)
    jumprelu    pre where pre > threshold, learned per feature   (arXiv 2407.14435; with an L0 term)
    topk        the k largest of each token                      (arXiv 2406.04093; needs no term)
    batchtopk   in training the k * n_tokens largest of a batch  (arXiv 2412.06410; needs no term)
                elsewhere pre where pre > threshold, the running mean of the smallest that were let through

Only a positive pre-activation is ever active, and an active feature's activation is its pre-activation: so whatever
accounts for pre-activations (RelP) accounts for activations.

A step has no gradient, so thresholds learn by a straight-through one: the step at z - threshold is differentiated as if
it were a ramp of width ``bandwidth`` (a rectangular kernel). Pre-activations learn from the features they let through.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_adapters.adapters.active_features import ActiveFeatures


def jumprelu(
    pre: Float[Tensor, "*batch n_features"], threshold: Float[Tensor, "n_features"], bandwidth: float
) -> Float[Tensor, "*batch n_features"]:
    """pre * (pre > threshold), positive ones only; gradient to the threshold: -threshold / bandwidth in the kernel."""
    acts: Tensor = _JumpReLU.apply(pre, threshold, bandwidth)
    return acts


def step(
    pre: Float[Tensor, "*batch n_features"], threshold: Float[Tensor, "n_features"], bandwidth: float
) -> Float[Tensor, "*batch n_features"]:
    """1 where `jumprelu` is active; gradient to the threshold: -1 / bandwidth in the kernel, none to ``pre``."""
    active: Tensor = _Step.apply(pre, threshold, bandwidth)
    return active


def topk(pre: Float[Tensor, "*batch n_features"], k: int) -> Float[Tensor, "*batch n_features"]:
    """The k largest pre-activations of each token, without those that are not positive."""
    largest = torch.relu(pre).topk(k, -1)
    return torch.zeros_like(pre).scatter(-1, largest.indices, largest.values)


def batch_topk(
    pre: Float[Tensor, "*batch n_features"], k: int, real: Bool[Tensor, "*batch"], n_real: int | None = None
) -> Float[Tensor, "*batch n_features"]:
    """The k * n largest positive pre-activations of n real tokens together; padding is left out and gets zeros.

    Equal values at the edge are let through together, so that equal tokens get equal activations.

    Args:
        pre: pre-activations.
        k: per token, on average.
        real: the tokens that are not padding.
        n_real: their number, where a caller has it; None asks the device, which waits for it.
    """
    positive = torch.relu(pre)
    values = torch.where(real[..., None], positive.detach(), 0.0).flatten()  # zeros of padding are never among the k n
    n_active = min(k * (int(real.sum()) if n_real is None else n_real), len(values))
    smallest = values.topk(n_active, sorted=False).values.amin()
    return torch.where((positive >= smallest) & real[..., None], positive, torch.zeros_like(positive))


def smallest_active(
    acts: Float[Tensor, "*batch n_features"] | ActiveFeatures, real: Bool[Tensor, "*batch"]
) -> Float[Tensor, ""]:
    """The smallest positive activation of the real tokens; 0 if there is none."""
    if isinstance(acts, ActiveFeatures):
        return acts.smallest(real)
    smallest = torch.where((acts > 0) & real[..., None], acts.detach(), torch.inf).amin()
    return torch.where(smallest.isinf(), torch.zeros_like(smallest), smallest)


def times_active(
    acts: Float[Tensor, "n_tokens n_features"] | ActiveFeatures,
) -> Int[Tensor, "n_features"]:
    """On how many tokens each feature is active."""
    if isinstance(acts, ActiveFeatures):
        return torch.bincount(acts.features[acts.values.detach() > 0], minlength=len(acts.decoder_norms))
    return (acts.detach() > 0).sum(0)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(_active(pre, threshold), pre, torch.zeros_like(pre))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None]:
        pre, threshold = ctx.saved_tensors
        (grad,) = grad_outputs
        learns = ctx.needs_input_grad[1]  # batchtopk's threshold does not
        to_threshold = -threshold * _kernel(pre, threshold, ctx.bandwidth, grad) if learns else None
        return torch.where(_active(pre, threshold), grad, torch.zeros_like(grad)), to_threshold, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return _active(pre, threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        return None, -_kernel(pre, threshold, ctx.bandwidth, grad_outputs[0]), None


def _active(pre: Tensor, threshold: Tensor) -> Tensor:
    return (pre > threshold) & (pre > 0)  # transcoders of others may have thresholds below 0


def _kernel(pre: Tensor, threshold: Tensor, bandwidth: float, grad: Tensor) -> Tensor:
    """[n_features]: the incoming gradients within half a bandwidth of the threshold, summed, over the bandwidth."""
    near = (pre - threshold).abs() < bandwidth / 2
    return (grad * near).flatten(0, -2).sum(0) / bandwidth
