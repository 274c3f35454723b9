"""Responses of a model to problems whose answers can be checked, and the traces made from them.

A *response* is every generated token, thinking included, without the end token. A response that is truncated at the
limit counts with its length, and as wrong. The *answer* is what the response gives as its result; a problem checks it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.data.hesitation_words import HESITATION_RATE_WORDS
from tl_adapters.data.traces import Trace
from tl_adapters.generation.completions import Completion, complete
from tl_adapters.generation.generation_config import default_max_new_tokens
from tl_adapters.utils.notebook import RecordTable

log = logging.getLogger(__name__)


@runtime_checkable
class Checkable(Protocol):
    """A question whose answer can be checked; it may also name a limit of its response as ``max_new_tokens``."""

    @property
    def question(self) -> str:
        """The text of the user's turn."""
        ...

    def solved_by(self, response: str) -> bool:
        """Whether the answer that the response gives is right."""
        ...


@dataclass(frozen=True)
class Response(Completion):
    """The completion of one problem's prompt, with the check of its answer."""

    correct: bool
    """Whether the answer is right; False for a truncated response."""

    def row(self) -> dict[str, Any]:
        """What `Completion.row` gives, after whether the answer is right and how often the response hesitates."""
        return {"correct": self.correct, "hesitations": self.hesitations, **super().row()}

    @property
    def hesitations(self) -> int:
        """How often the response contains "wait", in any case."""
        return self.count(HESITATION_RATE_WORDS)

    def matches(self, pattern: str) -> int:
        """How often a regular expression matches in the response."""
        return len(re.findall(pattern, self.text))


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
) -> RecordTable[Response]:
    """Responses to all problems, with the model's current route and hooks, in the order of the problems.

    A response depends neither on the other problems nor on the batch size (see `completions`).

    Args:
        model: a HookedTransformer or TransformerBridge whose tokenizer's chat template renders the questions.
        problems: the problems to solve.
        max_new_tokens: the limit; None is `response_limit`. Where the model's context is full before, that is the
            limit.
        batch_size, temperature, top_p, top_k: as in `complete`.
        seed: of the random numbers.
        keys: for each problem, what its random numbers follow from beside the seed; by default its question. Equal keys
            draw equal numbers, so all variants of a model draw the same numbers for the same problem.
        prefill: text with which the response is made to begin, for all problems or one for each. It is the end of the
            prompt: `Response.text` and all measurements start after it.

    Raises DataError for a tokenizer without a chat template; GenerationError for a question that fills the context, and
    for options out of range.
    """
    if not problems:
        return RecordTable()
    chat = ChatFormat.of(model.tokenizer)
    prefills = [prefill] * len(problems) if isinstance(prefill, str) else prefill
    texts = [
        chat.prompt([{"role": "user", "content": problem.question}], beginning)
        for problem, beginning in zip(problems, prefills, strict=True)
    ]
    completions = complete(
        model,
        chat.tokenizer(texts, add_special_tokens=False)["input_ids"],
        max_new_tokens=response_limit(model, problems) if max_new_tokens is None else max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        keys=[(seed, key) for key in ([problem.question for problem in problems] if keys is None else keys)],
    )
    return RecordTable(_checked(*answered) for answered in zip(completions, problems, strict=True))


def response_limit(model: Any, problems: Sequence[Checkable]) -> int:
    """The limit of responses where none is given: the largest that the problems name, else the model's own."""
    limits = [getattr(problem, "max_new_tokens", None) for problem in problems]
    return max(default_max_new_tokens(model) if limit is None else limit for limit in limits)


def _checked(completion: Completion, problem: Checkable) -> Response:
    correct = not completion.truncated and problem.solved_by(completion.text)
    return Response(**vars(completion), correct=correct)


def traces_of(responses: Sequence[Response], tokenizer: PreTrainedTokenizerBase) -> list[Trace]:
    """The responses that are not truncated, as documents: the model's own text, on which measurements are made.

    Each ends with the end token that was generated (the tokenizer's, for a response whose end token is unknown).
    Truncated responses are left out, because most of their text is often one loop, and a warning tells their number.
    """
    if n_truncated := sum(r.truncated for r in responses):
        log.warning(
            "%d of %d responses were cut at the limit (%d of them looping); they are left out of the traces.",
            n_truncated,
            len(responses),
            sum(r.looping for r in responses),
        )
    end = tokenizer.eos_token_id
    return [replace(r, end=end if r.end is None else r.end).trace for r in responses if not r.truncated]
