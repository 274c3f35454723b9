"""Transcoders of a model's own MLPs, trained by the local stage, and how much of the MLPs' output they explain.

    T(x) ~ MLP(x)

A transcoder takes the place of the MLP, where an adapter is added to it. `interop.saelens.to_saelens` writes the set as
stock SAELens transcoders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.metadata import AdapterMetadata
from tl_adapters.adapters.transcoder import TranscoderAdapter
from tl_adapters.checkpoints.compatibility import PairMismatchError
from tl_adapters.config import REGIONS, LocalConfig, Region, TrainingConfig
from tl_adapters.data.batching import TracesInMemory, TraceSource
from tl_adapters.data.traces import DataError, Trace, batches_by_length, readable_traces
from tl_adapters.local_stage.regression_data import READS, WRITES, MLPOutputs
from tl_adapters.local_stage.train_local import train_layers
from tl_adapters.utils.notebook import RecordTable, ResultRecord
from tl_adapters.utils.precision import host_float64, wide


def train_transcoders(
    model: Any,
    traces: Sequence[Trace] | TraceSource,
    config: TrainingConfig | None = None,
    local: LocalConfig | None = None,
    *,
    progress: bool = True,
) -> AdapterSet:
    """Train a transcoder for the MLP of every layer of ``model`` by the local stage, and return them.

    Args:
        model: a HookedTransformer or a TransformerBridge, which stays as it is. The model of a PairedModel has the
            route that is set: within ``pair.routed("hybrid")`` the base's MLPs are explained, in the target's stream.
        traces: the training documents: a list, or a source that reads them as they are needed.
        config: width, activation function, counted regions, seed and batches; None is the default ones.
        local: options of the local stage; None is those of ``config``.
        progress: show a progress bar.

    Returns:
        The transcoders, which read the second norm's output before its weight and write the MLP's output
        (``metadata.writes`` is "mlp_out"), in float32. They cannot be loaded into a pair, which adds adapters to MLPs.

    Raises:
        ArgumentError, DataError: something else than traces; no document to train on, or one that cannot be read.
        HookMissingError: the model has no norm before its MLPs.
    """
    config, data = config or TrainingConfig(), MLPOutputs(model)
    if not isinstance(traces, TraceSource):
        traces = TracesInMemory(readable_traces(traces, model.cfg), config.count)
    options = config.adapter_options
    layers = [
        TranscoderAdapter(data.d_model, config.n_features, device=data.device, **options) for _ in range(data.n_layers)
    ]
    train_layers(data, traces, layers, config, local, progress)
    metadata = AdapterMetadata(
        target=str(getattr(model.cfg, "model_name", "") or ""),
        reads=READS,
        writes=WRITES,
        stream="target",
        activation=options["activation"],
        k=options["k"],
    )
    return AdapterSet(layers, metadata=metadata)


@dataclass(frozen=True)
class TranscoderFit(ResultRecord):
    """How well a transcoder explains the MLP of one layer."""

    layer: int
    """Number of the layer."""
    fvu: float | None
    """Fraction of variance unexplained: sum |T(x) - MLP(x)|^2 / sum |MLP(x) - mean|^2; None for a constant output."""
    l0: float
    """Active features per token."""
    alive: int
    """Number of features that were active at any token."""
    tokens: int
    """Number of tokens that were measured; the first of every document is left out."""


@torch.no_grad()
def measure_transcoders(
    model: Any,
    transcoders: AdapterSet,
    traces: Sequence[Trace],
    *,
    count: Sequence[Region] = REGIONS,
    tokens_per_batch: int = 1024,
) -> RecordTable[TranscoderFit]:
    """How well transcoders explain the MLPs of ``model``, layer by layer.

    Args:
        model: as in `train_transcoders`.
        transcoders: what `train_transcoders` returned.
        traces: documents that it was not trained on.
        count: the regions whose tokens are measured.
        tokens_per_batch: most tokens in a forward pass, padding included.

    Raises:
        PairMismatchError: adapters, transcoders that read another hook point, or ones of another depth or width.
        ArgumentError, DataError: something else than traces; no token to measure, or a document that the model cannot
            read.
        HookMissingError: the model has no norm before its MLPs.
    """
    data, about = MLPOutputs(model), transcoders.metadata
    shape = (transcoders.n_layers, transcoders.d_model, about.reads, about.writes)
    if shape != (data.n_layers, data.d_model, READS, WRITES):
        raise PairMismatchError(
            f"Given are {shape[0]} layers of width {shape[1]} that read {shape[2]} and write {shape[3]}; the model has "
            f"{data.n_layers} of width {data.d_model}, and a transcoder of it reads {READS} and writes {WRITES}."
        )
    sums = [_Sums(transcoder) for transcoder in transcoders]
    for _, batch in batches_by_length(readable_traces(traces, model.cfg), tokens_per_batch, count):
        read = dict(enumerate(data.read(batch)))
        for layer, of_layer in zip(transcoders.layer_indices, sums, strict=True):
            of_layer.add(*read[layer])
    if not sums[0].tokens:
        raise DataError("There is no token to measure; the first token of a document is left out.")
    return RecordTable(of_layer.fit(layer) for layer, of_layer in zip(transcoders.layer_indices, sums, strict=True))


class _Sums:
    """Sums over tokens from which `TranscoderFit` is computed."""

    def __init__(self, transcoder: TranscoderAdapter) -> None:
        self.transcoder, self.tokens = transcoder, 0
        self.output = torch.zeros(transcoder.W_dec.shape[1], dtype=torch.float64)
        self.active = torch.zeros(transcoder.n_features, dtype=torch.int64)
        self.energy = self.error = 0.0

    def add(self, x: Float[Tensor, "n d_model"], output: Float[Tensor, "n d_model"]) -> None:
        """Add tokens: inputs and outputs of the MLP."""
        acts = self.transcoder.encode(x.to(self.transcoder.W_enc.device))
        error = wide(self.transcoder.decode(acts)) - wide(output.to(acts.device))
        self.tokens += len(x)
        self.output += host_float64(wide(output).sum(0))
        self.energy += float(wide(output).square().sum())
        self.error += float(error.square().sum())
        self.active += (acts > 0).sum(0).cpu()

    def fit(self, layer: int) -> TranscoderFit:
        """The figures of all tokens."""
        variance = self.energy - float(self.output.square().sum()) / self.tokens
        fvu = self.error / variance if variance > 0 else None
        alive = int((self.active > 0).sum())
        return TranscoderFit(layer, fvu, int(self.active.sum()) / self.tokens, alive, self.tokens)
