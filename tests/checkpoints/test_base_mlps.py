"""Weights are read by the rules of transformers: which file, which numbers, and nothing that would be left out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.random_models import random_batch, random_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tl_adapters.checkpoints.architectures import UnsupportedModelError
from tl_adapters.checkpoints.model_files import CheckpointError, read_tensors
from tl_adapters.config import RunConfig
from tl_adapters.errors import UserError
from tl_adapters.interop.hybrid_checkpoint import write_hybrid
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.study.doctor import diagnose

TOKENS = random_batch(3).tokens[:1, :11]
MLP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for seed, role in ((1, "base"), (2, "target")):
        random_model(seed, torch.float32).save_pretrained(tmp_path / role)
    return tmp_path / "base", tmp_path / "target"


def change_config(folder: Path, **entries: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def test_a_single_file_takes_precedence_over_an_index(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """An older copy in shards lies beside it; transformers does not look at it."""
    base, target = folders
    random_model(3, torch.float32).save_pretrained(tmp_path / "old", max_shard_size="20kB")
    assert (tmp_path / "old/model.safetensors.index.json").is_file()
    for folder in folders:
        for file in (tmp_path / "old").glob("*.safetensors*"):
            shutil.copy(file, folder / file.name)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder) for folder in (target, base))
    for a, b in zip(ours.model.layers, theirs.model.layers, strict=True):
        a.mlp = b.mlp
    wanted = ours(TOKENS).logits
    pair = PairedModel.from_pretrained(base, target)
    with pair.routed("hybrid"):
        torch.testing.assert_close(pair.model(TOKENS), wanted, rtol=1e-4, atol=1e-4)
    write_hybrid(tmp_path / "hybrid", base=base, target=target)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid")(TOKENS).logits, wanted)
    name = f"{MLP}.weight"
    assert torch.equal(read_tensors(base, [name])[name], random_model(1, torch.float32).get_parameter(name))


def in_fp8(folder: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state[f"{MLP}.weight"] = (state[f"{MLP}.weight"] * 100).to(torch.float8_e4m3fn)

    change_tensors(folder, change)


def in_int8(folder: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state[f"{MLP}.weight"] = (state[f"{MLP}.weight"] * 20).to(torch.int8)

    change_tensors(folder, change)


def with_tensor(suffix: str) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder, lambda state: state.update({f"{MLP}.{suffix}": torch.ones(1)}))


def quantized_by_config(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "awq", "bits": 4})


def own_code(folder: Path) -> None:
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    (folder / "modeling_mine.py").write_text("raise SystemExit('this code ran')\n")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "numbers in fp8": (in_fp8, "F8_E4M3.*quantized numbers"),
    "numbers in int8": (in_int8, "I8.*quantized numbers"),
    "scales beside weights": (with_tensor("weight_scale_inv"), "up_proj.weight_scale_inv"),
    "input scales": (with_tensor("input_scale"), "up_proj.input_scale"),
    "a bias": (with_tensor("bias"), "up_proj.bias"),
    "quantization_config": (quantized_by_config, "quantization_config"),
    "code of its own": (own_code, r"auto_map.*modeling_mine\.Mine.*never run.*trust_remote_code=False"),
}


@pytest.mark.parametrize("role", ["base", "target"])
@pytest.mark.parametrize("what", DAMAGES)
def test_weights_that_would_be_read_wrongly_are_refused_in_both_roles(
    what: str, role: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    damage, message = DAMAGES[what]
    damage(tmp_path / role)
    for backend in ("hooked", "bridge"):
        with pytest.raises(UserError, match=message) as error:
            PairedModel.from_pretrained(*folders, backend=backend)
        assert "\n" not in str(error.value)
    config = RunConfig(base=str(folders[0]), target=str(folders[1]))
    errors = [str(f) for f in diagnose(config, out=tmp_path) if f.level == "error" and "chat template" not in f.subject]
    assert len(errors) == 1 and ("weights" in errors[0] or "architecture" in errors[0])
    if role == "base":
        with pytest.raises(UserError, match=message):
            write_hybrid(tmp_path / "hybrid", base=folders[0], target=folders[1])
        assert not (tmp_path / "hybrid").exists()


def test_an_instance_of_the_stock_class_may_replace_custom_code(folders: tuple[Path, Path]) -> None:
    own_code(folders[1])
    target = AutoModelForCausalLM.from_pretrained(folders[1], trust_remote_code=False)
    with torch.no_grad():
        logits = target(TOKENS).logits
        pair = PairedModel.from_pretrained(folders[0], target)
        torch.testing.assert_close(pair.model(TOKENS), logits, rtol=1e-4, atol=1e-4)
    change_config(folders[0], auto_map={"AutoTokenizer": ["mine.Tokenizer", None]})  # no code of the model's
    PairedModel.from_pretrained(folders[0], target)


def test_embeddings_of_another_size_than_in_the_configuration_raise(folders: tuple[Path, Path]) -> None:
    change_config(folders[1], vocab_size=64)
    with pytest.raises(
        CheckpointError, match=r"(embed_tokens|lm_head).weight .* \(61, 32\).*\(64, 32\).*config.json"
    ) as error:
        PairedModel.from_pretrained(*folders)
    assert "\n" not in str(error.value)


def test_missing_weights(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Not downloaded, of another format, or in another folder: each is told what to do."""
    snapshot = tmp_path / "snapshots" / ("0" * 40)
    shutil.copytree(folders[0], snapshot)
    (snapshot / "model.safetensors").unlink()
    for pair in ((snapshot, folders[1]), (folders[0], snapshot)):
        with pytest.raises(CheckpointError, match="were not downloaded.*HF_HUB_OFFLINE"):
            PairedModel.from_pretrained(*pair)
    (folders[0] / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="neither.*only safetensors are read: give the folder"):
        PairedModel.from_pretrained(*folders)
    (folders[0] / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="another format.*convert it with save_pretrained"):
        PairedModel.from_pretrained(*folders)


def test_a_base_in_memory_that_was_quantized_is_refused(folders: tuple[Path, Path]) -> None:
    base = random_model(1, torch.float32)
    base.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(UnsupportedModelError, match="The base has quantized weights"):
        PairedModel.from_pretrained(base, folders[1])
