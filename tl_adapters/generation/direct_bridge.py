"""The decoding steps of a TransformerBridge, computed without its components where nothing but MLPs is hooked.

A bridge calls several components around every norm and projection, each with hook points, and computes attention
pattern by pattern. In a step over one token per row that takes longer than the computation. `BridgeSteps` computes the
same from the weights of the wrapped modules. It calls the wrapped norms and the bridge's MLPs, so that hooks inside an
MLP fire.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from tl_adapters.checkpoints.architectures import ARCHITECTURES
from tl_adapters.generation.direct_attention import DirectAttention, Step, signed

OWN_HOOKS = "transformer_lens.model_bridge."
"""The module of hooks that a bridge registers on its own components; they read what only certain options use."""
BRIDGE_OPTIONS = ("use_attn_in", "use_split_qkv_input", "use_hook_mlp_in", "use_attn_result")
"""Options of a bridge's configuration with which a block calls hook points of its own."""


class BridgeSteps:
    """The decoding steps of a bridge whose prompts have been read into ``cache``.

    Args:
        model: a TransformerBridge for which `has_direct_steps` holds.
        cache: its keys and values, to which every step adds.
    """

    def __init__(self, model: Any, cache: DynamicCache) -> None:
        self.model, self.cache = model, cache
        self.attentions = [_attention_of(block.attn, model.cfg) for block in model.blocks]
        modules = [m for name, m in model.named_modules() if ".mlp" not in name]
        self.hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    @property
    def hooked(self) -> bool:
        """Whether a hook is anywhere but inside an MLP, so that the bridge itself has to run."""
        return any(_is_users(hook) for hooks in self.hooks if hooks for hook in hooks.values())

    def __call__(
        self, tokens: Int[Tensor, "batch 1"], mask: Int[Tensor, "batch pos"], padded: bool
    ) -> Float[Tensor, "batch d_vocab"]:
        """Logits after the new tokens; ``padded`` says whether the mask has a 0."""
        hf_model = self.model.original_model
        resid = hf_model.get_input_embeddings()(tokens)
        step = Step.after(mask, resid.dtype, padded)
        cos, sin = self.model.rotary_emb.original_component(resid, step.positions[:, None])
        rotations = cos[:, 0].to(resid.dtype), signed(sin[:, 0]).to(resid.dtype)
        for layer, block in enumerate(self.model.blocks):
            q, k, v = self.attentions[layer].project(_normed(block.ln1, resid)[:, 0], *rotations)
            keys, values = self.cache.update(k[:, :, None], v[:, :, None], layer)
            out = self.attentions[layer].attend(q, keys, values, step)
            resid = resid + (_normed(block.ln1_post, out) if hasattr(block, "ln1_post") else out)
            out = block.mlp(_normed(block.ln2, resid))
            resid = resid + (_normed(block.ln2_post, out) if hasattr(block, "ln2_post") else out)
        logits = self.model.unembed(self.model.ln_final(resid))[:, 0]
        cap = getattr(hf_model.config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits


def has_direct_steps(model: Any) -> bool:
    """Whether `BridgeSteps` computes what a bridge does: one of the known architectures, unprocessed and unchanged."""
    if type(model.original_model).__name__ not in ARCHITECTURES or any(
        getattr(model.cfg, o, False) for o in BRIDGE_OPTIONS
    ):
        return False
    return not any("forward" in m.__dict__ or getattr(m, "_use_processed_weights", False) for m in model.modules())


def _attention_of(attn: Any, cfg: Any) -> DirectAttention:
    """The weights of a bridge's attention."""
    wrapped = attn.original_component
    norms = [getattr(attn, name) for name in ("q_norm", "k_norm") if hasattr(attn, name)]
    return DirectAttention(
        projections=[(projection.weight, projection.bias) for projection in (attn.q, attn.k, attn.v)],
        output=(attn.o.weight, attn.o.bias),
        head_norms=[norm.original_component for norm in norms],
        d_head=wrapped.head_dim,
        scale=wrapped.scaling,
        soft_cap=getattr(wrapped, "attn_logit_softcapping", None) or 0.0,
    )


def _normed(norm: Any, x: Tensor) -> Tensor:
    """What the wrapped norm computes, without the hooks around it."""
    return norm.original_component(x)


def _is_users(hook: Any) -> bool:
    """Whether a hook is not one that the bridge registers itself."""
    return not (getattr(hook, "__module__", None) or "").startswith(OWN_HOOKS)
