"""Forward passes over new tokens only, with the key-value cache of a HookedTransformer or a TransformerBridge.

Hooks fire in these passes as in the model's own ``generate``. The pass over the prompts is the model's own; decoding
steps are computed directly from the weights where no hook needs the model's modules (`direct_layers`, `direct_bridge`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_adapters.generation.direct_attention import Step

TOKENS_PER_PASS = 64
"""Tokens of padding that a further pass over a part of the prompts must save; the pass itself takes about as long."""


class CachedPasses:
    """A model with the keys and values of the tokens that it has read so far."""

    def __call__(
        self, tokens: Int[Tensor, "batch new_pos"], mask: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch d_vocab"]:
        """Logits after the last of the new tokens; the attention mask covers all tokens so far."""
        raise NotImplementedError

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        """Keep only these rows of the batch in the cache."""
        raise NotImplementedError


def cached_passes(model: Any, n_rows: int) -> CachedPasses:
    """The passes of a HookedTransformer or TransformerBridge, for a batch of ``n_rows``."""
    from transformer_lens.model_bridge import TransformerBridge

    if isinstance(model, TransformerBridge):
        return _BridgePasses(model, n_rows)
    from tl_adapters.generation.direct_layers import is_direct  # TransformerLens 4 has no HookedTransformer

    direct = all(map(is_direct, model.blocks)) and not model.cfg.use_hook_tokens
    return (_DirectPasses if direct else _HookedPasses)(model, n_rows)


class _HookedPasses(CachedPasses):
    """Passes of a HookedTransformer."""

    def __init__(self, model: Any, n_rows: int) -> None:
        self.model = model
        self.cache = self._empty_cache(n_rows)

    def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor:
        if self.cache.previous_attention_mask.shape[1] == 0:
            return self._read_prompts(tokens, mask)
        return self._read(self.cache, tokens, mask)

    def _read(self, cache: Any, tokens: Tensor, mask: Tensor) -> Tensor:
        n_layers, new_mask = self.model.cfg.n_layers, mask[:, -tokens.shape[1] :]
        residual = self.model(tokens, stop_at_layer=n_layers, past_kv_cache=cache, attention_mask=new_mask)
        return self.model(residual[:, -1:], start_at_layer=n_layers)[:, 0]  # logits of the last position only

    def _read_prompts(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The first pass, in parts of about equally long prompts, whose caches are put together."""
        groups = groups_of_lengths(mask.sum(1).tolist())
        if len(groups) == 1:
            return self._read(self.cache, tokens, mask)
        logits = []
        for rows in groups:
            part, width = self._empty_cache(len(rows)), int(mask[rows].sum(1).max())
            logits.append(self._read(part, tokens[rows, -width:], mask[rows, -width:]))
            for whole, read in zip(self.cache.entries, part.entries, strict=True):
                whole.past_keys = _with_rows(whole.past_keys, read.past_keys, rows, mask.shape)
                whole.past_values = _with_rows(whole.past_values, read.past_values, rows, mask.shape)
        self.cache.previous_attention_mask = mask
        return torch.cat(logits)[torch.tensor([row for rows in groups for row in rows]).argsort()]

    def _empty_cache(self, n_rows: int) -> Any:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache.init_cache(self.model.cfg, self.model.W_E.device, n_rows)

    def select(self, rows: Tensor) -> None:
        for entry in self.cache.entries:
            indices = rows.to(entry.past_keys.device)
            entry.past_keys, entry.past_values = entry.past_keys[indices], entry.past_values[indices]
        self.cache.previous_attention_mask = self.cache.previous_attention_mask[rows]


class _DirectPasses(_HookedPasses):
    """Passes of a HookedTransformer whose decoding steps are computed by `DirectLayer`s."""

    def __init__(self, model: Any, n_rows: int) -> None:
        from tl_adapters.generation.direct_layers import DirectLayer

        super().__init__(model, n_rows)
        rotary = model.blocks[0].attn
        self.layers = [DirectLayer(*layer, rotary) for layer in zip(model.blocks, self.cache.entries, strict=True)]
        self.prompts_read = self.padded = False

    def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor:
        if not self.prompts_read:
            self.prompts_read, self.padded = True, bool((mask == 0).any())
            return super().__call__(tokens, mask)
        residual = self.model.hook_embed(self.model.embed(tokens))
        step = Step.after(mask, residual.dtype, self.padded)
        for layer in self.layers:
            residual = layer(residual, step)
        return self.model(residual, start_at_layer=self.model.cfg.n_layers)[:, 0]

    def select(self, rows: Tensor) -> None:
        for layer in self.layers:
            layer.select(rows)


class _BridgePasses(CachedPasses):
    """Passes of a TransformerBridge, whose cache is that of Hugging Face.

    A bridge computes attention patterns in float32 at most, so its logits have that precision. In float64 its attention
    mask exceeds the range of float32, and a padding position, which attends to nothing, would become NaN and spread.
    """

    def __init__(self, model: Any, n_rows: int) -> None:
        from transformers import DynamicCache

        from tl_adapters.generation.direct_bridge import BridgeSteps, has_direct_steps

        self.model, self.cache = model, DynamicCache(config=model.original_model.config)
        self.steps = BridgeSteps(model, self.cache) if has_direct_steps(model) else None
        self.prompts_read = self.padded = False
        names = [f"blocks.{layer}.attn.hook_attn_scores" for layer in range(model.cfg.n_layers)]
        self.hooks = [(name, _clamp_to_float32) for name in names] if model.W_E.dtype == torch.float64 else []

    def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor:
        if self.prompts_read and self.steps is not None and not self.steps.hooked:
            logits = self.steps(tokens, mask, self.padded)
            return logits.float() if self.hooks else logits
        self.prompts_read, self.padded = True, bool((mask == 0).any())
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        options = dict(past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        with self.model.hooks(fwd_hooks=self.hooks):
            logits = self.model(tokens, attention_mask=mask, position_ids=positions, **options)[:, -1]
        return logits.float() if self.hooks else logits

    def select(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)


def groups_of_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Rows of a batch in groups of similar length, so that padding and passes together cost least.

    A pass over a group reads rows x longest tokens, and counts as `TOKENS_PER_PASS` more.

    Args:
        lengths: tokens of each row's prompt.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    ends = [i for i, row in enumerate(order, 1) if i == len(order) or lengths[order[i]] != lengths[row]]
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}  # by the number of rows in groups: cost, and the groups' ends
    for end in ends:
        longest = lengths[order[end - 1]]
        best[end] = min(
            (cost + (end - start) * longest + TOKENS_PER_PASS, [*found, end]) for start, (cost, found) in best.items()
        )
    found = best[len(order)][1]
    return [order[start:end] for start, end in zip([0, *found], found, strict=False)]


def _with_rows(whole: Tensor, part: Tensor, rows: list[int], shape: torch.Size) -> Tensor:
    """Keys or values [batch, pos, heads, d_head] of a batch with those of some rows, which end at the same position."""
    if whole.shape[:2] != shape:
        whole = part.new_zeros(*shape, *part.shape[2:])  # padding is masked, and must be finite
    whole[rows, -part.shape[1] :] = part
    return whole


def _clamp_to_float32(scores: Tensor, hook: Any) -> Tensor:
    return scores.clamp(min=torch.finfo(torch.float32).min)
