r"""Attribution graphs as files that circuit-tracer's viewer and Neuronpedia read.

    graph-metadata.json      the folder's graphs, one entry each
    <slug>.json              what survives pruning of one graph: nodes, links, what is pinned at first
    features/<n>.json        one per feature; n is its layer and index paired by Cantor

Or, to publish a set's features once for all of its graphs, packed: features/index.json.gz and features/layer_N.bin.
Nothing in them is NaN or infinite, which JSON cannot say and browsers refuse.
"""

from __future__ import annotations

import gzip
import json
import re
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import tl_adapters
from tl_adapters.adapters.saelens_folder import AdapterFormatError, read_json
from tl_adapters.attribution.graph import AttributionGraph, GraphError
from tl_adapters.attribution.pruning import (
    EDGE_THRESHOLD,
    NODE_THRESHOLD,
    PrunedGraph,
    feature_share,
    graph_scores,
    prune,
)
from tl_adapters.utils.files import new_folder, write_text
from tl_adapters.utils.strict_json import dumps

METADATA_FILE, FEATURES_FOLDER, INDEX_FILE = "graph-metadata.json", "features", "index.json.gz"
CIRCUIT_TRACER_SCHEMA_VERSION = 1
_SCAN = "./data/features"
"""Tells the viewer to read the features beside the graphs, not from the hub."""


@dataclass(frozen=True)
class FeatureRecord:
    """What a viewer shows of one feature; what was not measured is empty or None, never invented."""

    layer: int
    """Of the adapter."""
    index: int
    """In the layer."""
    top_logits: Sequence[str] = ()
    """Tokens it raises most."""
    bottom_logits: Sequence[str] = ()
    """Tokens it lowers most."""
    act_min: float | None = None
    """Smallest activation seen."""
    act_max: float | None = None
    """Largest activation seen."""
    quantiles: Sequence[float] = ()
    """Of its activations; the viewer draws 100 of them."""
    histogram: Sequence[float] = ()
    """Of its activations."""
    activation_frequency: float | None = None
    """Share of tokens on which it is active."""
    examples: Sequence[tuple[Sequence[str], Sequence[float], int]] = ()
    """Tokens, the activation on each, and the position of the one it was chosen for; strongest first."""
    top_effects: Sequence[float] = ()
    """By how much it raises them, per unit of activation."""
    bottom_effects: Sequence[float] = ()
    """By how much it lowers them (negative)."""
    label: str = ""
    """What it is called."""


def cantor(layer: int, index: int) -> int:
    """The one number by which the viewer knows a feature."""
    return (layer + index) * (layer + index + 1) // 2 + index


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
    """Write a pruned graph and its features where the viewer finds them, beside the graphs that are there already.

    Args:
        graph: of a prompt of at least two tokens; the viewer shows nothing of a shorter one.
        folder: made where it does not exist. A graph of the same slug is replaced, others stay.
        slug: the graph's name: ASCII letters, digits, ``_``, ``.`` and ``-``.
        node_threshold, edge_threshold: as `prune`.
        features: by (layer, index). Without a record a feature keeps the file it has in the folder, or gets an empty
            one, for which the viewer shows an empty panel and not an error.
        supernodes: node ids ("{layer}_{index}_{position}", "E_{token}_{position}", ...) by the name they are grouped
            under. Nodes that were pruned are left out.

    Returns:
        The viewer's page on which the supernodes and the targets are pinned; the files alone do not show supernodes.

    Raises:
        GraphError: a slug, a prompt or a supernode that cannot be shown, values that are not finite, thresholds
            outside (0, 1], or a folder whose list of graphs cannot be read or is of other adapters.
        DiskFullError.
    """
    require_slug(slug)
    if len(graph.tokens) < 2 or not graph.targets:
        raise GraphError("The viewer shows nothing of a prompt of one token, or without a target; attribute another.")
    folder = Path(folder)
    pruned = prune(graph, node_threshold, edge_threshold)
    ids = node_ids(graph)
    groups = _supernodes(ids, pruned, supernodes or {})
    targets = ids[graph.first_target :]
    pinned = list(dict.fromkeys([*(node for group in groups for node in group[1:]), *targets]))
    about = _metadata(graph, slug, node_threshold, edge_threshold)
    record = {
        "metadata": about,
        "qParams": {
            "pinnedIds": pinned,
            "supernodes": groups,
            "linkType": "both",
            "clickedId": targets[0],
            "sg_pos": "",
        },
        "nodes": _nodes(graph, pruned, ids, features or {}),
        "links": _links(graph, pruned, ids),
    }
    # all that can be refused is refused before anything is written; the list comes last, and names what is complete
    text, graphs = _to_json(record), _to_json({"graphs": _listed(folder / METADATA_FILE, about)})
    _write_features(graph, pruned, folder / FEATURES_FOLDER, features or {})
    write_text(folder / f"{slug}.json", text)
    write_text(folder / METADATA_FILE, graphs)
    query = {"slug": slug, "supernodes": json.dumps(groups), "pinnedIds": ",".join(pinned)}
    return f"index.html?{urlencode(query, quote_via=quote)}"


def remove_circuit_tracer(folder: str | Path, slug: str) -> None:
    """Take a graph out of what `write_circuit_tracer` wrote; its features stay, other graphs may show them.

    Raises GraphError for a name that is none, or a list of graphs that cannot be read.
    """
    require_slug(slug)
    path = Path(folder) / METADATA_FILE
    if path.is_file():
        graphs = _read_list(path)
        write_text(path, _to_json({"graphs": [entry for entry in graphs if entry.get("slug") != slug]}))
    (Path(folder) / f"{slug}.json").unlink(missing_ok=True)


def write_packed_features(folder: str | Path, records: Mapping[int, Iterable[FeatureRecord]], n_features: int) -> None:
    """Write a set's features in the packed form, which the viewer reads from a repository of the hub.

    Args:
        folder: what becomes the repository; ``folder/features`` must not exist.
        records: by layer, in any order; features without one are dead, and empty in the file.
        n_features: of every layer.

    Raises:
        GraphError: a record of another layer, outside the layer or given twice, or values that are not finite.
        FolderExistsError, DiskFullError.
    """
    index: dict[str, Any] = {"version": "1.0", "format": "variable_chunks"}
    with new_folder(Path(folder) / FEATURES_FOLDER) as out:
        for layer in sorted(records):
            chunks = _chunks(layer, records[layer], n_features)
            offsets = [0]
            with (out / f"layer_{layer}.bin").open("wb") as file:
                for feature in range(n_features):
                    offsets.append(offsets[-1] + file.write(chunks.get(feature, b"")))
            index[str(layer)] = {"filename": f"layer_{layer}.bin", "offsets": offsets}
        (out / INDEX_FILE).write_bytes(_packed(index))


def node_ids(graph: AttributionGraph) -> list[str]:
    """The viewer's name of every node, in the graph's order. Raises GraphError where two targets are the same."""
    tokens = graph.tokens.tolist()
    ids = [f"{layer}_{index}_{position}" for layer, position, index in graph.features.tolist()]
    # circuit-tracer once wrote 0_layer_position here, which is also the name of a feature of layer 0
    ids += [f"{layer}_-1_{position}" for layer, position in graph.errors.tolist()]
    ids += [f"E_{token}_{position}" for position, token in enumerate(tokens)]
    vocabulary = _target_tokens(graph)
    ids += [f"{graph.n_layers + 1}_{v}_{t.position}" for v, t in zip(vocabulary, graph.targets, strict=True)]
    if len(set(ids)) < len(ids):
        raise GraphError("Two of the graph's nodes are the same, so the viewer would show one; name each target once.")
    return ids


def require_slug(slug: str) -> None:
    """Raises GraphError for a name that cannot be a file's and part of an address."""
    if not re.fullmatch(r"[\w.-]+", slug, re.ASCII):
        raise GraphError(f"The slug {slug!r} is no file name and URL part; use letters, digits, '_', '.' and '-' only.")
    if f"{slug}.json".lower() == METADATA_FILE:  # some file systems do not tell case
        raise GraphError(f"The slug {slug!r} would overwrite {METADATA_FILE}; choose another.")


def _target_tokens(graph: AttributionGraph) -> list[int]:
    """Vocabulary indices; a target that is no token's logit gets one past the vocabulary."""
    seen = [*graph.tokens.tolist(), *(target.token for target in graph.targets if target.token is not None)]
    d_vocab = int(graph.about.get("d_vocab") or max(seen, default=-1) + 1)
    return [
        d_vocab + i if target.token is None or target.against is not None else target.token
        for i, target in enumerate(graph.targets)
    ]


def _metadata(graph: AttributionGraph, slug: str, node_threshold: float, edge_threshold: float) -> dict[str, Any]:
    """What stands in the graph's file and in the folder's list."""
    replacement, completeness = graph_scores(graph)
    named = ", ".join(target.label for target in graph.targets)
    return {
        "slug": slug,
        "scan": _SCAN,
        "transcoder_list": _adapters(graph),
        "prompt_tokens": graph.display_strings,
        "prompt": graph.text,
        "node_threshold": node_threshold,
        "schema_version": CIRCUIT_TRACER_SCHEMA_VERSION,
        # from here on for Neuronpedia, and for people
        "info": {
            "description": f"What {named} owes to the features of transcoder adapters.",
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


def _adapters(graph: AttributionGraph) -> list[str]:
    """The fingerprint of the graph's adapters, where it is known."""
    fingerprint = (graph.about.get("fingerprints") or {}).get("adapters")
    return [] if fingerprint is None else [str(fingerprint)]


def _generation_settings(graph: AttributionGraph) -> dict[str, Any]:
    """As asked for, where the graph says; else as it came out."""
    found = {
        "max_n_logits": len(graph.targets),
        "desired_logit_prob": min(1.0, sum(target.probability or 0.0 for target in graph.targets)),
        "batch_size": 1,  # changes nothing in the graph
        "max_feature_nodes": int((graph.rows < len(graph.features)).sum()),
    }
    return {key: value if graph.about.get(key) is None else graph.about[key] for key, value in found.items()}


def _supernodes(ids: list[str], pruned: PrunedGraph, supernodes: Mapping[str, list[str]]) -> list[list[str]]:
    """Name and surviving members of each that has any. Raises GraphError for members that never were in the graph."""
    unknown = sorted({node for members in supernodes.values() for node in members} - set(ids))
    if unknown:
        raise GraphError(f"No nodes of this graph: {', '.join(unknown[:5])}; such as {ids[0]} and {ids[-1]} are.")
    kept = {node for node, stays in zip(ids, pruned.node_mask.tolist(), strict=True) if stays}
    groups = [[name, *(node for node in members if node in kept)] for name, members in supernodes.items()]
    return [group for group in groups if len(group) > 1]


def _nodes(
    graph: AttributionGraph, pruned: PrunedGraph, ids: list[str], features: Mapping[tuple[int, int], FeatureRecord]
) -> list[dict[str, Any]]:
    """The nodes that stay, with every key: a node without one is hidden, or hides the page."""
    kinds = [*_feature_nodes(graph, features), *_error_nodes(graph), *_token_nodes(graph), *_target_nodes(graph)]
    common = {"token_prob": 0.0, "is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0, "clerp": ""}
    common |= {"activation": None}
    shares: list[float | None] = list(pruned.cumulative.tolist())
    shares[graph.first_target :] = [None] * len(graph.targets)
    stays = pruned.node_mask.tolist()
    return [{"node_id": ids[i], **common, **node, "influence": shares[i]} for i, node in enumerate(kinds) if stays[i]]


def _feature_nodes(graph: AttributionGraph, features: Mapping[tuple[int, int], FeatureRecord]) -> list[dict[str, Any]]:
    return [
        {
            "feature": cantor(layer, index),
            "layer": str(layer),
            "ctx_idx": position,
            "feature_type": "cross layer transcoder",  # of any other type the viewer shows no features
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
        for position, token in enumerate(graph.tokens.tolist())
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
                "clerp": f'Output "{target.label}" (p={share:.3f})',  # without "(p=" the page stays blank
            }
        )
    return nodes


def _links(graph: AttributionGraph, pruned: PrunedGraph, ids: list[str]) -> list[dict[str, Any]]:
    targets, sources = graph.edges[:, pruned.edge_mask].tolist()
    return [
        {"source": ids[source], "target": ids[target], "weight": weight}
        for target, source, weight in zip(targets, sources, graph.weights[pruned.edge_mask].tolist(), strict=True)
    ]


def _listed(path: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The folder's graphs with this one among them. Raises GraphError."""
    if not path.exists():
        return [about]
    graphs = _read_list(path)
    ours = about["transcoder_list"]
    if ours and any(entry.get("transcoder_list") not in (None, [], ours) for entry in graphs):
        # features are files by number alone: those of one set would be shown as the other's
        raise GraphError(
            f"{path} lists graphs of other adapters, whose feature files have these names; choose another folder."
        )
    others = [entry for entry in graphs if entry.get("slug") != about["slug"]]
    places = [i for i, entry in enumerate(graphs) if entry.get("slug") == about["slug"]]
    return [*others[: places[0]], about, *others[places[0] :]] if places else [*others, about]


def _read_list(path: Path) -> list[dict[str, Any]]:
    try:
        graphs = read_json(path).get("graphs")
    except AdapterFormatError:
        graphs = None
    if not isinstance(graphs, list) or not all(isinstance(entry, dict) for entry in graphs):
        raise GraphError(f"{path} is damaged, or no list of graphs; remove it, or choose another folder.")
    return graphs


def _write_features(
    graph: AttributionGraph, pruned: PrunedGraph, folder: Path, records: Mapping[tuple[int, int], FeatureRecord]
) -> None:
    stays = pruned.node_mask[: len(graph.features)]
    for layer, index in graph.features[stays][:, [0, 2]].unique(dim=0).tolist():
        path, record = folder / f"{cantor(layer, index)}.json", records.get((layer, index))
        if record is not None or not path.exists():
            write_text(path, _to_json(_feature(record or FeatureRecord(layer, index))))


def _feature(record: FeatureRecord) -> dict[str, Any]:
    """A feature's file, also when packed."""
    examples = [
        {
            "tokens": list(tokens),
            "tokens_acts_list": list(activations),
            "train_token_ind": position,
            "is_repeated_datapoint": False,
        }
        for tokens, activations, position in record.examples
    ]
    return {
        "transcoder_id": f"layer_{record.layer}",
        "index": record.index,
        "top_logits": list(record.top_logits),
        "bottom_logits": list(record.bottom_logits),
        "act_min": record.act_min,
        "act_max": record.act_max,
        "quantile_values": list(record.quantiles),
        "histogram": list(record.histogram),
        "activation_frequency": record.activation_frequency,
        "examples_quantiles": [{"quantile_name": "Top activations", "examples": examples}] if examples else [],
    }


def _chunks(layer: int, records: Iterable[FeatureRecord], n_features: int) -> dict[int, bytes]:
    """By feature: the length of the rest, and the rest. Raises GraphError."""
    chunks: dict[int, bytes] = {}
    for record in records:
        if record.layer != layer or not 0 <= record.index < n_features or record.index in chunks:
            raise GraphError(
                f"A record of layer {record.layer}, feature {record.index} among layer {layer}'s {n_features} features "
                "is of another layer, out of range, or there twice."
            )
        packed = _packed(_feature(record))
        chunks[record.index] = struct.pack("<I", len(packed)) + packed
    return chunks


def _packed(record: dict[str, Any]) -> bytes:
    return gzip.compress(_to_json(record).encode(), mtime=0)  # the same records give the same bytes


def _to_json(record: dict[str, Any]) -> str:
    """Raises GraphError for NaN and infinities."""
    try:
        return dumps(record)
    except ValueError as error:
        raise GraphError(f"Graph files hold finite numbers only ({error}); look at activations and weights.") from error
