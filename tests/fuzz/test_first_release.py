"""Files as the first release wrote them, key by key, are read; what is damaged in them is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.readers import READERS
from helpers.random_graphs import random_graph

from tl_adapters.attribution.graph import AttributionGraph, GraphError
from tl_adapters.checkpoints.tensor_fields import floats, require_tensors, whole_numbers
from tl_adapters.circuits.circuit import Circuit, CircuitError
from tl_adapters.evaluation.sampled_responses import SamplingError, _whole_batches
from tl_adapters.features.feature import FeatureStoreError
from tl_adapters.features.store import FeatureStore
from tl_adapters.pages.report import _read_answers
from tl_adapters.utils.reading import UnreadableFileError

CIRCUIT = {
    "schema_version": 1,
    "behaviour": "hesitation",
    "words": ["Wait"],
    "features": [
        {"id": [1, 2], "role": "output", "direct": 0.5, "through": 0.1, "total": 0.6, "follows": None, "contrast": 0.2,
         "mass": 1},
    ],
    "strength": 1,
    "split": "select",
    "fingerprints": {"adapters": "a"},
    "n_features": 8,
    "n_layers": 2,
    "threshold": 0.1,
    "edges": [{"source": [1, 2], "target": None, "weight": 0.5}],
}  # fmt: skip
ANSWER = {
    "problem": 0, "sample": 0, "correct": True, "truncated": False, "question": "1 + 1?", "text": "2", "prompt": [1, 2],
    "tokens": [3],
}  # fmt: skip


def test_a_circuit_of_version_1(tmp_path: Path) -> None:
    (tmp_path / "circuit.json").write_text(json.dumps(CIRCUIT))
    circuit = Circuit.load(tmp_path)
    assert circuit.phrases == () and circuit.function is None and circuit.features[0].activation == 1.0
    assert circuit.features[0].continuation != circuit.features[0].continuation  # null is NaN
    circuit.save(tmp_path / "again.json")
    assert Circuit.load(tmp_path / "again.json").json_text() == circuit.json_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": "1"}, "strength is '1'; allowed is a number"),
        ({"n_layers": True}, "n_layers is True; allowed is a whole number"),
        ({"edges": [{"source": [1, 8], "target": None, "weight": 1}]}, "no feature 1.8 in 2 layers of 8"),
        ({"behavior": "x"}, "Unknown key behavior"),
        ({"features": CIRCUIT["features"] * 2}, "a feature is in it twice"),  # type: ignore[operator]
    ],
)
def test_a_circuit_that_cannot_be_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "circuit.json").write_text(json.dumps(CIRCUIT | change))
    with pytest.raises(CircuitError, match=message):
        Circuit.load(tmp_path)


def test_a_graph_without_a_hash(tmp_path: Path) -> None:
    graph = random_graph(2, True, 5)
    graph.save(tmp_path / "g")
    record = json.loads((tmp_path / "g" / "graph.json").read_text())
    del record["sha256"]
    (tmp_path / "g" / "graph.json").write_text(json.dumps(record))
    back = AttributionGraph.load(tmp_path / "g")
    assert torch.equal(back.edges, graph.edges) and back.targets == graph.targets and back.strings == graph.strings


def test_a_graph_notices_one_flipped_bit_and_indices_out_of_range(tmp_path: Path) -> None:
    graph = next(g for g in (random_graph(seed, True, 5) for seed in range(9)) if g.n_layers > 1)
    graph.save(tmp_path / "g")
    path, tensors = tmp_path / "g" / "graph.json", tmp_path / "g" / "graph.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(GraphError, match=r"graph\.safetensors is not the file that .*graph\.json was written with"):
        AttributionGraph.load(tmp_path / "g")
    tensors.write_bytes(whole)
    record = json.loads(path.read_text())
    for change, message in (
        ({"n_layers": 1}, "name a layer from 1"),
        ({"strings": record["strings"][:-1]}, "tensor (tokens|errors|edges)|a position from"),
        ({"targets": [record["targets"][0] | {"position": 99}]}, r"targets\[0\]\.position is 99|edges"),
        ({"about": {"fingerprints": [1]}}, "about.fingerprints is"),
    ):
        path.write_text(json.dumps(record | change))
        with pytest.raises(GraphError, match=message):
            AttributionGraph.load(tmp_path / "g")


def test_answers_without_end_tokens_and_near_ties(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    lines = [json.dumps(ANSWER | {"problem": problem}) for problem in (1, 0)]
    path.write_text("\n".join(lines) + '\n{"problem": 0, "sam')
    ((first,), (second,)) = _whole_batches(path, [[1], [0]])
    assert (first.problem, second.problem, first.response.end, first.response.near_ties) == (1, 0, None, 0)
    assert path.read_text().splitlines() == lines  # what the kill left is removed
    with pytest.raises(SamplingError, match="should hold sample 0 of the problems"):
        _whole_batches(path, [[0], [1]])
    path.write_text("{\n" + "\n".join(lines) + "\n")
    with pytest.raises(SamplingError, match=r"answers\.jsonl, line 1"):  # and nothing after it is lost
        _whole_batches(path, [[1], [0]])
    assert path.read_text().endswith(lines[-1] + "\n")


def store(tmp_path: Path) -> Path:
    READERS["store"].write(tmp_path / "store")
    return tmp_path / "store"


def edit(path: Path, change: Callable[[Any], object]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("labels.json", lambda r: r.update({"9.1": {"text": "x"}}), "labels the feature 9.1"),
        ("labels.json", lambda r: r["0.1"].update(score="1"), "labels.0.1.score is '1'"),
        ("agreement.json", lambda r: r[0].pop("kept"), "layer 0 of the list: The key kept is missing"),
        ("vocabulary.json", lambda r: r.pop(), "files of several stores|values from"),
        ("vocabulary.json", lambda r: r.append(1), "allowed is a list of texts"),
        ("part-a/part.json", lambda r: r["region"].append(1), "several stores|region has other counts"),
        ("part-a/part.json", lambda r: r.update(documents=79), "tensor start has the shape"),
        ("store.json", lambda r: r.update(n_features=11), "11"),
        ("store.json", lambda r: r["options"].update(before=7), "windows of"),
        ("store.json", lambda r: r["options"].update(before=-1), "before is -1"),
    ],
)
def test_files_of_a_store_that_contradict_each_other(
    file: str, change: Callable[[Any], object], message: str, tmp_path: Path
) -> None:
    folder = store(tmp_path)
    READERS["store"].read(folder)
    edit(folder / file, change)
    with pytest.raises(FeatureStoreError, match=message):
        READERS["store"].read(folder)


def test_a_store_of_the_first_release_calls_co_activating_features_neighbors(tmp_path: Path) -> None:
    folder = store(tmp_path)
    options = json.loads((folder / "store.json").read_text())["options"]
    assert "neighbours" in options and "coactivating" not in options
    edit(folder / "store.json", lambda r: r.pop("schema_version"))
    assert FeatureStore.load(folder).about.options.coactivating == options["neighbours"]


def test_tensors_are_compared_with_their_fields() -> None:
    fields = {"a": whole_numbers("n", 2, below="m"), "b": floats("n"), "c": floats("m")}
    good = {"a": torch.tensor([[0, 2], [1, 1]]), "b": torch.zeros(2), "c": torch.zeros(3)}
    assert require_tensors(good, fields, "x", {"m": 3}) == {"n": 2, "m": 3}
    for change, message in (
        ({"a": torch.tensor([[0, 3], [1, 1]])}, "a holds values from 0 to 3; allowed are values from 0 to 2"),
        ({"a": torch.tensor([[0, -1], [1, 1]])}, "a holds values from -1"),
        ({"a": torch.zeros(2, 2)}, "a is of dtype float32"),
        ({"b": torch.zeros(3)}, r"b has the shape \[3\]; expected \[2\]"),
        ({"b": torch.tensor([0.0, torch.nan])}, "b holds NaN or infinity"),
        ({"d": torch.zeros(1)}, "unknown tensor 'd'"),
    ):
        with pytest.raises(UnreadableFileError, match=f"^x.*{message}"):
            require_tensors(good | change, fields, "x", {"m": 3})
    with pytest.raises(UnreadableFileError, match="no tensor c"):
        require_tensors({"a": good["a"], "b": good["b"]}, fields, "x", {"m": 3})


def test_answers_of_a_report_are_named_where_they_are_damaged(tmp_path: Path) -> None:
    """The answers of a run's report, of which runs of the first release hold three models."""
    path = tmp_path / "answers.jsonl"
    whole = {"question": "1 + 1?", "target": "2", "hybrid": "3", "replacement": "2"}
    path.write_text(json.dumps(whole) + "\n" + json.dumps(whole | {"base": "5"}) + "\n")
    assert [answers.hybrid for answers in _read_answers(path)] == ["3", "3"]
    del whole["hybrid"]
    path.write_text(json.dumps(whole) + "\n")
    with pytest.raises(UnreadableFileError, match=r"answers\.jsonl, line 1: The key hybrid is missing"):
        _read_answers(path)
