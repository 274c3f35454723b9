"""A run folder survives: kills at any moment, a full disk, Ctrl-C, a second process; and resumes bit for bit."""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import resource
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from helpers.random_models import random_model

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.cli.main import main
from tl_adapters.config import DataConfig, TrainingConfig
from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.data.columns import ConversationColumns
from tl_adapters.data.documents import EncodedDocuments
from tl_adapters.data.sources import PairRecords, ShuffledReader
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.organism import reasoning_pairs
from tl_adapters.organism.recipe import build_tokenizer
from tl_adapters.training.end_to_end_stage import EndToEndStage
from tl_adapters.training.objective import StepTerms
from tl_adapters.training.run_folder import RunFolderError, require_new
from tl_adapters.training.trainer import Trainer, TrainingError, TrainingInterrupted, how_to_resume
from tl_adapters.utils.files import DiskFullError, FolderExistsError, new_folder, write_text

CONFIG = TrainingConfig(
    stages=("end_to_end",),
    n_features=16, steps=90, tokens_per_batch=200, checkpoint_every=3, keep_checkpoints=3, log_every=1,
    validate_every=7, lr=1e-3,
)  # fmt: skip


def pair(seed: int = 2) -> PairedModel:
    base, target = (random_model(s, torch.float32, vocab_size=300, max_position_embeddings=128) for s in (1, seed))
    return PairedModel.from_pretrained(base, target)


def documents(n: int = 40) -> EncodedDocuments:
    """A few windows an epoch, so that the position of a run is more than its step."""
    data = DataConfig(shuffle_window=12, validation_fraction=0.1)
    reader = ShuffledReader(PairRecords(reasoning_pairs("train", n), "text"), ConversationColumns(data))
    return EncodedDocuments(reader, ChatFormat.of(build_tokenizer()), data, max_tokens=128)


def start_or_resume(folder: Path, config: TrainingConfig = CONFIG) -> Trainer:
    data = documents()
    options = dict(validation=data.validation(), progress=False)
    if folder.exists():
        return Trainer.resume(pair(), data, folder, **options)
    return Trainer(pair(), data, config, folder, **options)


def work(folder: Path, parent: Connection, die_at_rename: int | None = None, before: bool = True) -> None:
    """A process that trains, and waits at every step until it is told to go on.

    Kills itself at a rename, where one is named.
    """
    torch.set_num_threads(1)
    if die_at_rename is not None:
        renames = iter(range(10**6))

        def dying(rename: Callable[..., None]) -> Callable[..., None]:
            def call(*paths: object) -> None:
                last = next(renames) == die_at_rename
                if last and before:
                    os.kill(os.getpid(), signal.SIGKILL)
                rename(*paths)
                if last:
                    os.kill(os.getpid(), signal.SIGKILL)

            return call

        os.rename, os.replace = dying(os.rename), dying(os.replace)  # of files.py, which alone renames

    def report(step: int, terms: StepTerms | None = None) -> None:
        parent.send(step)
        parent.recv()

    trainer = start_or_resume(folder)
    report(trainer.step)
    trainer.run(on_step=report)


@pytest.fixture(scope="module")
def context() -> multiprocessing.context.ForkServerContext:
    """Processes that start in a moment: their server has imported everything once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "PYTHONPATH", os.pathsep.join([*map(str, Path(__file__).parents[:2]), os.environ.get("PYTHONPATH", "")])
        )
        multiprocessing.forkserver.ensure_running()  # it looks for modules along this path only
    return context


@contextmanager
def process(context: multiprocessing.context.ForkServerContext, *arguments: object) -> Iterator[tuple]:
    steps, child_end = context.Pipe()
    child = context.Process(target=work, args=(arguments[0], child_end, *arguments[1:]))
    child.start()
    child_end.close()
    yield child, steps
    child.join()


def until_end(steps: Connection) -> list[int]:
    found = []
    try:
        while True:
            found.append(steps.recv())
            steps.send("go on")
    except (EOFError, OSError):
        return found


@pytest.fixture(scope="module")
def whole(context: multiprocessing.context.ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with process(context, folder) as (child, steps):
        assert until_end(steps)[-1] == CONFIG.steps
    return folder


def same(folder: Path, whole: Path) -> None:
    """Bit for bit: weights, and every line that was written on the way."""
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    ours, theirs = (AdapterSet.from_pretrained(f / "adapters").state_dict() for f in (folder, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}
    left = [p.name for p in folder.rglob(".*")]
    assert not left, left


def test_a_run_killed_twenty_times_is_the_run_never_killed(
    context: multiprocessing.context.ForkServerContext, whole: Path, tmp_path: Path
) -> None:
    folder, rng, resumed_at, killed_after = tmp_path / "run", random.Random(0), [], []
    for _ in range(20):
        with process(context, folder) as (child, steps):
            resumed_at.append(step := steps.recv())
            last = step + rng.randint(1, 7)
            while step < last:
                steps.send("go on")
                step = steps.recv()
            steps.send("go on")
            time.sleep(rng.uniform(0, 0.03))  # about a step: within what is written after this one, or in the next
            child.kill()
            killed_after.append(step)
        assert child.exitcode == -signal.SIGKILL
        kept = sorted((folder / "checkpoints").glob("step-*"))
        assert len(kept) <= CONFIG.keep_checkpoints + 1
    assert len(set(killed_after)) > 10 and 0 < resumed_at[-1] < CONFIG.steps
    for at, after in zip(resumed_at[1:], killed_after, strict=False):
        newest = after // CONFIG.checkpoint_every * CONFIG.checkpoint_every
        assert newest - CONFIG.checkpoint_every <= at <= newest + CONFIG.checkpoint_every
    with process(context, folder) as (child, steps):
        assert until_end(steps)[-1] == CONFIG.steps
    same(folder, whole)


def test_a_run_killed_at_a_rename_resumes(
    context: multiprocessing.context.ForkServerContext, whole: Path, tmp_path: Path
) -> None:
    """Just before and just after a folder, a training state or a file appears under its name."""
    folder = tmp_path / "run"
    for rename in (0, 1, 2, 3, 4):
        for before in (True, False):
            with process(context, folder, rename, before) as (child, steps):
                until_end(steps)
            assert child.exitcode == -signal.SIGKILL
    with process(context, folder) as (child, steps):
        assert until_end(steps)[-1] == CONFIG.steps
    same(folder, whole)


def test_the_last_training_states_are_kept(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(step: int, terms: StepTerms) -> None:
        if step == 14:
            raise Stop

    with pytest.raises(Stop):
        start_or_resume(tmp_path / "run").run(on_step=stop)
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000006", "step-00000009", "step-00000012"]


def test_ctrl_c_stops_between_two_steps_and_says_how_to_resume(whole: Path, tmp_path: Path) -> None:
    def interrupt(step: int, terms: StepTerms) -> None:
        if step == 7:
            signal.raise_signal(signal.SIGINT)

    torch.set_num_threads(1)
    before = signal.getsignal(signal.SIGINT)
    trainer = start_or_resume(tmp_path / "run")
    with pytest.raises(TrainingInterrupted, match=f"step 7 of 90. Resume with: tl-adapters train --resume {tmp_path}"):
        trainer.run(on_step=interrupt)
    resumed = start_or_resume(tmp_path / "run")
    assert resumed.step == 7 and signal.getsignal(signal.SIGINT) is before
    resumed.run()
    same(tmp_path / "run", whole)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def interrupt(step: int, terms: StepTerms) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as raised:
        start_or_resume(tmp_path / "run").run(on_step=interrupt)
    assert not isinstance(raised.value, TrainingInterrupted)


def test_the_command_line_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, step = tmp_path / "c.yaml", EndToEndStage.advance
    config.write_text(
        "training: {stages: [end_to_end], steps: 4, n_features: 8, tokens_per_batch: 200, log_every: 1}\n"
    )
    monkeypatch.setattr("tl_adapters.study.open_run.ORGANISM_TRACES", 200)  # of which four steps read a few

    def interrupted(self: EndToEndStage, want_l0: bool) -> StepTerms:
        if self.step == 1:
            signal.raise_signal(signal.SIGTERM)  # what a cluster sends before it takes the machine
        return step(self, want_l0)

    monkeypatch.setattr(EndToEndStage, "advance", interrupted)
    assert main(["train", "--config", str(config), "--out", str(tmp_path / "run"), "--quiet"]) == 130
    assert f"tl-adapters train --resume {tmp_path / 'run'}" in capsys.readouterr().err
    monkeypatch.setattr(EndToEndStage, "advance", step)
    assert main(["train", "--resume", str(tmp_path / "run"), "--quiet"]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert main(["train", "--resume", str(tmp_path / "run"), "--quiet"]) == 0  # done already: nothing changes
    assert (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() == lines


def test_two_processes_in_one_folder_are_refused(tmp_path: Path) -> None:
    first = start_or_resume(tmp_path / "run")
    with pytest.raises(RunFolderError, match="Another process is training in"):
        start_or_resume(tmp_path / "run")
    assert first.folder is not None
    first.folder.release()
    start_or_resume(tmp_path / "run")


def test_another_pair_or_other_data_is_refused(tmp_path: Path) -> None:
    start_or_resume(tmp_path / "run").folder.release()
    with pytest.raises(RunFolderError, match="other target"):
        Trainer.resume(pair(seed=3), documents(), tmp_path / "run", progress=False)
    with pytest.raises(RunFolderError, match="other data"):
        Trainer.resume(pair(), documents(41), tmp_path / "run", progress=False)
    start_or_resume(tmp_path / "run")  # a refusal holds no lock


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The kernel refuses to write further, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_an_error_and_leaves_nothing_incomplete(tmp_path: Path) -> None:
    with files_no_larger_than(100), pytest.raises(DiskFullError, match="too full to write .*notes.txt"):
        write_text(tmp_path / "notes.txt", "x" * 1000)
    with files_no_larger_than(100), pytest.raises(DiskFullError), new_folder(tmp_path / "folder") as out:
        write_text(out / "notes.txt", "x" * 1000)
    with files_no_larger_than(1000), pytest.raises(DiskFullError, match="adapters"):
        pair().new_adapters(64).save_pretrained(tmp_path / "adapters")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_during_training_keeps_the_last_training_state(whole: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    trainer = start_or_resume(tmp_path / "run")

    def fill(step: int, terms: StepTerms) -> None:
        if step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    with (
        files_no_larger_than(10**9),
        pytest.raises(TrainingError, match="Stopped at step 6: The disk is too full.*step-00000006.*train --resume"),
    ):
        trainer.run(on_step=fill)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    start_or_resume(tmp_path / "run").run()
    same(tmp_path / "run", whole)


def damage(path: Path, what: str) -> None:
    """Damage a training state as a copy that broke off, a disk or an editor may."""
    if what == "missing":
        (path / "state.json").unlink()
    elif what == "cut":
        file = path / "optimizer.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    elif what == "one bit":
        file = path / "optimizer.safetensors"
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    elif what == "adapters":
        next((path / "adapters").rglob("sae_weights.safetensors")).write_bytes(b"")
    else:
        (path / "state.json").write_text(what)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped at its tenth step; no test changes it."""

    class Stop(Exception):
        pass

    def stop(step: int, terms: StepTerms) -> None:
        if step == 10:
            raise Stop

    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Stop):
        start_or_resume(folder).run(on_step=stop)
    return folder


@pytest.mark.parametrize("what", ["missing", "cut", "one bit", "adapters", "{", "[]", '{"step": 3}', "[" * 100_000])
def test_a_damaged_newest_state_is_passed_over_for_the_one_before_it(
    stopped: Path, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    states = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert [path.name for path in states] == ["step-00000003", "step-00000006", "step-00000009"]
    damage(states[-1], what)
    resumed = start_or_resume(tmp_path / "run")
    assert resumed.step == 6 and "step-00000009 is damaged" in caplog.text and "back to step-00000006" in caplog.text
    assert not states[-1].exists() and len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 6
    resumed.folder.release()
    for state in states[:2]:
        damage(state, what)
    with pytest.raises(RunFolderError, match="Every training state .* is damaged; .*starts again from its first step"):
        start_or_resume(tmp_path / "run")
    assert [path.name for path in resumed.folder.training_states] == ["step-00000003", "step-00000006"]


def test_the_command_that_resumes_quotes_a_folder(tmp_path: Path) -> None:
    run = start_or_resume(tmp_path / "it's mine")
    assert shlex.split(how_to_resume(run.folder).split("with: ")[1].split(" (or ")[0])[-1] == str(
        tmp_path / "it's mine"
    )
    run.folder.release()
    with pytest.raises(FolderExistsError) as refused:
        require_new(tmp_path / "it's mine")
    assert shlex.split(str(refused.value).split("that run: ")[1])[-1] == str(tmp_path / "it's mine")


def test_a_run_that_stops_before_its_first_step_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise MemoryError("the batch does not fit")

    monkeypatch.setattr("tl_adapters.training.end_to_end_stage.shared_prefix_step", fail)
    with pytest.raises(MemoryError):
        start_or_resume(tmp_path / "run").run()
    assert list(tmp_path.iterdir()) == []
    start_or_resume(tmp_path / "run").folder.release()  # killed before its first step, by something else
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(MemoryError):
        start_or_resume(tmp_path / "run").run()
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
