"""Baselines for the KL of adapters: simpler approximations of the MLP difference, computed with the same models.

Both add a correction to the base MLP's output at every layer, as an adapter does. Unlike an adapter both compute it
from the target's MLP, so they are strong baselines.

* top neurons: for each token, the n neurons whose contribution (activation times output row) differs most in norm
  between the two MLPs are swapped for the target's. Neuron j of the base is compared with neuron j of the target.
* low rank: the MLP output difference is projected on its r strongest directions (of the uncentered covariance over
  training traces, on the target's residual stream). The smallest r with a low KL shows how low-rank the difference is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_adapters.data.traces import Trace, batches_by_length
from tl_adapters.errors import UserError
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.models.routed_mlp import RoutedMLP
from tl_adapters.training.kl_divergence import token_kl_from_residual
from tl_adapters.utils.precision import host_float64, wide

Correction = Callable[[Float[Tensor, "batch pos d_model"]], Float[Tensor, "batch pos d_model"]]
"""A function of the MLP's input that returns what is added to the base MLP's output."""


def top_neurons(mlp: RoutedMLP, n: int) -> Correction:
    """The correction that swaps the ``n`` most changed neurons of each token.

    Raises:
        UserError: the target has planted features.
    """
    if mlp.planted is not None:
        raise UserError(
            "This target is its base with planted features (PairedModel.plant): none of its neurons differs from the "
            "base's, so there are none to swap. Use the baseline low_rank."
        )
    target, base = mlp.weights()
    cross = (target.W_out * base.W_out).sum(-1)
    squares_target, squares_base = target.W_out.square().sum(-1), base.W_out.square().sum(-1)

    def correct(x: Tensor) -> Tensor:
        a, b = target.neurons(x), base.neurons(x)
        # ||a w_target - b w_base||^2 per neuron, without forming the vectors
        change = a.square() * squares_target - 2 * a * b * cross + b.square() * squares_base
        swapped = torch.zeros_like(change).scatter_(-1, change.topk(min(n, change.shape[-1]), -1).indices, 1.0)
        return (a * swapped) @ target.W_out - (b * swapped) @ base.W_out

    return correct


def low_rank(mlp: RoutedMLP, directions: Float[Tensor, "d_model r"]) -> Correction:
    """The correction that is the MLP output difference projected on orthonormal ``directions``."""

    def correct(x: Tensor) -> Tensor:
        difference = mlp.difference(x)
        onto = directions.to(difference.dtype)
        return ((difference @ onto) @ onto.T).to(x.dtype)

    return correct


@torch.no_grad()
def difference_directions(
    pair: PairedModel, traces: Sequence[Trace], tokens_per_batch: int = 2048
) -> list[Float[Tensor, "d_model d_model"]]:
    """Orthonormal directions (columns) of the MLP output difference for every layer, strongest first."""
    d_model, device = pair.model.cfg.d_model, pair.device
    second_moment = [wide(torch.zeros(d_model, d_model, device=device)) for _ in pair.mlps]
    for _, batch in batches_by_length(traces, tokens_per_batch):
        batch = batch.to(pair.device)
        with pair.routed("target"), pair.recorded("mlp.hook_in") as inputs:
            pair.residual_streams(batch.tokens)
        at_tokens = batch.real.nonzero(as_tuple=True)
        for layer, mlp in enumerate(pair.mlps):
            difference = wide(mlp.difference(inputs[layer][at_tokens]))
            second_moment[layer] += difference.T @ difference
    dtype = pair.model.cfg.dtype
    return [torch.linalg.eigh(host_float64(m)).eigenvectors.flip(-1).to(device, dtype) for m in second_moment]


@contextmanager
def corrected(pair: PairedModel, corrections: Sequence[Correction]) -> Iterator[None]:
    """The hybrid with ``corrections[layer]`` added to the base MLP of every layer, as an adapter's output is."""

    def add(zeros: Tensor, hook: HookPoint, layer: int) -> Tensor:
        return zeros + corrections[layer](inputs[layer])

    hooks = [(f"blocks.{layer}.mlp.hook_adapter_out", partial(add, layer=layer)) for layer in range(pair.n_layers)]
    with pair.routed("hybrid"), pair.recorded("mlp.hook_in") as inputs, pair.model.hooks(fwd_hooks=hooks):
        yield


@torch.no_grad()
def baseline_kl(
    pair: PairedModel, corrections: Sequence[Correction], traces: Sequence[Trace], tokens_per_batch: int = 2048
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """KL(target || corrected hybrid) per document, summed over response-predicting positions, and their number."""
    sums, positions = torch.zeros(2, len(traces), dtype=torch.float64)
    for rows, batch in batches_by_length(traces, tokens_per_batch):
        batch = batch.to(pair.device)
        at_predicting = batch.predicting_response.nonzero(as_tuple=True)
        finals = []
        for context in (pair.routed("target"), corrected(pair, corrections)):
            with context:
                finals.append(pair.residual_streams(batch.tokens)[-1][at_predicting])
        by_token = wide(torch.zeros(batch.tokens.shape, device=batch.tokens.device))
        kl = token_kl_from_residual(finals[0], finals[1], pair.unembed, pair.rows_at_once)
        by_token[at_predicting] = kl.to(by_token)
        sums[rows] = host_float64(by_token.sum(1))
        positions[rows] = host_float64(batch.predicting_response.sum(1))
    return sums, positions
