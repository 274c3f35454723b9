"""A training step beside the formulas on Hugging Face's modules, and beside the products it cannot avoid:
``python benchmarks/training_step.py``.

A step is the gradient of the objective for one document of 512 tokens, clipping and Adam, in float32 on a random pair
of 6 layers, d_model 256, d_mlp 1,024 and 8 / 2 heads, of which 1 % of the features are active. Three things are run in
turns, each over all cuts from 1 to 6: our step, that of `hf_objective`, and `step_products`. Given are medians over the
runs of the ratios within a run, with their ranges. Memory is that of a process of its own, the most during two steps
beside what was there before the first. Then our steps of 512 and of 8,192 features take turns, and the ratio of their
times is given. ``--record`` writes the blocks "training" and "growth" of results.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from hf_objective import HFObjective, take_step
from large_pair import install_adapters, pair_of_configuration, random_documents, random_models
from recorded import record, timing_options, value_and_range
from resources import measured
from step_products import StepProducts
from transformers import Qwen2Config

from tl_adapters.config import TrainingConfig
from tl_adapters.data.traces import Trace, collate
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.training.adapter_adam import AdapterAdam
from tl_adapters.training.objective import shared_prefix_step

CASES = {
    "features_512": dict(vocab=4096, features=512),
    "features_1024": dict(vocab=4096, features=1024),
    "features_8192": dict(vocab=4096, features=8192),
    "vocab_32768": dict(vocab=32768, features=1024),
}
"""The cases by name."""
BESIDE_REFERENCE = ("features_1024", "features_8192", "vocab_32768")
"""Those that are run beside `hf_objective` and `step_products`."""
LAYERS, TOKENS, DENSITY = 6, 512, 0.01
CPU = torch.device("cpu")
TRAINING = TrainingConfig(stages=("end_to_end",), lr=1e-6)
"""Weights hardly move, so that as many features stay active."""
Step = Callable[[int], object]


def configuration(vocab: int) -> Qwen2Config:
    """The shape of base and target."""
    return Qwen2Config(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=vocab, max_position_embeddings=TOKENS, rms_norm_eps=1e-6,
        tie_word_embeddings=False, architectures=["Qwen2ForCausalLM"], dtype="float32",
    )  # fmt: skip


def made(case: str) -> tuple[PairedModel, Trace]:
    """The pair of a case, and a document."""
    vocab, features = CASES[case]["vocab"], CASES[case]["features"]
    pair = pair_of_configuration(configuration(vocab), CPU, torch.float32)
    install_adapters(pair, features, DENSITY * features)
    return pair, random_documents(pair, 1, TOKENS)[0]


def our_step(pair: PairedModel, document: Trace) -> Step:
    """A step of the library, for a cut."""
    adam, batch = AdapterAdam(pair.installed_adapters(), TRAINING), collate([document])

    def step(cut: int) -> None:
        shared_prefix_step(pair, batch, cut, TRAINING.loss_weights, TRAINING.l1_weight)
        adam.clip(TRAINING.grad_clip)
        adam.step(TRAINING.lr, None, 0.0)

    return step


def their_step(case: str, pair: PairedModel, document: Trace) -> Step:
    """A step of the formulas on Hugging Face's modules, on the same weights, for a cut."""
    models: Any = random_models(configuration(CASES[case]["vocab"]), CPU, torch.float32)
    adapters = list(pair.installed_adapters())
    parameters = [parameter for adapter in adapters for parameter in adapter.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=TRAINING.lr, betas=(TRAINING.beta1, TRAINING.beta2), fused=True)
    objective, tokens = HFObjective(*models, adapters), torch.tensor([document.tokens])
    return lambda cut: take_step(objective.loss(tokens, cut, TRAINING.l1_weight), optimizer, TRAINING.grad_clip)


def seconds(step: Step) -> float:
    """Seconds of a step, as a mean over the cuts."""
    started = time.perf_counter()
    for cut in range(1, LAYERS + 1):
        step(cut)
    return (time.perf_counter() - started) / LAYERS


def times(case: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of a step of each kind in runs that take turns, after one that is not counted."""
    pair, document = made(case)
    features = CASES[case]["features"]
    steps: dict[str, Step] = {
        "ours": our_step(pair, document),
        "reference": their_step(case, pair, document),
        "products": StepProducts(configuration(CASES[case]["vocab"]), features, DENSITY, TOKENS).run,
    }
    found: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(repeats + 1):
        for name, step in steps.items():
            taken = seconds(step)
            if run:
                found[name].append(taken)
    return found


def growth(repeats: int) -> dict[str, Any]:
    """The time of our step with 8,192 features over that with 512."""
    narrow, wide = (our_step(*made(case)) for case in ("features_512", "features_8192"))
    runs = [(seconds(wide), seconds(narrow)) for _ in range(repeats + 1)][1:]
    ratios = [above / below for above, below in runs]
    return value_and_range(statistics.median(ratios), ratios)


def memory(case: str, side: str) -> float:
    """Megabytes of two steps beside the weights, in this process."""
    pair, document = made(case)
    step = our_step(pair, document) if side == "ours" else their_step(case, pair, document)
    return measured(lambda: [step(cut) for cut in (LAYERS // 2, LAYERS)]).bytes / 1e6


def memory_of_process(case: str, side: str, threads: int) -> float:
    """`memory` in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", case, side, "--threads", str(threads)]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def block(case: str, repeats: int, threads: int) -> dict[str, Any]:
    """What is recorded of a case."""
    found = times(case, repeats)

    def ratio(above: str, below: str) -> dict[str, Any]:
        ratios = [a / b for a, b in zip(found[above], found[below], strict=True)]
        return value_and_range(statistics.median(ratios), ratios)

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
    parser = timing_options(__doc__, "the blocks training and growth")
    parser.add_argument("--cases", nargs="+", choices=BESIDE_REFERENCE, default=list(BESIDE_REFERENCE))
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(memory(*options.memory_of))
        return
    found = {}
    for case in options.cases:
        found[case] = block(case, options.repeats, options.threads)
        print(case, json.dumps(found[case]), flush=True)
    growing = growth(options.repeats)
    print("8,192 over 512 features", json.dumps(growing))
    if options.record:
        conditions = {"repeats": options.repeats, "threads": options.threads}
        record("training", {**conditions, **found})
        record("growth", {**conditions, "features_x16": growing})


if __name__ == "__main__":
    main()
