"""Writes an attribution graph to a folder: the saved graph, its HTML page, and the files of circuit-tracer's viewer.

Each feature is described by its logit effects (its decoder row through the final norm's weight and the unembedding)
and by its activations on the prompt. A feature store of the run adds the feature's label and top activating examples.
"""

from __future__ import annotations

from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tl_adapters.attribution.graph import AttributionGraph, GraphError
from tl_adapters.attribution.provenance import require_same_pair
from tl_adapters.attribution.pruning import EDGE_THRESHOLD, NODE_THRESHOLD, PrunedGraph, feature_share, prune
from tl_adapters.attribution.targets import token_label
from tl_adapters.features.feature import Feature
from tl_adapters.features.logit_effects import logit_effects
from tl_adapters.features.store import FeatureStore
from tl_adapters.interop.circuit_tracer import (
    CircuitTracerGraph,
    add_to_list,
    listed_graphs,
    node_ids,
    remove_circuit_tracer,
    require_drawable,
    require_slug,
    write_circuit_tracer_data,
)
from tl_adapters.interop.circuit_tracer_features import FeatureRecord
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.pages.graph_viewer import ViewerData, ViewerNode, write_viewer
from tl_adapters.pages.navigation import page_links
from tl_adapters.utils.files import (
    FolderExistsError,
    locked,
    name_new,
    remove_own,
    require_absent,
    require_writable,
    working_folder,
    write_text,
)
from tl_adapters.utils.reading import read_text

CIRCUIT_TRACER_FOLDER = "circuit-tracer"
_GRAPHS = "graphs"
"""What the lock of a folder of graphs, and a graph that is being written, are named after."""
_UNFINISHED = ".unfinished-graph"
"""File with the name, free before, under which a graph is put into its folder, while that lasts."""
_TOP_LOGITS = 8
"""Tokens listed as raised, and as lowered, by a feature."""
_STORE_EXAMPLES = 4
"""Top activating examples taken from the feature store."""
_TOKENS_BEFORE, _TOKENS_AFTER = 12, 6
"""Tokens of an example shown before its token, and from it on."""


class GraphPaths(NamedTuple):
    """Where a written graph can be viewed."""

    page: Path
    """The self-contained HTML page."""
    circuit_tracer: str
    """Address of the graph in circuit-tracer's viewer, with pinned nodes and supernodes."""


def write_graph(
    pair: PairedModel,
    graph: AttributionGraph,
    folder: str | Path,
    name: str | None = None,
    *,
    title: str = "",
    node_threshold: float = NODE_THRESHOLD,
    edge_threshold: float = EDGE_THRESHOLD,
    store: FeatureStore | None = None,
) -> GraphPaths:
    """Write ``name``.html, ``name``/ (the saved graph) and circuit-tracer/ into a folder.

    Args:
        pair: the pair whose features are in the graph.
        graph: a graph made by `attribute`.
        folder: created if it does not exist.
        name: name of the page and of the graph; letters, digits, ``_``, ``.`` and ``-``. None takes the first free one
            of graph-1, graph-2, ...
        title: heading of the page; "" takes the end of the prompt.
        node_threshold, edge_threshold: as in `prune`; the page and circuit-tracer's files hold the pruned graph.
        store: a feature store of the same adapters, for labels and further examples.

    Raises:
        FeatureStoreError: the store belongs to other adapters.
        GraphError: a name or threshold that is not allowed, or a graph of another pair.
        FolderExistsError: a graph of that name exists already.
    """
    folder = Path(folder)
    require_new_graph(folder, name)
    require_same_pair(pair, graph)
    require_drawable(graph.tokens, graph.targets)
    pruned = prune(graph, node_threshold, edge_threshold)
    records = feature_records(pair, graph, pruned, store)
    viewer = viewer_data(graph, pruned, records, title or "".join(graph.display_strings[-12:]))
    # Another process may have taken the name since it was found free, and takes none meanwhile.
    with locked(folder / _GRAPHS), working_folder(folder / _GRAPHS) as work:
        _remove_unfinished(folder)
        name = name or free_graph_name(folder, "graph")
        require_new_graph(folder, name)
        graph.save(work / "graph")
        write_viewer(work / "page", viewer, page_links(folder / f"{name}.html"))
        # This can still be refused: a folder with graphs of other adapters.
        tracer = write_circuit_tracer_data(
            graph,
            folder / CIRCUIT_TRACER_FOLDER,
            name,
            node_threshold=node_threshold,
            edge_threshold=edge_threshold,
            features=records,
        )
        _put_in_place(work, folder, name, tracer)
    return GraphPaths(folder / f"{name}.html", tracer.address)


def _put_in_place(work: Path, folder: Path, name: str, tracer: CircuitTracerGraph) -> None:
    """Name the page and the graph in a working folder, and list the graph, or leave nothing.

    A graph that was not listed would take its name and be in no list, so a process that is killed leaves the name.
    """
    write_text(folder / _UNFINISHED, name)
    with ExitStack() as undone:
        undone.callback(remove_own, folder / _UNFINISHED)
        for part, path in (("page", folder / f"{name}.html"), ("graph", folder / name)):
            name_new(work / part, path)
            undone.callback(remove_own, path)
        add_to_list(folder / CIRCUIT_TRACER_FOLDER, tracer)
        undone.pop_all()
    remove_own(folder / _UNFINISHED)


def require_new_graph(folder: str | Path, name: str | None) -> None:
    """Check that `write_graph` can write a graph under a name, or under a free one; to be called before the graph is
    computed.

    Raises GraphError for a name that is not allowed, FolderExistsError where the name is taken, and WriteError where
    nothing can be written.
    """
    folder = Path(folder)
    require_writable(folder)
    if (folder / _UNFINISHED).exists():
        with locked(folder / _GRAPHS):  # a process that is still writing holds it
            _remove_unfinished(folder)
    if name is None:
        return
    _require_name(name)
    for path in (folder / name, folder / f"{name}.html"):
        require_absent(path)
    if name in listed_graphs(folder / CIRCUIT_TRACER_FOLDER):
        raise FolderExistsError(
            f"{folder / CIRCUIT_TRACER_FOLDER} lists a graph {name!r} already; choose another name."
        )


def _require_name(name: str) -> None:
    """Raises GraphError for a name that no graph can have."""
    require_slug(name)
    if name.lower() == CIRCUIT_TRACER_FOLDER:  # some file systems ignore case
        raise GraphError(f"The name {name!r} is that of the folder of the viewer's files; choose another.")


def _remove_unfinished(folder: Path) -> None:
    """Remove the page and the graph of a process that was killed before it had listed them; under the lock."""
    if not (folder / _UNFINISHED).exists():
        return
    name = read_text(folder / _UNFINISHED)
    _require_name(name)
    if name not in listed_graphs(folder / CIRCUIT_TRACER_FOLDER):
        remove_own(folder / name)
        remove_own(folder / f"{name}.html")
    remove_own(folder / _UNFINISHED)


def free_graph_name(folder: str | Path, prefix: str) -> str:
    """Return the first of prefix-1, prefix-2, ... under which there is neither a graph nor a page in a folder."""
    listed = listed_graphs(Path(folder) / CIRCUIT_TRACER_FOLDER)
    names = (f"{prefix}-{i}" for i in count(1))
    taken = lambda name: any((Path(folder) / file).exists() for file in (name, f"{name}.html"))  # noqa: E731
    return next(name for name in names if name not in listed and not taken(name))


def remove_graph(folder: str | Path, name: str) -> None:
    """Remove everything that `write_graph` wrote under a name; a graph that does not exist is not an error.

    Raises GraphError for a name that is not allowed, or a damaged list of graphs.
    """
    folder = Path(folder)
    remove_circuit_tracer(folder / CIRCUIT_TRACER_FOLDER, name)
    remove_own(folder / name)
    remove_own(folder / f"{name}.html")


@torch.no_grad()
def feature_records(
    pair: PairedModel, graph: AttributionGraph, pruned: PrunedGraph, store: FeatureStore | None = None
) -> dict[tuple[int, int], FeatureRecord]:
    """Return, by (layer, index), the record of every feature of the pruned graph.

    A record holds the feature's logit effects, its activations on the prompt, and the content of ``store``, if given.
    """
    if store is not None:
        store.require_features_of(pair)
    remaining = graph.features[pruned.node_mask[: len(graph.features)]]
    records = {}
    for layer in remaining[:, 0].unique().tolist():
        indices = remaining[remaining[:, 0] == layer][:, 2].unique()
        effects = logit_effects(pair, layer, pair.installed_adapters()[layer].W_dec[indices.to(pair.device)])
        for index, effect in zip(indices.tolist(), effects, strict=True):
            nodes = (graph.features[:, 0] == layer) & (graph.features[:, 2] == index)
            acts = torch.zeros(len(graph.tokens), dtype=graph.activations.dtype)
            acts[graph.features[nodes, 1]] = graph.activations[nodes]
            n_logits = min(_TOP_LOGITS, len(effect))
            top, bottom = effect.topk(n_logits), (-effect).topk(n_logits)
            prompt_example = (graph.display_strings, acts.tolist(), int(acts.argmax()))
            stored = {}
            if store is not None and layer in store.about.layers:
                stored = _stored_fields(store.feature((layer, index)))
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
                    **stored,
                    "examples": [prompt_example, *stored.get("examples", [])],
                },
            )
    return records


def _stored_fields(feature: Feature) -> dict[str, Any]:
    """Return the fields of a record that a feature store supplies.

    Activations are raw, as in the graph; the store holds them in units of the decoder norm.
    """
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
            for e in feature.top_examples[:_STORE_EXAMPLES]
        ],
    }


def viewer_data(
    graph: AttributionGraph, pruned: PrunedGraph, records: dict[tuple[int, int], FeatureRecord], title: str
) -> ViewerData:
    """Return the content of the page of a pruned graph."""
    ids, influence = node_ids(graph), pruned.influence / pruned.influence.sum().clamp(min=1e-30)
    remaining = pruned.node_mask.nonzero()[:, 0].tolist()
    number = {node: i for i, node in enumerate(remaining)}
    nodes = []
    for node in remaining:
        common = dict(id=ids[node], influence=float(influence[node]), cumulative=float(pruned.cumulative[node]))
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
        "shown": len(remaining),
        "influence through features": round(feature_share(graph), 4),
        "conservation residual": f"{graph.residual:.1e}" if graph.adds_up else "a gradient does not add up",
        **{f"fingerprint, {k}": v for k, v in graph.about.get("fingerprints", {}).items() if "." not in k},
    }
    return ViewerData(title, tuple(graph.display_strings), graph.n_layers, tuple(nodes), tuple(links), about)


def _viewer_node(
    graph: AttributionGraph, node: int, records: dict[tuple[int, int], FeatureRecord], common: dict[str, Any]
) -> ViewerNode:
    empty: dict[str, Any] = dict(
        feature=None, activation=None, probability=None, examples=(), top=(), bottom=(), **common
    )
    if node < len(graph.features):
        layer, position, index = graph.features[node].tolist()
        record = records[layer, index]
        fields = empty | dict(
            feature=index,
            activation=float(graph.activations[node]),
            examples=_example_windows(record, position),
            top=tuple(zip(record.top_logits, record.top_effects, strict=True)),
            bottom=tuple(zip(record.bottom_logits, record.bottom_effects, strict=True)),
        )
        return ViewerNode(kind="feature", layer=layer, position=position, label=record.label, **fields)
    if node < graph.first_token:
        layer, position = graph.errors[node - len(graph.features)].tolist()
        return ViewerNode(kind="error", layer=layer, position=position, label="base MLP", **empty)
    if node < graph.first_target:
        position = node - graph.first_token
        return ViewerNode(kind="token", layer=-1, position=position, label=graph.strings[position], **empty)
    target = graph.targets[node - graph.first_target]
    fields = empty | dict(probability=target.probability)
    return ViewerNode(kind="logit", layer=graph.n_layers, position=target.position, label=target.label, **fields)


def _example_windows(record: FeatureRecord, position: int) -> tuple[tuple[tuple[str, float], ...], ...]:
    """Return windows of (token, activation): around the node and the strongest activation on the prompt, then the rest.

    The first example of a record is the prompt.
    """
    (tokens, acts, strongest), *others = record.examples
    windows = []
    for tokens, acts, center in [*((tokens, acts, at) for at in dict.fromkeys((position, strongest))), *others]:
        window = slice(max(0, center - _TOKENS_BEFORE), center + _TOKENS_AFTER)
        windows.append(tuple(zip(tokens[window], acts[window], strict=True)))
    return tuple(windows)
