"""The adapters of a model's layers as one set, with what their meaning needs, and its folder.

One layer's adapter is a `TranscoderAdapter` (`transcoder`). All of a set have one shape and one activation function.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from safetensors.torch import save_file
from torch import Tensor, nn

from tl_adapters.atomic import new_folder
from tl_adapters.checkpoints import fetch
from tl_adapters.config import ActivationName
from tl_adapters.fingerprints import fingerprint
from tl_adapters.marks import LayerMarks
from tl_adapters.saelens import (
    LAYER_FILES,
    THRESHOLDED,
    AdapterFormatError,
    read_json,
    read_safetensors,
    read_weights,
    transcoder_config,
    write_transcoder,
)
from tl_adapters.strict_json import dumps
from tl_adapters.transcoder import TranscoderAdapter as TranscoderAdapter
from tl_adapters.transcoder import adapter_of, require_activation

METADATA_FILE, MARKS_FILE = "tl_adapters.json", "layer_marks.safetensors"
SCHEMA_VERSION = 2
LAYER_FOLDER = "layer_{}"


class FeatureId(NamedTuple):
    """One feature of an adapter set. Means something only together with the set: seeds number features anew."""

    layer: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody misses on a pair


@dataclass(frozen=True)
class AdapterMetadata:
    """What the weights alone do not say, and their meaning needs."""

    base: str = ""
    """Id or folder of the base model."""
    target: str = ""
    """Id or folder of the target model."""
    base_revision: str | None = None
    """Commit of the base on the hub, where it came from there."""
    target_revision: str | None = None
    """Commit of the target on the hub, where it came from there."""
    reads: str = "mlp_input"
    """Which tensor is x: "mlp_input", the second norm's output with its weight, or "normalized", that before it."""
    activation: ActivationName = "relu"
    """The activation function of the features: "relu", "jumprelu", "topk" or "batchtopk"."""
    k: int | None = None
    """Active features per token of topk, and of batchtopk on average; None for the others."""
    stream: str = "replacement"
    """Whose residual stream the features were trained on; on the target's own their activations differ a little."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Content hashes of the models they were trained on: "base_mlps" and "target"."""
    datasets: list[str] = field(default_factory=list)
    """Names or files of the training data."""
    writes: str = "adapter_out"
    """What its output is: "adapter_out", added to the MLP's, or "mlp_out", in its place (a transcoder of others)."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Measured figures (L0, KL, ...), each with the split it was measured on."""


class AdapterSet(nn.Module):
    """The adapters of a model's layers, with what their meaning needs.

    Args:
        layers: one adapter per layer, all of one shape; a mapping for only some of the layers.
        marks: by what target and base are known again, for these layers or all; None where nothing is known.
        metadata: where the adapters come from, and their activation.
        n_layers: layers of the model; None means that there is an adapter for each.
    """

    def __init__(
        self,
        layers: Sequence[TranscoderAdapter] | Mapping[int, TranscoderAdapter],
        marks: Sequence[LayerMarks] | Mapping[int, LayerMarks] | None = None,
        metadata: AdapterMetadata | None = None,
        n_layers: int | None = None,
    ) -> None:
        super().__init__()
        by_layer = dict(layers) if isinstance(layers, Mapping) else dict(enumerate(layers))
        self.n_layers = n_layers or len(by_layer)
        self.marks: dict[int, LayerMarks] | None = None
        if marks is not None:
            known = marks if isinstance(marks, Mapping) else dict(enumerate(marks))
            self.marks = {
                layer: LayerMarks(*(t.detach().to("cpu", copy=True) for t in known[layer])) for layer in sorted(known)
            }
        if not by_layer or not set(by_layer) <= set(by_layer if self.marks is None else self.marks):
            raise ValueError(
                f"Got adapters of layers {sorted(by_layer)} and target layers {sorted(self.marks or {})}; "
                "every adapter needs its target layer."
            )
        if max(by_layer) >= self.n_layers:
            raise ValueError(f"Got an adapter of layer {max(by_layer)} for a model of {self.n_layers} layers.")
        if len({(*adapter.W_enc.shape, adapter.activation, adapter.k) for adapter in by_layer.values()}) > 1:
            raise ValueError("The adapters of a set have one shape and one activation; got several.")
        self.layers = nn.ModuleDict({str(layer): by_layer[layer] for layer in sorted(by_layer)})
        one = next(iter(self))
        self.metadata = metadata or AdapterMetadata(activation=one.activation, k=one.k)
        said = (self.metadata.activation, self.metadata.k)
        if said != (one.activation, one.k):
            raise ValueError(f"The metadata says {said} of activation and k; the adapters are {one.activation, one.k}.")

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> TranscoderAdapter:
        if str(layer) not in self.layers:
            raise KeyError(f"There is no adapter of layer {layer}; there are those of {self.layer_indices}.")
        return self.layers[str(layer)]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[TranscoderAdapter]:
        return iter(self.layers.values())  # type: ignore[arg-type]

    @property
    def layer_indices(self) -> list[int]:
        """The layers there are adapters of."""
        return [int(layer) for layer in self.layers]

    @property
    def n_features(self) -> int:
        """Features per layer."""
        return next(iter(self)).n_features

    @property
    def d_model(self) -> int:
        """Width of the residual stream the adapters read and write."""
        return next(iter(self)).W_enc.shape[0]

    @property
    def fingerprint(self) -> str:
        """Content hash that says which features these are.

        Of decoders, biases, thresholds and topk's k, not of encoders: so it is the same whichever of the two inputs
        the adapters read, and in every format that keeps their dtype.
        """
        names = ["b_enc", "W_dec", "b_dec", *(["threshold"] if self.metadata.activation in THRESHOLDED else [])]
        found = [(f"{layer}.{name}", getattr(self[layer], name)) for layer in self.layer_indices for name in names]
        if self.metadata.activation == "topk":
            found.append(("k", torch.tensor([self.metadata.k])))
        return fingerprint(found)

    def normalized(self) -> AdapterSet:
        """The same adapters reading ln2.hook_normalized: W_enc' = ln2_w[:, None] * W_enc.

        The same activations on models as they are, with folded norms, and fully processed. A set that reads it
        already is returned as it is. Raises AdapterFormatError where the norms are not known.
        """
        if self.metadata.reads == "normalized":
            return self
        if self.marks is None:
            raise AdapterFormatError("The target's second norms are not known; this set can only read the MLP's input.")
        layers = {}
        for layer in self.layer_indices:
            ours = self[layer]
            tensors = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
            tensors["W_enc"] *= self.marks[layer].ln2_w.to(ours.W_enc.device, ours.W_enc.dtype)[:, None]
            layers[layer] = adapter_of(tensors, ours.activation, ours.k)
        return AdapterSet(layers, self.marks, replace(self.metadata, reads="normalized"), self.n_layers)

    # -- training --------------------------------------------------------------------------------------------------

    @contextmanager
    def training_on(self, real: Bool[Tensor, "batch pos"]) -> Iterator[None]:
        """For the length of a block the adapters train on a batch; everywhere else they evaluate.

        Only batchtopk computes something else then: it selects among all features of all ``real`` tokens (padding is
        not real), and not by its threshold.
        """
        for adapter in self:
            adapter.training_tokens = real
        try:
            yield
        finally:
            for adapter in self:
                adapter.training_tokens = None

    # -- files ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the set: tl_adapters.json, what is kept of the target, and a SAELens folder per layer.

        Raises FolderExistsError where ``folder`` exists, and DiskFullError; nothing half-written is left.
        """
        about = asdict(self.metadata) | {
            "fingerprints": {**self.metadata.fingerprints, "adapters": self.fingerprint},
            "n_layers": self.n_layers,
        }
        record = {
            "schema_version": SCHEMA_VERSION,
            "layers": self.layer_indices,
            "d_model": self.d_model,
            "n_features": self.n_features,
            **about,
        }
        with new_folder(folder) as out:
            for layer in self.layer_indices:
                tensors = self[layer].state_dict()
                config = transcoder_config(layer, tensors, about)
                write_transcoder(out / LAYER_FOLDER.format(layer), config, tensors)
            if self.marks is not None:
                kept = {
                    f"{layer}.{name}": tensor.contiguous()
                    for layer, known in self.marks.items()
                    for name, tensor in known._asdict().items()
                }
                save_file(kept, out / MARKS_FILE)
            (out / METADATA_FILE).write_text(dumps(record, indent=1) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        layers: Sequence[int] | None = None,
        revision: str | None = None,
        token: str | None = None,
        device: torch.device | str = "cpu",
    ) -> AdapterSet:
        """Read what `save_pretrained` wrote, from a folder or the hub.

        Args:
            name: a folder, or a repository of the hub, which is downloaded into its cache.
            layers: only these layers are read, and downloaded; None reads all.
            revision: branch, tag or commit of the hub.
            token: for a private repository; None takes HF_TOKEN or the stored login.
            device: where the weights go.

        Raises:
            AdapterFormatError: not a set of adapters, or a damaged one.
            CheckpointError: neither a folder nor a repository that the hub gives.
        """
        about = describe(name, revision=revision, token=token)
        chosen = about.layers if layers is None else list(layers)
        if absent := sorted(set(chosen) - set(about.layers)):
            raise AdapterFormatError(f"{name} has no adapters of layers {absent}; it has those of {about.layers}.")
        folder = fetch(name, set_files(chosen), revision=revision, token=token)
        adapters = {}
        for layer in chosen:
            tensors = read_weights(folder / LAYER_FOLDER.format(layer), about.metadata.activation, device)
            found = (tensors["W_enc"].shape[0], tensors["W_enc"].shape[1], tensors["W_dec"].shape[1])
            if found != (about.d_model, about.n_features, about.d_model):
                raise AdapterFormatError(
                    f"Layer {layer} of {name} maps {found[0]} to {found[1]} features to {found[2]}; expected "
                    f"{about.d_model}, {about.n_features} and {about.d_model}."
                )
            adapters[layer] = adapter_of(tensors, about.metadata.activation, about.metadata.k)
        result = cls(adapters, about.marks, about.metadata, about.n_layers)
        if layers is None and result.fingerprint != about.fingerprint:
            raise AdapterFormatError(
                f"The weights in {name} are not those its {METADATA_FILE} was written with (fingerprint "
                f"{result.fingerprint}, expected {about.fingerprint}): files of two sets were mixed, or cast. Copy the "
                "whole folder again."
            )
        return result


def set_files(layers: Sequence[int]) -> list[str]:
    """The files of a set with adapters of these layers."""
    folders = [LAYER_FOLDER.format(layer) for layer in layers]
    return [METADATA_FILE, MARKS_FILE, *(f"{folder}/{file}" for folder in folders for file in LAYER_FILES)]


@dataclass(frozen=True)
class SetDescription:
    """What a set's files say of it besides the weights."""

    layers: list[int]
    """The layers there are adapters of."""
    n_layers: int
    """Layers of the model."""
    d_model: int
    """Width of the residual stream."""
    n_features: int
    """Features per layer."""
    metadata: AdapterMetadata
    """Where they come from."""
    fingerprint: str
    """Content hash of the adapters."""
    marks: dict[int, LayerMarks] | None
    """What is kept of the target."""


def describe(name: str | Path, *, revision: str | None = None, token: str | None = None) -> SetDescription:
    """A set's description; of a repository no weights are downloaded. Raises AdapterFormatError, CheckpointError."""
    folder = fetch(name, [METADATA_FILE, MARKS_FILE], revision=revision, token=token)
    if not (folder / METADATA_FILE).is_file():
        raise AdapterFormatError(
            f"{name} holds no {METADATA_FILE}: it is not a set of adapters. SAELens folders of others are read by "
            "from_saelens, the paper's authors' checkpoints by from_authors."
        )
    record = read_json(folder / METADATA_FILE)
    if (version := record.pop("schema_version", None)) != SCHEMA_VERSION:
        raise AdapterFormatError(
            f"{name} has schema_version {version}; this version reads {SCHEMA_VERSION}. Read it with the version of "
            "tl_adapters that wrote it, or update."
        )
    try:
        shape = {key: int(record.pop(key)) for key in ("n_layers", "d_model", "n_features")}
        layers = [int(layer) for layer in record.pop("layers")]
        adapters = str(record["fingerprints"].pop("adapters"))
        metadata = AdapterMetadata(**record)
        require_activation(metadata.activation, metadata.k, shape["n_features"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AdapterFormatError(f"{folder / METADATA_FILE} is not a description of adapters: {error!r}.") from error
    return SetDescription(layers, **shape, metadata=metadata, fingerprint=adapters, marks=_kept(folder))


def _kept(folder: Path) -> dict[int, LayerMarks] | None:
    if not (folder / MARKS_FILE).is_file():
        return None
    tensors = read_safetensors(folder / MARKS_FILE)
    try:
        layers = {int(name.partition(".")[0]) for name in tensors}
        return {layer: LayerMarks(*(tensors[f"{layer}.{name}"] for name in LayerMarks._fields)) for layer in layers}
    except (KeyError, ValueError) as error:
        raise AdapterFormatError(f"{folder / MARKS_FILE} is incomplete ({error!r}); copy it again.") from error
