"""The adapters of a model's layers as one set, with what their meaning needs, and its folder.

One layer's adapter is a `TranscoderAdapter` (`transcoder`). All of a set have one shape and one activation function.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from torch import Tensor, nn

from tl_adapters.adapters.feature_id import FeatureId, ForeignFeaturesError, OwnedFeatureId
from tl_adapters.adapters.saelens_folder import (
    HOOK_IN,
    HOOK_OUT,
    LAYER_FILES,
    THRESHOLDED,
    AdapterFormatError,
    read_config,
    read_json,
    read_safetensors,
    read_weights,
    transcoder_config,
    write_transcoder,
)
from tl_adapters.adapters.transcoder import TranscoderAdapter as TranscoderAdapter
from tl_adapters.adapters.transcoder import adapter_of, require_activation
from tl_adapters.checkpoints.fingerprints import fingerprint, fingerprints
from tl_adapters.checkpoints.layer_samples import LayerSamples
from tl_adapters.checkpoints.model_files import fetch
from tl_adapters.config import ActivationName
from tl_adapters.utils.file_hashes import file_hash
from tl_adapters.utils.files import new_folder
from tl_adapters.utils.finite import require_finite_weights
from tl_adapters.utils.strict_json import dumps

METADATA_FILE, SAMPLES_FILE = "tl_adapters.json", "layer_marks.safetensors"
SET_SCHEMA_VERSION = 3
READABLE_VERSIONS = (2, SET_SCHEMA_VERSION)
"""Version 2 has neither hashes of its files nor samples of all weights."""
LAYER_FOLDER = "layer_{}"
_SAMPLE_PREFIX = "samples/"

log = logging.getLogger(__name__)


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

    def __post_init__(self) -> None:
        for name, allowed in (("reads", HOOK_IN), ("writes", HOOK_OUT)):
            if getattr(self, name) not in allowed:
                raise AdapterFormatError(
                    f"{name} is {getattr(self, name)!r}; allowed is one of {', '.join(allowed)}. These adapters were "
                    "made with a newer version of tl_adapters, or their description was edited."
                )


class AdapterSet(nn.Module):
    """The adapters of a model's layers, with what their meaning needs.

    Args:
        layers: one adapter per layer, all of one shape; a mapping for only some of the layers.
        marks: by what target and base are known again, for these layers or all; None where nothing is known.
        metadata: where the adapters come from, and their activation.
        n_layers: layers of the model; None means that there is an adapter for each.
        samples: of every weight of target and base (`fitting.weight_samples`); None where they are not known.
    """

    warned: bool
    """It was said already that less is known of its models than could be."""

    def __init__(
        self,
        layers: Sequence[TranscoderAdapter] | Mapping[int, TranscoderAdapter],
        marks: Sequence[LayerSamples] | Mapping[int, LayerSamples] | None = None,
        metadata: AdapterMetadata | None = None,
        n_layers: int | None = None,
        samples: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.warned = False
        self.samples = None if samples is None else {name: t.detach().cpu() for name, t in samples.items()}
        by_layer = dict(layers) if isinstance(layers, Mapping) else dict(enumerate(layers))
        self.n_layers = n_layers or len(by_layer)
        self.marks: dict[int, LayerSamples] | None = None
        if marks is not None:
            known = marks if isinstance(marks, Mapping) else dict(enumerate(marks))
            self.marks = {
                layer: LayerSamples(*(t.detach().to("cpu", copy=True) for t in known[layer])) for layer in sorted(known)
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

    def decoder_norms(self) -> Float[Tensor, "n_layers n_features"]:
        """The decoder norms of every layer there is an adapter of, in float32, without gradients."""
        return torch.stack([adapter.decoder_norms().detach().float() for adapter in self])

    @property
    def fingerprint(self) -> str:
        """Content hash that says which features these are.

        Of decoders, biases, thresholds and topk's k, not of encoders: so it is the same whichever of the two inputs
        the adapters read, and in every format that keeps their dtype.
        """
        return fingerprint(self._content(self.layer_indices))

    @property
    def fingerprints(self) -> dict[str, str]:
        """`fingerprint` as "adapters", and that of every layer by itself as "adapters.N".

        So some layers of a set, loaded or exported alone, are known as layers of that set.
        """
        layers = {f"adapters.{layer}": self._content([layer]) for layer in self.layer_indices}
        return fingerprints({"adapters": self._content(self.layer_indices), **layers})

    def _content(self, layers: Sequence[int]) -> list[tuple[str, Tensor]]:
        names = ["b_enc", "W_dec", "b_dec", *(["threshold"] if self.metadata.activation in THRESHOLDED else [])]
        found = [(f"{layer}.{name}", getattr(self[layer], name)) for layer in layers for name in names]
        if self.metadata.activation == "topk":
            found.append(("k", torch.tensor([self.metadata.k])))
        return found

    def require_own(self, features: Iterable[FeatureId | tuple[int, int]]) -> None:
        """Raises ForeignFeaturesError for features that are known to be of other adapters (`OwnedFeatureId`)."""
        known = [f for f in features if isinstance(f, OwnedFeatureId) and f.adapters is not None]
        layers = {f.layer for f in known} & set(self.layer_indices)
        ours = fingerprints({layer: self._content([layer]) for layer in layers})
        others = [f for f in known if f.adapters != ours.get(f.layer)]
        whole = self.fingerprint if others else ""  # which is all that features of earlier versions' files know
        for feature in others:
            if feature.adapters != whole:
                of = f"of adapters {feature.adapters}" if feature.adapters else "no feature of adapters"
                raise ForeignFeaturesError(
                    f"Feature {feature.layer}.{feature.index} is {of}; the adapters here are {whole}. A feature is a "
                    "number of one set: load the adapters it was found in, or find features in these."
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
            tensors = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
            tensors["W_enc"] *= self.marks[layer].ln2_w.to(ours.W_enc.device, ours.W_enc.dtype)[:, None]
            layers[layer] = adapter_of(tensors, ours.activation, ours.k)
        about = replace(self.metadata, reads="normalized")
        found = AdapterSet(layers, self.marks, about, self.n_layers, self.samples)
        found.warned = self.warned
        return found

    def require_finite(self, of: str) -> None:
        """Raises NotFiniteError, which begins with ``of`` and names the layer, where a weight is NaN or infinite."""
        named = ((i, name, tensor) for i in self.layer_indices for name, tensor in self[i].state_dict().items())
        require_finite_weights(((f"layer {i}, {name}", tensor) for i, name, tensor in named), of)

    # -- training --------------------------------------------------------------------------------------------------

    @contextmanager
    def training_on(self, real: Bool[Tensor, "batch pos"]) -> Iterator[None]:
        """For the length of a block the adapters train on a batch; everywhere else they evaluate.

        Only batchtopk computes something else then: it selects among all features of all ``real`` tokens (padding is
        not real), and not by its threshold.
        """
        n_real = int(real.sum()) if self.metadata.activation == "batchtopk" else None  # once, not in every layer
        for adapter in self:
            adapter.training_tokens, adapter.n_training_tokens = real, n_real
        try:
            yield
        finally:
            for adapter in self:
                adapter.training_tokens = adapter.n_training_tokens = None

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """For the length of a block, weights of a narrower dtype are float32; afterwards they are what they were.

        For what takes adapters apart (attribution, circuits): rounded activations would not add up.
        """
        narrow = [w for w in (*self.parameters(), *self.buffers()) if w.is_floating_point() and w.element_size() < 4]
        kept = [weight.data for weight in narrow]
        try:
            for weight in narrow:
                weight.data = weight.data.float()
            yield
        finally:
            for weight, data in zip(narrow, kept, strict=True):
                weight.data = data

    # -- files ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the set: tl_adapters.json, what is kept of the target, and a SAELens folder per layer.

        Raises FolderExistsError where ``folder`` exists, NotFiniteError and DiskFullError; nothing half-written is
        left.
        """
        self.require_finite("These adapters are not saved")
        about = asdict(self.metadata) | {
            "fingerprints": {**self.metadata.fingerprints, "adapters": self.fingerprint},
            "n_layers": self.n_layers,
        }
        record = {
            "schema_version": SET_SCHEMA_VERSION,
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
            kept = {
                f"{layer}.{name}": tensor.contiguous()
                for layer, known in (self.marks or {}).items()
                for name, tensor in known._asdict().items()
            }
            kept |= {f"{_SAMPLE_PREFIX}{name}": t.contiguous() for name, t in (self.samples or {}).items()}
            if kept:
                save_file(kept, out / SAMPLES_FILE)
            files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
            record["files"] = {
                name: {"sha256": file_hash(out / name), "size": (out / name).stat().st_size} for name in files
            }
            (out / METADATA_FILE).write_text(dumps({**record, "sha256": record_hash(record)}, indent=1) + "\n")

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
            NotFiniteError: weights that are NaN or infinite.
            CheckpointError: neither a folder nor a repository that the hub gives.
        """
        about = describe(name, revision=revision, token=token)
        chosen = about.layers if layers is None else list(layers)
        if absent := sorted(set(chosen) - set(about.layers)):
            raise AdapterFormatError(f"{name} has no adapters of layers {absent}; it has those of {about.layers}.")
        folder = fetch(name, set_files(chosen), revision=revision, token=token)
        adapters = {}
        for layer in chosen:
            about.require_layer(folder, layer)
            tensors = read_weights(folder / LAYER_FOLDER.format(layer), about.metadata.activation, device)
            found = (tensors["W_enc"].shape[0], tensors["W_enc"].shape[1], tensors["W_dec"].shape[1])
            if found != (about.d_model, about.n_features, about.d_model):
                raise AdapterFormatError(
                    f"Layer {layer} of {name} maps {found[0]} to {found[1]} features to {found[2]}; expected "
                    f"{about.d_model}, {about.n_features} and {about.d_model}."
                )
            adapters[layer] = adapter_of(tensors, about.metadata.activation, about.metadata.k)
        result = cls(adapters, about.marks, about.metadata, about.n_layers, about.samples)
        if about.files is None:
            result.warned = True
            log.warning(
                "%s was written by an earlier version of tl_adapters: it holds neither hashes of its files nor samples "
                "of all weights of its models. So damage to encoders, and other embeddings, first norms or (where the "
                "models are cast or processed) attention and MLPs than it was trained on, cannot be noticed. Where you "
                "are sure of the pair: pair.load_adapters(adapters); adapters.samples = pair.samples; "
                "adapters.save_pretrained(NEW).",
                name,
            )
        if layers is None and result.fingerprint != about.fingerprint:
            raise AdapterFormatError(
                f"The weights in {name} are not those its {METADATA_FILE} was written with (fingerprint "
                f"{result.fingerprint}, expected {about.fingerprint}): files of two sets were mixed, or cast. Copy the "
                "whole folder again."
            )
        result.require_finite(str(name))
        return result


def set_files(layers: Sequence[int]) -> list[str]:
    """The files of a set with adapters of these layers."""
    folders = [LAYER_FOLDER.format(layer) for layer in layers]
    return [METADATA_FILE, SAMPLES_FILE, *(f"{folder}/{file}" for folder in folders for file in LAYER_FILES)]


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
    marks: dict[int, LayerSamples] | None
    """What is kept of the target."""
    samples: dict[str, Tensor] | None = None
    """Of every weight of target and base; None in sets of earlier versions."""
    files: dict[str, dict[str, Any]] | None = None
    """By name within the folder: "sha256" and "size"; None in sets of earlier versions."""

    def require_layer(self, folder: Path, layer: int) -> None:
        """Raises AdapterFormatError where the files of a layer in ``folder`` are not those of this set."""
        inside = LAYER_FOLDER.format(layer)
        for file in LAYER_FILES:
            self.require_file(folder, f"{inside}/{file}")
        about = read_config(folder / inside).get("metadata") or {}
        ours, fingerprints = (
            about.get("tl_adapters") or {},
            {**self.metadata.fingerprints, "adapters": self.fingerprint},
        )
        for name, found, expected in (
            ("layer", ours.get("layer"), layer),
            ("hook_name", about.get("hook_name"), HOOK_IN[self.metadata.reads].format(layer)),
            ("hook_name_out", about.get("hook_name_out"), HOOK_OUT[self.metadata.writes].format(layer)),
            ("fingerprints", ours.get("fingerprints"), fingerprints),
        ):
            if found != expected:
                raise AdapterFormatError(
                    f"{folder / inside / 'cfg.json'} says {name} {found!r}; the set it lies in has {expected!r}: files "
                    "of two sets were mixed, or edited. Copy the whole folder again."
                )

    def require_file(self, folder: Path, name: str) -> None:
        """Raises AdapterFormatError where a file is missing, or its bytes are not those that were written."""
        if self.files is None:
            return
        path, known = folder / name, self.files.get(name)
        if known is None or not path.is_file():
            what = f"it is not there, or not one of the files of {METADATA_FILE}"
        elif (size := path.stat().st_size) != known["size"]:
            what = f"it has {size:,} bytes, expected {known['size']:,}"
        elif file_hash(path) != known["sha256"]:
            what = f"its content is not what {METADATA_FILE} was written with"
        else:
            return
        raise AdapterFormatError(
            f"{path} is missing or damaged, or was edited, or files of two sets were mixed: {what}. Copy the whole "
            "folder again."
        )


def describe(name: str | Path, *, revision: str | None = None, token: str | None = None) -> SetDescription:
    """A set's description; of a repository no weights are downloaded. Raises AdapterFormatError, CheckpointError."""
    folder = fetch(name, [METADATA_FILE, SAMPLES_FILE], revision=revision, token=token)
    if not (folder / METADATA_FILE).is_file():
        raise AdapterFormatError(
            f"{name} holds no {METADATA_FILE}: it is not a set of adapters. SAELens folders of others are read by "
            "from_saelens, the paper's authors' checkpoints by from_authors."
        )
    record = read_json(folder / METADATA_FILE)
    if (version := record.get("schema_version")) not in READABLE_VERSIONS:
        raise AdapterFormatError(
            f"{name} has schema_version {version}; this version reads {' and '.join(map(str, READABLE_VERSIONS))}. "
            "Read it with the version of tl_adapters that wrote it, or update."
        )
    files = _known_files(folder, record) if version == SET_SCHEMA_VERSION else None
    record.pop("schema_version")
    try:
        shape = {key: int(record.pop(key)) for key in ("n_layers", "d_model", "n_features")}
        layers = [int(layer) for layer in record.pop("layers")]
        adapters = str(record["fingerprints"].pop("adapters"))
        metadata = AdapterMetadata(**record)
        require_activation(metadata.activation, metadata.k, shape["n_features"])
    except AdapterFormatError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AdapterFormatError(f"{folder / METADATA_FILE} is not a description of adapters: {error!r}.") from error
    size = shape["n_layers"], shape["d_model"], shape["n_features"]
    found = SetDescription(layers, *size, metadata, adapters, None, None, files)
    if SAMPLES_FILE in (files or {}):
        found.require_file(folder, SAMPLES_FILE)
    marks, samples = _kept(folder)
    return replace(found, marks=marks, samples=samples)


def _known_files(folder: Path, record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Take the hashes out of a set's record. Raises AdapterFormatError where the record is not as it was written."""
    said = record.pop("sha256", None)
    if said != (found := record_hash(record)):
        raise AdapterFormatError(
            f"{folder / METADATA_FILE} was edited or is damaged: the hash of its content is {found}, expected {said}. "
            "Copy the whole folder again; to change what is said of adapters, replace AdapterSet.metadata and save it."
        )
    return dict(record.pop("files"))


def record_hash(record: Mapping[str, Any]) -> str:
    """Of what a set's description says, without the hash itself, whatever the order and the spaces it is written in."""
    as_read = json.loads(dumps(record))
    return hashlib.sha256(dumps(as_read, sort_keys=True).encode()).hexdigest()


def _kept(folder: Path) -> tuple[dict[int, LayerSamples] | None, dict[str, Tensor] | None]:
    """The marks of layers, and the samples of all weights, where there are any."""
    if not (folder / SAMPLES_FILE).is_file():
        return None, None
    tensors = read_safetensors(folder / SAMPLES_FILE)
    samples = {n.removeprefix(_SAMPLE_PREFIX): tensors.pop(n) for n in list(tensors) if n.startswith(_SAMPLE_PREFIX)}
    try:
        layers = sorted({int(name.partition(".")[0]) for name in tensors})
        marks = {
            layer: LayerSamples(*(tensors[f"{layer}.{name}"] for name in LayerSamples._fields)) for layer in layers
        }
    except (KeyError, ValueError) as error:
        raise AdapterFormatError(f"{folder / SAMPLES_FILE} is incomplete ({error!r}); copy it again.") from error
    return marks or None, samples or None
