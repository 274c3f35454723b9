"""Components of a HookedTransformer that compute in fewer passes over memory where no hook looks inside.

`FusedAttention` computes attention through torch's fused kernel, unless a hook reads scores or patterns, and rotates
queries and keys in fewer operations. `FusedBlock` normalizes its input once, `FusedRMSNorm` runs backward in fewer
operations, and `LeanUnembed` adds no bias of zeros. They are classes and not patched methods, so that deepcopy and
.to() keep working.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformer_lens.components import GroupedQueryAttention, RMSNorm, TransformerBlock, Unembed
from transformer_lens.hook_points import HookPoint

BLOCK_OPTIONS = (
    "use_attn_in",
    "use_split_qkv_input",
    "use_hook_mlp_in",
    "use_attn_result",
    "ungroup_grouped_query_attention",
    "parallel_attn_mlp",
    "attn_only",
)
"""Options of a model's configuration with which a block computes more, or something else (`is_plain`)."""


def _hooked(*points: HookPoint) -> bool:
    """Whether a hook point has hooks, or was replaced by a module of another tool."""
    return any(
        type(p) is not HookPoint or p._forward_hooks or p._backward_hooks or p._backward_pre_hooks for p in points
    )


class FusedBlock(TransformerBlock):
    """TransformerBlock that normalizes its input once, and not for queries, keys and values each.

    With a hook inside that norm, which the stock block calls three times, the stock block runs.
    """

    def forward(
        self,
        resid_pre: Tensor,
        shortformer_pos_embed: Tensor | None = None,
        past_kv_cache_entry: Any = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """As TransformerBlock.forward."""
        points = (module for module in self.ln1.modules() if module is not self.ln1)
        if shortformer_pos_embed is not None or not is_plain(self.cfg) or _hooked(*points):
            return super().forward(resid_pre, shortformer_pos_embed, past_kv_cache_entry, attention_mask)
        resid_pre = self.hook_resid_pre(resid_pre)
        normalized = self.ln1(resid_pre)
        attn_out = self.attn(
            normalized,
            normalized,
            normalized,
            past_kv_cache_entry=past_kv_cache_entry,
            attention_mask=attention_mask,
        )
        if self.cfg.use_normalization_before_and_after:
            attn_out = self.ln1_post(attn_out)
        resid_mid = self.hook_resid_mid(resid_pre + self.hook_attn_out(attn_out))
        return self.hook_resid_post(resid_mid + self.apply_mlp(self.ln2(resid_mid)))


def is_plain(cfg: Any) -> bool:
    """Whether a model's blocks compute attention, then the MLP, on one residual stream, on one device."""
    return cfg.n_devices == 1 and not any(getattr(cfg, option) for option in BLOCK_OPTIONS)


class FusedAttention(GroupedQueryAttention):
    """Grouped-query attention through torch's fused kernel, with hooks on queries, keys, values and z.

    The kernel never forms scores and patterns, so with a hook on one of those (or on hook_result) the stock
    implementation runs, as it does with a soft cap on scores (Gemma 2).
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

    def apply_rotary(self, x: Tensor, past_kv_pos_offset: int = 0, attention_mask: Tensor | None = None) -> Tensor:
        """As GroupedQueryAttention.apply_rotary; without copies of the halves of a head."""
        stop = past_kv_pos_offset + x.shape[1]
        whole = self.cfg.rotary_dim == x.shape[-1] and not self.cfg.rotary_adjacent_pairs
        known = stop <= len(self.rotary_cos) and x.device == self.rotary_cos.device
        # In bfloat16 and float16 stock code rounds each product, as Hugging Face does.
        exact = x.dtype == self.rotary_cos.dtype and x.dtype in (torch.float32, torch.float64)
        if attention_mask is not None or self.cfg.use_dynamic_ntk_rope or not (whole and known and exact):
            return super().apply_rotary(x, past_kv_pos_offset, attention_mask)
        cos, sin = (t[past_kv_pos_offset:stop, None] for t in (self.rotary_cos, self.rotary_sin))
        rotated: Tensor = _Rotation.apply(x, cos, sin)
        return rotated


class _Rotation(torch.autograd.Function):
    """x cos + (-second half, first half) sin."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, -1)
        return _rotated(x, cos, -first, second)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, -1)
        return _rotated(grad_outputs[0], cos, second, -first), None, None


def _rotated(x: Tensor, cos: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """x cos + (second half times first, first half times second)."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], first)
    out[..., half:].addcmul_(x[..., :half], second)
    return out


class FusedRMSNorm(RMSNorm):
    """RMSNorm whose backward pass is one formula; with a hook inside, or a weight that learns, the stock module."""

    def forward(self, x: Tensor) -> Tensor:
        """As RMSNorm.forward, to the last bit."""
        weight = self.w
        if (
            not (torch.is_grad_enabled() and x.requires_grad)
            or weight.requires_grad
            or (x.dtype, x.device) != (weight.dtype, weight.device)
            or x.dtype not in (torch.float32, torch.float64)
            or _hooked(self.hook_scale, self.hook_normalized)
        ):
            return super().forward(x)
        out: Tensor = _RMSNorm.apply(x, weight, self.eps)
        return out


class _RMSNorm(torch.autograd.Function):
    """x / scale * w, where the scale is the root mean square of x, with the gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return x / scale * weight

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is asked for, to which the scale belongs
            scale = _scale(x, ctx.eps)
        grad, normalized = grad_outputs[0] * weight, x / scale
        along = (grad * normalized).mean(-1, keepdim=True)
        return torch.addcmul(grad, normalized, along, value=-1) / scale, None, None


def _scale(x: Tensor, eps: float) -> Tensor:
    return (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


class OffsetRMSNorm(RMSNorm):
    """Gemma's norm, which multiplies by 1 + w in float32 before it casts; `w` is that factor, in float32 at least.

    Stock RMSNorm multiplies after the cast, in the model's dtype: in bfloat16 that rounds 1 + w and the product.
    """

    def forward(self, x: Tensor) -> Tensor:
        """As RMSNorm.forward."""
        x = x.to(dtype_of_norms(x.dtype))
        scale = self.hook_scale((x.square().mean(-1, keepdim=True) + self.eps).sqrt())
        return (self.hook_normalized(x / scale) * self.w).to(self.cfg.dtype)


def dtype_of_norms(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which `OffsetRMSNorm` computes for a model of a dtype."""
    return torch.promote_types(dtype, torch.float32)


class LeanUnembed(Unembed):
    """Unembed without the pass over all logits that adds its bias, where that is zero, as in every supported model."""

    def forward(self, residual: Tensor) -> Tensor:
        """As Unembed.forward."""
        if residual.device.type != "cpu" or bool(self.b_U.any()):  # elsewhere the question would wait for the device
            return super().forward(residual)
        return self.hook_out(F.linear(self.hook_in(residual), self.W_U.T))
