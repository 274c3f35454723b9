"""The folder of an adapter set: tl_adapters.json, samples of base and target, and a SAELens folder per layer.

    tl_adapters.json            metadata, shape, and the SHA-256 and size of every other file
    layer_marks.safetensors     samples of the weights of base and target, which identify them
    layer_N/                    cfg.json and sae_weights.safetensors of one adapter (`saelens_folder`)

Version 3 of the format is written; version 2, which has neither hashes of its files nor samples of all weights, is read
as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_adapters.adapters.file_hashes import file_hash
from tl_adapters.adapters.metadata import AdapterMetadata
from tl_adapters.adapters.saelens_folder import (
    INPUT_HOOKS,
    OUTPUT_HOOKS,
    SAELENS_FILES,
    AdapterFormatError,
    read_config,
    read_json,
    read_safetensors,
    read_weights,
    transcoder_config,
    write_transcoder,
)
from tl_adapters.adapters.transcoder import require_activation
from tl_adapters.checkpoints.layer_samples import LayerSamples
from tl_adapters.checkpoints.model_files import fetch
from tl_adapters.utils.files import new_folder, plain_file, write_tensors, write_text
from tl_adapters.utils.strict_json import dumps

SET_METADATA_FILE, SET_SAMPLES_FILE = "tl_adapters.json", "layer_marks.safetensors"
SET_SCHEMA_VERSION = 3
SET_READABLE_VERSIONS = (2, SET_SCHEMA_VERSION)
LAYER_FOLDER = "layer_{}"
_SAMPLE_PREFIX = "samples/"


@dataclass(frozen=True)
class SetDescription:
    """Everything that the files of a set hold besides the adapters' weights."""

    layers: list[int]
    """The layers that have an adapter."""
    n_layers: int
    """Number of layers of the model."""
    d_model: int
    """Width of the residual stream."""
    n_features: int
    """Features per layer."""
    metadata: AdapterMetadata
    """The models that the adapters belong to, and how they were trained."""
    fingerprint: str
    """Content hash of the adapters (`AdapterSet.fingerprint`)."""
    layer_samples: dict[int, LayerSamples] | None = None
    """Samples of target and base per layer; None where nothing is known of the models."""
    samples: dict[str, Tensor] | None = None
    """Samples of every weight of target and base; None in sets of format version 2."""
    files: dict[str, dict[str, Any]] | None = None
    """File name within the folder -> its "sha256" and "size"; None in sets of format version 2."""

    def require_layer(self, folder: Path, layer: int) -> None:
        """Raises AdapterFormatError where the files of a layer in ``folder`` are not those of this set."""
        layer_folder = LAYER_FOLDER.format(layer)
        for file in SAELENS_FILES:
            self.require_file(folder, f"{layer_folder}/{file}")
        written = read_config(folder / layer_folder).get("metadata") or {}
        ours = written.get("tl_adapters") or {}
        fingerprints = {**self.metadata.fingerprints, "adapters": self.fingerprint}
        for name, actual, expected in (
            ("layer", ours.get("layer"), layer),
            ("hook_name", written.get("hook_name"), INPUT_HOOKS[self.metadata.reads].format(layer)),
            ("hook_name_out", written.get("hook_name_out"), OUTPUT_HOOKS[self.metadata.writes].format(layer)),
            ("fingerprints", ours.get("fingerprints"), fingerprints),
        ):
            if actual != expected:
                raise AdapterFormatError(
                    f"{folder / layer_folder / 'cfg.json'} says {name} {actual!r}; its set has {expected!r}: files of "
                    "two sets were mixed, or edited. Copy the whole folder again."
                )

    def require_file(self, folder: Path, name: str) -> None:
        """Raises AdapterFormatError where a file is missing, or its bytes are not those that were written.

        Raises UnsafeFileError for a link that leads out of the folder.
        """
        path = plain_file(folder, *name.split("/"))
        if self.files is None:
            return
        expected = self.files.get(name)
        if expected is None or not path.is_file():
            difference = f"it does not exist, or {SET_METADATA_FILE} does not list it"
        elif (size := path.stat().st_size) != expected["size"]:
            difference = f"it has {size:,} bytes, expected {expected['size']:,}"
        elif file_hash(path) != expected["sha256"]:
            difference = f"its content differs from the one that {SET_METADATA_FILE} was written with"
        else:
            return
        raise AdapterFormatError(
            f"{path} is missing or damaged, or was edited, or files of two sets were mixed: {difference}. Copy the "
            "whole folder again."
        )


def set_files(layers: Sequence[int]) -> list[str]:
    """The files of a set with adapters of these layers."""
    folders = [LAYER_FOLDER.format(layer) for layer in layers]
    return [SET_METADATA_FILE, SET_SAMPLES_FILE, *(f"{folder}/{file}" for folder in folders for file in SAELENS_FILES)]


def write_set(folder: str | Path, description: SetDescription, weights: Mapping[int, dict[str, Tensor]]) -> None:
    """Write a set into a new folder; nothing half-written is left.

    Args:
        folder: must not exist.
        description: without `files`, which are hashed here.
        weights: layer -> state dict of its adapter.

    Raises FolderExistsError, DiskFullError.
    """
    metadata = asdict(description.metadata) | {
        "fingerprints": {**description.metadata.fingerprints, "adapters": description.fingerprint},
        "n_layers": description.n_layers,
    }
    record = {
        "schema_version": SET_SCHEMA_VERSION,
        "layers": description.layers,
        "d_model": description.d_model,
        "n_features": description.n_features,
        **metadata,
    }
    with new_folder(folder) as out:
        for layer, tensors in weights.items():
            write_transcoder(out / LAYER_FOLDER.format(layer), transcoder_config(layer, tensors, metadata), tensors)
        samples = {
            f"{layer}.{name}": tensor.contiguous()
            for layer, of_layer in (description.layer_samples or {}).items()
            for name, tensor in of_layer._asdict().items()
        }
        samples |= {f"{_SAMPLE_PREFIX}{name}": t.contiguous() for name, t in (description.samples or {}).items()}
        if samples:
            write_tensors(out / SET_SAMPLES_FILE, samples)
        files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
        record["files"] = {
            name: {"sha256": file_hash(out / name), "size": (out / name).stat().st_size} for name in files
        }
        text = dumps({**record, "sha256": record_hash(record)}, indent=1)
        write_text(out / SET_METADATA_FILE, text + "\n")


def read_description(name: str | Path, *, revision: str | None = None, token: str | None = None) -> SetDescription:
    """The description of a set in a folder or on the hub, from which no adapter weights are downloaded.

    Raises AdapterFormatError, CheckpointError.
    """
    folder = fetch(name, [SET_METADATA_FILE, SET_SAMPLES_FILE], revision=revision, token=token)
    if not plain_file(folder, SET_METADATA_FILE).is_file():
        raise AdapterFormatError(
            f"{name} holds no {SET_METADATA_FILE}: it is not a set of adapters. Read SAELens folders of others with "
            "from_saelens, and checkpoints of the paper's authors with from_authors."
        )
    record = read_json(folder / SET_METADATA_FILE)
    if (version := record.get("schema_version")) not in SET_READABLE_VERSIONS:
        raise AdapterFormatError(
            f"{name} has schema_version {version}; this version reads {' and '.join(map(str, SET_READABLE_VERSIONS))}. "
            "Read it with the version of tl_adapters that wrote it, or update."
        )
    files = _take_file_hashes(folder, record) if version == SET_SCHEMA_VERSION else None
    record.pop("schema_version")
    try:
        n_layers, d_model, n_features = (int(record.pop(key)) for key in ("n_layers", "d_model", "n_features"))
        layers = [int(layer) for layer in record.pop("layers")]
        fingerprint = str(record["fingerprints"].pop("adapters"))
        metadata = AdapterMetadata(**record)
        require_activation(metadata.activation, metadata.k, n_features)
    except AdapterFormatError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AdapterFormatError(
            f"{folder / SET_METADATA_FILE} is not a description of adapters: {error!r}."
        ) from error
    description = SetDescription(layers, n_layers, d_model, n_features, metadata, fingerprint, files=files)
    if SET_SAMPLES_FILE in (files or {}):
        description.require_file(folder, SET_SAMPLES_FILE)
    layer_samples, samples = _read_samples(folder)
    return replace(description, layer_samples=layer_samples, samples=samples)


def read_layer(
    folder: Path, description: SetDescription, layer: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """The weights of one adapter of a set, compared with what its description says. Raises AdapterFormatError."""
    description.require_layer(folder, layer)
    tensors = read_weights(folder / LAYER_FOLDER.format(layer), description.metadata.activation, device)
    actual = (tensors["W_enc"].shape[0], tensors["W_enc"].shape[1], tensors["W_dec"].shape[1])
    if actual != (description.d_model, description.n_features, description.d_model):
        raise AdapterFormatError(
            f"Layer {layer} of {folder} maps {actual[0]} to {actual[1]} features to {actual[2]}; expected "
            f"{description.d_model}, {description.n_features} and {description.d_model}."
        )
    return tensors


def record_hash(record: Mapping[str, Any]) -> str:
    """Hash of what tl_adapters.json says, without the hash itself; independent of the order of keys and of spaces."""
    as_read = json.loads(dumps(record))
    return hashlib.sha256(dumps(as_read, sort_keys=True).encode()).hexdigest()


def _take_file_hashes(folder: Path, record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Remove the hashes from a set's record and return those of its files. Raises AdapterFormatError if it changed."""
    expected = record.pop("sha256", None)
    if expected != (actual := record_hash(record)):
        raise AdapterFormatError(
            f"{folder / SET_METADATA_FILE} was edited or is damaged: the hash of its content is {actual}, expected "
            f"{expected}. Copy the whole folder again. To change the metadata of adapters, replace AdapterSet.metadata "
            "and save the set."
        )
    return dict(record.pop("files"))


def _read_samples(folder: Path) -> tuple[dict[int, LayerSamples] | None, dict[str, Tensor] | None]:
    """The samples per layer, and those of all weights; None for what the folder does not hold."""
    if not plain_file(folder, SET_SAMPLES_FILE).is_file():
        return None, None
    tensors = read_safetensors(folder / SET_SAMPLES_FILE)
    samples = {n.removeprefix(_SAMPLE_PREFIX): tensors.pop(n) for n in list(tensors) if n.startswith(_SAMPLE_PREFIX)}
    try:
        layers = sorted({int(name.partition(".")[0]) for name in tensors})
        layer_samples = {
            layer: LayerSamples(*(tensors[f"{layer}.{name}"] for name in LayerSamples._fields)) for layer in layers
        }
    except (KeyError, ValueError) as error:
        raise AdapterFormatError(f"{folder / SET_SAMPLES_FILE} is incomplete ({error!r}); copy it again.") from error
    return layer_samples or None, samples or None
