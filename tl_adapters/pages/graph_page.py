"""A graph into a folder: our own files, the page to look at, and the files of circuit-tracer's viewer.

What a feature promotes is its decoder row through the final norm's weight and the unembedding. Where it fires is this
prompt and, where the run has a feature store, the store's examples; there it has its label, too.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tl_adapters.attribution.graph import AttributionGraph
from tl_adapters.attribution.provenance import require_same_pair
from tl_adapters.attribution.pruning import EDGE_THRESHOLD, NODE_THRESHOLD, PrunedGraph, feature_share, prune
from tl_adapters.attribution.targets import token_label
from tl_adapters.features.feature import Feature
from tl_adapters.features.logit_effects import logit_effects
from tl_adapters.features.store import FeatureStore
from tl_adapters.interop.circuit_tracer import (
    FeatureRecord,
    node_ids,
    remove_circuit_tracer,
    require_slug,
    write_circuit_tracer,
)
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.pages.graph_viewer import ViewerData, ViewerNode, write_page
from tl_adapters.utils.files import require_absent

TOP, EXAMPLES = 8, 4
_WINDOW = 12


class Written(NamedTuple):
    """Where a graph is to be looked at."""

    page: Path
    """The page that needs nothing else."""
    circuit_tracer: str
    """Address within circuit-tracer's viewer, pinned nodes and supernodes shown."""


def write_graph(
    pair: PairedModel,
    graph: AttributionGraph,
    folder: str | Path,
    name: str,
    *,
    title: str = "",
    node_threshold: float = NODE_THRESHOLD,
    edge_threshold: float = EDGE_THRESHOLD,
    store: FeatureStore | None = None,
) -> Written:
    """Write ``name``.html, ``name``/ (our own files) and circuit-tracer/ into a folder.

    Args:
        pair: whose features these are.
        graph: what `attribute` made.
        folder: made if it is not there.
        name: of the page and of the graph; letters, digits, ``_``, ``.`` and ``-``.
        title: the page's heading; "" takes the end of the prompt.
        node_threshold, edge_threshold: as `pruning.prune`; the page and circuit-tracer's files hold what is left.
        store: of the same adapters, for labels and further examples.

    Raises:
        FeatureStoreError: a store of other adapters.
        GraphError: a name or thresholds that are not allowed, or a graph of another pair.
        FolderExistsError: a graph of that name is there.
    """
    require_slug(name)
    require_same_pair(pair, graph)
    require_absent(Path(folder) / name)
    folder = Path(folder)
    pruned = prune(graph, node_threshold, edge_threshold)
    records = feature_records(pair, graph, pruned, store)
    # First what can still be refused (a prompt of one token, a folder of other adapters' graphs): then nothing is left.
    url = write_circuit_tracer(
        graph,
        folder / "circuit-tracer",
        name,
        node_threshold=node_threshold,
        edge_threshold=edge_threshold,
        features=records,
    )
    graph.save(folder / name)
    page = folder / f"{name}.html"
    write_page(page, viewer_data(graph, pruned, records, title or "".join(graph.display_strings[-12:])))
    return Written(page, url)


def remove_graph(folder: str | Path, name: str) -> None:
    """Remove what `write_graph` wrote under a name, and nothing else; no such graph is no error. Raises GraphError."""
    folder = Path(folder)
    remove_circuit_tracer(folder / "circuit-tracer", name)
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / f"{name}.html").unlink(missing_ok=True)


@torch.no_grad()
def feature_records(
    pair: PairedModel, graph: AttributionGraph, pruned: PrunedGraph, store: FeatureStore | None = None
) -> dict[tuple[int, int], FeatureRecord]:
    """What is known of every feature that is left: its logit effects, where in this prompt it fires, and where else."""
    if store is not None:
        store.require_features_of(pair)
    left = graph.features[pruned.node_mask[: len(graph.features)]]
    records = {}
    for layer in left[:, 0].unique().tolist():
        chosen = left[left[:, 0] == layer][:, 2].unique()
        effects = logit_effects(pair, layer, pair.installed_adapters()[layer].W_dec[chosen.to(pair.model.W_E.device)])
        for index, effect in zip(chosen.tolist(), effects, strict=True):
            here = (graph.features[:, 0] == layer) & (graph.features[:, 2] == index)
            acts = torch.zeros(len(graph.tokens), dtype=graph.activations.dtype)
            acts[graph.features[here, 1]] = graph.activations[here]
            top, bottom = effect.topk(min(TOP, len(effect))), (-effect).topk(min(TOP, len(effect)))
            here_first = (graph.display_strings, acts.tolist(), int(acts.argmax()))
            known = {} if store is None or layer not in store.about.layers else _known(store.feature((layer, index)))
            records[layer, index] = FeatureRecord(
                layer,
                index,
                top_logits=[token_label(pair, token) for token in top.indices.tolist()],
                bottom_logits=[token_label(pair, token) for token in bottom.indices.tolist()],
                top_effects=top.values.tolist(),
                bottom_effects=(-bottom.values).tolist(),
                **{
                    "act_min": float(acts.min()),
                    "act_max": float(acts.max()),
                    **known,
                    "examples": [here_first, *known.get("examples", [])],
                },
            )
    return records


def _known(feature: Feature) -> dict[str, Any]:
    """What the store adds to a record. Raw activations, as in the graph: the store's are in decoder-norm units."""
    raw = 1 / feature.decoder_norm if feature.decoder_norm else 0.0
    return {
        "label": feature.label.text if feature.label else "",
        "act_min": 0.0,
        "act_max": feature.max * raw,
        "quantiles": [value * raw for _, value in feature.quantiles],
        "histogram": [float(n) for _, _, n in feature.histogram],
        "activation_frequency": feature.density,
        "examples": [
            (e.display_texts, [value * raw for value in e.values], e.token_index)
            for e in feature.top_examples[:EXAMPLES]
        ],
    }


def viewer_data(
    graph: AttributionGraph, pruned: PrunedGraph, records: dict[tuple[int, int], FeatureRecord], title: str
) -> ViewerData:
    """What is left of the graph, as the page takes it."""
    ids, shares = node_ids(graph), pruned.influence / pruned.influence.sum().clamp(min=1e-30)
    kept = pruned.node_mask.nonzero()[:, 0].tolist()
    number = {node: i for i, node in enumerate(kept)}
    nodes = []
    for node in kept:
        common = dict(id=ids[node], influence=float(shares[node]), cumulative=float(pruned.cumulative[node]))
        nodes.append(_viewer_node(graph, node, records, common))
    links = [
        (number[source], number[target], weight)
        for target, source, weight in zip(
            *graph.edges[:, pruned.edge_mask].tolist(), graph.weights[pruned.edge_mask].tolist(), strict=True
        )
    ]
    about = {
        "linearisation": str(graph.about.get("linearisation", "")),
        "feature nodes": len(graph.features),
        "shown": len(kept),
        "influence through features": round(feature_share(graph), 4),
        "conservation residual": f"{graph.residual:.1e}" if graph.adds_up else "a gradient does not add up",
        **{f"fingerprint, {k}": v for k, v in graph.about.get("fingerprints", {}).items() if "." not in k},
    }
    return ViewerData(title, tuple(graph.display_strings), graph.n_layers, tuple(nodes), tuple(links), about)


def _viewer_node(
    graph: AttributionGraph, node: int, records: dict[tuple[int, int], FeatureRecord], common: dict[str, object]
) -> ViewerNode:
    empty: dict[str, object] = dict(
        feature=None, activation=None, probability=None, examples=(), top=(), bottom=(), **common
    )
    if node < len(graph.features):
        layer, position, index = graph.features[node].tolist()
        record = records[layer, index]
        around = _windows(record, position)
        known = empty | dict(
            feature=index,
            activation=float(graph.activations[node]),
            examples=around,
            top=tuple(zip(record.top_logits, record.top_effects, strict=True)),
            bottom=tuple(zip(record.bottom_logits, record.bottom_effects, strict=True)),
        )
        return ViewerNode(kind="feature", layer=layer, position=position, label=record.label, **known)  # type: ignore[arg-type]
    if node < graph.first_token:
        layer, position = graph.errors[node - len(graph.features)].tolist()
        return ViewerNode(kind="error", layer=layer, position=position, label="base MLP", **empty)  # type: ignore[arg-type]
    if node < graph.first_target:
        position = node - graph.first_token
        label = graph.strings[position]
        return ViewerNode(kind="token", layer=-1, position=position, label=label, **empty)  # type: ignore[arg-type]
    target = graph.targets[node - graph.first_target]
    known = empty | dict(probability=target.probability)
    return ViewerNode(
        kind="logit",
        layer=graph.n_layers,
        position=target.position,
        label=target.label,
        **known,  # type: ignore[arg-type]
    )


def _windows(record: FeatureRecord, position: int) -> tuple[tuple[tuple[str, float], ...], ...]:
    """The prompt around the node, and around where the feature is strongest there; then its examples elsewhere."""
    (tokens, acts, strongest), *elsewhere = record.examples
    places = [(tokens, acts, at) for at in dict.fromkeys((position, strongest))] + elsewhere
    windows = []
    for tokens, acts, at in places:
        part = slice(max(0, at - _WINDOW), at + _WINDOW // 2)
        windows.append(tuple(zip(tokens[part], acts[part], strict=True)))
    return tuple(windows)
