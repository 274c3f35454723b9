"""The seam to TransformerLens: a HookedTransformer made of a Hugging Face model's own weights.

1. The configuration is read from the model's, not looked up by name: TransformerLens 3.9 knows a list of names,
   and reasoning models are rarely on it.
2. Parameters are views of the model's weights, in nn.Linear's layout. Nothing is held twice, and the copies that
   stock components make of transposed weights at every call become free.
3. Attention is fused while nobody looks at scores or patterns; a hook there brings the stock code back.

Only the Qwen2 architecture so far; others are refused by name.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.components import GroupedQueryAttention
from transformer_lens.hook_points import HookPoint
from transformer_lens.pretrained.weight_conversions.qwen2 import convert_qwen2_weights
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tl_adapters.errors import UserError

ARCHITECTURES = {"Qwen2ForCausalLM": convert_qwen2_weights}


class UnsupportedModelError(UserError, ValueError):
    """A model this version cannot represent exactly; the message names the reason."""


def tl_config(config: PretrainedConfig, dtype: torch.dtype, device: torch.device | str) -> HookedTransformerConfig:
    """The TransformerLens configuration of a Hugging Face one. Raises UnsupportedModelError."""
    architecture = (config.architectures or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"Architecture {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}."
        )
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") != "default":
        raise UnsupportedModelError(
            f"rope_type {rope['rope_type']!r} is not represented by TransformerLens; supported: 'default'."
        )
    if getattr(config, "use_sliding_window", False):
        raise UnsupportedModelError("use_sliding_window=True is not represented by TransformerLens for Qwen2.")
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return HookedTransformerConfig(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_ctx=config.max_position_embeddings,
        d_head=d_head,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        act_fn=config.hidden_act,
        eps=config.rms_norm_eps,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_base=rope.get("rope_theta", 10000.0),
        rotary_dim=d_head,
        rotary_adjacent_pairs=False,
        original_architecture=architecture,
        model_name=config.name_or_path or architecture,
        init_weights=False,
        default_prepend_bos=False,  # chat templates write their own beginning of sequence
        dtype=dtype,
        device=str(device),
    )


@torch.no_grad()
def build_hooked_transformer(
    hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> HookedTransformer:
    """A HookedTransformer whose parameters are views of ``hf_model``'s, with fused attention; all weights frozen.

    No processing (no folding, no centring): hook values are the model's own. Raises UnsupportedModelError.
    """
    weight = next(hf_model.parameters())
    cfg = tl_config(hf_model.config, weight.dtype, weight.device)
    convert: Any = ARCHITECTURES[str(cfg.original_architecture)]
    with warnings.catch_warnings():
        # TransformerLens announces that 4.0 drops this class; pyproject.toml's range is where we answer that.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r".*")
        model = HookedTransformer(cfg, None, move_to_device=False)
    state = {name: tensor.detach().to(cfg.device) for name, tensor in convert(hf_model, cfg).items()}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    parameters = dict(model.named_parameters())
    if unexpected or any(name in parameters for name in missing):
        raise UnsupportedModelError(
            f"TransformerLens's converter left weights of {cfg.original_architecture} unset: {missing}, {unexpected}."
        )
    if tokenizer is not None:
        # Not set_tokenizer: it loads the tokenizer anew under its recorded name and makes encode() prepend BOS.
        model.tokenizer = tokenizer
        model.cfg.tokenizer_prepends_bos = False
    for block in model.blocks:
        block.attn.__class__ = FusedAttention
    return model.requires_grad_(False).eval()


def _hooked(*points: HookPoint) -> bool:
    return any(p._forward_hooks or p._backward_hooks or p._backward_pre_hooks for p in points)


class FusedAttention(GroupedQueryAttention):
    """Grouped-query attention through torch's fused kernel, with every hook it can offer.

    The kernel never forms scores and patterns, so a hook on one of those (or on hook_result) sends this call to the
    stock implementation; queries, keys, values and z stay hookable here. A class, not a patched method: deepcopy and
    .to() keep working.
    """

    def forward(
        self,
        query_input: Tensor,
        key_input: Tensor,
        value_input: Tensor,
        past_kv_cache_entry: Any = None,
        additive_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
    ) -> Tensor:
        """As GroupedQueryAttention.forward."""
        if (
            self.cfg.use_attn_result
            or self.cfg.ungroup_grouped_query_attention
            or additive_attention_mask is not None
            or _hooked(self.hook_attn_scores, self.hook_pattern, self.hook_result)
        ):
            return super().forward(
                query_input,
                key_input,
                value_input,
                past_kv_cache_entry,
                additive_attention_mask,
                attention_mask,
                position_bias,
            )
        q, k, v = self.calculate_qkv_matrices(query_input, key_input, value_input)
        n_past = 0
        if past_kv_cache_entry is not None:
            n_past = past_kv_cache_entry.past_keys.shape[1]
            k, v = past_kv_cache_entry.append(k, v)
        q = self.hook_rot_q(self.apply_rotary(q, n_past, attention_mask))
        k = self.hook_rot_k(self.apply_rotary(k, 0, attention_mask))
        z = self.hook_z(self._fused(q, k, v, n_past, attention_mask))
        weight = self.W_O.permute(2, 0, 1).flatten(1)  # a view: the Hugging Face layout is [d_model, heads x d_head]
        return F.linear(z.flatten(2), weight, self.b_O)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, n_past: int, attention_mask: Tensor | None) -> Tensor:
        """softmax(q k / scale) v; all [batch, pos, heads, d_head]."""
        query, key, value = (t.transpose(1, 2) for t in (q, k, v))
        key = key.repeat_interleave(self.repeat_kv_heads, dim=1)
        value = value.repeat_interleave(self.repeat_kv_heads, dim=1)
        mask = None
        if attention_mask is not None or n_past:
            mask = self._make_causal_mask(
                query_ctx_length=query.shape[2],
                key_ctx_length=key.shape[2],
                past_kv_pos_offset=n_past,
                device=query.device,
            )
            if attention_mask is not None:
                mask = mask & attention_mask[:, None, None, :].bool()
                # A padding position attends to nothing and its softmax is NaN; as in stock code its output is zero.
                empty = ~mask.any(-1, keepdim=True)
                mask = mask | empty
        z = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=1.0 / self.attn_scale
        )
        if attention_mask is not None:
            z = z.masked_fill(empty, 0.0)
        return z.transpose(1, 2)
