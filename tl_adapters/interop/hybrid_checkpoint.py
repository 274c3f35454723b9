"""The hybrid as a checkpoint of its own: the target with the base's MLPs, as a plain Hugging Face folder.

The additive transcoders that SAELens loads belong to this model; it is on no hub until somebody writes it. Shards are
copied one at a time with the MLP tensors exchanged, so no model is ever whole in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tl_adapters.checkpoints.base_mlps import require_plain_folder
from tl_adapters.checkpoints.compatibility import PairMismatchError, compare_configs, require_fit
from tl_adapters.checkpoints.model_files import (
    DESCRIPTION_FILES,
    INDEX_FILE,
    locate,
    mlp_tensor_names,
    read_config,
    read_tensors,
    shard_files,
    shard_tensors,
    tensor_shapes,
)
from tl_adapters.utils.files import new_folder
from tl_adapters.utils.strict_json import dumps


def write_hybrid(
    folder: str | Path,
    target: str | Path,
    base: str | Path | None,
    *,
    config: Mapping[str, Any] | None = None,
    beside_mlps: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write ``target`` with the MLPs of ``base``, its tokenizer beside it; the names' shards decide the new ones.

    Args:
        folder: must not exist.
        target: folder or hub name.
        base: folder or hub name; None writes the target itself, to read its own stream.
        config: entries of config.json to add or change.
        beside_mlps: further tensors, by name; each goes into the shard of its layer's MLP.

    Raises:
        CheckpointError: missing or damaged files.
        PairMismatchError: a base of other shapes.
        FolderExistsError, DiskFullError.
    """
    source = locate(target)
    described = read_config(source)
    mlps = locate(base) if base is not None else None
    if mlps is not None:
        require_fit(compare_configs(read_config(mlps), described))
        require_plain_folder(
            mlps, read_config(mlps), tensor_shapes(mlps), mlp_tensor_names(described["num_hidden_layers"])
        )
    swapped = set(mlp_tensor_names(described["num_hidden_layers"])) if mlps is not None else set()
    extra = dict(beside_mlps or {})
    weight_map: dict[str, str] = {}
    total = 0
    with new_folder(folder) as out:
        for shard in shard_files(source):
            tensors = dict(shard_tensors(source, shard))
            if mlps is not None:
                for name, ours in read_tensors(mlps, sorted(swapped & set(tensors))).items():
                    if ours.shape != tensors[name].shape:
                        raise PairMismatchError(
                            f"{name} has shape {tuple(ours.shape)} in the base and {tuple(tensors[name].shape)} in the "
                            "target."
                        )
                    tensors[name] = ours.to(tensors[name].dtype)
            here = {name.rpartition(".gate_proj")[0] for name in tensors if ".mlp.gate_proj." in name}
            for name in [name for name in extra if name.partition(".mlp.")[0] + ".mlp" in here]:
                tensors[name] = extra.pop(name).contiguous()
            weight_map |= dict.fromkeys(tensors, shard)
            total += sum(t.numel() * t.element_size() for t in tensors.values())
            save_file(tensors, out / shard, metadata={"format": "pt"})
        if len(set(weight_map.values())) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (out / INDEX_FILE).write_text(dumps(index, indent=1) + "\n")
        for pattern in DESCRIPTION_FILES:
            for file in source.glob(pattern):
                if file.name not in ("config.json", INDEX_FILE):
                    shutil.copy(file, out / file.name)
        stream = "target" if base is None else "replacement" if beside_mlps else "hybrid"
        about = {"stream": stream, "target": str(target), "mlps_of": str(base or target)}
        written = {**described, "tl_adapters": about, **(config or {})}
        (out / "config.json").write_text(dumps(written, indent=1) + "\n")
