"""The hesitation circuit, over pairs and seeds. ``python benchmarks/hesitation.py OUT [PAIR-SEED ...]``.

Pairs: ``sums`` (the built-in one), ``differences`` (another seed and kind of problem, by the recipe) and ``null`` (a
target that thinks and never hesitates, by the recipe). By default three seeds of each of the first two, one of the
null pair. What is in OUT already is not made again: pairs (forty minutes each on one core), adapters, studies. So any
run of one of these pairs is studied that is in OUT under such a name; ``--config`` and ``--set`` say how new ones are
trained. ``--record`` writes what docs/circuits.md shows of these pairs to results.json beside this file, and the
figures of ``sums`` beside the page.
"""

import argparse
import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from recorded import FOLDER, commit, record, recorded, standalone, value_and_range

from tl_adapters import organism
from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.circuits.conditions import TUNED_BASELINES
from tl_adapters.circuits.dose_curves import INTERVENTIONS
from tl_adapters.circuits.results_block import upgraded_block
from tl_adapters.circuits.subject import builtin_subject
from tl_adapters.config import RunConfig, parse_options, with_options
from tl_adapters.data.chat_format import encode_traces
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.organism import Kind, problems, traces
from tl_adapters.organism.recipe import Recipe, make_null_pair, make_pair
from tl_adapters.pages.dose_curve_plots import dose_curve_plots
from tl_adapters.study.hesitation import ORGANISM_PROBLEM_COUNTS, hesitation_stage
from tl_adapters.study.open_run import ORGANISM_TRACES, load_organism_pair
from tl_adapters.study.train import train_stage
from tl_adapters.training.trainer import Trainer
from tl_adapters.utils.files import write_text
from tl_adapters.utils.results import read_results

DEFAULT = ["sums-0", "sums-1", "sums-2", "differences-0", "differences-1", "differences-2", "null-0"]
INSERTED = ("hybrid", "hybrid + circuit", "hybrid + circuit_at_strength", "hybrid + random")
KEPT = "P(word) at the target's onsets, hybrid + circuit over target"
FIGURES = ("behavior_left.svg", "errors_corrected.svg")
"""The plots that docs/circuits.md shows."""
KINDS: dict[str, Kind] = {"sums": "sums", "differences": "differences", "null": "sums"}


def open_pair(out: Path, name: str) -> PairedModel:
    if name == "sums":
        return load_organism_pair()
    folder = out / f"pair-{name}"
    if not folder.is_dir():
        if name == "null":
            make_null_pair(organism.PAIR, folder)
        else:
            make_pair(Recipe(seed=1, kind="differences"), folder)
    return PairedModel.from_pretrained(folder / "base", folder / "target")


def training_pairs(name: str, seed: int) -> list[tuple[str, str]]:
    if name != "null":
        return organism.reasoning_pairs("train", ORGANISM_TRACES, seed, kind=KINDS[name])
    rng = random.Random(f"traces-train-{seed}")
    calm = [(p, traces.calm_document(p, rng)) for p in problems("train", ORGANISM_TRACES, seed)]
    return [(p.question, document.completion.removesuffix(traces.END)) for p, document in calm]


def study(out: Path, job: str, config: RunConfig, options: dict[str, Any]) -> dict:
    name, _, seed = job.partition("-")
    folder = out / job
    if "hesitation" not in read_results(folder):
        pair = open_pair(out, name)
        if not (folder / "adapters").is_dir():
            encoded = encode_traces(training_pairs(name, int(seed)), pair.model.tokenizer)
            config = config if name == "sums" else replace(config, base=pair.base_id, target=pair.target_id)
            config = with_options(config, {**options, "training.seed": int(seed)})
            train_stage(Trainer(pair, encoded, config.training, folder, origin=config, progress=False), folder)
        pair.load_adapters(AdapterSet.from_pretrained(folder / "adapters"))
        hesitation_stage(pair, builtin_subject(*ORGANISM_PROBLEM_COUNTS, kind=KINDS[name], seed=int(seed)), folder)
    return upgraded_block(read_results(folder)["hesitation"])


def rows(block: dict) -> dict[str, str]:
    """What the README says of one study."""
    size, need, suffices, said = (block[k] for k in ("circuit", "necessity", "sufficiency", "probabilities"))
    without, none, asked = need["circuit"], need["none"], {c["name"]: c["value"] for c in block["criteria"]}

    def percent(*shares: float | dict) -> str:
        return ", ".join(f"{100 * (x['value'] if isinstance(x, dict) else x):.1f}" for x in shares)

    def of(arms: dict, key: str, *names: str) -> list:
        return [arms[name][key] if key else arms[name] for name in names]

    roles = ("output", "template", "continuation", "other")
    elsewhere = asked["P(word) at all other places of the response, hybrid + circuit"]
    places = [said["hybrid + circuit"]["boundary"], elsewhere]
    strength, added = f"{size['strength']:g}", said["hybrid + circuit"]
    stronger, of_target = said.get("hybrid + circuit_at_strength", added), said["target"]["moment"]["value"]
    stronger_name = "circuit_at_strength" if "circuit_at_strength" in suffices else "circuit"
    tuned = [f"replacement, {name}" for name in TUNED_BASELINES]
    forms = ("others", "others_scaled", "others_equal_harm")
    accuracy_by_slip = [of(need, f"accuracy_{slip}_slip", "none", "circuit") for slip in ("without", "with")]
    mediation = block["mediation"]
    return {
        "features; % of the alive, of all activation": f"{size['n']}; "
        + percent(size["share_of_alive"], size["share_of_activation"]),
        "output, template, continuation, other": ", ".join(str(size[role]) for role in roles),
        "hesitations per 1,000 tokens: replacement, without": f"{none['hesitation_per_1k']:.1f}, "
        f"{without['hesitation_per_1k']:.1f}",
        "gone, %: without circuit, matched random": percent(*of(need, "hesitation_cut", "circuit", "random")),
        "gone, %: most active others, as many, of equal write norm, of equal harm": percent(
            *of(need, "hesitation_cut", *forms)
        ),
        "gone, %, at the circuit's effect: logit bias, steering, neurons, low rank": percent(
            *of(need, "hesitation_cut", *TUNED_BASELINES)
        ),
        "KL elsewhere, millinats: circuit, logit bias, steering, neurons, low rank": ", ".join(
            f"{1000 * said[arm]['kl_elsewhere']['value']:.2f}" for arm in ("replacement - circuit", *tuned)
        ),
        "not reached": ", ".join(name for name, c in block["controls"].items() if not c["reached"]) or "-",
        "P(Wait), %, at onsets: replacement, without circuit, random": percent(
            *(said[arm]["moment"] for arm in ("replacement", "replacement - circuit", "replacement - random"))
        ),
        "responses shorter, %": percent(-without["length_change"]["value"]),
        "accuracy, %, no slip: replacement, without": percent(*accuracy_by_slip[0]),
        "accuracy, %, a slip: replacement, without": percent(*accuracy_by_slip[1]),
        f"P(Wait) at onsets over the target's: hybrid + circuit, at {strength}": f"{asked[KEPT]:.2f}, "
        f"{stronger['moment']['value'] / of_target:.2f}",
        "P(Wait), %: at matched control positions, at all other places": percent(*places),
        f"accuracy, %, thinking opened: hybrid, + circuit, at {strength}": percent(
            *of(suffices, "accuracy", "none", "circuit", stronger_name)
        ),
        "injected corrected, %: replacement, without, random, banned": percent(
            *of(block["injected"], "", "replacement", "replacement - circuit", "replacement - random", "word banned")
        ),
        "injected corrected, %: most active others, as many, of equal write norm, of equal harm": percent(
            *of(block["injected"], "", *(f"replacement - {form}" for form in forms))
        ),
        "injected corrected, %: logit bias, steering, neurons, low rank": percent(*of(block["injected"], "", *tuned)),
        f"injected corrected, %: hybrid, + circuit, at {strength}, + random": percent(
            *of(block["injected"], "", *(arm for arm in INSERTED if arm in block["injected"]))
        ),
        "target: hesitations per 1,000, circuit negated": ", ".join(
            f"{x:.1f}" for x in of(block["transfer"], "hesitation_per_1k", "none", "negated")
        ),
        "other words per 1,000: without, banned": ", ".join(
            f"{need[arm]['signs']['another word']:.1f}" for arm in ("circuit", "ban")
        ),
        "template features anywhere; off, nats; share of it through output, %": f"{mediation['n']}; "
        + (f"{mediation['total']['value']:.2f}; {percent(mediation['share'])}" if "share" in mediation else "-"),
    }


def table(found: dict[str, dict]) -> str:
    """Markdown: a column for each study that found a circuit, a row for each thing measured."""
    studied = {job: rows(block) for job, block in found.items() if "criteria" in block}
    lines = [f"{job}: no circuit; onsets {block['moments']}" for job, block in found.items() if job not in studied]
    if studied:
        lines += ["", "| measured | " + " | ".join(studied) + " |", "|---" * (len(studied) + 1) + "|"]
        for name in next(iter(studied.values())):
            lines.append(f"| {name} | " + " | ".join(columns[name] for columns in studied.values()) + " |")
    for job in studied:
        missed = [c["name"] for c in found[job]["criteria"] if not c["reached"]]
        lines.append(f"{job}, missed: {'; '.join(missed) or 'nothing'}")
    return "\n".join(lines)


def block(found: dict[str, dict], earlier: dict[str, Any]) -> dict[str, Any]:
    """Per pair, over its seeds: every intervention at full strength, and the template features. Other pairs stay."""
    pairs: dict[str, dict[str, Any]] = dict(earlier.get("pairs", {}))
    for pair in dict.fromkeys(job.partition("-")[0] for job in found):
        blocks = [b for job, b in found.items() if job.partition("-")[0] == pair and "criteria" in b]
        if blocks:
            points = {name: [_full_strength(b, name) for b in blocks] for name in INTERVENTIONS}
            pairs[pair] = {
                "seeds": len(blocks),
                "unchanged": _over_seeds(
                    [{"behavior_left": 1.0, **_values(b["dose_curves"]["unchanged"])} for b in blocks]
                ),
                "full_strength": {name: _over_seeds([p for p in of_seeds if p]) for name, of_seeds in points.items()},
                "templates": _over_seeds([_templates(b) for b in blocks]),
            }
    return {"pairs": pairs}


def _full_strength(block: dict, name: str) -> dict[str, float] | None:
    """What one intervention does at full strength; None where it has no curve."""
    points = [p for p in block["dose_curves"]["curves"].get(name, []) if p["factor"] == 1]
    return _values(points[0]) if points else None


def _values(point: dict) -> dict[str, float]:
    """The values of the measurements of a point."""
    return {key: figure["value"] for key, figure in point.items() if isinstance(figure, dict)}


def _templates(block: dict) -> dict[str, float]:
    """How many template features there are, and what they are worth."""
    mediation, size = block["mediation"], block["circuit"]
    effect = {"total": mediation["total"]["value"]} if "total" in mediation else {}
    if "share" in mediation and (mediation["total"]["low"] or 0.0) > 0:  # there is no share of no loss
        effect["share"] = mediation["share"]["value"]
    return {
        "in_circuit": size["template"],
        "circuit": size["n"],
        "anywhere": mediation["n"],
        "alive": size["alive"],
        **effect,
    }


def _over_seeds(seeds: list[dict[str, float]]) -> dict[str, Any]:
    """The mean over seeds of every value, with its range, over those that have it."""
    keys = dict.fromkeys(key for values in seeds for key in values)
    of = {key: [values[key] for values in seeds if values.get(key) is not None] for key in keys}
    return {key: value_and_range(sum(values) / len(values), values) for key, values in of.items() if values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("jobs", nargs="*", default=DEFAULT)
    parser.add_argument("--config", default="builtin", help="configuration of the training, by file or name")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="an option of the training")
    parser.add_argument(
        "--record", action="store_true", help="write benchmarks/results.json and the figure of the page"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    found = {}
    for job in options.jobs:
        found[job] = study(options.out, job, RunConfig.load(options.config), parse_options(options.set))
    print(table(found))
    if options.record:
        earlier = recorded("hesitation") or {}
        record("hesitation", block(found, earlier), [commit(), *earlier.get("commits", [])])
        for shown in [b for job, b in found.items() if job.startswith("sums") and "criteria" in b][:1]:
            for name, drawn in zip(FIGURES, dose_curve_plots(shown), strict=True):
                alone = standalone(drawn.svg)
                write_text(FOLDER.parent / "docs" / name, alone + "\n")


if __name__ == "__main__":
    main()
