"""Documents whose texts are not to be republished: graphs, feature stores, pages and exports leave them out."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.random_models import randomise

from tl_adapters import organism
from tl_adapters.attribution.attribute import attribute
from tl_adapters.attribution.graph import AttributionGraph
from tl_adapters.data.tokens import WITHHELD
from tl_adapters.data.traces import DataError, Trace
from tl_adapters.features.collect import collect_features
from tl_adapters.features.feature import ALIVE_FIRINGS, Example
from tl_adapters.features.store import FeatureStore
from tl_adapters.features.store_parts import DOCUMENTS_FILE
from tl_adapters.interop.circuit_tracer import write_circuit_tracer
from tl_adapters.interop.neuronpedia import write_neuronpedia
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.pages.feature_pages import write_feature_pages
from tl_adapters.study.by_name import load_traces
from tl_adapters.study.open_run import load_organism_pair
from tl_adapters.utils.files import write_tensors
from tl_adapters.utils.reading import read_tensors


@pytest.fixture(scope="module")
def pair() -> PairedModel:
    """The built-in pair with a few random features."""
    return randomise(load_organism_pair("cpu"), n_features=8)


@pytest.fixture(scope="module")
def traces(pair: PairedModel, tmp_path_factory: pytest.TempPathFactory) -> list[Trace]:
    """Documents of a file, of which every other row is not to be republished."""
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    pairs = organism.reasoning_pairs("report", 12, 0)
    rows = [{"prompt": p, "response": r, "republish": i % 2 == 0} for i, (p, r) in enumerate(pairs)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_traces(file, pair, n=12)


@pytest.fixture(scope="module")
def folder(pair: PairedModel, traces: list[Trace], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature store in a folder."""
    folder = tmp_path_factory.mktemp("store") / "features"
    collect_features(pair, traces, folder, progress=False)
    return folder


def examples(store: FeatureStore) -> Iterator[Example]:
    for feature in store.features(store.ids(1)):
        yield from (*feature.top_examples, *feature.random_examples)


def test_a_row_says_that_it_is_not_to_be_republished(pair: PairedModel, traces: list[Trace], tmp_path: Path) -> None:
    assert sorted(trace.republish for trace in traces) == [False] * 6 + [True] * 6
    assert not next(t for t in traces if not t.republish).cut(5).republish
    file = tmp_path / "row.jsonl"
    for given, said in (('"no"', ".no."), ("0", "0"), ("1", "1")):
        file.write_text(f'{{"prompt": "1 + 1", "response": "2", "republish": {given}}}\n')
        with pytest.raises(DataError, match=f"line 1: republish is {said}; allowed are true and false"):
            load_traces(file, pair)


def test_examples_show_only_the_token_they_were_chosen_for(
    pair: PairedModel, traces: list[Trace], folder: Path
) -> None:
    store = FeatureStore.load(folder)
    withheld = {trace.tokens for trace in traces if not trace.republish}
    seen = {True: 0, False: 0}
    for example in examples(store):
        tokens, _ = store.document(example.document)
        others = [text for i, text in enumerate(example.tokens) if i != example.token_index]
        assert example.tokens[example.token_index] == store.vocabulary[tokens[example.position]]
        assert (tokens in withheld) == bool(others and set(others) == {WITHHELD})
        seen[tokens in withheld] += 1
    assert min(seen.values()) > 100
    document = next(i for i in range(len(traces)) if store.document(i)[0] in withheld)
    assert store.excerpt(document, 3).tokens.count(WITHHELD) == len(store.excerpt(document, 3).tokens) - 1


@pytest.mark.parametrize("republish", [True, False])
def test_pages_and_exports_hold_no_text_that_is_withheld(
    republish: bool, pair: PairedModel, traces: list[Trace], tmp_path: Path
) -> None:
    store = collect_features(pair, [replace(t, republish=republish) for t in traces], progress=False)
    ids = store.ids(ALIVE_FIRINGS)[:4]
    index = write_feature_pages(store, tmp_path / "pages", features=ids, progress=False)
    assert ("the text of 12 documents is left out" in index.read_text()) != republish
    for path in index.parent.rglob("features_*.html"):
        (held,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), re.DOTALL)
        data = json.loads(held)
        shown = [tokens for feature in data["features"] for *_, tokens, _ in (*feature["top"], *feature["sample"])]
        texts = [sum(data["strings"][token] != WITHHELD for token in tokens) for tokens in shown]
        assert max(texts) == 1 if not republish else min(texts) > 1
    write_neuronpedia(store, tmp_path / "neuronpedia", "model", "set", progress=False)
    written = [path.read_text() for path in (tmp_path / "neuronpedia").rglob("*.json*")]
    lists = [json.dumps([store.vocabulary[token] for token in trace.tokens][20:24])[1:-1] for trace in traces]
    assert any(tokens in text for tokens in lists for text in written) == republish


def test_a_graph_of_a_withheld_document_has_no_text(pair: PairedModel, traces: list[Trace], tmp_path: Path) -> None:
    trace = replace(next(t for t in traces if not t.republish), tokens=traces[0].tokens[:24], thinking_length=0)
    options = {"max_feature_nodes": 20, "progress": False}
    shown, graph = (attribute(pair, replace(trace, republish=mark), **options) for mark in (True, False))
    assert set(graph.strings) == {WITHHELD} and torch.equal(graph.weights, shown.weights)
    graph.save(tmp_path / "graph")
    assert AttributionGraph.load(tmp_path / "graph").about["texts_withheld"]
    for name, each in (("shown", shown), ("withheld", graph)):
        write_circuit_tracer(each, tmp_path, name)
        record = json.loads((tmp_path / f"{name}.json").read_text())
        tokens = [node["node_id"] for node in record["nodes"] if node["feature_type"] == "embedding"]
        named = {int(node.split("_")[1]) for node in tokens}
        assert (named <= {0}) == (name == "withheld") == (set(record["metadata"]["prompt_tokens"]) == {WITHHELD})


def test_stores_of_earlier_versions_withhold_nothing(folder: Path, tmp_path: Path) -> None:
    earlier = shutil.copytree(folder, tmp_path / "earlier")
    for file in earlier.rglob(DOCUMENTS_FILE):
        tensors = read_tensors(file, advice="")
        del tensors["withheld"]
        file.unlink()
        write_tensors(file, tensors)
    store = FeatureStore.load(earlier)
    assert not any(WITHHELD in example.tokens for example in examples(store))
