"""Behaviour: problems with checkable answers, solved by any model; accuracy, length and hesitation with intervals.

A *response* is every generated token, thinking included, without the end token. One that reaches the limit counts
with its length, and as wrong. The *hesitation rate* is the number of "wait", in any case, per 1,000 response tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_adapters.chat import ChatFormat
from tl_adapters.data import Trace
from tl_adapters.intervals import bootstrap_ratio

THINK_OPENS = "<think>"
_HESITATION = re.compile(r"\bwait\b", re.IGNORECASE)


@runtime_checkable
class Checkable(Protocol):
    """A question whose answer can be checked."""

    @property
    def question(self) -> str:
        """What the user asks."""
        ...

    def solved_by(self, response: str) -> bool:
        """True if the response answers rightly."""
        ...


@dataclass(frozen=True)
class Response:
    """What a model said to one problem."""

    prompt: tuple[int, ...]
    """Token ids of the rendered prompt."""
    tokens: tuple[int, ...]
    """Token ids of the response, without the end token."""
    text: str
    """The response as text, think tags included."""
    truncated: bool
    """The limit came before the end token."""
    correct: bool
    """The answer is right (never, if truncated)."""

    @property
    def hesitations(self) -> int:
        """How often the response says "wait", in any case."""
        return len(_HESITATION.findall(self.text))


@dataclass(frozen=True)
class Interval:
    """A 95 % bootstrap interval over problems."""

    low: float
    high: float


@dataclass(frozen=True)
class Rate:
    """Behaviour of one model on a list of problems."""

    n: int
    """Problems."""
    accuracy: float
    """Share answered rightly."""
    length: float
    """Mean response length in tokens."""
    hesitation_per_1k: float
    """Hesitations per 1,000 response tokens."""
    truncated: float
    """Share of responses cut at the limit."""
    think_opened: float
    """Share of responses that open their thinking."""
    ci: dict[str, Interval]
    """Intervals of accuracy, length and hesitation_per_1k."""
    split: str
    """Split of the problems."""


@torch.no_grad()
def respond(
    model: Any,
    problems: Sequence[Checkable],
    *,
    max_new_tokens: int = 160,
    batch_size: int = 500,
    temperature: float = 0.0,
) -> list[Response]:
    """Answers to all problems, with whatever route and hooks the model has now; in the order of the problems.

    Args:
        model: a HookedTransformer or TransformerBridge with the tokenizer whose chat template renders the questions.
        max_new_tokens: the limit.
        batch_size: problems at a time; sorted by length, so that little is padding.
        temperature: 0 decodes greedily; otherwise torch's generator is drawn from (seed it around the call).
    """
    chat = ChatFormat.of(model.tokenizer)
    tokenizer, ends = chat.tokenizer, chat.end_tokens
    rendered = [chat.prompt([{"role": "user", "content": p.question}]) for p in problems]
    order = sorted(range(len(rendered)), key=lambda i: len(rendered[i]))
    responses: dict[int, Response] = {}
    with _left_padding(tokenizer):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            prompts = tokenizer(
                [rendered[i] for i in rows], add_special_tokens=False, padding=True, return_tensors="pt"
            )
            width = prompts["input_ids"].shape[1]
            out = model.generate(
                prompts["input_ids"].to(model.W_E.device),
                max_new_tokens=max_new_tokens,
                eos_token_id=ends,
                do_sample=temperature > 0,
                temperature=temperature or 1.0,
                prepend_bos=False,
                padding_side="left",  # a bridge looks for padding in token ids only when told to
                verbose=False,
            )
            for row, i in enumerate(rows):
                prompt = out[row, :width][prompts["attention_mask"][row].bool()].tolist()
                responses[i] = _response(problems[i], prompt, out[row, width:].tolist(), tokenizer, ends)
    return [responses[i] for i in range(len(problems))]


def _response(
    problem: Checkable, prompt: list[int], generated: list[int], tokenizer: PreTrainedTokenizerBase, ends: list[int]
) -> Response:
    length = next((place for place, token in enumerate(generated) if token in ends), len(generated))
    tokens, ended = generated[:length], length < len(generated)
    text = tokenizer.decode(tokens)
    return Response(tuple(prompt), tuple(tokens), text, not ended, ended and problem.solved_by(text))


@contextmanager
def _left_padding(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """TransformerLens reads the padding from the tokenizer when it generates; where it has none, the end token pads."""
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side, tokenizer.pad_token = "left", pad or tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.padding_side, tokenizer.pad_token = side, pad


def traces_of(responses: Sequence[Response], tokenizer: PreTrainedTokenizerBase) -> list[Trace]:
    """Responses that came to their end, as documents: what a model said itself, to measure on."""
    end = tokenizer.eos_token_id
    return [Trace((*r.prompt, *r.tokens, end), len(r.prompt)) for r in responses if not r.truncated]


def correctness(responses: Sequence[Response]) -> Float[Tensor, "n"]:
    """1 for each right answer, 0 for each wrong one."""
    return torch.tensor([float(r.correct) for r in responses], dtype=torch.float64)


def rate(responses: Sequence[Response], split: str) -> Rate:
    """Summarise responses, with intervals over problems."""
    lengths = torch.tensor([len(r.tokens) for r in responses], dtype=torch.float64)
    words = torch.tensor([1000.0 * r.hesitations for r in responses], dtype=torch.float64)
    ones = torch.ones_like(lengths)
    figures = {
        "accuracy": bootstrap_ratio(correctness(responses), ones),
        "length": bootstrap_ratio(lengths, ones),
        "hesitation_per_1k": bootstrap_ratio(words, lengths),
    }
    return Rate(
        n=len(responses),
        accuracy=figures["accuracy"][0],
        length=figures["length"][0],
        hesitation_per_1k=figures["hesitation_per_1k"][0],
        truncated=sum(r.truncated for r in responses) / len(responses),
        think_opened=sum(THINK_OPENS in r.text for r in responses) / len(responses),
        ci={name: Interval(low, high) for name, (_, low, high) in figures.items()},
        split=split,
    )
