"""The local stage as an SAE trainer on SAELens's synthetic data: ``python benchmarks/synthetic.py [--record]``.

With T(x) = x the local stage trains a sparse autoencoder, and `sae_lens.synthetic` has data whose features are known:
correlated and hierarchical directions in superposition, of Zipfian firing rates. The data is made here, by the recipe
of SynthSAEBench-16k (arXiv 2602.14687) at 1/32 of its features, and every SAE has a quarter as many features as the
data, as there. Beside the local stage stand SAELens's own trainers at the same width, with as many samples as the local
stage draws, all of them new; the local stage draws its samples from a quarter of that number. What is printed is
SAELens's own evaluation. The run takes a minute of one core.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from plants.recipes import SPARSE
from recorded import record
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.synthetic import (
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
    eval_sae_on_synthetic_data,
    train_toy_sae,
)
from torch import Tensor

from tl_adapters.adapters.transcoder import TranscoderAdapter, row_norms
from tl_adapters.config import TrainingConfig
from tl_adapters.data.batching import TracesInMemory
from tl_adapters.data.traces import Batch, Trace
from tl_adapters.local_stage.train_local import train_layers

FEATURES, D_MODEL, WIDTH, ACTIVE = 512, 96, 128, 5
"""Features of the data, its dimension, features of an SAE, and those that BatchTopK leaves active."""
DATA = SyntheticModelConfig(
    num_features=FEATURES,
    hidden_dim=D_MODEL,
    firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
    hierarchy=HierarchyConfig(
        total_root_nodes=4,
        branching_factor=4,
        max_depth=3,
        mutually_exclusive_portion=1.0,
        compensate_probabilities=True,
        scale_children_by_parent=True,
    ),
    orthogonalization=OrthogonalizationConfig(num_steps=100, lr=3e-4),
    correlation=LowRankCorrelationConfig(rank=8, correlation_scale=0.1),
    mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
    std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
)
LOCAL = replace(SPARSE, steps=400, tokens_per_step=1024, max_tokens=100_000, workers=1)
SAELENS_LR, L1 = 3e-3, 2.0
"""Learning rate of SAELens's trainers, ten times the default since the run is short (at three times it 44 of 128
latents of BatchTopK are dead), and the weight of L1 at which the standard SAE has about the true L0."""
EVALUATED = 50_000
"""Samples on which an SAE is evaluated."""


class Samples:
    """Samples of a synthetic model as inputs and wanted outputs of one layer (`RegressionData`), new in every batch."""

    n_layers, d_model, d_vocab, dtype, device = 1, D_MODEL, 1, torch.float32, torch.device("cpu")

    def __init__(self, model: SyntheticModel) -> None:
        self.model = model

    def read(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """As many samples as the batch has tokens, which are not read otherwise."""
        x = self.model.sample(int(batch.counted.sum()))
        yield x, x

    def signal_to_noise(self, layer: int, x: Tensor, d: Tensor) -> None:
        """Not a difference of weights."""


def local_stage(model: SyntheticModel, **options: Any) -> TranscoderAdapter:
    """An autoencoder trained by the local stage; without the features that it removed."""
    config = TrainingConfig(n_features=WIDTH, **options)
    adapter = TranscoderAdapter(D_MODEL, WIDTH, activation=config.activation, k=options.get("k"))
    documents = TracesInMemory([Trace((0,) * 1000, 0)] * (LOCAL.max_tokens // 1000))
    train_layers(Samples(model), documents, [adapter], config, LOCAL, progress=False)
    return adapter


def standard(model: SyntheticModel) -> Any:
    """SAELens's SAE with ReLU and L1."""
    return trained(StandardTrainingSAE(StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=WIDTH, l1_coefficient=L1)), model)


def batch_topk(model: SyntheticModel) -> Any:
    """SAELens's BatchTopK SAE."""
    return trained(BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D_MODEL, d_sae=WIDTH, k=ACTIVE)), model)


def trained(sae: Any, model: SyntheticModel) -> Any:
    samples = LOCAL.steps * LOCAL.tokens_per_step
    train_toy_sae(sae, model.feature_dict, model.activation_generator, training_samples=samples, lr=SAELENS_LR)
    return sae


TRAINERS: dict[str, Callable[[SyntheticModel], Any]] = {
    "local stage, ReLU": local_stage,
    "local stage, BatchTopK": lambda model: local_stage(model, activation="batchtopk", k=ACTIVE),
    "SAELens, standard": standard,
    "SAELens, BatchTopK": batch_topk,
}


def measured(sae: Any, model: SyntheticModel) -> dict[str, Any]:
    """SAELens's evaluation: of all latents, and of those that write anything."""
    result = eval_sae_on_synthetic_data(sae, model.feature_dict, model.activation_generator, EVALUATED, 10_000)
    return {**result.to_log_dict(), "silent": int((row_norms(sae.W_dec) == 0).sum())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the data and of the SAEs")
    parser.add_argument("--record", action="store_true", help="write the figures to benchmarks/results.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    for seed in args.seeds:
        model = SyntheticModel(replace(DATA, seed=seed))
        for name, train in TRAINERS.items():
            torch.manual_seed(seed)
            start = time.process_time()
            sae = train(model)
            seconds = time.process_time() - start
            runs.append({"trainer": name, "seed": seed, "seconds": round(seconds, 1), **measured(sae, model)})
            print(runs[-1], flush=True)
    if args.record:
        record("synthetic", {"runs": runs, "features": FEATURES, "d_model": D_MODEL, "width": WIDTH})


if __name__ == "__main__":
    main()
