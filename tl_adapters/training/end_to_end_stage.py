"""The end-to-end stage: Adam on the five-term objective, one cut per step (arXiv 2602.20904, section 3.2 and appendix).

    for each step:
        learning rate: linear warm-up, then a cosine to zero;  weight of the sparsity term: linear warm-up
        draw a cut, and one batch of traces or several, whose gradients are added up
        loss and gradient of the objective (objective.py)
        clip the gradient, take a step, update the thresholds

Schedules, batches and cuts are pure functions of the seed and the step. Of several processes, each takes its share of a
step's batches; gradients and terms are added up, so that every process takes the same step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tl_adapters.adapters.finite_weights import NotFiniteError
from tl_adapters.config import TrainingConfig
from tl_adapters.data.batching import BatchOrder
from tl_adapters.data.traces import Batch, require_embedded
from tl_adapters.local_stage.schedules import linear_warmup, warmup_cosine
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.processes import processes
from tl_adapters.training.adapter_adam import AdapterAdam, PlacedAdapter, placed_adapters
from tl_adapters.training.not_finite import describe_not_finite
from tl_adapters.training.objective import TERM_NAMES, StepTerms, shared_prefix_step
from tl_adapters.utils.precision import tf32_products

THRESHOLD_WINDOW = 0.05
"""Share of the steps over which batchtopk's threshold is a running mean. At the end of the cosine the weights hardly
change, so that the threshold fits the final adapters."""


class EndToEndStage:
    """The end-to-end stage of a run.

    Args:
        pair: base and target, with the adapters that are trained.
        order: the batches.
        config: options of training.
        placed: the adapters in the coordinates of the local stage; none without that stage.
        step: steps done already.
        tensors: `tensors` of that step; None for a new stage.
    """

    def __init__(
        self,
        pair: PairedModel,
        order: BatchOrder,
        config: TrainingConfig,
        placed: Sequence[PlacedAdapter] = (),
        step: int = 0,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.pair, self.order, self.config, self.step = pair, order, config, step
        adapters = pair.installed_adapters()
        self.adam = AdapterAdam(adapters, config, placed_adapters(tensors, adapters) if tensors else placed)
        if tensors is not None:
            self.adam.restore(tensors)
        self.tokens = 0

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        config = self.config
        return config.lr * warmup_cosine(self.step, config.steps, config.warmup_fraction)

    def advance(self, want_l0: bool) -> StepTerms:
        """Take one step.

        Args:
            want_l0: whether to count the active features.

        Raises NotFiniteError, and DataError for a token that has no embedding.
        """
        config, step = self.config, self.step
        first = step * config.batches_per_step
        batches = [self.order[index] for index in range(first, first + config.batches_per_step)]
        for batch in batches:  # still on the CPU, where this check costs nothing
            require_embedded(batch.tokens, self.pair.model.cfg.d_vocab, f"The batch of step {step + 1}")
        counted = [int(batch.counted.sum()) for batch in batches]
        shares = [n / sum(counted) for n in counted]
        parts = []
        for batch, share in processes().mine(list(zip(batches, shares, strict=True))):
            parts.append(self._add_gradients(batch.to(self.pair.device), share, want_l0))
        parts = all_parts(parts, len(batches))
        terms = mean_terms(parts, shares)
        self.adam.add_up()
        norm = self.adam.clip(config.grad_clip)
        if not bool(torch.isfinite(terms.total) & torch.isfinite(norm)):
            raise NotFiniteError(self._not_finite_message(parts, float(norm), batches))
        rate = min(1.0, 1 / (THRESHOLD_WINDOW * config.steps))
        self.adam.step(self.lr, terms.smallest_active, rate)
        self.step += 1
        self.tokens += sum(int(batch.real.sum()) for batch in batches)
        return terms

    def _add_gradients(self, batch: Batch, share: float, want_l0: bool) -> StepTerms:
        """Add the gradients of a batch, weighted by its share of the step, and return its terms."""
        config, step = self.config, self.step
        cut = random.Random(f"{config.seed}-cut-{step}").randint(config.loss_weights.lowest_cut, self.pair.n_layers)
        weights, sparsity = config.loss_weights, sparsity_weight(config, step)
        if share < 1:
            weights, sparsity = weights.times(share), sparsity * share
        with tf32_products(config.adapter_precision == "tf32"):
            return shared_prefix_step(self.pair, batch, cut, weights, sparsity, want_l0, config.recompute)

    def _not_finite_message(self, parts: Sequence[StepTerms], norm: float, batches: Sequence[Batch]) -> str:
        for terms, batch in zip(parts, batches, strict=True):
            if names := [name for name, term in terms.by_name().items() if not math.isfinite(float(term))]:
                return f"{', '.join(names)} is not finite. {describe_not_finite(self.pair, batch.to(self.pair.device))}"
        where = describe_not_finite(self.pair, batches[0].to(self.pair.device))
        return f"the gradient's norm ({norm}) is not finite. {where}"


def all_parts(own: Sequence[StepTerms], n: int) -> list[StepTerms]:
    """The terms of all n batches of a step, in their order, of which this process has computed its share."""
    if processes().count == 1:
        return list(own)
    parts: list[list[StepTerms]] = processes().gathered([part.to("cpu") for part in own])
    return [parts[i % len(parts)][i // len(parts)].to(own[0].total.device) for i in range(n)]


def mean_terms(parts: Sequence[StepTerms], shares: Sequence[float]) -> StepTerms:
    """The terms of a step of several batches: their means weighted by shares, and the sum of their totals.

    Args:
        parts: the terms of each batch; each total is weighted by the batch's share already.
        shares: the batches' shares of the step.
    """
    if len(parts) == 1:
        return parts[0]
    named = [terms.by_name() for terms in parts]
    means: dict[str, Any] = dict.fromkeys(TERM_NAMES)
    for name in named[0]:
        means[name] = torch.stack([s * terms[name] for s, terms in zip(shares, named, strict=True)]).sum(0)
    means["total"] = torch.stack([terms.total for terms in parts]).sum()
    l0, smallest = ([getattr(terms, name) for terms in parts] for name in ("l0", "smallest_active"))
    if l0[0] is not None:
        means["l0"] = [sum(s * x for s, x in zip(shares, layer, strict=True)) for layer in zip(*l0, strict=True)]
    if smallest[0] is not None:
        means["smallest_active"] = [torch.stack(layer).mean(0) for layer in zip(*smallest, strict=True)]
    return StepTerms(**means)


def sparsity_weight(config: TrainingConfig, step: int) -> float:
    """Weight of the sparsity term at ``step`` (from 0): of L1 for relu, of L0 for jumprelu, else 0."""
    weight = {"relu": config.l1_weight, "jumprelu": config.l0_weight}.get(config.activation, 0.0)
    return weight * linear_warmup(step, config.steps, config.l1_warmup_fraction)
