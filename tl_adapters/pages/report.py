"""The page report.html of a run: the answer to its question, then measurements as tables and plots, example answers.

The page is self-contained and made only from results.json and the .jsonl files of the run folder, so it can be written
again at any time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tl_adapters import organism
from tl_adapters.circuits.results_block import upgraded_block
from tl_adapters.pages.dose_curve_plots import dose_curve_plots
from tl_adapters.pages.navigation import HESITATION_PAGE_FILE, REPORT_PAGE_FILE, page_links, refresh_navigation
from tl_adapters.pages.plots import Line, Plot, measured_line, plot
from tl_adapters.pages.report_head import answer_sentences, headlines, side_by_side, size_warning, worst_partial
from tl_adapters.utils.html import Cell, measurement_cell, percent, render, shown_from, three_digits
from tl_adapters.utils.reading import Record, read_json_lines, read_record_lines
from tl_adapters.utils.results import RESULTS_FILE, Block, output_file, read_results, write_output


def write_report(folder: str | Path) -> Path:
    """Write report.html into a run folder and return its path; stages that have not run are left out.

    The navigation of the run's other pages is brought up to date.

    Raises:
        UnreadableFileError: results.json or a .jsonl file does not hold what the page shows.
        DiskFullError.
    """
    folder = Path(folder)
    results = read_results(folder)
    with shown_from(folder / RESULTS_FILE):
        text = render("report/report.html.j2", results=results, **_values(results, folder))
    page = write_output(folder, REPORT_PAGE_FILE, text)
    refresh_navigation(folder)
    return page


def _values(results: Block, folder: Path) -> dict[str, Any]:
    """Return what the template shows besides the results themselves; None or empty where a stage has not run."""
    metrics, local_metrics, validation = (
        _read_lines(folder / file) for file in ("metrics.jsonl", "local_metrics.jsonl", "validation.jsonl")
    )
    features = results.get("features", {})
    faithfulness, baselines = results.get("faithfulness"), results.get("baselines")
    behavior, labels = results.get("behaviour"), results.get("labels") or {}
    attribution = results.get("attribution") or {}
    features = features if "labels" in features else None
    circuit = upgraded_block(results["hesitation"]) if results.get("hesitation") else {}
    generations = [side_by_side(a.question, dict(a)) for a in _read_answers(output_file(folder, "answers.jsonl"))]
    return {
        "run_pages": page_links(output_file(folder, REPORT_PAGE_FILE)),
        "sentences": answer_sentences(results, circuit),
        "headlines": headlines(results, circuit),
        "size_warning": size_warning(results),
        "summary": _summary_rows(results),
        "training": _training(metrics, local_metrics, validation, results) if metrics or local_metrics else None,
        "faithfulness": faithfulness,
        # The model organism is measured on what its target writes; any other pair on the documents that were given.
        "own_text": faithfulness is not None and faithfulness["l0"][0]["split"] in organism.SPLITS,
        "faithfulness_plots": _faithfulness_plots(faithfulness) if faithfulness else [],
        "baselines": baselines,
        "baseline_rows": [[row["name"], measurement_cell(row["kl"], three_digits)] for row in baselines["rows"]]
        if baselines
        else [],
        "behavior": behavior,
        "behavior_rows": _behavior_rows(behavior) if behavior else [],
        "features": features,
        "label_rows": _label_rows(features) if features else [],
        "agreement_plots": _agreement_plots(features) if features else [],
        "labels": labels and {"judge": None, "detection": None, **labels},  # either may be missing
        "judge_rows": _judge_rows(labels.get("judge")),
        "detection_rows": _detection_rows(labels.get("detection")),
        "attribution": _attribution(attribution) if attribution.get("graphs") else None,
        "circuit": _circuit(circuit) if circuit else None,
        "generations": generations,
        "versions": ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items() if version),
        "seconds": ", ".join(f"{stage} {value:.0f} s" for stage, value in results.get("seconds", {}).items()),
    }


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [value for _, value in read_json_lines(path)] if path.is_file() else []


def _summary_rows(results: Block) -> list[list[str | Cell]]:
    rows: list[list[str | Cell]] = []
    if "faithfulness" in results:
        faithfulness = results["faithfulness"]
        worst = worst_partial(faithfulness)
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
    return rows


def _training(
    metrics: Sequence[Block], local_metrics: Sequence[Block], validation: Sequence[Block], results: Block
) -> dict[str, Any]:
    seconds = results["train"].get("seconds")
    plots = [*_local_plots(local_metrics), *_end_to_end_plots(metrics, validation)]
    return {"seconds": "" if seconds is None else f"{seconds:.0f} s", "plots": plots}


def _local_plots(metrics: Sequence[Block]) -> list[Plot]:
    if not metrics:
        return []
    steps, layers = [m["step"] for m in metrics], range(len(metrics[0]["l0"]))
    captions = {
        "error": "Local stage: share of the energy of the two MLPs' difference that the adapter leaves.",
        "l0": "Local stage: active features per token.",
        "alive": "Local stage: features that were active in one of the last steps.",
    }
    return [
        plot(
            [Line(f"layer {i}", steps, [m[name][i] or math.nan for m in metrics]) for i in layers],
            xlabel="step", ylabel=name, caption=caption, log=name != "alive",
        )
        for name, caption in captions.items()
    ]  # fmt: skip


def _end_to_end_plots(metrics: Sequence[Block], validation: Sequence[Block]) -> list[Plot]:
    if not metrics:
        return []
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
    return [
        plot(kls, xlabel="step", ylabel="nats per token", caption="The three divergences of the objective.", log=True),
        plot(nmse, xlabel="step", ylabel="NMSE", log=True,
             caption="Error of the residual stream, mean over layers."),
        plot(l0, xlabel="step", ylabel="L0", caption="Active features per token.", log=True),
    ]  # fmt: skip


def _faithfulness_plots(block: Block) -> list[Plot]:
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
    return [
        plot(by_layer, xlabel="layer i", ylabel="KL, nats per token", log=True, whole=True,
             caption="KL(target || partial replacement), beside the hybrid and full replacement."),
        plot(nmse, xlabel="after layer (0: embedding)", ylabel="NMSE", whole=True,
             caption="Squared error of the replacement's residual stream over the target's squares."),
        plot(l0, xlabel="layer", ylabel="L0", whole=True, caption="Active features per token."),
    ]  # fmt: skip


def _behavior_rows(block: Block) -> list[list[str | Cell]]:
    columns = ("accuracy", "length", "hesitation_per_1k", "think_opened", "truncated")
    return [[name, *_rate_cells(block[name], columns)] for name in ("base", "target", "hybrid", "replacement")]


def _label_rows(block: Block) -> list[list[str | Cell]]:
    neurons = block["neurons"]["labels"]
    return [
        [
            label,
            measurement_cell(share["weighted"], percent),
            measurement_cell(neurons[label]["weighted"], percent) if label in neurons else "",
        ]
        for label, share in block["labels"].items()
    ]


def _agreement_plots(block: Block) -> list[Plot]:
    layers = [layer["layer"] for layer in block["agreement"]]
    lines = [
        measured_line("on both, of firings on either", layers, [layer["overlap"] for layer in block["agreement"]]),
        measured_line("on both, of the replacement's", layers, [layer["kept"] for layer in block["agreement"]]),
    ]
    caption = "Share of firings that occur on the target's own residual stream and on the replacement's."
    return [plot(lines, xlabel="layer", ylabel="share of firings", whole=True, caption=caption)]


def _judge_rows(judge: Block | None) -> list[list[str | Cell]]:
    shares = judge["shares"] if judge else {}
    return [[name, str(s["count"]), measurement_cell(s["weighted"], percent)] for name, s in shares.items()]


def _detection_rows(test: Block | None) -> list[list[str | Cell]]:
    return [
        [unit, str(test[unit]["score"]["n"]), measurement_cell(test[unit]["score"], three_digits)]
        for unit in ("features", "neurons")
        if test and test[unit]
    ]


def _attribution(block: Block) -> dict[str, Any]:
    rows: list[list[str | Cell]] = []
    for graph in block["moments"]:
        difference = graph["difference"]
        link = Cell(graph["prompt"][-40:], address=graph["page"])
        shares = [percent(graph["probability"]), percent(graph["influence_through_features"])]
        parts = ("hybrid", "features", "decoder_biases", "unexplained", "replacement")
        rows.append([link, *shares, *(f"{difference[part]:+.2f}" for part in parts)])
    curves, n_prompts = block["moments"][0]["curve"], block.get("rank_correlation_prompts", len(block["moments"]))
    intervals = block.get("rank_correlation_ci") or {}  # runs of the first release have none
    plots = [
        plot(
            [Line(name, lines["n"], lines[kind]) for name, lines in curves.items()],
            xlabel="first n features of the ranking",
            ylabel="share of the effect on the logit",
            caption=f"{kind.capitalize()} the first n features by each ranking, in the real model; first graph.",
        )
        for kind in ("keeping", "removing")
    ]
    return {
        "word": repr(block["moments"][0]["word"]),
        "conservation": f"{block['conservation']:.1e}",
        "rows": rows,
        "prompts": n_prompts,
        "correlations": [
            [name, measurement_cell({**(intervals.get(name) or {}), "value": value}, "{:.2f}".format)]
            for name, value in block["rank_correlation"].items()
        ],
        "plots": plots,
    }


def _circuit(block: Block) -> dict[str, Any]:
    circuit = block.get("circuit") or {}
    role_names = ("output", "template", "continuation", "other")
    share = circuit.get("share_of_alive")
    share = share.get("value") if isinstance(share, dict) else share
    stronger = f"the whole circuit, at strength {circuit.get('strength') or 1:g}"
    names = {"circuit": "the whole circuit", "circuit_at_strength": stronger}
    rows: list[list[str | Cell]] = []
    for measured, title in (("necessity", "taken out of the replacement"), ("sufficiency", "added to the hybrid")):
        for condition in ("none", "output", "template", "circuit", "circuit_at_strength", "random"):
            if rate := (block.get(measured) or {}).get(condition):
                cells = _rate_cells(rate, ("accuracy", "length", "hesitation_per_1k"))
                rows.append([f"{names.get(condition, condition)}, {title}", *cells])
    reached = [c.get("reached") for c in block.get("criteria") or []]
    return {
        "words": ", ".join(block.get("words") or []) or f"what {block.get('function')} finds",
        "roles": ", ".join(f"{circuit[role]:,} {role}" for role in role_names if circuit.get(role) is not None),
        "of_alive": "" if share is None else f" ({percent(share)} of the alive)",
        "page": block.get("page") or HESITATION_PAGE_FILE,
        "plots": dose_curve_plots(block),
        "rows": rows,
        "criteria": len(reached),
        "reached": reached.count(True),
        "unknown": reached.count(None),
    }


_RATE_FORMATS: dict[str, Callable[[float], str]] = {
    "accuracy": percent,
    "length": "{:.1f}".format,
    "hesitation_per_1k": "{:.1f}".format,
    "think_opened": percent,
    "truncated": percent,
}


def _rate_cells(rate: Block, columns: Sequence[str]) -> list[Cell]:
    """Return the cells of one model's or condition's rates, each with its interval."""
    intervals = rate.get("ci") or {}
    return [
        measurement_cell({**(intervals.get(key) or {}), "value": rate.get(key)}, _RATE_FORMATS[key]) for key in columns
    ]


class _Answers(Record, extra="ignore"):
    """A line of answers.jsonl: a question and the answers of the models; runs may hold those of others."""

    question: str
    target: str
    hybrid: str
    replacement: str
    base: str | None = None


def _read_answers(path: Path) -> list[_Answers]:
    return read_record_lines(_Answers, path) if path.is_file() else []
