"""How many planted features does training recover? ``python benchmarks/planted.py OUT [--steps 300]``.

The planted test is run on the built-in base over widths, L1 weights and seeds, and the adapters of two seeds of the
built-in pair are matched. Every cell is a JSON file in OUT, and cells that exist are not run again. The tables of all
cells are printed.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from tl_adapters import organism
from tl_adapters.config import LossWeights, TrainingConfig
from tl_adapters.data.chat_format import encode_traces
from tl_adapters.data.traces import Trace
from tl_adapters.evaluation.feature_matching import MATCH_STATISTICS, Matching, Share, seed_agreement
from tl_adapters.evaluation.planted_features import PlantedSet, plant_features
from tl_adapters.evaluation.planted_recovery import planted_test
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.study.open_run import load_organism_pair
from tl_adapters.training.trainer import train
from tl_adapters.utils.files import write_text

WIDTHS, L1_WEIGHTS = (64, 256), (1e-3, 3e-3, 2e-2)
LONG_STEPS, HIGH_NMSE = 2_000, 100.0
"""Steps of the longest runs, and a weight of the NMSE (1 in the paper) with which every layer reproduces its own part
of the difference."""
CALIBRATION_DOCUMENTS, TRAINING_DOCUMENTS, EVALUATION_DOCUMENTS = 2_000, 12_000, 1_850
"""Numbers of documents of about 60 tokens: 120,000 tokens for calibration, 110,000 for evaluation."""
BEFORE_SEEDS = 4
"""Number of cells that are run before the agreement of seeds."""
DECADES = ("all", "1e-1", "1e-2", "1e-3", "1e-4")


def percent(share: Share) -> str:
    low, high = share.interval
    return f"{share.value:.0%} ({low:.0%}-{high:.0%})" if share.n else "-"


def share_of(record: dict) -> Share:
    """The share of a JSON record."""
    return Share(record["k"], record["n"])


class Cell(NamedTuple):
    width: int
    l1_weight: float
    steps: int
    seed: int = 0
    strength: float = 0.5
    nmse: float = 1.0

    @property
    def name(self) -> str:
        name = f"w{self.width}-l1_{self.l1_weight:g}-steps{self.steps}-strength{self.strength:g}-seed{self.seed}"
        return name if self.nmse == 1 else f"{name}-nmse{self.nmse:g}"


def cells(steps: int) -> list[Cell]:
    """The cells in the order in which they are run: the middle first, longer runs, the others, second seeds."""
    middle = [Cell(64, 1e-3, steps), Cell(256, 1e-3, steps), Cell(256, 3e-3, steps)]
    beyond = [Cell(64, 1e-3, steps, strength=2.0), Cell(64, 2e-2, 3 * steps), Cell(256, 2e-2, 3 * steps)]
    grid = [Cell(n, l1, steps) for l1 in L1_WEIGHTS for n in WIDTHS]
    heavy = [
        Cell(64, 1e-2, LONG_STEPS, nmse=HIGH_NMSE),
        *(Cell(n, 1e-2, steps, nmse=HIGH_NMSE) for n in WIDTHS),
    ]
    heavy += [Cell(64, 1e-3, steps, nmse=HIGH_NMSE), Cell(64, 1e-2, steps, seed=1, nmse=HIGH_NMSE)]
    return list(
        dict.fromkeys([*middle, Cell(64, 1e-3, LONG_STEPS), *heavy, *beyond, *grid, Cell(64, 1e-3, steps, seed=1)])
    )


def run_cell(out: Path, cell: Cell, plant: PlantedSet, traces: list[Trace], held_out: list[Trace]) -> None:
    weights = LossWeights(nmse=cell.nmse)
    config = TrainingConfig(
        n_features=cell.width, l1_weight=cell.l1_weight, steps=cell.steps, seed=cell.seed, loss_weights=weights
    )
    report = planted_test(organism.BUILTIN_BASE, traces, held_out, config, plant=plant, progress=False)
    write_text(out, json.dumps({"cell": cell._asdict(), **report.to_dict()}))


def run_agreement(out: Path, steps: int, traces: list[Trace], held_out: list[Trace]) -> None:
    """Match the adapters of seeds 0 and 1, with the default options except for the number of steps."""
    pair = load_organism_pair()
    both = [train(pair, traces, TrainingConfig(steps=steps, seed=seed), progress=False) for seed in (0, 1)]
    matching = seed_agreement(pair, *both, held_out)
    write_text(out, json.dumps({"steps": steps, **agreement_record(matching)}))


def agreement_record(matching: Matching) -> dict:
    return {
        "tokens": matching.tokens,
        **{side: {name: s._asdict() for name, s in matching.shares(side).items()} for side in ("a", "b")},
        "quantiles": matching.quantiles(),
        "matches": [asdict(m) for m in matching.matches],
    }


def print_tables(folder: Path) -> None:
    head = [*Cell._fields, "alive", "precision", "recall", *(f"recall {d}" for d in DECADES[1:]), "texts", "directions"]
    head += ["KL(r) / KL(h)", "L0"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for path in sorted(folder.glob("w*.json")):
        record = json.loads(path.read_text())
        recall = record["recall"]
        kl, l0 = record["kl_of_hybrid"], [figure["value"] for figure in record["l0_all_tokens"]]
        cells = [*Cell(**record["cell"]), record["alive"]]
        cells += [
            percent(share_of(record["precision"])),
            *(percent(share_of(recall[d])) if d in recall else "-" for d in DECADES),
        ]
        cells += [percent(share_of(record["recall_by_kind"][kind])) for kind in ("text", "direction")]
        cells += [f"{kl['value']:.1%} ({kl['low']:.1%}-{kl['high']:.1%})", f"{sum(l0) / len(l0):.2f}"]
        print("| " + " | ".join(map(str, cells)) + " |")
    for path in sorted(folder.glob("seeds-*.json")):
        record = json.loads(path.read_text())
        print(f"\nSeeds 0 and 1 of the built-in pair, {record['steps']} steps, {record['tokens']:,} tokens\n")
        print("| firing rate | of seed 0 | n | of seed 1 | n |\n|---|---|---|---|---|")
        for name in dict.fromkeys([*record["a"], *record["b"]]):
            a, b = (share_of(record[side].get(name, {"k": 0, "n": 0})) for side in ("a", "b"))
            print(f"| {name} | {percent(a)} | {a.n} | {percent(b)} | {b.n} |")
        print("\n| over the matches | 10 % | 25 % | median | 75 % | 90 % |\n|---|---|---|---|---|---|")
        for figure in MATCH_STATISTICS:
            print(f"| {figure} | " + " | ".join(f"{v:.2f}" for v in record["quantiles"][figure]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    base = PairedModel.from_pretrained(organism.BUILTIN_BASE, organism.BUILTIN_BASE)

    def text(split: str, n: int, seed: int) -> list[Trace]:
        return encode_traces(organism.reasoning_pairs(split, n, seed), base.model.tokenizer, base.model.cfg.n_ctx)  # type: ignore[arg-type]

    traces, held_out = text("train", TRAINING_DOCUMENTS, 0), text("report", EVALUATION_DOCUMENTS, 0)
    grid = cells(args.steps)
    plants: dict[float, PlantedSet] = {}
    seeds = args.out / f"seeds-{args.steps}.json"
    for i, cell in enumerate(grid):
        if i == BEFORE_SEEDS and not seeds.is_file():
            run_agreement(seeds, args.steps, traces, held_out)
            print(seeds.name, "done", file=sys.stderr, flush=True)
        path = args.out / f"{cell.name}.json"
        if not path.is_file():
            if cell.strength not in plants:
                plants[cell.strength] = plant_features(base, traces[:CALIBRATION_DOCUMENTS], strength=cell.strength)
            run_cell(path, cell, plants[cell.strength], traces, held_out)
        print(path.name, "done", file=sys.stderr, flush=True)
    print_tables(args.out)


if __name__ == "__main__":
    main()
