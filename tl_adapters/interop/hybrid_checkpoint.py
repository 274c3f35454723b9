"""The hybrid model as a Hugging Face checkpoint: the target with the base's MLPs.

The additive transcoders that SAELens loads belong to this model, which is on no hub unless somebody uploads it. Shards
are copied one at a time with their MLP tensors exchanged, so that no whole model is ever in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tl_adapters.checkpoints.architectures import require_supported
from tl_adapters.checkpoints.base_mlps import require_plain_folder
from tl_adapters.checkpoints.compatibility import PairMismatchError, compare_configs, require_fit
from tl_adapters.checkpoints.model_checks import require_stock_code
from tl_adapters.checkpoints.model_files import (
    DESCRIPTION_FILES,
    SHARD_INDEX_FILE,
    locate,
    mlp_tensor_names,
    read_config,
    read_tensors,
    shard_files,
    shard_tensors,
    tensor_shapes,
)
from tl_adapters.checkpoints.model_reference import published_name
from tl_adapters.utils.files import copy_file, new_folder, plain_file, write_tensors, write_text
from tl_adapters.utils.reading import read_json_object
from tl_adapters.utils.strict_json import dumps


def write_hybrid(
    folder: str | Path,
    *,
    base: str | Path | None,
    target: str | Path,
    config: Mapping[str, Any] | None = None,
    beside_mlps: Mapping[str, torch.Tensor] | None = None,
    base_as: str | None = None,
) -> None:
    """Write ``target`` with the MLPs of ``base`` and the target's tokenizer, in shards as the target has them.

    Args:
        folder: must not exist.
        base: folder or hub name; None writes the target itself, for adapters that read the target's own stream.
        target: folder or hub name.
        config: entries of config.json to add or change.
        beside_mlps: further tensors by name; each is written to the shard that holds its layer's MLP.
        base_as: the module within each of the target's MLPs as which the base's MLP is written beside it, such as
            "base"; None writes it in the target's place.

    Raises:
        CheckpointError: missing or damaged files.
        PairMismatchError: a base of other shapes.
        UnsupportedModelError: a target with code of its own, or of an architecture that is not supported.
        FolderExistsError, DiskFullError: the folder cannot be made.
    """
    target_folder = locate(target)
    target_config = read_config(target_folder)
    require_stock_code(target_config, target)
    require_supported(target_config, str(target))
    target_config.pop("auto_map", None)  # names code that is neither run nor copied
    base_folder = locate(base) if base is not None else None
    mlp_names = mlp_tensor_names(target_config["num_hidden_layers"])
    if base_folder is not None:
        base_config = read_config(base_folder)
        require_fit(compare_configs(base_config, target_config))
        require_plain_folder(base_folder, base_config, tensor_shapes(base_folder), mlp_names)
    remaining = dict(beside_mlps or {})
    weight_map: dict[str, str] = {}
    total_size = 0
    with new_folder(folder) as out:
        for shard in shard_files(target_folder):
            tensors = dict(shard_tensors(target_folder, shard))
            if base_folder is not None:
                tensors |= _base_mlps(tensors, base_folder, set(mlp_names), base_as)
            layer_mlps = {name.rpartition(".gate_proj")[0] for name in tensors if ".mlp.gate_proj." in name}
            for name in [name for name in remaining if name.partition(".mlp.")[0] + ".mlp" in layer_mlps]:
                tensors[name] = remaining.pop(name).contiguous()
            weight_map |= dict.fromkeys(tensors, shard)
            total_size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            write_tensors(out / shard, tensors, {"format": "pt"})
        if len(set(weight_map.values())) > 1:
            index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
            write_text(out / SHARD_INDEX_FILE, dumps(index, indent=1) + "\n")
        _copy_description(target_folder, out)
        about = _about(target, base, bool(beside_mlps))
        written_config = {**_without_paths(target_config), "tl_adapters": about, **(config or {})}
        write_text(out / "config.json", dumps(written_config, indent=1) + "\n")


def _about(target: str | Path, base: str | Path | None, with_adapters: bool) -> dict[str, str]:
    """The entry "tl_adapters" of config.json: which model this is, and of which models it was made."""
    stream = "target" if base is None else "replacement" if with_adapters else "hybrid"
    return {"stream": stream, "target": published_name(str(target)), "mlps_of": published_name(str(base or target))}


def _base_mlps(
    tensors: Mapping[str, torch.Tensor], base_folder: Path, mlp_names: set[str], base_as: str | None
) -> dict[str, torch.Tensor]:
    """The base's tensors of the MLPs in one shard, in the dtype of the target, under the names that are written."""
    found = {}
    for name, base_tensor in read_tensors(base_folder, sorted(mlp_names & set(tensors))).items():
        if base_tensor.shape != tensors[name].shape:
            raise PairMismatchError(
                f"{name} has shape {tuple(base_tensor.shape)} in the base and {tuple(tensors[name].shape)} in the "
                "target."
            )
        written = name if base_as is None else name.replace(".mlp.", f".mlp.{base_as}.")
        found[written] = base_tensor.to(tensors[name].dtype)
    return found


def _copy_description(target_folder: Path, out: Path) -> None:
    """Copy the tokenizer and everything else that describes the model, without the two files that are written anew."""
    for pattern in DESCRIPTION_FILES:
        for file in target_folder.glob(pattern):
            if file.name not in ("config.json", SHARD_INDEX_FILE):
                copy_file(plain_file(target_folder, file.name), out / file.name)
    tokenizer_config = out / "tokenizer_config.json"
    if tokenizer_config.is_file():
        write_text(tokenizer_config, dumps(_without_paths(read_json_object(tokenizer_config)), indent=1) + "\n")


def _without_paths(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the names in place of the paths that transformers has recorded in it."""
    paths = {key: record[key] for key in _PATH_KEYS if isinstance(record.get(key), str)}
    return {**record, **{key: published_name(path) for key, path in paths.items()}}


_PATH_KEYS = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file")
"""Entries of config.json and tokenizer_config.json in which transformers keeps where they were loaded from."""
