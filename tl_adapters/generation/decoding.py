"""The decoding loop: tokens generated after a batch of prompts, each row as if its prompt were alone.

1. Prompts are padded on the left. The padding is marked by an explicit attention mask, which is never inferred from
   token ids, since a prompt may begin with the pad token.
2. Every forward pass reads only the new tokens; the keys and values of earlier ones are cached (`cached_passes`).
3. Every prompt has a limit of its own, and rows that have ended leave the batch.
4. Tokens are chosen by `sampling`, with random numbers that follow from the prompt's key alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from tl_adapters.generation.cached_passes import cached_passes
from tl_adapters.generation.sampling import GenerationError, PromptDraws, SamplingParameters, choose_tokens

STEPS_PER_SYNC = 8
"""Steps between two transfers of the generated tokens to the CPU, on an accelerator: each transfer waits for it."""


class DecodedRow(NamedTuple):
    """The tokens generated after one prompt."""

    tokens: list[int]
    """Token ids, with the end token where one was generated."""
    near_ties: int
    """How many of the tokens were chosen by a difference smaller than rounding."""


@torch.no_grad()
def decode_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    stop_at: Collection[int],
    sampling: SamplingParameters,
    keys: Sequence[object],
) -> list[DecodedRow]:
    """Generate after every prompt of one batch, up to an end token or the prompt's limit.

    Args:
        model: a HookedTransformer or TransformerBridge, with its current route and hooks.
        prompts: token ids, at least one each.
        limits: the largest number of new tokens for each prompt, from 1.
        stop_at: ids of the end tokens.
        sampling: how tokens are chosen.
        keys: for each prompt, what determines its random numbers.

    Raises GenerationError where logits are not finite.
    """
    device = model.W_E.device
    tokens, mask = (part.to(device) for part in _left_padded(prompts))
    forward = cached_passes(model, len(prompts))
    draws = None if sampling.temperature == 0 else PromptDraws(keys, model.cfg.dtype, device)
    generated: list[list[int]] = [[] for _ in prompts]
    near_ties = [0] * len(prompts)
    active, step = list(range(len(prompts))), 0
    steps_per_sync = 1 if device.type == "cpu" else STEPS_PER_SYNC
    while active:
        block: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(min(steps_per_sync, *(limits[row] - step for row in active))):
            logits = forward(tokens, mask)
            chosen, near = choose_tokens(logits, sampling, None if draws is None else draws.at(step, active))
            block.append((chosen, near.long(), logits.amax(-1).isfinite().long()))
            tokens, mask = chosen[:, None], torch.cat([mask, mask.new_ones(len(active), 1)], 1)
            step += 1
        ids, ties, finite = torch.stack([torch.stack(column, 1) for column in zip(*block, strict=True)]).tolist()
        for i, row in enumerate(active):
            if _has_ended(generated[row], stop_at):
                continue
            if not all(finite[i]):
                raise GenerationError("The model's logits are not finite; check its weights and its hooks.")
            for token, tie in zip(ids[i], ties[i], strict=True):
                near_ties[row] += tie
                generated[row].append(token)
                if token in stop_at:
                    break
        done = [_has_ended(generated[row], stop_at) or limits[row] <= step for row in active]
        if any(limits[row] <= step for row in active) or sum(done) * 8 >= len(active):
            remaining = torch.tensor([i for i, over in enumerate(done) if not over], dtype=torch.long, device=device)
            active = [active[i] for i in remaining.tolist()]
            tokens, mask = tokens[remaining], mask[remaining]
            forward.select(remaining)
    return [DecodedRow(*row) for row in zip(generated, near_ties, strict=True)]


def _has_ended(tokens: Sequence[int], stop_at: Collection[int]) -> bool:
    return bool(tokens) and tokens[-1] in stop_at


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Token ids and the attention mask. The ids of padding do not matter, since nothing attends to it."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return tokens, mask
