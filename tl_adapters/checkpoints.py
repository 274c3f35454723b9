"""Model checkpoints as files: where they are, and single tensors out of their safetensors shards.

The base model of a pair contributes only its MLP tensors; they are read from its shards one by one, so its
attention and embeddings are never in memory. A checkpoint without safetensors is refused: pickle is never read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from tl_adapters.errors import UserError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class CheckpointError(UserError, ValueError):
    """A model folder that cannot be used; the message names the file and what is wrong with it."""


def locate(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: ``name`` itself if it is a folder, else the hub's files in the local cache.

    Downloads safetensors and JSON only. Raises what huggingface_hub raises for an unknown name.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise CheckpointError(f"{name} is a file; give the folder that holds config.json and the safetensors.")
    return Path(snapshot_download(str(name), revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))


def read_config(folder: Path) -> dict[str, object]:
    """The folder's config.json. Raises CheckpointError."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder} has no readable config.json ({error}).") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} is not a mapping.")
    return config


def read_tensors(folder: Path, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """The named tensors of a checkpoint, sharded or not. Raises CheckpointError naming the first one missing."""
    shards = _shards(folder)
    wanted: dict[str, list[str]] = {}
    for name in names:
        if shards and name not in shards:
            raise CheckpointError(
                f"{folder} has no tensor {name}; it is not a complete checkpoint of this architecture."
            )
        wanted.setdefault(shards.get(name, SINGLE_FILE), []).append(name)
    tensors = {}
    for shard, members in wanted.items():
        try:
            with safe_open(folder / shard, framework="pt", device=str(device)) as file:
                stored = set(file.keys())
                for name in members:
                    if name not in stored:
                        raise CheckpointError(f"{folder / shard} has no tensor {name}.")
                    tensors[name] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder / shard} is missing or damaged ({error}).") from error
    return tensors


def _shards(folder: Path) -> dict[str, str]:
    """Tensor name to file name; empty for a checkpoint in one file."""
    index = folder / INDEX_FILE
    if index.is_file():
        return json.loads(index.read_text())["weight_map"]
    if (folder / SINGLE_FILE).is_file():
        return {}
    raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors are read.")
