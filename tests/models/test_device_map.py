"""A pair over several devices (device_map=): all as in the same pair on one, and one error for what cannot be.

The CPU and the model's files are the only devices here: several GPUs, and a GPU beside them, are untried.
"""

import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pairs import TOKENS
from helpers.random_models import ARCHITECTURES, random_batch, random_model, randomise
from helpers.readme import ROOT, blocks_of
from helpers.wrong_calls import write_small_place
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig

from tl_adapters import load, organism
from tl_adapters.checkpoints import device_map as device_map_module
from tl_adapters.checkpoints.device_map import DeviceMapError, MappedDevices, resolve_device_map
from tl_adapters.checkpoints.hf_model import load_hf_model
from tl_adapters.checkpoints.offloaded_weights import is_offloaded, stored
from tl_adapters.config import ConfigError, LocalConfig, LossWeights, RunConfig, parse_option
from tl_adapters.data.chat_format import encode_traces
from tl_adapters.errors import UserError
from tl_adapters.generation.responses import respond
from tl_adapters.models.attach import attach, attached
from tl_adapters.models.build import build_model, default_backend
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.models.routed_mlp import ROUTES
from tl_adapters.study.open_run import open_run
from tl_adapters.study.train import train_run
from tl_adapters.training.objective import reference_step, shared_prefix_step
from tl_adapters.training.trainer import train
from tl_adapters.utils.devices import DeviceError

component = importlib.import_module("transformer_lens.model_bridge.generalized_components.base")
needs_offloading = pytest.mark.skipif(
    not hasattr(component, "align_module_device"), reason="this TransformerLens's bridge reads no offloaded weights"
)
LAYERS = {f"model.layers.{layer}": ("cpu", "disk")[layer % 2] for layer in range(4)}
MIXED = {"model.embed_tokens": "cpu", **LAYERS, "model.norm": "disk", "lm_head": "disk"}
ALL_ON_DISK = {"": "disk"}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return saved(tmp_path_factory.mktemp("models"))


def saved(
    folder: Path, architecture: str = "Qwen2ForCausalLM", dtype: torch.dtype = torch.float64
) -> tuple[Path, Path]:
    """Base and target in folders, the weights in several files."""
    for seed, name in ((1, "base"), (2, "target")):
        random_model(seed, dtype, architecture).save_pretrained(folder / name, max_shard_size="200KB")
    return folder / "base", folder / "target"


def hashes(folders: tuple[Path, ...]) -> dict[str, str]:
    files = [path for folder in folders for path in sorted(folder.rglob("*"))]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def both(folders: tuple[Path, Path], device_map: object = MIXED, **options: object) -> tuple[PairedModel, PairedModel]:
    """The pair on the CPU, and the same by a device map, with the same random adapters."""
    mapped = PairedModel.from_pretrained(*folders, backend="bridge", device_map=device_map, **options)
    return randomise(PairedModel.from_pretrained(*folders, backend="bridge", **options)), randomise(mapped)


def hooks_and_routes(pair: PairedModel) -> tuple[list[str], list[object]]:
    return [name for name, point in pair.model.hook_dict.items() if point.fwd_hooks], list(pair.routes)


def for_tied(device_map: dict[str, str], architecture: str) -> dict[str, str]:
    tied = ARCHITECTURES[architecture][2].get("tie_word_embeddings")
    return {**device_map, "lm_head": device_map["model.embed_tokens"]} if tied and len(device_map) > 1 else device_map


# -- the same values --------------------------------------------------------------------------------------------------


@needs_offloading
@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "device_map"), [(torch.float64, MIXED), (torch.float32, ALL_ON_DISK), (torch.bfloat16, ALL_ON_DISK)]
)
def test_every_route_computes_and_fires_exactly_the_same(
    tmp_path: Path, architecture: str, dtype: torch.dtype, device_map: dict[str, str]
) -> None:
    """In bfloat16 the files hold float32, so that weights are cast at each use."""
    folders = saved(tmp_path, architecture, torch.float32 if dtype == torch.bfloat16 else dtype)
    before = hashes(folders)
    plain, mapped = both(folders, for_tied(device_map, architecture), dtype=dtype)
    assert mapped.device == torch.device("cpu") and mapped.model.W_E.device == mapped.device
    for route in ROUTES:
        with plain.routed(route), mapped.routed(route):
            logits, cache = plain.model.run_with_cache(TOKENS)
            mapped_logits, mapped_cache = mapped.model.run_with_cache(TOKENS)
            assert torch.equal(mapped_logits, logits)
            assert mapped_cache.keys() == cache.keys()
            assert {"blocks.1.mlp.hook_pre", "blocks.1.mlp.hook_post", "blocks.1.mlp.hook_adapter_out"} <= cache.keys()
            assert all(torch.equal(mapped_cache[name].nan_to_num(), cache[name].nan_to_num()) for name in cache)
            parts = [p.unembed(p.run_blocks(p.embed(TOKENS), 0, 4)) for p in (plain, mapped)]
            assert torch.equal(*parts)
    assert hashes(folders) == before


@needs_offloading
@torch.no_grad()
def test_routes_compute_different_outputs(folders: tuple[Path, Path]) -> None:
    """Accelerate's hook of an MLP calls the forward method that it found there: the target's, whatever the route."""
    _, mapped = both(folders, ALL_ON_DISK)
    logits = {}
    for route in ROUTES:
        with mapped.routed(route):
            logits[route] = mapped.model(TOKENS)
    for one in ROUTES:
        for other in ROUTES:
            assert one == other or (logits[one] - logits[other]).abs().max() > 1e-2, (one, other)


@needs_offloading
def test_weights_of_layers_on_disk_are_only_in_the_files(folders: tuple[Path, Path]) -> None:
    plain, mapped = both(folders)
    for layer in range(4):
        on_disk = layer % 2 == 1
        weights = [*mapped.model.original_model.model.layers[layer].parameters()]
        of_adapter = {id(p) for p in mapped.mlps[layer].adapter.parameters()}
        assert all(p.is_meta == on_disk for p in weights if id(p) not in of_adapter)
        assert is_offloaded(mapped.mlps[layer].base) == on_disk
        for ours, expected in zip(mapped.mlps[layer].weights(), plain.mlps[layer].weights(), strict=True):
            assert torch.equal(ours.W_gate, expected.W_gate) and torch.equal(ours.W_out, expected.W_out)
        x = torch.randn(2, 3, 32, dtype=torch.float64)
        assert torch.equal(mapped.mlps[layer].difference(x), plain.mlps[layer].difference(x))
    assert not any(p.is_meta for p in mapped.installed_adapters().parameters())
    assert torch.equal(stored(mapped.model.unembed), plain.model.W_U.T)


@needs_offloading
def test_identity_does_not_depend_on_the_devices(tmp_path: Path, architecture: str) -> None:
    plain, mapped = both(saved(tmp_path, architecture), ALL_ON_DISK)
    assert mapped.fingerprints == plain.fingerprints
    assert mapped.samples.keys() == plain.samples.keys()
    assert all(torch.equal(mapped.samples[name], values) for name, values in plain.samples.items())
    mapped.load_adapters(plain.installed_adapters())
    attention = [dict(pair.backend.attention_biases(1)) for pair in (plain, mapped)]
    assert attention[0].keys() == attention[1].keys()
    assert all(torch.equal(attention[1][name], values) for name, values in attention[0].items())


@needs_offloading
@torch.no_grad()
def test_interventions_and_hooks_change_the_same(folders: tuple[Path, Path]) -> None:
    plain, mapped = both(folders)
    changes: dict[str, Callable[[PairedModel], object]] = {
        "ablated": lambda pair: pair.ablated([(1, 3), (2, 0)]),
        "scaled": lambda pair: pair.scaled([(1, 3)], 2.0),
        "clamped": lambda pair: pair.clamped([(3, 2)], 1.5),
        "added": lambda pair: pair.added([(3, 2)], 0.7),
        "inserted": lambda pair: pair.inserted([(1, 3)]),
        "negated": lambda pair: pair.negated([(1, 3)]),
    }
    unchanged = hooks_and_routes(mapped)
    seen = set()
    for name, change in changes.items():
        logits = []
        for pair in (plain, mapped):
            with pair.routed("replacement"), change(pair):  # type: ignore[attr-defined]
                logits.append(pair.model(TOKENS))
        assert torch.equal(*logits), name
        seen.add(float(logits[0].sum()))
    assert len(seen) == len(changes)
    assert hooks_and_routes(mapped) == unchanged == hooks_and_routes(plain)
    hooks = [("blocks.1.mlp.hook_post", lambda neurons, hook: neurons * 0.5)]
    results = [pair.model.run_with_hooks(TOKENS, fwd_hooks=hooks) for pair in (plain, mapped)]
    assert torch.equal(*results) and (results[0] - plain.model(TOKENS)).abs().max() > 1e-3


@needs_offloading
@torch.no_grad()
def test_a_released_model_is_as_before(folders: tuple[Path, Path]) -> None:
    plain, mapped = both(folders)
    released = mapped.release()
    assert torch.equal(released(TOKENS), plain.release()(TOKENS))
    mlp = released.blocks[1].mlp.original_component
    assert type(mlp).__name__ == "Qwen2MLP" and hasattr(mlp, "_hf_hook")


# -- training and generation ------------------------------------------------------------------------------------------


@needs_offloading
@pytest.mark.parametrize("step", [reference_step, shared_prefix_step])
@pytest.mark.parametrize("cut", [1, 3])
def test_gradients_are_exactly_the_same(folders: tuple[Path, Path], step: Callable[..., object], cut: int) -> None:
    gradients, weights = [], LossWeights(output_kl=0.7, forward_bridge=1.1, backward_bridge=0.9, nmse=1.3)
    for pair in both(folders, dtype=torch.float32):
        for adapter in pair.installed_adapters():
            adapter.requires_grad_(True)
        step(pair, random_batch(3), cut, weights, 0.01)
        gradients.append([p.grad for p in pair.installed_adapters().parameters()])
    assert all(torch.equal(ours, expected) for ours, expected in zip(*gradients, strict=True))


def organism_pair(device_map: object) -> PairedModel:
    return PairedModel.from_pretrained(organism.BASE, organism.TARGET, backend="bridge", device_map=device_map)


ORGANISM_MAP = {
    "model": "disk", "model.layers.0": "cpu", "model.layers.3": "cpu", "lm_head": "disk"
}  # fmt: skip


@needs_offloading
def test_training_checking_and_generating_give_the_same() -> None:
    results = []
    for device_map in (None, ORGANISM_MAP):
        pair = organism_pair(device_map)
        traces = encode_traces(organism.reasoning_pairs("train", 24), pair.model.tokenizer)
        stages = dict(stages=("local", "end_to_end"), steps=2, local=LocalConfig(steps=2))
        adapters = train(pair, traces, **stages, n_features=16, recompute=device_map is not None, progress=False)
        check = pair.check(traces[:2])
        with pair.routed("replacement"):
            answers = respond(pair.model, organism.problems("report", 2), max_new_tokens=12)
        weights = [p.detach().clone() for p in adapters.parameters()]
        results.append((weights, (check.logits_off, check.kl_hybrid, check.kl_replacement, check.l0), answers))
    (weights, check, answers), (mapped_weights, mapped_check, mapped_answers) = results
    assert all(torch.equal(ours, expected) for ours, expected in zip(mapped_weights, weights, strict=True))
    assert mapped_check == check
    assert mapped_answers == answers


# -- runs -------------------------------------------------------------------------------------------------------------


@needs_offloading
def test_the_code_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a GPU, where the CPU stands for the first one."""
    (block,) = blocks_of(ROOT / "docs" / "large_models.md", "python")
    local = {"Qwen/Qwen2.5-Math-7B": organism.BASE, "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": organism.TARGET}
    local |= {'0: "60GiB", ': "", '"": 0': '"": "cpu"', '"model.layers.0": 0': '"model.layers.0": "disk"'}
    write_small_place(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, place in local.items():
        assert name in block
        block = block.replace(name, str(place))
    namespace: dict[str, Any] = {}
    exec(compile(block, "large_models.md", "exec"), namespace)
    assert is_offloaded(namespace["pair"].mlps[0].base) and namespace["pair"].adapters


@needs_offloading
def test_a_run_is_opened_by_its_own_map_and_on_another_machine_by_device(tmp_path: Path) -> None:
    options = {"training": {"stages": ["end_to_end"], "steps": 2, "n_features": 8}, "backend": "bridge"}
    config = RunConfig.from_dict({**options, "device_map": ORGANISM_MAP})
    assert RunConfig.from_dict(config.to_dict()) == config
    run = tmp_path / "run"
    train_run(config, run, progress=False)
    mapped = open_run(run)
    assert is_offloaded(mapped.mlps[1].base)
    for one_device in (open_run(run, "cpu"), load(run, device="cpu")):
        assert not is_offloaded(one_device.mlps[1].base)
        assert one_device.fingerprints == mapped.fingerprints
    planned = load(run, device_map="auto", max_memory={"cpu": "1MB"})
    assert any(is_offloaded(mlp.base) for mlp in planned.mlps)
    of_adapters = load(run / "adapters", backend="bridge", device_map=ALL_ON_DISK)
    assert is_offloaded(of_adapters.mlps[0].base)
    with pytest.raises(DeviceMapError, match="give one of them"):
        load(run, device="cpu", device_map=ALL_ON_DISK)


def test_configurations_name_what_is_wrong() -> None:
    assert parse_option("device_map", "auto") == "auto"
    assert parse_option("device_map", '{"": 0, model.layers: disk}') == {"": 0, "model.layers": "disk"}
    with pytest.raises(ConfigError, match="max_memory limits a plan"):
        RunConfig(max_memory={"cpu": "1GB"})
    with pytest.raises(ConfigError, match="device_map"):
        RunConfig(device_map="everywhere")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="device_map"):
        RunConfig(device_map={"model": 1.5})  # type: ignore[dict-item]


# -- maps -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(folders: tuple[Path, Path]) -> object:
    return AutoConfig.from_pretrained(folders[1])


def test_every_part_has_a_device(config: object) -> None:
    resolved = resolve_device_map(config, {"": "cpu", "model.layers": "disk", "model.layers.2": "cpu:0"})  # type: ignore[arg-type]
    assert resolved == {
        "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "disk", "model.layers.1": "disk",
        "model.layers.2": "cpu", "model.layers.3": "disk", "model.norm": "cpu", "lm_head": "cpu",
    }  # fmt: skip


def test_a_plan_counts_the_bases_mlps(config: object) -> None:
    layer = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 2 * 3 * 32 * 48)  # bytes in float32, with two MLPs
    most = {"cpu": 4 * 32 * 61 + 4 * layer}
    resolved = resolve_device_map(config, "auto", torch.float32, most)  # type: ignore[arg-type]
    on_cpu = [name for name, device in resolved.items() if ".layers." in name and device == "cpu"]
    assert 1 <= len(on_cpu) <= 3 and resolved["lm_head"] == "disk"
    assert set(resolve_device_map(config, "auto").values()) <= {"cpu", 0}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({**MIXED, "model.layer.0": "cpu"}, r"names model\.layer\.0, which this model does not have"),
        ({**MIXED, "model.layers.9": "cpu"}, r"names model\.layers\.9, which this model does not have"),
        ({**MIXED, "model.layers.1.mlp": "cpu"}, r"inside a layer.*name model\.layers\.1\."),
        ({"model.embed_tokens": "cpu", "model.layers.0": "cpu"}, r"no device for model\.layers\.1, model\.layers\.2"),
        ({"": "meta"}, "'meta' is not known"),
        ({"": "gpu"}, "'gpu' is not known"),
        ({"": 93}, "does not have it"),
        ({"": "cuda:93"}, "does not have it"),
        ({"": True}, "has True for ''; allowed are"),
        ({"": "auto"}, "has 'auto' for ''; allowed are"),
        ({}, "allowed are 'auto', 'balanced'"),
        ("cuda", "allowed are 'auto', 'balanced'.*One device for all is device="),
    ],
)
def test_a_map_that_cannot_be_is_one_error(config: object, given: object, message: str) -> None:
    with pytest.raises((DeviceMapError, DeviceError), match=message):
        resolve_device_map(config, given)  # type: ignore[arg-type]


def test_other_wrong_combinations_are_one_error(
    config: object, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong: dict[str, dict[str, object]] = {
        "leave it out beside a map": {"device_map": MIXED, "max_memory": {"cpu": "1GB"}},
        "no device map from max_memory": {"device_map": "auto", "max_memory": {"cpu": "plenty"}},
    }
    for message, options in wrong.items():
        with pytest.raises(DeviceMapError, match=message):
            resolve_device_map(config, **options)  # type: ignore[arg-type]
    tied = AutoConfig.from_pretrained(folders[1], tie_word_embeddings=True)
    with pytest.raises(DeviceMapError, match="one matrix in this model"):
        resolve_device_map(tied, MIXED)
    assert resolve_device_map(tied, {"model": "disk"})["lm_head"] == "disk"
    monkeypatch.setattr(device_map_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceMapError, match="pip install accelerate"):
        resolve_device_map(tied, {"": "cpu"})


def test_a_pair_says_what_a_map_needs(folders: tuple[Path, Path]) -> None:
    def refused(message: str, *models: object, **options: object) -> None:
        with pytest.raises(DeviceMapError, match=message):
            PairedModel.from_pretrained(*(models or folders), **options)  # type: ignore[arg-type]

    refused("needs backend='bridge'", device_map=ALL_ON_DISK, backend="hooked")
    refused("give one of them", device_map=ALL_ON_DISK, device="cpu", backend="bridge")
    refused('give device_map="auto" with it', max_memory={"cpu": "1GB"})
    refused("with a target in memory", folders[0], random_model(2), device_map=ALL_ON_DISK, backend="bridge")
    if default_backend() == "hooked":
        refused("needs backend='bridge'", device_map=ALL_ON_DISK)
    if not hasattr(component, "align_module_device"):
        refused("needs TransformerLens 4", device_map=ALL_ON_DISK, backend="bridge")


@needs_offloading
@torch.no_grad()
def test_adapters_attach_to_a_bridge_that_somebody_has_distributed(folders: tuple[Path, Path]) -> None:
    plain, _ = both(folders)
    adapters = plain.installed_adapters()
    with plain.routed("replacement"):
        expected = plain.model(TOKENS)
    for device_map in (MIXED, ALL_ON_DISK):
        hf_model, _ = load_hf_model(folders[1], device=MappedDevices(device_map, None))
        bridge = build_model(hf_model, backend="bridge")
        before = bridge(TOKENS)
        bridge.__class__ = TransformerBridge
        if device_map is ALL_ON_DISK:
            with pytest.raises(DeviceMapError, match="its W_E is empty"):
                attach(bridge, adapters, base=folders[0])
            continue
        with attached(bridge, adapters, base=folders[0]):
            assert torch.equal(bridge(TOKENS), expected)
        assert torch.equal(bridge(TOKENS), before)


@needs_offloading
@torch.no_grad()
def test_a_base_in_memory_and_missing_files(tmp_path: Path) -> None:
    folders = saved(tmp_path)
    plain, _ = both(folders)
    mapped = PairedModel.from_pretrained(random_model(1), folders[1], backend="bridge", device_map=ALL_ON_DISK)
    with plain.routed("hybrid"), mapped.routed("hybrid"):
        assert torch.equal(mapped.model(TOKENS), plain.model(TOKENS))
    next(iter(sorted(folders[1].glob("model-*.safetensors")))).unlink()
    with pytest.raises(UserError, match=r"model-0+1-of|missing or damaged"):
        PairedModel.from_pretrained(*folders, backend="bridge", device_map=ALL_ON_DISK)
