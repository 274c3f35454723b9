"""The table of the demo over several seeds, mean and worst: ``python benchmarks/seeds.py runs/seeds 0 1 2``.

``--config`` says how adapters are trained. A seed whose folder exists is not run again.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tl_adapters.config import RunConfig
from tl_adapters.study.demo import demo
from tl_adapters.study.run_size import StudyScale


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def farthest_from_one(values: list[float]) -> float:
    return max(values, key=lambda v: abs(v - 1))


def worst_partial(faithfulness: dict) -> float:
    partial = faithfulness["partial_of_full"]
    figures = (*partial["first"][:-1], *partial["last"][1:], *partial["only"])
    return max(figure["value"] for figure in figures)


def recovered(results: dict, baseline: str) -> float:
    return results["behaviour"]["recovered"][baseline]["value"]


def against_target(results: dict, key: str) -> float:
    return results["behaviour"]["replacement"][key] / results["behaviour"]["target"][key]


ROWS: list[tuple[str, str, Callable[[dict], float], Callable[[list[float]], float]]] = [
    ("KL(replacement) / KL(hybrid)", "{:.2%}", lambda r: r["faithfulness"]["kl_of_hybrid"]["value"], max),
    ("worst partial KL / full KL", "{:.3f}", lambda r: worst_partial(r["faithfulness"]), max),
    ("accuracy recovered, against the hybrid", "{:.1%}", lambda r: recovered(r, "hybrid"), min),
    ("accuracy recovered, against the base", "{:.1%}", lambda r: recovered(r, "base"), min),
    ("length, replacement / target", "{:.3f}", lambda r: against_target(r, "length"), farthest_from_one),
    ("hesitation, replacement / target", "{:.3f}", lambda r: against_target(r, "hesitation_per_1k"), farthest_from_one),
    ("mean L0 per token and layer", "{:.2f}", lambda r: mean([f["value"] for f in r["faithfulness"]["l0"]]), max),
    ("largest L0 of a layer", "{:.2f}", lambda r: max(f["value"] for f in r["faithfulness"]["l0"]), max),
    ("same likeliest token", "{:.2%}", lambda r: r["faithfulness"]["top1_agreement"]["value"], min),
    ("alive features", "{:.0f}", lambda r: r["features"]["alive"], min),
    ("training, seconds", "{:.0f}", lambda r: r["train"]["seconds"], max),
    ("evaluation, seconds", "{:.0f}", lambda r: sum(r["seconds"].values()) - r["seconds"]["train"], max),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of all runs")
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--config", default="builtin", help="configuration of the training, by file or name")
    options = parser.parse_args()
    training, runs = RunConfig.load(options.config).training, []
    for seed in options.seeds:
        out = options.out / f"seed-{seed}"
        if not (out / "report.html").is_file():
            demo(out, StudyScale(training=replace(training, seed=seed)))
        runs.append(json.loads((out / "results.json").read_text()))
    print(f"| figure | mean of {len(runs)} seeds | worst |\n|---|---|---|")
    for name, form, read, worst in ROWS:
        values = [read(run) for run in runs]
        print(f"| {name} | {form.format(mean(values))} | {form.format(worst(values))} |")


if __name__ == "__main__":
    main()
