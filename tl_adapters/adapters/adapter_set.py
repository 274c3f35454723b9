"""The adapters of a model's layers as one set, with the metadata and weight samples that say where they belong.

The adapter of one layer is a `TranscoderAdapter` (`transcoder`). All adapters of a set have one shape and one
activation function. `set_folder` describes the files that a set is saved as.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_adapters.adapters.feature_id import FeatureId, ForeignFeaturesError, OwnedFeatureId
from tl_adapters.adapters.finite_weights import require_finite_weights
from tl_adapters.adapters.metadata import AdapterMetadata
from tl_adapters.adapters.saelens_folder import THRESHOLDED, AdapterFormatError
from tl_adapters.adapters.set_folder import (
    SET_METADATA_FILE,
    SetDescription,
    read_description,
    read_layer,
    set_files,
    write_set,
)
from tl_adapters.adapters.transcoder import TranscoderAdapter, adapter_of
from tl_adapters.checkpoints.fingerprints import fingerprint, fingerprints
from tl_adapters.checkpoints.layer_samples import LayerSamples
from tl_adapters.checkpoints.model_files import fetch
from tl_adapters.utils.renamed import renamed_attributes

log = logging.getLogger(__name__)

_EARLIER_VERSION = (
    "%s was written by an earlier version of tl_adapters: it holds neither hashes of its files nor samples of all "
    "weights of its models. Damage to encoders cannot be noticed, nor that embeddings, first norms or (where models "
    "are cast or processed) attention and MLPs differ from those it was trained on. Where you are sure of the pair: "
    "pair.load_adapters(adapters); adapters.samples = pair.samples; adapters.save_pretrained(NEW)."
)


@renamed_attributes(marks="layer_samples")
class AdapterSet(nn.Module):
    """The adapters of a model's layers, with the metadata and weight samples that say where they belong.

    Args:
        layers: one adapter per layer, all of one shape; a mapping for only some of the layers.
        layer_samples: samples of target and base, of these layers or of all; None where nothing is known of the models.
        metadata: the models that the adapters belong to, and what they read, compute and write.
        n_layers: number of layers of the model; None where every layer has an adapter.
        samples: samples of every weight of target and base (`PairedModel.samples`); None where they are not known.

    Raises ValueError for adapters of several shapes or activations, of layers that the model does not have, or that
    differ from the metadata.
    """

    warned: bool
    """Whether a warning was logged that not all weights of the models can be compared."""

    def __init__(
        self,
        layers: Sequence[TranscoderAdapter] | Mapping[int, TranscoderAdapter],
        layer_samples: Sequence[LayerSamples] | Mapping[int, LayerSamples] | None = None,
        metadata: AdapterMetadata | None = None,
        n_layers: int | None = None,
        samples: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.warned = False
        self.samples = None if samples is None else {name: t.detach().cpu() for name, t in samples.items()}
        by_layer = dict(layers) if isinstance(layers, Mapping) else dict(enumerate(layers))
        self.n_layers = n_layers or len(by_layer)
        self.layer_samples: dict[int, LayerSamples] | None = None
        if layer_samples is not None:
            given = layer_samples if isinstance(layer_samples, Mapping) else dict(enumerate(layer_samples))
            self.layer_samples = {
                layer: LayerSamples(*(t.detach().to("cpu", copy=True) for t in given[layer])) for layer in sorted(given)
            }
        if not by_layer or not set(by_layer) <= set(by_layer if self.layer_samples is None else self.layer_samples):
            raise ValueError(
                f"Got adapters of layers {sorted(by_layer)} and samples of layers {sorted(self.layer_samples or {})}; "
                "give at least one adapter, and samples for every layer that has one."
            )
        if max(by_layer) >= self.n_layers:
            raise ValueError(f"Got an adapter of layer {max(by_layer)} for a model of {self.n_layers} layers.")
        if len({(*adapter.W_enc.shape, adapter.activation, adapter.k) for adapter in by_layer.values()}) > 1:
            raise ValueError("The adapters of a set have one shape and one activation; got several.")
        self.layers = nn.ModuleDict({str(layer): by_layer[layer] for layer in sorted(by_layer)})
        first = next(iter(self))
        self.metadata = metadata or AdapterMetadata(activation=first.activation, k=first.k)
        described = (self.metadata.activation, self.metadata.k)
        if described != (first.activation, first.k):
            raise ValueError(
                f"Activation and k are {described} in the metadata and {(first.activation, first.k)} in the adapters."
            )

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> TranscoderAdapter:
        if str(layer) not in self.layers:
            raise KeyError(f"There is no adapter of layer {layer}; the set has those of layers {self.layer_indices}.")
        return self.layers[str(layer)]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[TranscoderAdapter]:
        return iter(self.layers.values())  # type: ignore[arg-type]

    @property
    def layer_indices(self) -> list[int]:
        """The layers that have an adapter."""
        return [int(layer) for layer in self.layers]

    @property
    def n_features(self) -> int:
        """Features per layer."""
        return next(iter(self)).n_features

    @property
    def d_model(self) -> int:
        """Width of the residual stream, which the adapters read and write."""
        return next(iter(self)).W_enc.shape[0]

    def decoder_norms(self) -> Float[Tensor, "n_layers n_features"]:
        """The decoder norms of every layer that has an adapter, in float32, without gradients."""
        return torch.stack([adapter.decoder_norms().detach().float() for adapter in self])

    @property
    def fingerprint(self) -> str:
        """Content hash that identifies the features.

        It covers decoders, biases, thresholds and topk's k, and not encoders, so it is the same whichever of the two
        inputs the adapters read, and in every format that keeps their dtype.
        """
        return fingerprint(self._content(self.layer_indices))

    @property
    def fingerprints(self) -> dict[str, str]:
        """`fingerprint` as "adapters", and the hash of each layer alone as "adapters.N".

        The latter identify layers of a set that are loaded or exported without the others.
        """
        layers = {f"adapters.{layer}": self._content([layer]) for layer in self.layer_indices}
        return fingerprints({"adapters": self._content(self.layer_indices), **layers})

    def _content(self, layers: Sequence[int]) -> list[tuple[str, Tensor]]:
        """The named tensors that a fingerprint of these layers covers."""
        names = ["b_enc", "W_dec", "b_dec", *(["threshold"] if self.metadata.activation in THRESHOLDED else [])]
        tensors = [(f"{layer}.{name}", getattr(self[layer], name)) for layer in layers for name in names]
        if self.metadata.activation == "topk":
            tensors.append(("k", torch.tensor([self.metadata.k])))
        return tensors

    def require_own(self, features: Iterable[FeatureId | tuple[int, int]]) -> None:
        """Raises ForeignFeaturesError for features that are known to be of other adapters (`OwnedFeatureId`)."""
        owned = [f for f in features if isinstance(f, OwnedFeatureId) and f.adapters is not None]
        layers = {f.layer for f in owned} & set(self.layer_indices)
        by_layer = fingerprints({layer: self._content([layer]) for layer in layers})
        others = [f for f in owned if f.adapters != by_layer.get(f.layer)]
        of_set = self.fingerprint if others else ""  # the only fingerprint in files of earlier versions
        for feature in others:
            if feature.adapters != of_set:
                owner = f"belongs to adapters {feature.adapters}" if feature.adapters else "belongs to no adapters"
                raise ForeignFeaturesError(
                    f"Feature {feature.layer}.{feature.index} {owner}; the adapters in use are {of_set}. A feature's "
                    "index has a meaning in one set only: load the adapters it was found in, or find features in these."
                )

    def normalized(self) -> AdapterSet:
        """The same adapters reading ln2.hook_normalized: W_enc' = ln2_w[:, None] * W_enc.

        Their activations are the same, on models whose norms are folded or whose weights are fully processed as well.
        A set that reads the normalized input already is returned as it is. Raises AdapterFormatError where the weights
        of the target's norms are not known.
        """
        if self.metadata.reads == "normalized":
            return self
        if self.layer_samples is None:
            raise AdapterFormatError("The target's second norms are not known; this set can only read the MLP's input.")
        layers = {}
        for layer in self.layer_indices:
            ours = self[layer]
            tensors = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
            tensors["W_enc"] *= self.layer_samples[layer].ln2_w.to(ours.W_enc.device, ours.W_enc.dtype)[:, None]
            layers[layer] = adapter_of(tensors, ours.activation, ours.k)
        metadata = replace(self.metadata, reads="normalized")
        result = AdapterSet(layers, self.layer_samples, metadata, self.n_layers, self.samples)
        result.warned = self.warned
        return result

    def require_finite(self, subject: str) -> None:
        """Raises NotFiniteError where a weight is NaN or infinite; the message begins with ``subject``."""
        named = ((i, name, tensor) for i in self.layer_indices for name, tensor in self[i].state_dict().items())
        require_finite_weights(((f"layer {i}, {name}", tensor) for i, name, tensor in named), subject)

    # -- training --------------------------------------------------------------------------------------------------

    @contextmanager
    def training_on(self, real: Bool[Tensor, "batch pos"], over_active: bool = False) -> Iterator[None]:
        """Within this context the adapters train on a batch; everywhere else they evaluate.

        This changes the values of batchtopk only: it then selects the largest among all features of all ``real`` tokens
        (those that are not padding), where it otherwise applies its threshold. With ``over_active`` products may be
        restricted to active features (`TranscoderAdapter.run`).
        """
        n_real = int(real.sum()) if self.metadata.activation == "batchtopk" else None  # once, not in every layer
        for adapter in self:
            adapter.training_tokens, adapter.n_training_tokens, adapter.over_active = real, n_real, over_active
        try:
            yield
        finally:
            for adapter in self:
                adapter.training_tokens, adapter.n_training_tokens, adapter.over_active = None, None, False

    def compute_in(self, dtype: torch.dtype | None) -> None:
        """Compute activations and outputs in a dtype, whatever that of the weights is; None is the weights' own."""
        for adapter in self:
            adapter.compute_dtype = dtype

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Within this context, adapters compute in float32 at least: attribution sums over features, which adds up."""
        with ExitStack() as computing:
            for adapter in self:
                computing.enter_context(adapter.computing_in(None))
            for weight in (*self.parameters(), *self.buffers()):
                if weight.is_floating_point() and weight.element_size() < 4:
                    computing.callback(setattr, weight, "data", weight.data)
                    weight.data = weight.data.float()
            yield

    # -- files ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the set into a new folder (`set_folder`): metadata, weight samples, and a SAELens folder per layer.

        Raises FolderExistsError where ``folder`` exists, NotFiniteError and DiskFullError; nothing half-written is
        left.
        """
        self.require_finite("These adapters are not saved")
        shape = (self.layer_indices, self.n_layers, self.d_model, self.n_features)
        description = SetDescription(*shape, self.metadata, self.fingerprint, self.layer_samples, self.samples)
        write_set(folder, description, {layer: self[layer].state_dict() for layer in self.layer_indices})

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
            revision: branch, tag or commit of the hub; a folder has none.
            token: for a private repository; None takes HF_TOKEN or the stored login.
            device: where the weights go.

        Raises:
            AdapterFormatError: not a set of adapters, a damaged one, or one without one of ``layers``.
            NotFiniteError: weights that are NaN or infinite.
            CheckpointError: neither a folder nor a repository that the hub gives, or a revision of a folder.
        """
        description = read_description(name, revision=revision, token=token)
        chosen = description.layers if layers is None else list(layers)
        if absent := sorted(set(chosen) - set(description.layers)):
            raise AdapterFormatError(
                f"{name} has no adapters of layers {absent}; it has those of {description.layers}."
            )
        folder = fetch(name, set_files(chosen), revision=revision, token=token)
        metadata = description.metadata
        adapters = {
            layer: adapter_of(read_layer(folder, description, layer, device), metadata.activation, metadata.k)
            for layer in chosen
        }
        result = cls(adapters, description.layer_samples, metadata, description.n_layers, description.samples)
        if description.files is None:
            result.warned = True
            log.warning(_EARLIER_VERSION, name)
        if layers is None and result.fingerprint != description.fingerprint:
            raise AdapterFormatError(
                f"The weights in {name} are not those its {SET_METADATA_FILE} was written with (fingerprint "
                f"{result.fingerprint}, expected {description.fingerprint}): files of two sets were mixed, or cast. "
                "Copy the whole folder again."
            )
        result.require_finite(str(name))
        return result
