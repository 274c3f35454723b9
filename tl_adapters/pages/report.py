"""The page report.html of a run: its measurements as tables and plots, with example answers.

The page is self-contained and made only from results.json and the .jsonl files of the run folder, so it can be written
again at any time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tl_adapters.circuits.results_block import upgraded_block
from tl_adapters.data.hesitation_words import HIGHLIGHTED_WORDS
from tl_adapters.pages.circuit_page import HESITATION_PAGE_FILE
from tl_adapters.pages.plots import Line, measured_line, plot
from tl_adapters.utils.files import write_text
from tl_adapters.utils.html import escape, highlight_words, measurement_cell, page, percent, table, three_digits
from tl_adapters.utils.results import Block, read_results

REPORT_PAGE_FILE = "report.html"


def write_report(folder: str | Path) -> Path:
    """Write report.html into a run folder and return its path; stages that have not run are left out.

    Raises DiskFullError.
    """
    folder = Path(folder)
    results = read_results(folder)
    sections = [_heading(results), _summary_table(results)]
    metrics = _read_lines(folder / "metrics.jsonl")
    if metrics:
        sections.append(_training_section(metrics, _read_lines(folder / "validation.jsonl"), results.get("train", {})))
    if "faithfulness" in results:
        sections.append(_faithfulness_section(results["faithfulness"]))
    if "baselines" in results:
        sections.append(_baselines_section(results["baselines"]))
    if "behaviour" in results:
        sections.append(_behavior_section(results["behaviour"]))
    if "labels" in results.get("features", {}):
        sections.append(_features_section(results["features"]))
    if results.get("labels"):
        sections.append(_judge_section(results["labels"]))
    if (results.get("attribution") or {}).get("graphs"):
        sections.append(_attribution_section(results["attribution"]))
    if results.get("hesitation"):
        sections.append(_circuit_section(upgraded_block(results["hesitation"])))
    answers = _read_lines(folder / "answers.jsonl")
    if answers:
        sections.append(_answers_section(answers))
    sections.append(_provenance_section(results))
    path = folder / REPORT_PAGE_FILE
    write_text(path, page("What reasoning training changed", "\n".join(sections)))
    return path


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _heading(results: Block) -> str:
    pair = results["pair"]
    return (
        "<h1>What reasoning training changed</h1>"
        f'<p class="soft">Transcoder adapters between <b>{escape(pair["base"])}</b> (base) and '
        f"<b>{escape(pair['target'])}</b> (target): {pair['n_layers']} layers, d_model {pair['d_model']}, "
        f"{results['train']['n_features']} features per layer.</p>"
    )


def _summary_table(results: Block) -> str:
    rows = []
    if "faithfulness" in results:
        faithfulness = results["faithfulness"]
        partial = [
            *faithfulness["partial_of_full"]["first"][:-1],
            *faithfulness["partial_of_full"]["last"][1:],
            *faithfulness["partial_of_full"]["only"],
        ]
        worst = max(
            partial, key=lambda measurement: -math.inf if measurement["value"] is None else measurement["value"]
        )
        l0 = [measurement["value"] for measurement in faithfulness["l0"]]
        rows += [
            ["KL(target || replacement)", measurement_cell(faithfulness["kl"]["replacement"], three_digits)],
            ["KL(target || hybrid)", measurement_cell(faithfulness["kl"]["hybrid"], three_digits)],
            ["replacement's KL as a share of the hybrid's", measurement_cell(faithfulness["kl_of_hybrid"], percent)],
            ["worst partial replacement, KL over the full one's", measurement_cell(worst, three_digits)],
            ["same likeliest token as the target", measurement_cell(faithfulness["top1_agreement"], percent)],
            ["active features per token and layer (L0), mean", f"{sum(l0) / len(l0):.2f}"],
        ]
    if "behaviour" in results:
        recovered = results["behaviour"]["recovered"]
        rows += [
            ["accuracy recovered, against the hybrid", measurement_cell(recovered["hybrid"], percent)],
            ["accuracy recovered, against the base", measurement_cell(recovered["base"], percent)],
        ]
    note = (
        '<p class="soft">Intervals are 95 % intervals over held-out documents or problems. KL is in nats per '
        "response token, on the target's own greedy text.</p>"
    )
    return table(["figure", "measured"], rows) + note if rows else ""


def _training_section(metrics: Sequence[Block], validation: Sequence[Block], train: Block) -> str:
    steps = [m["step"] for m in metrics]
    labels = {"output_kl": "output KL", "forward_bridge": "forward bridge", "backward_bridge": "backward bridge"}
    # A bridge term is 0 if its cut leaves no layer of the replacement; a logarithmic axis shows a gap there.
    kls = [Line(label, steps, [m[key] or math.nan for m in metrics]) for key, label in labels.items()]
    l0 = [Line(f"layer {i}", steps, [m["l0"][i] for m in metrics]) for i in range(len(metrics[0]["l0"]))]
    nmse = [Line("training", steps, [m["nmse"] for m in metrics])]
    if validation:
        validation_steps = [v["step"] for v in validation]
        kls.append(Line("output KL, held out", validation_steps, [v["output_kl"] for v in validation], dashed=True))
        nmse.append(Line("held out", validation_steps, [v["nmse"] for v in validation], dashed=True))
    seconds = f" in {train['seconds']:.0f} s" if "seconds" in train else ""
    plots = [
        plot(kls, xlabel="step", ylabel="nats per token", caption="The three divergences of the objective.", log=True),
        plot(nmse, xlabel="step", ylabel="NMSE", caption="Error of the residual stream, mean over places.", log=True),
        plot(l0, xlabel="step", ylabel="L0", caption="Active features per token.", log=True),
    ]
    text = f"<p>{train['steps']} steps, {train['tokens']:,} tokens{seconds}. Training batches, all tokens.</p>"
    return f'<h2>Training</h2>{text}<div class="plots">{"".join(plots)}</div>'


def _faithfulness_section(block: Block) -> str:
    n_layers = len(block["l0"])
    layers = list(range(n_layers))
    by_layer = [
        measured_line("first layers, 0..i", layers, block["kl_first"]),
        measured_line("last layers, i..L-1", layers, block["kl_last"]),
        measured_line("layer i alone", layers, block["kl_only"]),
        Line("hybrid", [0, n_layers - 1], [block["kl"]["hybrid"]["value"]] * 2, dashed=True),
        Line("full replacement", [0, n_layers - 1], [block["kl"]["replacement"]["value"]] * 2, dashed=True),
    ]
    stream_positions = list(range(n_layers + 1))
    nmse = [
        measured_line("response tokens", stream_positions, block["nmse"]),
        measured_line("all tokens", stream_positions, block["nmse_all_tokens"]),
        measured_line("all but position 0", stream_positions, block["nmse_without_position_0"]),
    ]
    l0 = [
        measured_line("response tokens", layers, block["l0"]),
        measured_line("all tokens", layers, block["l0_all_tokens"]),
    ]
    plots = [
        plot(by_layer, xlabel="layer i", ylabel="KL, nats per token", log=True, whole=True,
             caption="KL(target || partial replacement), beside the hybrid and full replacement."),
        plot(nmse, xlabel="after layer (0: embedding)", ylabel="NMSE", whole=True,
             caption="Squared error of the replacement's residual stream over the target's squares."),
        plot(l0, xlabel="layer", ylabel="L0", whole=True, caption="Active features per token."),
    ]  # fmt: skip
    tokens = block["tokens"]
    text = (
        f"<p>On {tokens['response']:,} response tokens ({tokens['all']:,} in all) of the target's greedy text on "
        f"problems of the {escape(block['l0'][0]['split'])} split. Dead features per layer: "
        f"{', '.join(map(str, block['dead']))}.</p>"
    )
    return f'<h2>Faithfulness</h2>{text}<div class="plots">{"".join(plots)}</div>'


def _baselines_section(block: Block) -> str:
    rows = [[escape(row["name"]), measurement_cell(row["kl"], three_digits)] for row in block["rows"]]
    smallest_rank = block["rank_for_same_kl"]
    conclusion = "No rank that was tried comes as close as the adapters."
    if smallest_rank:
        conclusion = f"The smallest rank tried that is at least as close as the adapters: <b>{smallest_rank}</b>."
    text = (
        "<p>Simpler stand-ins for the same MLP difference. Both see the target's MLP at work for every token, which an "
        f"adapter never does; n is the adapters' L0, rounded up. {conclusion}</p>"
    )
    return f"<h2>What that KL is worth</h2>{text}" + table(["added to the base MLP", "KL(target || it)"], rows)


def _behavior_section(block: Block) -> str:
    columns = ("accuracy", "length", "hesitation_per_1k", "think_opened", "truncated")
    rows = [[name, *_rate_cells(block[name], columns)] for name in ("base", "target", "hybrid", "replacement")]
    header = ["model", "accuracy", "length, tokens", "hesitations per 1,000", "opens thinking", "cut at the limit"]
    text = (
        f"<p>{block['target']['n']:,} problems of the {escape(block['target']['split'])} split, greedy decoding. "
        "<i>Base</i> is the real base model; the <i>hybrid</i> has the target's attention and the base's MLPs; the "
        "<i>replacement</i> adds the adapters.</p>"
    )
    return f"<h2>Behavior</h2>{text}" + table(header, rows)


def _features_section(block: Block) -> str:
    neurons = block["neurons"]
    rows = [
        [
            escape(category),
            measurement_cell(share["weighted"], percent),
            measurement_cell(neurons["labels"][category]["weighted"], percent) if category in neurons["labels"] else "",
        ]
        for category, share in block["labels"].items()
    ]
    link = f'<a href="{escape(block["page"])}">what each of them fires on and promotes</a>'
    text = (
        f"<p>{block['alive']:,} of {block['total']:,} features are alive on {block['tokens']:,} tokens "
        f"({escape(block['split'])} split, the {escape(block['stream'])}'s stream): {link}. Labels are by rules that "
        f"need no model; beside them, as a measure, the same rules on the target's MLP neurons, of each token "
        f"and layer the {neurons['per_token']} that write most ({neurons['alive']:,} of {neurons['total']:,} "
        "alive).</p>"
    )
    layers = [layer["layer"] for layer in block["agreement"]]
    plots = [
        plot(
            [
                measured_line(
                    "on both, of firings on either", layers, [layer["overlap"] for layer in block["agreement"]]
                ),
                measured_line("on both, of the replacement's", layers, [layer["kept"] for layer in block["agreement"]]),
            ],
            xlabel="layer",
            ylabel="share of firings",
            whole=True,
            caption="How far features fire alike on the target's own residual stream and on the replacement's.",
        )
    ]
    shares = table(["called", "features", "neurons"], rows)
    return f'<h2>What the features are</h2>{text}{shares}<div class="plots">{"".join(plots)}</div>'


def _judge_section(block: Block) -> str:
    parts = ["<h2>What a model calls them</h2>"]
    if judge := block.get("judge"):
        again = (
            f" Judged a second time, {percent(judge['agreement']['value'])} of {judge['agreement']['n']} got the same "
            "category."
            if judge["agreement"]
            else ""
        )
        rows = [
            [escape(c), str(s["count"]), measurement_cell(s["weighted"], percent)] for c, s in judge["shares"].items()
        ]
        parts.append(
            f"<p>{judge['judged']:,} of {judge['alive']:,} alive features, sorted by {escape(judge['model'])} into the "
            f"paper's categories.{again}</p>" + table(["category", "judged", "of the alive"], rows)
        )
    if test := block.get("detection"):
        rows = [
            [unit, str(test[unit]["score"]["n"]), measurement_cell(test[unit]["score"], three_digits)]
            for unit in ("features", "neurons")
            if test[unit]
        ]
        parts.append(
            f"<p>Described by {escape(test['model'])} from some examples, and told apart by the description on others, "
            "features and neurons mixed blind: balanced accuracy, where 0.5 is chance.</p>"
            + table(["of", "tested", "detection score"], rows)
        )
    return "".join(parts)


def _attribution_section(block: Block) -> str:
    rows = []
    for graph in block["moments"]:
        difference = graph["difference"]
        link = f'<a href="{escape(graph["page"])}">{escape(graph["prompt"][-40:])}</a>'
        cells = [percent(graph["probability"]), percent(graph["influence_through_features"])]
        rows.append([link, *cells, *(f"{difference[part]:+.2f}" for part in ("hybrid", "features", "decoder_biases"))])
        rows[-1] += [f"{difference['unexplained']:+.2f}", f"{difference['replacement']:+.2f}"]
    header = ["before it says it (graph)", "P(word)", "influence through features", "logit in the hybrid", "+ features"]
    text = (
        f"<p>What makes the replacement say {escape(repr(block['moments'][0]['word']))}: RelP graphs of the first "
        f"hesitation in {block['graphs']} answers. Every row of a graph adds up to its target (largest residual "
        f"{block['conservation']:.1e}); what the patterns, norms and gates do that the adapters move is not in it "
        "(unexplained).</p>"
    )
    correlations = [
        [name, "-" if value is None else f"{value:.2f}"] for name, value in block["rank_correlation"].items()
    ]
    validation = (
        "<p>Adding up is no proof. Rank correlation of the attributed with the real effect of taking each active "
        "feature away, mean over these moments:</p>" + table(["linearisation", "rank correlation"], correlations)
    )
    curves = block["moments"][0]["curve"]
    plots = [
        plot(
            [Line(name, lines["n"], lines[kind]) for name, lines in curves.items()],
            xlabel="first n features of the ranking",
            ylabel="share of the features' effect on the logit",
            caption=f"{kind.capitalize()} the first n features by each ranking, in the real model; first moment.",
        )
        for kind in ("keeping", "removing")
    ]
    graphs = table([*header, "+ b_dec", "unexplained", "= logit"], rows)
    return f'<h2>Why it hesitates</h2>{text}{graphs}{validation}<div class="plots">{"".join(plots)}</div>'


def _circuit_section(block: Block) -> str:
    circuit = block.get("circuit") or {}
    role_names = ("output", "template", "continuation", "other")
    roles = ", ".join(f"{circuit[role]:,} {role}" for role in role_names if circuit.get(role) is not None)
    share = circuit.get("share_of_alive")
    share = share.get("value") if isinstance(share, dict) else share
    words = ", ".join(map(escape, block.get("words") or [])) or f"what {escape(str(block.get('function')))} finds"
    of_alive = "" if share is None else f" ({percent(share)} of the alive)"
    link = f'<a href="{escape(block.get("page") or HESITATION_PAGE_FILE)}">the circuit, its features and every arm</a>'
    stronger = f"the whole circuit, at strength {circuit.get('strength') or 1:g}"
    columns = ("accuracy", "length", "hesitation_per_1k")
    rows = []
    for measured, title in (("necessity", "taken out of the replacement"), ("sufficiency", "added to the hybrid")):
        for condition in ("none", "output", "template", "circuit", "circuit_at_strength", "random"):
            if rate := (block.get(measured) or {}).get(condition):
                condition_name = {"circuit": "the whole circuit", "circuit_at_strength": stronger}.get(
                    condition, condition
                )
                rows.append([f"{condition_name}, {title}", *_rate_cells(rate, columns)])
    header = ["features", "accuracy", "length, tokens", "hesitations per 1,000"]
    text = (
        f"<p>The features that make it say {words}: {roles or 'none of any role'} features{of_alive}. See {link}.</p>"
    )
    reached = [c.get("reached") for c in block.get("criteria") or []]
    unknown = f"; {reached.count(None)} not known, for want of problems" if None in reached else ""
    criteria = f"<p>{reached.count(True)} of {len(reached)} criteria reached{unknown}.</p>" if reached else ""
    return f"<h2>The hesitation circuit</h2>{text}{table(header, rows) if rows else ''}{criteria}"


_RATE_FORMATS: dict[str, Callable[[float], str]] = {
    "accuracy": percent,
    "length": "{:.1f}".format,
    "hesitation_per_1k": "{:.1f}".format,
    "think_opened": percent,
    "truncated": percent,
}


def _rate_cells(rate: Block, columns: Sequence[str]) -> list[str]:
    """Return the cells of one model's or condition's rates, each with its interval."""
    intervals = rate.get("ci") or {}
    return [
        measurement_cell({**(intervals.get(key) or {}), "value": rate.get(key)}, _RATE_FORMATS[key]) for key in columns
    ]


def _answers_section(answers: Sequence[Block]) -> str:
    parts = ["<h2>The same problem, three times</h2>"]
    for answer in answers:
        boxes = "".join(
            f"<div><h4>{name}</h4><pre>{highlight_words(answer[name], HIGHLIGHTED_WORDS)}</pre></div>"
            for name in ("target", "hybrid", "replacement")
        )
        parts.append(f"<p><b>{escape(answer['question'])}</b></p><div class='answers'>{boxes}</div>")
    return "".join(parts)


def _provenance_section(results: Block) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items() if version)
    recipe = f"; recipe of the pair {escape(results['pair']['recipe'])}" if "recipe" in results["pair"] else ""
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in results.get("seconds", {}).items())
    return (
        f'<h2>Where this comes from</h2><p class="soft">{escape(versions)}.<br>{escape(seconds)}.<br>'
        f"Seed {escape(str(results.get('seeds')))}{recipe}. All figures are in results.json beside this page.</p>"
    )
