"""Training: it learns, it resumes bit for bit, and it writes a run folder that can be read."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.random_models import ACTIVATION_OPTIONS, ARCHITECTURES, random_model

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.config import RunConfig, TrainingConfig
from tl_adapters.data.batching import BatchOrder, TracesInMemory
from tl_adapters.data.traces import Trace
from tl_adapters.evaluation.faithfulness import measure_faithfulness
from tl_adapters.local_stage.schedules import linear_warmup, warmup_cosine
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.training.end_to_end_stage import EndToEndStage, sparsity_weight
from tl_adapters.training.objective import StepTerms, shared_prefix_step
from tl_adapters.training.run_folder import RunFolderError
from tl_adapters.training.trainer import Trainer, TrainingError, train

CONFIG = TrainingConfig(
    stages=("end_to_end",),
    n_features=16,
    steps=12,
    tokens_per_batch=60,
    checkpoint_every=5,
    log_every=2,
    validate_every=4,
    lr=1e-3,
)


def fresh_pair() -> PairedModel:
    return PairedModel.from_pretrained(random_model(1, torch.float32), random_model(2, torch.float32))


def traces(n: int = 30) -> list[Trace]:
    generator = torch.Generator().manual_seed(0)
    return [Trace(tuple(torch.randint(1, 61, (6 + i % 9,), generator=generator).tolist()), 2) for i in range(n)]


def weights(adapters: AdapterSet) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in adapters.state_dict().items()}


def test_schedules_rise_and_fall() -> None:
    factors = [warmup_cosine(s, 100, 0.05) for s in range(100)]
    assert factors[0] == pytest.approx(0.2) and max(factors) == factors[4]
    assert factors[4:] == sorted(factors[4:], reverse=True) and factors[-1] < 1e-3
    assert [linear_warmup(s, 8, 0.5) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert linear_warmup(0, 8, 0.0) == 1 and warmup_cosine(0, 8, 0.0) == 1


def test_training_lowers_the_loss() -> None:
    pair, seen = fresh_pair(), []
    options = TrainingConfig(
        stages=("end_to_end",), n_features=64, steps=80, tokens_per_batch=400, lr=5e-3, l1_weight=0.0
    )
    Trainer(pair, traces(), options, progress=False).run(on_step=lambda step, terms: seen.append(terms))
    for term in ("output_kl", "nmse", "total"):
        assert getattr(seen[-1], term) < 0.7 * getattr(seen[0], term), term


def trained(activation: str, **options: object) -> tuple[PairedModel, list[StepTerms]]:
    """A pair of float32 models after 60 steps with this activation, and the terms of every step."""
    pair, seen = fresh_pair(), []
    config = TrainingConfig(
        stages=("end_to_end",),
        n_features=64,
        steps=60,
        tokens_per_batch=200,
        lr=1e-2,
        log_every=1,
        activation=activation,
        **options,
    )
    Trainer(pair, traces(), config, progress=False).run(on_step=lambda step, terms: seen.append(terms))
    return pair, seen


@pytest.mark.parametrize(
    ("activation", "options"),
    [
        ("relu", {"l1_weight": 1e-2}),
        ("jumprelu", {"l0_weight": 2e-2}),
        ("topk", {"k": 6}),
        ("batchtopk", {"k": 6}),
    ],
)
def test_every_activation_learns_and_is_as_sparse_as_requested(activation: str, options: dict[str, object]) -> None:
    pair, seen = trained(activation, **options)
    assert seen[-1].output_kl < 0.7 * seen[0].output_kl and seen[-1].nmse < 0.85 * seen[0].nmse
    adapters = pair.installed_adapters()
    assert (adapters.metadata.activation, adapters.metadata.k) == (activation, options.get("k"))
    sums = measure_faithfulness(pair, traces())
    l0 = sums.active_all.sum(0) / sums.tokens_all.sum()
    if activation == "topk":
        assert all(step.l0 is not None and max(step.l0) <= 6 for step in seen) and l0.max() <= 6
    elif activation == "batchtopk":
        assert all(step.l0 == pytest.approx([6.0] * 4, abs=0.1) for step in seen)
        assert all(adapter.threshold.min() == adapter.threshold.max() > 0 for adapter in adapters)
        assert ((l0 > 4) & (l0 < 8)).all()  # by thresholds: about k
    else:
        weight = next(iter(options))
        denser = measure_faithfulness(trained(activation, **{weight: 0.0})[0], traces())
        assert l0.mean() < 0.9 * (denser.active_all.sum(0) / denser.tokens_all.sum()).mean()
    if activation == "jumprelu":
        assert all(adapter.threshold.min() >= 0 and adapter.threshold.std() > 0 for adapter in adapters)


def test_the_weight_of_the_sparsity_term() -> None:
    weights = [
        sparsity_weight(config, 1)
        for config in (
            TrainingConfig(stages=("end_to_end",), steps=8, l1_warmup_fraction=0.5, l1_weight=0.2),
            TrainingConfig(
                stages=("end_to_end",), steps=8, l1_warmup_fraction=0.5, activation="jumprelu", l0_weight=0.6
            ),
            TrainingConfig(stages=("end_to_end",), steps=8, activation="topk"),
            TrainingConfig(stages=("end_to_end",), steps=8, activation="batchtopk"),
        )
    ]
    assert weights == pytest.approx([0.1, 0.3, 0, 0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_adapters_learn_on_a_bfloat16_model(architecture: str) -> None:
    base, target = (random_model(s, torch.float32, architecture) for s in (1, 2))
    pair, seen = PairedModel.from_pretrained(base, target, dtype=torch.bfloat16), []
    options = TrainingConfig(
        stages=("end_to_end",), n_features=64, steps=60, tokens_per_batch=400, lr=5e-3, l1_weight=1e-4
    )
    adapters = Trainer(pair, traces(), options, progress=False).run(on_step=lambda step, terms: seen.append(terms))
    assert {p.dtype for p in adapters.parameters()} == {torch.float32} and pair.model.W_E.dtype == torch.bfloat16
    assert seen[-1].output_kl.dtype == torch.float32
    assert seen[-1].output_kl < 0.8 * seen[0].output_kl and seen[-1].nmse < 0.8 * seen[0].nmse


def test_only_the_adapters_change() -> None:
    pair = fresh_pair()
    before = {k: v.clone() for k, v in pair.model.state_dict().items()}
    train(pair, traces(), CONFIG, progress=False)
    for name, value in before.items():
        assert torch.equal(value, pair.model.state_dict()[name]), name
    assert pair.routes == fresh_pair().routes
    assert not any(point._forward_hooks for point in pair.model.hook_dict.values())


def test_a_seed_gives_the_same_adapters_twice_and_another_gives_others() -> None:
    first, second = (weights(train(fresh_pair(), traces(), CONFIG, progress=False)) for _ in range(2))
    other = weights(train(fresh_pair(), traces(), CONFIG, progress=False, seed=1))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


class Stop(Exception):
    pass


def test_a_step_on_several_batches_adds_up_their_gradients() -> None:
    """Each weighted by its share of the counted tokens; schedules and the cut are those of the step."""
    config = replace(CONFIG, batches_per_step=3, grad_clip=1e9, l1_weight=0.3, seed=4)
    pair, alone = (PairedModel.from_pretrained(random_model(1), random_model(2)) for _ in range(2))
    order = BatchOrder(TracesInMemory(traces()), config.tokens_per_batch, config.seed)
    batches = [order[index] for index in range(9, 12)]
    assert len({tuple(batch.tokens.shape) for batch in batches}) > 1
    for each in (pair, alone):
        each.new_adapters(16, dtype=torch.float64)
        for parameter in each.installed_adapters().parameters():
            parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(parameter)))
    stage = EndToEndStage(pair, order, config, step=3)
    seen: list[torch.Tensor] = []
    stage.adam.step = lambda *_: seen.extend(p.grad.clone() for p in stage.adam.parameters)  # type: ignore[method-assign]
    terms = stage.advance(want_l0=True)
    counts = [int(batch.counted.sum()) for batch in batches]
    cut = random.Random(f"{config.seed}-cut-3").randint(1, pair.n_layers)
    expected, totals = [torch.zeros_like(g) for g in seen], dict.fromkeys(("total", "nmse", "output_kl"), 0.0)
    l0 = torch.zeros(pair.n_layers)
    for batch, n in zip(batches, counts, strict=True):
        alone.installed_adapters().zero_grad()
        found = shared_prefix_step(alone, batch, cut, config.loss_weights, sparsity_weight(config, 3), True, False)
        for total, parameter in zip(expected, alone.installed_adapters().parameters(), strict=True):
            total += n / sum(counts) * parameter.grad
        for name in totals:
            totals[name] += n / sum(counts) * float(getattr(found, name))
        l0 += n / sum(counts) * torch.tensor(found.l0)
    for ours, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    for name, total in totals.items():
        assert float(getattr(terms, name)) == pytest.approx(total, rel=1e-9), name
    assert terms.l0 == pytest.approx(l0.tolist()) and stage.tokens == sum(int(b.real.sum()) for b in batches)


@pytest.mark.parametrize("activation", ACTIVATION_OPTIONS)
def test_a_resumed_run_equals_one_that_never_stopped(activation: str, tmp_path: Path) -> None:
    options = dict(validation=traces(5), progress=False)
    config = replace(CONFIG, **ACTIVATION_OPTIONS[activation], batches_per_step=1 + (activation == "batchtopk"))
    whole = train(fresh_pair(), traces(), config, tmp_path / "whole", **options)

    def stop(step: int, terms: StepTerms) -> None:
        if step == 9:
            raise Stop

    with pytest.raises(Stop):
        Trainer(fresh_pair(), traces(), config, tmp_path / "run", **options).run(on_step=stop)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000005"]
    resumed = Trainer.resume(fresh_pair(), traces(), tmp_path / "run", **options)
    assert resumed.step == 5
    adapters = resumed.run()
    assert any("threshold" in name for name in whole.state_dict()) is (activation in ("jumprelu", "batchtopk"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, adapters.state_dict()[name]), name
    for file in ("metrics.jsonl", "validation.jsonl"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "run" / file).read_bytes()
    assert len((tmp_path / "run" / "validation.jsonl").read_text().splitlines()) == 3


def test_the_contents_of_a_run_folder(tmp_path: Path) -> None:
    pair = fresh_pair()
    adapters = train(pair, traces(), CONFIG, tmp_path / "run", progress=False)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "adapters", "config.json", "metrics.jsonl", "run.json",
    ]  # fmt: skip
    assert RunConfig.load(tmp_path / "run" / "config.json").training == CONFIG
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8, 10, 12]
    saved = AdapterSet.from_pretrained(tmp_path / "run" / "adapters")
    assert all(torch.equal(v, saved.state_dict()[k]) for k, v in adapters.state_dict().items())
    with pytest.raises(FileExistsError, match="exists already"):
        train(pair, traces(), CONFIG, tmp_path / "run", progress=False)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(tmp_path: Path) -> None:
    pair = fresh_pair()
    trainer = Trainer(pair, traces(), CONFIG, tmp_path / "run", progress=False)

    def poison(step: int, terms: StepTerms) -> None:
        if step == 7:
            with torch.no_grad():
                pair.mlps[1].adapter.b_dec.fill_(float("inf"))

    with pytest.raises(TrainingError, match="Step 8: .*output_kl.* not finite.*Saved in .*step-00000005"):
        trainer.run(on_step=poison)
    assert Trainer.resume(fresh_pair(), traces(), tmp_path / "run", progress=False).step == 5


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not the folder of a training run"):
        Trainer.resume(fresh_pair(), traces(), tmp_path, progress=False)
    with pytest.raises(RunFolderError, match="There is no folder"):
        Trainer.resume(fresh_pair(), traces(), tmp_path / "nowhere", progress=False)


def test_a_planted_adapter_is_matched() -> None:
    """A target whose MLP is the base's and one neuron more: that neuron's difference is learned to a small rest."""
    base, target = random_model(1, torch.float32), random_model(2, torch.float32)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for ours, theirs in zip(target.model.layers, base.model.layers, strict=True):
            ours.mlp.load_state_dict(theirs.mlp.state_dict())
            ours.mlp.down_proj.weight[:, 0] += torch.randn(32, generator=generator)
    pair = PairedModel.from_pretrained(base, target)
    seen: list[StepTerms] = []
    options = TrainingConfig(
        stages=("end_to_end",), n_features=32, steps=150, tokens_per_batch=400, lr=1e-2, l1_weight=0.0
    )
    Trainer(pair, traces(), options, progress=False).run(on_step=lambda step, terms: seen.append(terms))
    assert seen[-1].output_kl < 0.15 * seen[0].output_kl
    assert seen[-1].nmse < 0.4 * seen[0].nmse
