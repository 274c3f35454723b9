"""Attribution as a stage of a study: graphs of a few onsets of hesitation, and their validation on more of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tl_adapters import organism
from tl_adapters.attribution.attribute import attribute
from tl_adapters.attribution.graph import LINEARIZATIONS
from tl_adapters.attribution.pruning import feature_share
from tl_adapters.attribution.targets import LogitTarget, token_id, token_label
from tl_adapters.attribution.validation import (
    compare_linearizations,
    explain_difference,
    mean_over_prompts,
    rank_correlations,
)
from tl_adapters.config import Dtype
from tl_adapters.data.hesitation_words import HESITATION_ONSET
from tl_adapters.errors import UserError
from tl_adapters.features.store import FeatureStore
from tl_adapters.generation.responses import Response, respond
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.pages.graph_page import free_graph_name, remove_graph, require_new_graph, write_graph
from tl_adapters.pages.navigation import GRAPHS_FOLDER, REPORT_PAGE_FILE
from tl_adapters.pages.report import write_report
from tl_adapters.study.open_run import alone_in_run, is_organism_run, open_run, require_adapters
from tl_adapters.study.run_size import StudyScale
from tl_adapters.utils.results import changed_results, output_file, read_results, stage, write_results

N_GRAPHS = 3
"""Graphs of an evaluation; on their prompts the linearizations are compared with ablations too."""
PROBLEMS_PER_PROMPT = 4
"""Problems that are answered for each prompt, since not every answer hesitates."""


def attribution_stage(
    pair: PairedModel, responses: Sequence[Response], folder: Path, split: str, store: FeatureStore | None = None
) -> None:
    """Adds the block attribution: validated graphs of the first hesitation in three of the target's answers."""
    word, graphs = token_id(pair, HESITATION_ONSET), folder / GRAPHS_FOLDER
    with stage(folder, "attribution"):
        _remove_earlier_graphs(folder, graphs)
        onsets = [
            attribute_onset(pair, tokens, LogitTarget(word), graphs, _new_graph_name(folder, graphs), store)
            for tokens in _first_onsets(responses, word, N_GRAPHS)
        ]
        through = [m["influence_through_features"] for m in onsets]
        write_results(
            folder,
            attribution={
                "graphs": len(onsets),
                "split": split,
                "conservation": max((m["residual"] for m in onsets), default=None),
                "influence_through_features": sum(through) / len(through) if through else None,
                **_rank_correlation_fields([m["rank_correlation"] for m in onsets]),
                "moments": onsets,
            },
        )


@alone_in_run
def rank_correlations_of_run(
    folder: Path,
    n_prompts: int = 30,
    *,
    device: str = "auto",
    dtype: Dtype | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Compare the linearizations of a run with ablations on more prompts than its graphs, and return what was measured.

    The rank correlations in the block attribution of results.json are replaced, and the report, where there is one, is
    written again. The prompts are the first onsets of hesitation in the target's own answers to report problems.

    Args:
        folder: of a run on the model organism, made by train or demo.
        n_prompts: number of prompts, and so of answers that hesitate.
        device, dtype: as in `open_run.open_run`.
        progress: show a bar.

    Raises UserError where the run is of another pair, or too few answers hesitate, and what opening a run raises.
    """
    require_adapters(folder)
    if not is_organism_run(folder):
        raise UserError(f"{folder} is of another pair than the model organism, whose problems are answered here.")
    pair = open_run(folder, device, dtype)
    word, asked = token_id(pair, HESITATION_ONSET), organism.problems("report", PROBLEMS_PER_PROMPT * n_prompts)
    with pair.routed("target"):
        responses = respond(pair.model, asked, max_new_tokens=StudyScale().max_new_tokens)
    prompts = _first_onsets(responses, word, n_prompts)
    if len(prompts) < n_prompts:
        raise UserError(f"{len(prompts)} of {len(asked)} answers hesitate; give n_prompts={len(prompts)} or fewer.")
    bar = tqdm(prompts, desc="prompts", disable=not progress, leave=False)
    fields = _rank_correlation_fields([rank_correlations(pair, tokens, LogitTarget(word)) for tokens in bar])
    with changed_results(folder) as results:
        results["attribution"] = {**(results.get("attribution") or {}), **fields}
    if output_file(folder, REPORT_PAGE_FILE).is_file():
        write_report(folder)
    return fields


def _first_onsets(responses: Sequence[Response], word: int, n: int) -> list[tuple[int, ...]]:
    """Prompt and answer up to the first hesitation, of the first ``n`` answers that hesitate and end by themselves."""
    hesitating = [r for r in responses if word in r.tokens and not r.truncated]
    return [(*r.prompt, *r.tokens[: r.tokens.index(word)]) for r in hesitating[:n]]


def _rank_correlation_fields(by_prompt: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    """Means over prompts of the rank correlations with ablations, their intervals, and the value of every prompt."""
    values = {name: [correlations[name] for correlations in by_prompt] for name in LINEARIZATIONS}
    means = {name: mean_over_prompts(of_prompts) for name, of_prompts in values.items()}
    return {
        "rank_correlation": {name: mean.value for name, mean in means.items()},
        "rank_correlation_ci": {name: mean.interval for name, mean in means.items()},
        "rank_correlation_prompts": len(by_prompt),
        "rank_correlation_by_prompt": values,
    }


def _remove_earlier_graphs(folder: Path, graphs: Path) -> None:
    """Remove the graphs of an earlier evaluation, finished or killed; those of the user stay."""
    results = read_results(folder)
    moments = (results.get("attribution") or {}).get("moments", [])
    # Runs of the first release named their graphs in the block attribution only.
    for name in {*results.get("moment_graphs", []), *(Path(moment["page"]).stem for moment in moments)}:
        remove_graph(graphs, name)
    write_results(folder, moment_graphs=[])


def _new_graph_name(folder: Path, graphs: Path) -> str:
    """A free name, kept in results.json before there is a file of it, so that a killed evaluation leaves no graph."""
    name = free_graph_name(graphs, "moment")
    with changed_results(folder) as results:
        results["moment_graphs"] = [*results.get("moment_graphs", []), name]
    return name


def attribute_onset(
    pair: PairedModel,
    tokens: Sequence[int],
    target: LogitTarget,
    folder: Path,
    name: str,
    store: FeatureStore | None = None,
) -> dict[str, Any]:
    """Writes the graph of one onset and validates it; returns its record for results.json."""
    require_new_graph(folder, name)
    graph = attribute(pair, tokens, progress=False)
    if target.token not in [t.token for t in graph.targets]:
        likeliest = [LogitTarget(t.token) for t in graph.targets if t.token is not None]
        graph = attribute(pair, tokens, [*likeliest, target], progress=False)
    page, _ = write_graph(
        pair, graph, folder, name, node_threshold=0.95, store=store
    )  # at 0.8, token nodes would be most of it
    difference = explain_difference(pair, tokens, target, progress=False)
    probability = next(t.probability for t in graph.targets if t.token == target.token)
    return {
        "page": f"{folder.name}/{page.name}",
        "prompt": graph.text,
        "word": token_label(pair, int(target.token)),
        "probability": probability,
        "residual": graph.residual,
        "influence_through_features": feature_share(graph),
        "difference": {
            part: getattr(difference, part)
            for part in ("replacement", "hybrid", "features", "decoder_biases", "unexplained")
        },
        **compare_linearizations(pair, tokens, target),
    }
