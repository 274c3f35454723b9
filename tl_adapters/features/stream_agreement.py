"""How often features fire alike on the target's and on the replacement's residual stream.

Adapters are trained in the replacement, whose residual stream drifts from the target's with depth. A feature that is
read on the target's own stream (by a tool that adds nothing, on the real target) sees a slightly different input: near
its threshold it fires where it would not in the replacement, and the other way round. `stream_agreement` measures how
often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_adapters.data.traces import Trace, batches_by_length, readable_traces
from tl_adapters.features.feature import ResidualStream
from tl_adapters.features.firing_reader import features_read_on
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel
from tl_adapters.utils.clustered_intervals import clustered_share
from tl_adapters.utils.measurement import Measurement
from tl_adapters.utils.notebook import RecordTable, ResultRecord
from tl_adapters.utils.precision import host_float64, wide


@dataclass(frozen=True)
class LayerAgreement(ResultRecord):
    """Agreement of the firings of one layer's features on the target's and on the replacement's residual stream."""

    layer: int
    """The layer."""
    overlap: Measurement
    """Share of the firings on either stream that are firings on both (Jaccard index), over all features and tokens."""
    kept: Measurement
    """Share of the firings on the replacement's stream that are firings on both."""
    correlation: float | None
    """Pearson correlation of activations in decoder-norm units, over all firings on either stream; None where there are
    no firings, or the activations have no spread."""


@torch.no_grad()
def stream_agreement(
    pair: PairedModel, traces: Sequence[Trace], split: str = "", *, tokens_per_batch: int = 2048
) -> RecordTable[LayerAgreement]:
    """Compare the features' firings on the two streams, token by token, with intervals over documents.

    Args:
        pair: the pair, with adapters.
        traces: documents to read.
        split: name of the documents in the measurements.
        tokens_per_batch: tokens in a forward pass.

    Returns:
        The agreement of each layer, from the first; a list that a notebook shows as a table.

    Raises:
        ArgumentError, DataError: something else than traces, or a document that the model cannot read.
        PairMismatchError: the pair has no adapters.
    """
    traces = readable_traces(traces, pair.model.cfg)
    adapters = pair.installed_adapters()
    layers = adapters.layer_indices
    norms = {layer: adapters[layer].decoder_norms().float() for layer in layers}
    both, either, replacement = torch.zeros(3, len(layers), len(traces), dtype=torch.float64)
    sums = torch.zeros(len(layers), 6, dtype=torch.float64)
    for rows, batch in batches_by_length(traces, tokens_per_batch):
        batch = batch.to(pair.device)
        acts: dict[ResidualStream, dict[int, Tensor]] = {}
        for stream in ("target", "replacement"):
            with features_read_on(pair, stream), pair.recorded(ACTS_HOOK) as recorded:
                pair.run_blocks(pair.embed(batch.tokens), 0, pair.n_layers)
            acts[stream] = dict(recorded)
        counts, batch_sums = [], []
        for layer in layers:
            a, b = (acts[s][layer].float() * norms[layer] * batch.real[..., None] for s in ("target", "replacement"))
            fires = (a + b) > 0
            counts.append(torch.stack([(x > 0).sum((1, 2)) for x in (a * b, a + b, b)]))
            x, y = wide(a).flatten(), wide(b).flatten()  # both are zero where neither fires
            batch_sums.append(torch.stack([fires.sum().to(x.dtype), x.sum(), y.sum(), x @ x, y @ y, x @ y]))
        both[:, rows], either[:, rows], replacement[:, rows] = host_float64(torch.stack(counts, 1))
        sums += host_float64(torch.stack(batch_sums))

    def share(firings: Tensor, of: Tensor, unit: str) -> Measurement:
        return clustered_share(firings, of).measurement(len(traces), unit, split)

    return RecordTable(
        LayerAgreement(
            layer,
            share(shared, union, "firings on both streams, of those on either"),
            share(shared, of_replacement, "firings on both streams, of the replacement's"),
            _correlation(*layer_sums.tolist()),
        )
        for layer, shared, union, of_replacement, layer_sums in zip(
            layers, both, either, replacement, sums, strict=True
        )
    )


def _correlation(n: float, x: float, y: float, xx: float, yy: float, xy: float) -> float | None:
    """Pearson correlation from sums over n pairs; None where one side has no spread."""
    spread = ((n * xx - x * x) * (n * yy - y * y)) ** 0.5
    return (n * xy - x * y) / spread if spread > 0 else None
