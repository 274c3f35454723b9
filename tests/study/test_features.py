"""A run's features: the demo's stage, the subcommand on any documents, shares of several processes, refusals."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from helpers.fake_chat import FakeChat
from helpers.judges import knowing

from tl_adapters import organism
from tl_adapters.cli.main import main
from tl_adapters.features.feature import FeatureStoreError
from tl_adapters.study.features import (
    FEATURES_FOLDER,
    NEURONS_FOLDER,
    STORE_FOLDER,
    features_if_begun,
    has_features,
    load_stores,
)
from tl_adapters.study.open_run import open_run
from tl_adapters.utils.results import read_results


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run of one's own, without its features."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / FEATURES_FOLDER)
    return folder


def test_the_demo_says_what_its_features_are(run: Path) -> None:
    block = read_results(run)["features"]
    store, neurons = load_stores(run)
    pair = open_run(run)
    store.require_features_of(pair)
    with pytest.raises(FeatureStoreError, match="holds neurons"):
        neurons.require_features_of(pair)
    assert (block["stream"], block["split"], block["documents"]) == ("replacement", "report", store.documents)
    assert block["total"] == pair.n_layers * pair.installed_adapters().n_features
    assert block["alive"] == len(store.ids()) > 0
    assert [layer["layer"] for layer in block["agreement"]] == list(range(pair.n_layers))
    assert block["agreement"][0]["overlap"]["value"] == 1.0
    for labels in (block["labels"], block["neurons"]["labels"]):
        assert sum(share["share"]["value"] for share in labels.values()) == pytest.approx(1)
    active = float(store.firings.sum()) / store.tokens / pair.n_layers
    assert block["neurons"]["per_token"] == max(1, round(active)) == neurons.about.options.neurons_per_token
    assert all(store.feature(id).label is not None for id in store.ids()[:20])
    assert (run / block["page"]).is_file()
    report = (run / "report.html").read_text()
    assert f'href="{block["page"]}"' in report and "Features by label" in report


def test_a_moments_graph_knows_the_stores_labels_and_examples(run: Path) -> None:
    store, _ = load_stores(run)
    moments = [json.loads(path.read_text()) for path in (run / "graphs" / "circuit-tracer").glob("moment-*.json")]
    nodes = [node for moment in moments for node in moment["nodes"] if node["feature_type"] == "cross layer transcoder"]
    assert nodes or not moments
    for node in nodes:
        layer, index = map(int, node["node_id"].split("_")[:2])
        label = store.labels.get((layer, index))
        assert node["clerp"] == (label.text if label else "")


def test_the_subcommand_reads_any_documents(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "mine.jsonl"
    lines = [
        {"prompt": question, "response": response, "domain": ("even", "odd")[i % 2]}
        for i, (question, response) in enumerate(organism.reasoning_pairs("report", 12))
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ["--data", str(data), "--quiet", "--sample", "3", "--examples", "4"]
    for share in ("0/2", "1/2"):
        assert main(["features", str(copy), *common, "--share", share]) == 0
    assert "when every process is done" in capsys.readouterr().out
    assert main(["features", str(copy), *common]) == 0
    out = capsys.readouterr().out
    assert f"pages: {copy / FEATURES_FOLDER / 'pages' / 'index.html'}" in out
    assert f"next: tl-adapters label {copy}" in out
    store, neurons = load_stores(copy)
    assert store.documents == neurons.documents == 12 and store.about.split == "mine.jsonl"
    feature = store.feature(store.ids(1)[0])
    assert set(feature.domains) == {"even", "odd"} and len(feature.top_examples) <= 4
    before = (copy / FEATURES_FOLDER / STORE_FOLDER / "store.json").read_bytes()
    assert main(["features", str(copy), *common]) == 0, "again is nothing new"
    assert store.documents == load_stores(copy)[0].documents
    assert main(["features", str(copy), *common, "--stream", "target"]) == 2
    assert "was collected with stream 'replacement'" in capsys.readouterr().err
    assert (copy / FEATURES_FOLDER / STORE_FOLDER / "store.json").read_bytes() == before


def test_a_folder_in_which_a_collection_has_just_begun(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It holds no store yet: while another process writes its first files, and after one that was killed there."""
    stores = [copy / FEATURES_FOLDER / name for name in (STORE_FOLDER, NEURONS_FOLDER)]
    for store in stores:
        store.mkdir(parents=True)
    assert features_if_begun(copy) is None and not has_features(copy)
    data = tmp_path / "mine.jsonl"
    rows = ({"prompt": q, "response": r} for q, r in organism.reasoning_pairs("report", 4))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["features", str(copy), "--data", str(data), "--quiet"]) == 0
    assert features_if_begun(copy) is not None and has_features(copy)
    shutil.rmtree(*stores[0].glob("part-*"))  # as where it was killed later, with its description written
    for words in (["hesitation", str(copy)], ["attribute", str(copy), "--prompt", "1+2=?", "--name", "mine"]):
        assert main([*words, "--quiet"]) == 2, "before what would take minutes"
        assert f"error: {stores[0]} " in capsys.readouterr().err


def test_a_run_is_labelled_by_rules_and_by_a_judge(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    with FakeChat(knowing) as server:
        monkeypatch.setenv("TL_ADAPTERS_BASE_URL", server.url)
        monkeypatch.setenv("TL_ADAPTERS_MODEL", "fake")
        argv = ["label", str(folder), "--judge", "12", "--retest", "4", "--auto-interp", "6", "--quiet"]
        assert main(argv) == 0
        out, asked = capsys.readouterr().out, len(server.asked)
        assert asked >= 12 + 4 and "detection score of features" in out and "judged" in out
        assert main(argv) == 0
        assert len(server.asked) == asked, "what was answered is not asked again"
    block = read_results(folder)["labels"]
    assert block["judge"]["judged"] == 12 and block["judge"]["agreement"]["n"] == 4
    assert block["detection"]["neurons"]["score"]["n"] > 0
    store, _ = load_stores(folder)
    assert sum(label.source == "fake" for label in store.labels.values()) >= 12
    rules = read_results(folder)["features"]["labels"]
    assert sum(share["count"] for share in rules.values()) == len(store.ids()), "the rules' shares are of all"
    report = (folder / "report.html").read_text()
    assert "Labels by an LLM judge" in report and "detection score" in report
    shutil.rmtree(folder / FEATURES_FOLDER)
    assert main(["label", str(folder)]) == 2
    assert "holds no feature store" in capsys.readouterr().err


def test_features_are_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "neuronpedia"
    assert main(["export", str(run), "--to", "neuronpedia", "--out", str(out), "--model-id", "mine", "--quiet"]) == 0
    batches = [json.loads(path.read_text()) for path in out.rglob("batch-*.json")]
    assert sum(len(batch["features"]) for batch in batches) == len(load_stores(run)[0].ids())
    assert {batch["model_id"] for batch in batches} == {"mine"}
    capsys.readouterr()
    assert main(["export", str(run), "--to", "neuronpedia", "--out", str(tmp_path / "unnamed"), "--quiet"]) == 2
    assert "give its name there with --model-id" in capsys.readouterr().err
    argv = ["export", str(run), "--to", "sae-dashboard", "--out", str(tmp_path / "d")]
    assert main(argv) == 2
    assert "layer.index, such as 2.17" in capsys.readouterr().err
    if importlib.util.find_spec("sae_dashboard") is None:
        assert main([*argv, "--features", "2.17"]) == 2
        assert "pip install --no-deps sae-dashboard" in capsys.readouterr().err


def test_refusals_in_one_line(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*argv: str) -> str:
        assert main(["features", *argv]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    assert "give I/N" in fails(str(copy), "--share", "half")
    assert "give I/N" in fails(str(copy), "--share", "2/2", "--quiet")
    assert "give a whole number of at least 1" in fails(str(copy), "--examples", "0")
    assert "There is no file" in fails(str(copy), "--data", str(tmp_path / "none.jsonl"), "--quiet")
    assert "has no adapters" in fails(str(tmp_path / "none"))
    results = read_results(copy)
    (copy / "results.json").write_text(json.dumps({**results, "pair": {**results["pair"], "target": "other"}}))
    assert "--data is missing" in fails(str(copy))
    with pytest.raises(FeatureStoreError, match="holds no feature store"):
        load_stores(copy)
    assert not (copy / FEATURES_FOLDER / NEURONS_FOLDER).exists()
