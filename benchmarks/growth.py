"""How the time of a training step grows: ``python benchmarks/growth.py``, two to fifteen minutes, by the machine.

A step is that of `training_step`, at the middle cut. Features, tokens of the document, layers and vocabulary grow in
turn, while all else stays at the standard case: 1,024 features, 512 tokens, 6 layers and a vocabulary of 4,096. Beside
every step is that of `hf_objective`. Within a series all steps take turns; given are medians over the runs, with their
ranges, of the time over that of our step at the standard case in the same run. "features_x16" is the time with 8,192
features over that with 512. ``--record`` writes the block "growth" of results.json.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from recorded import ratio_in_turns, record, timing_options, value_and_range
from training_step import Size, Step, made, our_step, seconds, their_step

SERIES: dict[str, tuple[int, ...]] = {
    "features": (512, 1024, 2048, 4096, 8192),
    "tokens": (128, 256, 512, 1024, 2048),
    "layers": (2, 4, 6, 12),
    "vocab": (4096, 8192, 16384, 32768),
}
"""What grows, as `Size` names it, and its values, among which is that of the standard case."""
STANDARD = Size()
"""What all else stays at."""
SIDES = ("ours", "reference")
Runs = dict[int, dict[str, list[float]]]
"""Value and side -> seconds of a step in each run."""


def steps_of(size: Size) -> dict[str, Step]:
    """A step of each side, on one pair."""
    pair, document = made(size)
    return dict(zip(SIDES, (our_step(pair, document), their_step(size, pair, document)), strict=True))


def timed(quantity: str, values: Sequence[int], repeats: int) -> Runs:
    """Seconds of the steps of a series in runs that take turns, after one that is not counted."""
    sizes = {value: replace(STANDARD, **{quantity: value}) for value in values}
    steps = {value: steps_of(size) for value, size in sizes.items()}
    found: Runs = {value: {side: [] for side in SIDES} for value in values}
    for run in range(repeats + 1):
        for value, size in sizes.items():
            for side, step in steps[value].items():
                taken = seconds(step, [size.layers // 2])
                if run:
                    found[value][side].append(taken)
    return found


def relative(runs: Runs, standard: int) -> dict[str, dict[str, Any]]:
    """Value and side -> the time over that of our step at the standard value."""
    return {
        str(value): {side: ratio_in_turns(taken, runs[standard]["ours"]) for side, taken in sides.items()}
        for value, sides in runs.items()
    }


def block(runs: dict[str, Runs]) -> dict[str, Any]:
    """What is recorded of the runs of every series."""
    features = runs["features"]
    standard = [taken for name, of in runs.items() for taken in of[getattr(STANDARD, name)]["ours"]]
    return {
        "features_x16": ratio_in_turns(features[8192]["ours"], features[512]["ours"]),
        "series": {name: relative(of, getattr(STANDARD, name)) for name, of in runs.items()},
        "seconds": value_and_range(statistics.median(standard), standard),
    }


def main() -> None:
    options = timing_options(__doc__, "the block growth").parse_args()
    torch.set_num_threads(options.threads)
    runs: dict[str, Runs] = {}
    for name, values in SERIES.items():
        runs[name] = timed(name, values, options.repeats)
        print(name, json.dumps(relative(runs[name], getattr(STANDARD, name))), flush=True)
    found = block(runs)
    print("8,192 over 512 features", json.dumps(found["features_x16"]))
    if options.record:
        record("growth", {"repeats": options.repeats, "threads": options.threads, **found})


if __name__ == "__main__":
    main()
