"""Attention of a HookedTransformer: the fused kernel where no hook looks into it, and masks that callers give only.

`FusedAttention` computes attention through torch's fused kernel, unless a hook reads scores or patterns.

`without_padding_inference` changes what a model does without an attention mask. Stock TransformerLens infers padding
then: its forward pass (and run_with_cache) treats pad tokens at the beginning as padding where the tokenizer pads on
the left, and ``generate`` those at the beginning or the end, whichever side the tokenizer pads. So a prompt that begins
with the pad token (which may be the BOS token) loses it. While adapters are attached, all token ids given are real.
Texts are padded and masked as in stock TransformerLens, since their padding is known.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformer_lens.components import GroupedQueryAttention
from transformer_lens.hook_points import HookPoint

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)


class NoPaddingInference:
    """A mixin before a HookedTransformer's class: token ids without an attention mask are all real."""

    tokenizer: Any

    def input_to_embed(self, input: Any, *args: Any, attention_mask: Any = None, **options: Any) -> Any:
        """As HookedTransformer.input_to_embed, with all token ids real where no mask is given."""
        if isinstance(input, Tensor) and attention_mask is None and self.tokenizer is not None:
            tokens = input if input.ndim > 1 else input[None]
            if self.tokenizer.padding_side == "left":
                _warn_of_padding(tokens, self.tokenizer.pad_token_id)
            attention_mask = torch.ones_like(tokens)
            if self.tokenizer.padding_side != "left" and options.get("past_kv_cache") is None:
                attention_mask = None  # the same result, in the faster attention
        return super().input_to_embed(input, *args, attention_mask=attention_mask, **options)  # type: ignore[misc]

    def generate(self, input: Any = "", *args: Any, **options: Any) -> Any:
        """As HookedTransformer.generate, with all token ids real."""
        if not isinstance(input, Tensor) or input.is_floating_point() or self.tokenizer is None:
            return super().generate(input, *args, **options)  # type: ignore[misc]
        _warn_of_padding(input if input.ndim > 1 else input[None], self.tokenizer.pad_token_id)
        with self._without_pad_token():
            return super().generate(input, *args, **options)  # type: ignore[misc]

    @contextmanager
    def _without_pad_token(self) -> Iterator[None]:
        tokenizer, self.tokenizer = self.tokenizer, _NoPadToken(self.tokenizer)
        try:
            yield
        finally:
            self.tokenizer = tokenizer


class _NoPadToken:
    """A tokenizer whose pad token is an id that no text has; everything else is the wrapped tokenizer's."""

    pad_token_id = -1

    def __init__(self, tokenizer: Any) -> None:
        self.__dict__["tokenizer"] = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["tokenizer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["tokenizer"], name, value)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.__dict__["tokenizer"](*args, **options)


def _warn_of_padding(tokens: Tensor, pad: int | None) -> None:
    """Warn where some rows begin with the pad token and others do not, which looks like padding."""
    if pad is not None and len(tokens) > 1 and 0 < int((tokens[:, 0] == pad).sum()) < len(tokens):
        log.warning(
            "Some rows of the token ids begin with the pad token, and no attention_mask was given, so they are read as "
            "tokens. If they are padding, give attention_mask= or texts (to generate: completions.complete)."
        )


def without_padding_inference(cls: type) -> type:
    """The subclass of a HookedTransformer class that infers no padding, the same for every model and every copy."""
    if issubclass(cls, NoPaddingInference):
        return cls
    if cls not in _SUBCLASSES:
        _SUBCLASSES[cls] = type(cls.__name__, (NoPaddingInference, cls), {"__module__": cls.__module__})
    return _SUBCLASSES[cls]


_SUBCLASSES: dict[type, type] = {}


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
