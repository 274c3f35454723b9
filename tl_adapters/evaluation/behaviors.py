"""A behavior of a model: what it is, where it is in a text, and how often an answer shows it.

A behavior is words or phrases that are said, or whatever a function finds in a trace. Two numbers are read off it:

* *how often an answer shows it*. Words are counted in the answer's text, whole and in any case ("wait" per 1,000
  response tokens is the hesitation rate). A function counts as often as it finds something in the response;
* *where it begins* (its onsets) and which tokens it consists of. Words are looked up as the tokens of the model
  (`vocabulary.word_tokens`). A function returns positions, or (start, stop) where the behavior has more than one token.

Everything that counts takes its counts from here, so a table, a criterion and a page speak of the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import index
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from tl_adapters.data.hesitation_words import HESITATION_ONSET
from tl_adapters.data.traces import Trace
from tl_adapters.data.words import without_extensions, word_pattern, word_tokens
from tl_adapters.errors import UserError
from tl_adapters.models.paired_model import PairedModel

Words = tuple[int | tuple[int, ...], ...]
"""Tokens each of which is the behavior, and phrases: tokens that are it together."""
Span = tuple[int, int]
"""Where something starts, and where it has stopped."""
MOST_TOKENS = 2_000
"""Of all phrases together that a function may find: what is measured of a phrase is its very tokens."""
Find = Callable[[Trace], Sequence[int | Span]]
"""Of a trace, the positions of tokens that begin the behavior, or (start, stop) of all tokens of it."""


class BehaviorError(UserError, ValueError):
    """A behaviour that cannot be studied on this pair or these texts."""


@runtime_checkable
class Answered(Protocol):
    """A response (`benchmarks.Response`)."""

    @property
    def text(self) -> str:
        """As text."""
        ...

    @property
    def trace(self) -> Trace:
        """As a document."""
        ...


@dataclass(frozen=True)
class Behavior:
    """What is studied: words or phrases that are said, or places that a function finds in a trace."""

    name: str = "hesitation"
    """What results call it."""
    words: tuple[str, ...] = (HESITATION_ONSET,)
    """Words in every spelling that is one token, and phrases; unused where ``find`` is given."""
    find: Find | None = None
    """Of a trace, the positions of tokens that begin the behaviour, or (start, stop) of all its tokens. It is asked of
    every answer, one cut at the limit included (that has no end token), and of none of the prompt anything counts."""

    def __post_init__(self) -> None:
        _require_words(self.words)

    @classmethod
    def of(cls, words: Sequence[str] | Behavior) -> Behavior:
        """Words, any of which is the behavior; a behavior is taken as it is. Raises BehaviourError for no words."""
        if isinstance(words, Behavior):
            return words
        _require_words(words)
        return cls(words=tuple(words))

    @property
    def counted(self) -> tuple[str, ...]:
        """What answers are counted for: the words in small letters, or the name of the function."""
        if self.find is not None:
            return (self.function or "",)
        return tuple(sorted({" ".join(word.split()).casefold() for word in self.words}))

    @property
    def function(self) -> str | None:
        """The name of the function, where there is one."""
        if self.find is None:
            return None
        inner = self.find.func if isinstance(self.find, partial) else self.find
        return str(getattr(inner, "__qualname__", type(inner).__name__))

    # -- in tokens ------------------------------------------------------------------------------------------------

    def tokens(self, pair: PairedModel, traces: Sequence[Trace]) -> dict[str, int | tuple[int, ...]]:
        """Text to id of every token that is it, or to the ids of a phrase; empty where a function found nothing.

        Raises BehaviourError where the tokenizer can write none of the words, or the function finds what is no place.
        """
        tokenizer = pair.model.tokenizer
        if self.find is not None:
            said = {trace.tokens[start:stop] for trace in traces for start, stop in self.spans(trace)}
            known: dict[str, tuple[int, ...]] = {}
            for ids in sorted(said):
                text = tokenizer.decode(list(ids))
                known[text if text not in known else f"{text} {ids}"] = ids  # parts of characters have one text
            phrases = without_extensions(known)
            if (n := sum(len(ids) for ids in phrases.values() if len(ids) > 1)) > MOST_TOKENS:
                raise BehaviorError(
                    f"The function {self.function} found {len(phrases):,} different phrases of {n:,} tokens together; "
                    f"at most {MOST_TOKENS:,} can be measured. Let it return positions, where no phrase is meant."
                )
            return {text: ids[0] if len(ids) == 1 else ids for text, ids in phrases.items()}
        if not (found := word_tokens(tokenizer, self.words)):
            raise BehaviorError(
                f"Nothing begins the behaviour {self.name!r}: this model's tokenizer can write none of "
                f"{', '.join(self.words)}; give other words= or a function (find=)."
            )
        return found

    def spans(self, trace: Trace, words: Words = ()) -> list[Span]:
        """(start, stop) of the tokens of every occurrence in the response of a trace, from left to right.

        Args:
            trace: whose tokens are looked at.
            words: what the words are in tokens (the values of `tokens`); a function needs none. Phrases that are said
                do not overlap: the next one begins after the last token of the one before.

        Raises BehaviourError where a function finds what is no place of the trace.
        """
        if self.find is not None:
            return self._found(trace)
        by_first: dict[int, list[tuple[int, ...]]] = {}
        for phrase in (word if isinstance(word, tuple) else (word,) for word in words):
            by_first.setdefault(phrase[0], []).append(phrase)
        found, place = list[Span](), trace.prompt_length
        while place < len(trace.tokens):
            here = by_first.get(trace.tokens[place], ())
            length = min((len(p) for p in here if trace.tokens[place : place + len(p)] == p), default=0)
            if length:
                found.append((place, place + length))
            place += length or 1
        return found

    def _found(self, trace: Trace) -> list[Span]:
        assert self.find is not None
        spans: dict[int, int] = {}
        for place in self.find(trace):
            try:
                start, stop = (
                    map(index, place) if isinstance(place, (tuple, list)) else (index(place), index(place) + 1)
                )
            except (TypeError, ValueError):
                start = stop = -1
            if not 0 <= start < stop <= len(trace.tokens):
                raise BehaviorError(
                    f"The function {self.function} found {place!r} in a trace of {len(trace.tokens)} tokens; it is to "
                    f"return positions from 0 to {len(trace.tokens) - 1}, or (start, stop) of tokens."
                )
            if start >= trace.prompt_length:
                spans[start] = min(stop, spans.get(start, stop))
        return sorted(spans.items())

    # -- in answers -----------------------------------------------------------------------------------------------

    def count(self, response: Answered) -> int:
        """How often a response shows it: words whole and in any case, or as often as the function finds something."""
        if self.find is not None:
            return len(self._found(response.trace))
        return sum(1 for _ in word_pattern(self.words).finditer(response.text))

    def places(self, response: Answered, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
        """Where a response's text shows what `count` counts, as (start, stop) of characters."""
        if self.find is None:
            return [match.span() for match in word_pattern(self.words).finditer(response.text)]
        trace, found = response.trace, []
        said = trace.tokens[trace.prompt_length :]
        for start, stop in self._found(trace):
            ends = (len(tokenizer.decode(list(said[: place - trace.prompt_length]))) for place in (start, stop))
            begin, end = (min(place, len(response.text)) for place in ends)
            found.append((begin, end))
        return found


def _require_words(words: Sequence[str]) -> None:
    """Raises BehaviourError for a text where a list of words is meant, for no words, and for an empty one."""
    if isinstance(words, str) or not words or any(not isinstance(w, str) or not w.strip() for w in words):
        raise BehaviorError(f"Got the words {words!r}; give a list of words or phrases, such as ['Wait', 'Hold on'].")


def counts(responses: Iterable[Answered], behaviour: Sequence[str] | Behavior) -> list[int]:
    """How often each response shows a behavior, or says one of some words. Raises BehaviourError."""
    asked = Behavior.of(behaviour)
    return [asked.count(response) for response in responses]


def first_tokens(words: Words | Sequence[Any]) -> tuple[int, ...]:
    """The tokens with which words and phrases begin, each once, in their order."""
    return tuple(dict.fromkeys(word[0] if isinstance(word, tuple) else word for word in words))
