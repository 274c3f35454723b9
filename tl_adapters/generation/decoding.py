"""Tokens generated after a batch of prompts: each prompt's as if it were alone, whatever stands beside it.

1. Prompts are padded on the left, and what is padding is said by an attention mask that is given, never guessed from
   token ids: a prompt may begin with the pad token.
2. Every pass reads new tokens only; keys and values of what came before are kept by the model's own cache. Hooks see
   these passes as they see the model's own ``generate``.
3. Each prompt has a limit of its own. Rows that are done leave the batch.
4. A drawn token follows from the model's probabilities and one number per prompt and position, which a generator of
   that prompt alone gives. Rounding depends on the batch, though, so a choice that is closer than rounding is noted:
   up to the first of these a completion is the same in any batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_adapters.errors import UserError

STEPS_AT_ONCE = 8
"""Tokens of each prompt between two looks at what was generated, on an accelerator: a look waits for it."""
TIE = {torch.float64: 128, torch.float32: 128, torch.float16: 32, torch.bfloat16: 16}
"""By the model's dtype: two logits closer than so many units of rounding (its eps times the largest logit) are tied.
Between one prompt alone and beside others the difference of two logits changed by up to 82 units in float32 and 12 in
bfloat16, of the built-in pair and of random models of all four architectures, on the CPU."""


class CompletionError(UserError, ValueError):
    """A prompt that cannot be completed, or options with which none can."""


@dataclass(frozen=True)
class Decoding:
    """How each next token is chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token; otherwise tokens are drawn, from logits divided by this."""
    top_p: float = 1.0
    """Drawn are only the likeliest tokens that hold so much probability together."""
    top_k: int = 0
    """Drawn are only so many of the likeliest tokens; 0 is all."""

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and 0 < self.top_p <= 1 and self.top_k >= 0):
            raise CompletionError(
                f"Got temperature {self.temperature}, top_p {self.top_p} and top_k {self.top_k}; allowed are a "
                "temperature from 0, a top_p above 0 and up to 1, and a top_k from 0 (which is all tokens)."
            )

    def __str__(self) -> str:
        if self.temperature == 0:
            return "greedy"
        top_k = f", top_k {self.top_k}" if self.top_k else ""
        return f"temperature {self.temperature:g}, top_p {self.top_p:g}{top_k}"


@dataclass(frozen=True)
class Completion:
    """What came after one prompt."""

    tokens: tuple[int, ...]
    """Token ids, without the end token."""
    end: int | None
    """The end token that was generated; None where the limit came before one."""
    near_ties: tuple[int, ...] = ()
    """Places among the tokens, the end token included, where the choice was closer than rounding."""

    @property
    def ended(self) -> bool:
        """An end token came before the limit."""
        return self.end is not None


@torch.no_grad()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    ends: Sequence[int],
    decoding: Decoding,
    keys: Sequence[object],
) -> list[Completion]:
    """Completions of one batch.

    Args:
        model: a HookedTransformer or TransformerBridge, with whatever route and hooks it has now.
        prompts: token ids, at least one each.
        limits: of every prompt, the most tokens that may come after it, from 1.
        ends: ids that end a completion.
        decoding: how tokens are chosen.
        keys: of every prompt, what its draws follow from.

    Raises CompletionError where logits are not finite.
    """
    device = model.W_E.device
    tokens, mask = (part.to(device) for part in _left_padded(prompts))
    run = _passes(model, len(prompts))
    draws = None if decoding.temperature == 0 else _Draws(keys, model.cfg.dtype, device)
    said: list[list[int]] = [[] for _ in prompts]
    ties: list[list[int]] = [[] for _ in prompts]
    rows, step = list(range(len(prompts))), 0
    at_once = 1 if device.type == "cpu" else STEPS_AT_ONCE
    while rows:
        block: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(min(at_once, *(limits[row] - step for row in rows))):
            logits = run(tokens, mask)
            chosen, near = choose(logits, decoding, None if draws is None else draws.at(step, rows))
            block.append((chosen, near.long(), logits.amax(-1).isfinite().long()))
            tokens, mask = chosen[:, None], torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            step += 1
        ids, close, finite = torch.stack([torch.stack(column, 1) for column in zip(*block, strict=True)]).tolist()
        for place, row in enumerate(rows):
            if said[row] and said[row][-1] in ends:
                continue
            if not all(finite[place]):
                raise CompletionError(
                    "The model's logits are not finite; look at its weights and at what changes them."
                )
            for token, tie in zip(ids[place], close[place], strict=True):
                ties[row] += [len(said[row])] * tie
                said[row].append(token)
                if token in ends:
                    break
        done = [bool(said[row] and said[row][-1] in ends) or limits[row] <= step for row in rows]
        if any(limits[row] <= step for row in rows) or sum(done) * 8 >= len(rows):
            left = torch.tensor([place for place, over in enumerate(done) if not over], dtype=torch.long, device=device)
            rows = [rows[place] for place in left.tolist()]
            tokens, mask = tokens[left], mask[left]
            run.keep(left)
    return [_completion(tokens, ends, near) for tokens, near in zip(said, ties, strict=True)]


def _completion(said: list[int], ends: Sequence[int], near: list[int]) -> Completion:
    ended = said[-1] in ends
    return Completion(tuple(said[:-1] if ended else said), said[-1] if ended else None, tuple(near))


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Token ids and which of them are real. What stands in the padding does not matter: nothing attends to it."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return tokens, mask


# -- passes with a cache ----------------------------------------------------------------------------------------------


class _Passes:
    """A model that remembers the keys and values of what it has read."""

    def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits after the last of the new tokens; the mask is of all tokens so far."""
        raise NotImplementedError

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        raise NotImplementedError


def _passes(model: Any, n_rows: int) -> _Passes:
    from transformer_lens.model_bridge import TransformerBridge

    return (_BridgePasses if isinstance(model, TransformerBridge) else _HookedPasses)(model, n_rows)


class _HookedPasses(_Passes):
    """Of a HookedTransformer."""

    def __init__(self, model: Any, n_rows: int) -> None:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        self.model = model
        self.cache = TransformerLensKeyValueCache.init_cache(model.cfg, model.W_E.device, n_rows)

    def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor:
        top, new = self.model.cfg.n_layers, mask[:, -tokens.shape[1] :]
        residual = self.model(tokens, stop_at_layer=top, past_kv_cache=self.cache, attention_mask=new)
        return self.model(residual[:, -1:], start_at_layer=top)[:, 0]  # of the other positions no logits are formed

    def keep(self, rows: Tensor) -> None:
        for entry in self.cache.entries:
            at = rows.to(entry.past_keys.device)
            entry.past_keys, entry.past_values = entry.past_keys[at], entry.past_values[at]
        self.cache.previous_attention_mask = self.cache.previous_attention_mask[rows]


class _BridgePasses(_Passes):
    """Of a TransformerBridge, whose cache is that of Hugging Face.

    A bridge computes attention patterns in float32 at most, so that is the precision of its logits. In float64 its mask
    is beyond float32, and a position of padding, which attends to nothing, would become NaN and spread.
    """

    def __init__(self, model: Any, n_rows: int) -> None:
        from transformers import DynamicCache

        self.model, self.cache = model, DynamicCache(config=model.original_model.config)
        names = [f"blocks.{layer}.attn.hook_attn_scores" for layer in range(model.cfg.n_layers)]
        self.hooks = [(name, _within_float32) for name in names] if model.W_E.dtype == torch.float64 else []

    def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor:
        places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        options = dict(past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        with self.model.hooks(fwd_hooks=self.hooks):
            logits = self.model(tokens, attention_mask=mask, position_ids=places, **options)[:, -1]
        return logits.float() if self.hooks else logits

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)


def _within_float32(scores: Tensor, hook: Any) -> Tensor:
    return scores.clamp(min=torch.finfo(torch.float32).min)


# -- choices ----------------------------------------------------------------------------------------------------------


class _Draws:
    """Numbers in [0, 1), one for every prompt and step, from a generator per prompt."""

    AT_ONCE = 256

    def __init__(self, keys: Sequence[object], dtype: torch.dtype, device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(_seed(key)) for key in keys]
        self.dtype = torch.promote_types(dtype, torch.float32)
        self.device, self.block = device, -1
        self.numbers = torch.empty(0)

    def at(self, step: int, rows: Sequence[int]) -> Float[Tensor, "batch"]:
        """Those of a step, for these prompts."""
        while self.block < step // self.AT_ONCE:
            drawn = [torch.rand(self.AT_ONCE, generator=g, dtype=torch.float64) for g in self.generators]
            below_one = 1 - torch.finfo(self.dtype).eps  # rounding to float32 must not reach it
            self.numbers = torch.stack(drawn).clamp(max=below_one).to(self.dtype).to(self.device)
            self.block += 1
        return self.numbers[rows, step % self.AT_ONCE]


def _seed(key: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def choose(
    logits: Float[Tensor, "batch d_vocab"], decoding: Decoding, numbers: Float[Tensor, "batch"] | None = None
) -> tuple[Int[Tensor, "batch"], Bool[Tensor, "batch"]]:
    """The next tokens, and where another choice was closer than rounding.

    Args:
        logits: in the model's dtype, whose rounding is the tolerance.
        decoding: how tokens are chosen.
        numbers: in [0, 1), one per row, where tokens are drawn.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    finite = wide.masked_fill(wide.isinf(), 0)  # banned words have -inf
    tolerance = TIE[logits.dtype] * torch.finfo(logits.dtype).eps * finite.abs().amax(-1)
    if decoding.temperature == 0 or numbers is None:
        best = wide.topk(2, -1).values
        return wide.argmax(-1), best[:, 0] - best[:, 1] <= tolerance
    return _drawn(wide / decoding.temperature, decoding, numbers, tolerance / decoding.temperature)


def _drawn(
    scaled: Float[Tensor, "batch d_vocab"],
    decoding: Decoding,
    numbers: Float[Tensor, "batch"],
    tolerance: Float[Tensor, "batch"],
) -> tuple[Int[Tensor, "batch"], Bool[Tensor, "batch"]]:
    """The token at which the kept probabilities, summed in the order of ids, pass the number that was drawn.

    A change of all logits by up to half the tolerance moves a sum c of probabilities by tolerance c (1 - c) at most,
    and may let the last token kept and the first one left out change places.
    """
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    sorted_probabilities = ordered.softmax(-1)
    before = sorted_probabilities.cumsum(-1) - sorted_probabilities
    kept = before < decoding.top_p if decoding.top_p < 1 else torch.ones_like(before, dtype=torch.bool)
    kept[:, 0] = True
    if decoding.top_k:
        kept[:, decoding.top_k :] = False
    chances = torch.zeros_like(scaled).scatter(-1, order, sorted_probabilities * kept)
    sums = chances.cumsum(-1)
    total = sums[:, -1:]
    wanted = numbers[:, None] * total
    # At most the last token that has any probability, whatever rounding does to the product.
    tokens = torch.minimum((sums <= wanted).sum(-1), (sums < total).sum(-1))
    upper = sums.gather(-1, tokens[:, None]) / total
    lower = upper - chances.gather(-1, tokens[:, None]) / total
    at, slack = numbers[:, None], tolerance[:, None]
    border = _border(ordered, sorted_probabilities, before, kept, decoding.top_p, slack) / total
    near_lower = (at - lower <= slack * lower * (1 - lower) + border) & (lower > 0)
    near_upper = (upper - at <= slack * upper * (1 - upper) + border) & (upper < 1)
    return tokens, (near_lower | near_upper)[:, 0]


def _border(
    ordered: Float[Tensor, "batch d_vocab"],
    probabilities: Float[Tensor, "batch d_vocab"],
    before: Float[Tensor, "batch d_vocab"],
    kept: Bool[Tensor, "batch d_vocab"],
    top_p: float,
    slack: Float[Tensor, "batch 1"],
) -> Float[Tensor, "batch 1"]:
    """Probability that may be let in or left out by rounding, where top_p or top_k ends; 0 where that is clear."""
    last = kept.sum(-1, keepdim=True) - 1
    following = (last + 1).clamp(max=kept.shape[-1] - 1)
    at_last, at_following = (probabilities.gather(-1, place) for place in (last, following))
    swapped = ordered.gather(-1, last) - ordered.gather(-1, following) <= slack
    for place in (last, following):
        c = before.gather(-1, place)
        swapped |= (c - top_p).abs() <= slack * c * (1 - c)
    return (at_last + at_following) * (swapped & (following > last))
