"""Write the tables of README and docs/ that hold measurements from results.json: ``python benchmarks/tables.py``.

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->``; the text around it is written by hand. The test
tests/benchmarks/test_recorded.py holds that pages and results agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recorded import FOLDER, recorded

from tl_adapters.pages.dose_curve_plots import CURVE_NAMES
from tl_adapters.utils.files import write_text

DOCS = ("believing_features", "benchmarks", "circuits", "large_models")
PAGES = tuple(FOLDER.parent / name for name in ("README.md", *(f"docs/{p}.md" for p in DOCS)))
TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.S)
DECADES = ("1e-1", "1e-2", "1e-3", "1e-4")
NOT_MEASURED = "Not measured yet.\n"
RECIPE_NAMES = {
    "end_to_end": "end to end, as in the first release",
    "end_to_end_whitened": "end to end, in whitened coordinates",
    "local": "local stage",
    "local_then_end_to_end": "local stage, then end to end",
    "bias": "bias",
    "low_rank": "linear map of low rank",
    "sae_on_difference": "SAE that reads the difference",
}
FAMILY_NAMES = {
    "discriminants": "text and direction features",
    "related": "contained and correlated features",
    "noise": "the first, with dense noise",
    "attention": "the first, with other attention",
    "learned": "features learned by gradient",
    "neurons": "edited gated neurons",
}
GPUS, GPU_SHARE = (24, 80), 0.95
"""Sizes of GPUs in GB, and the share of one that a run can have."""
PAIR_NAMES = {"sums": "built-in (sums)", "differences": "second pair (differences)"}
CASE_NAMES = {
    "features_1024": "1,024 features, vocabulary 4,096",
    "features_8192": "8,192 features, vocabulary 4,096",
    "vocab_32768": "1,024 features, vocabulary 32,768",
}
QUANTITY_NAMES = {"features": "features", "tokens": "tokens", "layers": "layers", "vocab": "vocabulary"}
SIZED_PAIR_NAMES = {"organism": "built-in, 128 features", "random": "random, d_model 256, vocabulary 32,768"}
LINEARIZATION_NAMES = {"relp": "RelP", "frozen_mlp": "frozen MLPs", "gradient": "gradient"}


def with_range(figure: dict[str, Any] | None, form: str = "{:.0%}") -> str:
    """A value with the range over its runs."""
    if figure is None:
        return "-"
    low, high = (form.format(value) for value in figure["range"])
    value = form.format(figure["value"])
    return value if low == high else f"{value} ({low} to {high})"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def firings(figure: dict[str, Any] | None, text: str) -> str:
    """The lowest and highest number of firings of one feature in a text."""
    return "-" if figure is None else "{:,} to {:,}".format(*figure[f"firings_{text}"])


def by_rate(block: dict[str, Any]) -> str:
    """Recall by firing rate, with the number of firings."""
    rows = []
    for decade in DECADES:
        figure = block["recall"].get(decade)
        found = "-" if figure is None else f"{figure['k']} of {figure['n']}"
        rows.append([decade, firings(figure, "training"), firings(figure, "held_out"), found, with_range(figure)])
    return markdown(["firing rate", "firings in training", "firings held out", "found", "recall"], rows)


def _row(name: str, s: dict[str, Any]) -> list[str]:
    rates = [with_range(s["recall"].get(decade)) for decade in DECADES]
    kl, l0 = with_range(s["kl_left"], "{:.1%}"), with_range(s["l0"], "{:.2f}")
    runs = f"{len(s['plants'])} x {len(s['seeds'])}"
    return [name, runs, *rates, with_range(s["precision"]), kl, l0]


COLUMNS = ["plants x seeds", *DECADES, "precision", "KL left", "L0"]


def by_recipe(block: dict[str, Any]) -> str:
    """What each recipe finds on the first family."""
    rows = [
        [*_row(RECIPE_NAMES.get(name, name), s), with_range(s.get("processor_seconds"), "{:.2f}")]
        for name, s in block["recipes"].items()
    ]
    return markdown(["recipe", *COLUMNS, "time"], rows)


def by_family(block: dict[str, Any]) -> str:
    """What one recipe finds in each family."""
    rows = [
        [*_row(FAMILY_NAMES.get(name, name), s), with_range(s["true_l0"], "{:.2f}"), with_range(s["representable"])]
        for name, s in block["families"].items()
    ]
    return markdown(["family", *COLUMNS, "true L0", "representable"], rows)


def by_seed(block: dict[str, Any]) -> str:
    """Whether two seeds of the model organism agree, beside chance."""
    rows = []
    for recipe, by_width in block["recipes"].items():
        for width, s in by_width.items():
            agree = s["seed_agreement"]
            row = [RECIPE_NAMES.get(recipe, recipe), width, with_range(s["kl_share"], "{:.2%}")]
            row += [with_range(s["l0"], "{:.2f}"), with_range(s["alive"], "{:.0f}")]
            row += [f"{with_range(agree)}; {agree['chance']:.0%}"]
            row += [
                f"{with_range(agree[n])}; {agree[f'{n}_chance']:.0%}" for n in ("features_in_span", "energy_in_span")
            ]
            rows.append([*row, with_range(s["train_processor_seconds"], "{:.0f}")])
    head = ["recipe", "width", "KL of the hybrid's", "L0", "alive", "seeds agree; by chance"]
    head += ["features in the span; by chance", "energy in the span; by chance", "processor seconds"]
    return markdown(head, rows)


def by_trainer(block: dict[str, Any]) -> str:
    """What each trainer finds on SAELens's synthetic data."""
    keys = {
        "mean best cosine (MCC)": "mcc", "F1": "classification/f1_score", "precision": "classification/precision",
        "recall": "classification/recall", "variance explained": "explained_variance", "uniqueness": "uniqueness",
    }  # fmt: skip
    rows = [
        [run["trainer"], f"{run['sae_l0']:.2f}", *(f"{run[key]:.2f}" for key in keys.values()), f"{run['seconds']:.0f}"]
        for run in block["runs"]
    ]
    return markdown(["trainer", "L0", *keys, "seconds"], rows)


def by_intervention(block: dict[str, Any]) -> str:
    """What every intervention does at full strength, on each pair."""
    rows = []
    for pair, s in block["pairs"].items():
        for name, figures in {"unchanged": s["unchanged"], **s["full_strength"]}.items():
            row = [
                PAIR_NAMES.get(pair, pair),
                CURVE_NAMES.get(name, "nothing"),
                with_range(figures.get("behavior_left")),
            ]
            harm = figures.get("kl_elsewhere")
            row.append("0" if name == "unchanged" else with_range(harm, "{:.2g}"))
            rows.append([*row, with_range(figures.get("corrected"))])
    return markdown(["pair", "removed", "behavior left", "harm elsewhere", "errors corrected"], rows)


def by_pair(block: dict[str, Any]) -> str:
    """The template features of each pair."""
    rows = []
    for pair, s in block["pairs"].items():
        t = s["templates"]
        counts = [
            f"{with_range(t[part], '{:.3g}')} of {with_range(t[whole], '{:,.0f}')}"
            for part, whole in (("in_circuit", "circuit"), ("anywhere", "alive"))
        ]
        effects = [with_range(t.get("total"), "{:.2f}"), with_range(t.get("share"))]
        rows.append([PAIR_NAMES.get(pair, pair), *counts, *effects])
    head = ["pair", "template features in the circuit", "anywhere, of the alive", "nats lost without them"]
    return markdown([*head, "of which through output features"], rows)


def by_linearization(block: dict[str, Any]) -> str:
    """Rank correlations with real ablations, of each run with its interval over prompts."""
    rows = []
    for name, figure in block["rank_correlation"].items():
        runs = [f"{run['value']:.2f} ({run['low']:.2f} to {run['high']:.2f})" for run in figure["runs"]]
        rows.append([LINEARIZATION_NAMES.get(name, name), with_range(figure, "{:.2f}"), "; ".join(runs)])
    return markdown(
        ["linearization", "rank correlation", f"each seed, with its interval over {block['prompts']} prompts"], rows
    )


def headline(organism: dict[str, Any], planted: dict[str, Any], hesitation: dict[str, Any]) -> str:
    """What the README says: figures of the built-in pair, and the paper's beside them."""
    sums = hesitation["pairs"]["sums"]
    without, templates = sums["full_strength"], sums["templates"]
    frequent = [planted["recall"][decade] for decade in ("1e-1", "1e-2")]
    k, n = (sum(figure[key] for figure in frequent) for key in ("k", "n"))
    word = "behavior left without the circuit"
    rows = [
        ["KL of the replacement, share of the hybrid's", with_range(organism["kl_share"], "{:.2%}"), "-"],
        ["active features per token and layer (L0)", with_range(organism["l0"], "{:.2f}"), "1.4"],
        ["alive features that a second seed finds too", with_range(organism["seed_agreement"]), "-"],
        ["planted features of rates 1e-1 and 1e-2 that are found", f"{k} of {n}", "-"],
        ["alive features that are planted ones", with_range(planted["precision"]), "-"],
        ["features in the circuit of \"Wait\"", f"{templates['circuit']['value']:.0f} of "
         f"{templates['alive']['value']:,.0f} that are alive", "5,623 of 229,376"],
        [word, with_range(without["circuit"]["behavior_left"]), "0.5 of 5.5 per 1,000 tokens"],
        ["the same without matched random features", with_range(without["random"]["behavior_left"]),
         "50,000 random features reduce it less"],
        ["training", f"{with_range(organism['train_seconds'], '{:.0f}')} s on two CPU cores", "50,000 documents"],
    ]  # fmt: skip
    return markdown(["", "built-in pair, measured here", "7B pair, the paper's"], rows)


def _gigabytes(step: dict[str, Any]) -> list[str]:
    predicted, measured = (step.get(name) for name in ("predicted_gb", "gb"))
    return ["-" if value is None else f"{value:.1f}" for value in (predicted, measured)]


def _steps(block: dict[str, Any], prefix: str) -> list[tuple[list[str], dict[str, Any]]]:
    """The parts of the names of all steps that begin with a prefix, and what was measured, by number of tokens."""
    found = [(name.split("-"), step) for name, step in block["steps"].items() if name.split("-")[0] == prefix]
    return sorted(found, key=lambda item: (item[1]["tokens"], item[0]))


def training_on_gpu(block: dict[str, Any]) -> str:
    """Seconds and memory of a step of the objective, by length of the document."""
    rows = [
        [
            f"{step['tokens']:,}",
            name[2],
            "again" if "recompute" in name else "kept",
            f"{step['seconds']:.2f}",
            *_gigabytes(step),
        ]
        for name, step in _steps(block, "train")
    ]
    return markdown(["tokens", "adapters compute in", "blocks are", "seconds", "GB predicted", "GB measured"], rows)


def attribution_on_gpu(block: dict[str, Any]) -> str:
    """Seconds and memory of attribution graphs, by length of the prompt."""
    rows = [
        [f"{step['tokens']:,}", f"{step['active_features']:,}", f"{step['seconds']:.0f}", *_gigabytes(step)]
        for _, step in _steps(block, "attribute")
    ]
    return markdown(["tokens", "active features", "seconds", "GB predicted", "GB measured"], rows)


def rates_on_gpu(block: dict[str, Any]) -> str:
    """Tokens per second of the other steps."""
    names = {
        "local": "streaming local stage", "collect": "collection", "generate-target": "generation, target",
        "generate-replacement": "generation, replacement",
    }  # fmt: skip
    steps = block["steps"]
    rows = [
        [text, f"{steps[name]['tokens_per_second']:,.0f}", *_gigabytes(steps[name])] for name, text in names.items()
    ]
    return markdown(["", "tokens per second", "GB predicted", "GB measured"], rows)


def precision_on_gpu(block: dict[str, Any]) -> str:
    """What training ends with, by the precision of the adapters' products."""
    step = block["steps"]["precision"]
    rows = [
        [name, f"{figures['loss_every_20'][-1]:.4f}", f"{figures['output_kl']:.5f}", f"{figures['nmse']:.5f}",
         f"{figures['l0']:.1f}"]
        for name, figures in step.items() if isinstance(figures, dict)
    ]  # fmt: skip
    return markdown(["precision", "loss at step 181", "KL held out", "NMSE held out", "L0 of all layers"], rows)


def by_shape(block: dict[str, Any]) -> str:
    """GB that every stage takes at the shapes of published models, and the smallest GPU that has them."""
    shapes = block["predicted_gb"]
    head = ["", *(f"{shape.upper()}, {block['features'][shape]:,} features" for shape in shapes)]

    def cell(gigabytes: float) -> str:
        gpu = next((f"{size} GB" for size in GPUS if gigabytes < GPU_SHARE * size), "larger")
        return f"{gigabytes:.0f} ({gpu})"

    stages = next(iter(shapes.values()))
    return markdown(head, [[name, *(cell(of_shape[name]) for of_shape in shapes.values())] for name in stages])


def by_planned_search(block: dict[str, Any]) -> str:
    """Operations and hours of a search at 7B by its method, as the planner has them."""
    head = ["search", "rounds", "operations of the models", "of the adapters, in float32", "hours"]
    rows = [
        [
            method,
            str(s["rounds"]),
            f"{s['model_operations']:.1e}",
            f"{s['adapter_operations']:.1e}",
            f"{s['hours']:.1f}",
        ]
        for method, s in block["search"].items()
    ]
    rates = next(iter(block["search"].values()))
    return markdown(head, rows) + (
        f"\nHours are at {rates['model_rate']:.2g} operations a second of the models and {rates['adapter_rate']:.2g} "
        "of the adapters, as forward passes on the GPU had them.\n"
    )


def by_search(block: dict[str, Any]) -> str:
    """Seconds of a search by its method, and what the circuit that it finds does."""
    methods = block["methods"]
    rows = [["seconds of the search", *(f"{m['seconds']:.0f}" for m in methods.values())]]
    rows += [
        [name, *("-" if (value := m["criteria"].get(name)) is None else f"{value:.3g}" for m in methods.values())]
        for name in next(iter(methods.values()))["criteria"]
    ]
    return markdown(["", *methods], rows)


def by_generation(block: dict[str, Any]) -> str:
    """Tokens per second over Hugging Face's, by model, batch and decoding, and the geometric means."""
    rows = [
        [case["model"], str(case["batch"]), "sampled" if case["sampled"] else "greedy"]
        + [with_range(case[side], "{:.2f}") for side in block["means"]]
        for case in block["cases"]
    ]
    means = [with_range(mean, "{:.2f}") for mean in block["means"].values()]
    return markdown(["model", "batch", "decoding", *block["means"]], [*rows, ["geometric mean", "", "", *means]])


def by_served_condition(block: dict[str, Any]) -> str:
    """Tokens per second over plain vLLM's, by condition, with what is asked where adapters are read."""
    rows = [[name, with_range(share, "{:.2f}")] for name, share in block["share_of_plain"].items()]
    return markdown(["condition", "share of plain vLLM's tokens per second"], rows) + (
        f"\nThe model: {block['model']}, with {block['adapter_weights'] / 1e6:.1f} million adapter weights beside the "
        f"{block['weights_per_token'] / 1e6:.1f} million that a token reads; {block['sequences']} sequences at a time. "
        f"Plain vLLM generates {block['plain_tokens_per_second']:,.0f} tokens a second. With adapters "
        f"{block['wanted_with_adapters']:.2f} is the aim.\n"
    )


RECORDED = (
    "planted",
    "organism",
    "synthetic",
    "hesitation",
    "linearizations",
    "searches",
    "sizes",
    "planner",
    "gpu",
    "generation",
    "generation.vllm",
    "training",
    "growth",
    "local_stage",
    "active_features",
    "attribution",
    "collection",
    "opening",
    "imports",
    "first_minutes",
)
"""The blocks of results.json, in the order in which docs/benchmarks.md names them."""


def by_case(training: dict[str, Any]) -> str:
    """A training step beside the formulas and beside its products."""
    rows = [
        [
            name,
            with_range(case["speed"], "{:.2f}"),
            with_range(case["over_products"], "{:.2f}"),
            with_range(case["reference"]["over_products"], "{:.2f}"),
            f"{case['mb']:,.0f}",
            f"{case['reference']['mb']:,.0f}",
        ]
        for key, name in CASE_NAMES.items()
        for case in [training[key]]
    ]
    head = [
        "case",
        "speed over the formulas",
        "time over the products",
        "the formulas' over them",
        "MB",
        "formulas' MB",
    ]
    return markdown(head, rows)


def growth_plot(quantity: str) -> str:
    """The name of the file in docs/ that shows a series of benchmarks/growth.py, without its ending."""
    return f"growth_with_{QUANTITY_NAMES[quantity]}"


def by_growth(growth: dict[str, Any]) -> str:
    """The time of a step over that at the standard case, as plots and as a table."""
    series = growth["series"]
    plots = [f"![Time of a step by {QUANTITY_NAMES[name]}]({growth_plot(name)}.svg)\n" for name in series]
    rows = [
        [
            QUANTITY_NAMES[name],
            f"{int(value):,}",
            *(with_range(sides[side], "{:.2f}") for side in ("ours", "reference")),
        ]
        for name, of in series.items()
        for value, sides in of.items()
    ]
    times = with_range(growth["features_x16"], "{:.2f}")
    table = markdown(["what grows", "value", "time of a step", "of the formulas"], rows)
    return "\n".join([*plots, table, f"A step with 8,192 features takes {times} times as long as one with 512.\n"])


def by_stage(block: dict[str, Any]) -> str:
    """A token of the streaming local stage beside one of the end-to-end stage."""
    rows = [
        [
            CASE_NAMES[name],
            with_range(case["over_end_to_end"], "{:.2f}"),
            with_range(case["reading"]),
            f"{case['mb']:,.0f}",
            f"{case['end_to_end_mb']:,.0f}",
        ]
        for name, case in block["cases"].items()
    ]
    return markdown(["case", "time over end to end", "of which the forward pass", "MB", "end to end, MB"], rows)


def by_planned_run(block: dict[str, Any]) -> str:
    """What the planner predicts, over what runs took."""
    rows = [
        [
            name,
            f"{cell['layers']} x {cell['d_model']}, {cell['features']:,} features, {cell['tokens']:,} tokens",
            f"{cell['bytes'] / 1e9:.2f}",
            f"{cell['memory_ratio']:.2f}",
            f"{cell['seconds']:.0f}",
            f"{cell['time_ratio']:.2f}",
        ]
        for name, cell in block["cells"].items()
    ]
    return markdown(["run", "layers x d_model", "GB", "predicted over it", "seconds", "predicted over them"], rows)


def by_opened_pair(block: dict[str, Any]) -> str:
    """The time in which a pair opens beside that of transformers."""
    rows = [
        [SIZED_PAIR_NAMES[name], with_range(pair["over_transformers"], "{:.1f}"), f"{pair['seconds']:.2f}"]
        for name, pair in block["pairs"].items()
    ]
    return markdown(["pair", "time over from_pretrained", "seconds"], rows)


def by_statement(block: dict[str, Any]) -> str:
    """The time of imports beside TransformerLens's."""
    rows = [
        [f"`{each['statement']}`", with_range(each["over_transformer_lens"], "{:.3f}"), f"{each['seconds']:.2f}"]
        for each in block["statements"].values()
    ]
    return markdown(["statement", "time over `import transformer_lens`", "seconds"], rows)


def by_first_command(block: dict[str, Any]) -> str:
    """The time of the demo and of every tutorial."""
    rows = [[f"`{name}`", with_range(taken, "{:.0f}")] for name, taken in block["seconds"].items()]
    return markdown(["what runs", "seconds"], rows)


def by_density(block: dict[str, Any]) -> str:
    """The pass over active features beside whole products."""
    widths = list(block["ratio"])
    rows = [
        [f"{float(density):.1%}", *(with_range(block["ratio"][width][density], "{:.2f}") for width in widths)]
        for density in block["ratio"][widths[0]]
    ]
    return markdown(["active features", *(f"{int(width):,} features" for width in widths)], rows)


def by_analysis(attribution: dict[str, Any], collection: dict[str, Any]) -> str:
    """Rows of a graph beside autograd, and a collection beside forward passes."""
    active = f"{attribution['active_features']:,} active features"
    long = attribution["tokens_2000"]
    rows = [
        [f"speed of a graph's rows over batched autograd, {active}", with_range(attribution["speed"], "{:.1f}")],
        ["the same over autograd per target", with_range(attribution["speed_per_target"], "{:.1f}")],
        [f"seconds of a graph of 2,000 tokens, {long['active_features']:,} active features", f"{long['seconds']:.0f}"],
    ]
    for width, cost in collection["cost"].items():
        rows.append([f"time of a collection over forward passes, {int(width):,} features", with_range(cost, "{:.2f}")])
    return markdown(["figure", "value"], rows)


def provenance(*blocks: dict[str, Any] | None) -> str:
    """With what each block was recorded, if it was: the last command, the machine, and the commits of all its runs."""
    rows = []
    for name, block in zip(RECORDED, blocks, strict=True):
        if block is None:
            continue
        machine, versions = block["machine"], block["versions"]
        on = f"{machine['cores']} cores, {machine['threads']} {'thread' if machine['threads'] == 1 else 'threads'}"
        if "gflops" in machine:
            on += f", {machine['gflops']:.0f} GFLOP/s"
        commits = {commit[:7] + "+" * commit.endswith("+") for commit in block["commits"]}
        with_versions = ", ".join(f"{package} {versions[package]}" for package in ("torch", "transformers"))
        rows.append([name, f"`{block['command']}`", on, with_versions, ", ".join(sorted(commits))])
    if not rows:
        return NOT_MEASURED
    return markdown(["block", "last command that recorded it", "machine", "versions", "commits of its runs"], rows)


TABLES: dict[str, tuple[str, Callable[..., str]]] = {
    "headline": ("organism planted hesitation", headline),
    "rates": ("planted", by_rate),
    "recipes": ("planted", by_recipe),
    "families": ("planted", by_family),
    "seeds": ("organism", by_seed),
    "trainers": ("synthetic", by_trainer),
    "interventions": ("hesitation", by_intervention),
    "templates": ("hesitation", by_pair),
    "linearizations": ("linearizations", by_linearization),
    "sizes": ("sizes", by_shape),
    "planned_search": ("sizes", by_planned_search),
    "searches": ("searches", by_search),
    "gpu_training": ("gpu", training_on_gpu),
    "gpu_attribution": ("gpu", attribution_on_gpu),
    "gpu_rates": ("gpu", rates_on_gpu),
    "gpu_precision": ("gpu", precision_on_gpu),
    "generation": ("generation", by_generation),
    "served": ("generation.vllm", by_served_condition),
    "training": ("training", by_case),
    "growth": ("growth", by_growth),
    "local_stage": ("local_stage", by_stage),
    "active_features": ("active_features", by_density),
    "analysis": ("attribution collection", by_analysis),
    "opening": ("opening", by_opened_pair),
    "imports": ("imports", by_statement),
    "first_minutes": ("first_minutes", by_first_command),
    "planner": ("planner", by_planned_run),
    "provenance": (" ".join(RECORDED), provenance),
}
"""Table -> the blocks of results.json that it shows, and how."""


def filled(text: str, folder: Path = FOLDER) -> str:
    """The text of a page with every table as results.json has it."""

    def table(found: re.Match[str]) -> str:
        names, make = TABLES[found[2]]
        blocks = [recorded(name, folder) for name in names.split()]
        measured = make is provenance or None not in blocks
        return found[1] + (make(*blocks) if measured else NOT_MEASURED) + found[3]

    return TABLE.sub(table, text)


def main() -> None:
    for page in PAGES:
        write_text(page, filled(page.read_text(encoding="utf-8")))
        print(page)


if __name__ == "__main__":
    main()
