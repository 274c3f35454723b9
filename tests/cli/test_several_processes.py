"""Subcommands in two processes of one launch: the results of one process, one writer, one message, equal exit codes."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers import launched

from tl_adapters import organism
from tl_adapters.cli.main import main
from tl_adapters.config import RunConfig
from tl_adapters.features.store import FeatureStore
from tl_adapters.processes import Processes, ProcessesError, processes
from tl_adapters.study.open_run import open_pair
from tl_adapters.utils.results import read_results

MODELS = ["--base", str(organism.BASE), "--target", str(organism.TARGET)]
OPTIONS = {"local.steps": 12, "local.tokens_per_step": 64, "local.max_tokens": 2000, "n_features": 16}


def write_documents(folder: Path) -> None:
    for name, split, n in (("train", "train", 30), ("held_out", "report", 8)):
        rows = [{"prompt": q, "response": r} for q, r in organism.reasoning_pairs(split, n)]  # type: ignore[arg-type]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    return {name: results[name] for name in ("pair", "faithfulness", "features")}


def test_two_processes_train_evaluate_and_collect_as_one_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_documents(tmp_path)
    (tmp_path / "one").mkdir()
    held_out = ["--data", str(tmp_path / "held_out.jsonl"), "--json", "--quiet"]
    data = ["--data", str(tmp_path / "train.jsonl"), "--json", "--quiet"]
    settings = [word for name, value in OPTIONS.items() for word in ("--set", f"{name}={value}")]
    run, one = tmp_path / "run", tmp_path / "one" / "run"
    too_few = ["--set", "stages=[end_to_end]", "--out", str(tmp_path / "no")]
    codes, out, err = launched.exit_codes(
        2,
        ["train", *MODELS, *data, *settings, "--out", str(run)],
        ["train", *MODELS, *data, *settings, "--out", str(run)],
        ["train", *MODELS, *data, *too_few],
        ["config"],
        ["evaluate", str(run), *held_out],
        ["features", str(run), *held_out],
        ["train", "--out"],
    )
    assert codes == [[0, 2, 2, 2, 0, 0, 2]] * 2
    trained, exists, few, evaluated, collected = (json.loads(line) for line in out.splitlines())
    assert trained["paths"]["adapters"] == str(run / "adapters") and "features" in evaluated["next"]
    assert collected["paths"]["pages"].endswith("index.html")
    assert "exists already" in exists["error"] and "batches_per_step is 1 with 2 processes" in few["error"]
    assert not (tmp_path / "no").exists()
    for text, n in (("tl-adapters config runs in one process", 1), ("--out needs a value", 1), ("process 1:", 0)):
        assert err.count(text) == n, err

    for words in (
        ["train", *MODELS, *data, *settings, "--out", str(one)],
        ["evaluate", str(one), *held_out],
        ["features", str(one), *held_out],
    ):
        assert main(words) == 0
    for file in sorted((one / "adapters").glob("*.safetensors")):
        assert (run / "adapters" / file.name).read_bytes() == file.read_bytes()
    assert without_times(read_results(run)) == without_times(read_results(one))
    for name in ("store", "neurons"):
        tables = [pd.read_parquet(folder / "features" / name / "features.parquet") for folder in (run, one)]
        pd.testing.assert_frame_equal(*tables)
        stores = [FeatureStore.load(folder / "features" / name) for folder in (run, one)]
        assert stores[0].tokens == stores[1].tokens > 0


def test_what_runs_in_one_process_says_so() -> None:
    Processes(1, 0).require_one("tl-adapters demo")
    with pytest.raises(ProcessesError, match=r"tl-adapters demo runs in one process, and 3 were started"):
        Processes(3, 1).require_one("tl-adapters demo")


def test_a_device_map_names_the_devices_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tl_adapters.study.open_run.processes", lambda: Processes(2, 0))
    with pytest.raises(ProcessesError, match="A pair with a device map runs in one process, and 2 were started"):
        open_pair(RunConfig(device_map="auto"))


@pytest.mark.parametrize(
    "environment", [{}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, {"WORLD_SIZE": "4"}]
)
def test_a_process_that_no_launcher_has_started_is_alone(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a cluster's environment holds: WORLD_SIZE alone is of a job, and not of its processes."""
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.__wrapped__() == Processes(1, 0)
