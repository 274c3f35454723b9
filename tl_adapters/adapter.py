"""Transcoder adapters: one sparse module per layer that stands beside the base MLP (arXiv 2602.20904, section 3).

    MLP_target(x) ~ MLP_base(x) + T(x)          T(x) = relu(x @ W_enc + b_enc) @ W_dec + b_dec

x is what the MLP itself reads: the residual stream after the second norm, with that norm's weight. The decoder
starts at zero, so an untrained adapter changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tl_adapters.atomic import new_folder
from tl_adapters.checkpoints import fetch
from tl_adapters.fingerprints import fingerprint
from tl_adapters.marks import LayerMarks
from tl_adapters.saelens import (
    LAYER_FILES,
    AdapterFormatError,
    read_json,
    read_safetensors,
    read_weights,
    transcoder_config,
    write_transcoder,
)

METADATA_FILE, MARKS_FILE = "tl_adapters.json", "layer_marks.safetensors"
SCHEMA_VERSION = 2
LAYER_FOLDER = "layer_{}"


class FeatureId(NamedTuple):
    """One feature of an adapter set. Means something only together with the set: seeds number features anew."""

    layer: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody misses on a pair


class TranscoderAdapter(nn.Module):
    """T of one layer. Its hook points carry SAELens's names, so caches and interventions find them.

    Args:
        d_model: width of the residual stream.
        n_features: width of the adapter.
        generator: source of the random encoder, uniform in +-1/sqrt(d_model); None leaves every weight zero.
        dtype, device: of the weights; inputs are cast to this dtype and outputs back to the input's.
    """

    def __init__(
        self,
        d_model: int,
        n_features: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.zeros(d_model, n_features, dtype=dtype, device=device))
        self.b_enc = nn.Parameter(torch.zeros(n_features, dtype=dtype, device=device))
        self.W_dec = nn.Parameter(torch.zeros(n_features, d_model, dtype=dtype, device=device))
        self.b_dec = nn.Parameter(torch.zeros(d_model, dtype=dtype, device=device))
        self.hook_sae_input = HookPoint()  # [batch, pos, d_model]
        self.hook_sae_acts_pre = HookPoint()  # [batch, pos, n_features]
        self.hook_sae_acts_post = HookPoint()  # [batch, pos, n_features]
        self.hook_sae_recons = HookPoint()  # [batch, pos, d_model]
        if generator is not None:
            bound = d_model**-0.5
            # Drawn on the generator's device: the same seed gives the same encoder wherever the adapter lives.
            drawn = torch.rand(d_model, n_features, generator=generator, device=generator.device)
            with torch.no_grad():
                self.W_enc.copy_((2 * drawn - 1) * bound)

    @property
    def n_features(self) -> int:
        """Width of the adapter."""
        return self.W_enc.shape[1]

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch n_features"]:
        """Feature activations of what the MLP reads."""
        x = self.hook_sae_input(x.to(self.W_enc.dtype))
        pre = self.hook_sae_acts_pre(torch.addmm(self.b_enc, x.flatten(0, -2), self.W_enc).unflatten(0, x.shape[:-1]))
        return self.hook_sae_acts_post(torch.relu(pre))

    def decode(self, acts: Float[Tensor, "*batch n_features"]) -> Float[Tensor, "*batch d_model"]:
        """What the activations add to the MLP's output."""
        out = torch.addmm(self.b_dec, acts.flatten(0, -2), self.W_dec).unflatten(0, acts.shape[:-1])
        return self.hook_sae_recons(out)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """T(x), in the dtype of x."""
        return self.decode(self.encode(x)).to(x.dtype)


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
    activation: str = "relu"
    """The activation function of the features."""
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
        metadata: where the adapters come from.
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
        if len({tuple(adapter.W_enc.shape) for adapter in by_layer.values()}) > 1:
            raise ValueError("The adapters of a set have one shape; got several.")
        self.layers = nn.ModuleDict({str(layer): by_layer[layer] for layer in sorted(by_layer)})
        self.metadata = metadata or AdapterMetadata()

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

        Of decoders and biases, not of encoders: so it is the same whichever of the two inputs the adapters read, and
        in every format that keeps their dtype.
        """
        return fingerprint(
            (f"{layer}.{name}", getattr(self[layer], name))
            for layer in self.layer_indices
            for name in ("b_enc", "W_dec", "b_dec")
        )

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
            tensors = {name: p.detach().clone() for name, p in ours.named_parameters()}
            tensors["W_enc"] *= self.marks[layer].ln2_w.to(ours.W_enc.device, ours.W_enc.dtype)[:, None]
            layers[layer] = adapter_of(tensors)
        return AdapterSet(layers, self.marks, replace(self.metadata, reads="normalized"), self.n_layers)

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
                tensors = {name: p.detach() for name, p in self[layer].named_parameters()}
                config = transcoder_config(layer, tensors, about)
                write_transcoder(out / LAYER_FOLDER.format(layer), config, tensors)
            if self.marks is not None:
                kept = {
                    f"{layer}.{name}": tensor.contiguous()
                    for layer, known in self.marks.items()
                    for name, tensor in known._asdict().items()
                }
                save_file(kept, out / MARKS_FILE)
            (out / METADATA_FILE).write_text(json.dumps(record, indent=1) + "\n")

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
            tensors = read_weights(folder / LAYER_FOLDER.format(layer), device)
            found = (tensors["W_enc"].shape[0], tensors["W_enc"].shape[1], tensors["W_dec"].shape[1])
            if found != (about.d_model, about.n_features, about.d_model):
                raise AdapterFormatError(
                    f"Layer {layer} of {name} maps {found[0]} to {found[1]} features to {found[2]}; expected "
                    f"{about.d_model}, {about.n_features} and {about.d_model}."
                )
            adapters[layer] = adapter_of(tensors)
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
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AdapterFormatError(f"{folder / METADATA_FILE} is not a description of adapters: {error!r}.") from error
    return SetDescription(layers, **shape, metadata=metadata, fingerprint=adapters, marks=_kept(folder))


def adapter_of(tensors: dict[str, Tensor]) -> TranscoderAdapter:
    """An adapter around the given tensors; nothing is copied."""
    with torch.device("meta"):
        adapter = TranscoderAdapter(*tensors["W_enc"].shape, dtype=tensors["W_enc"].dtype)
    adapter.load_state_dict(tensors, assign=True)
    return adapter.requires_grad_(True)


def _kept(folder: Path) -> dict[int, LayerMarks] | None:
    if not (folder / MARKS_FILE).is_file():
        return None
    tensors = read_safetensors(folder / MARKS_FILE)
    try:
        layers = {int(name.partition(".")[0]) for name in tensors}
        return {layer: LayerMarks(*(tensors[f"{layer}.{name}"] for name in LayerMarks._fields)) for layer in layers}
    except (KeyError, ValueError) as error:
        raise AdapterFormatError(f"{folder / MARKS_FILE} is incomplete ({error!r}); copy it again.") from error
