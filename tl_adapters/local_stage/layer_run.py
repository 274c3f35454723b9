"""The local stage of one layer: steps, revisions of its features, and the removal of useless ones."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import torch
from torch import Tensor

from tl_adapters.config import LocalConfig, TrainingConfig
from tl_adapters.local_stage.feature_revision import give_birth, merge_split_features, remove_useless_features
from tl_adapters.local_stage.local_layer import LocalLayer, LocalTerms
from tl_adapters.local_stage.token_buffer import TokenBuffer
from tl_adapters.local_stage.whitening import RunningCovariance, Whitening
from tl_adapters.utils.precision import wide

REVISION_TOKENS = 400_000
"""Most tokens by which features are revised."""

log = logging.getLogger(__name__)


class LayerRun:
    """The local stage of one layer.

    Args:
        index: number of the layer.
        buffer: the tokens of all layers.
        config: options of training.
        local: options of the local stage.
    """

    def __init__(self, index: int, buffer: TokenBuffer, config: TrainingConfig, local: LocalConfig) -> None:
        self.index, self.buffer, self.local, self._seed = index, buffer, local, config.seed
        x, d = buffer.x[index][: len(buffer)], buffer.d[index][: len(buffer)]
        inputs = RunningCovariance(x.shape[1])
        inputs.add(x)
        self.size = float(wide(d).square().sum(1).mean().sqrt())
        whitening = Whitening.of(inputs, local.shrinkage)
        self.layer = LocalLayer(whitening, self.size, config, local, self._generator("weights"), x.device)
        self.terms: LocalTerms | None = None

    def train(self, on_step: Callable[[], object]) -> LayerRun:
        """Train to the last step and remove useless features. A layer without a difference stays as it is."""
        if self.size == 0:
            return self
        revisions = [round(share * self.local.steps) for share in self.local.revisions]
        for index in range(self.local.steps):
            x, d = self.buffer.draw(self.index, self.local.tokens_per_step, self._generator("step", index))
            self.terms = self.layer.step(*self.layer.coordinates(x, d), index)
            if index + 1 in revisions:
                self.revise(index + 1, births=index + 1 < max(revisions))
            on_step()
        x, d = self._sample("removal")
        removed = remove_useless_features(self.layer, x, d, self.local.smallest_gain)
        log.debug("layer %d: %d features removed", self.index, removed)
        return self

    def revise(self, step: int, births: bool) -> None:
        """Merge split features, then give birth to missing ones."""
        x, d = self._sample("revision", step)
        generator = self._generator("fits", step)
        merged = merge_split_features(self.layer, x, generator)
        born = give_birth(self.layer, x, d, generator) if births else 0
        log.debug("layer %d, step %d: %d features merged, %d born", self.index, step, merged, born)

    def _sample(self, *purpose: object) -> tuple[Tensor, Tensor]:
        """Tokens by which features are revised, in the coordinates of the layer."""
        return self.layer.coordinates(*self.buffer.sample(self.index, REVISION_TOKENS, self._generator(*purpose)))

    def _generator(self, *purpose: object) -> torch.Generator:
        """A generator for one purpose, so that no draw depends on those before it."""
        seed = random.Random(f"{self._seed}-local-{self.index}-{purpose}").getrandbits(63)
        return torch.Generator().manual_seed(seed)
