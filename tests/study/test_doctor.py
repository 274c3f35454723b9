"""The doctor finds what would fail later, from descriptions alone, and says what to change."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.random_models import ARCHITECTURES, random_batch, random_model, randomise
from huggingface_hub.errors import NotASafetensorsRepoError
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, Qwen2Config

import tl_adapters.checkpoints.model_files as checkpoints
import tl_adapters.utils.devices as devices
from tl_adapters.checkpoints.compatibility import Finding
from tl_adapters.circuits import search
from tl_adapters.circuits.onsets import Onsets, kept_bytes
from tl_adapters.circuits.search import SearchOptions
from tl_adapters.cli.main import main
from tl_adapters.config import DataConfig, LocalConfig, LossWeights, RunConfig, TrainingConfig
from tl_adapters.data.batching import BatchOrder, TracesInMemory
from tl_adapters.data.traces import Batch, Trace
from tl_adapters.interventions.feature_edits import gated
from tl_adapters.local_stage.regression_data import MLPDifferences
from tl_adapters.local_stage.stage import LocalStage
from tl_adapters.models import routed_model
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.organism import BASE, BUILTIN_BASE, BUILTIN_TARGET, TARGET
from tl_adapters.study import run_size
from tl_adapters.study.doctor import diagnose
from tl_adapters.study.run_size import LOGIT_COPIES, ROLE_PASSES, TOKENS_PER_LOGITS, estimate_search, estimate_size
from tl_adapters.training import kl_divergence
from tl_adapters.training.adapter_adam import AdapterAdam, PlacedAdapter
from tl_adapters.training.kl_divergence import TargetDistributions
from tl_adapters.training.objective import shared_prefix_step


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Copies of the built-in pair, to be spoilt."""
    for name, origin in (("base", BASE), ("target", TARGET)):
        shutil.copytree(origin, tmp_path / name)
    return tmp_path / "base", tmp_path / "target"


@pytest.fixture(autouse=True)
def enough_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as other processes leave on a quiet machine, so that no finding depends on them."""
    monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * 10**9))


def found(config: RunConfig, level: str) -> list[Finding]:
    return [finding for finding in diagnose(config) if finding.level == level]


def pair_of(folders: tuple[Path, Path], **data: object) -> RunConfig:
    return RunConfig(base=str(folders[0]), target=str(folders[1]), data=DataConfig(**data))


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_good_pair_has_no_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(BASE), str(TARGET)]) == 0
    out = capsys.readouterr().out
    assert "0 errors, 0 warnings." in out and "next: tl-adapters train --base" in out
    subjects = (
        "architecture", "d_mlp", "rope", "context length", "base's weights", "token ids", "chat template",
        "think tokens", "dtype", "memory", "time", "disk",
    )  # fmt: skip
    for subject in subjects:
        assert f"ok      {subject}: " in out, subject


@pytest.mark.parametrize(("load", "threads", "said"), [(3.9, 2, True), (0.2, 2, False), (3.9, 1, False)])
def test_on_a_busy_machine_it_says_how_threads_wait(
    monkeypatch: pytest.MonkeyPatch, load: float, threads: int, said: bool
) -> None:
    monkeypatch.setattr("psutil.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    says = [f.message for f in found(RunConfig(base=str(BASE), target=str(TARGET)), "ok") if f.subject == "processors"]
    assert ["OMP_WAIT_POLICY=passive" in one and "3.9 processors" in one for one in says] == [True] * said


def test_a_bad_pair_ends_with_status_1(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    edit(folders[0] / "config.json", intermediate_size=64)
    assert main(["doctor", *map(str, folders)]) == 1
    out = capsys.readouterr().out
    assert "error   d_mlp: intermediate_size is 64 in the base and 320 in the target." in out
    assert "1 errors, " in out and "next:" not in out


@pytest.mark.parametrize(
    ("side", "values", "subject", "says"),
    [
        (0, {"max_position_embeddings": 9}, "context length", "9 in the base and 256"),
        (0, {"vocab_size": 9}, "vocabulary size", "9 in the base"),
        (0, {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope", "5.0"),
    ],
)
def test_what_may_differ_is_to_know(
    folders: tuple[Path, Path], side: int, values: dict[str, object], subject: str, says: str
) -> None:
    edit(folders[side] / "config.json", **values)
    (finding,) = found(pair_of(folders), "warning")
    assert finding.subject == subject and says in finding.message and "Only the base's MLPs" in finding.advice


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
        ({"architectures": ["FancyForCausalLM"]}, "FancyForCausalLM"),
    ],
)
def test_what_cannot_be_exact_is_to_mend(folders: tuple[Path, Path], values: dict[str, object], says: str) -> None:
    for folder in folders:
        edit(folder / "config.json", **values)
    (finding,) = found(pair_of(folders), "error")
    assert finding.subject == "architecture" and says in finding.message


def test_weights_are_seen_in_their_headers(folders: tuple[Path, Path]) -> None:
    base = folders[0] / "model.safetensors"
    whole = load_file(base)
    base.write_bytes(base.read_bytes()[:-10])
    assert [(f.subject, "damaged" in f.message) for f in found(pair_of(folders), "error")] == [("base's weights", True)]
    save_file({k: v for k, v in whole.items() if "layers.4.mlp" not in k}, base)
    (finding,) = found(pair_of(folders), "error")
    assert "3 of 15 MLP tensors are missing, such as model.layers.4.mlp.gate_proj" in finding.message


def test_a_difference_that_is_rounding_is_seen(folders: tuple[Path, Path]) -> None:
    ok = next(f for f in diagnose(pair_of(folders)) if f.subject == "signal to noise")
    assert (ok.level, "more than 1,000 times the rounding" in ok.message) == ("ok", True)
    base, target = (load_file(folder / "model.safetensors") for folder in folders)
    generator = torch.Generator().manual_seed(0)
    for name in target:
        if (
            "layers.2.mlp" in name or "layers.4.mlp" in name
        ):  # stored in bfloat16 once, and a change of a tenth of a unit
            change = 1 + 4e-4 * torch.randn(target[name].shape, generator=generator)
            target[name] = (base[name] * change).bfloat16().float()
            base[name] = base[name].bfloat16().float()
    for folder, weights in zip(folders, (base, target), strict=True):
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (finding,) = found(pair_of(folders), "warning")
    assert finding.subject == "signal to noise"
    assert "leaves such layers unexplained, here 2, 4." in finding.advice


def test_tokenizers_and_templates(folders: tuple[Path, Path]) -> None:
    record = json.loads((folders[0] / "tokenizer.json").read_text())
    record["added_tokens"][-1]["id"] += 1
    edit(folders[0] / "tokenizer.json", **record)
    (finding,) = found(pair_of(folders), "warning")
    assert finding.subject == "token ids" and "1 of the target's 279" in finding.message
    (finding,) = found(pair_of((BASE, TARGET), think_end="</reasoning>"), "warning")
    assert finding.subject == "think tokens" and "</reasoning> is" in finding.message
    for file in folders[1].glob("tokenizer*"):
        file.unlink()
    (folders[1] / "chat_template.jinja").unlink(missing_ok=True)
    (finding,) = found(pair_of(folders), "error")
    assert finding.subject == "chat template" and "no tokenizer" in finding.message


def test_data_is_surveyed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    lines = [{"prompt": "47+85=?", "response": "<think>" + "47+85=132.\n" * n + "</think>132"} for n in (1, 2, 3, 40)]
    (tmp_path / "traces.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = str(tmp_path / "traces.jsonl")
    (finding,) = found(pair_of(folders, source=source), "warning")
    assert finding.subject == "data" and "4 of 4 documents are used (too long: 1 truncated" in finding.message
    (finding,) = found(pair_of(folders, source=source, too_long="refuse"), "error")
    assert finding.subject == "data" and "max_tokens" in finding.message
    (tmp_path / "traces.jsonl").write_text("{")
    (finding,) = found(pair_of(folders, source=source), "error")
    assert "line 1" in finding.message
    (finding,) = found(pair_of(folders, max_tokens=10**6), "warning")
    assert finding.subject == "context length" and "Set data.max_tokens to 256" in finding.advice


def test_memory_and_disk(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10**6))
    memory, disk = found(pair_of(folders), "error")
    assert memory.subject == "memory" and "bfloat16" in memory.advice
    assert disk.subject == "disk" and "keep_checkpoints" in disk.advice


@pytest.mark.parametrize(
    ("tokens_per_batch", "free", "advice"),
    [
        (256, 0.5, "Set training.recompute: true, which"),
        (2560, 0.3, "Set training.tokens_per_batch: 256 and training.batches_per_step: 10, which"),
        (2560, 0.02, "Set training.recompute: true, training.tokens_per_batch: 256 and training.batches_per_step"),
        (256, 0.0, "Use dtype bfloat16"),
    ],
)
def test_settings_that_take_less_memory_are_named(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tokens_per_batch: int, free: float, advice: str
) -> None:
    """``free`` is a share of the way from the least that the settings can take to what is asked for."""
    training = TrainingConfig(stages=("end_to_end",), n_features=8, tokens_per_batch=tokens_per_batch)
    config = replace(pair_of(folders, max_tokens=256), training=training)
    described = AutoConfig.from_pretrained(folders[1])

    def memory(**changed: Any) -> int:
        return estimate_size(replace(config, training=replace(training, **changed)), described, 256).memory

    asked, least = memory(), memory(recompute=True, tokens_per_batch=256)
    room = least + free * (asked - least) if free else least - 1
    monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: SimpleNamespace(available=room))
    (finding,) = (f for f in found(config, "error") if f.subject == "memory")
    assert finding.advice.startswith(advice)
    said = re.search(r"takes about ([\d.e+-]+) GB", finding.advice)
    assert (said is None) == (free == 0.0)
    assert said is None or float(said[1]) * 1e9 <= 1.05 * room


def test_of_documents_that_are_not_known_no_smaller_batch_is_named(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their longest might not fit into it: without documents and max_tokens a batch of one token would do."""
    training = TrainingConfig(stages=("end_to_end",), n_features=8, tokens_per_batch=2560, recompute=True)
    monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: SimpleNamespace(available=25 * 10**6))
    for data, named in ({"max_tokens": 256}, True), ({}, False):
        (finding,) = (
            f for f in found(replace(pair_of(folders, **data), training=training), "error") if f.subject == "memory"
        )
        assert ("training.tokens_per_batch: " in finding.advice) == named
        assert finding.advice.endswith("or a shorter data.max_tokens and training.tokens_per_batch.")


def test_the_local_stages_time_counts_what_it_writes_and_its_polish(monkeypatch: pytest.MonkeyPatch) -> None:
    described = AutoConfig.from_pretrained(TARGET)
    monkeypatch.setattr(run_size, "seconds_of", lambda operations, device, dtype: operations)
    monkeypatch.setattr(run_size, "seconds_to_write", lambda written, device: 1e15 * written)

    def stage(stages: tuple[str, ...] = ("local",), n_features: int = 64, **local: Any) -> run_size.StageSize:
        training = TrainingConfig(stages=stages, n_features=n_features, local=LocalConfig(**local))  # type: ignore[arg-type]
        return estimate_size(RunConfig(training=training), described, 60).stages[0]

    whole, cpu = stage(), torch.device("cpu")
    assert whole.seconds(cpu) == whole.operations + 1e15 * whole.written and whole.written > 0
    for less in (dict(polish=False), dict(steps=500), dict(revisions=()), dict(max_tokens=50_000), dict(n_features=32)):
        smaller = stage(**less)  # type: ignore[arg-type]
        assert smaller.operations < whole.operations and smaller.written < whole.written, less
    assert stage(workers=3).memory > stage(workers=1).memory, "each of them has the tokens of its layer"
    assert stage(("end_to_end",)).written == 0


def test_of_hub_models_no_weights_are_downloaded(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {f"org/{folder.name}": folder for folder in folders}
    names = dict.fromkeys(load_file(folders[1] / "model.safetensors"), "model-00001.safetensors")
    for folder in folders:
        (folder / "model.safetensors").unlink()
    (folders[0] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    asked: list[str] = []

    def fake(name: str, revision: str | None, allow_patterns: list[str], token: str | None) -> str:
        asked.extend(allow_patterns)
        return str(parts[name])

    def header(name: str, revision: str | None, token: str | None) -> SimpleNamespace:
        if name != "org/target":
            raise NotASafetensorsRepoError(name)
        return SimpleNamespace(weight_map=names)

    monkeypatch.setattr(checkpoints, "snapshot_download", fake)
    monkeypatch.setattr(checkpoints, "get_safetensors_metadata", header)
    findings = diagnose(RunConfig(base="org/base", target="org/target"))
    assert {f.level for f in findings} == {"ok"}
    assert not any("safetensors" in pattern and pattern != "*.json" for pattern in asked)
    (folders[0] / "model.safetensors.index.json").unlink()
    (finding,) = found(RunConfig(base="org/base", target="org/target"), "error")
    assert finding.subject == "base's weights" and "no readable safetensors on the hub" in finding.message


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_estimate_is_near_what_is_really_kept(architecture: str) -> None:
    shape = dict(hidden_size=64, intermediate_size=192, num_attention_heads=4, head_dim=16)
    base, target = (random_model(seed, torch.float32, architecture, **shape) for seed in (1, 2))
    n_params = sum(p.numel() for p in target.parameters())
    pair = PairedModel.from_pretrained(base, target)
    adapters = pair.new_adapters(96)
    config = RunConfig(training=TrainingConfig(stages=("end_to_end",), n_features=96, tokens_per_batch=4 * 60))
    size = estimate_size(config, target.config, longest=60)
    (stage,) = size.stages
    batch = random_batch(0, (60,) * 4)
    logits = 4 * LOGIT_COPIES * batch.tokens.numel() * target.config.vocab_size
    streams = (pair.n_layers + 1) * batch.tokens.numel() * 64 * 4  # of the target, which are kept beside
    gradients = 2 * batch.tokens.numel() * 96 * 4  # of one layer's activations and pre-activations
    kept = kept_by_a_step(pair, batch, recompute=False)
    assert 0.8 < (stage.activations - logits - gradients) / (kept + streams) < 1.2
    # Computed again, a block keeps its input, and one block at a time all of its own.
    kept = kept_by_a_step(pair, batch, recompute=True) + kept // pair.n_layers
    again = replace(config, training=replace(config.training, recompute=True))
    (stage,) = estimate_size(again, target.config, longest=60).stages
    assert 0.8 < (stage.activations - logits - gradients) / (kept + streams) < 1.2
    assert stage.adapters == 16 * sum(p.numel() for p in adapters.parameters())
    mlps = sum(p.numel() for name, p in base.named_parameters() if ".mlp." in name)
    assert 0.98 < size.models / (4 * (n_params + mlps)) < 1.02


@pytest.mark.parametrize("several", [True, False])
def test_the_estimate_of_logits_is_the_memory_of_a_divergence(several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocab, d_model = 400, 5_000, 8
    monkeypatch.setattr(kl_divergence, "LOGPROBS_KEPT", tokens * vocab * several)
    monkeypatch.setattr(run_size, "LOGPROBS_KEPT", tokens * vocab * several)
    monkeypatch.setattr(routed_model, "LOGITS_AT_ONCE_CPU", 100 * vocab)
    monkeypatch.setattr(routed_model, "ROWS_AT_ONCE_CPU", 1)
    monkeypatch.setattr(kl_divergence, "LOGPROBS_AT_ONCE_CPU", 10 * vocab)
    target, stream = torch.randn(2, 1, tokens, d_model)
    W_U, mask, rows = torch.randn(d_model, vocab), torch.ones(1, tokens, dtype=torch.bool), 100
    assert routed_model.rows_at_once(vocab, W_U.device) == rows
    target_distributions = TargetDistributions(target, mask, lambda x: x @ W_U, rows, several)
    most = peak_of(lambda: target_distributions.kl(stream.requires_grad_()))

    def activations(vocab: int) -> int:
        described = Qwen2Config(vocab_size=vocab, hidden_size=d_model, num_attention_heads=1)
        training = TrainingConfig(stages=("end_to_end",), n_features=1, tokens_per_batch=tokens)
        return estimate_size(RunConfig(training=training), described).stages[0].activations

    assert 0.8 < (activations(vocab) - activations(1)) / most < 1.2


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Gemma2ForCausalLM"])
def test_the_models_bytes_and_its_descriptions_are_the_same(architecture: str, backend: str) -> None:
    """A search decides by the model whether blocks are computed again, and the planner by its description."""
    base, target = (random_model(seed, torch.float32, architecture) for seed in (1, 2))
    pair = randomise(PairedModel.from_pretrained(base, target, backend=backend), n_features=24)
    options, kept = SearchOptions(tokens_per_batch=40), kept_bytes(pair, 40)
    size = estimate_search(target.config, 24, 4, 3, 40, options)
    recorded, logits = 4 * 40 * pair.n_layers * 24, 4 * LOGIT_COPIES * 5 * target.config.vocab_size
    assert size.activations - recorded - logits == 40 * pair.n_layers * kept


@pytest.mark.parametrize("method", ["greedy", "sampled"])
def test_the_estimate_of_a_search_is_what_its_rounds_read_and_keep(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = dict(hidden_size=64, intermediate_size=192, num_attention_heads=4, head_dim=16)
    base, target = (random_model(seed, torch.float32, "Qwen2ForCausalLM", **shape) for seed in (1, 2))
    pair = randomise(PairedModel.from_pretrained(base, target), n_features=96)
    texts, tokens = 12, 40
    ids = torch.randint(1, target.config.vocab_size, (texts, tokens))
    onset, control, after = (torch.zeros_like(ids, dtype=torch.bool) for _ in range(3))
    onset[:, 20], control[:, 10], after[:, 21:25], after[:, -2] = True, True, True, True
    onsets = Onsets(ids, torch.ones_like(onset), onset, control, after, (7,))
    alive = torch.ones(pair.n_layers, 96, dtype=torch.bool)
    options = SearchOptions(share=12 / alive.numel(), rounds=4, method=method, parts=4, tokens_per_batch=tokens * 3)
    read = 0
    residual = search.final_residual

    def counted(pair: PairedModel, tokens: torch.Tensor) -> torch.Tensor:
        nonlocal read
        read += tokens.numel() * torch.is_grad_enabled()
        return residual(pair, tokens)

    monkeypatch.setattr(search, "final_residual", counted)
    found = search.search_circuit(pair, onsets, alive, options, progress=False)
    size = estimate_search(target.config, 96, 12, texts, tokens, options)
    assert size.rounds == len(found.objectives) - 1
    assert size.tokens - ROLE_PASSES * texts * tokens == read / 2, "each token is read once with and once without it"
    gates, batch = torch.ones(pair.n_layers, 96, requires_grad=True), 3 * tokens
    with kept_in(pair) as kept, gated(pair, dict(enumerate(gates))):
        residual(pair, ids[:3])
    recorded, logits = (
        4 * batch * pair.n_layers * 96,
        4 * LOGIT_COPIES * (batch // TOKENS_PER_LOGITS) * target.config.vocab_size,
    )
    assert 0.7 < (size.activations - recorded - logits) / sum(kept.values()) < 1.3
    monkeypatch.setattr(run_size, "MOST_KEPT_BYTES", 0)
    assert estimate_search(target.config, 96, 12, texts, tokens, options).activations < size.activations


@pytest.mark.parametrize("recompute", [False, True])
def test_the_estimate_is_near_the_peak_of_a_step(recompute: bool) -> None:
    shape = dict(hidden_size=64, intermediate_size=192, num_attention_heads=4, head_dim=16)
    base, target = (random_model(seed, torch.float32, "Qwen2ForCausalLM", **shape) for seed in (1, 2))
    pair, n_features = PairedModel.from_pretrained(base, target), 512
    pair.new_adapters(n_features)
    batch = random_batch(0, (60,) * 20)
    training = TrainingConfig(
        stages=("end_to_end",), n_features=n_features, tokens_per_batch=20 * 60, recompute=recompute
    )
    (stage,) = estimate_size(RunConfig(training=training), target.config, longest=60).stages
    most = peak_of(lambda: shared_prefix_step(pair, batch, 0, LossWeights(), 0.01, recompute=recompute))
    gradients = sum(parameter.nbytes for parameter in pair.installed_adapters().parameters())
    assert 0.8 < (stage.activations + gradients) / most < 1.2


def peak_of(run: Callable[[], object]) -> int:
    """The most bytes that are in memory while something runs, beside those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    changes = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    return max(accumulate(e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())))


def kept_by_a_step(pair: PairedModel, batch: Batch, recompute: bool) -> int:
    """Bytes of what one step keeps for its backward pass at cut 0, where one pass has a graph; without weights."""
    with kept_in(pair) as kept:
        shared_prefix_step(pair, batch, 0, LossWeights(), 0.01, recompute=recompute)
    pair.installed_adapters().zero_grad()
    return sum(kept.values())


@contextmanager
def kept_in(pair: PairedModel) -> Iterator[dict[int, int]]:
    """The bytes that a block keeps for a backward pass, by storage; without weights."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in pair.model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        yield kept


def test_the_estimate_knows_both_stages() -> None:
    """The local stage's tokens, adapters and training state are what it really keeps, the later stage's state too."""
    base, target = (random_model(seed, torch.float32) for seed in (1, 2))
    pair = PairedModel.from_pretrained(base, target)
    local = LocalConfig(steps=2, tokens_per_step=20, max_tokens=300, revisions=())
    config = TrainingConfig(n_features=9, tokens_per_batch=60, stages=("local", "end_to_end"), local=local, steps=1)
    documents = [Trace(tuple(range(1, 40)), 3) for _ in range(20)]
    stage = LocalStage(MLPDifferences(pair), BatchOrder(TracesInMemory(documents), 60, 0), config, local)
    stage.advance()
    size = estimate_size(RunConfig(training=config), target.config)
    estimate, later = size.stages
    kept = sum(layer.buffer.x[i].nbytes + layer.buffer.d[i].nbytes for i, layer in enumerate(stage.layers))
    assert estimate.tokens == kept
    adapters = size.result
    state = sum(tensor.nbytes for tensor in stage.state().values())
    assert abs(estimate.checkpoint - adapters - state) < 0.1 * state
    assert abs(estimate.adapters - adapters - state - adapters) < 0.1 * state  # a gradient for every weight
    placed = [PlacedAdapter(layer.adapter, layer.coordinates) for layer in stage.trained]
    adam = AdapterAdam(pair.new_adapters(9), config, placed)
    for parameter in adam.parameters:
        parameter.grad = torch.ones_like(parameter)
    adam.step(1e-3, None, 1.0)
    state = sum(tensor.nbytes for tensor in adam.tensors().values())
    assert abs(later.checkpoint - adapters - state) < 0.1 * state
    assert size.memory == size.models + max(estimate.memory, later.memory)
    twice = estimate_size(RunConfig(training=replace(config, steps=2)), target.config).stages[1]
    assert twice.operations == 2 * later.operations > 0
    streaming = replace(config, local=replace(local, streaming=True))
    assert estimate_size(RunConfig(training=streaming), target.config).stages[0].operations > estimate.operations > 0


def test_do_the_adapters_belong(tmp_path: Path, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    pair = PairedModel.from_pretrained(*folders)
    pair.new_adapters(8).save_pretrained(tmp_path / "run" / "adapters")
    assert main(["doctor", *map(str, folders), str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    for says in (
        f"adapters: {pair.n_layers} of {pair.n_layers} layers of width 128",
        "adapters' target: trained with",
        "adapters' base: trained ",
    ):
        assert f"ok      {says}" in out
    assert out.count("by content") == 2
    assert main(["doctor", str(folders[1]), str(folders[0]), str(tmp_path / "run")]) == 1  # the wrong way round
    out = capsys.readouterr().out
    assert "error   adapters' target: trained with" in out and "error   adapters' base: trained with" in out
    random_model(2, torch.float32).save_pretrained(tmp_path / "small")
    small = PairedModel.from_pretrained(tmp_path / "small", tmp_path / "small")
    small.new_adapters(8).save_pretrained(tmp_path / "other")
    assert main(["doctor", *map(str, folders), str(tmp_path / "other")]) == 1
    assert "4 of 4 layers of width 32; " in capsys.readouterr().out
    assert main(["doctor", *map(str, folders), str(tmp_path / "nothing")]) == 1
    assert "error   adapters: " in capsys.readouterr().out


def test_adapters_of_hub_models_are_compared_by_name(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = PairedModel.from_pretrained(*folders)
    pair.base_id, pair.target_id = "org/base", "org/other"
    pair.new_adapters(8).save_pretrained(tmp_path / "a")
    places = {"mirror/base": str(folders[0]), "mirror/target": str(folders[1])}
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda name, **options: places[name])
    names = SimpleNamespace(weight_map=checkpoints.tensor_shapes(folders[0]))
    monkeypatch.setattr(checkpoints, "get_safetensors_metadata", lambda name: names)
    config = RunConfig(base="mirror/base", target="mirror/target")
    findings = {f.subject: f for f in diagnose(config, adapters=tmp_path / "a")}
    assert findings["adapters' base"].level == "ok" and "by name" in findings["adapters' base"].message
    assert findings["adapters' target"].level == "warning"
    assert "the adapters record org/other, and mirror/target was given" in findings["adapters' target"].message


def test_the_search_of_a_circuit_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    training = TrainingConfig(n_features=100)
    config = RunConfig(base=BUILTIN_BASE, target=BUILTIN_TARGET, data=DataConfig(max_tokens=200), training=training)
    (finding,) = (f for f in diagnose(config) if f.subject == "circuit")
    assert finding.level == "ok" and finding.message.startswith("hesitation searches 15 features in 120 texts of 200 ")
    monkeypatch.setattr("tl_adapters.study.doctor.free_memory", lambda device: 1)
    (finding,) = (f for f in diagnose(config) if f.subject == "circuit")
    assert finding.level == "warning" and "fewer training.n_features" in str(finding)


def test_the_plan_of_a_run_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["memory:", "time:", "disk:"] and not out.exists()
    assert main(["train", "--out", str(out), "--plan", "--set", "n_features=90000000", "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)["results"]["findings"]
    assert "error" in {finding["level"] for finding in findings if finding["subject"] == "memory"}
    assert main(["train", "--resume", str(out), "--plan"]) == 2
    assert "--resume takes the run's own options; leave out --plan" in capsys.readouterr().err
