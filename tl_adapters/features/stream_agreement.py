"""On whose residual stream are features read, and does it matter?

Adapters are trained in the replacement, whose residual stream drifts from the target's with depth. A feature read on
the target's own stream (by a tool that adds nothing, on the real target) sees a slightly other input: near its
threshold it fires where it would not, and the other way round. `stream_agreement` says how often.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_adapters.data.traces import Trace, batches_by_length, readable_traces
from tl_adapters.features.feature import ResidualStream
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel
from tl_adapters.utils.clustered_intervals import clustered_share
from tl_adapters.utils.measurement import Measurement
from tl_adapters.utils.precision import host_float64, wide

MLP_INPUT = "mlp.hook_in"


@contextmanager
def reading(pair: PairedModel, stream: ResidualStream) -> Iterator[None]:
    """Route the model along a stream, with the adapters' own hook points firing on it.

    On the target's stream the adapters read what its MLPs read and add nothing.
    """

    def read(x: Tensor, hook: HookPoint, layer: int) -> None:
        mlp = pair.mlps[layer]
        assert mlp.adapter is not None
        mlp.adapter.encode(x if mlp.adapter_scale is None else x * mlp.adapter_scale)

    layers = pair.installed_adapters().layer_indices if stream == "target" else []
    hooks = [(f"blocks.{layer}.{MLP_INPUT}", partial(read, layer=layer)) for layer in layers]
    with pair.routed(stream), pair.model.hooks(fwd_hooks=hooks):
        yield


@dataclass(frozen=True)
class LayerAgreement:
    """How far the features of one layer fire alike on the target's and on the replacement's stream."""

    layer: int
    """Which layer."""
    overlap: Measurement
    """Firings on both streams, of the firings on either (Jaccard), over all features and tokens."""
    kept: Measurement
    """Firings on both, of those on the replacement's stream."""
    correlation: float | None
    """Pearson correlation of activations in decoder-norm units, over all firings on either stream; None where there is
    none, or no spread."""


@torch.no_grad()
def stream_agreement(
    pair: PairedModel, traces: Sequence[Trace], split: str = "", tokens_per_batch: int = 2048
) -> list[LayerAgreement]:
    """Compare the features' firings on the two streams, token by token, with intervals over documents.

    Args:
        pair: with adapters.
        traces: what is read.
        split: what they are called in the figures.
        tokens_per_batch: tokens in a forward pass.
    """
    traces = readable_traces(traces, pair.model.cfg)
    adapters = pair.installed_adapters()
    layers = adapters.layer_indices
    norms = {layer: adapters[layer].W_dec.norm(dim=-1).float() for layer in layers}
    both, either, replacement = torch.zeros(3, len(layers), len(traces), dtype=torch.float64)
    moments = torch.zeros(len(layers), 6, dtype=torch.float64)
    for rows, batch in batches_by_length(traces, tokens_per_batch):
        batch = batch.to(pair.model.W_E.device)
        acts: dict[ResidualStream, dict[int, Tensor]] = {}
        for stream in ("target", "replacement"):
            with reading(pair, stream), pair.recorded(ACTS_HOOK) as recorded:
                pair.run_blocks(pair.embed(batch.tokens), 0, pair.n_layers)
            acts[stream] = dict(recorded)
        counts, products = [], []
        for layer in layers:
            a, b = (acts[s][layer].float() * norms[layer] * batch.real[..., None] for s in ("target", "replacement"))
            fires = (a + b) > 0
            counts.append(torch.stack([(x > 0).sum((1, 2)) for x in (a * b, a + b, b)]))
            x, y = wide(a).flatten(), wide(b).flatten()  # zero where neither fires
            products.append(torch.stack([fires.sum().to(x.dtype), x.sum(), y.sum(), x @ x, y @ y, x @ y]))
        both[:, rows], either[:, rows], replacement[:, rows] = host_float64(torch.stack(counts, 1))
        moments += host_float64(torch.stack(products))

    def share(place: int, over: Tensor, unit: str) -> Measurement:
        return clustered_share(both[place], over[place]).measurement(len(traces), unit, split)

    found = []
    for place, layer in enumerate(layers):
        n, x, y, xx, yy, xy = moments[place].tolist()
        spread = ((n * xx - x * x) * (n * yy - y * y)) ** 0.5
        found.append(
            LayerAgreement(
                layer,
                share(place, either, "firings on both streams, of those on either"),
                share(place, replacement, "firings on both streams, of the replacement's"),
                (n * xy - x * y) / spread if spread > 0 else None,
            )
        )
    return found
