"""The end-to-end stage: Adam on the five-term objective, one cut per step (arXiv 2602.20904, section 3.2 and appendix).

    for each step:
        learning rate: linear warm-up, then a cosine to zero;  weight of the sparsity term: linear warm-up
        draw a batch of traces and a cut
        loss and gradient of the objective (objective.py)
        clip the gradient, take a step, update the thresholds

Schedules, batches and cuts are pure functions of the seed and the step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tl_adapters.adapters.finite_weights import NotFiniteError
from tl_adapters.config import TrainingConfig
from tl_adapters.data.batching import BatchOrder
from tl_adapters.data.traces import Batch, require_embedded
from tl_adapters.local_stage.schedules import linear_warmup, warmup_cosine
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.training.adapter_adam import AdapterAdam, PlacedAdapter, placed_adapters
from tl_adapters.training.not_finite import describe_not_finite
from tl_adapters.training.objective import StepTerms, shared_prefix_step
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
        batch = self.order[step]
        # The batch is still on the CPU, where this check costs nothing.
        require_embedded(batch.tokens, self.pair.model.cfg.d_vocab, f"The batch of step {step + 1}")
        batch = batch.to(self.pair.device)
        cut = random.Random(f"{config.seed}-cut-{step}").randint(config.loss_weights.lowest_cut, self.pair.n_layers)
        with tf32_products(config.adapter_precision == "tf32"):
            terms = shared_prefix_step(
                self.pair, batch, cut, config.loss_weights, sparsity_weight(config, step), want_l0, config.recompute
            )
        norm = self.adam.clip(config.grad_clip)
        if not bool(torch.isfinite(terms.total) & torch.isfinite(norm)):
            raise NotFiniteError(self._not_finite_message(terms, float(norm), batch))
        rate = min(1.0, 1 / (THRESHOLD_WINDOW * config.steps))
        self.adam.step(self.lr, terms.smallest_active, rate)
        self.step += 1
        self.tokens += int(batch.real.sum())
        return terms

    def _not_finite_message(self, terms: StepTerms, norm: float, batch: Batch) -> str:
        names = [name for name, term in terms.by_name().items() if not math.isfinite(float(term))]
        what = ", ".join(names) or f"the gradient's norm ({norm})"
        return f"{what} is not finite. {describe_not_finite(self.pair, batch)}"


def sparsity_weight(config: TrainingConfig, step: int) -> float:
    """Weight of the sparsity term at ``step`` (from 0): of L1 for relu, of L0 for jumprelu, else 0."""
    weight = {"relu": config.l1_weight, "jumprelu": config.l0_weight}.get(config.activation, 0.0)
    return weight * linear_warmup(step, config.steps, config.l1_warmup_fraction)
