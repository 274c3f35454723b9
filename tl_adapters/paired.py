"""PairedModel: one TransformerLens model that computes the target, the hybrid and the replacement.

The target's embeddings, attention, norms and unembedding are there once. At each layer stand the target's MLP, the
base's MLP and an adapter, and a *route* says which of them compute:

    route            MLP       adapter
    "target"         target    off        the model to explain
    "hybrid"         base      off        the paper's baseline: how far attention alone gets
    "replacement"    base      on         what is trained and analysed
    "target+adapter" target    on         for negated adapters on the real target

Routes are per layer, so partial replacement and both bridges of the objective are mixes of rows.

    blocks.7.mlp                        the target's MLP object, with its names and weights
    blocks.7.mlp.hook_in                what the MLP and the adapter read
    blocks.7.mlp.hook_pre, hook_post    of whichever MLP computes
    blocks.7.mlp.adapter.hook_sae_...   input, acts_pre, acts_post, recons (SAELens's names)
    blocks.7.mlp.hook_adapter_out       what the adapter adds; zeros where it is off
    blocks.7.hook_mlp_out               all of it together
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformer_lens.components.mlps.gated_mlp import GatedMLP
from transformer_lens.hook_points import HookPoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tl_adapters.adapter import AdapterMetadata, AdapterSet, TranscoderAdapter
from tl_adapters.backends import build_hooked_transformer, load_hooked_transformer
from tl_adapters.checkpoints import MLP_KEY, locate, mlp_tensor_names, read_config, read_tensors, read_vocabulary
from tl_adapters.compatibility import PairMismatchError, compare_configs, compare_vocabularies, require_fit
from tl_adapters.fingerprints import fingerprint

log = logging.getLogger(__name__)


class Route(NamedTuple):
    """What computes at one layer."""

    base_mlp: bool
    """The base's MLP instead of the target's."""
    adapter: bool
    """The adapter's output is added."""


ROUTES = {
    "target": Route(base_mlp=False, adapter=False),
    "hybrid": Route(base_mlp=True, adapter=False),
    "replacement": Route(base_mlp=True, adapter=True),
    "target+adapter": Route(base_mlp=False, adapter=True),
}


class PairedMLP(GatedMLP):
    """The target's MLP, which can hand over to the base's and add an adapter. Its weights are the target's.

    An existing GatedMLP becomes one (`PairedMLP.adopt`), so names, weight properties and deepcopy keep working.
    """

    base: GatedMLP
    adapter: TranscoderAdapter | None
    hook_in: HookPoint
    hook_adapter_out: HookPoint
    route: Route

    @classmethod
    def adopt(cls, mlp: GatedMLP, base: GatedMLP) -> PairedMLP:
        """Turn the target's ``mlp`` into a PairedMLP in place, with ``base`` beside it."""
        mlp.__class__ = cls
        assert isinstance(mlp, PairedMLP)
        # Shared hook points: hook_pre and hook_post fire for whichever MLP computes.
        base.hook_pre, base.hook_pre_linear, base.hook_post = mlp.hook_pre, mlp.hook_pre_linear, mlp.hook_post
        mlp.base = base
        mlp.adapter = None
        mlp.hook_in = HookPoint()
        mlp.hook_adapter_out = HookPoint()
        mlp.route = ROUTES["target"]
        return mlp

    def forward(self, x: Tensor) -> Tensor:
        """[batch, pos, d_model] to the same shape, along this layer's route."""
        x = self.hook_in(x)
        out = GatedMLP.forward(self.base if self.route.base_mlp else self, x)
        if self.route.adapter:
            assert self.adapter is not None  # PairedModel.route_layers has checked
            return out + self.hook_adapter_out(self.adapter(x))
        if self.hook_adapter_out._forward_hooks:
            return out + self.hook_adapter_out(torch.zeros_like(out))
        return out


class PairedModel:
    """A base / target pair as one HookedTransformer (`model`) with a route per layer.

    Args:
        model: the target as `build_hooked_transformer` makes it; it is changed in place.
        base_mlps: the base's MLPs as Hugging Face names them, per layer: gate, up and down projection weights.
        base, target: ids or folders, recorded in every adapter set made here.
    """

    def __init__(
        self,
        model: HookedTransformer,
        base_mlps: Sequence[dict[str, Tensor]],
        base: str = "",
        target: str = "",
    ) -> None:
        self.model = model
        self.base_id, self.target_id = base, target
        self.adapters: AdapterSet | None = None
        for block, weights in zip(model.blocks, base_mlps, strict=True):
            PairedMLP.adopt(block.mlp, _base_mlp(block.mlp, weights))
        model.setup()

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path | PreTrainedModel,
        target: str | Path | PreTrainedModel,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> PairedModel:
        """A pair from folders, hub names or models in memory.

        The target is loaded once; of the base only the MLP tensors are read. Models in memory are not copied.

        Args:
            base, target: a folder, a hub name, or a Hugging Face model already loaded.
            dtype: of the model's weights; None keeps the target's own.
            device: where the weights go; None leaves them where they are (a folder's on the CPU). A model in memory
                is moved and cast in place, as its own ``.to`` does.
            tokenizer: the target's; None reads it from the target's folder, where there is one.

        Raises:
            UnsupportedModelError: an architecture or option that would not be exact.
            PairMismatchError: MLPs of different shapes or activations.
            CheckpointError: missing or damaged files.
        """
        _require_pair(base, target)
        base_mlps = _read_base_mlps(base, _config(target)["num_hidden_layers"])
        if isinstance(target, PreTrainedModel):
            hf_target = target.to(device=device or target.device, dtype=dtype or target.dtype)
            model = build_hooked_transformer(hf_target, tokenizer)
        else:
            model = load_hooked_transformer(target, dtype=dtype, device=device, tokenizer=tokenizer)
        return cls(model, base_mlps, base=_name(base), target=_name(target))

    @property
    def fingerprints(self) -> dict[str, str]:
        """Content hashes of the target's weights and of the base's MLPs, as loaded."""
        target = [(n, p) for n, p in self.model.named_parameters() if ".adapter." not in n and ".mlp.base." not in n]
        base = [(f"{layer}.{n}", p) for layer, mlp in enumerate(self.mlps) for n, p in mlp.base.named_parameters()]
        return {"base_mlps": fingerprint(base), "target": fingerprint(target)}

    # -- routes ---------------------------------------------------------------------------------------------------

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return self.model.cfg.n_layers

    @property
    def mlps(self) -> list[PairedMLP]:
        """The paired MLP of every layer."""
        return [block.mlp for block in self.model.blocks]

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
        if route.adapter and self.adapters is None:
            raise PairMismatchError(
                "This pair has no adapters yet; call load_adapters(...) or new_adapters(...) first."
            )
        mlps = self.mlps
        for layer in range(self.n_layers) if layers is None else layers:
            mlps[layer].route = route

    @contextmanager
    def routed(
        self,
        route: str | Route | None = None,
        *,
        first: int | None = None,
        last: int | None = None,
        only: Sequence[int] | None = None,
    ) -> Iterator[HookedTransformer]:
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
        adapters = AdapterSet(layers, self.ln2_weights, AdapterMetadata(base=self.base_id, target=self.target_id))
        self.load_adapters(adapters)
        return adapters

    def load_adapters(self, adapters: AdapterSet) -> None:
        """Put adapters in place; they share their weights with ``adapters``.

        Raises PairMismatchError where depth, width or the second norm's weights show that they belong elsewhere.
        """
        cfg = self.model.cfg
        if (len(adapters), adapters.d_model) != (cfg.n_layers, cfg.d_model):
            raise PairMismatchError(
                f"The adapters have {len(adapters)} layers of width {adapters.d_model}; "
                f"the model has {cfg.n_layers} of width {cfg.d_model}."
            )
        for layer, (ours, theirs) in enumerate(zip(self.ln2_weights, adapters.ln2_weights, strict=True)):
            if not torch.allclose(ours.float().cpu(), theirs.float().cpu(), rtol=1e-2, atol=1e-3):
                raise PairMismatchError(
                    f"The adapters were trained on {adapters.metadata.target or 'another target'}: the weights of its "
                    f"second norm at layer {layer} differ from those of {self.target_id or 'this model'} "
                    "(another model, or one whose norms are folded)."
                )
        self.adapters = adapters.to(self.model.W_E.device)
        for mlp, adapter in zip(self.mlps, adapters, strict=True):
            mlp.adapter = adapter
        self.model.setup()

    def installed_adapters(self) -> AdapterSet:
        """The adapters in place. Raises PairMismatchError where there are none."""
        if self.adapters is None:
            raise PairMismatchError(
                "This pair has no adapters yet; call load_adapters(...) or new_adapters(...) first."
            )
        return self.adapters

    @property
    def ln2_weights(self) -> list[Tensor]:
        """The target's second-norm weights, [n_layers][d_model]."""
        return [block.ln2.w for block in self.model.blocks]

    # -- running parts of the model -------------------------------------------------------------------------------

    def embed(
        self, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream before block 0."""
        return self.model(tokens, stop_at_layer=0, attention_mask=attention_mask)

    def run_blocks(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        start: int,
        stop: int,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Blocks start..stop-1 on the present routes."""
        if start == stop:
            return resid
        # start_at_layer never recomputes the padding mask, so it is always passed on.
        return self.model(resid, start_at_layer=start, stop_at_layer=stop, attention_mask=attention_mask)

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
        return self.model(flat, start_at_layer=self.n_layers)[0].unflatten(0, resid.shape[:-1])

    @property
    def rows_at_once(self) -> int:
        """Rows of logits to form at a time: 64 MB of them in float32, whatever the vocabulary."""
        return max(1, 2**24 // self.model.cfg.d_vocab)


ACTIVATIONS = "mlp.adapter.hook_sae_acts_post"
"""The hook point of the feature activations, within a block."""

_PROJECTIONS = {"gate_proj": "W_gate", "up_proj": "W_in", "down_proj": "W_out"}


def _name(model: str | Path | PreTrainedModel) -> str:
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


def _read_base_mlps(base: str | Path | PreTrainedModel, n_layers: int) -> list[dict[str, Tensor]]:
    """The base's MLP weights per layer, as they are stored."""
    names = mlp_tensor_names(n_layers)
    if isinstance(base, PreTrainedModel):
        state = base.state_dict()
        tensors = {name: state[name].detach() for name in names}
    else:
        tensors = read_tensors(locate(base), names)
    return [{name: tensors[MLP_KEY.format(layer, name)] for name in _PROJECTIONS} for layer in range(n_layers)]


def _base_mlp(target: GatedMLP, weights: dict[str, Tensor]) -> GatedMLP:
    """A GatedMLP around the base's tensors, as views in the layout that needs no copies."""
    with torch.device("meta"):  # the constructor's own weights are dropped at once: let them cost nothing
        mlp = GatedMLP(target.cfg)
    mlp.b_in, mlp.b_out = (nn.Parameter(torch.zeros_like(b), requires_grad=False) for b in (target.b_in, target.b_out))
    for name, attribute in _PROJECTIONS.items():
        view = weights[name].to(target.W_in.device, target.W_in.dtype).T
        if view.shape != getattr(target, attribute).shape:
            raise PairMismatchError(
                f"The base's {name} has shape {tuple(weights[name].shape)}; "
                f"the target's {tuple(getattr(target, attribute).T.shape)}."
            )
        setattr(mlp, attribute, nn.Parameter(view, requires_grad=False))
    return mlp
