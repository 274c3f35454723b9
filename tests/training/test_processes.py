"""Several processes of one launch train as one does, one of them writes, and runs move between numbers of processes."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import launched

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.training.run_folder import LOCAL_METRICS_FILE, METRICS_FILE, VALIDATION_FILE

OPTIONS: dict[str, Any] = dict(
    n_features=24, tokens_per_batch=60, batches_per_step=3, log_every=1, validate_every=10, lr=0.01
)
BOTH_STAGES = {
    **OPTIONS,
    "stages": ["local", "end_to_end"],
    "steps": 12,
    "local": {"steps": 24, "max_tokens": 300, "tokens_per_step": 40},
}


def lines(folder: Path, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


def largest_difference(a: Any, b: Any) -> float:
    """Of the numbers of two structures that are alike."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max(largest_difference(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return max((largest_difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    return abs(a - b)


def weights_differ_by(a: Path, b: Path) -> float:
    one, other = (AdapterSet.from_pretrained(folder / "adapters").state_dict() for folder in (a, b))
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("activation", ["relu", pytest.param("batchtopk", marks=pytest.mark.slow)])
def test_two_processes_give_the_loss_curve_of_one(tmp_path: Path, activation: str) -> None:
    """Over 50 steps in float64. A step has three batches, of which one process computes two and the other one."""
    options = {**OPTIONS, "stages": ["end_to_end"], "steps": 50, "activation": activation}
    launched.trained(2, tmp_path / "two", **options)
    launched.main(tmp_path / "one", dict(options))
    for file, n in ((METRICS_FILE, 50), (VALIDATION_FILE, 5)):
        one, two = lines(tmp_path / "one", file), lines(tmp_path / "two", file)
        assert len(one) == len(two) == n
        assert largest_difference(one, two) < 1e-9
    assert weights_differ_by(tmp_path / "one", tmp_path / "two") < 1e-9
    assert not list(tmp_path.glob("*/checkpoints"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of both stages in one process."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    launched.main(folder, dict(BOTH_STAGES))
    return folder


@pytest.mark.parametrize(("first", "stop_at", "then"), [(2, 10, 1), (1, 28, 2)])
def test_a_run_moves_between_numbers_of_processes(
    tmp_path: Path, unbroken: Path, first: int, stop_at: int, then: int
) -> None:
    """It is stopped by a signal that one of its processes gets, in the local or the end-to-end stage, and goes on."""
    folder = tmp_path / "run"
    for n, options in ((first, {**BOTH_STAGES, "stop_at": stop_at}), (then, {})):
        if n == 1:
            launched.main(folder, options)
        else:
            launched.trained(n, folder, **options)
        if options:
            assert max(state.name for state in (folder / "checkpoints").iterdir()) == f"step-{stop_at:08d}"
    assert (folder / LOCAL_METRICS_FILE).read_bytes() == (unbroken / LOCAL_METRICS_FILE).read_bytes()
    for file in (METRICS_FILE, VALIDATION_FILE):
        assert largest_difference(lines(unbroken, file), lines(folder, file)) < 1e-4, file  # adapters are in float32
    assert weights_differ_by(unbroken, folder) < 1e-4


def test_a_launch_that_hangs_is_ended_with_all_of_its_processes(tmp_path: Path) -> None:
    script = tmp_path / "waits.py"
    script.write_text("import time\ntime.sleep(600)\n")
    process = launched.started(2, [str(script)])
    with pytest.raises(AssertionError, match="it did not end in 8 s"):
        launched.ended(process, seconds=8)
    assert not [one for one in psutil.process_iter(["cmdline"]) if str(script) in (one.info["cmdline"] or [])]


LONG = {**OPTIONS, "stages": ["end_to_end"], "steps": 3000, "checkpoint_every": 1000}


def started(folder: Path, **options: Any) -> subprocess.Popen[str]:
    return launched.started(2, [launched.__file__, str(folder), json.dumps({**LONG, **options})])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"), [("refuse_at", "Stopped at step 5: the disk is full Resume with"), ("kill_at", "Signal 9")]
)
def test_no_process_waits_for_one_that_has_failed(tmp_path: Path, fault: str, words: str) -> None:
    """The launcher ends the others, or they end by themselves; where the main one says why, so do the others."""
    code, out, err = launched.ended(started(tmp_path / "run", **{fault: 5}))
    assert code != 0 and words in err.replace(".", ""), err
    if fault == "refuse_at":
        assert "ProcessesError: Process 0: the disk is full" in err


@pytest.mark.slow
def test_a_step_that_is_not_finite_stops_all_processes_with_one_error(tmp_path: Path) -> None:
    code, _, err = launched.ended(started(tmp_path / "run", lr=1e200))
    found = re.findall(r"TrainingError: (Step \d+: .* is not finite)", err)
    assert code != 0 and len(found) == 2 and found[0] == found[1], err


@pytest.mark.slow
def test_ctrl_c_at_the_launcher_stops_after_one_step_and_saves(tmp_path: Path) -> None:
    """A terminal sends the signal to all processes, and the launcher passes it on to those that it has started."""
    process = started(tmp_path / "run")
    metrics = tmp_path / "run" / METRICS_FILE
    until = time.monotonic() + 150
    while time.monotonic() < until and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, out, err = launched.ended(process)
    (state,) = (tmp_path / "run" / "checkpoints").iterdir()
    steps = lines(tmp_path / "run", METRICS_FILE)
    assert state.name == f"step-{len(steps):08d}" and 3 < len(steps) < 3000
    assert out.count(f"Stopped at step {len(steps)} of 3000") == 2, err
