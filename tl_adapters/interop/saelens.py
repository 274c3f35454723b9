"""Conversion of adapter sets to and from SAELens transcoders.

Folders written by `AdapterSet.save_pretrained` are SAELens folders already, so an export only chooses the input hook:
by default the norm's weight is folded into the encoder and the adapters read ``ln2.hook_normalized``, which is the same
tensor in unprocessed models, with folded norms, and in fully processed models. On import, everything that is not an
adapter or a transcoder of one MLP is refused, and the error names the field of its configuration.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.metadata import AdapterMetadata
from tl_adapters.adapters.saelens_folder import (
    COPY_AGAIN,
    INPUT_HOOKS,
    OUTPUT_HOOKS,
    SAELENS_ARCHITECTURES,
    SAELENS_CONFIG_FILE,
    AdapterFormatError,
    read_config,
    read_weights,
)
from tl_adapters.adapters.set_folder import SET_METADATA_FILE, SET_SAMPLES_FILE
from tl_adapters.adapters.transcoder import TranscoderAdapter, adapter_of
from tl_adapters.checkpoints.model_files import fetch
from tl_adapters.config import ConfigError
from tl_adapters.utils.files import plain_file
from tl_adapters.utils.reading import as_dataclass, shown, unreadable_as

_SUPPORTED_VALUES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("architecture", ("transcoder", "jumprelu_transcoder")),
    ("apply_b_dec_to_input", (False,)),
    ("normalize_activations", ("none", None)),
    ("reshape_activations", ("none", None)),
    ("activation_fn", ("relu", None)),
    ("activation_fn_str", ("relu", None)),
)
"""Keys of a SAELens configuration and the values under which the transcoder computes what an adapter computes."""


def to_saelens(
    adapters: AdapterSet, folder: str | Path, *, reads: Literal["normalized", "mlp_input"] = "normalized"
) -> None:
    """Write one SAELens folder per layer, which ``SAE.load_from_disk`` loads as a stock class.

    Base, target and data sets that are folders or files of this machine are written as ``./NAME``, without their path.

    The class is Transcoder for relu, and JumpReLUTranscoder for jumprelu and for batchtopk, which has a threshold per
    layer in evaluation.

    Args:
        adapters: in either form; a set read by `from_saelens` is written as it was read.
        folder: must not exist.
        reads: "normalized" (``blocks.N.ln2.hook_normalized``, correct for every way of processing the model's weights)
            or "mlp_input" (``blocks.N.mlp.hook_in``, correct only for a model without folded norms).

    Raises:
        AdapterFormatError: "mlp_input" for a set that reads "normalized", a set whose norms are not known, or topk,
            for which SAELens has no transcoder.
        NotFiniteError: weights that are NaN or infinite.
        FolderExistsError, DiskFullError: the folder cannot be made.
    """
    require_saelens_class(adapters)
    if reads == "normalized":
        published(adapters.normalized()).save_pretrained(folder)
    elif adapters.metadata.reads == reads:
        published(adapters).save_pretrained(folder)
    else:
        raise AdapterFormatError(
            f"These adapters read {adapters.metadata.reads}, and the norm's weight is not unfolded again; export them "
            f'with reads="{adapters.metadata.reads}".'
        )


def published(adapters: AdapterSet) -> AdapterSet:
    """Return the set, with the same adapters, whose metadata name models and data sets without their paths."""
    layers = {layer: adapters[layer] for layer in adapters.layer_indices}
    about = adapters.metadata.published()
    return AdapterSet(layers, adapters.layer_samples, about, adapters.n_layers, adapters.samples)


def require_saelens_class(adapters: AdapterSet) -> None:
    """Raise AdapterFormatError for adapters that SAELens has no class for."""
    if adapters.metadata.activation == "topk":
        raise AdapterFormatError(
            "SAELens has no transcoder that keeps the k largest features of a token, and with any of its classes these "
            "adapters would have other features. Keep them in our own folder (save_pretrained), or train with "
            "batchtopk, which SAELens reads as a JumpReLU transcoder."
        )


def from_saelens(
    name: str | Path,
    sae_ids: Sequence[str] | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    device: torch.device | str = "cpu",
) -> AdapterSet:
    """Read SAELens transcoders, written by this package or by others.

    Args:
        name: a folder of layer folders, the folder of one layer, or a repository on the hub.
        sae_ids: the layer folders to read, under their SAELens ids ("layer_3", "blocks.3/width_16k"); None reads the
            whole set of this package, or every folder with a cfg.json.
        revision, token, device: as in `AdapterSet.from_pretrained`.

    Returns:
        The set in the form in which it was written. A transcoder that replaces the MLP keeps its biases and its meaning
        (``metadata.writes`` is "mlp_out"): its features can be read, and `attach` refuses to add it to the MLP. A
        JumpReLU transcoder written by others is jumprelu; a batchtopk adapter of this package is batchtopk again.

    Raises:
        AdapterFormatError: another architecture (such as one with a skip connection), normalized inputs or other hooks.
        CheckpointError: neither a folder nor a repository that the hub gives.
        NotFiniteError: weights that are NaN or infinite.
    """
    patterns = [
        SET_METADATA_FILE,
        SET_SAMPLES_FILE,
        SAELENS_CONFIG_FILE,
        "*.safetensors",
        f"*/{SAELENS_CONFIG_FILE}",
        "*/*.safetensors",
    ]
    if sae_ids is not None:
        patterns = [SET_METADATA_FILE, SET_SAMPLES_FILE, *(f"{sae_id}/*" for sae_id in sae_ids)]
    folder = fetch(name, patterns, revision=revision, token=token)
    if sae_ids is None and (folder / SET_METADATA_FILE).is_file():
        return AdapterSet.from_pretrained(folder, device=device)
    if sae_ids is not None:
        layer_folders = [plain_file(folder, *sae_id.split("/")) for sae_id in sae_ids]
    else:
        for entry in folder.iterdir():
            if entry.is_symlink():  # a folder of a layer that would not be found
                plain_file(folder, entry.name)
        found = {path.parent.relative_to(folder) for path in folder.rglob(SAELENS_CONFIG_FILE)}
        layer_folders = [plain_file(folder, *inner.parts) for inner in sorted(found)]
    if not layer_folders:
        raise AdapterFormatError(f"{name} holds no {SAELENS_CONFIG_FILE}; it is not a SAELens transcoder.")
    result = _set_of(name, layer_folders, device)
    result.require_finite(str(name))
    return result


def _set_of(name: str | Path, layer_folders: Sequence[Path], device: torch.device | str) -> AdapterSet:
    """Return the set of the transcoders in these folders. Raises AdapterFormatError."""
    layers: dict[int, TranscoderAdapter] = {}
    metadata, n_layers = [], 0
    for layer_folder in layer_folders:
        layer, about, recorded_n_layers = _read_layer_metadata(layer_folder)
        if layer in layers:
            raise AdapterFormatError(f"{name} holds several transcoders of layer {layer}; choose with sae_ids=.")
        weights = read_weights(layer_folder, about.activation, device)
        try:
            layers[layer] = adapter_of(weights, about.activation, about.k)
        except ConfigError as error:
            raise AdapterFormatError(f"{layer_folder / SAELENS_CONFIG_FILE}: {error}") from error
        metadata.append(about)
        n_layers = max(n_layers, recorded_n_layers or 0, layer + 1)
    shapes = {(*adapter.W_enc.shape, adapter.W_enc.dtype) for adapter in layers.values()}
    if len(shapes) > 1 or any(about != metadata[0] for about in metadata):
        raise AdapterFormatError(f"The transcoders in {name} do not belong to one set; choose with sae_ids=.")
    return AdapterSet(layers, None, metadata[0], n_layers)


def _read_layer_metadata(folder: Path) -> tuple[int, AdapterMetadata, int | None]:
    """Return the layer of one SAELens folder, its metadata, and the model's number of layers where it is recorded.

    Raises AdapterFormatError for a configuration that would be misread.
    """
    config = read_config(folder)
    about = config.about
    for key, supported in _SUPPORTED_VALUES:
        if (given := getattr(config, key)) not in supported:
            _refuse(
                folder,
                f"{key} is {shown(given)}",
                f"supported is {' or '.join(repr(value) for value in supported if value is not None)}",
            )
    if about.hook_head_index is not None:
        _refuse(folder, f"hook_head_index is {about.hook_head_index}", "an adapter reads the whole stream")
    layer, reads, writes = _read_hooks(folder, str(about.hook_name), str(about.hook_name_out))
    ours = about.tl_adapters or {"target": about.model_name or ""}
    architecture = str(config.architecture)
    activation = ours.get("activation") or {"transcoder": "relu", "jumprelu_transcoder": "jumprelu"}[architecture]
    if not isinstance(activation, str) or SAELENS_ARCHITECTURES.get(activation) != architecture:
        contradiction = f"its metadata says {shown(activation)}, its architecture {architecture}"
        _refuse(folder, contradiction, "they contradict each other")
    record = {key: ours[key] for key in (field.name for field in fields(AdapterMetadata)) if key in ours}
    record |= {"activation": activation, "reads": reads, "writes": writes}
    with unreadable_as(AdapterFormatError):
        metadata = as_dataclass(AdapterMetadata, record, str(folder / SAELENS_CONFIG_FILE), COPY_AGAIN)
    metadata.fingerprints.pop("adapters", None)
    n_layers = ours.get("n_layers")
    if n_layers is not None and (not isinstance(n_layers, int) or isinstance(n_layers, bool) or n_layers <= layer):
        _refuse(folder, f"n_layers is {shown(n_layers)}", f"allowed is a whole number above {layer}, its layer")
    return layer, metadata, n_layers


def _read_hooks(folder: Path, hook_in: str, hook_out: str) -> tuple[int, str, str]:
    """Return the layer, and `AdapterMetadata`'s "reads" and "writes", that belong to the two hook names."""
    match = re.fullmatch(r"blocks\.([0-9]{1,4})\.(.+)", hook_in)
    reads = {hook.partition("{}.")[2]: name for name, hook in INPUT_HOOKS.items()}
    if match is None or match[2] not in reads:
        supported = " and ".join(hook.format("N") for hook in INPUT_HOOKS.values())
        _refuse(folder, f"it reads {hook_in[:100]}", f"supported are {supported}")
    layer = int(match[1])
    writes = {hook.format(layer): name for name, hook in OUTPUT_HOOKS.items()}
    writes[f"blocks.{layer}.mlp.hook_out"] = "mlp_out"
    if hook_out not in writes:
        _refuse(folder, f"it writes {hook_out[:100]}", f"supported are {' and '.join(writes)}")
    return layer, reads[match[2]], writes[hook_out]


def _refuse(folder: Path, given: str, supported: str) -> NoReturn:
    raise AdapterFormatError(f"{folder / SAELENS_CONFIG_FILE}: {given}; {supported}.")
