"""Nothing of the user's is deleted, renamed or overwritten: neither beside a run's files nor under their names."""

import errno
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import small_scale
from helpers import stores

import tl_adapters.study.attribution as stage_of_graphs
from tl_adapters import organism
from tl_adapters.attribution.attribute import attribute
from tl_adapters.attribution.graph import AttributionGraph, GraphError
from tl_adapters.cli.main import main
from tl_adapters.data.chat_format import encode_traces
from tl_adapters.data.hesitation_words import HESITATION_ONSET
from tl_adapters.features.feature import Label
from tl_adapters.generation.responses import Response
from tl_adapters.interop.circuit_tracer import listed_graphs
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.pages import graph_page
from tl_adapters.pages.graph_page import free_graph_name, require_new_graph, write_graph
from tl_adapters.pages.report import write_report
from tl_adapters.study.benchmark import benchmark_run
from tl_adapters.study.evaluate import evaluate_organism
from tl_adapters.study.features import label_and_record, load_stores
from tl_adapters.study.open_run import open_run
from tl_adapters.utils.files import FolderExistsError, WriteError, alone_in
from tl_adapters.utils.results import changed_results, output_file, read_results

USERS = {
    "notes.txt": b"mine",
    "report.html": b"<p>of another program</p>",
    "answers.jsonl": b"\xff not even text",
    "circuit.json": b'{"mine": true}',
    "hesitation.html": b"<p>drawn by hand</p>",
    "hesitation.jsonl": b"",
    "features/NOTE.md": b"mine",
    "features/store/NOTE.md": b"mine",
    "features/pages/mine.html": b"mine",
    "features/neuron_pages/drawings/one.svg": b"<svg/>",
    "features/replies/paid.json": b"{}",
    "graphs/own.json": b"{}",
    "graphs/moment-9/graph.json": b"{}",
    "graphs/circuit-tracer/mine.json": b"{}",
    "benchmarks/notes.md": b"mine",
}


@pytest.fixture
def seeded(run: Path, tmp_path: Path) -> Path:
    """A finished run into which the user has put files, a label and a block, also under the names of our own files."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for name, content in USERS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for store in load_stores(folder):
        store.set_labels({store.ids(1)[0]: Label("mine", "", "a person")})
    with changed_results(folder) as results:
        results["mine"] = {"value": 1}
    return folder


def test_every_stage_leaves_what_is_the_users(seeded: Path) -> None:
    scale = small_scale()
    scale = replace(scale, problems=6, documents=8, baseline_documents=2, max_new_tokens=40, hesitation=(8, 6))
    pair = open_run(seeded)
    fit = encode_traces(organism.reasoning_pairs("train", 8), pair.model.tokenizer)
    evaluate_organism(pair, seeded, scale, fit)
    benchmark_run(seeded, n=4, options={"max_new_tokens": 4}, progress=False)
    label_and_record(seeded, *load_stores(seeded))
    report = write_report(seeded)
    assert write_report(seeded) == report
    assert {name: (seeded / name).read_bytes() for name in USERS} == USERS
    results = read_results(seeded)
    assert results["mine"] == {"value": 1} and "mine" in [
        label.text for store in load_stores(seeded) for label in store.labels.values()
    ]
    assert report == seeded / "report-2.html" == output_file(seeded, "report.html")
    ours = {path.name for path in seeded.iterdir() if path.stem.endswith("-2")}
    assert ours == {"report-2.html", "answers-2.jsonl", "circuit-2.json", "hesitation-2.html", "hesitation-2.jsonl"}
    assert results["hesitation"]["page"] == "hesitation-2.html"
    assert not list(seeded.rglob(".*"))


def test_a_run_of_the_first_release_replaces_its_own_pages(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    with changed_results(tmp_path / "run") as results:
        del results["files"]
    (tmp_path / "run" / "report.html").write_text("an earlier report")
    assert write_report(tmp_path / "run") == tmp_path / "run" / "report.html"
    assert "an earlier report" not in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("part", ["judge", "detection"])
def test_a_report_shows_a_run_labeled_by_one_of_the_two(part: str, tmp_path: Path) -> None:
    judge = {"judged": 2, "alive": 3, "model": "a judge", "agreement": None, "shares": {}}
    block = {"judge": judge, "detection": {"model": "a judge", "features": None, "neurons": None}}
    pair = {"base": "base", "target": "target", "n_layers": 2, "d_model": 8}
    with changed_results(tmp_path) as results:
        results |= {"pair": pair, "train": {"n_features": 4}, "labels": {part: block[part]}}
    assert "a judge" in write_report(tmp_path).read_text()


@pytest.fixture(scope="module")
def graph() -> tuple[PairedModel, AttributionGraph]:
    pair = stores.random_pair()
    tokens = list(stores.documents()[0].tokens[:12])
    return pair, attribute(pair, tokens, ["Wait"], max_feature_nodes=10, progress=False)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", ["circuit-tracer", "Circuit-Tracer", ".", "..", "...", "a/b", "", "x" * 300])
def test_names_that_no_graph_can_have_are_refused_before_anything_is_computed(
    name: str, graph: tuple[PairedModel, AttributionGraph], tmp_path: Path
) -> None:
    with pytest.raises((GraphError, WriteError)):
        require_new_graph(tmp_path / "graphs", name)
    with pytest.raises((GraphError, WriteError)):
        write_graph(*graph, tmp_path / "graphs", name)
    assert files(tmp_path) == []


@pytest.mark.parametrize("taken", ["mine.html", "mine/graph.json"])
def test_a_page_or_folder_of_the_users_is_not_a_graphs(
    taken: str, graph: tuple[PairedModel, AttributionGraph], tmp_path: Path
) -> None:
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    (tmp_path / taken).write_text("mine")
    with pytest.raises(FolderExistsError, match="exists already"):
        write_graph(*graph, tmp_path, "mine")
    assert (tmp_path / taken).read_text() == "mine" and len(files(tmp_path)) == 1 + ("/" in taken)
    (tmp_path / "graph-1.html").touch()
    assert free_graph_name(tmp_path, "graph") == "graph-2"


def test_a_graph_that_is_stopped_at_any_write_is_not_listed_and_can_be_written_again(
    graph: tuple[PairedModel, AttributionGraph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th rename is refused, for n = 1, 2, ... until the graph is there."""

    def failing(rename: Callable[..., None]) -> Callable[..., None]:
        def call(*paths: object) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            rename(*paths)

        return call

    stopped = 0
    for n in range(1, 200):
        folder, left = tmp_path / str(n), n
        with monkeypatch.context() as patched:
            patched.setattr(os, "rename", failing(os.rename))
            patched.setattr(os, "replace", failing(os.replace))
            try:
                write_graph(*graph, folder, "one")
                break
            except WriteError:
                stopped += 1
        assert not (folder / "circuit-tracer" / "graph-metadata.json").exists()
        write_graph(*graph, folder, "one")
        assert not list(folder.rglob(".*"))
    assert stopped > 4 and (folder / "one.html").is_file() and (folder / "one" / "graph.json").is_file()
    with pytest.raises(FolderExistsError, match="exists already"):
        write_graph(*graph, folder, "one")
    shutil.rmtree(folder / "one")
    (folder / "one.html").unlink()
    with pytest.raises(FolderExistsError, match="lists a graph 'one'"):
        write_graph(*graph, folder, "one")


@pytest.mark.parametrize("last", ["one.html", "one", "graph-metadata.json"])
def test_a_graph_whose_process_was_killed_while_it_was_named_can_be_written_again(
    last: str, graph: tuple[PairedModel, AttributionGraph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed takes nothing back, so here nothing can be removed after the last file."""
    (tmp_path / "own.html").write_text("mine")
    rename = graph_page.name_new

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    def named(work: Path, path: Path) -> None:
        rename(work, path)
        if path.name == last:
            die()

    with monkeypatch.context() as patched:
        patched.setattr(graph_page, "name_new", named)
        patched.setattr(graph_page, "remove_own", lambda path: die())
        with pytest.raises(KeyboardInterrupt):
            write_graph(*graph, tmp_path, "one")
    assert (tmp_path / "one.html").is_file() and (tmp_path / ".unfinished-graph").read_text() == "one"
    listed = listed_graphs(tmp_path / "circuit-tracer")
    assert ("one" in listed) is (last == "graph-metadata.json")
    if "one" in listed:  # it is complete, and stays
        with pytest.raises(FolderExistsError):
            require_new_graph(tmp_path, "one")
        require_new_graph(tmp_path, "two")
    else:
        require_new_graph(tmp_path, "one")
        write_graph(*graph, tmp_path, "one")
    assert (tmp_path / "one" / "graph.json").is_file() and (tmp_path / "own.html").read_text() == "mine"
    assert not list(tmp_path.rglob(".unfinished*"))


@pytest.mark.parametrize("name", ["../own", "circuit-tracer", ""])
def test_a_name_that_no_graph_can_have_removes_nothing(name: str, tmp_path: Path) -> None:
    (tmp_path / "graphs" / "circuit-tracer").mkdir(parents=True)
    (tmp_path / "own.html").touch()
    (tmp_path / "graphs" / ".unfinished-graph").write_text(name)
    with pytest.raises(GraphError):
        require_new_graph(tmp_path / "graphs", "one")
    assert (tmp_path / "own.html").is_file() and (tmp_path / "graphs" / "circuit-tracer").is_dir()


def test_graphs_without_a_name_that_are_written_at_once_take_a_name_each(
    graph: tuple[PairedModel, AttributionGraph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both found graph-1 free when they began; the second one is computed, too, and is not lost."""
    at_once = threading.Barrier(2, timeout=60)
    records = graph_page.feature_records

    def together(*args: Any) -> Any:
        at_once.wait()
        return records(*args)

    monkeypatch.setattr(graph_page, "feature_records", together)
    with ThreadPoolExecutor(2) as pool:
        written = list(pool.map(lambda _: write_graph(*graph, tmp_path), range(2)))
    assert sorted(paths.page.name for paths in written) == ["graph-1.html", "graph-2.html"]
    assert sorted(listed_graphs(tmp_path / "circuit-tracer")) == ["graph-1", "graph-2"]


def test_a_prompt_of_one_token_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tl_adapters.study.open_run.open_run", lambda *_: stores.random_pair())
    monkeypatch.setattr("tl_adapters.attribution.attribute.attribute", lambda *_, **__: pytest.fail("it started"))
    assert main(["attribute", str(tmp_path), "--prompt", "4", "--quiet"]) == 2
    assert "does not show a prompt of one token; give a longer one" in capsys.readouterr().err
    assert files(tmp_path) == []


def test_graphs_of_an_evaluation_that_was_killed_are_the_next_ones(
    graph: tuple[PairedModel, AttributionGraph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, _ = graph
    word, graphs = stage_of_graphs.token_id(pair, HESITATION_ONSET), tmp_path / "graphs"
    answers = [Response((2, 3), (1, word), "", False, correct=True)] * 3
    survive = 2

    def onset(pair: object, tokens: object, target: object, folder: Path, name: str, store: object) -> dict[str, Any]:
        nonlocal survive
        write_graph(*graph, folder, name)
        survive -= 1
        if survive == 0:
            raise KeyboardInterrupt
        return {
            "page": f"graphs/{name}.html",
            "residual": 0.0,
            "influence_through_features": 1.0,
            "rank_correlation": dict.fromkeys(stage_of_graphs.LINEARIZATIONS),
        }

    monkeypatch.setattr(stage_of_graphs, "attribute_onset", onset)
    write_graph(*graph, graphs, "moment-1")  # the user's
    with pytest.raises(KeyboardInterrupt):
        stage_of_graphs.attribution_stage(pair, answers, tmp_path, "report")
    for _ in range(2):
        stage_of_graphs.attribution_stage(pair, answers, tmp_path, "report")
        assert sorted(path.stem for path in graphs.glob("*.html")) == [f"moment-{i}" for i in range(1, 5)]
        assert read_results(tmp_path)["moment_graphs"] == ["moment-2", "moment-3", "moment-4"]


@pytest.mark.parametrize("stage", ["evaluate", "features", "label", "hesitation"])
def test_a_run_that_is_busy_or_read_only_is_refused_before_anything_is_loaded(
    stage: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    before = files(folder)
    # Imported before anything is replaced: a module that is imported later would keep what replaces it.
    modules = [import_module(f"tl_adapters.study.{name}") for name in ("open_run", "features", "label")]
    for module, name in zip(modules, ("open_pair", "load_stores", "load_stores"), strict=True):
        monkeypatch.setattr(module, name, lambda *args, **options: pytest.fail("it loads something"))
    with alone_in(folder):
        assert main([stage, str(folder), "--quiet"]) == 2
    assert "Another process is writing to" in capsys.readouterr().err

    def read_only(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", read_only)
        assert main([stage, str(folder), "--quiet"]) == 2
    assert "it is on a read-only file system; choose another place" in capsys.readouterr().err
    assert files(folder) == before
