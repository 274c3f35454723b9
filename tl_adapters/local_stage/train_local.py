"""The local stage: every layer's adapter is trained by itself on the difference of the two MLPs.

    one pass of the target collects, at every layer, what the MLP reads and MLP_target(x) - MLP_base(x)
    for each layer, in parallel:
        steps of Adam on the local objective                            (local_layer.py)
        now and then: merge features that split one, and give birth to missing ones    (feature_revision.py)
        at the end: remove features that explain nothing

There is no backward pass through the model, so a step costs a small part of a step of the objective. The KL divergence
of the paper's objective sees of a difference only what reaches the output, and its NMSE is relative to the whole
residual stream, of which the difference is a small part; the local objective sees all of it at full scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.transcoder import TranscoderAdapter
from tl_adapters.config import LocalConfig, TrainingConfig
from tl_adapters.data.batching import BatchOrder, TracesInMemory
from tl_adapters.data.traces import Batch, Trace, readable_traces
from tl_adapters.local_stage.layer_run import LayerRun
from tl_adapters.local_stage.regression_data import MLPDifferences, RegressionData
from tl_adapters.local_stage.token_buffer import TokenBuffer
from tl_adapters.models.paired_model import PairedModel


def train_local(
    pair: PairedModel,
    traces: Sequence[Trace],
    config: TrainingConfig | None = None,
    local: LocalConfig | None = None,
    *,
    threads: int = 1,
    progress: bool = True,
) -> AdapterSet:
    """Train adapters for ``pair`` by the local stage alone and return them.

    Args:
        pair: base and target; it holds the adapters afterwards.
        traces: the training documents.
        config: width, activation function, counted regions, seed and batches; None is the default ones.
        local: options of the local stage; None is the default ones.
        threads: number of layers that are trained at the same time.
        progress: show a progress bar.

    Raises DataError where there is no document to train on.
    """
    config, local = config or TrainingConfig(), local or LocalConfig()
    traces = readable_traces(traces, pair.model.cfg)
    buffer = collect(MLPDifferences(pair), batches(traces, config), local.max_tokens)
    adapters = pair.new_adapters(
        config.n_features,
        seed=config.seed,
        activation=config.activation,
        k=config.k if config.activation in ("topk", "batchtopk") else None,
        bandwidth=config.bandwidth,
    )
    train_layers(buffer, list(adapters), config, local, threads=threads, progress=progress)
    return adapters


def train_layers(
    buffer: TokenBuffer,
    adapters: Sequence[TranscoderAdapter],
    config: TrainingConfig,
    local: LocalConfig,
    *,
    threads: int = 1,
    progress: bool = True,
) -> None:
    """Train the adapters of all layers on collected tokens and write their weights into ``adapters``.

    Args: as `train_local`; buffer: the collected tokens.
    """
    bar = tqdm(total=local.steps * len(adapters), desc="local stage", disable=not progress)
    with bar, ThreadPoolExecutor(threads) as pool:
        runs = [LayerRun(layer, buffer, config, local) for layer in range(len(adapters))]
        for run in pool.map(lambda run: run.train(bar.update), runs):
            run.layer.write_to(adapters[run.index])


def batches(traces: Sequence[Trace], config: TrainingConfig) -> BatchOrder:
    """The batches in which traces are collected. Raises DataError where there is none with a token that counts."""
    return BatchOrder(TracesInMemory(traces, config.count), config.tokens_per_batch, config.seed, config.count)


def collect(data: RegressionData, order: BatchOrder, max_tokens: int) -> TokenBuffer:
    """The inputs and wanted outputs of all layers at the tokens of one epoch, or the first ``max_tokens`` of them."""
    batches: list[Batch] = []
    n = 0
    while n < max_tokens:
        batch = order[len(batches)]
        if order.position["epoch"] > 0:
            break
        batches.append(batch)
        n += int(batch.counted.sum())
    buffer = TokenBuffer(data, min(n, max_tokens))
    for batch in batches:
        buffer.add(batch)
    return buffer
