"""The local stage alone: every layer's adapter is trained by itself on the difference of the two MLPs.

    one pass of the target collects, at every layer, what the MLP reads and MLP_target(x) - MLP_base(x)
    for each layer, side by side:
        steps of Adam on the local objective                            (local_layer.py)
        now and then: merge features that split one, and give birth to missing ones    (feature_revision.py)
        at the end: remove features that explain nothing

There is no backward pass through the model, so a step costs a small part of a step of the objective. The KL divergence
of the paper's objective sees of a difference only what reaches the output, and its NMSE is relative to the whole
residual stream, of which the difference is a small part; the local objective sees all of it at full scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tqdm import tqdm

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.transcoder import TranscoderAdapter
from tl_adapters.config import LocalConfig, TrainingConfig
from tl_adapters.data.batching import BatchOrder, TracesInMemory, TraceSource
from tl_adapters.data.traces import Trace, readable_traces
from tl_adapters.local_stage.regression_data import MLPDifferences, RegressionData
from tl_adapters.local_stage.stage import LocalStage
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.processes import processes
from tl_adapters.utils.precision import adapter_dtype


def train_local(
    pair: PairedModel,
    traces: Sequence[Trace],
    config: TrainingConfig | None = None,
    local: LocalConfig | None = None,
    *,
    progress: bool = True,
) -> AdapterSet:
    """Train adapters for ``pair`` by the local stage alone, in memory, and return them.

    `Trainer` runs the stage in a run folder, alone or before the end-to-end stage.

    Args:
        pair: base and target; it holds the adapters afterwards.
        traces: the training documents.
        config: width, activation function, counted regions, seed and batches; None is the default ones.
        local: options of the local stage; None is those of ``config``.
        progress: show a progress bar.

    Raises DataError where there is no document to train on, or one that the model cannot read; and ArgumentError for
    something else than traces.
    """
    config = config or TrainingConfig()
    source = TracesInMemory(readable_traces(traces, pair.model.cfg), config.count)
    adapters = new_adapters(pair, config)
    train_layers(MLPDifferences(pair), source, adapters, config, local, progress)
    return adapters


def train_layers(
    data: RegressionData,
    source: TraceSource,
    adapters: Iterable[TranscoderAdapter],
    config: TrainingConfig,
    local: LocalConfig | None = None,
    progress: bool = True,
) -> None:
    """Train the adapters of all layers by the local stage, and write their weights into ``adapters``.

    Args: as `train_local`; data: what the layers are regressed on; source: the training documents.
    """
    local = local or config.local
    order = BatchOrder(source, config.tokens_per_batch, config.seed, config.count)
    stage = LocalStage(data, order, config, local)
    with tqdm(total=local.steps, desc="local stage", disable=not (progress and processes().is_main)) as bar:
        while not stage.finished:
            bar.update(stage.advance())
    stage.finish(adapters)


def new_adapters(pair: PairedModel, config: TrainingConfig) -> AdapterSet:
    """Untrained adapters with the width, activation function and precision of a configuration, in the pair."""
    adapters = pair.new_adapters(config.n_features, seed=config.seed, **config.adapter_options)
    adapters.compute_in(adapter_dtype(pair.model.cfg.dtype, pair.device, config.adapter_precision))
    return adapters
