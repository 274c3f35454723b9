"""A training step beside the formulas on Hugging Face's modules, and beside the products it cannot avoid:
``python benchmarks/training_step.py``.

A step is the gradient of the objective for one document of 512 tokens, clipping and Adam, in float32 on a random pair
of 6 layers, d_model 256, d_mlp 1,024 and 8 / 2 heads, of which 1 % of the features are active. Three things are run in
turns, each over all cuts from 1 to 6: our step, that of `hf_objective`, and `step_products`. Given are medians over the
runs of the ratios within a run, with their ranges. Memory is that of a process of its own, the most during two steps
beside what was there before the first. ``--record`` writes the block "training" of results.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hf_objective import HFObjective, take_step
from large_pair import install_adapters, pair_of_configuration, random_documents, random_models
from recorded import ratio_in_turns, record, timing_options
from resources import measured
from step_products import StepProducts
from transformers import Qwen2Config

from tl_adapters.config import TrainingConfig
from tl_adapters.data.traces import Trace, collate
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.training.adapter_adam import AdapterAdam
from tl_adapters.training.objective import shared_prefix_step

DENSITY = 0.01
"""Share of the features that are active."""


@dataclass(frozen=True)
class Size:
    """What a step's time grows with."""

    features: int = 1024
    """Features per layer."""
    tokens: int = 512
    """Tokens of the document."""
    layers: int = 6
    """Layers of the models."""
    vocab: int = 4096
    """Tokens of the vocabulary."""


CASES = {
    "features_1024": Size(),
    "features_8192": Size(features=8192),
    "vocab_32768": Size(vocab=32768),
}
"""The cases by name."""
CPU = torch.device("cpu")
TRAINING = TrainingConfig(stages=("end_to_end",), lr=1e-6)
"""Weights hardly move, so that as many features stay active."""
Step = Callable[[int], object]


def configuration(size: Size) -> Qwen2Config:
    """The shape of base and target."""
    return Qwen2Config(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=size.layers, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=size.vocab, max_position_embeddings=size.tokens, rms_norm_eps=1e-6,
        tie_word_embeddings=False, architectures=["Qwen2ForCausalLM"], dtype="float32",
    )  # fmt: skip


def made(size: Size) -> tuple[PairedModel, Trace]:
    """A pair with adapters, and a document."""
    pair = pair_of_configuration(configuration(size), CPU, torch.float32)
    install_adapters(pair, size.features, DENSITY * size.features)
    return pair, random_documents(pair, 1, size.tokens)[0]


def our_step(pair: PairedModel, document: Trace) -> Step:
    """A step of the library, for a cut."""
    adam, batch = AdapterAdam(pair.installed_adapters(), TRAINING), collate([document])

    def step(cut: int) -> None:
        shared_prefix_step(pair, batch, cut, TRAINING.loss_weights, TRAINING.l1_weight)
        adam.clip(TRAINING.grad_clip)
        adam.step(TRAINING.lr, None, 0.0)

    return step


def their_step(size: Size, pair: PairedModel, document: Trace) -> Step:
    """A step of the formulas on Hugging Face's modules, on the same weights, for a cut."""
    models: Any = random_models(configuration(size), CPU, torch.float32)
    adapters = list(pair.installed_adapters())
    parameters = [parameter for adapter in adapters for parameter in adapter.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=TRAINING.lr, betas=(TRAINING.beta1, TRAINING.beta2), fused=True)
    objective, tokens = HFObjective(*models, adapters), torch.tensor([document.tokens])
    return lambda cut: take_step(objective.loss(tokens, cut, TRAINING.l1_weight), optimizer, TRAINING.grad_clip)


def seconds(step: Step, cuts: Sequence[int]) -> float:
    """Seconds of a step, as a mean over the cuts."""
    started = time.perf_counter()
    for cut in cuts:
        step(cut)
    return (time.perf_counter() - started) / len(cuts)


def all_cuts(size: Size) -> range:
    """The cuts that training draws from."""
    return range(1, size.layers + 1)


def times(size: Size, repeats: int) -> dict[str, list[float]]:
    """Seconds of a step of each kind in runs that take turns, after one that is not counted."""
    pair, document = made(size)
    steps: dict[str, Step] = {
        "ours": our_step(pair, document),
        "reference": their_step(size, pair, document),
        "products": StepProducts(configuration(size), size.features, DENSITY, size.tokens).run,
    }
    found: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(repeats + 1):
        for name, step in steps.items():
            taken = seconds(step, all_cuts(size))
            if run:
                found[name].append(taken)
    return found


def memory(size: Size, side: str) -> float:
    """Megabytes of two steps beside the weights, in this process."""
    pair, document = made(size)
    step = our_step(pair, document) if side == "ours" else their_step(size, pair, document)
    return measured(lambda: [step(cut) for cut in (size.layers // 2, size.layers)]).bytes / 1e6


def memory_of_process(case: str, side: str, threads: int) -> float:
    """`memory` in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", case, side, "--threads", str(threads)]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def block(case: str, repeats: int, threads: int) -> dict[str, Any]:
    """What is recorded of a case."""
    found = times(CASES[case], repeats)

    def ratio(above: str, below: str) -> dict[str, Any]:
        return ratio_in_turns(found[above], found[below])

    return {
        "speed": ratio("reference", "ours"),
        "over_products": ratio("ours", "products"),
        "mb": memory_of_process(case, "ours", threads),
        "reference": {
            "over_products": ratio("reference", "products"),
            "mb": memory_of_process(case, "reference", threads),
        },
        "seconds": statistics.median(found["ours"]),
    }


def main() -> None:
    parser = timing_options(__doc__, "the block training")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        case, side = options.memory_of
        print(memory(CASES[case], side))
        return
    found = {}
    for case in options.cases:
        found[case] = block(case, options.repeats, options.threads)
        print(case, json.dumps(found[case]), flush=True)
    if options.record:
        record("training", {"repeats": options.repeats, "threads": options.threads, **found})


if __name__ == "__main__":
    main()
