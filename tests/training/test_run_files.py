"""The files of a run folder: a damaged one ends in one error that names it; those of the first release are read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.random_models import random_model
from safetensors.torch import load_file, save_file

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.config import TrainingConfig
from tl_adapters.data.batching import BatchOrder, TracesInMemory
from tl_adapters.data.traces import DataError, Trace
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.training.run_folder import RunFolder, RunFolderError
from tl_adapters.training.trainer import Trainer
from tl_adapters.training.training_state import TrainingState
from tl_adapters.utils.reading import UnreadableFileError

CONFIG = TrainingConfig(
    stages=("end_to_end",), n_features=8, steps=9, tokens_per_batch=60, checkpoint_every=2, log_every=1, lr=1e-3
)


class Stop(Exception):
    pass


def stop(step: int, terms: object) -> None:
    if step == 6:
        raise Stop


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AdapterSet]:
    """A run that died in step 6, and adapters of its shapes."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    pair = PairedModel.from_pretrained(random_model(1, torch.float32), random_model(2, torch.float32))
    generator = torch.Generator().manual_seed(0)
    traces = [Trace(tuple(torch.randint(1, 61, (6 + i % 9,), generator=generator).tolist()), 2) for i in range(30)]
    trainer = Trainer(pair, traces, CONFIG, folder, validation=traces[:5], progress=False)
    with pytest.raises(Stop):
        trainer.run(on_step=stop)
    assert trainer.folder is not None and len(trainer.folder.training_states) == 2
    trainer.folder.release()
    return folder, trainer.adapters


@pytest.fixture
def run(stopped: tuple[Path, AdapterSet], tmp_path: Path) -> tuple[RunFolder, AdapterSet]:
    shutil.copytree(stopped[0], tmp_path / "run")
    return RunFolder.open(tmp_path / "run"), stopped[1]


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A change of state.json."""

    def damage(state: Path) -> None:
        record = json.loads((state / "state.json").read_text())
        change(record)
        (state / "state.json").write_text(json.dumps(record))

    return damage


def moments(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """A change of optimizer.safetensors by someone who leaves no hash behind, as the first release."""

    def damage(state: Path) -> None:
        tensors = load_file(state / "optimizer.safetensors")
        change(tensors)
        save_file(tensors, state / "optimizer.safetensors")
        edit(lambda record: record.pop("optimizer_sha256"))(state)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit(lambda r: r.update(step=-1)), "state.json: step is -1; allowed is a whole number >= 0"),
        (edit(lambda r: r.update(step=True)), "state.json: step is True"),
        (edit(lambda r: r.update(step=3)), "state.json is that of step 3"),
        (edit(lambda r: r["order"].update(epoch=0.5)), "order.epoch is 0.5; allowed is a whole number >= 0"),
        (edit(lambda r: r["order"].update(source="x")), "order.source"),
        (edit(lambda r: r.pop("order")), "The key order is missing"),
        (edit(lambda r: r.update(stpe=3)), "Unknown key stpe. Did you mean step?"),
        (
            edit(lambda r: r.update(schema_version=2)),
            "has schema_version 2; this version of tl-adapters reads 1",
        ),
        (moments(lambda t: t.pop("0.exp_avg")), "the tensor 0.exp_avg is missing"),
        (moments(lambda t: t.update({"x": torch.ones(2)})), "the tensor x does not belong there"),
        (
            moments(lambda t: t.update({"1.exp_avg": torch.ones(2)})),
            "1.exp_avg is torch.float32 of shape (2,)",
        ),
        (moments(lambda t: t["0.exp_avg_sq"].fill_(float("nan"))), "the tensor 0.exp_avg_sq holds NaN or infinities"),
        (moments(lambda t: t.update({"0.step": torch.ones((), dtype=torch.int32)})), "0.step is torch.int32"),
        (lambda state: (state / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing or damaged"),
        (lambda state: (state / "state.json").write_text("[" * 10**5), "state.json is nested too deeply"),
        (lambda state: (state / "state.json").write_bytes(b"\xff"), "state.json is not UTF-8"),
        (lambda state: shutil.rmtree(state / "adapters"), "adapters"),
    ],
)
def test_a_damaged_training_state_is_one_error_that_names_the_file(
    run: tuple[RunFolder, AdapterSet], damage: Callable[[Path], None], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, like = run
    newest = folder.training_states[-1]
    damage(newest)
    state = folder.load_training_state(like)
    assert state is not None and state.counters.step == 2
    assert message in caplog.text and str(newest) in caplog.text


def test_a_state_of_other_adapters_is_refused(run: tuple[RunFolder, AdapterSet]) -> None:
    folder, like = run
    pair = PairedModel.from_pretrained(random_model(1, torch.float32), random_model(2, torch.float32))
    with pytest.raises(UnreadableFileError, match=r"0\.exp_avg is .* of shape .*8\); allowed are .*9\)"):
        TrainingState.load(folder.training_states[-1], pair.new_adapters(9), CONFIG)
    assert len(folder.training_states) == 2


def test_lines_of_a_run_are_checked_and_cut(run: tuple[RunFolder, AdapterSet]) -> None:
    folder, like = run
    path = folder.path / "metrics.jsonl"
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]
    path.write_text(whole + '{"step": 6, "tok')  # killed while it wrote the line
    folder.load_training_state(like)
    assert path.read_text() == "".join(lines[:4])
    path.write_text("".join(lines[:4]).removesuffix("\n"))  # killed before the line's end
    folder.load_training_state(like)
    assert path.read_text() == "".join(lines[:4])
    for damaged, message in (
        (
            whole.replace('"step": 2', '"step": "2"'),
            "line 2: step is '2'; allowed is a whole number > 0",
        ),
        (whole.replace('{"step": 3', "null\n{3"), "metrics.jsonl, line 3: the value is None; allowed is a mapping"),
        (whole.replace('"lr"', '"rl"'), r"metrics.jsonl, line 1: The key lr is missing"),
    ):
        path.write_text(damaged)
        with pytest.raises(UnreadableFileError, match=message):
            folder.load_training_state(like)
        assert path.read_text() == damaged


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", "{", "run.json is not valid JSON"),
        ("run.json", '{"id": 3, "versions": {}, "fingerprints": {}}', "run.json: id is 3; allowed is text"),
        ("run.json", '{"id": "3", "versions": {}}', "run.json: The key fingerprints is missing"),
        ("config.json", '{"training": {"steps": 0}}', "config.json: training.steps is 0"),
        ("config.json", "", "config.json is not valid JSON"),
    ],
)
def test_a_damaged_run_folder_is_one_error(tmp_path: Path, file: str, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "run.json").write_text('{"id": "a", "versions": {"torch": null}, "fingerprints": {}}')
    RunFolder.open(tmp_path).release()
    (tmp_path / file).write_text(content)
    with pytest.raises(RunFolderError, match=f"damaged: .*{message}"):
        RunFolder.open(tmp_path)


def test_a_position_beyond_the_documents_is_an_error() -> None:
    class Exhausted(TracesInMemory):
        def windows(self, epoch: int, position: object) -> Any:
            return iter(()) if position else super().windows(epoch, None)

    order = BatchOrder(Exhausted([Trace((1, 2, 3), 1)]), 60, 0)
    with pytest.raises(DataError, match="no documents at .*'source': 7"):
        order.restore({"epoch": 0, "window": 0, "first_step": 0, "source": 7})


FIRST_RELEASE = {
    "config.json": {
        "base": "", "target": "", "dtype": None,
        "data": {
            "source": "", "subset": None, "split": "train", "revision": None, "streaming": False,
            "conversation_column": None, "prompt_column": None, "response_column": None, "max_tokens": None,
            "too_long": "truncate", "think_start": "<think>", "think_end": "</think>", "shuffle_window": 4096,
            "survey_documents": 2000, "validation_fraction": 0, "validation_split": None, "validation_documents": 64,
        },
        "training": {
            "n_features": 8, "steps": 9, "tokens_per_batch": 60, "lr": 1, "beta1": 0.9, "beta2": 0.999,
            "warmup_fraction": 0.05, "grad_clip": 1.0, "l1_weight": 0.001, "l1_warmup_fraction": 0.25,
            "count": ["prompt", "thinking", "answer"],
            "loss_weights": {
                "output_kl": 1.0, "forward_bridge": 1.0, "backward_bridge": 1.0, "nmse": 1.0, "lowest_cut": 1,
            },
            "seed": 0, "checkpoint_every": 2, "keep_checkpoints": 2, "log_every": 1, "validate_every": 500,
            "tracker": "none", "tracker_project": "tl-adapters",
        },
    },
    "run.json": {"id": "0a1b2c3d4e5f", "versions": {"python": "3.12", "sae-lens": None}, "fingerprints": {"data": "1"}},
}  # fmt: skip
"""Files as the first release wrote them."""


def test_runs_of_the_first_release_are_read(run: tuple[RunFolder, AdapterSet]) -> None:
    folder, like = run
    for name, content in FIRST_RELEASE.items():
        (folder.path / name).write_text(json.dumps(content, indent=1) + "\n")
    for state in folder.training_states:  # neither versions nor hashes
        edit(lambda record: (record.pop("schema_version"), record.pop("optimizer_sha256")))(state)
    folder.release()
    again = RunFolder.open(folder.path)
    assert again.config.training == TrainingConfig(
        stages=("end_to_end",), n_features=8, steps=9, tokens_per_batch=60, lr=1.0, checkpoint_every=2, log_every=1
    )  # fmt: skip
    assert (again.id, again.fingerprints) == ("0a1b2c3d4e5f", {"data": "1"})
    state = again.load_training_state(like)
    assert state is not None and state.counters.step == 4 and state.counters.order.epoch >= 0
    assert again.tokens_and_seconds() == (state.counters.tokens, 0.0)
    again.finish(like, 7, 0.5)
    assert again.tokens_and_seconds() == (7, 0.5)
