"""How faithful are adapters of the model organism, and do two seeds agree? ``python benchmarks/organism.py OUT``.

For every recipe and width, adapters of the built-in pair are trained with two seeds, each of which has its own text and
its own start. KL and L0 are measured on the target's own answers to held-out problems; the agreement of the seeds, as
single features and as subspaces, on held-out text, beside its chance level. A run is a folder or file in OUT, and runs
that exist are not made again. ``--record`` writes the first recipe at its first width, and the table, to results.json.
"""

import argparse
import json
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from plants.recipes import (
    FIRST_RELEASE,
    Options,
    Recipe,
    end_to_end,
    local,
    local_options,
    local_then_end_to_end,
    timed,
)
from recorded import commit, machine, read_cell, record, value_and_range

from tl_adapters import organism
from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.config import LocalConfig
from tl_adapters.data.chat_format import encode_traces
from tl_adapters.data.traces import Trace
from tl_adapters.evaluation.agreement import measure_agreement
from tl_adapters.evaluation.faithfulness import measure_faithfulness
from tl_adapters.generation.responses import respond, traces_of
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.study.open_run import load_organism_pair
from tl_adapters.utils.files import write_text

RECIPES: dict[str, Recipe] = {
    "local": local,
    "local_then_end_to_end": local_then_end_to_end,
    "end_to_end": partial(end_to_end, l1_weight=FIRST_RELEASE.l1_weight),
}
"""The recipes, the one whose figures stand for the rest first."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of all runs")
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 64, 512], help="features per layer")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs=2, default=[0, 1], help="two seeds of text and start")
    parser.add_argument("--documents", type=int, default=20_000, help="training documents, of about 60 tokens")
    parser.add_argument("--held-out", type=int, default=1_850, help="documents on which agreement is measured")
    parser.add_argument("--problems", type=int, default=400, help="problems on which KL is measured")
    parser.add_argument("--split", choices=organism.SPLITS, default="report", help="of the held-out problems")
    parser.add_argument("--threads", type=int, default=1, help="of torch, and layers that are trained side by side")
    parser.add_argument("--steps", type=int, help="steps of every recipe, for a trial")
    parser.add_argument("--local", nargs="+", default=[], metavar="OPTION=VALUE", help="options of the local stage")
    parser.add_argument("--made", action="store_true", help="only runs that are in OUT; no others are made")
    parser.add_argument("--record", action="store_true", help="write the table to benchmarks/results.json")
    return parser.parse_args()


def text(pair: PairedModel, split: organism.Split, n: int, seed: int) -> list[Trace]:
    return encode_traces(organism.reasoning_pairs(split, n, seed), pair.model.tokenizer, pair.model.cfg.n_ctx)


class Bench:
    """The pair, and the text on which adapters are measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.pair = args, load_organism_pair()
        self.held_out = text(self.pair, args.split, args.held_out, 0)
        self._answers: list[Trace] | None = None

    @property
    def answers(self) -> list[Trace]:
        """The target's own answers to held-out problems."""
        if self._answers is None:
            problems = organism.problems(self.args.split, self.args.problems)
            self._answers = traces_of(respond(self.pair.model, problems), self.pair.model.tokenizer)
        return self._answers

    def trained(self, recipe: str, width: int, seed: int) -> tuple[AdapterSet, dict[str, Any]]:
        """The adapters of a run and their measurements; they are trained where the run does not exist."""
        name = f"{recipe}-w{width}-seed{seed}"
        folder, file = self.args.out / name, self.args.out / f"{name}.json"
        if (cell := read_cell(file)) is not None:
            return AdapterSet.from_pretrained(folder), cell
        traces = text(self.pair, "train", self.args.documents, seed)
        with timed() as seconds:
            options = Options(
                width, seed, local_options(LocalConfig(), self.args.local, self.args.steps), self.args.steps
            )
            adapters = RECIPES[recipe](self.pair, traces, options)
        sums = measure_faithfulness(self.pair, self.answers)
        cell = {
            "kl_share": float(sums.kl["replacement"].sum() / sums.kl["hybrid"].sum()),
            "l0": float(sums.l0.mean()),
            "seconds": vars(seconds),
            "commit": commit(),
            "machine": machine(),
        }
        if not folder.is_dir():
            adapters.save_pretrained(folder)
        write_text(file, json.dumps(cell, indent=1) + "\n")
        print(name, "done", file=sys.stderr, flush=True)
        return adapters, cell

    def made(self, recipe: str, width: int) -> bool:
        """Whether the runs of both seeds exist."""
        return all((self.args.out / f"{recipe}-w{width}-seed{seed}.json").is_file() for seed in self.args.seeds)

    def agreement(self, recipe: str, width: int) -> dict[str, Any]:
        """The figures of one recipe and width, over both seeds."""
        runs = [self.trained(recipe, width, seed) for seed in self.args.seeds]
        file = self.args.out / f"{recipe}-w{width}-agreement-{'-'.join(map(str, self.args.seeds))}.json"
        if (found := read_cell(file)) is None:
            a, b = (adapters for adapters, _ in runs)
            agreed = [measure_agreement(self.pair, *sets, self.held_out) for sets in ((a, b), (b, a))]
            alive = [len(of_seed.matching.a) for of_seed in agreed]
            found = {"alive": alive, "tokens": agreed[0].matching.tokens, "seeds": [x.to_dict() for x in agreed]}
            write_text(file, json.dumps(found, indent=1) + "\n")
        return summary([cell for _, cell in runs], found)


def summary(cells: list[dict[str, Any]], agreement: dict[str, Any]) -> dict[str, Any]:
    """Figures over both seeds, with their range."""

    def mean(values: list[float]) -> dict[str, Any]:
        return value_and_range(sum(values) / len(values), values)

    def share(name: str, *path: str) -> dict[str, Any]:
        values = []
        for of_seed in agreement["seeds"]:
            figure = of_seed[name]
            for key in path:
                figure = figure[key]
            values.append(figure if isinstance(figure, float) else figure["k"] / max(1, figure["n"]))
        return mean(values)

    rates = agreement["seeds"][0]["observed"]["features"]
    return {
        "kl_share": mean([cell["kl_share"] for cell in cells]),
        "l0": mean([cell["l0"] for cell in cells]),
        "alive": mean(agreement["alive"]),
        "seed_agreement": {
            **share("observed", "features", "all"),
            "chance": share("chance", "features", "all")["value"],
            "by_rate": {rate: rates[rate] for rate in rates if rate != "all"},
            "features_in_span": share("observed", "features_in_span"),
            "features_in_span_chance": share("chance", "features_in_span")["value"],
            "energy_in_span": share("observed", "energy_in_span"),
            "energy_in_span_chance": share("chance", "energy_in_span")["value"],
        },
        "train_seconds": mean([cell["seconds"]["wall"] for cell in cells]),
        "train_processor_seconds": mean([cell["seconds"]["cpu"] for cell in cells]),
        "commits": sorted({cell["commit"] for cell in cells}),
    }


def rows(found: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """A Markdown table, with the range over the two seeds in brackets."""
    head = ["recipe", "width", "KL of the hybrid's", "L0", "alive", "seeds agree", "by chance", "in the span"]
    head += ["by chance", "energy in the span", "by chance", "seconds", "processor seconds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]

    def shown(figure: dict[str, Any], form: str) -> str:
        low, high = (form.format(value) for value in figure["range"])
        return form.format(figure["value"]) + (f" ({low} to {high})" if low != high else "")

    for recipe, by_width in found.items():
        for width, s in by_width.items():
            agree = s["seed_agreement"]
            row = [recipe, width, shown(s["kl_share"], "{:.2%}"), shown(s["l0"], "{:.2f}"), shown(s["alive"], "{:.0f}")]
            row += [shown(agree, "{:.0%}"), f"{agree['chance']:.0%}"]
            for name in ("features_in_span", "energy_in_span"):
                row += [shown(agree[name], "{:.0%}"), f"{agree[f'{name}_chance']:.0%}"]
            row += [shown(s[name], "{:.0f}") for name in ("train_seconds", "train_processor_seconds")]
            lines.append("| " + " | ".join(row) + " |")
    return lines


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for recipe, width in product(args.recipes, args.widths):
        if not args.made or bench.made(recipe, width):
            found.setdefault(recipe, {})[str(width)] = bench.agreement(recipe, width)
    print("\n".join(rows(found)))
    if args.record:
        commits = [c for by_width in found.values() for s in by_width.values() for c in s.pop("commits")]
        names = ("seeds", "documents", "held_out", "problems", "split", "threads", "steps", "local")
        about = {"recipe": args.recipes[0], "width": args.widths[0], "settings": {n: getattr(args, n) for n in names}}
        first = found[args.recipes[0]][str(args.widths[0])]
        record("organism", {**first, **about, "recipes": found}, commits)


if __name__ == "__main__":
    main()
