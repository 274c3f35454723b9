"""Behaviour: problems with checkable answers, solved by any model; accuracy, length and hesitation with intervals.

A *response* is every generated token, thinking included, without the end token. One that reaches the limit counts
with its length, and as wrong; it is *looping* where it ends in one block of tokens said again and again. The
*hesitation rate* is the number of "wait", in any case, per 1,000 response tokens; other words are counted only when
asked for.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.data.hesitation_words import pattern_of
from tl_adapters.data.traces import Trace
from tl_adapters.evaluation.behaviors import Behaviour, counts
from tl_adapters.generation.completions import complete
from tl_adapters.generation.generation_config import decoding_of, end_tokens, longest_answer
from tl_adapters.utils.confidence_intervals import OPTIONAL, Estimate, bootstrap_ratio, clustered_share, event_rate

log = logging.getLogger(__name__)

LOOP_TIMES, LOOP_TOKENS = 4, 32
"""A response that was cut is looping where its end is one block of tokens so many times over, so many tokens long."""
BATCH_TOKENS = 2**19
"""Generated in a batch, at most, where no batch size is given: 16 answers of 32,768 tokens, whose keys and values take
30 GB with R1-Distill-Qwen-7B in bfloat16."""
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


# A problem may also say how long its answers may be, as ``max_new_tokens``.


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
    end: int | None = None
    """The token that ended it; None where it is not known, or where the limit came before it."""
    near_ties: int = 0
    """Tokens whose choice was closer than rounding: from the first on they may differ in a batch of another shape."""

    @property
    def trace(self) -> Trace:
        """The response as a document, with the token that ended it: what a function that finds a behavior is given."""
        ending = () if self.end is None else (self.end,)
        return Trace((*self.prompt, *self.tokens, *ending), len(self.prompt))

    @property
    def hesitations(self) -> int:
        """How often the response says "wait", in any case."""
        return self.count(HESITATION)

    def count(self, words: Sequence[str]) -> int:
        """How often the response says one of ``words``, whole and in any case."""
        return len(pattern_of(words).findall(self.text))

    @property
    def looping(self) -> bool:
        """It was cut while it said one block of tokens again and again."""
        return self.truncated and _repeats(self.tokens)

    def matches(self, pattern: str) -> int:
        """How often a regular expression matches in the response."""
        return len(re.findall(pattern, self.text))


@dataclass(frozen=True)
class Interval:
    """A 95 % interval over problems (see `intervals` for which one)."""

    low: float | None
    """None where there is no interval."""
    high: float | None
    """None where there is no interval."""
    undefined: float = field(default=0.0, metadata=OPTIONAL)
    """Share of the bootstrap's draws that have no value."""
    reason: str = field(default="", metadata=OPTIONAL)
    """Why there is none, or what it is where it is not the usual one."""

    @classmethod
    def of(cls, estimate: Estimate) -> Interval:
        """An estimate's interval, without its value."""
        return cls(estimate.low, estimate.high, estimate.undefined, estimate.reason)


@dataclass(frozen=True)
class Rate:
    """Behaviour of one model on a list of problems."""

    n: int
    """Problems."""
    accuracy: float
    """Share answered rightly."""
    length: float
    """Mean response length in tokens."""
    hesitation_per_1k: float | None
    """Hesitations per 1,000 response tokens; None where no response has a token."""
    truncated: float
    """Share of responses cut at the limit."""
    think_opened: float
    """Share of responses that open their thinking."""
    ci: dict[str, Interval]
    """Intervals of all five."""
    split: str
    """Split of the problems."""
    looping: float = 0.0
    """Share of responses that were cut while they said one block of tokens again and again."""
    near_ties_per_1k: float = 0.0
    """Per 1,000 response tokens, those whose choice was closer than rounding."""


def respond(
    model: Any,
    problems: Sequence[Checkable],
    *,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    keys: Sequence[object] | None = None,
    prefill: str | Sequence[str] = "",
) -> list[Response]:
    """Answers to all problems, with whatever route and hooks the model has now; in the order of the problems.

    An answer does not depend on the other problems, nor on the batch size (see `completions`).

    Args:
        model: a HookedTransformer or TransformerBridge with the tokenizer whose chat template renders the questions.
        max_new_tokens: the limit; None is `answer_limit`. Where the model's context is full before, that is the limit.
        batch_size: problems at a time; sorted by length, so that little is padding. None is `rows_at_once`.
        temperature, top_p, top_k: as `decoding.Decoding`; None is what the model's generation_config.json says, which
            is greedy where it does not sample.
        seed: of what is drawn.
        keys: of every problem, what its draws follow from beside the seed; by default its question. Equal keys draw
            equal numbers, so variants of a model draw the same for the same problem.
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
    limit = answer_limit(model, problems) if max_new_tokens is None else max_new_tokens
    completions = complete(
        model,
        prompts,
        end_tokens(model),
        max_new_tokens=limit,
        batch_size=rows_at_once(limit) if batch_size is None else batch_size,
        decoding=decoding_of(model, temperature, top_p, top_k),
        keys=[(seed, key) for key in ([p.question for p in problems] if keys is None else keys)],
    )
    said = zip(
        problems, prompts, completions, chat.tokenizer.batch_decode([c.tokens for c in completions]), strict=True
    )
    return [
        Response(
            tuple(prompt),
            done.tokens,
            text,
            not done.ended,
            done.ended and problem.solved_by(text),
            done.end,
            len(done.near_ties),
        )
        for problem, prompt, done, text in said
        for end in [chat.tokenizer.eos_token_id if done.ended else None]
    ]


def answer_limit(model: Any, problems: Sequence[Checkable]) -> int:
    """The longest answer, where none is given: what the problems name, or else the model (`longest_answer`)."""
    named = [getattr(problem, "max_new_tokens", None) for problem in problems]
    return max(longest_answer(model) if limit is None else limit for limit in named)


def rows_at_once(limit: int) -> int:
    """Problems in a batch whose answers may be so long."""
    return min(250, max(1, BATCH_TOKENS // limit))


def _repeats(tokens: Sequence[int]) -> bool:
    """Does the end consist of one block, `LOOP_TIMES` times or more, in `LOOP_TOKENS` tokens or more?

    Of each end the smallest period is its length less that of its longest border (Knuth, Morris, Pratt).
    """
    back = tokens[::-1]
    borders, border = [0] * len(back), 0
    for place in range(1, len(back)):
        while border and back[place] != back[border]:
            border = borders[border - 1]
        border += back[place] == back[border]
        borders[place] = border
        length, period = place + 1, place + 1 - border
        if length >= max(LOOP_TOKENS, LOOP_TIMES * period):
            return True
    return False


def traces_of(responses: Sequence[Response], tokenizer: PreTrainedTokenizerBase) -> list[Trace]:
    """Responses that came to their end, as documents: what a model said itself, to measure on.

    Each ends with the end token that was generated (the tokenizer's, for a response that does not know its own). Those
    cut at the limit are left out, since most of their text is often one loop, and a warning says how many.
    """
    if cut := sum(r.truncated for r in responses):
        log.warning(
            "%d of %d responses were cut at the limit (%d of them looping) and are not measured on.",
            cut,
            len(responses),
            sum(r.looping for r in responses),
        )
    end = tokenizer.eos_token_id
    return [replace(r, end=end if r.end is None else r.end).trace for r in responses if not r.truncated]


def correctness(responses: Sequence[Response]) -> Float[Tensor, "n"]:
    """1 for each right answer, 0 for each wrong one."""
    return torch.tensor([float(r.correct) for r in responses], dtype=torch.float64)


def rate(
    responses: Sequence[Response],
    split: str,
    words: Sequence[str] | Behaviour = HESITATION,
    problems: Sequence[int] | None = None,
    together: float = 1.0,
    sets: int = 1,
) -> Rate:
    """Summarise responses, with intervals over problems.

    Args:
        responses: of one model; not none.
        split: of the problems.
        words: what counts as a hesitation: words and phrases, or a behavior that counts itself.
        problems: number of the problem that each response answers; None is one response to each. Where a problem is
            answered several times its responses are drawn together, and ``accuracy`` is pass@1.
        together: hesitations of a problem that has any, where that is known: where none is said, its rate's upper end
            takes them to come so many at a time (`intervals.event_rate`).
        sets: how many sets of features, drawn themselves, gave the responses, which stand set after set. Their choice
            is then part of the intervals.
    """
    lengths = torch.tensor([len(r.tokens) for r in responses], dtype=torch.float64)
    said = torch.tensor(counts(responses, words), dtype=torch.float64)
    opened = torch.tensor([float(THINK_OPENS in r.text) for r in responses], dtype=torch.float64)
    cut = torch.tensor([float(r.truncated) for r in responses], dtype=torch.float64)
    places = torch.arange(len(responses)) if problems is None else torch.tensor(problems).unique(return_inverse=True)[1]
    n, ones = int(places.max()) + 1, torch.ones_like(lengths)

    def by_problem(values: Float[Tensor, "n"]) -> Float[Tensor, "*sets n_problems"]:
        found = torch.zeros(sets, n, dtype=torch.float64)
        for row, of, these in zip(found, places.chunk(sets), values.chunk(sets), strict=True):
            row.index_add_(0, of, these)
        return found if sets > 1 else found[0]

    total = by_problem(ones)
    figures = {
        "accuracy": clustered_share(by_problem(correctness(responses)), total),
        "length": bootstrap_ratio(by_problem(lengths), total),
        "hesitation_per_1k": event_rate(by_problem(said), by_problem(lengths), together).scaled(1000),
        "truncated": clustered_share(by_problem(cut), total),
        "think_opened": clustered_share(by_problem(opened), total),
    }
    values: dict[str, Any] = {name: estimate.value for name, estimate in figures.items()}
    return Rate(
        n=n,
        **values,
        ci={name: Interval.of(estimate) for name, estimate in figures.items()},
        split=split,
        looping=sum(r.looping for r in responses) / len(responses),
        near_ties_per_1k=1000 * sum(r.near_ties for r in responses) / max(1, sum(len(r.tokens) for r in responses)),
    )
