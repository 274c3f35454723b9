"""Ways to train adapters on a pair, and baselines, by name; all of one width and on the same text.

The baselines are adapters too, so that all are measured by the same code: a bias alone; a linear map of low rank,
whose features are active on every token; and a sparse autoencoder (SAE) that reads the difference itself, which
adapters cannot, since the difference needs the target's MLP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import yaml
from jaxtyping import Float
from torch import Tensor

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.transcoder import TranscoderAdapter
from tl_adapters.config import LocalConfig, LossWeights, TrainingConfig
from tl_adapters.data.batching import BatchOrder, TracesInMemory
from tl_adapters.data.traces import Batch, Trace, readable_traces
from tl_adapters.local_stage.regression_data import MLPDifferences
from tl_adapters.local_stage.token_buffer import TokenBuffer, TokenStream
from tl_adapters.local_stage.train_local import train_layers, train_local
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.models.routed_mlp import RoutedMLP
from tl_adapters.training.trainer import train

FIRST_RELEASE = TrainingConfig(
    stages=("end_to_end",), n_features=512, steps=700, lr=0.012, l1_weight=0.001, tokens_per_batch=1024
)
"""The default training of the first release, in whose time others are given."""
SPARSE = LocalConfig(
    steps=600,
    tokens_per_step=2048,
    max_tokens=800_000,
    penalty="tanh",
    shrinkage=1e-3,
    revisions=(0.3, 0.5, 0.6, 0.8),
)
"""Options of the local stage for planted features, which are rare; chosen on plants 0 and 1. All of the text is in
memory."""
SAME_L0, SAME_L0_WHITENED = 0.02, 5e-4
"""l1_weight at which training end to end on a plant, in plain and in whitened coordinates, has about the L0 of the
local stage, chosen on plants 0 and 1."""
FINISH_STEPS, FINISH_LR, FINISH_LOCAL = 80, 3e-4, 0.1
"""Steps and learning rate of the objective after the local stage, and the weight of the local term in it."""
RIDGE = 1e-4
"""Ridge of the low-rank regression, in units of the inputs' mean variance."""


@dataclass(frozen=True)
class Options:
    """What all recipes have in common."""

    n_features: int = 64
    seed: int = 0
    local: LocalConfig = SPARSE
    """Options of the local stage; its number of tokens is also that of the baselines."""
    steps: int | None = None
    """Steps of training end to end; None is each recipe's own number."""

    def end_to_end(self, **options: Any) -> TrainingConfig:
        """The first release's training at this width."""
        config = replace(FIRST_RELEASE, n_features=self.n_features, seed=self.seed, **options)
        return config if self.steps is None else replace(config, steps=self.steps)


def local_options(default: LocalConfig, given: Sequence[str], steps: int | None = None) -> LocalConfig:
    """Options of the local stage: ``default`` with those given as ``name=value``, and with another number of steps."""
    values = dict(option.split("=", 1) for option in given)
    local = replace(default, **{name: yaml.safe_load(value) for name, value in values.items()})
    return local if steps is None else replace(local, steps=steps)


Recipe = Callable[[PairedModel, Sequence[Trace], Options], AdapterSet]


@dataclass
class Seconds:
    """Time that a block took, on the clock and of the processor."""

    wall: float = 0.0
    cpu: float = 0.0


@contextmanager
def timed() -> Iterator[Seconds]:
    """Measure the time of a block."""
    seconds, wall, cpu = Seconds(), time.perf_counter(), time.process_time()
    yield seconds
    seconds.wall, seconds.cpu = time.perf_counter() - wall, time.process_time() - cpu


def end_to_end(
    pair: PairedModel,
    traces: Sequence[Trace],
    options: Options,
    *,
    l1_weight: float = SAME_L0,
    nmse: float = 1.0,
    steps: int = FIRST_RELEASE.steps,
    n_features: int | None = None,
) -> AdapterSet:
    """The paper's objective from a random start, as in the first release."""
    config = options.end_to_end(l1_weight=l1_weight, loss_weights=LossWeights(nmse=nmse))
    config = replace(config, steps=options.steps or steps, n_features=n_features or options.n_features)
    return train(pair, traces, config, progress=False)


def local(pair: PairedModel, traces: Sequence[Trace], options: Options) -> AdapterSet:
    """The local stage alone."""
    return train_local(pair, traces, options.end_to_end(), options.local, progress=False)


def local_then_end_to_end(pair: PairedModel, traces: Sequence[Trace], options: Options) -> AdapterSet:
    """The local stage, then a few steps of the objective with the local term."""
    weights = LossWeights(local=FINISH_LOCAL)
    config = replace(options.end_to_end(), steps=options.steps or FINISH_STEPS, lr=FINISH_LR, l1_weight=0.0)
    config = replace(config, stages=("local", "end_to_end"), local=options.local, loss_weights=weights)
    return train(pair, traces, config, progress=False)


def end_to_end_whitened(pair: PairedModel, traces: Sequence[Trace], options: Options) -> AdapterSet:
    """Training end to end in the coordinates and from the start of the local stage, which itself takes no step."""
    none = replace(options.local, steps=1, lr=1e-12, revisions=(), polish=False, smallest_gain=0.0)
    config = options.end_to_end(l1_weight=SAME_L0_WHITENED, stages=("local", "end_to_end"), local=none)
    return train(pair, traces, config, progress=False)


def bias(pair: PairedModel, traces: Sequence[Trace], options: Options) -> AdapterSet:
    """The mean difference of every layer, and no feature that is ever active."""
    buffer, adapters = _tokens(pair, traces, options), pair.new_adapters(options.n_features)
    with torch.no_grad():
        for layer, adapter in enumerate(adapters):
            adapter.W_enc.zero_()
            adapter.b_enc.fill_(-1.0)
            adapter.b_dec.copy_(buffer.d[layer].mean(0))
    return adapters


def low_rank(pair: PairedModel, traces: Sequence[Trace], options: Options) -> AdapterSet:
    """The linear map of the MLP's input that is closest to the difference, of a rank with as many weights as adapters.

    A map of rank r has 2 r d_model weights, as many as r features. It is written as features that are always active.
    """
    buffer, adapters = _tokens(pair, traces, options), pair.new_adapters(options.n_features)
    rank = min(options.n_features, pair.model.cfg.d_model)
    with torch.no_grad():
        for layer, adapter in enumerate(adapters):
            mean_x, mean_d, read, write = reduced_rank_regression(buffer.x[layer], buffer.d[layer], rank)
            scores = (buffer.x[layer] - mean_x) @ read
            offset = 1 + 2 * scores.abs().max()  # above 0 on inputs that were not seen, too
            adapter.W_enc.zero_()
            adapter.b_enc.fill_(-1.0)
            adapter.W_enc[:, :rank], adapter.W_dec[:rank] = read, write
            adapter.b_enc[:rank] = offset - mean_x @ read
            adapter.b_dec.copy_(mean_d - offset * write.sum(0))
    return adapters


def reduced_rank_regression(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means of x and y, and matrices A [d, rank] and B [rank, d]; mean_y + (x - mean_x) A B is closest to y."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    centered = (x - mean_x).double()
    moment = centered.T @ centered / len(x)
    moment += RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    full = torch.linalg.solve(moment, centered.T @ (y - mean_y).double() / len(x))
    directions = torch.linalg.eigh(full.T @ moment @ full).eigenvectors.flip(1)[:, :rank]
    return mean_x, mean_y, (full @ directions).to(x), directions.T.to(x)


class ReadsDifference(TranscoderAdapter):
    """An adapter whose encoder reads the difference of the two MLPs instead of the MLP's input."""

    def __init__(self, mlp: RoutedMLP, n_features: int) -> None:
        super().__init__(mlp.weights()[1].W_in.shape[0], n_features)
        self.difference = mlp.difference  # a method, so that the MLP is no part of this module

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch n_features"]:
        return super().encode(self.difference(x))


class Differences(MLPDifferences):
    """The difference as the input as well as the output."""

    def read(self, batch: Batch, layers: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        return ((d, d) for _, d in super().read(batch, layers))


def sae_on_difference(pair: PairedModel, traces: Sequence[Trace], options: Options) -> AdapterSet:
    """A sparse autoencoder of the difference, trained by the local stage."""
    layers = [ReadsDifference(mlp, options.n_features) for mlp in pair.mlps]
    source = TracesInMemory(readable_traces(traces, pair.model.cfg))
    train_layers(Differences(pair), source, layers, options.end_to_end(), options.local, progress=False)
    adapters = AdapterSet(layers, pair.layer_samples, samples=pair.samples)
    pair.load_adapters(adapters)
    return adapters


def _tokens(pair: PairedModel, traces: Sequence[Trace], options: Options) -> TokenBuffer:
    """Inputs and differences at the tokens of the text."""
    config, source = options.end_to_end(), TracesInMemory(readable_traces(traces, pair.model.cfg))
    order = BatchOrder(source, config.tokens_per_batch, config.seed)
    devices = [pair.device] * pair.n_layers
    return TokenStream.fill(MLPDifferences(pair), order, options.local.max_tokens, devices, lambda *_: None).buffer


def _of_first_release(nmse: float, steps: int, n_features: int, l1_weight: float) -> Recipe:
    return partial(end_to_end, l1_weight=l1_weight, nmse=nmse, steps=steps, n_features=n_features)


RECIPES: dict[str, Recipe] = {
    "end_to_end": end_to_end,
    "end_to_end_whitened": end_to_end_whitened,
    "local": local,
    "local_then_end_to_end": local_then_end_to_end,
    "bias": bias,
    "low_rank": low_rank,
    "sae_on_difference": sae_on_difference,
}
"""The recipes of the comparison, at equal width and text."""
SEEDLESS = ("bias", "low_rank")
"""Recipes that draw nothing, so that one seed is enough."""
EARLIER: dict[str, Recipe] = {
    f"nmse{nmse:g}-steps{steps}-w{width}-l1_{l1:g}": _of_first_release(nmse, steps, width, l1)
    for nmse, steps, width, l1 in (
        (1, 300, 64, 1e-3),
        (1, 300, 256, 1e-3),
        (1, 300, 256, 3e-3),
        (1, 900, 64, 2e-2),
        (1, 2000, 64, 1e-3),
        (100, 300, 64, 1e-3),
        (100, 300, 64, 1e-2),
        (100, 300, 256, 1e-2),
        (100, 2000, 64, 1e-2),
    )
}
"""What the first release's objective finds, by weight of the NMSE, steps, width and l1_weight."""
