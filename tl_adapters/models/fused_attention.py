"""Attention of a HookedTransformer through torch's fused kernel, unless a hook reads scores or patterns."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformer_lens.components import GroupedQueryAttention
from transformer_lens.hook_points import HookPoint


def _hooked(*points: HookPoint) -> bool:
    return any(p._forward_hooks or p._backward_hooks or p._backward_pre_hooks for p in points)


class FusedAttention(GroupedQueryAttention):
    """Grouped-query attention through torch's fused kernel, with hooks on queries, keys, values and z.

    The kernel never forms scores and patterns, so with a hook on one of those (or on hook_result) the stock
    implementation runs, as it does with a soft cap on scores (Gemma 2). This is a class and not a patched method, so
    that deepcopy and .to() keep working.
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
            self.cfg.attn_scores_soft_cap > 0
            or self.cfg.use_attn_result
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
        """softmax(q k / scale) v; all tensors are [batch, pos, heads, d_head]."""
        query, key, value = (t.transpose(1, 2) for t in (q, k, v))
        key = key.repeat_interleave(self.repeat_kv_heads, dim=1)
        value = value.repeat_interleave(self.repeat_kv_heads, dim=1)
        mask = None
        if attention_mask is not None or n_past or self.attn_type == "local":
            mask = self._make_causal_mask(
                query_ctx_length=query.shape[2],
                key_ctx_length=key.shape[2],
                past_kv_pos_offset=n_past,
                device=query.device,
            )
            if attention_mask is not None:
                mask = mask & attention_mask[:, None, None, :].bool()
                # A padding position attends to nothing, so its softmax is NaN. As in stock code its output is zero.
                empty = ~mask.any(-1, keepdim=True)
                mask = mask | empty
        z = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=1.0 / self.attn_scale
        )
        if attention_mask is not None:
            z = z.masked_fill(empty, 0.0)
        return z.transpose(1, 2)
