"""Loss and gradient of one training step, in a reference version and a fast one (arXiv 2602.20904, section 3.2).

A cut k is drawn for each step, and all models read the same tokens. The terms of the loss are:

1. output KL         KL(target || replacement)
2. forward bridge    KL(target || replacement on layers 0..k-1, target on k..L-1)
3. backward bridge   KL(target || target on layers 0..k-1, replacement on k..L-1)
4. NMSE              of the replacement's residual stream, at the embedding and after every layer
5. sparsity          of the replacement's activations: L1 in decoder-norm units for relu, L0 for jumprelu, else none
6. local             if `LossWeights.local` is above 0: at every layer, how much T(x) misses of MLP_target(x) -
                     MLP_base(x) at the target's own x, and the sparsity there (`loss_terms.local_term`)

Adapters train on the real tokens of the batch (`AdapterSet.training_on`) and evaluate on held-out documents.

`reference_step` follows the formulas: every pass runs whole, in one graph. `shared_prefix_step` shares computation: the
forward bridge starts with the replacement's first k layers, the backward bridge with the target's, and the NMSE needs
no pass of its own, which makes about three forward passes instead of six. It runs backward through each suffix as soon
as its loss is known, so that only one pass's graph is in memory. Values and gradients of both are equal
(tests/training/test_objective.py: to 1e-10 in float64, at every cut).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from tl_adapters.adapters.activation_functions import smallest_active, step
from tl_adapters.adapters.active_features import Activations
from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.l0 import active_counts, l0
from tl_adapters.adapters.transcoder import TranscoderAdapter
from tl_adapters.config import LossWeights
from tl_adapters.data.traces import Batch
from tl_adapters.errors import UserError
from tl_adapters.models.finite_activations import by_layer_name, require_finite_activations
from tl_adapters.models.paired_model import ACTS_HOOK, PRE_ACTS_HOOK, PairedModel
from tl_adapters.models.routed_model import run_again_in_backward
from tl_adapters.processes import processes
from tl_adapters.training.kl_divergence import TargetDistributions, masked_kl, token_kl_from_residual
from tl_adapters.training.loss_terms import l0_term, l1_term, local_term, nmse_term
from tl_adapters.utils.precision import host_float64, wide

Made = TypeVar("Made")


@dataclass(frozen=True)
class StepTerms:
    """The unweighted terms of one step and their weighted sum, without gradients."""

    output_kl: Tensor
    """Term 1, in nats per token."""
    forward_bridge: Tensor
    """Term 2, in nats per token."""
    backward_bridge: Tensor
    """Term 3, in nats per token."""
    nmse: Tensor
    """Term 4: mean over the residual stream at the embedding and after each of the n_layers layers."""
    sparsity: Tensor
    """Term 5, summed over layers: in decoder-norm units (relu), number of active features (jumprelu), or 0."""
    local: Tensor | None
    """Term 6, summed over layers; None where its weight is 0."""
    total: Tensor
    """The loss that is optimized: the sum of the terms times their weights."""
    l0: list[float] | None = None
    """Mean number of active features per token at each layer; None if not requested."""
    smallest_active: list[Tensor] | None = None
    """Smallest activation that batchtopk let through at each layer; None for other activation functions."""

    def by_name(self) -> dict[str, Tensor]:
        """The terms that were computed."""
        terms = {name: getattr(self, name) for name in TERM_NAMES}
        return {name: term for name, term in terms.items() if term is not None}

    def to(self, device: torch.device | str) -> StepTerms:
        """The same terms on a device."""
        smallest = None if self.smallest_active is None else [value.to(device) for value in self.smallest_active]
        moved: dict[str, Any] = {name: term.to(device) for name, term in self.by_name().items()}
        return replace(self, **moved, total=self.total.to(device), smallest_active=smallest)


TERM_NAMES = ("output_kl", "forward_bridge", "backward_bridge", "nmse", "sparsity", "local")


class PrecisionError(UserError, ValueError):
    """Raised for a dtype in which results would be wrong."""


def require_trainable(pair: PairedModel) -> None:
    """Raises PrecisionError for a float16 model, whose gradients are too small for that dtype and would vanish."""
    if pair.model.cfg.dtype == torch.float16:
        raise PrecisionError(
            "Adapters cannot be trained through a float16 model: most of the KL's gradient is smaller than float16's "
            "smallest numbers and would vanish. Load the models with dtype bfloat16, which needs as much memory, or "
            "float32 (dtype=, --dtype). Trained adapters can be used in float16."
        )


def reference_step(
    pair: PairedModel, batch: Batch, cut: int, weights: LossWeights, sparsity_weight: float
) -> StepTerms:
    """One step as the formulas define it: six whole passes in one graph. Adds gradients to the adapters' ``.grad``.

    Args:
        pair: base and target, with adapters.
        batch: the documents, on the models' device.
        cut: the layer k at which the bridges change models, 0 to n_layers.
        weights: weights of terms 1 to 4 and 6.
        sparsity_weight: weight of term 5.

    Raises:
        PrecisionError: the models are in float16.
    """
    require_trainable(pair)
    with pair.installed_adapters().training_on(batch.real):
        return _reference_terms(pair, batch, cut, weights, sparsity_weight)


def _reference_terms(
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
        nmse = torch.stack([nmse_term(t, r, batch.counted) for t, r in zip(target, replacement, strict=True)]).mean()
        sparsity = torch.stack([_sparsity(adapters[i], pre.get(i), acts[i], batch.counted) for i in range(n)]).sum()
        smallest = _smallest_active(adapters, acts, batch)
    total = weighted(output_kl, forward_bridge, backward_bridge, nmse, sparsity)
    local = None
    if weights.local:
        with pair.recorded("mlp.hook_in") as inputs:
            streams("target")
        local = torch.stack([_local_term(pair, i, inputs[i], batch, weights) for i in range(n)]).sum()
        total = total + weights.local * local
    total.backward()
    output_kl, forward_bridge, backward_bridge, nmse, sparsity, total = (
        t.detach() for t in (output_kl, forward_bridge, backward_bridge, nmse, sparsity, total)
    )
    local = None if local is None else local.detach()
    return StepTerms(output_kl, forward_bridge, backward_bridge, nmse, sparsity, local, total, smallest_active=smallest)


def shared_prefix_step(
    pair: PairedModel,
    batch: Batch,
    cut: int,
    weights: LossWeights,
    sparsity_weight: float,
    want_l0: bool = False,
    recompute: bool = False,
) -> StepTerms:
    """`reference_step` with shared prefixes, and one pass's graph in memory at a time.

    Args: as `reference_step`, and
        want_l0: whether to count the active features.
        recompute: whether the backward pass computes every block again, so that of a pass only the residual stream
            between the blocks is in memory.

    Raises:
        PrecisionError: the models are in float16.
    """
    require_trainable(pair)
    with pair.installed_adapters().training_on(batch.real, over_active=True):
        return _SharedPrefixes(pair, batch, cut, weights, sparsity_weight, want_l0, recompute).terms()


class _SharedPrefixes:
    """One call of `shared_prefix_step`; its arguments."""

    def __init__(
        self,
        pair: PairedModel,
        batch: Batch,
        cut: int,
        weights: LossWeights,
        sparsity_weight: float,
        want_l0: bool,
        recompute: bool,
    ) -> None:
        self.pair, self.batch, self.cut, self.weights, self.sparsity_weight = pair, batch, cut, weights, sparsity_weight
        self.n, self.adapters, self.want_l0, self.recompute = (
            pair.n_layers,
            pair.installed_adapters(),
            want_l0,
            recompute,
        )
        self.run = run_again_in_backward if recompute else _run
        self.l0, self.smallest = dict[int, Tensor](), dict[int, Tensor]()
        self.target, inputs = _target_streams(pair, batch, with_inputs=weights.local > 0)
        self.distributions = TargetDistributions(
            self.target[-1], batch.predicting, pair.unembed, pair.rows_at_once, several=0 < cut < self.n
        )
        self.local = _local_step(pair, inputs, batch, weights) if weights.local else None

    def terms(self) -> StepTerms:
        """Add all gradients and return the terms."""
        pair, cut, weighted = self.pair, self.cut, _weighted_sum(self.weights, self.sparsity_weight)
        zero = self.target[0].new_zeros(())
        # Every backward pass is taken on the route of its forward pass, as it may compute blocks again.
        with pair.routed("replacement"), _recorded_features(pair) as features:
            at_cut, nmse_below, sparsity_below = self._replacement(self.target[0], range(cut), features)
            resume = at_cut.detach().requires_grad_()
            final, nmse_above, sparsity_above = self._replacement(resume, range(cut, self.n), features)
            output_kl = self.distributions.kl(final)
            # At cut 0 and cut n, one bridge is the replacement itself and the other the target, without gradients.
            forward_bridge = output_kl if cut == self.n else zero
            backward_bridge = output_kl if cut == 0 else zero
            weighted(output_kl, forward_bridge, backward_bridge, nmse_above, sparsity_above).backward()
            if 0 < cut < self.n:
                forked = at_cut.detach().requires_grad_()
                forward_bridge = self._bridge("target", forked, self.weights.forward_bridge)
                assert resume.grad is not None
                assert forked.grad is not None
                resume.grad += forked.grad
            if cut:
                below = self.weights.nmse * nmse_below + self.sparsity_weight * sparsity_below
                torch.autograd.backward([at_cut, below], [resume.grad, torch.ones_like(below)])
        if 0 < cut < self.n:
            backward_bridge = self._bridge("replacement", self.target[cut], self.weights.backward_bridge)

        nmse, sparsity = (nmse_below + nmse_above).detach(), (sparsity_below + sparsity_above).detach()
        output_kl, forward_bridge, backward_bridge = (t.detach() for t in (output_kl, forward_bridge, backward_bridge))
        total = weighted(output_kl, forward_bridge, backward_bridge, nmse, sparsity)
        total = total if self.local is None else total + self.weights.local * self.local
        by_layer = torch.stack([self.l0[layer] for layer in range(self.n)]).tolist() if self.want_l0 else None
        smallest = [self.smallest[layer] for layer in range(self.n)] if self.smallest else None
        kls = (output_kl, forward_bridge, backward_bridge)
        return StepTerms(*kls, nmse, sparsity, self.local, total, by_layer, smallest)

    def _replacement(
        self, resid: Tensor, layers: range, features: tuple[dict[int, Tensor], dict[int, Activations]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The replacement's residual stream after ``layers``, and the share of these layers in NMSE and sparsity.

        Args:
            resid: the residual stream before them.
            layers: the layers.
            features: what `_recorded_features` records.
        """
        pre, acts = features

        def block(resid: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
            resid = self.pair.run_blocks(resid, layer, layer + 1)
            nmse = nmse_term(self.target[layer + 1], resid, self.batch.counted) / (self.n + 1)
            active = acts.pop(layer)  # so that only the graph keeps them, if it does
            self._count(layer, active)
            return resid, nmse, _sparsity(self.adapters[layer], pre.pop(layer, None), active, self.batch.counted)

        nmse = sparsity = resid.new_zeros(())
        for layer in layers:
            resid, nmse_here, sparsity_here = self.run(block, resid, layer)
            nmse, sparsity = nmse + nmse_here, sparsity + sparsity_here
        return resid, nmse, sparsity

    @torch.no_grad()
    def _count(self, layer: int, acts: Activations) -> None:
        if self.want_l0:
            self.l0[layer] = l0(acts, self.batch.counted)
        if self.adapters.metadata.activation == "batchtopk":
            self.smallest[layer] = smallest_active(acts, self.batch.real)

    def _bridge(self, route: str, resid: Tensor, weight: float) -> Tensor:
        """The KL divergence of the blocks above the cut on a route; adds its gradients."""
        with self.pair.routed(route):
            resid = self.pair.run_blocks(resid, self.cut, self.n, recompute=self.recompute)
            bridge = self.distributions.kl(resid)
            (weight * bridge).backward()
        return bridge


def _run(function: Callable[..., Made], *args: Any) -> Made:
    return function(*args)


@torch.no_grad()
def _target_streams(pair: PairedModel, batch: Batch, with_inputs: bool) -> tuple[list[Tensor], dict[int, Tensor]]:
    """The target's residual streams, and layer -> what its MLP reads, if that is wanted."""
    with pair.routed("target"), ExitStack() as recording:
        inputs = recording.enter_context(pair.recorded("mlp.hook_in")) if with_inputs else {}
        return pair.residual_streams(batch.tokens), inputs


def _local_step(pair: PairedModel, inputs: dict[int, Tensor], batch: Batch, weights: LossWeights) -> Tensor:
    """Term 6 with one layer's graph in memory at a time; adds its gradients."""
    terms: list[Tensor] = []
    for layer in range(pair.n_layers):
        term = _local_term(pair, layer, inputs.pop(layer), batch, weights)
        (weights.local * term).backward()
        terms.append(term.detach())
    return torch.stack(terms).sum()


def _local_term(pair: PairedModel, layer: int, x: Tensor, batch: Batch, weights: LossWeights) -> Tensor:
    """Term 6 of one layer, where the target's MLP reads ``x``."""
    mlp, adapter = pair.mlps[layer], pair.installed_adapters()[layer]
    x = x.detach()
    with torch.no_grad():
        difference = mlp.difference(x)
    with _recorded_features(pair) as (pre, _):
        acts, output = adapter.run(mlp.adapter_input(x))
        sparsity = _sparsity(adapter, pre.get(layer), acts, batch.counted)
    in_units = adapter.activation == "relu"
    return local_term(output, difference, sparsity, batch.counted, weights.local_l1, in_units)


@contextmanager
def _recorded_features(pair: PairedModel) -> Iterator[tuple[dict[int, Tensor], dict[int, Activations]]]:
    """Layer -> pre-activations (jumprelu only, whose sparsity term reads them), and layer -> activations."""
    adapters, acts = pair.installed_adapters(), dict[int, Activations]()
    with ExitStack() as recording:
        for layer in adapters.layer_indices:
            recording.callback(setattr, adapters[layer], "on_acts", None)
            adapters[layer].on_acts = partial(acts.__setitem__, layer)
        jumprelu = adapters.metadata.activation == "jumprelu"
        yield recording.enter_context(pair.recorded(PRE_ACTS_HOOK)) if jumprelu else {}, acts


def _sparsity(adapter: TranscoderAdapter, pre: Tensor | None, acts: Activations, counted: Tensor) -> Tensor:
    """Term 5 of one layer, according to the adapter's activation function."""
    if adapter.activation == "relu":
        return l1_term(acts, adapter.decoder_norms(acts), counted)
    if adapter.activation == "jumprelu":
        assert pre is not None
        return l0_term(step(pre, adapter.threshold, adapter.bandwidth), counted)
    return adapter.W_dec.new_zeros(())


def _smallest_active(adapters: AdapterSet, acts: dict[int, Activations], batch: Batch) -> list[Tensor] | None:
    """Smallest positive activation of each layer, for batchtopk; None for other activation functions."""
    if adapters.metadata.activation != "batchtopk":
        return None
    return [smallest_active(acts[layer], batch.real) for layer in adapters.layer_indices]


def held_out_terms(pair: PairedModel, batches: Sequence[Batch]) -> dict[str, Any]:
    """Output KL, NMSE and L0 of the replacement on held-out documents, as means over all tokens that count.

    Bridges and weights are left out, so that runs with different weights can be compared. NMSE is a ratio of sums over
    all batches. Of several processes each takes its share of the batches, and all return the same.

    Returns:
        "output_kl" (nats per token), "nmse", "l0" (a list, one value per layer), and "tokens", the number that count.

    Raises:
        NotFiniteError: an activation is NaN or infinite.
    """
    n = pair.n_layers
    own = processes().together(lambda: _held_out_sums(pair, processes().mine(batches)))
    sums, squared_errors, squared_norms, active = processes().total(own).split([3, n + 1, n + 1, n])
    kl, positions, tokens = sums.tolist()
    return {
        "output_kl": kl / positions,
        "nmse": float((squared_errors / squared_norms).mean()),
        "l0": (active / tokens).tolist(),
        "tokens": int(tokens),
    }


@torch.no_grad()
def _held_out_sums(pair: PairedModel, batches: Sequence[Batch]) -> Tensor:
    """KL, positions and tokens, then by stream squared errors and norms, then by layer active features; one tensor."""
    n = pair.n_layers
    kl, positions, tokens = 0.0, 0, 0
    squared_errors, squared_norms = torch.zeros(2, n + 1, dtype=torch.float64)
    active = torch.zeros(n, dtype=torch.float64)
    for batch in batches:
        batch = batch.to(pair.device)
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
        errors = (wide(ours) - wide(theirs) for ours, theirs in zip(replacement, target, strict=True))
        squared_errors += host_float64(torch.stack([_sum_of_squares(error, counted) for error in errors]))
        squared_norms += host_float64(torch.stack([_sum_of_squares(wide(resid), counted) for resid in target]))
        active += host_float64(torch.stack([active_counts(acts[i], counted).sum() for i in range(n)]))
    sums = torch.tensor([kl, positions, tokens], dtype=torch.float64)
    return torch.cat([sums, squared_errors, squared_norms, active])


def _sum_of_squares(x: Tensor, counted: Tensor) -> Tensor:
    """Sum of squares over the tokens that count, without a synchronization with the device."""
    return x.square().sum(-1).where(counted, 0.0).sum()


def _weighted_sum(
    weights: LossWeights, sparsity_weight: float
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A function from the five terms to their weighted sum."""

    def weighted(kl: Tensor, forward_bridge: Tensor, backward_bridge: Tensor, nmse: Tensor, sparsity: Tensor) -> Tensor:
        bridges = weights.forward_bridge * forward_bridge + weights.backward_bridge * backward_bridge
        return weights.output_kl * kl + bridges + weights.nmse * nmse + sparsity_weight * sparsity

    return weighted
