"""What a model says after prompts: in batches, up to an end token, a limit, or a full context.

The model is asked as it is, with whatever route and hooks it has at that time. A completion does not depend on what
else is in its batch: not its limit, not its draws, and its tokens only where a choice is closer than rounding (see
`decoding`), which `Completion.near_ties` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tl_adapters.generation.decoding import Completion, CompletionError, Decoding, decode
from tl_adapters.utils.arguments import token_ids


def complete(
    model: Any,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    *,
    max_new_tokens: int | None = None,
    batch_size: int,
    decoding: Decoding | None = None,
    keys: Sequence[object] | None = None,
) -> list[Completion]:
    """Completions of all prompts, in their order.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompts: token ids.
        ends: ids that end a completion.
        max_new_tokens: the limit. Where a prompt's own context is full before, that is its limit; None is that.
        batch_size: prompts at a time; sorted by length, so that little is padding.
        decoding: how tokens are chosen; greedy by default.
        keys: of every prompt, what its draws follow from, such as (seed, problem, sample): anything whose repr says
            it. Prompts with equal keys draw equal numbers. By default the prompt's place.

    Raises CompletionError for a prompt that is empty or fills the context.
    """
    prompts = [token_ids(prompt, model.cfg.d_vocab, "a prompt") for prompt in prompts]
    n_ctx = model.cfg.n_ctx
    if bad := [len(prompt) for prompt in prompts if not 0 < len(prompt) < n_ctx]:
        raise CompletionError(f"A prompt has {bad[0]} tokens; the model reads 1 to {n_ctx - 1} and one more.")
    if batch_size < 1 or (max_new_tokens is not None and max_new_tokens < 1):
        raise CompletionError(f"Got batch_size {batch_size} and max_new_tokens {max_new_tokens}; both are 1 or more.")
    keys = range(len(prompts)) if keys is None else keys
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, Completion] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        room = [n_ctx - len(prompts[i]) for i in rows]
        limits = room if max_new_tokens is None else [min(max_new_tokens, left) for left in room]
        said = decode(model, [prompts[i] for i in rows], limits, ends, decoding or Decoding(), [keys[i] for i in rows])
        found.update(zip(rows, said, strict=True))
    return [found[i] for i in range(len(prompts))]
