"""One training step's loss and gradient, twice: as the formulas read, and fast (arXiv 2602.20904, section 3.2).

With one cut k drawn for the step, and all models reading the same tokens:

1. output KL         KL(target || replacement)
2. forward bridge    KL(target || replacement on layers 0..k-1, target on k..L-1)
3. backward bridge   KL(target || target on layers 0..k-1, replacement on k..L-1)
4. NMSE              of the replacement's residual stream, at the embedding and after every layer
5. sparsity          of the replacement's activations: relu's L1 in decoder-norm units, jumprelu's L0, else nothing

The adapters train on the batch's real tokens (`AdapterSet.training_on`); what is held out they evaluate on.
`reference_step` runs every pass whole. `shared_prefix_step` sees that the forward bridge starts with the
replacement's own first k layers, the backward bridge with the target's, and that the NMSE needs no pass of its own:
about three forward passes instead of six. It goes backward through each suffix as soon as it has run, so one pass's
graph is all that is ever held. Values and gradients are equal (tests/test_objective.py: 1e-10 in float64, every cut).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tl_adapters.adapters.activation_functions import smallest_active, step
from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.l0 import active_counts, l0
from tl_adapters.adapters.transcoder import TranscoderAdapter
from tl_adapters.config import LossWeights
from tl_adapters.data.traces import Batch
from tl_adapters.errors import UserError
from tl_adapters.models.paired_model import ACTS_HOOK, PRE_ACTS_HOOK, PairedModel
from tl_adapters.training.loss_terms import l0_penalty, sparsity, squared_error_ratio
from tl_adapters.utils.finite import by_layer_name, require_finite_activations
from tl_adapters.utils.kl_divergence import kl_from_residual, masked_kl, token_kl_from_residual
from tl_adapters.utils.precision import host_float64, wide


@dataclass(frozen=True)
class StepTerms:
    """The terms of one step, unweighted, and their weighted sum; detached."""

    output_kl: Tensor
    """Nats per token."""
    forward_bridge: Tensor
    """Nats per token."""
    backward_bridge: Tensor
    """Nats per token."""
    nmse: Tensor
    """Mean over the n_layers + 1 places of the residual stream."""
    sparsity: Tensor
    """Summed over layers: decoder-norm units (relu), active features (jumprelu), or 0."""
    total: Tensor
    """What is optimised: each term times its weight, summed."""
    l0: list[float] | None = None
    """Active features per token and layer, where asked for."""
    smallest: list[Tensor] | None = None
    """Smallest activation per layer that the replacement's pass let through, of batchtopk only."""


class PrecisionError(UserError, ValueError):
    """A dtype in which the figures would be wrong."""


def require_trainable(pair: PairedModel) -> None:
    """Raises PrecisionError for a float16 model: its gradients are too small for that dtype, and vanish."""
    if pair.model.cfg.dtype == torch.float16:
        raise PrecisionError(
            "Adapters cannot be trained through a float16 model: most of the KL's gradient is smaller than float16's "
            "smallest numbers and would vanish. Load the models with dtype bfloat16, which needs as much memory, or "
            "float32 (dtype=, --dtype). Adapters that are trained can be used in float16."
        )


def reference_step(
    pair: PairedModel, batch: Batch, cut: int, weights: LossWeights, sparsity_weight: float
) -> StepTerms:
    """The step as the formulas read: six whole passes, one graph. Adds gradients to the adapters' ``.grad``.

    Raises PrecisionError for a float16 model.
    """
    require_trainable(pair)
    with pair.installed_adapters().training_on(batch.real):
        return _reference_step(pair, batch, cut, weights, sparsity_weight)


def _reference_step(
    pair: PairedModel, batch: Batch, cut: int, weights: LossWeights, sparsity_weight: float
) -> StepTerms:
    n, adapters, weighted = pair.n_layers, pair.installed_adapters(), _weighted_sum(weights, sparsity_weight)

    def streams(route: str, **layers: Any) -> list[Tensor]:
        with pair.routed(route, **layers):
            return pair.residual_streams(batch.tokens)

    def kl(route: str, **layers: Any) -> Tensor:
        target_logits = pair.unembed(streams("target")[-1])
        return masked_kl(target_logits, pair.unembed(streams(route, **layers)[-1]), batch.predicting)

    output_kl = kl("replacement")
    forward_bridge = kl("replacement", first=cut)
    backward_bridge = kl("replacement", last=n - cut)
    with _recorded_features(pair) as (pre, acts):
        replacement = streams("replacement")
        target = streams("target")
        nmse = torch.stack(
            [squared_error_ratio(t, r, batch.counted) for t, r in zip(target, replacement, strict=True)]
        ).mean()
        sparse = torch.stack([_sparsity(adapters[i], pre.get(i), acts[i], batch.counted) for i in range(n)]).sum()
        smallest = _smallest(adapters, acts, batch)
    total = weighted(output_kl, forward_bridge, backward_bridge, nmse, sparse)
    total.backward()
    output_kl, forward_bridge, backward_bridge, nmse, sparse, total = (
        t.detach() for t in (output_kl, forward_bridge, backward_bridge, nmse, sparse, total)
    )
    return StepTerms(output_kl, forward_bridge, backward_bridge, nmse, sparse, total, smallest=smallest)


def shared_prefix_step(
    pair: PairedModel, batch: Batch, cut: int, weights: LossWeights, sparsity_weight: float, want_l0: bool = False
) -> StepTerms:
    """The same step with shared prefixes and one pass's graph at a time. Adds gradients to the adapters' ``.grad``.

    Raises PrecisionError for a float16 model.
    """
    require_trainable(pair)
    with pair.installed_adapters().training_on(batch.real):
        return _shared_prefix_step(pair, batch, cut, weights, sparsity_weight, want_l0)


def _shared_prefix_step(
    pair: PairedModel, batch: Batch, cut: int, weights: LossWeights, sparsity_weight: float, want_l0: bool
) -> StepTerms:
    n, adapters, weighted = pair.n_layers, pair.installed_adapters(), _weighted_sum(weights, sparsity_weight)
    counted, predicting = batch.counted, batch.predicting
    with torch.no_grad(), pair.routed("target"):
        target = pair.residual_streams(batch.tokens)

    def kl(resid: Tensor) -> Tensor:
        return kl_from_residual(target[-1], resid, predicting, pair.unembed, pair.rows_at_once)

    def replacement_blocks(resid: Tensor, layers: range) -> tuple[Tensor, Tensor, Tensor]:
        """The replacement's residual stream after ``layers``, with their share of NMSE and sparsity."""
        nmse = sparse = resid.new_zeros(())
        for layer in layers:
            resid = pair.run_blocks(resid, layer, layer + 1)
            nmse = nmse + squared_error_ratio(target[layer + 1], resid, counted) / (n + 1)
            sparse = sparse + _sparsity(adapters[layer], pre.get(layer), acts[layer], counted)
            if want_l0:
                l0_by_layer[layer] = l0(acts[layer].detach(), counted)
        return resid, nmse, sparse

    zero = target[0].new_zeros(())
    l0_by_layer: dict[int, Tensor] = {}
    with pair.routed("replacement"), _recorded_features(pair) as (pre, acts):
        at_cut, nmse_below, sparse_below = replacement_blocks(target[0], range(cut))
        resume = at_cut.detach().requires_grad_()
        final, nmse_above, sparse_above = replacement_blocks(resume, range(cut, n))
        output_kl = kl(final)
        # At the ends the bridges are passes already made: the replacement itself, or the target (no gradient).
        forward_bridge = output_kl if cut == n else zero
        backward_bridge = output_kl if cut == 0 else zero
        weighted(output_kl, forward_bridge, backward_bridge, nmse_above, sparse_above).backward()
        smallest = _smallest(adapters, acts, batch)
    if 0 < cut < n:
        forked = at_cut.detach().requires_grad_()
        with pair.routed("target"):
            forward_bridge = kl(pair.run_blocks(forked, cut, n))
        (weights.forward_bridge * forward_bridge).backward()
        assert resume.grad is not None
        assert forked.grad is not None
        resume.grad += forked.grad
    if cut:
        below = weights.nmse * nmse_below + sparsity_weight * sparse_below
        torch.autograd.backward([at_cut, below], [resume.grad, torch.ones_like(below)])
    if 0 < cut < n:
        with pair.routed("replacement"):
            backward_bridge = kl(pair.run_blocks(target[cut], cut, n))
        (weights.backward_bridge * backward_bridge).backward()

    nmse, sparse = (nmse_below + nmse_above).detach(), (sparse_below + sparse_above).detach()
    output_kl, forward_bridge, backward_bridge = (t.detach() for t in (output_kl, forward_bridge, backward_bridge))
    total = weighted(output_kl, forward_bridge, backward_bridge, nmse, sparse)
    by_layer = torch.stack([l0_by_layer[layer] for layer in range(n)]).tolist() if want_l0 else None
    return StepTerms(output_kl, forward_bridge, backward_bridge, nmse, sparse, total, by_layer, smallest)


@contextmanager
def _recorded_features(pair: PairedModel) -> Iterator[tuple[dict[int, Tensor], dict[int, Tensor]]]:
    """Layer -> pre-activations (empty where the sparsity term does not read them), and layer -> activations."""
    with pair.recorded(ACTS_HOOK) as acts:
        if pair.installed_adapters().metadata.activation == "jumprelu":
            with pair.recorded(PRE_ACTS_HOOK) as pre:
                yield pre, acts
        else:
            yield {}, acts


def _sparsity(adapter: TranscoderAdapter, pre: Tensor | None, acts: Tensor, counted: Tensor) -> Tensor:
    """One layer of term 5, as the adapter's activation has it."""
    if adapter.activation == "relu":
        return sparsity(acts, adapter.decoder_norms(), counted)
    if adapter.activation == "jumprelu":
        assert pre is not None
        return l0_penalty(step(pre, adapter.threshold, adapter.bandwidth), counted)
    return acts.new_zeros(())


def _smallest(adapters: AdapterSet, acts: dict[int, Tensor], batch: Batch) -> list[Tensor] | None:
    if adapters.metadata.activation != "batchtopk":
        return None
    return [smallest_active(acts[layer], batch.real) for layer in adapters.layer_indices]


@torch.no_grad()
def held_out_terms(pair: PairedModel, batches: Sequence[Batch]) -> dict[str, Any]:
    """Output KL, NMSE and L0 by layer of the replacement, as means over all counted tokens of ``batches``.

    Without cuts and weights, so that runs with other weights compare. NMSE is a ratio of sums over all batches.
    Raises NotFiniteError.
    """
    n = pair.n_layers
    kl, positions, tokens = 0.0, 0, 0
    errors, energies = torch.zeros(2, n + 1, dtype=torch.float64)
    active = torch.zeros(n, dtype=torch.float64)
    for batch in batches:
        batch = batch.to(pair.model.W_E.device)
        with pair.routed("target"):
            target = pair.residual_streams(batch.tokens)
        with pair.routed("replacement"), pair.recorded(ACTS_HOOK) as acts:
            replacement = pair.residual_streams(batch.tokens)
        for name, streams in (("target", target), ("replacement", replacement)):
            require_finite_activations(
                by_layer_name(streams), batch.real, range(len(batch.tokens)), f"Validation, {name}"
            )
        predicting, counted = batch.predicting, batch.counted
        values = token_kl_from_residual(
            target[-1][predicting], replacement[-1][predicting], pair.unembed, pair.rows_at_once
        )
        kl, positions, tokens = kl + float(values.sum()), positions + len(values), tokens + int(counted.sum())
        both = list(zip(replacement, target, strict=True))
        errors += host_float64(torch.stack([_squares(wide(ours) - wide(theirs), counted) for ours, theirs in both]))
        energies += host_float64(torch.stack([_squares(wide(theirs), counted) for _, theirs in both]))
        active += host_float64(torch.stack([active_counts(acts[i], counted).sum() for i in range(n)]))
    return {
        "output_kl": kl / positions,
        "nmse": float((errors / energies).mean()),
        "l0": (active / tokens).tolist(),
        "tokens": tokens,
    }


def _squares(x: Tensor, counted: Tensor) -> Tensor:
    """Sum of squares over the tokens that count, without asking the device how many there are."""
    return x.square().sum(-1).where(counted, 0.0).sum()


def _weighted_sum(
    weights: LossWeights, sparsity_weight: float
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    def weighted(kl: Tensor, forward_bridge: Tensor, backward_bridge: Tensor, nmse: Tensor, sparse: Tensor) -> Tensor:
        bridges = weights.forward_bridge * forward_bridge + weights.backward_bridge * backward_bridge
        return weights.output_kl * kl + bridges + weights.nmse * nmse + sparsity_weight * sparse

    return weighted
