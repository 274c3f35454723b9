"""What a model says after prompts: batched, padded on the left, up to an end token, a limit, or a full context.

The model is asked as it is, with whatever route and hooks it has at that time. Greedy completions do not depend on
what else is in their batch; drawn ones do, so `drawing` is entered once for every batch that is to come out the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tl_adapters.errors import UserError


class CompletionError(UserError, ValueError):
    """A prompt that cannot be completed."""


@dataclass(frozen=True)
class Completion:
    """What came after one prompt."""

    tokens: tuple[int, ...]
    """Token ids, without the end token."""
    ended: bool
    """An end token came before the limit."""


@torch.no_grad()
def complete(
    model: Any,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> list[Completion]:
    """Completions of all prompts, in their order.

    Args:
        model: a HookedTransformer or TransformerBridge with a tokenizer.
        prompts: token ids.
        ends: ids that end a completion.
        max_new_tokens: the limit; where the model's context is full before, that is the limit.
        batch_size: prompts at a time; sorted by length, so that little is padding.
        temperature: 0 takes the likeliest token; otherwise torch's generator is drawn from (see `drawing`).
        top_p: drawn are only the likeliest tokens that hold so much probability.

    Raises CompletionError for a prompt that is empty or fills the context.
    """
    n_ctx = model.cfg.n_ctx
    if bad := next((prompt for prompt in prompts if not 0 < len(prompt) < n_ctx), None):
        raise CompletionError(f"A prompt has {len(bad)} tokens; the model reads 1 to {n_ctx - 1} and one more.")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, Completion] = {}
    with _left_padding(model.tokenizer) as pad:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            width = len(prompts[rows[-1]])
            padded = [[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in rows]
            out = model.generate(
                torch.tensor(padded, device=model.W_E.device),
                max_new_tokens=min(max_new_tokens, n_ctx - width),
                eos_token_id=list(ends),
                do_sample=temperature > 0,
                temperature=temperature or 1.0,
                top_p=None if top_p == 1 else top_p,
                prepend_bos=False,
                padding_side="left",  # a bridge looks for padding in token ids only when told to
                verbose=False,
            )
            found.update((i, _completion(out[row, width:].tolist(), ends)) for row, i in enumerate(rows))
    return [found[i] for i in range(len(prompts))]


def _completion(generated: list[int], ends: Sequence[int]) -> Completion:
    length = next((place for place, token in enumerate(generated) if token in ends), len(generated))
    return Completion(tuple(generated[:length]), length < len(generated))


@contextmanager
def _left_padding(tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """TransformerLens reads the padding from the tokenizer when it generates; where it has none, the end token pads."""
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side, tokenizer.pad_token = "left", pad or tokenizer.eos_token
    try:
        yield tokenizer.pad_token_id
    finally:
        tokenizer.padding_side, tokenizer.pad_token = side, pad


@contextmanager
def drawing(device: torch.device, *key: int) -> Iterator[None]:
    """Within it torch draws what ``key`` says (a seed and the number of a batch, say); afterwards as if not entered."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield
