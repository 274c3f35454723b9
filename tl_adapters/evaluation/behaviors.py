"""Behaviors of a model: what they are, where they occur in a text, and how often an answer shows them.

A behavior is a set of words or phrases, or whatever a function finds in a trace. Two things are measured of it:

* *how often an answer shows it*. Words are counted in the text of the answer, whole and in any case ("wait" per 1,000
  response tokens is the hesitation rate). A function counts as often as it finds something in the response;
* *where it begins* (its onsets) and which tokens it has. Words are looked up as tokens of the model
  (`hesitation_words.word_tokens`). A function returns positions, or (start, stop) for a behavior of several tokens.

All counts come from this module, so that a table, a criterion and a page count the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import index
from typing import Any, Protocol, TypeAlias, runtime_checkable

from transformers import PreTrainedTokenizerBase

from tl_adapters.data.hesitation_words import HESITATION_ONSET
from tl_adapters.data.traces import Trace
from tl_adapters.data.words import without_extensions, word_pattern, word_tokens
from tl_adapters.errors import UserError
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.notebook import ResultRecord
from tl_adapters.utils.renamed import renamed_arguments, renamed_attributes
from tl_adapters.utils.results import plain

Phrases = tuple[int | tuple[int, ...], ...]
"""Tokens each of which is the behavior, and phrases (tuples of tokens)."""
Span = tuple[int, int]
"""(start, stop) of a part of a sequence; stop is exclusive."""
MAX_PHRASE_TOKENS = 2_000
"""Largest number of tokens in all phrases together that a function finds: every one of them is measured."""
Find = Callable[[Trace], Sequence[int | Span]]
"""From a trace to the positions of tokens that begin the behavior, or to (start, stop) of all its tokens."""
GivenBehavior: TypeAlias = "Behavior | str | Sequence[str] | None"
"""How a behavior is given to a function: as such, a word or phrase, several of them, or None for hesitation."""


class BehaviorError(UserError, ValueError):
    """A behavior that cannot be studied on this pair or on these texts."""


@runtime_checkable
class ResponseLike(Protocol):
    """What is read of a response (`generation.responses.Response`)."""

    @property
    def text(self) -> str:
        """The response as text."""
        ...

    @property
    def trace(self) -> Trace:
        """The prompt and the response as a document."""
        ...


@renamed_attributes(places="text_spans")
@dataclass(frozen=True)
class Behavior(ResultRecord):
    """A behavior: words or phrases, or whatever a function finds in a trace.

    Raises BehaviorError for a text instead of a list of words, for no words, and for an empty word.
    """

    name: str = "hesitation"
    """Its name in results."""
    words: tuple[str, ...] = (HESITATION_ONSET,)
    """Words, in every spelling that is one token, and phrases. They are not used where ``find`` is given."""
    find: Find | None = None
    """From a trace to the positions of tokens that begin the behavior, or to (start, stop) of all its tokens. It is
    called on every answer, also on one that was cut at the limit (which has no end token). Positions in the prompt are
    ignored."""

    def __post_init__(self) -> None:
        _require_words(self.words)

    @classmethod
    def of(cls, behavior: GivenBehavior) -> Behavior:
        """Return a behavior from whatever gives one.

        Args:
            behavior: is returned as it is. None is hesitation. A text is that one word or phrase, which names the
                behavior. Of several words the name is the words with commas between them; the default words are
                hesitation.

        Raises BehaviorError where there are no words, and for an empty one.
        """
        if isinstance(behavior, Behavior):
            return behavior
        if behavior is None:
            return cls()
        if isinstance(behavior, str):
            return cls(name=behavior, words=(behavior,))
        _require_words(behavior)
        words = tuple(behavior)
        return cls() if words == cls.words else cls(name=", ".join(words), words=words)

    @property
    def counted(self) -> tuple[str, ...]:
        """The names of what is counted in answers: the words in small letters, or the name of the function."""
        if self.find is not None:
            return (self.function or "",)
        return tuple(sorted({" ".join(word.split()).casefold() for word in self.words}))

    @property
    def function(self) -> str | None:
        """The name of the function; None where words define the behavior."""
        if self.find is None:
            return None
        inner = self.find.func if isinstance(self.find, partial) else self.find
        return str(getattr(inner, "__qualname__", type(inner).__name__))

    def row(self) -> dict[str, Any]:
        """The name, and what defines the behavior: words, or a function by its name."""
        defined = {"words": self.words} if self.find is None else {"function": self.function}
        return {"name": self.name, **defined}

    def to_dict(self) -> dict[str, Any]:
        """`row` as JSON values; a function itself cannot be written."""
        return plain(self.row())

    # -- in tokens ------------------------------------------------------------------------------------------------

    def tokens(self, pair: PairedModel, traces: Sequence[Trace]) -> dict[str, int | tuple[int, ...]]:
        """Return the tokens of the behavior: text -> token id, or the ids of a phrase.

        It is empty where a function found nothing in the traces.

        Raises BehaviorError where the tokenizer can write none of the words, or the function returns something that is
        not a position, or too many phrases; and VocabularyError for no tokenizer, or a word with spaces around it.
        """
        tokenizer = pair.model.tokenizer
        if self.find is not None:
            spans = {trace.tokens[start:stop] for trace in traces for start, stop in self.spans(trace)}
            known: dict[str, tuple[int, ...]] = {}
            for ids in sorted(spans):
                text = tokenizer.decode(list(ids))
                known[text if text not in known else f"{text} {ids}"] = ids  # parts of characters have one text
            phrases = without_extensions(known)
            if (n := sum(len(ids) for ids in phrases.values() if len(ids) > 1)) > MAX_PHRASE_TOKENS:
                raise BehaviorError(
                    f"The function {self.function} found {len(phrases):,} different phrases with {n:,} tokens in all; "
                    f"at most {MAX_PHRASE_TOKENS:,} can be measured. Where no phrase is meant, return positions."
                )
            return {text: ids[0] if len(ids) == 1 else ids for text, ids in phrases.items()}
        if not (tokens := word_tokens(tokenizer, self.words)):
            raise BehaviorError(
                f"No token begins the behavior {self.name!r}: this model's tokenizer can write none of "
                f"{', '.join(self.words)}. Give a Behavior with other words= or with a function, find=."
            )
        return tokens

    @renamed_arguments(words="phrases")
    def spans(self, trace: Trace, phrases: Phrases = ()) -> list[Span]:
        """Return (start, stop) of the tokens of every occurrence in the response of a trace, from left to right.

        Args:
            trace: the document that is searched.
            phrases: the tokens of the words (the values of `tokens`); not needed for a function. Phrases do not
                overlap: the next one begins after the last token of the one before.

        Raises BehaviorError where a function returns something that is not a position of the trace.
        """
        if self.find is not None:
            return self._found_spans(trace)
        by_first: dict[int, list[tuple[int, ...]]] = {}
        for phrase in (phrase if isinstance(phrase, tuple) else (phrase,) for phrase in phrases):
            by_first.setdefault(phrase[0], []).append(phrase)
        spans, start = list[Span](), trace.prompt_length
        while start < len(trace.tokens):
            candidates = by_first.get(trace.tokens[start], ())
            length = min((len(p) for p in candidates if trace.tokens[start : start + len(p)] == p), default=0)
            if length:
                spans.append((start, start + length))
            start += length or 1
        return spans

    def _found_spans(self, trace: Trace) -> list[Span]:
        assert self.find is not None
        spans: dict[int, int] = {}
        for item in self.find(trace):
            try:
                start, stop = map(index, item) if isinstance(item, (tuple, list)) else (index(item), index(item) + 1)
            except (TypeError, ValueError):
                start = stop = -1
            if not 0 <= start < stop <= len(trace.tokens):
                raise BehaviorError(
                    f"The function {self.function} returned {item!r} for a trace of {len(trace.tokens)} tokens; return "
                    f"positions from 0 to {len(trace.tokens) - 1}, or (start, stop) of tokens."
                )
            if start >= trace.prompt_length:
                spans[start] = min(stop, spans.get(start, stop))
        return sorted(spans.items())

    # -- in answers -----------------------------------------------------------------------------------------------

    def count(self, response: ResponseLike) -> int:
        """Return how often a response shows the behavior: words whole and in any case, or finds of the function.

        Raises BehaviorError where the function returns something that is not a position of the response's trace.
        """
        if self.find is not None:
            return len(self._found_spans(response.trace))
        return sum(1 for _ in word_pattern(self.words).finditer(response.text))

    def text_spans(self, response: ResponseLike, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
        """Return where a response's text shows what `count` counts, as (start, stop) of characters.

        Raises BehaviorError where `count` raises it.
        """
        if self.find is None:
            return [match.span() for match in word_pattern(self.words).finditer(response.text)]
        trace, spans = response.trace, []
        tokens = trace.tokens[trace.prompt_length :]
        for span in self._found_spans(trace):
            lengths = (len(tokenizer.decode(list(tokens[: end - trace.prompt_length]))) for end in span)
            start, stop = (min(length, len(response.text)) for length in lengths)
            spans.append((start, stop))
        return spans


def _require_words(words: Sequence[str]) -> None:
    """Raise BehaviorError for a text instead of a list of words, for no words, and for an empty word."""
    sequence = isinstance(words, Sequence) and not isinstance(words, str)
    if not sequence or not words or any(not isinstance(w, str) or not w.strip() for w in words):
        raise BehaviorError(f"Got the words {words!r}; give a list of words or phrases, such as ['Wait', 'Hold on'].")


def counts(responses: Iterable[ResponseLike], behavior: GivenBehavior) -> list[int]:
    """Return how often each response shows a behavior (`Behavior.of`). Raises BehaviorError."""
    behavior = Behavior.of(behavior)
    return [behavior.count(response) for response in responses]


def first_tokens(phrases: Phrases | Sequence[Any]) -> tuple[int, ...]:
    """Return the tokens with which words and phrases begin, each once, in their order."""
    return tuple(dict.fromkeys(phrase[0] if isinstance(phrase, tuple) else phrase for phrase in phrases))
