"""Names in an index and links in a folder lead nowhere else: nothing outside is read, copied, published or written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.random_models import random_model
from helpers.users_models import reference

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.set_folder import SET_METADATA_FILE
from tl_adapters.checkpoints.base_mlps import read_base_mlps
from tl_adapters.checkpoints.hf_model import load_hf_model
from tl_adapters.checkpoints.model_files import SHARD_INDEX_FILE
from tl_adapters.errors import UserError
from tl_adapters.interop.hub import pull, push_to_hub
from tl_adapters.interop.hybrid_checkpoint import write_hybrid
from tl_adapters.interop.saelens import from_saelens

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of two shards, with a copy of the first outside its folder."""
    folder = tmp_path / "models" / "target"
    random_model(1, torch.float32, num_hidden_layers=2).save_pretrained(folder, max_shard_size="40kB")
    shutil.copy(folder / SHARD, tmp_path / "models" / "outside.safetensors")
    (folder / "inner").mkdir()
    shutil.copy(folder / SHARD, folder / "inner" / SHARD)
    shutil.copy(folder / SHARD, folder / "weights.bin")
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "{outside}", "inner/" + SHARD, "weights.bin", "..", "", "link.safetensors"]
)
def test_shards_are_files_of_the_folder(name: str, model: Path, tmp_path: Path) -> None:
    outside = model.parent / "outside.safetensors"
    (model / "link.safetensors").symlink_to(outside)
    path = model / SHARD_INDEX_FILE
    index = json.loads(path.read_text())
    named = name.format(outside=outside)
    index["weight_map"] = {tensor: named if shard == SHARD else shard for tensor, shard in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    before = contents(tmp_path)
    attempts: dict[str, Callable[[], object]] = {
        "as target": lambda: load_hf_model(model),
        "as base": lambda: read_base_mlps(model, 2),
        "as hybrid": lambda: write_hybrid(tmp_path / "hybrid", base=model, target=model),
    }
    for what, attempt in attempts.items():
        with pytest.raises(UserError, match=r"named without|link to|only files \*.safetensors"):
            attempt()
        assert contents(tmp_path) == before, what
    assert not (tmp_path / "hybrid").exists()


def test_no_description_that_is_a_link_is_copied(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text('{"key": "secret"}')
    (model / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="tokenizer_config.json is a link to"):
        write_hybrid(tmp_path / "hybrid", base=model, target=model)
    assert not (tmp_path / "hybrid").exists()


@pytest.mark.parametrize(
    "linked", [SET_METADATA_FILE, "layer_1/cfg.json", "layer_1/sae_weights.safetensors", "layer_1"]
)
@pytest.mark.parametrize("version", [2, 3])
def test_sets_do_not_link_out_of_their_folder(linked: str, version: int, tmp_path: Path) -> None:
    reference(dtype=torch.float32).installed_adapters().normalized().save_pretrained(tmp_path / "set")
    if version == 2:
        path = tmp_path / "set" / SET_METADATA_FILE
        record = json.loads(path.read_text())
        del record["files"], record["sha256"]
        path.write_text(json.dumps({**record, "schema_version": 2}))
    shutil.move(tmp_path / "set" / linked, tmp_path / "elsewhere")
    (tmp_path / "set" / linked).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link to .*elsewhere"):
        pull(str(tmp_path / "set"), tmp_path / "pulled")
    with pytest.raises(UserError, match="is a link to .*elsewhere"):
        push_to_hub(AdapterSet.from_pretrained(tmp_path / "set"), "user/repo")
    if linked != SET_METADATA_FILE:
        (tmp_path / "set" / SET_METADATA_FILE).unlink()
        with pytest.raises(UserError, match="is a link to .*elsewhere"):
            from_saelens(tmp_path / "set")
    assert not (tmp_path / "pulled").exists()
    with pytest.raises(UserError, match="named without"):
        from_saelens(tmp_path / "set", ["../elsewhere"])
