"""The cost of a token in the streaming local stage beside that in the end-to-end stage:
``python benchmarks/local_stage.py``.

On the pairs of `training_step`, a step of the streaming local stage reads a new document of 512 tokens, by one forward
pass of the target and of the base's MLPs, and takes one optimizer step of every layer on 512 tokens of the ring. Beside
it is a step of the end-to-end stage on one document of 512 tokens, as a mean over all cuts. In both 1 % of the features
are active. Revisions of the features and their polish at the end are not timed. Given are medians of ratios over runs
that take turns, with their ranges; "reading" is the share of the local step that the forward pass takes. Memory is that
of a process of its own, the most during two steps beside the pair, with the ring of 4,096 tokens. ``--record`` writes
the block "local_stage" of results.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

import torch
from large_pair import random_documents
from recorded import ratio_in_turns, record, timing_options
from resources import measured
from training_step import DENSITY, Size, all_cuts, made, our_step, seconds
from training_step import memory as memory_end_to_end

from tl_adapters.config import LocalConfig, TrainingConfig
from tl_adapters.data.batching import BatchOrder, TracesInMemory
from tl_adapters.data.traces import collate
from tl_adapters.local_stage.regression_data import MLPDifferences
from tl_adapters.local_stage.stage import LocalStage
from tl_adapters.models.paired_model import PairedModel

CASES = {"features_1024": Size(), "features_8192": Size(features=8192)}
"""The cases by name."""
RING, DOCUMENTS = 8, 60
"""Documents whose tokens the ring holds (as steps, no more than one `LocalStage.advance` takes), and those of an
epoch."""


def stage_of(pair: PairedModel, size: Size) -> LocalStage:
    """A streaming local stage whose ring is full, with `DENSITY` of the features active. Weights hardly move.

    Inputs are whitened by the first documents in the ring, to which later ones are not quite alike in a random model;
    biases are chosen on later ones, which fill the ring by then.
    """
    local = LocalConfig(
        steps=10**6, tokens_per_step=size.tokens, max_tokens=RING * size.tokens, streaming=True, lr=1e-6, revisions=(),
        polish=False,
    )  # fmt: skip
    training = TrainingConfig(n_features=size.features, stages=("local",), local=local, tokens_per_batch=size.tokens)
    order = BatchOrder(TracesInMemory(random_documents(pair, DOCUMENTS, size.tokens)), size.tokens, training.seed)
    stage = LocalStage(MLPDifferences(pair), order, training, local)
    stage.advance(RING)
    for run in stage.layers:
        adapter = run.layer.adapter
        with torch.no_grad():
            x, _ = run.layer.coordinates(run.buffer.x[run.index], run.buffer.d[run.index])
            pre = x @ adapter.W_enc
            adapter.b_enc.fill_(-float(pre.flatten().kthvalue(round((1 - DENSITY) * pre.numel())).values))
    return stage


def times(size: Size, repeats: int) -> dict[str, Any]:
    """Seconds of a step of each stage, and of the forward pass of a local step, in runs that take turns after one that
    is not counted; and the active features of the local stage."""
    pair, document = made(size)
    end_to_end, stage = our_step(pair, document), stage_of(pair, size)
    data, batch, cuts = MLPDifferences(pair), collate([document]), all_cuts(size)
    found: dict[str, list[float]] = {"local": [], "reading": [], "end_to_end": []}
    for run in range(repeats + 1):
        taken = {"end_to_end": seconds(end_to_end, cuts)}
        taken["local"] = seconds(lambda cut: stage.advance(1), cuts)
        taken["reading"] = seconds(lambda cut: list(data.read(batch)), cuts)
        for name in found if run else ():
            found[name].append(taken[name])
    return {**found, "l0": statistics.mean(stage.progress().l0)}


def memory(size: Size, stage: str) -> float:
    """Megabytes of two steps of a stage beside the pair, in this process."""
    if stage == "end_to_end":
        return memory_end_to_end(size, "ours")
    pair, _ = made(size)
    return measured(lambda: stage_of(pair, size).advance(2)).bytes / 1e6


def memory_of_process(case: str, stage: str, threads: int) -> float:
    """`memory` in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", case, stage, "--threads", str(threads)]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def block(case: str, repeats: int, threads: int) -> dict[str, Any]:
    """What is recorded of a case."""
    found = times(CASES[case], repeats)

    def ratio(above: str, below: str) -> dict[str, Any]:
        return ratio_in_turns(found[above], found[below])

    return {
        "over_end_to_end": ratio("local", "end_to_end"),
        "reading": ratio("reading", "local"),
        "l0": found["l0"],
        "mb": memory_of_process(case, "local", threads),
        "end_to_end_mb": memory_of_process(case, "end_to_end", threads),
        "seconds": statistics.median(found["local"]),
    }


def main() -> None:
    parser = timing_options(__doc__, "the block local_stage")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        case, stage = options.memory_of
        print(memory(CASES[case], stage))
        return
    found = {}
    for case in CASES:
        found[case] = block(case, options.repeats, options.threads)
        print(case, json.dumps(found[case]), flush=True)
    if options.record:
        record("local_stage", {"repeats": options.repeats, "threads": options.threads, "cases": found})


if __name__ == "__main__":
    main()
