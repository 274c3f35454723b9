"""The files of circuit-tracer's viewer and of Neuronpedia, against the list of what both read."""

import gzip
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from helpers.random_graphs import random_graph

from tl_adapters.attribution.graph import AttributionGraph, GraphError, GraphTarget
from tl_adapters.attribution.pruning import feature_share, graph_scores, prune
from tl_adapters.interop.circuit_tracer import node_ids, write_circuit_tracer
from tl_adapters.interop.circuit_tracer_features import FeatureRecord, cantor_number, write_packed_features

SCRIPT = '</script><b>"quoted" \\ \n\u2028 \ud800 \N{SNOWMAN}'
"""A token with all that breaks pages: a closing tag, quotes, line ends, half of a surrogate pair."""
METADATA = {
    "slug": str,
    "scan": str,
    "transcoder_list": list,
    "prompt_tokens": list,
    "prompt": str,
    "node_threshold": float,
    "schema_version": int,
    "info": dict,
    "generation_settings": dict,
    "pruning_settings": dict,
}
INFO = {"description": str, "creator_name": str, "source_urls": list, "generator": dict, "create_time_ms": int}
GENERATION = {"max_n_logits": int, "desired_logit_prob": float, "batch_size": int, "max_feature_nodes": int}
Q_PARAMS = {"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str}
NODE = {
    "node_id": str,
    "feature": int,
    "layer": str,
    "ctx_idx": int,
    "feature_type": str,
    "token_prob": float,
    "is_target_logit": bool,
    "run_idx": int,
    "reverse_ctx_idx": int,
    "jsNodeId": str,
    "clerp": str,
    "influence": float | None,
    "activation": float | None,
}
LINK = {"source": str, "target": str, "weight": float}
FEATURE = {
    "transcoder_id": str,
    "index": int,
    "top_logits": list,
    "bottom_logits": list,
    "act_min": float | None,
    "act_max": float | None,
    "quantile_values": list,
    "histogram": list,
    "activation_frequency": float | None,
    "examples_quantiles": list,
}
EXAMPLE = {"tokens": list, "tokens_acts_list": list, "train_token_ind": int, "is_repeated_datapoint": bool}
RECORD = FeatureRecord(
    1, 7, [SCRIPT], [" no"], 0.0, 3.5, [0.1] * 100, [4, 2], 0.25, [([" a", SCRIPT], [0.0, 3.5], 1), ([" b"], [1.0], 0)]
)


def by_hand() -> AttributionGraph:
    """Two layers, three tokens, one frozen MLP that matters, and targets of each kind."""
    # 0 to 3: features; 4 and 5: errors; 6 to 8: tokens; 9 to 11: targets
    edges = [
        *((0, 6, 2.0), (1, 7, -1.0), (2, 0, 0.5), (2, 4, 0.25), (3, 1, 1.0)),
        *((9, 2, 3.0), (9, 8, -1.0), (9, 3, 1e-6), (10, 2, 1.0), (10, 7, -1.0), (11, 0, 2.0)),
    ]
    return AttributionGraph(
        tokens=torch.tensor([1, 50, 7]),
        strings=["<s>", SCRIPT, " caf\N{LATIN SMALL LETTER E WITH ACUTE}"],
        n_layers=2,
        features=torch.tensor([[0, 0, 3], [0, 1, 3], [1, 2, 7], [1, 2, 8]]),
        activations=torch.tensor([0.5, 1.5, 2.5, 3.5]),
        errors=torch.tensor([[0, 2], [1, 2]]),
        targets=[
            GraphTarget(SCRIPT, 2, 0.625, token=50, probability=0.625),
            GraphTarget("'Wait' - 'So'", 2, 1.0),
            GraphTarget("feature 1/7", 1, 1.0),
        ],
        edges=torch.tensor([[t, s] for t, s, _ in edges]).T.contiguous(),
        weights=torch.tensor([weight for *_, weight in edges]),
        rows=torch.tensor([0, 1, 2, 3, 9, 10, 11]),
        balance=torch.tensor([[2.0, 1.0, 0.5, 0.5]]).repeat(7, 1),
        decoder_biases=torch.zeros(7),
        about={"fingerprints": {"adapters": "abc", "target": "def"}, "d_vocab": 1000, "batch_size": 16},
    )


def strict(text: str) -> Any:
    """JSON as a browser reads it."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def read(path: Path) -> Any:
    return strict(path.read_text(encoding="utf-8"))


def conforms(record: dict[str, Any], types: dict[str, Any]) -> None:
    assert list(types) == [key for key in record if key in types], "keys are missing"
    for key, kind in types.items():
        assert isinstance(record[key], kind), (key, record[key])
        assert kind is bool or not isinstance(record[key], bool), key


def cut_ids(graph: AttributionGraph, **thresholds: float) -> tuple[set[str], set[tuple[str, str, float]]]:
    """Nodes and links that pruning leaves."""
    ids, pruned = node_ids(graph), prune(graph, **thresholds)
    kept = {node for node, stays in zip(ids, pruned.node_mask.tolist(), strict=True) if stays}
    links = zip(*graph.edges.tolist(), graph.weights.tolist(), pruned.edge_mask.tolist(), strict=True)
    return kept, {(ids[source], ids[target], weight) for target, source, weight, stays in links if stays}


def test_the_lists_of_keys(tmp_path: Path) -> None:
    graph = by_hand()
    write_circuit_tracer(graph, tmp_path, "a-graph_1.2", node_threshold=0.9)
    record, listed = read(tmp_path / "a-graph_1.2.json"), read(tmp_path / "graph-metadata.json")
    assert list(record) == ["metadata", "qParams", "nodes", "links"] and list(listed) == ["graphs"]
    assert listed["graphs"] == [record["metadata"]]
    about = record["metadata"]
    conforms(about, METADATA)
    conforms(about["info"], INFO)
    conforms(about["generation_settings"], GENERATION)
    assert set(about["info"]["generator"]) == {"name", "version", "url"}
    assert about["generation_settings"] == {
        **{"max_n_logits": 3, "desired_logit_prob": 0.625, "batch_size": 16, "max_feature_nodes": 4}
    }
    assert about["pruning_settings"] == {"node_threshold": 0.9, "edge_threshold": 0.98}
    assert (about["slug"], about["scan"], about["schema_version"]) == ("a-graph_1.2", "./data/features", 1)
    assert about["prompt_tokens"] == graph.strings and about["prompt"] == "".join(graph.strings)
    assert about["transcoder_list"] == ["abc"] and about["node_threshold"] == 0.9
    replacement, completeness = graph_scores(graph)
    assert 0 < replacement < 1 and 0 < completeness < 1 and 0 < feature_share(graph) < 1
    assert about["tl_adapters"] == {
        "conservation_residual": 0.0,
        "feature_share": feature_share(graph),
        "replacement_score": replacement,
        "completeness_score": completeness,
    }
    assert set(record["qParams"]) == set(Q_PARAMS)
    conforms(record["qParams"], Q_PARAMS)
    assert record["qParams"]["linkType"] == "both" and record["qParams"]["clickedId"] == "3_50_2"
    for node in record["nodes"]:
        assert set(node) == set(NODE)
        for key, kind in NODE.items():
            assert isinstance(node[key], kind), (key, node)
    for link in record["links"]:
        assert set(link) == set(LINK)
        conforms(link, LINK)


def test_every_kind_of_node(tmp_path: Path) -> None:
    graph = by_hand()
    assert node_ids(graph) == [
        *("0_3_0", "0_3_1", "1_7_2", "1_8_2", "0_-1_2", "1_-1_2", "E_1_0", "E_50_1", "E_7_2"),
        *("3_50_2", "3_1001_2", "3_1002_1"),
    ]
    write_circuit_tracer(graph, tmp_path, "x", node_threshold=1.0, edge_threshold=1.0)
    nodes = {node["node_id"]: node for node in read(tmp_path / "x.json")["nodes"]}
    assert set(nodes) == set(node_ids(graph)) - {"1_-1_2"}  # the one that feeds nothing

    feature = nodes["1_7_2"]
    assert feature["feature"] == (1 + 7) * (1 + 7 + 1) / 2 + 7 == cantor_number(1, 7)
    assert (feature["layer"], feature["ctx_idx"], feature["jsNodeId"]) == ("1", 2, "1_7-0")
    assert (feature["feature_type"], feature["activation"]) == ("cross layer transcoder", 2.5)
    error = nodes["0_-1_2"]
    assert (error["feature"], error["layer"], error["ctx_idx"]) == (-1, "0", 2)
    assert error["feature_type"] == "mlp reconstruction error" and error["activation"] is None
    token = nodes["E_50_1"]
    assert (token["feature"], token["layer"], token["ctx_idx"]) == (1, "E", 1)
    assert token["feature_type"] == "embedding" and token["activation"] is None
    logit, difference, target = nodes["3_50_2"], nodes["3_1001_2"], nodes["3_1002_1"]
    assert (logit["feature"], logit["layer"], logit["ctx_idx"], logit["token_prob"]) == (50, "3", 2, 0.625)
    assert [n["is_target_logit"] for n in nodes.values()] == [n is logit for n in nodes.values()]
    assert logit["clerp"] == f'Output "{SCRIPT}" (p=0.625)'
    assert difference["clerp"] == "Output \"'Wait' - 'So'\" (p=1.000)" and difference["feature"] == 1001
    assert target["clerp"] == 'Output "feature 1/7" (p=1.000)' and target["ctx_idx"] == 1
    assert {n["feature_type"] for n in (logit, difference, target)} == {"logit"}

    cumulative = prune(graph).cumulative.tolist()
    for node_id, share in zip(node_ids(graph), cumulative, strict=True):
        if node_id in nodes:
            assert nodes[node_id]["influence"] == (None if node_id.startswith("3_") else share)
    assert min(cumulative) == nodes["0_3_0"]["influence"] > 0 and max(cumulative) == 1


def test_no_two_nodes_of_the_viewer_are_one(tmp_path: Path) -> None:
    for seed in range(20):
        graph = random_graph(seed, with_errors=True)
        write_circuit_tracer(graph, tmp_path, f"{seed}", node_threshold=1.0, edge_threshold=1.0)
        nodes = read(tmp_path / f"{seed}.json")["nodes"]
        assert len({node["node_id"] for node in nodes}) == len(nodes)
    twice = by_hand()
    same = replace(twice, targets=[twice.targets[0], twice.targets[0], twice.targets[2]])
    with pytest.raises(GraphError, match="name each target once"):
        write_circuit_tracer(same, tmp_path, "twice")


def test_only_what_survives_pruning_is_written(tmp_path: Path) -> None:
    cut = 0
    for seed in range(20):
        graph, folder = random_graph(seed, seed % 2 == 0), tmp_path / str(seed)
        write_circuit_tracer(graph, folder, "x", node_threshold=0.7, edge_threshold=0.8)
        nodes, links = cut_ids(graph, node_threshold=0.7, edge_threshold=0.8)
        record = read(folder / "x.json")
        assert {node["node_id"] for node in record["nodes"]} == nodes
        found = {(link["source"], link["target"], link["weight"]) for link in record["links"]}
        assert found == links and len(record["links"]) == len(links)
        features = {n["feature"] for n in record["nodes"] if n["feature_type"] == "cross layer transcoder"}
        files = {path.name for path in (folder / "features").glob("*")} if features else set()
        assert files == {f"{number}.json" for number in features}
        cut += graph.n_nodes - len(nodes)
    assert cut > 100


def test_a_target_without_its_vocabulary_size_meets_no_token(tmp_path: Path) -> None:
    graph = replace(by_hand(), about={})
    assert node_ids(graph)[-3:] == ["3_50_2", "3_52_2", "3_53_1"]  # 51 is the first past all tokens that are named
    write_circuit_tracer(graph, tmp_path, "x")
    about = read(tmp_path / "x.json")["metadata"]
    assert about["transcoder_list"] == [] and about["generation_settings"]["batch_size"] == 1


def test_cantor_numbers_are_one_to_one() -> None:
    features = [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)]
    assert [cantor_number(*feature) for feature in features] == list(range(6))
    assert cantor_number(35, 100_000) == 100_035 * 100_036 // 2 + 100_000
    assert len({cantor_number(layer, index) for layer in range(40) for index in range(500)}) == 40 * 500


def test_feature_files(tmp_path: Path) -> None:
    write_circuit_tracer(by_hand(), tmp_path, "x", features={(1, 7): RECORD, (5, 5): FeatureRecord(5, 5)})
    folder = tmp_path / "features"
    assert {path.name for path in folder.iterdir()} == {f"{cantor_number(0, 3)}.json", f"{cantor_number(1, 7)}.json"}
    full, empty = read(folder / f"{cantor_number(1, 7)}.json"), read(folder / f"{cantor_number(0, 3)}.json")
    for record in (full, empty):
        assert set(record) == set(FEATURE)
        conforms(record, FEATURE)
    assert (full["transcoder_id"], full["index"]) == ("layer_1", 7)
    assert (full["top_logits"], full["bottom_logits"]) == ([SCRIPT], [" no"])
    assert (full["act_min"], full["act_max"], full["activation_frequency"]) == (0.0, 3.5, 0.25)
    assert full["quantile_values"] == [0.1] * 100 and full["histogram"] == [4, 2]
    (quantile,) = full["examples_quantiles"]
    assert list(quantile) == ["quantile_name", "examples"] and quantile["quantile_name"] == "Top activations"
    for example in quantile["examples"]:
        conforms(example, EXAMPLE)
    assert quantile["examples"][0] == {
        **{"tokens": [" a", SCRIPT], "tokens_acts_list": [0.0, 3.5], "train_token_ind": 1},
        "is_repeated_datapoint": False,
    }
    unknown = {"transcoder_id": "layer_0", "index": 3, "act_min": None, "act_max": None, "activation_frequency": None}
    assert empty == {**{key: [] for key in FEATURE}, **unknown}


def test_a_feature_keeps_what_was_written_of_it_before(tmp_path: Path) -> None:
    write_circuit_tracer(by_hand(), tmp_path, "x", features={(1, 7): RECORD})
    write_circuit_tracer(by_hand(), tmp_path, "y")
    path = tmp_path / "features" / f"{cantor_number(1, 7)}.json"
    assert read(path)["act_max"] == 3.5
    write_circuit_tracer(by_hand(), tmp_path, "y", features={(1, 7): replace(RECORD, act_max=4.0)})
    assert read(path)["act_max"] == 4.0


def test_a_folder_of_several_graphs(tmp_path: Path) -> None:
    for slug in ("a", "b", "c"):
        write_circuit_tracer(by_hand(), tmp_path, slug)
    foreign = {"slug": "theirs", "scan": "gemma", "transcoder_list": [], "prompt_tokens": [], "prompt": "", "more": 1}
    path = tmp_path / "graph-metadata.json"
    path.write_text(json.dumps({"graphs": [*read(path)["graphs"], foreign]}))
    write_circuit_tracer(by_hand(), tmp_path, "b", node_threshold=0.5)
    graphs = read(path)["graphs"]
    assert [graph["slug"] for graph in graphs] == ["a", "b", "c", "theirs"]
    assert [graph.get("node_threshold") for graph in graphs] == [0.8, 0.5, 0.8, None] and graphs[3] == foreign
    assert read(tmp_path / "b.json")["metadata"] == graphs[1]
    assert not [p.name for p in tmp_path.rglob(".*")]  # no temporary files


def test_features_of_two_sets_do_not_share_a_folder(tmp_path: Path) -> None:
    write_circuit_tracer(by_hand(), tmp_path, "a")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    other = replace(by_hand(), about={"fingerprints": {"adapters": "another"}})
    for slug in ("a", "b"):
        with pytest.raises(GraphError, match="of other adapters"):
            write_circuit_tracer(other, tmp_path, slug)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"graphs": {}}', '{"graphs": ["a"]}'])
def test_a_list_that_cannot_be_read_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "graph-metadata.json").write_text(text)
    with pytest.raises(GraphError, match="not a list of graphs"):
        write_circuit_tracer(by_hand(), tmp_path, "a")
    assert [path.name for path in tmp_path.iterdir()] == ["graph-metadata.json"]
    assert (tmp_path / "graph-metadata.json").read_text() == text


def test_the_list_names_a_graph_only_once_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / "features").write_text("in the way")
    with pytest.raises(OSError):
        write_circuit_tracer(by_hand(), tmp_path, "a")
    assert [path.name for path in tmp_path.iterdir()] == ["features"]


def test_the_page_that_shows_the_supernodes(tmp_path: Path) -> None:
    name = 'Wait, & "hmm" = 100 % \N{SNOWMAN}'
    supernodes = {name: ["1_7_2", "E_50_1"], "weak": ["1_8_2"], "both": ["1_8_2", "0_3_0", "1_7_2"]}
    page = write_circuit_tracer(by_hand(), tmp_path, "x", supernodes=supernodes)
    assert page.isascii() and not set(page) & set(' "<>#') and page.startswith("index.html?slug=x&supernodes=%5B")
    query = parse_qs(urlsplit(page).query, strict_parsing=True)
    assert list(query) == ["slug", "supernodes", "pinnedIds"] and query["slug"] == ["x"]
    groups = [[name, "1_7_2", "E_50_1"], ["both", "0_3_0", "1_7_2"]]  # 1_8_2 is pruned
    assert strict(query["supernodes"][0]) == groups
    pinned = query["pinnedIds"][0].split(",")
    assert pinned == ["1_7_2", "E_50_1", "0_3_0", "3_50_2", "3_1001_2", "3_1002_1"]
    record = read(tmp_path / "x.json")
    assert record["qParams"]["supernodes"] == groups and record["qParams"]["pinnedIds"] == pinned
    assert set(pinned) <= {node["node_id"] for node in record["nodes"]}
    with pytest.raises(GraphError, match="The graph has no nodes 1_9_2"):
        write_circuit_tracer(by_hand(), tmp_path, "y", supernodes={"a": ["1_7_2", "1_9_2"]})


@pytest.mark.parametrize("slug", ["", "a b", "a/b", "..\\b", "a\n", "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "a&b"])
def test_slugs_that_are_no_names(tmp_path: Path, slug: str) -> None:
    with pytest.raises(GraphError, match="use letters, digits"):
        write_circuit_tracer(by_hand(), tmp_path / "out", slug)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("slug", ["graph-metadata", "Graph-Metadata"])
def test_no_graph_overwrites_the_list(tmp_path: Path, slug: str) -> None:
    with pytest.raises(GraphError, match="would overwrite"):
        write_circuit_tracer(by_hand(), tmp_path, slug)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_is_written_that_is_no_number(tmp_path: Path, value: float) -> None:
    graph = by_hand()
    for broken in (
        replace(graph, activations=torch.tensor([value, 1.5, 2.5, 3.5])),
        replace(graph, weights=torch.full_like(graph.weights, value)),
        replace(graph, targets=[*graph.targets[:2], GraphTarget("x", 1, 1.0, probability=value)]),
    ):
        with pytest.raises(GraphError, match="finite"):
            write_circuit_tracer(broken, tmp_path / "out", "a")
    assert not (tmp_path / "out").exists()
    with pytest.raises(GraphError, match="finite"):
        write_packed_features(tmp_path / "packed", {0: [FeatureRecord(0, 0, act_max=value)]}, 1)
    assert not list((tmp_path / "packed").iterdir())


def test_prompts_and_thresholds_that_show_nothing(tmp_path: Path) -> None:
    graph = random_graph(0, False)
    short = replace(graph, tokens=graph.tokens[:1], strings=graph.strings[:1])
    with pytest.raises(GraphError, match="a prompt of one token"):
        write_circuit_tracer(short, tmp_path, "x")
    with pytest.raises(GraphError, match="edge_threshold is 0"):
        write_circuit_tracer(graph, tmp_path, "x", edge_threshold=0.0)
    assert not list(tmp_path.iterdir())


def unpacked(folder: Path, layer: int, feature: int) -> Any:
    """One feature as a reader of byte ranges finds it; None of a dead one."""
    index = strict(gzip.decompress((folder / "features" / "index.json.gz").read_bytes()).decode())
    assert index["version"] == "1.0" and index["format"] == "variable_chunks"
    about = index[str(layer)]
    start, stop = about["offsets"][feature : feature + 2]
    chunk = (folder / "features" / about["filename"]).read_bytes()[start:stop]
    if not chunk:
        return None
    (length,) = struct.unpack("<I", chunk[:4])
    assert length == len(chunk) - 4
    return strict(gzip.decompress(chunk[4:]).decode())


def test_packed_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = FeatureRecord(1, 0, examples=[([SCRIPT], [1.0], 0)])
    write_packed_features(tmp_path / "a", {1: iter([RECORD, first]), 0: []}, 9)
    assert {p.name for p in (tmp_path / "a" / "features").iterdir()} == {"index.json.gz", "layer_0.bin", "layer_1.bin"}
    index = strict(gzip.decompress((tmp_path / "a" / "features" / "index.json.gz").read_bytes()).decode())
    assert set(index) == {"version", "format", "0", "1"}
    assert index["0"] == {"filename": "layer_0.bin", "offsets": [0] * 10}
    assert index["1"]["filename"] == "layer_1.bin" and len(index["1"]["offsets"]) == 10
    assert index["1"]["offsets"][-1] == (tmp_path / "a" / "features" / "layer_1.bin").stat().st_size
    found = {feature: unpacked(tmp_path / "a", 1, feature) for feature in range(9)}
    assert [feature for feature, record in found.items() if record is not None] == [0, 7]
    assert found[0]["examples_quantiles"][0]["examples"][0]["tokens"] == [SCRIPT]
    write_circuit_tracer(by_hand(), tmp_path / "plain", "x", features={(1, 7): RECORD})
    assert found[7] == read(tmp_path / "plain" / "features" / f"{cantor_number(1, 7)}.json")

    monkeypatch.setattr("time.time", lambda: 1e9)
    write_packed_features(tmp_path / "b", {0: [], 1: [first, RECORD]}, 9)
    for name in ("index.json.gz", "layer_1.bin"):  # the same features are the same bytes, whenever and in what order
        assert (tmp_path / "a/features" / name).read_bytes() == (tmp_path / "b/features" / name).read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        write_packed_features(tmp_path / "b", {}, 9)


@pytest.mark.parametrize(
    "records", [{0: [RECORD]}, {1: [replace(RECORD, index=9)]}, {1: [replace(RECORD, index=-1)]}, {1: [RECORD, RECORD]}]
)
def test_packed_features_that_are_not_of_their_layer(tmp_path: Path, records: dict[int, list[FeatureRecord]]) -> None:
    with pytest.raises(GraphError, match="of another layer, out of range, or repeated"):
        write_packed_features(tmp_path, records, 9)
    assert not list(tmp_path.iterdir())
