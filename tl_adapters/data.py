"""Reasoning traces as token batches with masks.

A `Trace` is one document: token ids, and how many of them are the prompt. A `Batch` pads several to one width and
says which positions count: padding never does, and the last token of a document predicts nothing, so it is left
out of every divergence.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_adapters.errors import UserError


class DataError(UserError, ValueError):
    """Traces that cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class Trace:
    """One document of prompt and response."""

    tokens: tuple[int, ...]
    """Token ids of the whole document, in the target's own chat format, with the end token."""
    prompt_length: int
    """How many of them are the prompt; the others are the response, thinking included."""


@dataclass(frozen=True)
class Batch:
    """Documents padded on the right to one width.

    Causal attention never looks to the right, so a forward pass over a batch needs no attention mask, and none is
    passed: fused attention and rotary embeddings are then at their fastest. The mask is for counting.
    """

    tokens: Int[Tensor, "batch pos"]
    """Token ids; padding is 0."""
    attention_mask: Int[Tensor, "batch pos"]
    """1 for real tokens, 0 for padding."""
    response: Bool[Tensor, "batch pos"]
    """True at the tokens of the response."""

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """True at real tokens: what NMSE, sparsity and L0 count."""
        return self.attention_mask.bool()

    @property
    def predicting(self) -> Bool[Tensor, "batch pos"]:
        """True where a next token exists: what the divergences count."""
        has_next = torch.zeros_like(self.real)
        has_next[:, :-1] = self.real[:, 1:]
        return self.real & has_next

    @property
    def predicting_response(self) -> Bool[Tensor, "batch pos"]:
        """True where the next token belongs to the response."""
        ahead = torch.zeros_like(self.response)
        ahead[:, :-1] = self.response[:, 1:]
        return self.predicting & ahead

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(self.tokens.to(device), self.attention_mask.to(device), self.response.to(device))


def collate(traces: Sequence[Trace]) -> Batch:
    """Pad traces on the right to the longest. Raises DataError for none at all."""
    if not traces:
        raise DataError("A batch needs at least one trace; got none.")
    width = max(len(t.tokens) for t in traces)
    tokens = torch.zeros(len(traces), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    response = torch.zeros_like(tokens, dtype=torch.bool)
    for row, trace in enumerate(traces):
        n = len(trace.tokens)
        tokens[row, :n] = torch.tensor(trace.tokens)
        mask[row, :n] = 1
        response[row, trace.prompt_length : n] = True
    return Batch(tokens, mask, response)


def rows_by_length(traces: Sequence[Trace], tokens_per_batch: int) -> list[list[int]]:
    """Group traces of similar length into batches of at most ``tokens_per_batch`` tokens, padding included.

    Returns the positions of each batch's traces in the list. A trace longer than the limit is a batch of its own.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(traces)), key=lambda i: len(traces[i].tokens)):
        if groups and len(traces[row].tokens) * (len(groups[-1]) + 1) <= tokens_per_batch:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def batches_by_length(traces: Sequence[Trace], tokens_per_batch: int) -> Iterator[tuple[list[int], Batch]]:
    """Every trace once, in batches of similar length, each with the positions of its rows in the list."""
    for rows in rows_by_length(traces, tokens_per_batch):
        yield rows, collate([traces[i] for i in rows])


class BatchOrder:
    """The batches of a training run: a pure function of seed and step, so that resuming needs only the step.

    Each epoch shuffles the traces, batches neighbours in length (so that little is padding), and shuffles the
    batches.
    """

    def __init__(self, traces: Sequence[Trace], tokens_per_batch: int, seed: int) -> None:
        if not traces:
            raise DataError("Training needs at least one trace; got none.")
        self._traces, self._tokens_per_batch, self._seed = traces, tokens_per_batch, seed
        self._epoch, self._groups = 0, self._shuffled(0)
        self._first_step = 0

    def _shuffled(self, epoch: int) -> list[list[Trace]]:
        rng = random.Random(f"{self._seed}-order-{epoch}")
        traces = rng.sample(self._traces, len(self._traces))
        groups = [[traces[i] for i in rows] for rows in rows_by_length(traces, self._tokens_per_batch)]
        rng.shuffle(groups)
        return groups

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        if step < self._first_step:
            self._epoch, self._first_step, self._groups = 0, 0, self._shuffled(0)
        while step >= self._first_step + len(self._groups):
            self._first_step += len(self._groups)
            self._epoch += 1
            self._groups = self._shuffled(self._epoch)
        return collate(self._groups[step - self._first_step])


def encode_traces(
    pairs: Iterable[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None
) -> list[Trace]:
    """(question, response) pairs as traces, rendered in the tokenizer's chat template.

    The response is taken as it stands, thinking included, and ended with the end token; the template renders only the
    question, since many templates strip the thinking of past turns. Documents longer than ``max_tokens`` are cut.

    Raises DataError where the tokenizer has no chat template or no end token.
    """
    if tokenizer.chat_template is None or tokenizer.eos_token is None:
        raise DataError("The tokenizer has no chat template or no end token; traces cannot be rendered in its format.")
    pairs = list(pairs)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q, _ in pairs
    ]
    encode = lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []  # noqa: E731
    responses = encode([response + tokenizer.eos_token for _, response in pairs])
    return [
        Trace(tuple([*prompt, *response][:max_tokens]), len(prompt))
        for prompt, response in zip(encode(prompts), responses, strict=True)
    ]


def read_jsonl(path: str | Path) -> Iterator[tuple[str, str]]:
    """(question, response) of each line {"prompt": ..., "response": ...}. Raises DataError naming the line."""
    path = Path(path)
    n = 0
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                question, response = record["prompt"], record["response"]
                if not (isinstance(question, str) and isinstance(response, str)):
                    raise TypeError("prompt and response must be strings")
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise DataError(
                    f'{path}, line {number}: {error}. A line is {{"prompt": "...", "response": "<think>..."}}.'
                ) from error
            n += 1
            yield question, response
    if n == 0:
        raise DataError(f"{path} holds no traces.")
