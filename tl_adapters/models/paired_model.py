"""PairedModel: one TransformerLens model that computes the target, the hybrid and the replacement.

The target's embeddings, attention, norms and unembedding are there once. At each layer stand the target's MLP, the
base's MLP and an adapter, and a *route* says which of them compute:

    route            MLP       adapter
    "target"         target    off        the model to explain
    "hybrid"         base      off        the paper's baseline: how far attention alone gets
    "replacement"    base      on         what is trained and analysed
    "target+adapter" target    on         for negated adapters on the real target

Routes are per layer, so partial replacement and both bridges of the objective are mixes of rows. The model is a
HookedTransformer or a TransformerBridge (`backends`), with the same names:

    blocks.7.mlp                        the target's MLP, with its names and weights
    blocks.7.mlp.hook_in                what the MLP and the adapter read
    blocks.7.mlp.hook_pre, hook_post    of whichever MLP computes
    blocks.7.mlp.adapter.hook_sae_...   input, acts_pre, acts_post, recons (SAELens's names)
    blocks.7.mlp.hook_adapter_out       what the adapter adds; zeros where it is off
    blocks.7.hook_mlp_out               all of it together

A pair may also be *planted* (`PairedModel.plant`): its target is the base with known features added to every MLP,
MLP_target(x) = MLP_base(x) + P(x), which adapters should find again (blocks.7.mlp.planted.hook_sae_...).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tl_adapters.adapters.adapter_set import AdapterMetadata, AdapterSet, TranscoderAdapter
from tl_adapters.checkpoints.base_mlps import (
    GivenModel,
    MLPTensors,
    base_fingerprint,
    model_commit,
    model_config,
    model_name,
    read_base_mlps,
    require_pair,
    require_shapes,
    resolve,
)
from tl_adapters.checkpoints.compatibility import PairMismatchError
from tl_adapters.checkpoints.fingerprints import fingerprints
from tl_adapters.checkpoints.hf_model import load_hf_model, moved
from tl_adapters.checkpoints.layer_samples import LayerSamples, dtype_name
from tl_adapters.config import ActivationName, TrainingConfig
from tl_adapters.models.adapter_checks import adapter_scale, require_belonging
from tl_adapters.models.build import backend_of, build_model
from tl_adapters.models.hf_outputs import record_hf_outputs
from tl_adapters.models.output_agreement import require_hybrid
from tl_adapters.models.routed_mlp import ROUTES, Route, RoutedMLP
from tl_adapters.models.weight_identity import ModelSamples, base_samples
from tl_adapters.utils.arguments import whole_numbers
from tl_adapters.utils.devices import resolve_device

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])


class PairedModel:
    """A base / target pair as one TransformerLens model (`model`) with a route per layer.

    Args:
        model: the target, a HookedTransformer or a TransformerBridge; its MLPs are changed in place.
        base_mlps: the base's MLPs, a mapping per layer; None for a model without a base, whose adapters can only stand
            beside its own MLPs (see `attach`).
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
        self.backend = backend_of(model)
        self.model = model
        self.base_id, self.target_id, self.revisions = base, target, revisions
        self.adapters: AdapterSet | None = None
        self.planted: AdapterSet | None = None
        self.has_base = base_mlps is not None
        if base_mlps is not None:
            require_shapes(base_mlps, self.backend.hf_config)
        self._base_fingerprint = None if base_mlps is None else base_fingerprint(base_mlps)
        self._base_samples = None if base_mlps is None else base_samples(base_mlps)
        for layer in range(self.n_layers):
            folded = base_mlps is not None and self.backend.second_norm(layer) is None
            if folded and ln2_weights is None:
                raise PairMismatchError(
                    "The model's second norms are folded into its MLPs, and the base's MLPs are not: their weights "
                    "must be known to fit the two. Load it with from_pretrained_no_processing, or attach adapters "
                    "that carry the target's norms."
                )
            scale = ln2_weights[layer].to(model.W_E.device, model.cfg.dtype) if folded and ln2_weights else None
            self.backend.install(layer, dict(base_mlps[layer]) if base_mlps is not None else None, scale)
        self.backend.name_hooks()

    @classmethod
    def from_pretrained(
        cls,
        base: GivenModel,
        target: GivenModel,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        backend: str | None = None,
    ) -> PairedModel:
        """A pair from folders, hub names or models in memory.

        The target is loaded once; of the base only the MLP tensors are read. Models in memory are not copied. What the
        pair computes is compared, layer by layer, with what the Hugging Face models compute (see `agreement`).

        Args:
            base, target: a folder, a hub name, or a Hugging Face model already loaded (compiled or in DataParallel,
                too), with LoRA merged.
            dtype: of the model's weights; None keeps the target's own.
            device: where the weights go. None is "auto" for a folder or a hub name, the first there is of cuda, mps
                and cpu, and leaves a model in memory where it is; where a device is named, that is moved there and cast
                in place, as its own ``.to`` does.
            tokenizer: the target's; None reads it from the target's folder, where there is one.
            backend: "hooked" (HookedTransformer) or "bridge" (TransformerBridge); None takes the first that the
                installed TransformerLens has.

        Raises:
            UnsupportedModelError: an architecture or option that would not be exact.
            DisagreementError: a model that computes something else than its configuration and weights say.
            PairMismatchError: MLPs of different shapes or activations.
            CheckpointError: missing or damaged files.
            DeviceError: a device that this machine does not have.
        """
        base, target = resolve(base, "base"), resolve(target, "target")
        require_pair(base, target)
        base_mlps = read_base_mlps(base, model_config(target)["num_hidden_layers"])
        if isinstance(target, PreTrainedModel):
            hf_target = moved(target, None if device is None else resolve_device(device), dtype)
        else:
            hf_target, tokenizer = load_hf_model(target, dtype, resolve_device(device), tokenizer)
        in_memory = base if isinstance(base, PreTrainedModel) else None
        hf_outputs = record_hf_outputs(hf_target, tokenizer, in_memory, base_mlps)
        pair = cls(
            build_model(hf_target, tokenizer, backend, hf_outputs),
            base_mlps,
            base=model_name(base),
            target=model_name(target),
            revisions=(model_commit(base), model_commit(target)),
        )
        require_hybrid(pair.mlps, hf_outputs)
        return pair

    @classmethod
    def plant(
        cls,
        base: GivenModel,
        adapters: AdapterSet,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        backend: str | None = None,
    ) -> PairedModel:
        """A pair with a known answer: the target is ``base`` with ``adapters`` added to its MLPs, the hybrid ``base``.

        The planted features are a frozen copy. The marks of ``adapters`` are not asked: any set of the base's depth
        and width can be planted.

        Args:
            base: a folder, a hub name, or a Hugging Face model already loaded.
            adapters: what is planted; of all layers or some.
            dtype, device, tokenizer, backend: as `from_pretrained`.

        Raises:
            PairMismatchError: adapters of another depth or width, or transcoders that stand in place of an MLP.
            And what `from_pretrained` raises.
        """
        pair = cls.from_pretrained(base, base, dtype=dtype, device=device, tokenizer=tokenizer, backend=backend)
        planted = copy.deepcopy(adapters).to(pair.model.W_E.device).requires_grad_(False)
        planted.marks = planted.samples = None
        require_belonging(planted, pair.backend, "", None, "")
        for layer in planted.layer_indices:
            scale = adapter_scale(planted, pair.backend, layer)
            if scale is not None:  # into the encoder: the frozen copy then reads what the MLP reads
                planted[layer].W_enc.mul_(scale.to(planted[layer].W_enc)[:, None])
            pair.mlps[layer].planted = planted[layer]
        pair.planted = planted
        pair.target_id = f"{pair.base_id} with planted features {pair.fingerprints['planted']}"
        pair.backend.name_hooks()
        return pair

    @property
    def fingerprints(self) -> dict[str, str]:
        """Content hashes of the target's weights as they are here, and of the base's MLPs as they were read.

        "target" is of its projections and its unembedding, "target_embedding_and_norms" of all the rest, in "dtype",
        and the base's in "base_dtype"; a target whose norms are folded is "target_processed". Planted features count as
        the target's weights, and have a hash of their own, "planted". `fingerprints.differing` compares.
        """
        weights = [
            (f"{layer}.{name}", weight)
            for layer in range(self.n_layers)
            for name, weight in self.backend.named_weights(layer)
        ]
        planted = (
            [] if self.planted is None else [(f"planted.{name}", p) for name, p in self.planted.state_dict().items()]
        )
        name = "target" if self._is_unprocessed else "target_processed"
        groups = {
            name: [*weights, ("unembedding", self.backend.unembedding()), *planted],
            f"{name}_embedding_and_norms": list(self._embedding_and_norms()),
            **({"planted": planted} if planted else {}),
        }
        found = {**fingerprints(groups), "dtype": dtype_name(self.model.cfg.dtype)}
        if self._base_fingerprint is None or self._base_samples is None:
            return found
        dtype = dtype_name(next(iter(self._base_samples.values())).dtype)
        return {"base_mlps": self._base_fingerprint, "base_dtype": dtype, **found}

    @property
    def _is_unprocessed(self) -> bool:
        return all(self.backend.second_norm(layer) is not None for layer in range(self.n_layers))

    def _embedding_and_norms(self) -> Iterator[tuple[str, Tensor]]:
        """What "target" leaves out; the same of one model in both libraries."""
        if not self.backend.architecture.scales_embedding:  # else tied, and scaled in one of the two libraries
            yield "embedding", self.backend.embedding()
        biases = [list(self.backend.projection_biases(layer)) for layer in range(self.n_layers)]
        there = [bias.any() for of_layer in biases for _, bias in of_layer]
        not_zero = iter(torch.stack(there).tolist() if there else ())  # one look at the device
        for layer, of_layer in enumerate(biases):
            yield from ((f"{layer}.{n}", weight) for n, weight in self.backend.norms(layer) if weight is not None)
            yield from ((f"{layer}.{n}", bias) for n, bias in of_layer if next(not_zero))
        if (final := self.backend.norm("ln_final")) is not None:
            yield "ln_final", final

    # -- routes ---------------------------------------------------------------------------------------------------

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return self.model.cfg.n_layers

    @property
    def mlps(self) -> list[RoutedMLP]:
        """The routed MLP of every layer."""
        return self.backend.mlps

    @property
    def routes(self) -> list[Route]:
        """The route of every layer."""
        return [mlp.route for mlp in self.mlps]

    def route_layers(self, route: str | Route, layers: Sequence[int] | range | None = None) -> None:
        """Set the route of ``layers`` (all, if None) until it is set again. Prefer `routed`, which puts it back.

        Raises ValueError for an unknown route and PairMismatchError for an adapter route without adapters.
        """
        if isinstance(route, str):
            if route not in ROUTES:
                raise ValueError(f"No route {route!r}; known routes are {', '.join(ROUTES)}.")
            route = ROUTES[route]
        n = self.n_layers
        mlps, chosen = self.mlps, range(n) if layers is None else whole_numbers(layers, n, "layers (only=)")
        if route.base_mlp and not self.has_base:
            raise PairMismatchError(
                "This model was given no base: its adapters stand beside its own MLPs. Its routes are 'target' and "
                "'target+adapter'; for the others attach with base=."
            )
        if route.adapter and (missing := [layer for layer in chosen if mlps[layer].adapter is None]):
            self.installed_adapters()
            raise PairMismatchError(
                f"There are no adapters of layers {missing}; route those there are with only=, or load the whole set."
            )
        for layer in chosen:
            mlps[layer].route = route

    @contextmanager
    def routed(
        self,
        route: str | Route | None = None,
        *,
        first: int | None = None,
        last: int | None = None,
        only: Sequence[int] | None = None,
    ) -> Iterator[Any]:
        """Route the model for the length of a block; afterwards every layer has the route it had before.

        Args:
            route: one route for the chosen layers, "replacement" if None.
            first: the first so many layers take the route, the others are the target's (partial replacement).
            last: likewise the last so many layers.
            only: likewise the layers listed.
        """
        chosen = [c is not None for c in (first, last, only)]
        if sum(chosen) > 1 or (route is None and not any(chosen)):
            raise ValueError("routed() takes a route, or exactly one of first=, last= and only= (with or without one).")
        n = self.n_layers
        if (first is not None and not 0 <= first <= n) or (last is not None and not 0 <= last <= n):
            raise ValueError(f"first= and last= count layers, from 0 to {n}; got first={first}, last={last}.")
        layers = range(n)
        if first is not None:
            layers = range(first)
        elif last is not None:
            layers = range(n - last, n)
        before = self.routes
        try:
            if any(chosen):
                self.route_layers("target")
            self.route_layers(route or "replacement", layers if only is None else only)
            yield self.model
        finally:
            for mlp, old in zip(self.mlps, before, strict=True):
                mlp.route = old

    # -- adapters -------------------------------------------------------------------------------------------------

    def new_adapters(
        self,
        n_features: int,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        *,
        activation: ActivationName = "relu",
        k: int | None = None,
        bandwidth: float = TrainingConfig.bandwidth,
    ) -> AdapterSet:
        """Install fresh adapters (zero decoders: the replacement equals the hybrid) and return them.

        Args: as `TranscoderAdapter`. Raises ConfigError for an activation that is not there, or a k it does not take.
        """
        generator = torch.Generator().manual_seed(seed)
        d_model, device = self.model.cfg.d_model, self.model.W_E.device
        layers = [
            TranscoderAdapter(
                d_model,
                n_features,
                activation=activation,
                k=k,
                bandwidth=bandwidth,
                generator=generator,
                dtype=dtype,
                device=device,
            )
            for _ in range(self.n_layers)
        ]
        about = AdapterMetadata(
            base=self.base_id,
            target=self.target_id,
            base_revision=self.revisions[0],
            target_revision=self.revisions[1],
            fingerprints=self.fingerprints,
            activation=activation,
            k=k,
        )
        adapters = AdapterSet(layers, self.marks, about, samples=self.samples)
        self.load_adapters(adapters)
        return adapters

    def load_adapters(self, adapters: AdapterSet) -> None:
        """Put adapters in place; they share their weights with ``adapters``.

        Raises PairMismatchError where depth, width or content show that they belong elsewhere, and NotFiniteError.
        """
        planted = adapters.metadata.fingerprints.get("planted")
        if planted is not None and planted != self.fingerprints.get("planted"):
            raise PairMismatchError(
                f"These adapters were trained on {adapters.metadata.target}; the target here is "
                f"{self.target_id or 'a model'} without those features. Plant them again: "
                "PairedModel.plant(base, planted)."
            )
        adapters.require_finite("These adapters")
        require_belonging(adapters, self.backend, self.target_id, self._base_samples, self.base_id, self.fingerprints)
        scales = {layer: adapter_scale(adapters, self.backend, layer) for layer in adapters.layer_indices}
        self.adapters = adapters.to(self.model.W_E.device)
        for layer, mlp in enumerate(self.mlps):
            mlp.adapter = adapters[layer] if layer in scales else None
            scale = scales.get(layer)
            dtype = torch.promote_types(adapters[layer].W_enc.dtype, torch.float32) if layer in scales else None
            mlp.adapter_scale = None if scale is None else scale.to(self.model.W_E.device, dtype)
        self.backend.name_hooks()

    def installed_adapters(self) -> AdapterSet:
        """The adapters in place. Raises PairMismatchError where there are none."""
        if self.adapters is None:
            raise PairMismatchError(
                "This pair has no adapters yet; call load_adapters(...) or new_adapters(...) first."
            )
        return self.adapters

    @property
    def marks(self) -> list[LayerSamples]:
        """What adapters keep of these models. Raises PairMismatchError for a model that they cannot be trained on."""
        if self._base_samples is None:
            raise PairMismatchError("This model was given no base; train adapters on a pair that has one.")
        norms = [self.backend.second_norm(layer) for layer in range(self.n_layers)]
        if None in norms:
            raise PairMismatchError(
                "The model's second norms are folded into its MLPs; train adapters on one that is loaded with "
                "from_pretrained_no_processing."
            )
        known = self.samples
        return [
            LayerSamples(norm, known[f"{layer}.self_attn.o_proj"], known[f"base.{layer}.mlp.down_proj"])
            for layer, norm in enumerate(norms)
            if norm is not None
        ]

    @property
    def samples(self) -> dict[str, Tensor]:
        """Values of every weight of target and base, by which adapters know them (`AdapterSet.samples`)."""
        return {**ModelSamples.of(self.backend).values, **(self._base_samples or {})}

    def release(self) -> Any:
        """Take everything out of the model again and return it as it was before: weights, classes, hook points."""
        for layer in range(self.n_layers):
            self.backend.uninstall(layer)
        self.backend.name_hooks()
        self.adapters = self.planted = None
        return self.model

    # -- running parts of the model -------------------------------------------------------------------------------

    def embed(
        self, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream before block 0."""
        return self.backend.embed(tokens, attention_mask)

    def run_blocks(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        start: int,
        stop: int,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Blocks start..stop-1 on the present routes."""
        return self.backend.run_blocks(resid, start, stop, attention_mask)

    def residual_streams(self, tokens: Int[Tensor, "batch pos"]) -> list[Float[Tensor, "batch pos d_model"]]:
        """The residual stream at the embedding and after every layer, on the present routes. No left padding."""
        streams = [self.embed(tokens)]
        for layer in range(self.n_layers):
            streams.append(self.run_blocks(streams[-1], layer, layer + 1))
        return streams

    @contextmanager
    def recorded(self, point: str) -> Iterator[dict[int, Tensor]]:
        """Layer -> the latest value, with its graph, at ``blocks.{layer}.{point}``, for the length of a block."""
        latest: dict[int, Tensor] = {}

        def keep(value: Tensor, hook: HookPoint, layer: int) -> None:
            latest[layer] = value

        hooks = [(f"blocks.{layer}.{point}", partial(keep, layer=layer)) for layer in range(self.n_layers)]
        with self.model.hooks(fwd_hooks=hooks):
            yield latest

    def unembed(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """Final norm and unembedding; logits are in float32 at least.

        A bfloat16 or float16 model itself rounds logits to its own dtype (bfloat16 to steps of 0.125 around 20), which
        is more noise than many a divergence that is measured here.
        """
        flat = resid.flatten(0, -2)[None]
        return self.backend.unembed(flat)[0].unflatten(0, resid.shape[:-1])

    def read_by_unembedding(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What the unembedding reads: the final norm's output, in float32 at least."""
        weight, eps = self.backend.norm("ln_final"), self.model.cfg.eps
        resid = resid.to(torch.promote_types(resid.dtype, torch.float32))
        normalized = resid / (resid.square().mean(-1, keepdim=True) + eps).sqrt()
        return normalized if weight is None else normalized * weight.to(resid.dtype)

    @property
    def rows_at_once(self) -> int:
        """Rows of logits to form at a time: 64 MB of them in float32, whatever the vocabulary."""
        return max(1, 2**24 // self.model.cfg.d_vocab)


def adapters_in_float32(function: F) -> F:
    """A function of a pair that computes with the pair's adapters in float32 at least, whatever they are kept in."""

    @wraps(function)
    def in_float32(pair: PairedModel, *args: Any, **kwargs: Any) -> Any:
        with pair.installed_adapters().in_float32():
            return function(pair, *args, **kwargs)

    return cast(F, in_float32)


ACTS_HOOK = "mlp.adapter.hook_sae_acts_post"
"""The hook point of the feature activations, within a block."""
PRE_ACTS_HOOK = "mlp.adapter.hook_sae_acts_pre"
"""The hook point of what the activation function reads, within a block."""
