"""Problems with checkable answers, solved by a model: its responses, and the traces made of them."""

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
from tl_adapters.data.words import word_pattern
from tl_adapters.generation.completions import complete
from tl_adapters.generation.generation_config import decoding_of, end_tokens, longest_answer

log = logging.getLogger(__name__)

LOOP_TIMES, LOOP_TOKENS = 4, 32
"""A response that was cut is looping where its end is one block of tokens so many times over, so many tokens long."""
BATCH_TOKENS = 2**19
"""Generated in a batch, at most, where no batch size is given: 16 answers of 32,768 tokens, whose keys and values take
30 GB with R1-Distill-Qwen-7B in bfloat16."""
THINK_OPENS = "<think>"


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
        return self.count(HESITATION_RATE_WORDS)

    def count(self, words: Sequence[str]) -> int:
        """How often the response says one of ``words``, whole and in any case."""
        return len(word_pattern(words).findall(self.text))

    @property
    def looping(self) -> bool:
        """It was cut while it said one block of tokens again and again."""
        return self.truncated and _repeats(self.tokens)

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
