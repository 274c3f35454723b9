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
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tl_adapters.adapter import AdapterMetadata, AdapterSet, TranscoderAdapter
from tl_adapters.architectures import load_hf_model
from tl_adapters.backends import backend_of, build_model
from tl_adapters.checkpoints import (
    MLP_KEY,
    PROJECTIONS,
    commit_of,
    locate,
    mlp_tensor_names,
    read_config,
    read_tensors,
    read_vocabulary,
)
from tl_adapters.compatibility import PairMismatchError, compare_configs, compare_vocabularies, require_fit
from tl_adapters.fingerprints import fingerprint
from tl_adapters.marks import MLPTensors, TargetLayer, base_fingerprint, target_layer
from tl_adapters.routing import ROUTES, Route, RoutedMLP

log = logging.getLogger(__name__)


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
        self.has_base = base_mlps is not None
        if base_mlps is not None:
            _require_shapes(base_mlps, self.backend.described)
        self._base_fingerprint = base_fingerprint(base_mlps) if base_mlps is not None else None
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
        base: str | Path | PreTrainedModel,
        target: str | Path | PreTrainedModel,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        backend: str | None = None,
    ) -> PairedModel:
        """A pair from folders, hub names or models in memory.

        The target is loaded once; of the base only the MLP tensors are read. Models in memory are not copied.

        Args:
            base, target: a folder, a hub name, or a Hugging Face model already loaded.
            dtype: of the model's weights; None keeps the target's own.
            device: where the weights go; None leaves them where they are (a folder's on the CPU). A model in memory
                is moved and cast in place, as its own ``.to`` does.
            tokenizer: the target's; None reads it from the target's folder, where there is one.
            backend: "hooked" (HookedTransformer) or "bridge" (TransformerBridge); None takes the first that the
                installed TransformerLens has.

        Raises:
            UnsupportedModelError: an architecture or option that would not be exact.
            PairMismatchError: MLPs of different shapes or activations.
            CheckpointError: missing or damaged files.
        """
        _require_pair(base, target)
        base_mlps = read_base_mlps(base, _config(target)["num_hidden_layers"])
        if isinstance(target, PreTrainedModel):
            hf_target = target.to(device=device or target.device, dtype=dtype or target.dtype)
        else:
            hf_target, tokenizer = load_hf_model(target, dtype, device, tokenizer)
        return cls(
            build_model(hf_target, tokenizer, backend),
            base_mlps,
            base=model_name(base),
            target=model_name(target),
            revisions=(_commit(base), _commit(target)),
        )

    @property
    def fingerprints(self) -> dict[str, str]:
        """Content hashes of the target's weights as they are here, and of the base's MLPs as they were read."""
        weights = [
            (f"{layer}.{name}", weight)
            for layer in range(self.n_layers)
            for name, weight in self.backend.named_weights(layer)
        ]
        found = {"target": fingerprint([*weights, ("unembedding", self.backend.unembedding())])}
        return found if self._base_fingerprint is None else {"base_mlps": self._base_fingerprint, **found}

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
        mlps, chosen = self.mlps, range(self.n_layers) if layers is None else layers
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

    def new_adapters(self, n_features: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> AdapterSet:
        """Install fresh adapters (zero decoders: the replacement equals the hybrid) and return them."""
        generator = torch.Generator().manual_seed(seed)
        d_model, device = self.model.cfg.d_model, self.model.W_E.device
        layers = [
            TranscoderAdapter(d_model, n_features, generator=generator, dtype=dtype, device=device)
            for _ in range(self.n_layers)
        ]
        about = AdapterMetadata(
            base=self.base_id,
            target=self.target_id,
            base_revision=self.revisions[0],
            target_revision=self.revisions[1],
            fingerprints=self.fingerprints,
        )
        adapters = AdapterSet(layers, self.target_layers, about)
        self.load_adapters(adapters)
        return adapters

    def load_adapters(self, adapters: AdapterSet) -> None:
        """Put adapters in place; they share their weights with ``adapters``.

        Raises PairMismatchError where depth, width, the target's marks or the base's content show that they belong
        elsewhere.
        """
        if adapters.metadata.writes != "adapter_out":
            raise PairMismatchError(
                "These transcoders stand in place of the MLP (they write its output); adapters are added to it. Use "
                "them with SAELens's HookedSAETransformer.add_sae."
            )
        cfg = self.model.cfg
        if (adapters.n_layers, adapters.d_model) != (cfg.n_layers, cfg.d_model):
            raise PairMismatchError(
                f"The adapters have {adapters.n_layers} layers of width {adapters.d_model}; "
                f"the model has {cfg.n_layers} of width {cfg.d_model}."
            )
        scales = {layer: self._adapter_scale(adapters, layer) for layer in adapters.layer_indices}
        self._require_target(adapters)
        self._require_base(adapters)
        self.adapters = adapters.to(self.model.W_E.device)
        for layer, mlp in enumerate(self.mlps):
            mlp.adapter = adapters[layer] if layer in scales else None
            scale = scales.get(layer)
            mlp.adapter_scale = None if scale is None else scale.to(self.model.W_E.device, adapters[layer].W_enc.dtype)
        self.backend.name_hooks()

    def _adapter_scale(self, adapters: AdapterSet, layer: int) -> Tensor | None:
        """What brings the MLP's input to what the adapter reads; None where it is that."""
        here, known = self.backend.second_norm(layer), adapters.target_layers
        if adapters.metadata.reads == "normalized":
            if here is not None and bool((here == 0).any()):
                raise PairMismatchError(
                    f"The second norm of layer {layer} has weights that are 0, so what stands before it cannot be had "
                    "from the MLP's input. Give adapters that read mlp_input, or fold the model's norms."
                )
            return None if here is None else 1 / here.float()
        if here is None and known is None:
            raise PairMismatchError(
                "The model's second norms are folded, and these adapters, which read the MLP's input, do not carry "
                "their weights. Load the model with from_pretrained_no_processing."
            )
        return known[layer].ln2_w if here is None and known is not None else None

    def _require_target(self, adapters: AdapterSet) -> None:
        """Is this model the adapters' target? By content, where the adapters know it."""
        theirs_id = adapters.metadata.target or "another target"
        by_name = (adapters.metadata.target, self.target_id)
        if adapters.target_layers is None and all(by_name) and len({_last(name) for name in by_name}) > 1:
            raise PairMismatchError(
                f"These adapters carry no marks of their target, and by name it is {theirs_id}; the model is "
                f"{self.target_id}. Give the whole set as it was saved, which knows its target by content."
            )
        for layer, known in (adapters.target_layers or {}).items():
            norm = self.backend.second_norm(layer)
            here = target_layer(known.ln2_w if norm is None else norm, self._attention_out(layer))
            if what := here.differs_from(known):
                raise PairMismatchError(
                    f"The adapters were trained on {theirs_id}: the weights of the {what} at layer {layer} differ from "
                    f"those of {self.target_id or 'this model'} (another model, or one processed in another way)."
                )

    def _require_base(self, adapters: AdapterSet) -> None:
        """Are these the base MLPs that the adapters were trained beside? By content, or by name where that is known."""
        theirs, recorded = adapters.metadata.fingerprints.get("base_mlps"), adapters.metadata.base
        if self._base_fingerprint is None or theirs == self._base_fingerprint:
            return
        same_name = _last(self.base_id) in (_last(recorded), _last(adapters.metadata.source))
        if theirs is None and (not recorded or not self.base_id or same_name):
            return
        says = (
            f"The adapters were trained beside the MLPs of {recorded or 'another base'} (fingerprint {theirs}), and "
            f"these are of {self.base_id or 'another model'} ({self._base_fingerprint})."
        )
        if not same_name:
            raise PairMismatchError(f"{says} Give the base they were trained with.")
        log.warning("%s The names agree: is one of them a copy in another dtype?", says)

    def installed_adapters(self) -> AdapterSet:
        """The adapters in place. Raises PairMismatchError where there are none."""
        if self.adapters is None:
            raise PairMismatchError(
                "This pair has no adapters yet; call load_adapters(...) or new_adapters(...) first."
            )
        return self.adapters

    @property
    def target_layers(self) -> list[TargetLayer]:
        """What an adapter set keeps of the target. Raises PairMismatchError where the norms are folded."""
        kept = []
        for layer in range(self.n_layers):
            norm = self.backend.second_norm(layer)
            if norm is None:
                raise PairMismatchError(
                    "The model's second norms are folded into its MLPs; train adapters on one that is loaded with "
                    "from_pretrained_no_processing."
                )
            kept.append(target_layer(norm, self._attention_out(layer)))
        return kept

    def release(self) -> Any:
        """Take everything out of the model again and return it as it was before: weights, classes, hook points."""
        for layer in range(self.n_layers):
            self.backend.uninstall(layer)
        self.backend.name_hooks()
        self.adapters = None
        return self.model

    def _attention_out(self, layer: int) -> Tensor:
        return next(w for name, w in self.backend.named_weights(layer) if name == "self_attn.o_proj")

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
        """Final norm and unembedding."""
        flat = resid.flatten(0, -2)[None]
        return self.backend.unembed(flat)[0].unflatten(0, resid.shape[:-1])

    @property
    def rows_at_once(self) -> int:
        """Rows of logits to form at a time: 64 MB of them in float32, whatever the vocabulary."""
        return max(1, 2**24 // self.model.cfg.d_vocab)


ACTIVATIONS = "mlp.adapter.hook_sae_acts_post"
"""The hook point of the feature activations, within a block."""


def model_name(model: str | Path | PreTrainedModel) -> str:
    """Id or folder of a model, as adapters record it."""
    return model.config.name_or_path if isinstance(model, PreTrainedModel) else str(model)


def _config(model: str | Path | PreTrainedModel) -> dict[str, Any]:
    return model.config.to_dict() if isinstance(model, PreTrainedModel) else read_config(locate(model, weights=False))


def _require_pair(base: str | Path | PreTrainedModel, target: str | Path | PreTrainedModel) -> None:
    """Refuse what does not fit and warn of what differs, before a weight is read. Raises PairMismatchError."""
    findings = compare_configs(_config(base), _config(target))
    if not isinstance(base, PreTrainedModel) and not isinstance(target, PreTrainedModel):
        base_vocabulary, vocabulary = (read_vocabulary(locate(m, weights=False)) for m in (base, target))
        if base_vocabulary and vocabulary:
            findings += compare_vocabularies(base_vocabulary, vocabulary)
    require_fit(findings)
    for finding in findings:
        if finding.level == "warning":
            log.warning("%s", finding)


def read_base_mlps(base: str | Path | PreTrainedModel, n_layers: int) -> list[MLPTensors]:
    """The base's MLP weights per layer, as they are stored; nothing else of it is read. Raises CheckpointError."""
    names = mlp_tensor_names(n_layers)
    if isinstance(base, PreTrainedModel):
        state = base.state_dict()
        tensors = {name: state[name].detach() for name in names}
    else:
        tensors = read_tensors(locate(base), names)
    return [{name: tensors[MLP_KEY.format(layer, name)] for name in PROJECTIONS} for layer in range(n_layers)]


def _require_shapes(base_mlps: Sequence[MLPTensors], target: Mapping[str, Any]) -> None:
    """Raises PairMismatchError where the base's MLPs are not of the target's number and shape."""
    if len(base_mlps) != target["num_hidden_layers"]:
        raise PairMismatchError(f"The base has {len(base_mlps)} layers; the target {target['num_hidden_layers']}.")
    wide = (target["intermediate_size"], target["hidden_size"])
    for name, expected in (("gate_proj", wide), ("up_proj", wide), ("down_proj", wide[::-1])):
        for mlp in base_mlps:
            if tuple(mlp[name].shape) != expected:
                raise PairMismatchError(
                    f"The base's {name} has shape {tuple(mlp[name].shape)}; the target's {expected}."
                )


def _commit(model: str | Path | PreTrainedModel) -> str | None:
    return None if isinstance(model, PreTrainedModel) else commit_of(locate(model, weights=False))


def _last(name: str) -> str:
    """The part of an id or path that copies of a model usually share."""
    return name.rstrip("/").rpartition("/")[2].lower()
