"""A sweep: its points are ordinary runs, a stopped one comes to the same file, and its front is what a front is."""

import json
import math
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from helpers.random_models import random_model

import tl_adapters.study.sweep as room
from tl_adapters import organism
from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.config import ConfigError, DataConfig, RunConfig, TrainingConfig
from tl_adapters.generation.responses import respond
from tl_adapters.organism.recipe import build_tokenizer
from tl_adapters.pages.sweep_page import (
    Sweep,
    SweepPoint,
    pareto_front,
    read_sweep_point,
    sweep_markdown,
    write_sweep_page,
)
from tl_adapters.study.grid import GridError, grid_configurations, read_grid
from tl_adapters.study.open_run import open_run
from tl_adapters.study.sweep import SweepError, resume_sweep, sweep
from tl_adapters.study.train import train_run
from tl_adapters.training.end_to_end_stage import EndToEndStage
from tl_adapters.training.trainer import TrainingInterrupted
from tl_adapters.utils.files import FolderBusyError, FolderExistsError
from tl_adapters.utils.measurement import Measurement

STEPS, DOCUMENTS = 4, 12
CONFIG = RunConfig(
    training=TrainingConfig(
        stages=("end_to_end",), steps=STEPS, n_features=48, tokens_per_batch=512, log_every=1, checkpoint_every=2
    ),
)
GRID: dict[str, list[Any]] = {"l1_weight": [0.001], "seed": [0, 3]}
NAMES = ["l1_weight-0.001_seed-0", "l1_weight-0.001_seed-3"]


@pytest.fixture(scope="module", autouse=True)
def few_documents() -> Iterator[None]:
    """The built-in pair's own text, but less of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tl_adapters.study.open_run.ORGANISM_TRACES", 60)
        yield


def run(
    folder: Path, config: RunConfig = CONFIG, grid: dict[str, list[Any]] = GRID, **options: Any
) -> list[SweepPoint]:
    return sweep(config, folder, grid, **{"documents": DOCUMENTS, "progress": False, **options})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that was never stopped."""
    folder = tmp_path_factory.mktemp("sweeps") / "whole"
    assert [point.name for point in run(folder)] == NAMES
    return folder


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sweep.json").read_text())


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with when it was written and what it holds."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many steps are trained; at ``interrupt_at`` comes a Ctrl-C."""
    counter, one_step = {"steps": 0, "interrupt_at": -1}, EndToEndStage.advance

    def counting(self: EndToEndStage, want_l0: bool) -> Any:
        counter["steps"] += 1
        if counter["steps"] == counter["interrupt_at"]:
            signal.raise_signal(signal.SIGINT)
        return one_step(self, want_l0)

    monkeypatch.setattr(EndToEndStage, "advance", counting)
    return counter


# -- what the points are ----------------------------------------------------------------------------------------------


def test_a_point_is_the_run_that_train_makes(whole: Path, tmp_path: Path) -> None:
    """Also of another seed, so of other documents: sharing pair and data between the points changes no bit."""
    for name in NAMES:
        config = RunConfig.load(whole / name / "config.json")
        train_run(config, tmp_path / name, progress=False)
        ours, theirs = (AdapterSet.from_pretrained(f / name / "adapters").state_dict() for f in (whole, tmp_path))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        for file in ("metrics.jsonl", "config.json"):
            assert (whole / name / file).read_bytes() == (tmp_path / name / file).read_bytes()


def test_the_figures_are_those_of_the_run_and_of_its_answers(whole: Path) -> None:
    points = {block["name"]: read_sweep_point(block) for block in record(whole)["points"]}
    for name, point in points.items():
        results = json.loads((whole / name / "results.json").read_text())
        f = results["faithfulness"]
        l0 = [figure["value"] for figure in f["l0"]]
        assert point.l0.value == pytest.approx(sum(l0) / len(l0))
        assert [point.kl.value, point.kl.low, point.kl.high] == [
            f["kl"]["replacement"][k] for k in ("value", "low", "high")
        ]
        assert point.kl_of_hybrid.value == pytest.approx(point.kl.value / point.kl_hybrid.value)
        assert point.nmse.value == f["nmse"][-1]["value"]
        assert (point.alive, point.features, point.tokens) == tuple(
            results["features"][k] for k in ("alive", "total", "tokens")
        )
        assert point.l0.seeds == (point.options["seed"],) and point.l0.split == "tune"
    assert len({point.kl.value for point in points.values()}) == len(points)

    pair, right = open_run(whole / NAMES[0]), {}
    for route in ("target", "hybrid", "replacement"):
        with pair.routed(route):
            right[route] = sum(r.correct for r in respond(pair.model, organism.problems("tune", DOCUMENTS)))
    gained = right["target"] - right["hybrid"]
    assert gained > 0
    recovered = points[NAMES[0]].recovered
    assert recovered is not None and recovered.n == DOCUMENTS
    assert recovered.value == pytest.approx((right["replacement"] - right["hybrid"]) / gained)
    assert record(whole)["behaviour"]["target"]["accuracy"] == pytest.approx(right["target"] / DOCUMENTS)


def test_another_pair_is_measured_on_a_file_or_on_what_is_held_out(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    for name, seed in (("base", 1), ("target", 2)):
        model = random_model(seed, torch.float32, vocab_size=len(tokenizer), max_position_embeddings=128)
        model.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "target")
    lines = [json.dumps({"prompt": q, "response": r}) for q, r in organism.reasoning_pairs("train", 40)]
    data, other = tmp_path / "traces.jsonl", tmp_path / "held <out>.jsonl"
    data.write_text("\n".join(lines[:30]))
    other.write_text("\n".join(lines[30:]))
    both = dict(base=str(tmp_path / "base"), target=str(tmp_path / "target"), training=CONFIG.training)
    config = RunConfig(**both, data=DataConfig(source=str(data)))
    with pytest.raises(SweepError, match="held-out prompts and responses"):
        run(tmp_path / "none", config)
    assert not (tmp_path / "none").exists()

    (point,) = run(tmp_path / "file", config, {"lr": [0.003]}, held_out=str(other), documents=7)
    assert point.kl.n == 7 and point.kl.split == other.name and point.recovered is None
    assert "recovered" not in sweep_markdown([point])
    html = (tmp_path / "file" / "sweep.html").read_text()
    assert "held &lt;out&gt;.jsonl" in html and "<out>" not in html and "ecovered" not in html
    share = RunConfig(**both, data=DataConfig(source=str(data), validation_fraction=0.3))
    (point,) = run(tmp_path / "share", share, {"lr": [0.003]}, documents=1000)
    assert point.kl.split == "validation" and 0 < point.kl.n < 30

    other.write_text("\n".join(lines[31:]))
    with pytest.raises(SweepError, match="fingerprint of held-out text was"):
        run(tmp_path / "file", config, {"lr": [0.003, 0.004]}, held_out=str(other), documents=7)
    data.write_text("\n".join(lines[:29]))
    with pytest.raises(SweepError, match=r"fingerprint of training data \(seed 0, prompt\+thinking\+answer\) was"):
        run(tmp_path / "share", share, {"lr": [0.003, 0.004]}, documents=1000)


# -- stopping and going on --------------------------------------------------------------------------------------------


def test_a_sweep_stopped_anywhere_comes_to_the_same_file(
    whole: Path, tmp_path: Path, counted: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my sweep"

    def stopped(go: Callable[[], object], done: int) -> None:
        with pytest.raises(TrainingInterrupted) as caught:
            go()
        assert f"Stopped with {done} of 2 points done" in str(caught.value)
        assert str(caught.value).endswith(f"tl-adapters sweep --resume '{folder}'")

    counted["interrupt_at"] = STEPS + 3  # in the training of the second point
    stopped(lambda: run(folder), 1)
    first = state(folder / NAMES[0])
    assert (folder / NAMES[1] / "checkpoints").is_dir()

    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # the second is trained on, and its measurement is stopped
        patch.setattr(room, "faithfulness_stage", interrupt)
        stopped(lambda: resume_sweep(folder, progress=False), 1)
    assert [p["name"] for p in record(folder)["points"]] == NAMES[:1]
    shutil.rmtree(folder / NAMES[0] / "adapters")  # a point that is done is not even looked at
    points = run(folder)
    assert counted["steps"] == STEPS * len(NAMES)
    assert (folder / "sweep.json").read_bytes() == (whole / "sweep.json").read_bytes()
    assert {k: v for k, v in first.items() if "adapters" not in k} == state(folder / NAMES[0])
    assert points == [read_sweep_point(block) for block in record(whole)["points"]]
    assert not list(folder.rglob(".*"))


def test_one_that_is_done_takes_more_values(whole: Path, tmp_path: Path, counted: dict[str, int]) -> None:
    folder = tmp_path / "sweep"
    shutil.copytree(whole, folder)
    assert run(folder) == [read_sweep_point(block) for block in record(whole)["points"]] and counted["steps"] == 0
    before = state(folder)
    points = run(folder, grid={"seed": [0], "l1_weight": [0.001, 0.01]})  # the options in any order
    assert [point.name for point in points] == [*NAMES, "l1_weight-0.01_seed-0"] and counted["steps"] == STEPS
    after = state(folder)
    assert {k: v for k, v in before.items() if "/" in k} == {k: v for k, v in after.items() if k.split("/")[0] in NAMES}
    assert record(folder)["points"][:2] == record(whole)["points"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(config=RunConfig(training=TrainingConfig(stages=("end_to_end",), steps=5))),
            "training.steps was 4, now 5",
        ),
        (dict(config=RunConfig(dtype="bfloat16")), "dtype was None, now 'bfloat16'"),
        (dict(documents=13), "documents was 12, now 13"),
        (dict(held_out="x.jsonl"), "held_out was None, now 'x.jsonl'"),
        (dict(grid={"lr": [0.01], "seed": [0]}), r"swept was \['l1_weight', 'seed'\], now \['lr', 'seed'\]"),
    ],
)
def test_another_configuration_is_refused(whole: Path, change: dict[str, Any], message: str) -> None:
    before = state(whole)
    with pytest.raises(SweepError, match=message):
        run(whole, **change)
    assert state(whole) == before


def test_a_swept_option_of_the_configuration_does_not_matter(whole: Path, tmp_path: Path, counted: Any) -> None:
    shutil.copytree(whole, tmp_path / "sweep")
    training = TrainingConfig(**{**vars(CONFIG.training), "l1_weight": 0.5})
    run(tmp_path / "sweep", RunConfig(training=training))
    assert counted["steps"] == 0


def test_other_weights_and_other_folders_are_refused(whole: Path, tmp_path: Path) -> None:
    folder, known = tmp_path / "sweep", record(whole)
    known["fingerprints"]["fingerprint of target"] = "0" * 16
    folder.mkdir()
    (folder / "sweep.json").write_text(json.dumps({**known, "points": known["points"][1:]}))
    with pytest.raises(SweepError, match="fingerprint of target was '0000"):
        run(folder)
    (folder / "sweep.json").write_text("{")
    with pytest.raises(SweepError, match=r"sweep\.json is not valid JSON"):
        run(folder)
    for change, message in (
        ({"schema_version": 2}, "it has schema_version 2; this version of tl-adapters reads 1"),
        ({"points": [{**known["points"][0], "l0": 3}]}, r"points\[0\]\.l0 is 3; allowed is a mapping"),
        ({"points": [{**known["points"][0], "alive": True}]}, r"points\[0\]\.alive is True; allowed is a whole number"),
        ({"grid": {"lr": 3}}, "grid.lr is 3; allowed is a list"),
        ({"grid": {"source": ["x"]}}, "sweep.json: data.source cannot be swept"),
        ({"config": {"training": {"steps": 0}}}, "sweep.json: training.steps is 0"),
        ({"notes": 1}, "Unknown key notes"),
    ):
        (folder / "sweep.json").write_text(json.dumps({**known, **change}))
        with pytest.raises(SweepError, match=message):
            run(folder)
    (folder / "sweep.json").unlink()
    with pytest.raises(FolderExistsError, match=r"holds no sweep\.json"):
        run(folder)
    assert not list(folder.iterdir())
    with FileLock(whole / ".lock"), pytest.raises(FolderBusyError, match="Another process"):
        run(whole)


# -- grids ------------------------------------------------------------------------------------------------------------


def test_a_grid_names_every_combination_once() -> None:
    grid = {"l1_weight": [0.0003, 1e-05], "count": [["thinking", "answer"], ["prompt"]], "loss_weights": ["paper"]}
    runs = grid_configurations(CONFIG, grid)
    assert "l1_weight-1e-05_count-thinking+answer_loss_weights-paper" in runs and len(runs) == 4
    for name, config in runs.items():
        assert str(config.training.l1_weight) in name and "+".join(config.training.count) in name
        assert config.training.steps == STEPS and config.data == CONFIG.data
    assert read_grid(["l1_weight=1e-3,0.1", "tracker=none"]) == {"l1_weight": [0.001, 0.1], "tracker": ["none"]}
    assert read_grid(["training.lr=1", "nmse=0,1"]) == {"lr": [1], "loss_weights.nmse": [0, 1]}
    assert [run.training.loss_weights.nmse for run in grid_configurations(CONFIG, {"nmse": [0, 2]}).values()] == [0, 2]


@pytest.mark.parametrize(
    ("grid", "error", "message"),
    [
        ({"l1_wieght": [1.0]}, ConfigError, "Did you mean training.l1_weight"),
        ({"n_features": [8, 0]}, ConfigError, "n_features is 0"),
        ({"n_features": [8.5]}, ConfigError, "training.n_features is 8.5; allowed is a whole number"),
        ({"lr": [1, 1.0]}, GridError, "lr-1 twice"),
        ({"lr": []}, GridError, r"values of lr are \[\]"),
        ({"tracker": "none"}, GridError, "values of tracker are 'none'"),
        ({}, GridError, "the grid is empty"),
        ({"data.source": ["x"]}, GridError, "data.source cannot be swept; options of training can"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_is_made(
    grid: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run(tmp_path / "sweep", grid=grid)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["lr", "=1", "lr=", ""])
def test_an_option_without_values_is_refused(option: str) -> None:
    with pytest.raises(GridError, match="OPTION=VALUE"):
        read_grid([option])
    with pytest.raises(GridError, match="each option once"):
        read_grid(["lr=1", "lr=2"])


# -- the front and the page -------------------------------------------------------------------------------------------


def scanned(costs: list[tuple[float, float]]) -> list[int]:
    """From left to right, what comes lower than all before; equal points together."""
    front, least = [], math.inf
    for x in sorted({cost[0] for cost in costs}):
        y = min(cost[1] for cost in costs if cost[0] == x)
        if y < least:
            front += [i for i, cost in enumerate(costs) if cost == (x, y)]
            least = y
    return sorted(front)


def test_the_front_is_what_no_point_beats() -> None:
    rng = random.Random(0)
    for _ in range(300):
        costs = [(float(rng.randint(0, 6)), float(rng.randint(0, 6))) for _ in range(rng.randint(0, 12))]  # many ties
        assert pareto_front(costs) == scanned(costs)
    nan = math.nan
    assert pareto_front([(nan, 0.0), (0.0, nan), (2.0, 2.0), (nan, nan)]) == [2]


def points(*places: tuple[float, float], option: str = "l1_weight") -> list[SweepPoint]:
    def figure(value: float) -> Measurement:
        return Measurement(value, 0.9 * value, 1.1 * value, 5, "x", "tune")

    return [
        SweepPoint(
            f"p{i}", {option: i, "n_features": 8}, figure(x), figure(y), figure(1.0), figure(y), figure(0.1),
            figure(0.5), 8, 7, 100,
        )
        for i, (x, y) in enumerate(places)
    ]  # fmt: skip


def test_the_page_is_self_contained_escaped_and_says_what_it_leaves_out(whole: Path, tmp_path: Path) -> None:
    html = (whole / "sweep.html").read_text()
    assert html.count("<svg") == 2 and html.count("<tr>") == 3 and "&#39;s" in html
    evil = {"config": {"base": "<img src=x>", "target": "</p><script>"}, "grid": {"<b>$x_1$</b>": []}}
    found = points((2.0, 0.5), (0.0, 0.9), (1.0, 0.7), option="<b>$x_1$</b>|")
    found[0].options["n_features"] = "<i>$\\frac$</i>"
    page = write_sweep_page(tmp_path, evil, found).read_text()
    for text in (html, page):
        assert not re.findall(r"""(?:src|href)=["']?(?!data:,|#)[^"'> ]+""", text.replace("&lt;img src=x&gt;", ""))
        assert "@import" not in text and "<script" not in text and "<b>" not in text and "<i>" not in text
    assert "&lt;img src=x&gt;" in page and "&lt;b&gt;$x_1$&lt;/b&gt;" in page
    assert "Without 1 of 3 points" in page  # the L0 of 0 has no place on a logarithmic axis


def test_a_notebook_shows_plots_and_table(whole: Path) -> None:
    found = resume_sweep(whole, progress=False)
    html = found._repr_html_()
    assert html.count("<svg") == 2 and html.count("<tr>") == 1 + len(found) and "<script" not in html
    frame = found.to_pandas()
    assert frame["name"].tolist() == NAMES and frame["kl"].tolist() == [point.kl.value for point in found]
    assert json.loads(json.dumps(found.to_dict()))["records"] == record(whole)["points"]
    assert f"SweepPoint: name {found[0].name}, " in repr(found)


def test_hostile_names_and_points_without_a_place_on_the_axes() -> None:
    html = Sweep(points((0.0, 0.5), option="<img src=x>"))._repr_html_()
    assert "<img" not in html and "None of the 1 points has a place" in html
    assert Sweep()._repr_html_().count("<svg") == 0


def test_the_table_marks_the_front(tmp_path: Path) -> None:
    lines = sweep_markdown(points((1.0, 0.9), (2.0, 0.5), (3.0, 0.7), option="a|b")).splitlines()
    assert lines[0].startswith("| a\\|b | n_features | L0 |")
    assert [line.endswith("| yes |") for line in lines[2:]] == [True, True, False]
    assert "| 0.9 (0.81 to 0.99) | 90.0 % (81.0 % to 99.0 %) |" in lines[2]
    unknown = Measurement(None, None, None, 5, "x", "tune", reason="the denominator is 0")
    nothing = [replace(point, kl=unknown, kl_of_hybrid=unknown) for point in points((1.0, 1.0))]
    assert "| - (the denominator is 0) | - (the denominator is 0) |" in sweep_markdown(nothing)
    assert (
        "the denominator is 0"
        in write_sweep_page(tmp_path, {"config": {"target": ""}, "grid": {}}, nothing).read_text()
    )
