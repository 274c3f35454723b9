"""A stage of a study replaces what that stage wrote, and nothing else (A21)."""

import json
from pathlib import Path

import pytest
import torch
from helpers import stores
from helpers.random_models import random_batch, random_model

import tl_adapters.study.features as describing
from tl_adapters.attribution.attribute import attribute
from tl_adapters.attribution.graph import LINEARIZATIONS
from tl_adapters.attribution.targets import LogitTarget, token_id
from tl_adapters.config import TrainingConfig
from tl_adapters.data.traces import Trace
from tl_adapters.features.feature import Label
from tl_adapters.features.store import FeatureStore
from tl_adapters.generation.responses import Response
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.pages.graph_page import remove_graph, write_graph
from tl_adapters.study.attribution import attribution_stage
from tl_adapters.study.evaluation_stages import faithfulness_stage
from tl_adapters.study.features import FEATURES_FOLDER, NEURONS_FOLDER, STORE_FOLDER, features_stage, load_stores
from tl_adapters.study.label import REPLIES_FOLDER
from tl_adapters.study.train import train_stage
from tl_adapters.training.trainer import Trainer
from tl_adapters.utils.results import read_results, write_results


def test_features_keep_labels_and_replies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        describing, "draw_pages", lambda store, pages: pages.mkdir(exist_ok=True)
    )  # no page is looked at
    pair, traces = stores.random_pair(), stores.documents()
    features_stage(pair, traces[:2], tmp_path, "report")
    store, neurons = load_stores(tmp_path)
    judged, neuron = Label("sums of two numbers", "reasoning output", "judge-1", 0.8), Label("commas", "", "judge-1")
    store.set_labels({store.ids(1)[0]: judged})
    neurons.set_labels({neurons.ids(1)[0]: neuron})
    replies = tmp_path / FEATURES_FOLDER / REPLIES_FOLDER
    replies.mkdir()
    (replies / "paid.json").write_text("{}")
    write_results(tmp_path, labels={"judge": 1})
    again = features_stage(pair, traces[2:5], tmp_path, "report")
    assert again.documents == 3 and load_stores(tmp_path)[0].documents == 3
    assert again.labels[store.ids(1)[0]] == judged
    assert FeatureStore.load(tmp_path / FEATURES_FOLDER / NEURONS_FOLDER).labels[neurons.ids(1)[0]] == neuron
    assert (replies / "paid.json").is_file() and read_results(tmp_path)["labels"] == {"judge": 1}
    assert sorted(p.name for p in (tmp_path / FEATURES_FOLDER).iterdir()) == [
        "neuron_pages", "neurons", "pages", "replies", "store",
    ]  # fmt: skip

    kept = features_stage(pair, traces[:6], tmp_path, "another split")  # as if the subcommand features had
    assert kept.about.split == "report" and kept.documents == 3 and kept.labels[store.ids(1)[0]] == judged
    assert read_results(tmp_path)["features"]["split"] == "report"


def test_faithfulness_on_other_documents_leaves_what_is_known_of_the_features(tmp_path: Path) -> None:
    pair, traces = stores.random_pair(), stores.documents()[:3]
    faithfulness_stage(pair, traces, tmp_path, "report")
    assert set(read_results(tmp_path)["features"]) == {"total", "alive", "tokens"}
    known = {"alive": 7, "documents": 40, "labels": [1], "neurons": {"alive": 3}, "agreement": [2], "split": "report"}
    write_results(tmp_path, features=known)
    faithfulness_stage(pair, traces, tmp_path, "held_out.jsonl")
    results = read_results(tmp_path)
    assert results["features"] == known and results["faithfulness"]["tokens"]["all"] > 0


def test_graphs_of_the_users_own_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = stores.random_pair()
    tokens = list(stores.documents()[0].tokens[:12])
    graph = attribute(pair, tokens, ["Wait"], max_feature_nodes=10, progress=False)
    graphs = tmp_path / "graphs"
    for name in ("mine", "moment-2"):
        write_graph(pair, graph, graphs, name)

    def drawn(pair: PairedModel, tokens: object, target: LogitTarget, folder: Path, name: str, store: object) -> dict:
        page, _ = write_graph(pair, graph, folder, name)
        found = {"page": f"{folder.name}/{page.name}", "residual": 0.0, "influence_through_features": 1.0}
        return found | {"rank_correlation": dict.fromkeys(LINEARIZATIONS, 1.0)}

    monkeypatch.setattr("tl_adapters.study.attribution.attribute_onset", drawn)
    word = token_id(pair, "Wait")
    said = Response(tuple(tokens), (word,), "Wait", False, True)

    def listed() -> set[str]:
        record = json.loads((graphs / "circuit-tracer" / "graph-metadata.json").read_text())
        return {entry["slug"] for entry in record["graphs"]}

    for n, expected in ((3, {"moment-1", "moment-3", "moment-4"}), (1, {"moment-1"})):
        attribution_stage(pair, [said] * n, tmp_path, "report")
        assert listed() == {p.stem for p in graphs.glob("*.html")} == {"mine", "moment-2"} | expected
        assert {p.stem for p in (graphs / "circuit-tracer").glob("m*.json")} == {"mine", "moment-2"} | expected
    remove_graph(graphs, "mine")
    remove_graph(graphs, "never-there")
    assert listed() == {"moment-1", "moment-2"} and not (graphs / "mine").exists()


def test_resuming_a_finished_run_changes_no_figure(tmp_path: Path) -> None:
    batch = random_batch(3)
    traces = [Trace(tuple(row[real].tolist()), 3) for row, real in zip(batch.tokens, batch.real, strict=True)]
    models = [random_model(seed, torch.float32, num_hidden_layers=2) for seed in (1, 2)]
    config = TrainingConfig(stages=("end_to_end",), n_features=8, steps=4, log_every=2)
    folder = tmp_path / "run"
    train_stage(Trainer(PairedModel.from_pretrained(*models), traces, config, folder, progress=False), folder)
    before = (folder / "results.json").read_bytes()
    spent = read_results(folder)["train"]
    assert spent["tokens"] > 0

    def resume() -> Trainer:
        return Trainer.resume(PairedModel.from_pretrained(*models), traces, folder, progress=False)

    train_stage(resume(), folder)
    assert (folder / "results.json").read_bytes() == before
    (folder / "results.json").unlink()  # killed between the last checkpoint and the figures
    train_stage(resume(), folder)
    assert read_results(folder)["train"] == spent
    record = json.loads((folder / "run.json").read_text())
    del record["spent"]  # a run of the first release
    (folder / "run.json").write_text(json.dumps(record))
    assert resume().tokens == spent["tokens"]
    assert (folder / STORE_FOLDER).exists() is False
