"""Model folders as users have them: sharded, named on a hub, truncated, foreign, of another architecture."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.random_models import ARCHITECTURES, random_batch, random_model
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

import tl_adapters.checkpoints.model_files as checkpoints
from tl_adapters.checkpoints.architectures import UnsupportedModelError
from tl_adapters.checkpoints.compatibility import PairMismatchError, compare_configs, require_same_ids
from tl_adapters.checkpoints.hf_model import load_hf_model
from tl_adapters.checkpoints.model_files import CheckpointError, read_vocabulary, tensor_shapes
from tl_adapters.errors import LONGEST_MESSAGE, UserError
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.organism import BASE, TARGET

TOKENS = random_batch(3).tokens[:1]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A base in several shards and a target in one file."""
    random_model(1).save_pretrained(tmp_path / "base", max_shard_size="20kB")
    random_model(2).save_pretrained(tmp_path / "target")
    return tmp_path / "base", tmp_path / "target"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_pair_from_folders_equals_the_pair_in_memory(architecture: str, tmp_path: Path) -> None:
    base, target = (random_model(seed, architecture=architecture) for seed in (1, 2))
    # A path that holds an architecture's name decides nothing: stock TransformerLens reads models off their names.
    base.save_pretrained(tmp_path / "llama-gemma-base", max_shard_size="20kB")
    target.save_pretrained(tmp_path / "gemma-llama")
    pair = PairedModel.from_pretrained(tmp_path / "llama-gemma-base", tmp_path / "gemma-llama")
    in_memory = PairedModel.from_pretrained(base, target)
    assert pair.model.cfg.dtype == torch.float64 and pair.fingerprints == in_memory.fingerprints
    for route in ("target", "hybrid"):
        with pair.routed(route), in_memory.routed(route):
            torch.testing.assert_close(pair.model(TOKENS), in_memory.model(TOKENS), rtol=1e-12, atol=1e-12)


def test_hub_names_are_downloaded_without_pickles(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fake(name: str, revision: str | None, allow_patterns: list[str], token: str | None) -> str:
        asked.append((name, tuple(allow_patterns)))
        if name not in ("org/base", "org/target"):
            raise LocalEntryNotFoundError("not in the cache")
        return str(tmp_path / name.split("/")[1])

    monkeypatch.setattr(checkpoints, "snapshot_download", fake)
    pair = PairedModel.from_pretrained("org/base", "org/target")
    assert (pair.base_id, pair.target_id) == ("org/base", "org/target")
    assert pair.model.cfg.model_name == "org/target"
    patterns = {p for _, allowed in asked for p in allowed}
    assert "*.safetensors" in patterns and not any("bin" in p or "py" in p or p == "*" for p in patterns)
    with pytest.raises(CheckpointError, match="org/bsae is not a folder.*HF_HUB_OFFLINE.*spelling"):
        PairedModel.from_pretrained("org/bsae", "org/target")


def truncate(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def drop_a_shard(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    (folder / index["model.layers.2.mlp.up_proj.weight"]).unlink()


def write_noise(folder: Path) -> None:
    next(folder.glob("*.safetensors")).write_bytes(b"these are no weights at all")


def break_the_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def only_pickles(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def without_mlps(folder: Path) -> None:
    tensors = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items() if ".mlp." not in k}
    for file in folder.glob("model*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "missing or damaged"),
        (drop_a_shard, "missing or damaged"),
        (write_noise, "missing or damaged"),
        (break_the_index, "weight_map is 3; allowed is a mapping"),
        (no_config, "There is no file .*config.json. Copy or download"),
        (only_pickles, "only safetensors are read"),
        (without_mlps, "no tensor model.layers.0.mlp.gate_proj.weight"),
    ],
)
def test_a_damaged_base_raises(folders: tuple[Path, Path], damage: Callable[[Path], None], message: str) -> None:
    damage(folders[0])
    with pytest.raises(CheckpointError, match=message) as error:
        PairedModel.from_pretrained(*folders)
    assert str(folders[0]) in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_target_raises(folders: tuple[Path, Path]) -> None:
    base, target = folders
    whole = load_file(target / "model.safetensors")
    truncate(target)
    with pytest.raises(CheckpointError, match="missing or damaged"):
        PairedModel.from_pretrained(base, target)
    # transformers would fill a missing tensor at random and go on
    whole.pop("model.layers.3.self_attn.q_proj.weight")
    save_file(whole, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 tensors.*layers.3.self_attn.q_proj"):
        PairedModel.from_pretrained(base, target)


def test_the_error_for_an_unknown_architecture_lists_the_supported_ones(folders: tuple[Path, Path]) -> None:
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        config |= {"architectures": ["FancyForCausalLM"], "model_type": "fancy"}
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="FancyForCausalLM.*Qwen2ForCausalLM"):
        PairedModel.from_pretrained(*folders)


def test_differences_outside_the_mlps_are_warnings(caplog: pytest.LogCaptureFixture) -> None:
    """The paper's own pair: other special tokens, another context length, another rope, another vocabulary size."""
    rope = {"rope_type": "default", "rope_theta": 500.0}
    base = random_model(1, vocab_size=70, max_position_embeddings=32, rope_parameters=rope)
    with caplog.at_level(logging.WARNING, logger="tl_adapters"):
        PairedModel.from_pretrained(base, random_model(2))
    for what in ("vocabulary size", "context length", "rope"):
        assert any(what in message and "Only the base's MLPs" in message for message in caplog.messages), what


def test_configs_of_older_transformers_mean_the_same_rope() -> None:
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    old = {"rope_theta": 5e5, "rope_scaling": None}
    assert not [f for f in compare_configs(old, new) if f.subject == "rope"]
    assert [f.level for f in compare_configs({"rope_theta": 1e6}, new) if f.subject == "rope"] == ["warning"]


def test_the_real_base_must_share_ids_to_read_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vocabulary = read_vocabulary(TARGET)
    require_same_ids(read_vocabulary(BASE), vocabulary)
    other = {**vocabulary, "<think>": 10**6}
    with pytest.raises(PairMismatchError, match="1 tokens.*'<think>'.*its own tokenizer"):
        require_same_ids(vocabulary, other)
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    record = json.loads((base / "tokenizer.json").read_text())
    record["added_tokens"][-1]["id"] += 1
    (base / "tokenizer.json").write_text(json.dumps(record))
    with caplog.at_level(logging.WARNING, logger="tl_adapters"):
        PairedModel.from_pretrained(base, TARGET)  # a pair all the same
    assert any("token ids: 1 of the target's" in message for message in caplog.messages)


def test_shapes_come_from_headers(folders: tuple[Path, Path]) -> None:
    expected = {name: tuple(p.shape) for name, p in random_model(1).named_parameters()}
    assert tensor_shapes(folders[0]) == expected


def test_a_file_in_place_of_a_folder_raises(folders: tuple[Path, Path]) -> None:
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        PairedModel.from_pretrained(folders[0] / "config.json", folders[1])


@pytest.mark.parametrize("wrong", [{"num_attention_heads": 10**6}, {"pad_token_id": 10**6}])
def test_a_configuration_that_describes_no_model_is_one_error(tmp_path: Path, wrong: dict[str, int]) -> None:
    random_model(1).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **wrong}))
    with pytest.raises(CheckpointError, match=r"config\.json of .*Get its config\.json again"):
        load_hf_model(tmp_path / "model")


def test_an_error_that_quotes_a_huge_value_stays_short() -> None:
    long = str(UserError("The name is " + 10_000 * "x" + ". Give another one."))
    assert len(long) <= LONGEST_MESSAGE and long.startswith("The name is x") and long.endswith("Give another one.")
    assert str(UserError("short")) == "short"
