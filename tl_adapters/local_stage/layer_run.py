"""The local stage of one layer: steps, revisions of its features, and the removal of useless ones.

Every draw comes from a generator whose seed is made of its purpose and step. So the layer depends on nothing but its
tokens and options, not on other layers, and it goes on from a saved state as if it had never stopped.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tl_adapters.config import LocalConfig, TrainingConfig
from tl_adapters.local_stage.feature_polish import polish_features
from tl_adapters.local_stage.feature_revision import give_birth, merge_split_features, remove_useless_features
from tl_adapters.local_stage.layer_tokens import LayerTokens
from tl_adapters.local_stage.local_layer import LocalLayer, LocalTerms
from tl_adapters.local_stage.token_buffer import TokenBuffer
from tl_adapters.local_stage.whitening import ROWS_AT_ONCE, LayerCoordinates, RunningCovariance, Whitening
from tl_adapters.utils.precision import adapter_dtype, wide

REVISION_TOKENS = 200_000
"""Most tokens by which coordinates are measured and, before the last step, features are revised."""
NOISE_TOKENS = 4_096
"""Most tokens by which signal to noise is measured."""
UNPOLISHED_SHARE = 0.3
"""Share of smallest_gain that a feature needs to stay before its encoder is polished."""
ALIVE_STEPS = 100
"""A feature is alive if it was active on some token of the last steps, of which this is the number."""

log = logging.getLogger(__name__)


class LayerRun:
    """The local stage of one layer.

    Args:
        index: number of the layer.
        buffer: the tokens of all layers; its tokens so far decide the coordinates of a new run.
        config: options of training.
        local: options of the local stage.
        state: an earlier `state`, from which the run goes on; None starts a new one.
        coordinates: of a new run; None measures them by the tokens of the buffer.
    """

    def __init__(
        self,
        index: int,
        buffer: TokenBuffer,
        config: TrainingConfig,
        local: LocalConfig,
        state: Mapping[str, Tensor] | None = None,
        coordinates: LayerCoordinates | None = None,
    ) -> None:
        self.index, self.buffer, self.local, self._seed = index, buffer, local, config.seed
        device = buffer.devices[index]
        if coordinates is None:
            coordinates = self._measured() if state is None else LayerCoordinates.of_tensors(state, device)
        self.layer = LocalLayer(
            coordinates.whitening, coordinates.size, config, local, self._generator("weights"), device
        )
        self.layer.adapter.compute_dtype = adapter_dtype(buffer.data.dtype, device, config.adapter_precision)
        self.terms: LocalTerms | None = None
        self.inactive_steps = torch.zeros(config.n_features, device=device)
        """Number of steps since each feature was active."""
        if state is not None:
            self.layer.restore(state)
            self.inactive_steps.copy_(state["inactive_steps"])

    def _measured(self) -> LayerCoordinates:
        """Coordinates by the tokens in the buffer; of size 0 where there is only the rounding of weights to explain."""
        x, d = self.buffer.sample(self.index, REVISION_TOKENS, self._generator("coordinates"))
        inputs = RunningCovariance(x.shape[1])
        inputs.add(x)
        size = math.sqrt(sum(float(wide(part).square().sum()) for part in d.split(ROWS_AT_ONCE)) / len(d))
        beside_noise = self.buffer.data.signal_to_noise(self.index, x[:NOISE_TOKENS], d[:NOISE_TOKENS])
        if beside_noise is not None and not beside_noise.explainable:
            log.warning("layer %d is left unexplained, and its adapter is silent: %s", self.index, beside_noise)
            size = 0.0
        return LayerCoordinates(Whitening.of(inputs, self.local.shrinkage, x.device), size)

    @property
    def alive(self) -> int:
        """Number of features that were active on some token of the last `ALIVE_STEPS` steps."""
        return 0 if self.layer.size == 0 else int((self.inactive_steps < ALIVE_STEPS).sum())

    def advance(self, steps: range) -> Iterator[None]:
        """Train for some steps, given by their numbers from 0. A layer with nothing to explain stays silent.

        Returns: an iterator that takes the steps, one whenever it is advanced.
        """
        if self.layer.size == 0:
            return
        revisions = [round(share * self.local.steps) for share in self.local.revisions]
        for index in steps:
            x, d = self.buffer.draw(self.index, self.local.tokens_per_step, self._generator("step", index))
            self.terms = self.layer.step(*self.layer.coordinates(x, d), index)
            self.inactive_steps = torch.where(self.terms.active, 0.0, self.inactive_steps + 1)
            if index + 1 in revisions:
                with self.layer.adapter.computing_in(None):
                    self.revise(index + 1, births=index + 1 < max(revisions))
            yield

    def revise(self, step: int, births: bool) -> None:
        """Merge split features, then give birth to missing ones."""
        tokens, generator = self._tokens(REVISION_TOKENS, step), self._generator("fits", step)
        merged = merge_split_features(tokens, generator)
        if merged:
            tokens.refresh()  # features that compete, as in topk, are active on other tokens then
        born = give_birth(tokens, generator) if births else 0
        log.debug("layer %d, step %d: %d features merged, %d born", self.index, step, merged, born)

    def finish(self) -> Iterator[None]:
        """After the last step: polish the features, give birth once more, and remove useless features.

        Returns: an iterator that does one of these parts, each of which can take a minute, whenever it is advanced.
        """
        if self.layer.size:
            with self.layer.adapter.computing_in(None):
                yield from self._finish()

    def _finish(self) -> Iterator[None]:
        tokens, least = self._tokens(len(self.buffer), "end"), self.local.smallest_gain
        if self.local.polish and self.layer.adapter.activation == "relu":
            generator = self._generator("fits", "end")
            remove_useless_features(tokens, UNPOLISHED_SHARE * least)
            yield
            polish_features(tokens, generator)
            remove_useless_features(tokens, least)
            yield
            if give_birth(tokens, generator):
                yield
                polish_features(tokens, generator)
        removed = remove_useless_features(tokens, least)
        log.debug("layer %d: %d features removed", self.index, removed)

    def state(self) -> dict[str, Tensor]:
        """What a run goes on from, by name."""
        return {**self.layer.state(), **self.layer.coordinates.tensors(), "inactive_steps": self.inactive_steps}

    def trained(self) -> list[Tensor]:
        """The tensors of `state` that training changes, not copied; all layers have the same ones in the same order."""
        return [*self.layer.state().values(), self.inactive_steps]

    def _tokens(self, n: int, purpose: object) -> LayerTokens:
        """At most n tokens by which features are revised."""
        rows = self.buffer.sample(self.index, n, self._generator("revision", purpose))
        return LayerTokens(self.layer, *self.layer.coordinates(*rows))

    def _generator(self, *purpose: object) -> torch.Generator:
        """A generator for one purpose, so that no draw depends on those before it."""
        seed = random.Random(f"{self._seed}-local-{self.index}-{purpose}").getrandbits(63)
        return torch.Generator().manual_seed(seed)
