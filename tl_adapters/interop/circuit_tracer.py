r"""Attribution graphs as files that circuit-tracer's viewer and Neuronpedia read.

graph-metadata.json      the graphs of the folder, one entry each
<slug>.json              one pruned graph: its nodes and links, and the nodes that are pinned at first
features/                the files of its features (`circuit_tracer_features`)
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import tl_adapters
from tl_adapters.attribution.graph import AttributionGraph, GraphError
from tl_adapters.attribution.pruning import (
    EDGE_THRESHOLD,
    NODE_THRESHOLD,
    PrunedGraph,
    feature_share,
    graph_scores,
    prune,
)
from tl_adapters.interop.circuit_tracer_features import (
    VIEWER_FEATURES_FOLDER,
    FeatureRecord,
    cantor_number,
    viewer_json,
    write_feature_file,
)
from tl_adapters.utils.files import locked, remove_own, write_text
from tl_adapters.utils.reading import Record, as_record, read_json_object, shown, unreadable_as

GRAPH_LIST_FILE = "graph-metadata.json"
CIRCUIT_TRACER_SCHEMA_VERSION = 1
_LONGEST_SLUG = 200
_SCAN = "./data/features"
"""Value of "scan" with which the viewer reads the feature files beside the graphs and not those on the hub."""


def write_circuit_tracer(
    graph: AttributionGraph,
    folder: str | Path,
    slug: str,
    *,
    node_threshold: float = NODE_THRESHOLD,
    edge_threshold: float = EDGE_THRESHOLD,
    features: Mapping[tuple[int, int], FeatureRecord] | None = None,
    supernodes: Mapping[str, list[str]] | None = None,
) -> str:
    """Write a pruned graph and its features for circuit-tracer's viewer; other graphs in the folder stay.

    Args:
        graph: the graph of a prompt of at least two tokens; the viewer shows nothing of a shorter prompt.
        folder: created if it does not exist. A graph with the same slug is replaced.
        slug: name of the graph: ASCII letters, digits, ``_``, ``.`` and ``-``.
        node_threshold, edge_threshold: as in `prune`.
        features: records by (layer, index). A feature without a record keeps its file in the folder, or gets an empty
            one, for which the viewer shows an empty panel and not an error.
        supernodes: by the name of the group, ids of its nodes ("{layer}_{index}_{position}", "E_{token}_{position}",
            ...). Nodes that were pruned are left out.

    Returns:
        The address of the viewer's page with the supernodes and the targets pinned; the files alone do not show
        supernodes.

    Raises:
        GraphError: a slug, prompt or supernode that cannot be shown, values that are not finite, thresholds outside
            (0, 1], or a folder whose list of graphs is damaged or belongs to other adapters.
        WriteError.
    """
    options = {"node_threshold": node_threshold, "edge_threshold": edge_threshold}
    data = write_circuit_tracer_data(graph, folder, slug, features=features, supernodes=supernodes, **options)
    add_to_list(folder, data)
    return data.address


class CircuitTracerGraph(NamedTuple):
    """A graph whose data are in a folder, and which is not in the folder's list yet."""

    metadata: dict[str, Any]
    """Its entry in the list."""
    address: str
    """Its address in the viewer, with pinned nodes and supernodes."""


def require_drawable(tokens: Sized, targets: Sized | None = None) -> None:
    """Raises GraphError for a prompt, or a graph's targets, that circuit-tracer's viewer cannot show."""
    if len(tokens) < 2:
        raise GraphError("The viewer does not show a prompt of one token; give a longer one.")
    if targets is not None and len(targets) == 0:
        raise GraphError("The viewer does not show a graph without targets; attribute one at least.")


def write_circuit_tracer_data(
    graph: AttributionGraph,
    folder: str | Path,
    slug: str,
    *,
    node_threshold: float,
    edge_threshold: float,
    features: Mapping[tuple[int, int], FeatureRecord] | None = None,
    supernodes: Mapping[str, list[str]] | None = None,
) -> CircuitTracerGraph:
    """Write what `write_circuit_tracer` writes, except for the entry in the list; everything is checked before."""
    require_slug(slug)
    require_drawable(graph.tokens, graph.targets)
    folder = Path(folder)
    pruned = prune(graph, node_threshold, edge_threshold)
    ids = node_ids(graph)
    groups = _surviving_supernodes(ids, pruned, supernodes or {})
    targets = ids[graph.first_target :]
    pinned = list(dict.fromkeys([*(node for group in groups for node in group[1:]), *targets]))
    metadata = _metadata(graph, slug, node_threshold, edge_threshold)
    shown = {"pinnedIds": pinned, "supernodes": groups, "linkType": "both", "clickedId": targets[0], "sg_pos": ""}
    record = {
        "metadata": metadata,
        "qParams": shown,
        "nodes": _nodes(graph, pruned, ids, features or {}),
        "links": _links(graph, pruned, ids),
    }
    graph_text = viewer_json(record)
    viewer_json({"graphs": _with_entry(folder / GRAPH_LIST_FILE, metadata)})
    _write_features(graph, pruned, folder / VIEWER_FEATURES_FOLDER, features or {})
    write_text(folder / f"{slug}.json", graph_text)
    query = {"slug": slug, "supernodes": json.dumps(groups), "pinnedIds": ",".join(pinned)}
    return CircuitTracerGraph(metadata, f"index.html?{urlencode(query, quote_via=quote)}")


def add_to_list(folder: str | Path, graph: CircuitTracerGraph) -> None:
    """Add a graph to the folder's list, last of all, so that the list names complete graphs only."""
    path = Path(folder) / GRAPH_LIST_FILE
    with locked(path):
        write_text(path, viewer_json({"graphs": _with_entry(path, graph.metadata)}))


def listed_graphs(folder: str | Path) -> list[str]:
    """The slugs in a folder's list of graphs; none where there is no list. Raises GraphError where it is damaged."""
    path = Path(folder) / GRAPH_LIST_FILE
    return [str(entry.get("slug")) for entry in _read_list(path)] if path.exists() else []


def remove_circuit_tracer(folder: str | Path, slug: str) -> None:
    """Remove a graph that `write_circuit_tracer` wrote; feature files stay, since other graphs may show them.

    Raises GraphError for a slug that is not allowed, or a damaged list of graphs.
    """
    require_slug(slug)
    path = Path(folder) / GRAPH_LIST_FILE
    if path.is_file():
        with locked(path):
            graphs = [entry for entry in _read_list(path) if entry.get("slug") != slug]
            write_text(path, viewer_json({"graphs": graphs}))
    remove_own(Path(folder) / f"{slug}.json")


def node_ids(graph: AttributionGraph) -> list[str]:
    """Return the viewer's id of every node, in the order of the graph.

    Raises GraphError if two targets are the same.
    """
    tokens = _prompt_tokens(graph)
    ids = [f"{layer}_{index}_{position}" for layer, position, index in graph.features.tolist()]
    # circuit-tracer once wrote 0_layer_position for error nodes, which is also the id of a feature of layer 0.
    ids += [f"{layer}_-1_{position}" for layer, position in graph.errors.tolist()]
    ids += [f"E_{token}_{position}" for position, token in enumerate(tokens)]
    target_tokens = _target_tokens(graph)
    ids += [
        f"{graph.n_layers + 1}_{token}_{target.position}"
        for token, target in zip(target_tokens, graph.targets, strict=True)
    ]
    if len(set(ids)) < len(ids):
        raise GraphError(
            "Two nodes of the graph have the same id and the viewer would show one; name each target once."
        )
    return ids


def require_slug(slug: str) -> None:
    """Raise GraphError for a name that cannot be a file name and part of an address."""
    if not re.fullmatch(r"[\w.-]+", slug, re.ASCII) or not slug.strip("."):
        raise GraphError(
            f"The slug {slug!r} is not allowed in file names and URLs; use letters, digits, '_', '.' and '-' only."
        )
    if len(slug) > _LONGEST_SLUG:
        raise GraphError(f"The slug {slug[:40]}... has {len(slug)} characters; allowed are {_LONGEST_SLUG}.")
    if f"{slug}.json".lower() == GRAPH_LIST_FILE:  # some file systems ignore case
        raise GraphError(f"The slug {slug!r} would overwrite {GRAPH_LIST_FILE}; choose another.")


def _prompt_tokens(graph: AttributionGraph) -> list[int]:
    """Return the ids of the prompt's tokens, from which its text could be read; 0 where that is withheld."""
    return [0] * len(graph.tokens) if graph.about.get("texts_withheld") else graph.tokens.tolist()


def _target_tokens(graph: AttributionGraph) -> list[int]:
    """Return the vocabulary index of each target; targets that are not logits get indices past the vocabulary."""
    named_tokens = [*graph.tokens.tolist(), *(target.token for target in graph.targets if target.token is not None)]
    d_vocab = int(graph.about.get("d_vocab") or max(named_tokens, default=-1) + 1)
    return [
        d_vocab + i if target.token is None or target.against is not None else target.token
        for i, target in enumerate(graph.targets)
    ]


def _metadata(graph: AttributionGraph, slug: str, node_threshold: float, edge_threshold: float) -> dict[str, Any]:
    """Return the metadata of a graph, which is in its own file and in the list of the folder."""
    replacement, completeness = graph_scores(graph)
    targets = ", ".join(target.label for target in graph.targets)
    return {
        "slug": slug,
        "scan": _SCAN,
        "transcoder_list": _adapter_fingerprints(graph),
        "prompt_tokens": graph.display_strings,
        "prompt": graph.text,
        "node_threshold": node_threshold,
        "schema_version": CIRCUIT_TRACER_SCHEMA_VERSION,
        # The entries from here on are for Neuronpedia and for readers of the file.
        "info": {
            "description": f"What {targets} owes to the features of transcoder adapters.",
            "creator_name": "",
            "source_urls": [],
            "generator": {"name": "tl-adapters", "version": tl_adapters.__version__, "url": ""},
            "create_time_ms": int(time.time() * 1000),
        },
        "generation_settings": _generation_settings(graph),
        "pruning_settings": {"node_threshold": node_threshold, "edge_threshold": edge_threshold},
        "tl_adapters": {
            "conservation_residual": graph.residual,
            "feature_share": feature_share(graph),
            "replacement_score": replacement,
            "completeness_score": completeness,
        },
    }


def _adapter_fingerprints(graph: AttributionGraph) -> list[str]:
    """Return the fingerprint of the graph's adapters, or nothing if it is not known."""
    fingerprint = (graph.about.get("fingerprints") or {}).get("adapters")
    return [] if fingerprint is None else [str(fingerprint)]


def _generation_settings(graph: AttributionGraph) -> dict[str, Any]:
    """Return the settings the graph was made with; where they are not recorded, the values they resulted in."""
    results = {
        "max_n_logits": len(graph.targets),
        "desired_logit_prob": min(1.0, sum(target.probability or 0.0 for target in graph.targets)),
        "batch_size": 1,  # does not affect the graph
        "max_feature_nodes": int((graph.rows < len(graph.features)).sum()),
    }
    return {key: value if graph.about.get(key) is None else graph.about[key] for key, value in results.items()}


def _surviving_supernodes(ids: list[str], pruned: PrunedGraph, supernodes: Mapping[str, list[str]]) -> list[list[str]]:
    """Return [name, members...] of every supernode with members that were not pruned.

    Raises GraphError for members that are not nodes of the graph.
    """
    unknown = sorted({node for members in supernodes.values() for node in members} - set(ids))
    if unknown:
        raise GraphError(f"The graph has no nodes {', '.join(unknown[:5])}; its ids look like {ids[0]} and {ids[-1]}.")
    surviving = {node for node, survives in zip(ids, pruned.node_mask.tolist(), strict=True) if survives}
    groups = [[name, *(node for node in members if node in surviving)] for name, members in supernodes.items()]
    return [group for group in groups if len(group) > 1]


def _nodes(
    graph: AttributionGraph, pruned: PrunedGraph, ids: list[str], features: Mapping[tuple[int, int], FeatureRecord]
) -> list[dict[str, Any]]:
    """Return the nodes that survive pruning, each with every key: without one the viewer hides the node or the page."""
    nodes = [*_feature_nodes(graph, features), *_error_nodes(graph), *_token_nodes(graph), *_target_nodes(graph)]
    common = {"token_prob": 0.0, "is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0, "clerp": ""}
    common |= {"activation": None}
    influence: list[float | None] = list(pruned.cumulative.tolist())
    influence[graph.first_target :] = [None] * len(graph.targets)
    survives = pruned.node_mask.tolist()
    return [
        {"node_id": ids[i], **common, **node, "influence": influence[i]} for i, node in enumerate(nodes) if survives[i]
    ]


def _feature_nodes(graph: AttributionGraph, features: Mapping[tuple[int, int], FeatureRecord]) -> list[dict[str, Any]]:
    return [
        {
            "feature": cantor_number(layer, index),
            "layer": str(layer),
            "ctx_idx": position,
            "feature_type": "cross layer transcoder",  # the viewer shows no features of any other type
            "jsNodeId": f"{layer}_{index}-0",
            "activation": activation,
            "clerp": features[layer, index].label if (layer, index) in features else "",
        }
        for (layer, position, index), activation in zip(
            graph.features.tolist(), graph.activations.tolist(), strict=True
        )
    ]


def _error_nodes(graph: AttributionGraph) -> list[dict[str, Any]]:
    return [
        {
            "feature": -1,
            "layer": str(layer),
            "ctx_idx": position,
            "feature_type": "mlp reconstruction error",
            "jsNodeId": f"{layer}_-1-{position}",
        }
        for layer, position in graph.errors.tolist()
    ]


def _token_nodes(graph: AttributionGraph) -> list[dict[str, Any]]:
    return [
        {
            "feature": position,
            "layer": "E",
            "ctx_idx": position,
            "feature_type": "embedding",
            "jsNodeId": f"E_{token}-{position}",
        }
        for position, token in enumerate(_prompt_tokens(graph))
    ]


def _target_nodes(graph: AttributionGraph) -> list[dict[str, Any]]:
    nodes = []
    for i, (target, token) in enumerate(zip(graph.targets, _target_tokens(graph), strict=True)):
        share = target.weight if target.probability is None else target.probability
        nodes.append(
            {
                "feature": token,
                "layer": str(graph.n_layers + 1),
                "ctx_idx": target.position,
                "feature_type": "logit",
                "token_prob": share,
                "is_target_logit": i == 0,
                "jsNodeId": f"L_{token}-{target.position}",
                "clerp": f'Output "{target.label}" (p={share:.3f})',  # without "(p=" the viewer's page stays blank
            }
        )
    return nodes


def _links(graph: AttributionGraph, pruned: PrunedGraph, ids: list[str]) -> list[dict[str, Any]]:
    targets, sources = graph.edges[:, pruned.edge_mask].tolist()
    return [
        {"source": ids[source], "target": ids[target], "weight": weight}
        for target, source, weight in zip(targets, sources, graph.weights[pruned.edge_mask].tolist(), strict=True)
    ]


def _with_entry(path: Path, metadata: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the folder's list of graphs with this graph in it, in place of one with the same slug.

    Raises GraphError for a list that is damaged or holds graphs of other adapters.
    """
    if not path.exists():
        return [metadata]
    graphs = _read_list(path)
    fingerprints = metadata["transcoder_list"]
    if fingerprints and any(entry.get("transcoder_list") not in (None, [], fingerprints) for entry in graphs):
        # Feature files are named by number alone, so those of one set would be shown as features of the other.
        raise GraphError(
            f"{path} lists graphs of other adapters, whose feature files have the same names; choose another folder."
        )
    replaced = [i for i, entry in enumerate(graphs) if entry.get("slug") == metadata["slug"]]
    others = [entry for entry in graphs if entry.get("slug") != metadata["slug"]]
    position = replaced[0] if replaced else len(others)
    return [*others[:position], metadata, *others[position:]]


class _GraphEntry(Record, extra="ignore"):
    """What we read of an entry of graph-metadata.json; other keys are kept as they are."""

    slug: str | None = None
    transcoder_list: list[str] | str | None = None


def _read_list(path: Path) -> list[dict[str, Any]]:
    """Return the entries of the list of graphs. Raises GraphError."""
    advice = "It is not a list of graphs: remove it, or choose another folder."
    with unreadable_as(GraphError):
        graphs = read_json_object(path, advice).get("graphs")
        if not isinstance(graphs, list) or not all(isinstance(entry, dict) for entry in graphs):
            raise GraphError(f"{path}: graphs is {shown(graphs)}; allowed is a list of mappings. {advice}")
        for number, entry in enumerate(graphs):
            read = {key: entry[key] for key in _GraphEntry.model_fields if key in entry}
            as_record(_GraphEntry, read, f"{path}, graph {number}", advice)
    return graphs


def _write_features(
    graph: AttributionGraph, pruned: PrunedGraph, folder: Path, records: Mapping[tuple[int, int], FeatureRecord]
) -> None:
    survives = pruned.node_mask[: len(graph.features)]
    for layer, index in graph.features[survives][:, [0, 2]].unique(dim=0).tolist():
        write_feature_file(folder, layer, index, records.get((layer, index)))
