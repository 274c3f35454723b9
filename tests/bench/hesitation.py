"""The README's hesitation table. ``python tests/bench/hesitation.py OUT [PAIR-SEED ...]``.

Pairs: ``sums`` (the built-in one), ``differences`` (another seed and kind of problem, by the recipe) and ``null`` (a
target that thinks and never hesitates, by the recipe). By default three seeds of each of the first two, one of the
null pair. What is in OUT already is not made again: pairs (forty minutes each on one core), adapters, studies.
"""

import argparse
import json
import logging
import random
from pathlib import Path

import torch

from tl_adapters import organism
from tl_adapters.adapter import AdapterSet
from tl_adapters.chat import encode_traces
from tl_adapters.circuit_stage import PROBLEMS, hesitation_stage
from tl_adapters.config import RunConfig, TrainingConfig
from tl_adapters.opening import BUILTIN_TRACES
from tl_adapters.organism import Kind, problems, traces
from tl_adapters.organism.recipe import Recipe, make_null_pair, make_pair
from tl_adapters.paired import PairedModel
from tl_adapters.results import read_results, write_results
from tl_adapters.subjects import builtin_subject
from tl_adapters.training import Trainer

DEFAULT = ["sums-0", "sums-1", "sums-2", "differences-0", "differences-1", "differences-2", "null-0"]
KINDS: dict[str, Kind] = {"sums": "sums", "differences": "differences", "null": "sums"}


def open_pair(out: Path, name: str) -> PairedModel:
    if name == "sums":
        return PairedModel.from_pretrained(organism.BASE, organism.TARGET)
    folder = out / f"pair-{name}"
    if not folder.is_dir():
        if name == "null":
            make_null_pair(organism.PAIR, folder)
        else:
            make_pair(Recipe(seed=1, kind="differences"), folder)
    return PairedModel.from_pretrained(folder / "base", folder / "target")


def training_pairs(name: str, seed: int) -> list[tuple[str, str]]:
    if name != "null":
        return organism.reasoning_pairs("train", BUILTIN_TRACES, seed, kind=KINDS[name])
    rng = random.Random(f"traces-train-{seed}")
    calm = [(p, traces.calm_document(p, rng)) for p in problems("train", BUILTIN_TRACES, seed)]
    return [(p.question, document.completion.removesuffix(traces.END)) for p, document in calm]


def study(out: Path, job: str) -> dict:
    name, _, seed = job.partition("-")
    folder = out / job
    if "hesitation" not in read_results(folder):
        pair = open_pair(out, name)
        if not (folder / "adapters").is_dir():
            encoded = encode_traces(training_pairs(name, int(seed)), pair.model.tokenizer)
            Trainer(pair, encoded, TrainingConfig(seed=int(seed)), folder, origin=RunConfig(), progress=False).run()
        pair.load_adapters(AdapterSet.from_pretrained(folder / "adapters"))
        write_results(folder, seeds=[int(seed)])
        hesitation_stage(pair, builtin_subject(*PROBLEMS, kind=KINDS[name], seed=int(seed)), folder)
    return read_results(folder)["hesitation"]


def table(found: dict[str, dict]) -> str:
    lines = []
    for name in dict.fromkeys(job.partition("-")[0] for job in found):
        blocks = [block for job, block in found.items() if job.startswith(f"{name}-")]
        asked = [c["name"] for c in blocks[0].get("criteria", [])]
        if not asked:
            n = [b["circuit"]["n"] for b in blocks]
            lines.append(f"\n{name}: features in the circuit {n}, moments {[b['moments'] for b in blocks]}")
            continue
        lines += [f"\n| {name}, {len(blocks)} seeds | " + "seed by seed | bar | reached |", "|---|---|---|---|"]
        for i, question in enumerate(asked):
            answers = [b["criteria"][i] for b in blocks]
            values = ", ".join(f"{a['value']:.3g}" for a in answers)
            lines.append(f"| {question} | {values} | {answers[0]['bar']} | {sum(a['reached'] for a in answers)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("jobs", nargs="*", default=DEFAULT)
    options = parser.parse_args()
    torch.set_num_threads(2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    found = {}
    for job in options.jobs:
        found[job] = study(options.out, job)
        print(job, json.dumps(found[job]["circuit"]), flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
