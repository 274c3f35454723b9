"""Completions of prompts: batched generation up to an end token, a limit, or a full context.

A *completion* is what a model generates after any prompt; a *response* (`responses`) is the completion of a problem's
prompt, with the check of its answer. The model generates with its current route and hooks. A completion does not depend
on the other prompts of its batch: neither its limit nor its random numbers do, and its tokens do only where a choice is
a near tie (`sampling`), which `Completion.near_ties` counts.

The modules of this package build on each other in this order: `sampling`, `direct_attention`, `direct_layers` and
`direct_bridge` (decoding steps), `cached_passes`, `decoding` (the loop), `generation_config`, `completions`,
`responses` and `compare_variants`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

from tl_adapters.data.traces import Trace
from tl_adapters.data.words import word_pattern
from tl_adapters.generation.decoding import DecodedRow, decode_batch
from tl_adapters.generation.generation_config import default_max_new_tokens, end_tokens, sampling_parameters
from tl_adapters.generation.sampling import GenerationError, SamplingParameters
from tl_adapters.utils.arguments import token_ids
from tl_adapters.utils.notebook import ResultRecord

LOOP_REPEATS, LOOP_TOKENS = 4, 32
"""A truncated completion is looping where it ends in one block of tokens, repeated at least so many times and at least
so many tokens long in total."""
TOKENS_PER_BATCH = 2**19
"""Largest number of tokens generated in a batch whose size is not given: 16 responses of 32,768 tokens, whose keys and
values take 30 GB with R1-Distill-Qwen-7B in bfloat16, and up to an eighth more where tensors have grown."""
MOST_ROWS_PER_BATCH = 250


@dataclass(frozen=True)
class Completion(ResultRecord):
    """The tokens that a model generated after one prompt."""

    prompt: tuple[int, ...]
    """Token ids of the prompt."""
    tokens: tuple[int, ...]
    """Generated token ids, without the end token."""
    text: str
    """The generated tokens as text, think tags included; empty where the model has no tokenizer."""
    truncated: bool
    """Whether the limit came before an end token."""
    end: int | None = field(default=None, kw_only=True)
    """The end token that was generated; None where the completion is truncated or where its end token is unknown."""
    near_ties: int = field(default=0, kw_only=True)
    """Number of tokens whose choice was closer than rounding: with any, another batch shape may give other tokens."""

    @property
    def trace(self) -> Trace:
        """Prompt, generated tokens and end token as a document."""
        ending = () if self.end is None else (self.end,)
        return Trace((*self.prompt, *self.tokens, *ending), len(self.prompt))

    def row(self) -> dict[str, Any]:
        """The text and how it ended, with the numbers of tokens in place of their ids."""
        ending = {"truncated": self.truncated, "looping": self.looping, "near_ties": self.near_ties}
        return {"prompt_tokens": len(self.prompt), "new_tokens": len(self.tokens), **ending, "text": self.text}

    @property
    def looping(self) -> bool:
        """Whether it is truncated and ends in one block of tokens again and again."""
        return self.truncated and _ends_in_a_loop(self.tokens)

    def count(self, words: Sequence[str]) -> int:
        """How often the text contains one of ``words``, whole and in any case."""
        return len(word_pattern(words).findall(self.text))


@runtime_checkable
class DecodingEngine(Protocol):
    """A model that another engine runs; it has ``cfg``, ``tokenizer`` and ``generation_config`` as a model of ours."""

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        stop_at: Sequence[int],
        sampling: SamplingParameters,
        keys: Sequence[object],
    ) -> list[DecodedRow]:
        """What is generated after all prompts, in batches of the engine's own; arguments as in `decode_batch`."""
        ...


def complete(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    keys: Sequence[object] | None = None,
    stop_at: Sequence[int] | None = None,
) -> list[Completion]:
    """Completions of all prompts, in their order.

    Args:
        model: a HookedTransformer or TransformerBridge, or a `DecodingEngine`.
        prompts: token ids.
        max_new_tokens: the limit; by default the model's (`default_max_new_tokens`). Where the model's context is full
            before, that is the prompt's limit.
        batch_size: prompts per batch, which are sorted by length so that little is padding; by default as many as
            `default_batch_size` allows for the limit. A `DecodingEngine` makes its own batches.
        temperature, top_p, top_k: as in `SamplingParameters`; None is the value of the model's generation_config.json,
            which is greedy where it does not sample.
        keys: for each prompt, what its random numbers follow from, such as (seed, problem, sample): any object that its
            repr identifies, and records, which their fields identify. Prompts with equal keys draw equal numbers. By
            default the prompt's index.
        stop_at: ids of the tokens that end a completion; by default the model's (`end_tokens`).

    Raises GenerationError for options out of range, and for a prompt that is empty or fills the context.
    """
    prompts = [token_ids(prompt, model.cfg.d_vocab, "a prompt") for prompt in prompts]
    limit = default_max_new_tokens(model) if max_new_tokens is None else max_new_tokens
    limits = [min(limit, model.cfg.n_ctx - len(prompt)) for prompt in prompts]
    _require_usable(prompts, model.cfg.n_ctx, limit, batch_size)
    batch_size = default_batch_size(limit) if batch_size is None else batch_size
    decode: Callable[..., list[DecodedRow]] = partial(decode_batch, model)
    if isinstance(model, DecodingEngine):
        decode, batch_size = model.decode, max(1, len(prompts))
    sampling = sampling_parameters(model, temperature, top_p, top_k)
    keys = range(len(prompts)) if keys is None else keys
    stop_at = end_tokens(model) if stop_at is None else stop_at
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    decoded: dict[int, DecodedRow] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = decode(
            [prompts[i] for i in rows],
            [limits[i] for i in rows],
            stop_at,
            sampling,
            [keys[i] for i in rows],
        )
        decoded.update(zip(rows, batch, strict=True))
    return [_completion(model.tokenizer, prompt, decoded[i], stop_at) for i, prompt in enumerate(prompts)]


def default_batch_size(max_new_tokens: int) -> int:
    """The number of prompts per batch for completions of up to ``max_new_tokens``, by the memory of their keys."""
    return min(MOST_ROWS_PER_BATCH, max(1, TOKENS_PER_BATCH // max_new_tokens))


def _require_usable(prompts: Sequence[Sequence[int]], n_ctx: int, limit: int, batch_size: int | None) -> None:
    if bad := [len(prompt) for prompt in prompts if not 0 < len(prompt) < n_ctx]:
        raise GenerationError(
            f"A prompt has {bad[0]} tokens; allowed are 1 to {n_ctx - 1}, so that a token fits into the model's "
            f"context of {n_ctx} behind it."
        )
    if limit < 1 or (batch_size is not None and batch_size < 1):
        raise GenerationError(f"Got batch_size {batch_size} and max_new_tokens {limit}; both must be 1 or more.")


def _completion(tokenizer: Any, prompt: Sequence[int], row: DecodedRow, stop_at: Sequence[int]) -> Completion:
    ended = row.tokens[-1] in stop_at
    tokens = tuple(row.tokens[:-1] if ended else row.tokens)
    text = "" if tokenizer is None else tokenizer.decode(tokens)
    end = row.tokens[-1] if ended else None
    return Completion(tuple(prompt), tokens, text, not ended, end=end, near_ties=row.near_ties)


def _ends_in_a_loop(tokens: Sequence[int]) -> bool:
    """Whether the end is one block, `LOOP_REPEATS` times or more, in `LOOP_TOKENS` tokens or more.

    The smallest period of each suffix is its length minus that of its longest border (Knuth, Morris, Pratt).
    """
    backwards = tokens[::-1]
    borders, border = [0] * len(backwards), 0
    for i in range(1, len(backwards)):
        while border and backwards[i] != backwards[border]:
            border = borders[border - 1]
        border += backwards[i] == backwards[border]
        borders[i] = border
        length, period = i + 1, i + 1 - border
        if length >= max(LOOP_TOKENS, LOOP_REPEATS * period):
            return True
    return False
