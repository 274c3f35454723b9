"""What do adapters find of a known difference? ``python benchmarks/planted.py OUT``.

Features are planted in the built-in base, in several families (`plants.families`), and every recipe
(`plants.recipes`) trains adapters on the pair. A run is a file in OUT, and runs that exist are not made again. The
table of all runs in OUT is printed, and ``--record`` writes its rows to results.json; other rows there stay.

By default all recipes are compared on the family "discriminants", and the recipe of ``--best`` is run on every other
family. Options of recipes were chosen on plants 0 and 1, so what is reported comes from plants 2 and above.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from plants.families import FAMILIES
from plants.measurement import firings, measure, representable
from plants.plant import Ground, Plant
from plants.recipes import EARLIER, FIRST_RELEASE, RECIPES, SEEDLESS, SPARSE, Options, local_options, timed
from recorded import commit, machine, read_cell, record, recorded, value_and_range
from transformers import AutoModelForCausalLM, AutoTokenizer

from tl_adapters import organism
from tl_adapters.data.chat_format import encode_traces
from tl_adapters.data.traces import Trace
from tl_adapters.study.open_run import load_organism_pair
from tl_adapters.training.trainer import train
from tl_adapters.utils.files import write_text

MAIN_FAMILY = "discriminants"
DECADES = ("1e-1", "1e-2", "1e-3", "1e-4")
REFERENCE = "first-release.json"
"""The time of the first release's default training on the built-in pair, in which times are given."""


class Run(NamedTuple):
    """One recipe, trained with one seed on one plant of a family."""

    family: str
    plant: int
    recipe: str
    seed: int

    @property
    def file(self) -> str:
        return f"{self.family}-plant{self.plant}-{self.recipe}-seed{self.seed}.json"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of all runs")
    parser.add_argument("--plants", type=int, nargs="+", default=[2, 3, 4], help="seeds of the planted features")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds of training")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--recipes", nargs="+", choices=[*RECIPES, *EARLIER], default=list(RECIPES))
    parser.add_argument("--best", choices=[*RECIPES, *EARLIER], default="local", help="run on every family")
    parser.add_argument("--all", action="store_true", help="every recipe on every family")
    parser.add_argument("--earlier", action="store_true", help="the first release's recipes of the README instead")
    parser.add_argument("--features", type=int, default=64, help="features per layer")
    parser.add_argument("--steps", type=int, help="steps of every recipe, for a trial")
    parser.add_argument("--local", nargs="+", default=[], metavar="OPTION=VALUE", help="options of the local stage")
    parser.add_argument("--rates", type=float, nargs="+", help="firing rates of planted features, for a trial")
    parser.add_argument("--per-layer", type=int, default=20, help="planted features per layer")
    parser.add_argument("--documents", type=int, default=12_000, help="training documents, of about 60 tokens")
    parser.add_argument("--calibration", type=int, default=2_000, help="documents on which features are planted")
    parser.add_argument("--held-out", type=int, default=1_850, help="evaluation documents")
    parser.add_argument("--no-reference", action="store_true", help="do not time the first release's training")
    parser.add_argument("--record", action="store_true", help="write the table to benchmarks/results.json")
    args = parser.parse_args()
    if args.earlier and args.record:
        parser.error("--earlier is no part of results.json; leave out --record")
    return args


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options that all runs in a folder share."""
    names = ("features", "steps", "local", "rates", "per_layer", "documents", "calibration", "held_out")
    return {name: getattr(args, name) for name in names}


def runs(args: argparse.Namespace) -> list[Run]:
    """The runs, plant by plant, so that a plant is made once for all of them."""
    recipes, families = (list(EARLIER), [MAIN_FAMILY]) if args.earlier else (args.recipes, args.families)
    return [
        Run(family, plant, recipe, seed)
        for plant in args.plants
        for family in families
        for recipe in (recipes if args.all or family == MAIN_FAMILY else [args.best])
        for seed in (args.seeds[:1] if recipe in SEEDLESS else args.seeds)
    ]


class Bench:
    """Text and models of all runs, and the latest plant."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        tokenizer = AutoTokenizer.from_pretrained(organism.BASE)
        base, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (organism.BASE, organism.TARGET))

        def text(split: organism.Split, n: int) -> list[Trace]:
            return encode_traces(organism.reasoning_pairs(split, n, 0), tokenizer, base.config.max_position_embeddings)

        self.traces, self.held_out = text("train", args.documents), text("report", args.held_out)
        rates = {} if args.rates is None else {"rates": tuple(args.rates)}
        calibration = self.traces[: args.calibration]
        self.ground = Ground(base.eval(), calibration, other.eval(), tokenizer, per_layer=args.per_layer, **rates)
        self._latest: tuple[tuple[str, int], Plant, dict[str, Any]] | None = None

    def plant(self, family: str, seed: int) -> tuple[Plant, dict[str, Any]]:
        """A plant, and what is the same for all recipes: firings in the training text, and what can be represented."""
        if self._latest is None or self._latest[0] != (family, seed):
            plant = FAMILIES[family](self.ground, seed)
            shared = {
                "firings": firings(plant, self.traces),
                "representable": representable(plant, self.traces, self.held_out),
            }
            self._latest = ((family, seed), plant, shared)
        return self._latest[1:]

    def run(self, run: Run) -> dict[str, Any]:
        """Train and measure."""
        plant, shared = self.plant(run.family, run.plant)
        local = local_options(SPARSE, self.args.local, self.args.steps)
        options = Options(self.args.features, run.seed, local, self.args.steps)
        with timed() as seconds:
            adapters = {**RECIPES, **EARLIER}[run.recipe](plant.pair, self.traces, options)
        found = measure(plant, adapters, self.held_out, shared["firings"])
        about = {"representable": shared["representable"], "planted": plant.about}
        return {**found, **about, "seconds": vars(seconds), "training_tokens": sum(len(t.tokens) for t in self.traces)}


def time_first_release(args: argparse.Namespace) -> dict[str, Any]:
    """The time of the first release's default training on the built-in pair."""
    pair = load_organism_pair()
    pairs = organism.reasoning_pairs("train", args.documents, 0)
    traces = encode_traces(pairs, pair.model.tokenizer, pair.model.cfg.n_ctx)
    options = Options(FIRST_RELEASE.n_features, steps=args.steps)
    with timed() as seconds:
        train(pair, traces, options.end_to_end(), progress=False)
    return {"seconds": vars(seconds)}


def make_runs(args: argparse.Namespace) -> None:
    """Make the runs that are not in the folder yet."""
    shared, bench = settings(args), None
    for name, run in [(REFERENCE, None), *((run.file, run) for run in runs(args))]:
        path = args.out / name
        if run is None and args.no_reference:
            continue
        if (cell := read_cell(path)) is not None:
            if cell["settings"] != shared:
                raise SystemExit(f"{path} was made with {cell['settings']}, not {shared}; give another folder.")
            continue
        if run is None:
            measured = time_first_release(args)
        else:
            bench = bench or Bench(args)
            measured = {**run._asdict(), **bench.run(run)}
        about = {"settings": shared, "commit": commit(), "machine": machine()}
        if reference := read_cell(args.out / REFERENCE):
            about["first_release_seconds"] = reference["seconds"]  # of the day on which the run was made
        write_text(path, json.dumps({**measured, **about}, indent=1) + "\n")
        print(name, "done", file=sys.stderr, flush=True)


# -- tables -----------------------------------------------------------------------------------------------------------


def cells(out: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """All runs in a folder by family and recipe."""
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(out.glob("*-plant*-seed*.json")):
        cell = json.loads(path.read_text())
        grouped.setdefault((cell["family"], cell["recipe"]), []).append(cell)
    order = [*FAMILIES, *RECIPES, *EARLIER]
    return dict(sorted(grouped.items(), key=lambda item: [order.index(name) for name in item[0]]))


def pooled(shares: list[dict[str, Any]]) -> dict[str, Any] | None:
    """A share over all runs, and its range; None where there is nothing to find."""
    shares = [share for share in shares if share["n"]]
    if not shares:
        return None
    k, n = (sum(share[key] for share in shares) for key in ("k", "n"))
    figure = {**value_and_range(k / n, [share["k"] / share["n"] for share in shares]), "k": k, "n": n}
    for name in ("firings_training", "firings_held_out"):
        if name in shares[0]:
            figure[name] = [min(share[name][0] for share in shares), max(share[name][1] for share in shares)]
    return figure


def mean(values: list[float]) -> dict[str, Any]:
    return value_and_range(sum(values) / len(values), values)


def summary(group: list[dict[str, Any]], reference: dict[str, Any] | None) -> dict[str, Any]:
    """The figures of one recipe on one family, over its plants and seeds."""
    decades = {name: pooled([c["recall"].get(name, {"k": 0, "n": 0}) for c in group]) for name in ("all", *DECADES)}
    figures: dict[str, Any] = {
        "recall": {name: figure for name, figure in decades.items() if figure is not None},
        "precision": pooled([c["precision"] for c in group]),
        "kl_left": mean([c["kl_left"]["value"] for c in group]),
        "l0": mean([c["l0"] for c in group]),
        "true_l0": mean([c["true_l0"] for c in group]),
        "alive": mean([c["alive"] for c in group]),
        "representable": pooled([c["representable"] for c in group if c["representable"]]),
    }
    if reference is not None:
        for clock, name in (("wall", "seconds"), ("cpu", "processor_seconds")):
            of_the_day = [c.get("first_release_seconds") or reference["seconds"] for c in group]
            figures[name] = mean([c["seconds"][clock] / r[clock] for c, r in zip(group, of_the_day, strict=True)])
    return {**figures, "plants": sorted({c["plant"] for c in group}), "seeds": sorted({c["seed"] for c in group})}


def summaries(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    reference = read_cell(out / REFERENCE)
    return {key: summary(group, reference) for key, group in cells(out).items()}


def shown(figure: dict[str, Any] | None, form: str = "{:.0%}") -> str:
    if figure is None:
        return "-"
    low, high = (form.format(value) for value in figure["range"])
    return form.format(figure["value"]) + (f" ({low} to {high})" if low != high else "")


def rows(found: dict[tuple[str, str], dict[str, Any]]) -> Iterator[str]:
    """A Markdown table: over all plants and seeds, and in brackets the range over them."""
    head = ["family", "recipe", "plants x seeds", *DECADES, "precision", "KL left", "L0", "true L0", "alive"]
    head += ["representable", "seconds", "processor seconds"]
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    for (family, recipe), s in found.items():
        row = [family, recipe, f"{len(s['plants'])} x {len(s['seeds'])}"]
        row += [shown(s["recall"].get(decade)) for decade in DECADES]
        row += [shown(s["precision"]), shown(s["kl_left"], "{:.1%}"), shown(s["l0"], "{:.2f}")]
        row += [shown(s["true_l0"], "{:.2f}"), shown(s["alive"], "{:.0f}"), shown(s["representable"])]
        row += [shown(s.get(name), "{:.2f}") for name in ("seconds", "processor_seconds")]
        yield "| " + " | ".join(row) + " |"


def block(out: Path, best: str, earlier: dict[str, Any]) -> dict[str, Any]:
    """The block "planted" of results.json: rows of the folder's runs, and ``earlier`` rows of which it holds none."""
    found, some = summaries(out), next(iter(cells(out).values()))[0]
    if earlier and (earlier["settings"], earlier["recipe"]) != (some["settings"], best):
        raise SystemExit(
            f"results.json was measured with {earlier['recipe']} and {earlier['settings']}; remove it first."
        )
    families = {family: s for (family, recipe), s in found.items() if recipe == best}
    recipes = {recipe: s for (family, recipe), s in found.items() if family == MAIN_FAMILY}
    rows = {
        "families": _in_order({**earlier.get("families", {}), **families}, FAMILIES),
        "recipes": _in_order({**earlier.get("recipes", {}), **recipes}, {**RECIPES, **EARLIER}),
    }
    main = rows["recipes"][best]
    return {
        "recipe": best,
        **{name: main[name] for name in ("recall", "precision", "kl_left", "l0", "true_l0", "plants", "seeds")},
        **{name: main[name] for name in ("seconds", "processor_seconds") if name in main},
        **rows,
        "settings": some["settings"],
        "tokens": {name: some[f"{name}_tokens"] for name in ("training", "held_out")},
    }


def _in_order(found: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: found[name] for name in names if name in found}


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    make_runs(args)
    print("\n".join(rows(summaries(args.out))))
    if args.record:
        earlier = recorded("planted") or {}
        commits = [cell["commit"] for group in cells(args.out).values() for cell in group]
        record("planted", block(args.out, args.best, earlier), [*commits, *earlier.get("commits", [])])


if __name__ == "__main__":
    main()
