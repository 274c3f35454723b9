"""Runs with a local stage: they resume bit for bit, whatever stopped them, and no result depends on the workers."""

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.random_models import ACTIVATION_OPTIONS, random_model
from safetensors.torch import load_file, save_file

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.transcoder import TranscoderAdapter
from tl_adapters.config import LocalConfig, LossWeights, RunConfig, TrainingConfig
from tl_adapters.data.batching import BatchOrder, TracesInMemory
from tl_adapters.data.traces import Trace
from tl_adapters.local_stage.layer_run import LayerRun
from tl_adapters.local_stage.regression_data import MLPDifferences
from tl_adapters.local_stage.stage import LocalStage, workers_and_devices
from tl_adapters.local_stage.token_buffer import StreamPosition, TokenStream
from tl_adapters.local_stage.train_local import train_local
from tl_adapters.local_stage.whitening import LayerCoordinates, Whitening
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.training.run_folder import RunFolderError
from tl_adapters.training.trainer import Trainer, TrainingError, TrainingInterrupted, train

LOCAL = LocalConfig(steps=12, tokens_per_step=48, max_tokens=2000, revisions=(0.4, 0.7))
STREAMING = replace(LOCAL, streaming=True, max_tokens=90)
LOCAL_ONLY = TrainingConfig(
    n_features=12,
    tokens_per_batch=60,
    checkpoint_every=4,
    keep_checkpoints=3,
    log_every=3,
    validate_every=5,
    local=LOCAL,
)
CONFIG = replace(LOCAL_ONLY, stages=("local", "end_to_end"), steps=5, lr=1e-3, loss_weights=LossWeights(local=0.1))
STEPS = LOCAL.steps + CONFIG.steps


@cache
def pair() -> PairedModel:
    """One for all runs: each installs adapters of its own."""
    return PairedModel.from_pretrained(*(random_model(s, torch.float32, num_hidden_layers=2) for s in (1, 2)))


def traces(n: int = 40) -> list[Trace]:
    generator = torch.Generator().manual_seed(0)
    return [Trace(tuple(torch.randint(1, 61, (6 + i % 9,), generator=generator).tolist()), 2) for i in range(n)]


def start_or_resume(folder: Path, config: TrainingConfig = CONFIG) -> Trainer:
    options: dict[str, Any] = dict(validation=traces(4), progress=False)
    if folder.exists():
        return Trainer.resume(pair(), traces(), folder, **options)
    return Trainer(pair(), traces(), config, folder, **options)


class Stop(Exception):
    pass


def stopped(trainer: Trainer, at: int) -> Trainer:
    """A run that died once so many steps were done, in whichever stage."""

    def stop(step: int, shown: object) -> None:
        if step >= at:
            raise Stop

    with pytest.raises(Stop):
        trainer.run(stop, stop)
    return trainer


def same(folder: Path, whole: Path) -> None:
    ours, theirs = (AdapterSet.from_pretrained(f / "adapters").state_dict() for f in (folder, whole))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    for file in whole.glob("*.jsonl"):
        assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start_or_resume(folder).run()
    return folder


@pytest.mark.parametrize(
    ("activation", "local"),
    [("relu", STREAMING), ("jumprelu", LOCAL), ("topk", LOCAL), ("batchtopk", STREAMING)],
)
def test_a_run_stopped_in_both_stages_equals_one_that_never_stopped(
    activation: str, local: LocalConfig, tmp_path: Path
) -> None:
    config = replace(CONFIG, local=local, **ACTIVATION_OPTIONS[activation])
    start_or_resume(tmp_path / "whole", config).run()
    found = [stopped(start_or_resume(tmp_path / "run", config), at).step for at in (3, 7, 13, 16)]
    assert found == [3, 8, 13, 16]
    trainer = start_or_resume(tmp_path / "run")
    assert trainer.step == 12
    trainer.run()
    same(tmp_path / "run", tmp_path / "whole")


def die(folder: Path, at: int) -> None:
    """Kill this process once so many steps are done, as ``kill -9`` does."""

    def kill(step: int, shown: object) -> None:
        if step >= at:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    start_or_resume(folder).run(kill, kill)


def test_a_run_killed_in_both_stages_equals_one_that_never_stopped(whole: Path, tmp_path: Path) -> None:
    for at in (3, 6, 9, 12, 15):
        child = os.fork()
        if child == 0:
            die(tmp_path / "run", at)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    start_or_resume(tmp_path / "run").run()
    same(tmp_path / "run", whole)


@pytest.mark.parametrize("at", [1, 6, 12, 14])
def test_sigterm_stops_between_two_steps_of_either_stage(whole: Path, tmp_path: Path, at: int) -> None:
    def terminate(step: int, shown: object) -> None:
        if step >= at:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(TrainingInterrupted, match=f"Stopped at step [0-9]+ of {STEPS}. Resume with"):
        start_or_resume(tmp_path / "run").run(terminate, terminate)
    resumed = start_or_resume(tmp_path / "run")
    assert at <= resumed.step <= at + 2
    resumed.run()
    same(tmp_path / "run", whole)


def test_ctrl_c_stops_while_tokens_are_collected(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = MLPDifferences.read

    def interrupted(self: MLPDifferences, batch: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return read(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(MLPDifferences, "read", interrupted)
        with pytest.raises(TrainingInterrupted, match="Stopped at step 0 of"):
            start_or_resume(tmp_path / "run").run()
    start_or_resume(tmp_path / "run").run()
    same(tmp_path / "run", whole)


def test_ctrl_c_stops_while_features_are_finished(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = LayerRun.finish

    def interrupted(self: LayerRun) -> Iterator[None]:
        parts = finish(self)
        next(parts)
        signal.raise_signal(signal.SIGINT)
        yield
        pytest.fail("the polish did not stop")

    with monkeypatch.context() as patch:
        patch.setattr(LayerRun, "finish", interrupted)
        with pytest.raises(TrainingInterrupted, match=f"Stopped at step {LOCAL.steps} of"):
            start_or_resume(tmp_path / "run", replace(CONFIG, local=replace(LOCAL, workers=1))).run()
    start_or_resume(tmp_path / "run").run()
    (tmp_path / "run" / "config.json").write_bytes((whole / "config.json").read_bytes())
    same(tmp_path / "run", whole)


def cut(state: Path) -> None:
    file = state / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(state: Path) -> None:
        record = json.loads((state / "state.json").read_text())
        change(record)
        (state / "state.json").write_text(json.dumps(record))

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(state: Path) -> None:
        found = load_file(state / "optimizer.safetensors")
        change(found)
        save_file(found, state / "optimizer.safetensors")
        edited(lambda record: record.pop("optimizer_sha256"))(state)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "The content of .*optimizer.safetensors is not the one that was written"),
        (edited(lambda r: r.pop("stream")), "state.json is that of another stage"),
        (edited(lambda r: r["stream"].update(capacity=0)), "stream.capacity is 0; allowed is a whole number"),
        (edited(lambda r: r["stream"].pop("first")), "The key stream.first is missing"),
        (tensors(lambda t: t.pop("1.matrix")), "the tensor 1.matrix is missing"),
        (tensors(lambda t: t["0.W_dec.exp_avg"].fill_(float("nan"))), "0.W_dec.exp_avg holds NaN"),
        (tensors(lambda t: t.update({"0.mean": torch.ones(3)})), "0.mean is torch.float32 of shape .3,"),
    ],
)
def test_a_damaged_state_of_the_local_stage_is_passed_over_and_named(
    whole: Path, tmp_path: Path, damage: Callable[[Path], None], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = stopped(start_or_resume(tmp_path / "run"), 9)
    assert trainer.folder is not None
    states = trainer.folder.training_states
    assert [path.name for path in states] == ["step-00000004", "step-00000008"]
    damage(states[-1])
    resumed = start_or_resume(tmp_path / "run")
    assert resumed.step == 4
    assert "step-00000008 is damaged" in caplog.text
    assert re.search(message, caplog.text)
    resumed.run()
    same(tmp_path / "run", whole)


def test_a_run_whose_every_state_is_damaged_says_so(tmp_path: Path) -> None:
    trainer = stopped(start_or_resume(tmp_path / "run"), 9)
    assert trainer.folder is not None
    for state in trainer.folder.training_states:
        cut(state)
    with pytest.raises(RunFolderError, match="Every training state .* is damaged"):
        start_or_resume(tmp_path / "run")


def test_the_local_stage_alone(tmp_path: Path) -> None:
    """Its adapters are those of `train_local`, and a finished run is not trained again."""
    config = LOCAL_ONLY
    trainer = start_or_resume(tmp_path / "run", config)
    adapters = {name: value.clone() for name, value in trainer.run().state_dict().items()}
    assert trainer.finished and trainer.step == LOCAL.steps
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
    lines = [json.loads(line) for line in (tmp_path / "run" / "local_metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert all(len(line[name]) == 2 for line in lines for name in ("error", "sparsity", "l0", "alive"))
    held_out = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in held_out] == [5, 10, 12]
    directly = train_local(pair(), traces(), config, progress=False).state_dict()
    assert all(torch.equal(value, directly[name]) for name, value in adapters.items())
    resumed = Trainer.resume(pair(), traces(), tmp_path / "run", progress=False)
    assert resumed.finished
    found = resumed.run(on_local_step=lambda step, shown: pytest.fail("the stage ran again")).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in adapters.items())
    assert RunConfig.of_run(tmp_path / "run").training == config


@pytest.mark.parametrize("local", [LOCAL, STREAMING], ids=["collected", "streaming"])
def test_the_number_of_workers_changes_no_bit(local: LocalConfig) -> None:
    """Of three layers, which two workers cannot divide evenly, so that a layer goes from one worker to the other."""
    three_layers = PairedModel.from_pretrained(*(random_model(s, torch.float32, num_hidden_layers=3) for s in (1, 2)))
    one, *others = (
        train_local(three_layers, traces(), CONFIG, replace(local, workers=workers), progress=False).state_dict()
        for workers in (1, 2, 3)
    )
    assert len(three_layers.mlps) == 3
    assert all(torch.equal(value, other[name]) for other in others for name, value in one.items())


def test_a_layer_that_fails_stops_the_others() -> None:
    """Their work can take minutes."""
    stage = LocalStage(MLPDifferences(pair()), order(), CONFIG, replace(LOCAL, workers=2))
    while not stage.finished:
        stage.advance()
    asked: list[int] = []

    def fails() -> None:
        asked.append(len(asked))
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        stage.finish(pair().new_adapters(CONFIG.n_features), on_layer=lambda: pytest.fail("finished"), between=fails)
    assert len(asked) <= 2, "one for each worker"


def test_layers_go_round_robin_over_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 2)
    assert workers_and_devices(cpu, None, 28) == ([cpu], 6)
    assert workers_and_devices(cpu, 9, 5) == ([cpu], 5)
    assert workers_and_devices(cuda, None, 28) == ([cuda], 1)
    assert workers_and_devices(cuda, 3, 28) == ([torch.device("cuda", i) for i in (2, 3, 0)], 3)
    assert workers_and_devices(cuda, 9, 28)[1] == 4


def order() -> BatchOrder:
    return BatchOrder(TracesInMemory(traces()), 60, 0)


def nothing(tokens: int, capacity: int) -> None:
    pass


def test_a_stream_keeps_the_latest_tokens_and_is_filled_again_with_the_same() -> None:
    data, cpu = MLPDifferences(pair()), [torch.device("cpu")]
    stream = TokenStream.fill(data, order(), 90, cpu, nothing)
    assert stream.buffer.capacity == len(stream.buffer) == 90
    batches, position = order(), stream.position
    for seen in (200, 1000):  # also beyond the end of the first epoch
        stream.read_until(seen)
        position = StreamPosition.model_validate_json(stream.position.json_text())
        read = [x for step in range(position.next_batch) for x, _ in [next(iter(data.read(batches[step])))]]
        latest = torch.cat(read)[-90:]
        assert len(torch.cat(read)) == stream.buffer.seen >= seen
        kept = stream.buffer.x[0]
        assert torch.equal(kept.sort(0).values, latest.sort(0).values)
        again = TokenStream.resume(data, order(), position, cpu, nothing)
        for name in ("x", "d"):
            ours, theirs = (getattr(each.buffer, name) for each in (again, stream))
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert again.position == position
    assert position.first.batch > 0


def test_a_stream_that_fits_into_memory_reads_every_document_once() -> None:
    data = MLPDifferences(pair())
    local = replace(LOCAL, streaming=True)
    stage = LocalStage(data, order(), CONFIG, local)
    tokens = sum(len(trace.tokens) for trace in traces())
    while not stage.finished:
        stage.advance()
    assert stage.tokens == tokens < LOCAL.max_tokens


def test_gradients_and_weights_are_converted_by_the_chain_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    coordinates = LayerCoordinates(Whitening(draw(6), draw(6, 6)), 2.5)
    own, twin = (TranscoderAdapter(6, 4, activation="jumprelu", dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.copy_(draw(*parameter.shape).abs())
    coordinates.write(own, twin)
    x, d = draw(9, 6), draw(9, 6)
    torch.testing.assert_close(twin(x), 2.5 * own(coordinates.whitening(x)))
    (twin(x) - d).square().sum().backward()
    ((2.5 * own(coordinates.whitening(x)) - d).square().sum()).backward()
    expected = {name: parameter.grad.clone() for name, parameter in own.named_parameters()}
    coordinates.take_gradients(twin, own)
    for name, parameter in own.named_parameters():
        assert expected[name].abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_the_end_to_end_stage_starts_where_the_local_stage_ended(tmp_path: Path) -> None:
    local_only = train(pair(), traces(), LOCAL_ONLY, progress=False)
    held = {name: value.clone() for name, value in local_only.state_dict().items()}
    still = train(pair(), traces(), replace(CONFIG, lr=1e-30), progress=False).state_dict()
    for name, value in held.items():
        torch.testing.assert_close(still[name], value, msg=name)
    moved = train(pair(), traces(), CONFIG, progress=False).state_dict()
    assert any(not torch.allclose(moved[name], value) for name, value in held.items())


def test_an_error_that_is_not_finite_ends_the_local_stage(tmp_path: Path) -> None:
    trainer = start_or_resume(tmp_path / "run", replace(CONFIG, local=replace(LOCAL, lr=1e30)))
    with pytest.raises(TrainingError, match=r"Step \d+: The error of layer 0 is not finite. Lower training.local.lr"):
        trainer.run()


def test_a_tracker_gets_both_stages_with_the_steps_counted_over_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points: list[dict[str, float]] = []
    run = SimpleNamespace(log=points.append, define_metric=lambda *_, **__: None, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    start_or_resume(tmp_path / "run", replace(CONFIG, tracker="wandb")).run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "local_metrics.jsonl").read_text().splitlines()]
    local = {point["step"]: point for point in points if "local_error" in point}
    assert list(local) == [line["step"] for line in lines] and max(local) <= LOCAL.steps
    for line in lines:
        point = local[line["step"]]
        assert point["local_error"] == pytest.approx(sum(line["error"]) / 2) and point["lr"] == line["lr"]
        assert point["local_error/layer_1"] == line["error"][1] and point["local_alive"] == sum(line["alive"])
    later = [point["step"] for point in points if "nmse" in point]
    assert later and min(later) > LOCAL.steps and max(later) == STEPS
