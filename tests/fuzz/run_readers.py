"""Readers of options, runs, sweeps and data files, with valid files to damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import yaml
from fuzz.fuzzing import Reader
from helpers.random_models import random_model

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.config import DataConfig, RunConfig, TrainingConfig
from tl_adapters.data.batching import OrderPosition
from tl_adapters.data.sources import open_reader
from tl_adapters.evaluation.tasks import load_problems
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.study.sweep import SWEEP_FILE, SWEEP_SCHEMA_VERSION, _read
from tl_adapters.training.adapter_adam import AdapterAdam
from tl_adapters.training.run_folder import METRICS_FILE, VALIDATION_FILE, MetricsLine, RunFolder
from tl_adapters.training.training_state import (
    TrainingCounters,
    TrainingState,
    state_folder,
)
from tl_adapters.utils.reading import read_record_lines
from tl_adapters.utils.results import read_results, write_results

CONFIG = RunConfig(
    base="b", target="t", data=DataConfig(source="x.jsonl", max_tokens=9, template_date="2026-02-28"),
    training=TrainingConfig(
        stages=("end_to_end",), activation="topk", lr=1e-5, steps=4, n_features=8, count=("answer",)
    ),
)  # fmt: skip


def _config(suffix: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        folder.mkdir()
        text = yaml.safe_dump(CONFIG.to_dict()) if suffix == "yaml" else json.dumps(CONFIG.to_dict(), indent=1)
        (folder / f"config.{suffix}").write_text(text)

    return write


def _read_config(suffix: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        config = RunConfig.load(folder / f"config.{suffix}")
        assert RunConfig.from_dict(config.to_dict()) == config

    return read


@cache
def _adapters() -> AdapterSet:
    pair = PairedModel.from_pretrained(random_model(1, torch.float32), random_model(2, torch.float32))
    return pair.new_adapters(8, activation="topk", k=6)


def _run(folder: Path) -> None:
    RunFolder.create(folder, CONFIG, {"data": "1f", "target": "2e"}).release()
    adapters = _adapters()
    adam = AdapterAdam(adapters, CONFIG.training)
    for parameter in adapters.parameters():
        parameter.grad = torch.ones_like(parameter)
    adam.step(1e-3, None, 1.0)
    order = OrderPosition(epoch=0, window=1, first_step=2, source={"state": {"a": [1]}, "row": 3})
    state = TrainingState(adapters, adam.tensors(), TrainingCounters(step=2, tokens=7, seconds=0.5, order=order))
    path = folder / "checkpoints" / state_folder(2)
    path.mkdir(parents=True)
    state.save(path)
    terms = dict(total=1.0, output_kl=0.5, forward_bridge=0.25, backward_bridge=0.0, nmse=0.125, sparsity=3.0)
    lines = [{"step": step, "tokens": 7 * step, "lr": 1e-5, **terms, "l0": [1.0, 2.5]} for step in (1, 2, 3)]
    (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    held_out = [{"step": step, "output_kl": 0.5, "nmse": 0.1, "l0": [1.0], "tokens": 5} for step in (2, 4)]
    (folder / VALIDATION_FILE).write_text("".join(json.dumps(line) + "\n" for line in held_out))


def _read_run(folder: Path) -> None:
    run = RunFolder.open(folder)
    try:
        run.require_same({"data": "1f", "target": "2e"})
        state = run.load_training_state(_adapters())
        assert state is None or state.counters.step == 2
        run.tokens_and_seconds()
        read_record_lines(MetricsLine, folder / METRICS_FILE, partial_end=True)
    finally:
        run.release()


def _results(folder: Path) -> None:
    folder.mkdir()
    value = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 40, "unit": "nats", "split": "report", "seeds": [0]}
    write_results(
        folder, pair={"base": "b", "target": "t", "n_layers": 2, "fingerprints": {"target": "1f"}}, seeds=[0],
        train={"steps": 3, "tokens": 7, "seconds": 1.5, "n_features": 8}, versions={"torch": "2.6", "sae-lens": None},
        faithfulness={"kl": {"hybrid": value, "replacement": value}, "top1_agreement": value, "l0": [value, value]},
        behaviour={"recovered": {"hybrid": value}}, attribution={"graphs": 1, "moments": [{"page": "a.html"}]},
        labels={"judge": None}, seconds={"train": 1.5},
    )  # fmt: skip


def _read_results(folder: Path) -> None:
    from tl_adapters.interop.export import _card_measurements

    results = read_results(folder)
    _card_measurements(results)
    write_results(folder, seconds={**results.get("seconds", {}), "features": 2.5})


def _sweep(folder: Path) -> None:
    folder.mkdir()
    value = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 40, "unit": "nats", "split": "tune", "seeds": [0]}
    point = dict.fromkeys(("l0", "kl", "kl_hybrid", "kl_of_hybrid", "nmse"), value)
    points = [
        {
            "name": f"local.lr-{lr}",
            "options": {"local.lr": lr},
            **point,
            "recovered": None,
            "features": 8,
            "alive": 7,
            "tokens": 9,
        }
        for lr in (0.1, 0.2)
    ]
    record = {
        "schema_version": SWEEP_SCHEMA_VERSION, "config": RunConfig().to_dict(), "grid": {"local.lr": [0.1, 0.2]},
        "held_out": None, "documents": 3, "versions": {"torch": "2.6"}, "points": points, "front": ["local.lr-0.1"],
        "fingerprints": {"fingerprint of target": "1f"},
    }  # fmt: skip
    (folder / SWEEP_FILE).write_text(json.dumps(record, indent=1))


def _read_sweep(folder: Path) -> None:
    from tl_adapters.pages.sweep_page import read_sweep_point, sweep_markdown

    sweep_markdown([read_sweep_point(point) for point in _read(folder)["points"]])


def _traces(folder: Path) -> None:
    folder.mkdir()
    turns = [{"role": "user", "content": "1 + 1?"}, {"from": "gpt", "value": "<think>Wait</think>2", "thinking": "½"}]
    rows = [
        {"prompt": "1 + 1?", "response": "<think>Hm, 2.</think>2", "domain": "math", "id": 7},
        {"messages": turns, "system": "Be kind."},
        {"conversations": [turns[0], {"role": "assistant", "content": "2"}], "scores": [0.5, None]},
    ]
    (folder / "traces.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def _read_traces(folder: Path) -> None:
    reader = open_reader(DataConfig(source=str(folder / "traces.jsonl")))
    for conversation, _ in reader.read("seed", None):
        assert all(
            isinstance(text, str) and text.encode() is not None for turn in conversation for text in turn.values()
        )


def _problems(folder: Path) -> None:
    folder.mkdir()
    rows = [{"problem": "1 + 1?", "answer": "2", "level": 1}, {"problem": "2?", "answer": 3}]
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "list.json").write_text(json.dumps(rows, indent=1))


def _read_problems(folder: Path) -> None:
    for name in ("lines.jsonl", "list.json"):
        for problem in load_problems("math500", str(folder / name)).problems:
            problem.question.encode()


RUN_READERS = (
    Reader("config-yaml", _config("yaml"), ("config.yaml",), _read_config("yaml"), True),
    Reader("config-json", _config("json"), ("config.json",), _read_config("json"), True),
    Reader("traces", _traces, ("traces.jsonl",), _read_traces, True),
    Reader("problems", _problems, ("*.json", "*.jsonl"), _read_problems, True),
    Reader("run", _run, ("*.json", "*.jsonl"), _read_run, False),
    Reader("training-state", _run, ("checkpoints/*/*.json", "checkpoints/*/*.safetensors"), _read_run, False),
    Reader("results", _results, ("results.json",), _read_results, False),
    Reader("sweep", _sweep, (SWEEP_FILE,), _read_sweep, False),
)
