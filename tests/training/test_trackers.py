"""Trackers: what each tool really writes, where a resumed run continues, and that none of them stops a training."""

import json
import logging
import math
import sqlite3
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tl_adapters.training.trackers import TRACKERS, Tracker, TrackerError, open_tracker

CONFIG = {"lr": 0.012, "loss_weights": {"nmse": 1.0}}


class FakeRun:
    """A wandb run that records its calls, and does ``on_log`` first."""

    def __init__(self, on_log: Callable[[], None] = lambda: None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.on_log = on_log

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.calls.append(("define", name, step_metric))

    def log(self, values: Mapping[str, float]) -> None:
        self.on_log()
        self.calls.append(("log", dict(values)))

    def finish(self) -> None:
        self.calls.append(("finish",))


def fake_wandb(monkeypatch: pytest.MonkeyPatch, run: FakeRun) -> dict[str, Any]:
    """Put a module in wandb's place; returns the arguments of its last init."""
    given: dict[str, Any] = {}

    def init(**options: Any) -> FakeRun:
        given.update(options)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return given


def fail() -> None:
    raise OSError("the disk\nis full")


def log_steps(tracker: Tracker, first: int, last: int, shift: float) -> None:
    for step in range(first, last + 1):
        tracker.log(step, {"loss": step + shift, "never": math.nan, "nor": math.inf})


def test_the_tracker_none_does_nothing(tmp_path: Path) -> None:
    tracker = open_tracker("none", tmp_path, "run-1", CONFIG)
    log_steps(tracker, 1, 3, 0.0)
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(
        TrackerError, match=r"'tensorbord'\. Did you mean 'tensorboard'\? Known are none, tensor.*trackio"
    ):
        open_tracker("tensorbord", tmp_path, "run-1", CONFIG)
    with pytest.raises(TrackerError, match=r"'x'\. Known are"):
        open_tracker("x", tmp_path, "run-1", CONFIG)


@pytest.mark.parametrize("name", TRACKERS[1:])
def test_a_tool_that_is_not_installed_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(TrackerError) as caught:
        open_tracker(name, tmp_path, "run-1", CONFIG)
    message = str(caught.value)
    assert name in message and f'pip install "tl-adapters[{name}]"' in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_a_tool_that_does_not_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: fail()))
    with pytest.raises(TrackerError, match="wandb did not start: the disk is full"):
        open_tracker("wandb", tmp_path, "run-1", CONFIG)


def test_a_failure_is_logged_once_and_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = FakeRun(on_log=fail)
    fake_wandb(monkeypatch, run)
    tracker = open_tracker("wandb", tmp_path, "run-1", CONFIG)
    monkeypatch.setattr(run, "finish", lambda: [run.calls.append(("finish",)), fail()])
    with caplog.at_level(logging.WARNING):
        log_steps(tracker, 1, 3, 0.0)
        tracker.close()
    assert [record.getMessage() for record in caplog.records] == [
        "The tracker wandb failed and gets no more points: the disk is full"
    ]
    assert run.calls[2:] == [("finish",)]


def test_the_keyboard_still_interrupts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    fake_wandb(monkeypatch, FakeRun(on_log=interrupt))
    tracker = open_tracker("wandb", tmp_path, "run-1", CONFIG)
    with pytest.raises(KeyboardInterrupt):
        tracker.log(1, {"loss": 1.0})


def test_the_points_that_wandb_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun()
    given = fake_wandb(monkeypatch, run)
    tracker = open_tracker("wandb", tmp_path, "run-1", CONFIG, first_step=4, project="p")
    log_steps(tracker, 5, 6, 0.5)
    tracker.close()
    tracker.close()
    assert {key: given[key] for key in ("project", "id", "resume", "dir", "config")} == {
        "project": "p",
        "id": "run-1",
        "resume": "allow",
        "dir": tmp_path,
        "config": CONFIG,
    }
    assert given["reinit"] == "create_new"
    assert run.calls == [
        ("define", "step", None),
        ("define", "*", "step"),  # the x axis is the step of the training, not wandb's own
        ("log", {"step": 5, "loss": 5.5}),
        ("log", {"step": 6, "loss": 6.5}),
        ("finish",),
    ]


def test_wandb_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    wandb = pytest.importorskip("wandb")
    tracker = open_tracker("wandb", tmp_path, "run-1", CONFIG)
    log_steps(tracker, 1, 3, 0.125)
    tracker.close()
    wandb.teardown()
    (written,) = tmp_path.glob("wandb/offline-run-*/run-run-1.wandb")
    content = written.read_bytes()
    assert all(part in content for part in (b"run-1", b"loss_weights", b"1.125", b"3.125"))
    assert b"never" not in content


def test_tensorboard_writes_and_hides_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read() -> EventAccumulator:
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        return events

    killed = open_tracker("tensorboard", tmp_path, "run-1", CONFIG)
    log_steps(killed, 1, 6, 0.0)
    assert [e.step for e in read().Scalars("loss")] == [1, 2, 3, 4, 5, 6]  # before any close
    resumed = open_tracker("tensorboard", tmp_path, "run-1", CONFIG, first_step=4)
    log_steps(resumed, 5, 8, 0.5)
    resumed.close()
    events = read()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        *((step, step) for step in (1, 2, 3, 4)),
        *((step, step + 0.5) for step in (5, 6, 7, 8)),
    ]
    assert events.Tags()["scalars"] == ["loss"]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text.removeprefix("```json\n").removesuffix("\n```")) == CONFIG


def test_trackio_writes_and_continues_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in [module for module in sys.modules if module.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it reads its folder once, when it is imported
    trackio = pytest.importorskip("trackio")

    killed = open_tracker("trackio", tmp_path, "run-1", CONFIG)
    log_steps(killed, 1, 3, 0.0)
    resumed = open_tracker("trackio", tmp_path, "run-1", CONFIG, first_step=2)
    log_steps(resumed, 3, 4, 0.0)
    resumed.close()
    (run,) = trackio.Api().runs("tl-adapters")
    assert run.name == "run-1" and run.config["loss_weights"] == {"nmse": 1.0}
    with sqlite3.connect(tmp_path / "trackio" / "tl-adapters.db") as database:
        rows = database.execute("select step, metrics from metrics order by id").fetchall()
    assert [(step, json.loads(metrics)) for step, metrics in rows] == [
        (step, {"loss": float(step)}) for step in (1, 2, 3, 3, 4)
    ]
