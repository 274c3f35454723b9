"""Behaviour: problems with checkable answers, solved by any model; accuracy, length and hesitation with intervals.

A *response* is every generated token, thinking included, without the end token. One that reaches the limit counts
with its length, and as wrong. The *hesitation rate* is the number of "wait", in any case, per 1,000 response tokens;
other words are counted only when asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_adapters.chat import ChatFormat
from tl_adapters.completions import complete
from tl_adapters.data import Trace
from tl_adapters.intervals import bootstrap_ratio

THINK_OPENS = "<think>"
HESITATION = ("wait",)
"""What counts as a hesitation, where no other words are asked for."""


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
        return self.count(HESITATION)

    def count(self, words: Sequence[str]) -> int:
        """How often the response says one of ``words``, whole and in any case."""
        return len(re.findall(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", self.text, re.IGNORECASE))

    def matches(self, pattern: str) -> int:
        """How often a regular expression matches in the response."""
        return len(re.findall(pattern, self.text))


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


def respond(
    model: Any,
    problems: Sequence[Checkable],
    *,
    max_new_tokens: int = 160,
    batch_size: int = 250,
    temperature: float = 0.0,
    top_p: float = 1.0,
    prefill: str | Sequence[str] = "",
) -> list[Response]:
    """Answers to all problems, with whatever route and hooks the model has now; in the order of the problems.

    Args:
        model: a HookedTransformer or TransformerBridge with the tokenizer whose chat template renders the questions.
        max_new_tokens: the limit; where the model's context is full before, that is the limit.
        batch_size: problems at a time; sorted by length, so that little is padding.
        temperature: 0 decodes greedily; otherwise torch's generator is drawn from (enter `completions.drawing`).
        top_p: drawn are only the likeliest tokens that hold so much probability.
        prefill: what the model is made to begin its response with, for all problems or one text for each. It is the
            end of the prompt: `Response.text` and every figure start after it.

    Raises DataError for a tokenizer without a chat template; CompletionError for a question that fills the context.
    """
    if not problems:
        return []
    chat = ChatFormat.of(model.tokenizer)
    begun = [prefill] * len(problems) if isinstance(prefill, str) else prefill
    texts = [
        chat.prompt([{"role": "user", "content": p.question}], beginning)
        for p, beginning in zip(problems, begun, strict=True)
    ]
    prompts = chat.tokenizer(texts, add_special_tokens=False)["input_ids"]
    completions = complete(
        model,
        prompts,
        chat.end_tokens,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        top_p=top_p,
    )
    said = zip(
        problems, prompts, completions, chat.tokenizer.batch_decode([c.tokens for c in completions]), strict=True
    )
    return [
        Response(tuple(prompt), done.tokens, text, not done.ended, done.ended and problem.solved_by(text))
        for problem, prompt, done, text in said
    ]


def traces_of(responses: Sequence[Response], tokenizer: PreTrainedTokenizerBase) -> list[Trace]:
    """Responses that came to their end, as documents: what a model said itself, to measure on."""
    end = tokenizer.eos_token_id
    return [Trace((*r.prompt, *r.tokens, end), len(r.prompt)) for r in responses if not r.truncated]


def correctness(responses: Sequence[Response]) -> Float[Tensor, "n"]:
    """1 for each right answer, 0 for each wrong one."""
    return torch.tensor([float(r.correct) for r in responses], dtype=torch.float64)


def rate(
    responses: Sequence[Response],
    split: str,
    words: Sequence[str] = HESITATION,
    problems: Sequence[int] | None = None,
) -> Rate:
    """Summarise responses, with intervals over problems.

    Args:
        responses: of one model; not none.
        split: of the problems.
        words: what counts as a hesitation.
        problems: number of the problem that each response answers; None is one response to each. Where a problem is
            answered several times its responses are drawn together, and ``accuracy`` is pass@1.
    """
    lengths = torch.tensor([len(r.tokens) for r in responses], dtype=torch.float64)
    said = torch.tensor([1000.0 * r.count(words) for r in responses], dtype=torch.float64)
    places = torch.arange(len(responses)) if problems is None else torch.tensor(problems).unique(return_inverse=True)[1]

    def ratio(top: Float[Tensor, "n"], bottom: Float[Tensor, "n"]) -> tuple[float, float, float]:
        nothing = torch.zeros(n, dtype=torch.float64)
        return bootstrap_ratio(nothing.index_add(0, places, top), nothing.index_add(0, places, bottom))

    n, ones = int(places.max()) + 1, torch.ones_like(lengths)
    figures = {
        "accuracy": ratio(correctness(responses), ones),
        "length": ratio(lengths, ones),
        "hesitation_per_1k": ratio(said, lengths),
    }
    return Rate(
        n=n,
        accuracy=figures["accuracy"][0],
        length=figures["length"][0],
        hesitation_per_1k=figures["hesitation_per_1k"][0],
        truncated=sum(r.truncated for r in responses) / len(responses),
        think_opened=sum(THINK_OPENS in r.text for r in responses) / len(responses),
        ci={name: Interval(low, high) for name, (_, low, high) in figures.items()},
        split=split,
    )
