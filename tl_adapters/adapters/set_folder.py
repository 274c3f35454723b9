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
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from tl_adapters.adapters.file_hashes import file_hash
from tl_adapters.adapters.metadata import AdapterMetadata
from tl_adapters.adapters.saelens_folder import (
    COPY_AGAIN,
    INPUT_HOOKS,
    OUTPUT_HOOKS,
    SAELENS_FILES,
    AdapterFormatError,
    read_config,
    read_weights,
    transcoder_config,
    write_transcoder,
)
from tl_adapters.adapters.transcoder import require_activation
from tl_adapters.checkpoints.layer_samples import LayerSamples
from tl_adapters.checkpoints.model_files import fetch
from tl_adapters.checkpoints.tensor_fields import floats, require_tensors
from tl_adapters.config import ConfigError
from tl_adapters.utils.files import new_folder, plain_file, write_tensors, write_text
from tl_adapters.utils.reading import (
    Record,
    UnreadableFileError,
    as_dataclass,
    as_record,
    read_json_object,
    read_tensors,
    shown,
    unreadable_as,
)
from tl_adapters.utils.strict_json import dumps

SET_METADATA_FILE, SET_SAMPLES_FILE = "tl_adapters.json", "layer_marks.safetensors"
SET_SCHEMA_VERSION = 3
SET_READABLE_VERSIONS = (2, SET_SCHEMA_VERSION)
LAYER_FOLDER = "layer_{}"
_SAMPLE_PREFIX = "samples/"


class FileIdentity(Record):
    """What tl_adapters.json records of another file."""

    sha256: str
    """SHA-256 of its bytes."""
    size: int
    """Number of its bytes."""


class _Shape(Record):
    """The keys of tl_adapters.json that are not fields of `AdapterMetadata`."""

    layers: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    n_layers: int = Field(ge=1, le=10_000)
    d_model: int = Field(ge=1)
    n_features: int = Field(ge=1)
    files: dict[str, FileIdentity] | None = None


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
    files: Mapping[str, FileIdentity] | None = None
    """File name within the folder -> its hash and size; None in sets of format version 2."""

    def require_layer(self, folder: Path, layer: int) -> None:
        """Raises AdapterFormatError where the files of a layer in ``folder`` are not those of this set."""
        layer_folder = LAYER_FOLDER.format(layer)
        for file in SAELENS_FILES:
            self.require_file(folder, f"{layer_folder}/{file}")
        written = read_config(folder / layer_folder).about
        ours = written.tl_adapters or {}
        fingerprints = {**self.metadata.fingerprints, "adapters": self.fingerprint}
        for name, actual, expected in (
            ("layer", ours.get("layer"), layer),
            ("hook_name", written.hook_name, INPUT_HOOKS[self.metadata.reads].format(layer)),
            ("hook_name_out", written.hook_name_out, OUTPUT_HOOKS[self.metadata.writes].format(layer)),
            ("fingerprints", ours.get("fingerprints"), fingerprints),
        ):
            if actual != expected:
                raise AdapterFormatError(
                    f"{folder / layer_folder / 'cfg.json'} says {name} {shown(actual)}; its set has {shown(expected)}: "
                    f"files of two sets were mixed, or edited. {COPY_AGAIN}"
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
        elif (size := path.stat().st_size) != expected.size:
            difference = f"it has {size:,} bytes, expected {expected.size:,}"
        elif file_hash(path) != expected.sha256:
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
    path = folder / SET_METADATA_FILE
    with unreadable_as(AdapterFormatError):
        record = read_json_object(path, COPY_AGAIN)
        if (version := record.pop("schema_version", None)) not in SET_READABLE_VERSIONS:
            raise AdapterFormatError(
                f"{path} has schema_version {shown(version)}; this version reads "
                f"{' and '.join(map(str, SET_READABLE_VERSIONS))}. Read it with the version of tl_adapters that wrote "
                "it, or update."
            )
        if version == SET_SCHEMA_VERSION:
            _require_unchanged(path, {"schema_version": version, **record})
        description = _description_of({name: value for name, value in record.items() if name != "sha256"}, path)
        if description.files is not None and SET_SAMPLES_FILE in description.files:
            description.require_file(folder, SET_SAMPLES_FILE)
        layer_samples, samples = _read_samples(folder, description)
    return replace(description, layer_samples=layer_samples, samples=samples)


def _description_of(record: Mapping[str, Any], path: Path) -> SetDescription:
    """The description, without samples, in tl_adapters.json. Raises UnreadableFileError and AdapterFormatError."""
    of_shape = {name: value for name, value in record.items() if name in _Shape.model_fields}
    shape = as_record(_Shape, of_shape, str(path), COPY_AGAIN)
    others = {name: value for name, value in record.items() if name not in _Shape.model_fields}
    about = as_dataclass(AdapterMetadata, others, str(path), COPY_AGAIN)
    if (fingerprint := about.fingerprints.pop("adapters", None)) is None:
        raise AdapterFormatError(f"{path} has no fingerprint of its adapters (fingerprints.adapters). {COPY_AGAIN}")
    if sorted(set(shape.layers)) != shape.layers or shape.layers[-1] >= shape.n_layers:
        raise AdapterFormatError(
            f"{path}: layers is {shown(shape.layers)}; allowed are ascending numbers from 0 to {shape.n_layers - 1}, "
            f"since the model has n_layers = {shape.n_layers}. {COPY_AGAIN}"
        )
    try:
        require_activation(about.activation, about.k, shape.n_features)
    except ConfigError as error:
        raise AdapterFormatError(f"{path}: {error}") from error
    return SetDescription(
        shape.layers, shape.n_layers, shape.d_model, shape.n_features, about, fingerprint, files=shape.files
    )


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


def _require_unchanged(path: Path, record: dict[str, Any]) -> None:
    """Raises AdapterFormatError where a set's record does not have the hash that it holds, or no list of its files."""
    expected = record.pop("sha256", None)
    if expected != (actual := record_hash(record)):
        raise AdapterFormatError(
            f"{path} was edited or is damaged: the hash of its content is {actual}, expected {shown(expected)}. "
            f"{COPY_AGAIN} To change the metadata of adapters, replace AdapterSet.metadata and save the set."
        )
    if not isinstance(record.get("files"), dict):
        raise AdapterFormatError(f"{path} does not list the files of the set (files). {COPY_AGAIN}")


def _read_samples(
    folder: Path, description: SetDescription
) -> tuple[dict[int, LayerSamples] | None, dict[str, Tensor] | None]:
    """The samples per layer, and those of all weights; None for what the folder does not hold.

    Raises UnreadableFileError for samples of other layers than the model's or of another width, and where a layer with
    an adapter has none.
    """
    path = plain_file(folder, SET_SAMPLES_FILE)
    if not path.is_file():
        return None, None
    tensors = read_tensors(path, advice=COPY_AGAIN)
    samples = {name: tensor for name, tensor in tensors.items() if name.startswith(_SAMPLE_PREFIX)}
    sampled_layers = [layer for layer in range(description.n_layers) if f"{layer}.ln2_w" in tensors]
    of_layer = {"ln2_w": floats("d_model"), "attention_out": floats("attention"), "base_mlp_out": floats("base_mlp")}
    fields = {f"{layer}.{name}": field for layer in sampled_layers for name, field in of_layer.items()}
    fields |= {name: floats(name) for name in samples}
    require_tensors(tensors, fields, path, {"d_model": description.d_model}, COPY_AGAIN)
    if sampled_layers and (absent := sorted(set(description.layers) - set(sampled_layers))):
        raise UnreadableFileError(f"{path} holds no samples of layers {shown(absent)}. {COPY_AGAIN}")
    layer_samples = {
        layer: LayerSamples(*(tensors[f"{layer}.{name}"] for name in LayerSamples._fields)) for layer in sampled_layers
    }
    return layer_samples or None, {name.removeprefix(_SAMPLE_PREFIX): t for name, t in samples.items()} or None
