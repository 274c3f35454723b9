"""PairedModel: one TransformerLens model that computes the target, the hybrid and the replacement.

The target's embeddings, attention, norms and unembedding are held once. Each layer holds the target's MLP, the base's
MLP and an adapter, and a *route* says which of them compute:

    route            MLP       adapter
    "target"         target    off        the model to explain
    "hybrid"         base      off        the paper's baseline: how far attention alone gets
    "replacement"    base      on         what is trained and analyzed
    "target+adapter" target    on         for negated adapters on the real target

Routes are per layer, so partial replacement (the replacement on some layers, the target on the others) is a mix of
rows. The model is a HookedTransformer or a TransformerBridge (`build`), with the same hook names:

    blocks.7.mlp                        the target's MLP, with its names and weights
    blocks.7.mlp.hook_in                the input of the MLP and of the adapter
    blocks.7.mlp.hook_pre, hook_post    of whichever MLP computes
    blocks.7.mlp.adapter.hook_sae_...   input, acts_pre, acts_post, recons (SAELens's names)
    blocks.7.mlp.hook_adapter_out       the adapter's output; zeros where it is off
    blocks.7.hook_mlp_out               the sum of the MLP's output and the adapter's

A pair may also be *planted* (`PairedModel.plant`): its target is the base with known features added to every MLP,
MLP_target(x) = MLP_base(x) + P(x), which adapters should find again (blocks.7.mlp.planted.hook_sae_...).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.metadata import AdapterMetadata
from tl_adapters.adapters.transcoder import TranscoderAdapter
from tl_adapters.checkpoints.base_mlps import MLPTensors, read_base_mlps
from tl_adapters.checkpoints.compatibility import require_pair
from tl_adapters.checkpoints.device_map import DeviceMap, DeviceMapError, MappedDevices, MaxMemory
from tl_adapters.checkpoints.hf_model import load_hf_model, move_model
from tl_adapters.checkpoints.layer_samples import LayerSamples
from tl_adapters.checkpoints.model_reference import (
    GivenModel,
    ModelReference,
    model_commit,
    model_config,
    model_name,
    resolve_model,
)
from tl_adapters.config import ActivationName, TrainingConfig
from tl_adapters.models.adapter_checks import adapter_scale, require_belonging, require_planted
from tl_adapters.models.build import build_model, require_mapping_backend
from tl_adapters.models.hf_outputs import record_hf_outputs
from tl_adapters.models.output_agreement import require_hybrid
from tl_adapters.models.routed_model import RoutedModel
from tl_adapters.models.weight_identity import BaseIdentity, ModelSamples, layer_samples, target_fingerprints
from tl_adapters.utils.devices import GivenDtype, resolve_device, resolve_dtype
from tl_adapters.utils.precision import adapter_dtype
from tl_adapters.utils.renamed import renamed_arguments, renamed_attributes

if TYPE_CHECKING:
    from tl_adapters.data.traces import Trace
    from tl_adapters.evaluation.pair_check import PairCheck
    from tl_adapters.interventions.feature_edits import Features, Positions

ACTS_HOOK = "mlp.adapter.hook_sae_acts_post"
"""The hook point of the feature activations, within a block."""
PRE_ACTS_HOOK = "mlp.adapter.hook_sae_acts_pre"
"""The hook point of the activation function's input, within a block."""

F = TypeVar("F", bound=Callable[..., Any])


@renamed_attributes(marks="layer_samples")
class PairedModel(RoutedModel):
    """A base / target pair as one TransformerLens model (`model`) with a route per layer.

    Args:
        model: the target, a HookedTransformer or a TransformerBridge; its MLPs are changed in place.
        base_mlps: the base's MLPs, a mapping per layer; None for a model without a base, whose adapters can only be
            added to its own MLPs (see `attach`).
        base, target: ids or folders, recorded in every adapter set made here.
        ln2_weights: the target's second-norm weights per layer, needed where ``model`` has them folded into its MLPs.
        revisions: hub commits of base and target, where known.
    """

    def __init__(
        self,
        model: Any,
        base_mlps: Sequence[MLPTensors] | None,
        base: str = "",
        target: str = "",
        *,
        ln2_weights: Sequence[Tensor] | None = None,
        revisions: tuple[str | None, str | None] = (None, None),
    ) -> None:
        super().__init__(model, base_mlps, ln2_weights)
        self.base_id, self.target_id, self.revisions = base, target, revisions
        self._base_identity = None if base_mlps is None else BaseIdentity.of(base_mlps)
        self.hf_probe: tuple[Tensor, Tensor] | None = None  # tokens, and the logits of the target's Hugging Face model

    def __repr__(self) -> str:
        n = 0 if self.adapters is None else self.adapters.n_features
        adapters = f"adapters of {n:,} features a layer" if n else "no adapters"
        names = f"{self.target_id or 'an unnamed target'} and {self.base_id or 'an unnamed base'}"
        return f"PairedModel of {names}: {self.n_layers} layers, {adapters}, on {self.device}"

    @classmethod
    def from_pretrained(
        cls,
        base: GivenModel,
        target: GivenModel,
        *,
        dtype: GivenDtype | None = None,
        device: torch.device | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        backend: str | None = None,
        device_map: DeviceMap | None = None,
        max_memory: MaxMemory | None = None,
    ) -> PairedModel:
        """A pair from folders, hub names or models in memory.

        The target is loaded once; of the base only the MLP tensors are read. Models in memory are not copied. The
        outputs of the pair are compared, layer by layer, with those of the Hugging Face models (`output_agreement`).

        Args:
            base, target: a folder, a hub name, or a Hugging Face model in memory (compiled, too), with LoRA merged.
            dtype: of the model's weights, torch.bfloat16 or "bfloat16"; None keeps the target's own.
            device: where the weights go. For a folder or a hub name None is "auto", the first available of cuda, mps
                and cpu. A model in memory stays where it is if None, and is otherwise moved and cast in place, as its
                own ``.to`` does.
            tokenizer: the target's; None reads it from the target's folder, where there is one.
            backend: "hooked" or "bridge" (`build`); None takes the first that the installed TransformerLens has.
            device_map, max_memory: in place of ``device``, for a pair that does not fit one (`resolve_device_map`). The
                base's MLP and the adapter of a layer are on its device.

        Raises:
            UnsupportedModelError: an architecture or option that would not be exact.
            DisagreementError: a model whose outputs differ from what its configuration and weights say.
            PairMismatchError: MLPs of different shapes or activations.
            CheckpointError, TokenizerError: missing or damaged files.
            DeviceError, DeviceMapError: a device that this machine lacks or a wrong dtype, a map that does not fit.
        """
        base, target, dtype = resolve_model(base, "base"), resolve_model(target, "target"), resolve_dtype(dtype)
        require_pair(base, target)
        base_mlps = read_base_mlps(base, model_config(target)["num_hidden_layers"])
        if device_map is not None or max_memory is not None:
            _require_mappable(target, device, backend, device_map)
        if isinstance(target, PreTrainedModel):
            hf_target = move_model(target, None if device is None else resolve_device(device), dtype)
        else:
            where = resolve_device(device) if device_map is None else MappedDevices(device_map, max_memory)
            hf_target, tokenizer = load_hf_model(target, dtype=dtype, device=where, tokenizer=tokenizer)
        base_in_memory = base if isinstance(base, PreTrainedModel) else None
        hf_outputs = record_hf_outputs(hf_target, tokenizer, base_in_memory, base_mlps)
        pair = cls(
            build_model(hf_target, tokenizer, backend, hf_outputs),
            base_mlps,
            base=model_name(base),
            target=model_name(target),
            revisions=(model_commit(base), model_commit(target)),
        )
        require_hybrid(pair.mlps, hf_outputs)
        pair.hf_probe = None if hf_outputs is None else hf_outputs.probe
        return pair

    @classmethod
    def plant(
        cls,
        base: GivenModel,
        adapters: AdapterSet,
        *,
        target: GivenModel | None = None,
        dtype: GivenDtype | None = None,
        device: torch.device | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        backend: str | None = None,
    ) -> PairedModel:
        """A pair with a known answer: the target is ``base`` with ``adapters`` added to its MLPs, the hybrid ``base``.

        The planted features are a frozen copy. Any set of the base's depth and width can be planted, whatever models
        it was trained on.

        Args:
            base: a folder, a hub name, or a Hugging Face model already loaded.
            adapters: the features to plant, of all layers or some.
            target: the model to which the features are added; None is the base. Whatever else differs between it and
                the base is then part of the pair's difference.
            dtype, device, tokenizer, backend: as in `from_pretrained`.

        Raises:
            PairMismatchError: adapters of another depth or width, or transcoders that replace an MLP's output.
            UserError: whatever `from_pretrained` raises.
        """
        target = base if target is None else target
        pair = cls.from_pretrained(base, target, dtype=dtype, device=device, tokenizer=tokenizer, backend=backend)
        planted = copy.deepcopy(adapters).requires_grad_(False)
        planted.layer_samples = planted.samples = None
        require_belonging(planted, pair.backend, "", None, "")
        for layer in planted.layer_indices:
            planted[layer].to(pair.backend.layer_device(layer))
            scale = adapter_scale(planted, pair.backend, layer)
            if scale is not None:  # into the encoder: the frozen copy then reads what the MLP reads
                planted[layer].W_enc.mul_(scale.to(planted[layer].W_enc)[:, None])
            pair.mlps[layer].planted = planted[layer]
        pair.planted = planted
        pair.target_id = f"{pair.target_id} with planted features {pair.fingerprints['planted']}"
        pair.backend.name_hooks()
        return pair

    # -- identity -------------------------------------------------------------------------------------------------

    @property
    def fingerprints(self) -> dict[str, str]:
        """Content hashes of the target's present weights (`target_fingerprints`) and of the base's MLPs as read.

        The base's are "base_mlps", taken in the dtype "base_dtype". `fingerprints.differing` compares two of these.
        """
        target, base = target_fingerprints(self.backend, self.planted), self._base_identity
        return target if base is None else {"base_mlps": base.fingerprint, "base_dtype": base.dtype, **target}

    @property
    def samples(self) -> dict[str, Tensor]:
        """Values of every weight of target and base, by which adapters identify them (`AdapterSet.samples`)."""
        base = {} if self._base_identity is None else self._base_identity.samples
        return {**ModelSamples.of(self.backend).values, **base}

    @property
    def layer_samples(self) -> list[LayerSamples]:
        """The samples of each layer that adapters keep. Raises PairMismatchError for a model they cannot train on."""
        return layer_samples(self.backend, self.samples, self.has_base)

    # -- adapters -------------------------------------------------------------------------------------------------

    def new_adapters(
        self,
        n_features: int,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        activation: ActivationName = "relu",
        k: int | None = None,
        bandwidth: float = TrainingConfig.bandwidth,
    ) -> AdapterSet:
        """Install fresh adapters (zero decoders: the replacement equals the hybrid) and return them.

        Args: as `TranscoderAdapter`. Raises ConfigError for an unknown activation, or a k that it does not take.
        """
        generator = torch.Generator().manual_seed(seed)
        options: dict[str, Any] = dict(activation=activation, k=k, bandwidth=bandwidth, dtype=dtype, device=self.device)
        new = partial(TranscoderAdapter, self.model.cfg.d_model, n_features, generator=generator, **options)
        layers = [new() for _ in range(self.n_layers)]
        base_revision, target_revision = self.revisions
        metadata = AdapterMetadata(
            base=self.base_id, target=self.target_id, base_revision=base_revision, target_revision=target_revision,
            fingerprints=self.fingerprints, activation=activation, k=k,
        )  # fmt: skip
        adapters = AdapterSet(layers, self.layer_samples, metadata, samples=self.samples)
        self.load_adapters(adapters)
        return adapters

    def load_adapters(self, adapters: AdapterSet) -> None:
        """Put adapters in place; they share their weights with ``adapters``.

        Raises PairMismatchError where depth, width or content show that they belong elsewhere, and NotFiniteError.
        """
        fingerprints, samples = self.fingerprints, getattr(self._base_identity, "samples", None)
        require_planted(adapters, fingerprints.get("planted"), self.target_id)
        adapters.require_finite("These adapters")
        require_belonging(adapters, self.backend, self.target_id, samples, self.base_id, fingerprints)
        scales = {layer: adapter_scale(adapters, self.backend, layer) for layer in adapters.layer_indices}
        adapters.compute_in(adapter_dtype(self.model.cfg.dtype, self.device))
        self.place_adapters(adapters, scales)

    def check(self, traces: Sequence[Trace] | None = None) -> PairCheck:
        """A first look, on the model organism's sums if no documents are given; raises what `check_pair` raises."""
        from tl_adapters.evaluation import pair_check

        return pair_check.check_pair(self, pair_check.sums_to_read(self) if traces is None else traces)

    # -- changes of features: shorthand for the functions of these names --------------------------------------------

    def ablated(self, features: Features, positions: Positions = None) -> Any:
        """Chosen features are off (`feature_edits.ablated`). Raises what that raises."""
        from tl_adapters.interventions import feature_edits

        return feature_edits.ablated(self, features, positions)

    def scaled(self, features: Features, factor: float, positions: Positions = None) -> Any:
        """Chosen features fire ``factor`` times as strongly (`feature_edits.scaled`). Raises what that raises."""
        from tl_adapters.interventions import feature_edits

        return feature_edits.scaled(self, features, factor, positions)

    def clamped(self, features: Features, value: float, positions: Positions = None) -> Any:
        """Chosen features have one activation (`feature_edits.clamped`). Raises what that raises."""
        from tl_adapters.interventions import feature_edits

        return feature_edits.clamped(self, features, value, positions)

    def added(self, features: Features, value: float, positions: Positions = None) -> Any:
        """Chosen features have so much more activation (`feature_edits.added`). Raises what that raises."""
        from tl_adapters.interventions import feature_edits

        return feature_edits.added(self, features, value, positions)

    def patched(self, features: Features, source: Mapping[int, Tensor], positions: Positions = None) -> Any:
        """Chosen features have the activations of another run (`feature_edits.patched`). Raises what that raises."""
        from tl_adapters.interventions import feature_edits

        return feature_edits.patched(self, features, source, positions)

    def inserted(self, features: Features, factor: float = 1.0) -> Any:
        """The hybrid with chosen features added, nothing else of the adapters. Raises as `feature_edits.inserted`."""
        from tl_adapters.interventions import feature_edits

        return feature_edits.inserted(self, features, factor)

    @renamed_arguments(scale="factor")
    def negated(self, features: Features, factor: float = -0.5) -> Any:
        """The target with chosen features added ``factor`` times to its MLPs. Raises as `feature_edits.negated`."""
        from tl_adapters.interventions import feature_edits

        return feature_edits.negated(self, features, factor)


def _require_mappable(
    target: ModelReference, device: torch.device | str | None, backend: str | None, device_map: DeviceMap | None
) -> None:
    """Raises DeviceMapError for what cannot be given together with a device map."""
    if device_map is None:
        raise DeviceMapError('max_memory= limits a plan of devices; give device_map="auto" with it.')
    if device is not None:
        raise DeviceMapError(f"device={str(device)!r} and device_map= were given; give one of them.")
    if isinstance(target, PreTrainedModel):
        raise DeviceMapError(
            "device_map= was given with a target in memory. Give its folder or hub name: the map says where each part "
            "of it is loaded."
        )
    require_mapping_backend(backend)


def adapters_in_float32(function: F) -> F:
    """Decorator: a function of a pair computes with the pair's adapters in float32 at least, whatever their dtype."""

    @wraps(function)
    def in_float32(pair: PairedModel, *args: Any, **kwargs: Any) -> Any:
        with pair.installed_adapters().in_float32():
            return function(pair, *args, **kwargs)

    return cast(F, in_float32)
