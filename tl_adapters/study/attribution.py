"""Attribution as a stage of a study: graphs of a few onsets of hesitation, and their validation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tl_adapters.attribution.attribute import attribute
from tl_adapters.attribution.graph import LINEARIZATIONS
from tl_adapters.attribution.pruning import feature_share
from tl_adapters.attribution.targets import LogitTarget, token_id, token_label
from tl_adapters.attribution.validation import compare_linearizations, explain_difference
from tl_adapters.data.hesitation_words import HESITATION_ONSET
from tl_adapters.features.store import FeatureStore
from tl_adapters.generation.responses import Response
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.pages.graph_page import free_graph_name, remove_graph, require_new_graph, write_graph
from tl_adapters.utils.results import changed_results, read_results, stage, write_results

N_GRAPHS = 3


def attribution_stage(
    pair: PairedModel, responses: Sequence[Response], folder: Path, split: str, store: FeatureStore | None = None
) -> None:
    """Adds the block attribution: validated graphs of the first hesitation in three of the target's answers."""
    word = token_id(pair, HESITATION_ONSET)
    prompts = [
        (*response.prompt, *response.tokens[: response.tokens.index(word)])
        for response in responses
        if word in response.tokens and not response.truncated
    ][:N_GRAPHS]
    graphs = folder / "graphs"
    with stage(folder, "attribution"):
        _remove_earlier_graphs(folder, graphs)
        onsets = [
            attribute_onset(pair, tokens, LogitTarget(word), graphs, _new_graph_name(folder, graphs), store)
            for tokens in prompts
        ]
        mean = lambda values: sum(values) / len(values) if values else None  # noqa: E731
        write_results(
            folder,
            attribution={
                "graphs": len(onsets),
                "split": split,
                "conservation": max((m["residual"] for m in onsets), default=None),
                "influence_through_features": mean([m["influence_through_features"] for m in onsets]),
                "rank_correlation": {
                    name: mean([r for m in onsets if (r := m["rank_correlation"][name]) is not None])
                    for name in LINEARIZATIONS
                },
                "moments": onsets,
            },
        )


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
