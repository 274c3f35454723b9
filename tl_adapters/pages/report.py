"""report.html of a run: one self-contained page made from what the run wrote, and from nothing else.

It reads results.json and the .jsonl files of the run folder, so it can be made anew at any time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tl_adapters.circuits.results_block import upgraded_block
from tl_adapters.data.hesitation_words import HIGHLIGHTED_WORDS
from tl_adapters.utils.files import write_text
from tl_adapters.utils.html import escape, highlight_words, measurement_cell, page, table
from tl_adapters.utils.plots import Line, plot
from tl_adapters.utils.results import read_results

REPORT_PAGE = "report.html"
Block = dict[str, Any]


def write_report(folder: str | Path) -> Path:
    """Write report.html into a run folder and return its path."""
    folder = Path(folder)
    results = read_results(folder)
    sections = [_head(results), _summary(results)]
    metrics = _lines(folder / "metrics.jsonl")
    if metrics:
        sections.append(_training(metrics, _lines(folder / "validation.jsonl"), results.get("train", {})))
    if "faithfulness" in results:
        sections.append(_faithfulness(results["faithfulness"]))
    if "baselines" in results:
        sections.append(_baselines(results["baselines"]))
    if "behaviour" in results:
        sections.append(_behaviour(results["behaviour"]))
    if "labels" in results.get("features", {}):
        sections.append(_features(results["features"]))
    if results.get("labels"):
        sections.append(_judged(results["labels"]))
    if (results.get("attribution") or {}).get("graphs"):
        sections.append(_attribution(results["attribution"]))
    if results.get("hesitation"):
        sections.append(_hesitation(upgraded_block(results["hesitation"])))
    answers = _lines(folder / "answers.jsonl")
    if answers:
        sections.append(_answers(answers))
    sections.append(_origin(results))
    path = folder / REPORT_PAGE
    write_text(path, page("What reasoning training changed", "\n".join(sections)))
    return path


def _lines(path: Path) -> list[Block]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _head(results: Block) -> str:
    pair = results["pair"]
    return (
        "<h1>What reasoning training changed</h1>"
        f'<p class="soft">Transcoder adapters between <b>{escape(pair["base"])}</b> (base) and '
        f"<b>{escape(pair['target'])}</b> (target): {pair['n_layers']} layers, d_model {pair['d_model']}, "
        f"{results['train']['n_features']} features per layer.</p>"
    )


def _summary(results: Block) -> str:
    rows = []
    if "faithfulness" in results:
        f = results["faithfulness"]
        partial = [
            *f["partial_of_full"]["first"][:-1],
            *f["partial_of_full"]["last"][1:],
            *f["partial_of_full"]["only"],
        ]
        worst = max(partial, key=lambda fig: -math.inf if fig["value"] is None else fig["value"])
        l0 = [fig["value"] for fig in f["l0"]]
        rows += [
            ["KL(target || replacement)", _figure(f["kl"]["replacement"])],
            ["KL(target || hybrid)", _figure(f["kl"]["hybrid"])],
            ["replacement's KL as a share of the hybrid's", _figure(f["kl_of_hybrid"], percent=True)],
            ["worst partial replacement, KL over the full one's", _figure(worst)],
            ["same likeliest token as the target", _figure(f["top1_agreement"], percent=True)],
            ["active features per token and layer (L0), mean", f"{sum(l0) / len(l0):.2f}"],
        ]
    if "behaviour" in results:
        b = results["behaviour"]
        rows += [
            ["accuracy recovered, against the hybrid", _figure(b["recovered"]["hybrid"], percent=True)],
            ["accuracy recovered, against the base", _figure(b["recovered"]["base"], percent=True)],
        ]
    note = (
        '<p class="soft">Intervals are 95 % intervals over held-out documents or problems. KL is in nats per '
        "response token, on the target's own greedy text.</p>"
    )
    return table(["figure", "measured"], rows) + note if rows else ""


def _training(metrics: Sequence[Block], held_out: Sequence[Block], train: Block) -> str:
    steps = [m["step"] for m in metrics]
    labels = {"output_kl": "output KL", "forward_bridge": "forward bridge", "backward_bridge": "backward bridge"}
    # A bridge whose cut leaves it no layer of the replacement is 0: no value on a logarithmic scale, so a gap.
    kls = [Line(label, steps, [m[key] or float("nan") for m in metrics]) for key, label in labels.items()]
    l0 = [Line(f"layer {i}", steps, [m["l0"][i] for m in metrics]) for i in range(len(metrics[0]["l0"]))]
    nmse = [Line("training", steps, [m["nmse"] for m in metrics])]
    if held_out:
        at = [v["step"] for v in held_out]
        kls.append(Line("output KL, held out", at, [v["output_kl"] for v in held_out], dashed=True))
        nmse.append(Line("held out", at, [v["nmse"] for v in held_out], dashed=True))
    seconds = f" in {train['seconds']:.0f} s" if "seconds" in train else ""
    plots = [
        plot(kls, xlabel="step", ylabel="nats per token", caption="The three divergences of the objective.", log=True),
        plot(nmse, xlabel="step", ylabel="NMSE", caption="Error of the residual stream, mean over places.", log=True),
        plot(l0, xlabel="step", ylabel="L0", caption="Active features per token.", log=True),
    ]
    text = f"<p>{train['steps']} steps, {train['tokens']:,} tokens{seconds}. Training batches, all tokens.</p>"
    return f'<h2>Training</h2>{text}<div class="plots">{"".join(plots)}</div>'


def _faithfulness(f: Block) -> str:
    n = len(f["l0"])
    layers = list(range(n))
    by_layer = [
        _banded("first layers, 0..i", layers, f["kl_first"]),
        _banded("last layers, i..L-1", layers, f["kl_last"]),
        _banded("layer i alone", layers, f["kl_only"]),
        Line("hybrid", [0, n - 1], [f["kl"]["hybrid"]["value"]] * 2, dashed=True),
        Line("full replacement", [0, n - 1], [f["kl"]["replacement"]["value"]] * 2, dashed=True),
    ]
    places = list(range(n + 1))
    nmse = [
        _banded("response tokens", places, f["nmse"]),
        _banded("all tokens", places, f["nmse_all_tokens"]),
        _banded("all but position 0", places, f["nmse_without_position_0"]),
    ]
    l0 = [_banded("response tokens", layers, f["l0"]), _banded("all tokens", layers, f["l0_all_tokens"])]
    plots = [
        plot(by_layer, xlabel="layer i", ylabel="KL, nats per token", log=True, whole=True,
             caption="KL(target || partial replacement), beside the hybrid and full replacement."),
        plot(nmse, xlabel="after layer (0: embedding)", ylabel="NMSE", whole=True,
             caption="Squared error of the replacement's residual stream over the target's squares."),
        plot(l0, xlabel="layer", ylabel="L0", whole=True, caption="Active features per token."),
    ]  # fmt: skip
    tokens = f["tokens"]
    text = (
        f"<p>On {tokens['response']:,} response tokens ({tokens['all']:,} in all) of the target's greedy text on "
        f"problems of the {escape(f['l0'][0]['split'])} split. Dead features per layer: "
        f"{', '.join(map(str, f['dead']))}.</p>"
    )
    return f'<h2>Faithfulness</h2>{text}<div class="plots">{"".join(plots)}</div>'


def _baselines(b: Block) -> str:
    rows = [[escape(row["name"]), _figure(row["kl"])] for row in b["rows"]]
    needed = b["rank_for_same_kl"]
    said = f"The smallest rank tried that is at least as close as the adapters: <b>{needed}</b>." if needed else (
        "No rank that was tried comes as close as the adapters."
    )  # fmt: skip
    text = (
        "<p>Simpler stand-ins for the same MLP difference. Both see the target's MLP at work for every token, which an "
        f"adapter never does; n is the adapters' L0, rounded up. {said}</p>"
    )
    return f"<h2>What that KL is worth</h2>{text}" + table(["added to the base MLP", "KL(target || it)"], rows)


def _behaviour(b: Block) -> str:
    rows = []
    for name in ("base", "target", "hybrid", "replacement"):
        rate = b[name]
        cells = [
            measurement_cell({**(rate["ci"].get(key) or {}), "value": rate[key]}, fmt)
            for key, fmt in (
                ("accuracy", _percent), ("length", _one), ("hesitation_per_1k", _one), ("think_opened", _percent),
                ("truncated", _percent),
            )
        ]  # fmt: skip
        rows.append([name, *cells])
    header = ["model", "accuracy", "length, tokens", "hesitations per 1,000", "opens thinking", "cut at the limit"]
    text = (
        f"<p>{b['target']['n']:,} problems of the {escape(b['target']['split'])} split, greedy decoding. "
        "<i>Base</i> is the real base model; the <i>hybrid</i> has the target's attention and the base's MLPs; the "
        "<i>replacement</i> adds the adapters.</p>"
    )
    return f"<h2>Behaviour</h2>{text}" + table(header, rows)


def _features(b: Block) -> str:
    neurons = b["neurons"]
    rows = [
        [
            escape(category),
            _figure(share["weighted"], percent=True),
            _figure(neurons["labels"][category]["weighted"], percent=True) if category in neurons["labels"] else "",
        ]
        for category, share in b["labels"].items()
    ]
    link = f'<a href="{escape(b["page"])}">what each of them fires on and promotes</a>'
    text = (
        f"<p>{b['alive']:,} of {b['total']:,} features are alive on {b['tokens']:,} tokens ({escape(b['split'])} "
        f"split, the {escape(b['stream'])}'s stream): {link}. Labels are by rules that need no model; beside them, as "
        f"a measure, the same rules on the target's MLP neurons, of each token and layer the {neurons['per_token']} "
        f"that write most ({neurons['alive']:,} of {neurons['total']:,} alive).</p>"
    )
    layers = [layer["layer"] for layer in b["agreement"]]
    plots = [
        plot(
            [
                _banded("on both, of firings on either", layers, [layer["overlap"] for layer in b["agreement"]]),
                _banded("on both, of the replacement's", layers, [layer["kept"] for layer in b["agreement"]]),
            ],
            xlabel="layer",
            ylabel="share of firings",
            whole=True,
            caption="How far features fire alike on the target's own residual stream and on the replacement's.",
        )
    ]
    shown = table(["called", "features", "neurons"], rows)
    return f'<h2>What the features are</h2>{text}{shown}<div class="plots">{"".join(plots)}</div>'


def _judged(b: Block) -> str:
    out = ["<h2>What a model calls them</h2>"]
    if judge := b.get("judge"):
        again = (
            f" Judged a second time, {_percent(judge['agreement']['value'])} of {judge['agreement']['n']} got the same "
            "category."
            if judge["agreement"]
            else ""
        )
        rows = [[escape(c), str(s["count"]), _figure(s["weighted"], percent=True)] for c, s in judge["shares"].items()]
        out.append(
            f"<p>{judge['judged']:,} of {judge['alive']:,} alive features, sorted by {escape(judge['model'])} into the "
            f"paper's categories.{again}</p>" + table(["category", "judged", "of the alive"], rows)
        )
    if test := b.get("detection"):
        rows = [
            [unit, str(test[unit]["score"]["n"]), _figure(test[unit]["score"])]
            for unit in ("features", "neurons")
            if test[unit]
        ]
        out.append(
            f"<p>Described by {escape(test['model'])} from some examples, and told apart by the description on others, "
            "features and neurons mixed blind: balanced accuracy, where 0.5 is chance.</p>"
            + table(["of", "tested", "detection score"], rows)
        )
    return "".join(out)


def _attribution(b: Block) -> str:
    rows = []
    for moment in b["moments"]:
        d = moment["difference"]
        link = f'<a href="{escape(moment["page"])}">{escape(moment["prompt"][-40:])}</a>'
        cells = [_percent(moment["probability"]), _percent(moment["influence_through_features"])]
        rows.append([link, *cells, *(f"{d[part]:+.2f}" for part in ("hybrid", "features", "decoder_biases"))])
        rows[-1] += [f"{d['unexplained']:+.2f}", f"{d['replacement']:+.2f}"]
    header = ["before it says it (graph)", "P(word)", "influence through features", "logit in the hybrid", "+ features"]
    text = (
        f"<p>What makes the replacement say {escape(repr(b['moments'][0]['word']))}: RelP graphs of the first "
        f"hesitation in {b['graphs']} answers. Every row of a graph adds up to its target (largest residual "
        f"{b['conservation']:.1e}); what the patterns, norms and gates do that the adapters move is not in it "
        "(unexplained).</p>"
    )
    ranked = [[name, "-" if value is None else f"{value:.2f}"] for name, value in b["rank_correlation"].items()]
    truth = (
        "<p>Adding up is no proof. Rank correlation of the attributed with the real effect of taking each active "
        "feature away, mean over these moments:</p>" + table(["linearisation", "rank correlation"], ranked)
    )
    curve = b["moments"][0]["curve"]
    plots = [
        plot(
            [Line(name, lines["n"], lines[kind]) for name, lines in curve.items()],
            xlabel="first n features of the ranking",
            ylabel="share of the features' effect on the logit",
            caption=f"{kind.capitalize()} the first n features by each ranking, in the real model; first moment.",
        )
        for kind in ("keeping", "removing")
    ]
    shown = table([*header, "+ b_dec", "unexplained", "= logit"], rows)
    return f'<h2>Why it hesitates</h2>{text}{shown}{truth}<div class="plots">{"".join(plots)}</div>'


def _hesitation(b: Block) -> str:
    circuit = b.get("circuit") or {}
    kinds = ("output", "template", "continuation", "other")
    roles = ", ".join(f"{circuit[role]:,} {role}" for role in kinds if circuit.get(role) is not None)
    share = circuit.get("share_of_alive")
    share = share.get("value") if isinstance(share, dict) else share
    words = ", ".join(map(escape, b.get("words") or [])) or f"what {escape(str(b.get('function')))} finds"
    of = "" if share is None else f" ({_percent(share)} of the alive)"
    link = f'<a href="{escape(b.get("page") or "hesitation.html")}">the circuit, its features and every arm</a>'
    stronger = f"the whole circuit, at strength {circuit.get('strength') or 1:g}"
    rows = []
    for block, title in (("necessity", "taken out of the replacement"), ("sufficiency", "added to the hybrid")):
        for arm in ("none", "output", "template", "circuit", "circuit_at_strength", "random"):
            if rate := (b.get(block) or {}).get(arm):
                named = {"circuit": "the whole circuit", "circuit_at_strength": stronger}.get(arm, arm)
                rows.append([f"{named}, {title}", *_rate_cells(rate)])
    header = ["features", "accuracy", "length, tokens", "hesitations per 1,000"]
    text = f"<p>The features that make it say {words}: {roles or 'none of any role'} features{of}. See {link}.</p>"
    reached = [c.get("reached") for c in b.get("criteria") or []]
    open_ = f"; {reached.count(None)} not known, for want of problems" if None in reached else ""
    said = f"<p>{reached.count(True)} of {len(reached)} criteria reached{open_}.</p>" if reached else ""
    return f"<h2>The hesitation circuit</h2>{text}{table(header, rows) if rows else ''}{said}"


def _rate_cells(rate: Block) -> list[str]:
    cells = []
    for key, fmt in (("accuracy", _percent), ("length", _one), ("hesitation_per_1k", _one)):
        cells.append(measurement_cell({**((rate.get("ci") or {}).get(key) or {}), "value": rate.get(key)}, fmt))
    return cells


def _answers(answers: Sequence[Block]) -> str:
    out = ["<h2>The same problem, three times</h2>"]
    for answer in answers:
        boxes = "".join(
            f"<div><h4>{name}</h4><pre>{highlight_words(answer[name], HIGHLIGHTED_WORDS)}</pre></div>"
            for name in ("target", "hybrid", "replacement")
        )
        out.append(f"<p><b>{escape(answer['question'])}</b></p><div class='answers'>{boxes}</div>")
    return "".join(out)


def _origin(results: Block) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items() if version)
    recipe = f"; recipe of the pair {escape(results['pair']['recipe'])}" if "recipe" in results["pair"] else ""
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in results.get("seconds", {}).items())
    return (
        f'<h2>Where this comes from</h2><p class="soft">{escape(versions)}.<br>{escape(seconds)}.<br>'
        f"Seed {escape(str(results.get('seeds')))}{recipe}. All figures are in results.json beside this page.</p>"
    )


def _banded(label: str, x: Sequence[float], figures: Sequence[Block]) -> Line:
    values, lows, highs = (
        [math.nan if f[key] is None else f[key] for f in figures] for key in ("value", "low", "high")
    )
    return Line(label, x, values, (lows, highs))


def _figure(figure: Block, percent: bool = False) -> str:
    return measurement_cell(figure, _percent if percent else _short)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _one(value: float) -> str:
    return f"{value:.1f}"


def _short(value: float) -> str:
    return f"{value:.3g}"
