"""A TransformerBridge made of a Hugging Face model, and TransformerBridge as a backend (TransformerLens 3.9 and 4).

The bridge wraps a Hugging Face model and finds its hook points by walking its own components, never inside the modules
that they wrap. The wrapped MLP becomes a routed one in place, and its new hook points are added to the bridge's
registry explicitly. In `enable_compatibility_mode` with processing the bridge does not call the MLP that it wraps, so
every route would silently be the target. That raises an error, before attaching and at every pass after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tl_adapters.checkpoints.architectures import require_supported
from tl_adapters.checkpoints.device_map import DeviceMapError
from tl_adapters.checkpoints.layer_samples import norm_weights
from tl_adapters.checkpoints.model_checks import mlp_activation, require_representable
from tl_adapters.checkpoints.model_files import PROJECTIONS
from tl_adapters.checkpoints.offloaded_weights import (
    execution_device,
    give_hook,
    is_dispatched,
    is_offloaded,
    offload,
    stored,
    take_hook,
)
from tl_adapters.checkpoints.tokenizers import give_tokenizer
from tl_adapters.models.backend import Backend
from tl_adapters.models.hf_outputs import hidden_states
from tl_adapters.models.routed_mlp import MLPWeights, RoutedMLP, WeightsProcessedError, require_unrouted
from tl_adapters.utils.precision import float32_logits, linear_in_float32

_BRIDGE_PROJECTIONS = {"gate_proj": "gate", "up_proj": "in", "down_proj": "out"}
"""The bridge's names of a gated MLP's projections."""


def build_bridge(hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> TransformerBridge:
    """A TransformerBridge around ``hf_model`` (which it changes in place); all weights frozen.

    Raises UnsupportedModelError.
    """
    architecture = require_representable(hf_model.config)
    bridge = build_bridge_from_module(
        hf_model,
        architecture.name,
        hf_config=hf_model.config,
        model_name=hf_model.config.name_or_path or architecture.name,
    )
    if tokenizer is not None:
        give_tokenizer(bridge, tokenizer)
    bridge.cfg.default_prepend_bos = False
    if is_dispatched(hf_model):
        bridge.cfg.device = str(execution_device(bridge.embed.original_component))
        bridge.cfg.n_devices = len(set(hf_model.hf_device_map.values()))  # so that nothing moves the whole model
    bridge.requires_grad_(False)
    bridge.__class__ = IndexedBridge
    bridge.__dict__["_found_hooks"] = None
    return bridge.eval()


class IndexedBridge(TransformerBridge):
    """A TransformerBridge that looks its hook points up once, until its registry changes.

    TransformerBridge resolves every alias of every layer anew whenever ``hook_dict`` is read, and ``hooks()`` reads it
    once for each hook. The time to add a hook to every layer is then quadratic in the number of layers, and exceeds the
    time of a forward pass of a small model many times over.
    """

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """All hook points by name, aliases included; a new dictionary, which the caller may change."""
        seen = (dict(self._hook_registry), dict(self.hook_aliases))
        found: tuple[Any, dict[str, HookPoint]] | None = self.__dict__.get("_found_hooks")
        if found is None or found[0] != seen:
            found = (seen, super().hook_dict)
            self.__dict__["_found_hooks"] = found
        return dict(found[1])

    @property
    def W_E(self) -> Tensor:
        """The embedding matrix, [d_vocab, d_model], also where it is offloaded."""
        return stored(self.embed)


class BridgedMLP(RoutedMLP):
    """A Hugging Face MLP inside a bridge, with routes; `BridgedBackend.install` changes an existing MLP into one."""

    act_fn: Any
    _bridge_mlp: tuple[Any, ...]
    """The bridge's component around this MLP; in a tuple, because torch would register a parent module as a child."""

    @property
    def adapter_out_hook(self) -> nn.Module:
        """The hook point hook_adapter_out, on the bridge's component, where the bridge and SAELens look for it."""
        return self._bridge_mlp[0].hook_adapter_out

    def weights(self) -> tuple[MLPWeights, MLPWeights]:
        """The target's and the base's weights."""
        assert isinstance(self.base, _BaseMLP)
        of_target = {attribute: stored(getattr(self, name)).T for name, attribute in PROJECTIONS.items()}
        of_base = {attribute: stored(self.base, name).T for name, attribute in PROJECTIONS.items()}
        return MLPWeights(**of_target, act_fn=self.act_fn), MLPWeights(**of_base, act_fn=self.act_fn)


class _BaseMLP(nn.Module):
    """The base's MLP, which fires the hook points of the target's projections and is kept where the target's is."""

    def __init__(self, target: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.act_fn: Any = target.act_fn
        for name in PROJECTIONS:
            projection = getattr(target, name)
            like = projection.weight
            self.register_parameter(name, nn.Parameter(weights[name].to(like.device, like.dtype), requires_grad=False))
            self.add_module(f"{name}_in", projection.hook_in)
            self.add_module(f"{name}_out", projection.hook_out)
        first: Any = target.get_submodule("gate_proj").original_component
        if is_offloaded(first):
            offload(self, weights, execution_device(first))

    def _project(self, name: str, x: Tensor) -> Tensor:
        x = getattr(self, f"{name}_in")(x)
        return getattr(self, f"{name}_out")(F.linear(x, getattr(self, name)))

    def forward(self, x: Tensor) -> Tensor:
        """(act(x W_gate) * (x W_in)) W_out"""
        gated = self.act_fn(self._project("gate_proj", x)) * self._project("up_proj", x)
        return self._project("down_proj", gated)


def _routed_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The routed subclass of a Hugging Face MLP class, the same for every layer and every copy of a model."""
    if cls not in _ROUTED_CLASSES:
        _ROUTED_CLASSES[cls] = type(f"Routed{cls.__name__}", (BridgedMLP, cls), {"__module__": __name__})
    return _ROUTED_CLASSES[cls]


_ROUTED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _refuse_processed(bridge_mlp: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook: a bridge MLP with processed weights does not call the MLP that it wraps."""
    if getattr(bridge_mlp, "_use_processed_weights", False):
        raise WeightsProcessedError(
            "This TransformerBridge's weights were processed (enable_compatibility_mode or process_weights) after "
            "adapters were attached, and it no longer calls the MLPs that hold them. Boot a fresh bridge, attach, and "
            "leave compatibility mode off; every hook point of tl_adapters exists without it."
        )


class BridgedBackend(Backend):
    """A TransformerBridge as a backend, whether the user made it or `build_bridge`."""

    name = "bridge"

    def __init__(self, model: TransformerBridge) -> None:
        self.model = model
        self._replaced: dict[int, tuple[type[nn.Module], Any]] = {}  # by layer, what `install` changed, for `uninstall`
        self.architecture = require_supported(model.original_model.config)
        for block in model.blocks:
            if getattr(block.mlp, "_use_processed_weights", False):
                raise WeightsProcessedError(
                    "This TransformerBridge is in compatibility mode with processed weights: it does not call the MLPs "
                    "it wraps, so adapters would silently do nothing. Boot a fresh one and attach without "
                    "enable_compatibility_mode (or with no_processing=True)."
                )
            require_unrouted(block.mlp.original_component)
        if is_offloaded(model.embed.original_component) and not isinstance(model, IndexedBridge):
            raise DeviceMapError(
                "This TransformerBridge's embedding is offloaded, and its W_E is empty. Boot it with a device_map that "
                "has the embedding on a device, or open the pair with PairedModel.from_pretrained(device_map=)."
            )

    @property
    def hf_config(self) -> dict[str, Any]:
        """The options that base and adapters must share with the model, under config.json's names."""
        config = self.model.original_model.config
        return {**config.to_dict(), "hidden_act": mlp_activation(config)}

    @property
    def mlps(self) -> list[RoutedMLP]:
        """The routed MLP of every layer."""
        return [block.mlp.original_component for block in self.model.blocks]

    def second_norm(self, layer: int) -> Tensor | None:
        """The second norm's weights as TransformerLens has them (Gemma 1 + w), [d_model]."""
        return self.norm(f"blocks.{layer}.ln2")

    def norm(self, name: str) -> Tensor | None:
        """Weights of the norm of that name as TransformerLens has them (Gemma 1 + w)."""
        return norm_weights(stored(self.model.get_submodule(name)), self.architecture)

    def attention_biases(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """b_V [n_kv_heads, d_head] and b_O [d_model], where the layer has them."""
        attn, cfg = self.model.blocks[layer].attn, self.model.cfg
        if attn.v.bias is not None:
            yield "b_V", stored(attn.v, "bias").unflatten(0, (-1, cfg.d_head))
        if attn.o.bias is not None:
            yield "b_O", stored(attn.o, "bias")

    def projection_biases(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """Biases of q, k, v and o in Hugging Face's names and layout, where the layer has them."""
        for name in "qkvo":
            projection = getattr(self.model.blocks[layer].attn, name)
            if projection.bias is not None:
                yield f"self_attn.{name}_proj.bias", stored(projection, "bias")

    @property
    def embedding_scale(self) -> float:
        """The factor by which the bridge's embedding differs from the stored one: the bridge holds it as stored."""
        return 1.0

    def named_weights(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """The weights of a layer's attention and MLP in Hugging Face's names and layout."""
        block = self.model.blocks[layer]
        for name in ("q", "k", "v", "o"):
            yield f"self_attn.{name}_proj", stored(getattr(block.attn, name))
        for name, attribute in _BRIDGE_PROJECTIONS.items():
            yield f"mlp.{name}", stored(getattr(block.mlp, attribute))

    def embedding(self) -> Tensor:
        """The embedding matrix, [d_vocab, d_model]."""
        return stored(self.model.embed)

    def unembedding(self) -> Tensor:
        """The unembedding matrix, [d_vocab, d_model]."""
        return stored(self.model.unembed)

    @property
    def device(self) -> torch.device:
        """The device on which the model takes its tokens."""
        return execution_device(self.model.embed.original_component)

    def layer_device(self, layer: int) -> torch.device:
        """The device on which the MLP of ``layer`` computes."""
        gate: Any = self.mlps[layer].get_submodule("gate_proj")
        return execution_device(gate.original_component)

    def install(self, layer: int, base: dict[str, Tensor] | None, base_scale: Tensor | None) -> None:
        """Turn the wrapped MLP of ``layer`` into a `BridgedMLP` in place, with the base's weights beside it."""
        bridge_mlp = self.model.blocks[layer].mlp
        mlp = bridge_mlp.original_component
        self._replaced[layer] = (type(mlp), bridge_mlp.register_forward_pre_hook(_refuse_processed))
        module = None if base is None else _BaseMLP(mlp, base)
        hook = take_hook(mlp)
        mlp.__class__ = _routed_class(type(mlp))
        mlp.install(module, base_scale)
        give_hook(mlp, hook)
        bridge_mlp.hook_adapter_out = HookPoint()
        mlp.__dict__["_bridge_mlp"] = (bridge_mlp,)

    def uninstall(self, layer: int) -> None:
        """Restore the MLP of ``layer`` to what it was before `install`."""
        cls, handle = self._replaced.pop(layer)
        handle.remove()
        bridge_mlp = self.model.blocks[layer].mlp
        del bridge_mlp.hook_adapter_out, bridge_mlp.original_component.__dict__["_bridge_mlp"]
        bridge_mlp._hook_registry.pop("hook_adapter_out")
        mlp = bridge_mlp.original_component
        hook = take_hook(mlp)
        mlp.uninstall(cls)
        give_hook(mlp, hook)

    def name_hooks(self) -> None:
        """Register new hook points with the bridge under their names, and remove those that are gone."""
        registry = self.model._hook_registry
        prefixes = (".mlp.adapter.", ".mlp.planted.", ".mlp.hook_adapter_out")
        for name in [n for n in registry if any(prefix in n for prefix in prefixes)]:
            del registry[name]
        for layer, block in enumerate(self.model.blocks):
            modules = block.mlp.original_component.named_modules()
            of_adapters = [m for m in modules if m[0].startswith(("adapter.", "planted."))]
            for name, point in [*of_adapters, ("hook_adapter_out", getattr(block.mlp, "hook_adapter_out", None))]:
                if isinstance(point, HookPoint):
                    point.name = f"blocks.{layer}.mlp.{name}"
                    registry[point.name] = point

    # -- running parts of the model -------------------------------------------------------------------------------

    def embed(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The residual stream before block 0."""
        return self.model.original_model.get_input_embeddings()(tokens)

    def run_blocks(self, resid: Tensor, start: int, stop: int, attention_mask: Tensor | None = None) -> Tensor:
        """The residual stream after blocks start..stop-1 have run on ``resid``, on the present routes.

        The bridge cannot start at a layer, so the whole model runs on ``resid`` as embeddings, and the other blocks
        return their input. Hugging Face's code makes masks and rotary tables as in any pass. The logits of one position
        are computed and discarded.
        """
        if start == stop:
            return resid
        options: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}
        if attention_mask is not None:
            options["attention_mask"] = attention_mask
            options["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        outputs: list[Tensor] = []
        handle = self.model.blocks[stop - 1].register_forward_hook(
            lambda module, args, output: outputs.append(hidden_states(output))
        )
        try:
            with self._only(range(start, stop)):
                self.model.original_model(inputs_embeds=resid, **options)
        finally:
            handle.remove()
        return outputs[0]

    @contextmanager
    def _only(self, layers: range) -> Iterator[None]:
        """For the length of a block, the model's blocks outside ``layers`` return their input."""
        skipped = [b for layer, b in enumerate(self.model.blocks) if layer not in layers]
        classes = [type(block) for block in skipped]
        try:
            for block, cls in zip(skipped, classes, strict=True):
                block.__class__ = _identity_class(cls)
            yield
        finally:
            for block, cls in zip(skipped, classes, strict=True):
                block.__class__ = cls

    def unembed(self, resid: Tensor) -> Tensor:
        """Final norm and unembedding, with the soft cap where the model has one; logits are in float32 at least."""
        linear = self.model.unembed.original_component
        precise = partial(linear_in_float32, weight=stored(linear), bias=linear.bias)
        with float32_logits(linear, linear.weight, precise):
            logits = self.model.unembed(self.model.ln_final(resid))
        cap = getattr(self.model.original_model.config, "final_logit_softcapping", None)
        return logits if not cap else torch.tanh(logits / cap) * cap


def _identity_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a block's class whose blocks return their input."""
    if cls not in _IDENTITY_CLASSES:
        _IDENTITY_CLASSES[cls] = type(f"Identity{cls.__name__}", (_Identity, cls), {"__module__": __name__})
    return _IDENTITY_CLASSES[cls]


_IDENTITY_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


class _Identity:
    """A mixin before a block's class: the block returns its input and fires no hook."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden states that the block was given."""
        return args[0] if args else kwargs["hidden_states"]
