"""Checks of the sequences that users pass to public functions, made before anything iterates over them.

Python iterates over a text letter by letter and over a mapping key by key, and a batch of two prompts flattens into one
long prompt, all without an error. Each function here returns the argument in one known form, or raises an
`ArgumentError` that tells what was given and what is allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any, Protocol, TypeVar, runtime_checkable

from tl_adapters.errors import UserError

T = TypeVar("T")


class ArgumentError(UserError, ValueError):
    """An argument of another kind than the function accepts."""


def token_ids(given: Any, d_vocab: int, what: str = "tokens") -> list[int]:
    """The ids of one sequence: a list, tuple, array or tensor of integers, also with one row ([1, n]).

    Args:
        given: what the user passed.
        d_vocab: size of the model's vocabulary; ids run from 0 to d_vocab - 1.
        what: name of the argument in errors.

    Raises ArgumentError for a text, several rows, numbers that are not integers, or ids outside the vocabulary.
    """
    values = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise ArgumentError(f"{what} is {_shown(given)}; give a sequence of token ids.")
    ids = list(values)
    if len(ids) == 1 and isinstance(ids[0], (list, tuple)):
        ids = list(ids[0])
    elif any(isinstance(one, (list, tuple)) or getattr(one, "ndim", 0) for one in ids):
        raise ArgumentError(f"{what} has {len(ids)} rows; give one sequence of token ids at a time.")
    whole = [_whole_number(one) for one in ids]
    if None in whole:
        raise ArgumentError(f"{what} holds {_shown(ids[whole.index(None)])}; token ids are whole numbers.")
    integers = [one for one in whole if one is not None]
    if outside := [one for one in integers if not 0 <= one < d_vocab]:
        raise ArgumentError(f"{what} holds the token id {outside[0]}; the model's ids run from 0 to {d_vocab - 1:,}.")
    return integers


def texts(given: Any, what: str) -> tuple[str, ...]:
    """A sequence of texts. Raises ArgumentError for a single text, None, or an item that is not a text."""
    if isinstance(given, str):
        raise ArgumentError(f"{what} is the text {given!r}, not a sequence of texts; give [{given!r}].")
    sequence = _items(given, what, "texts")
    if wrong := [one for one in sequence if not isinstance(one, str)]:
        raise ArgumentError(f"{what} holds {_shown(wrong[0])}; give texts only.")
    return tuple(sequence)


def items(given: Any, kind: type[T] | tuple[type[T], ...], what: str, advice: str) -> list[T]:
    """A sequence of objects of one type. Raises ArgumentError, with ``advice``, for an item of another type."""
    sequence = _items(given, what, advice)
    if wrong := [one for one in sequence if not isinstance(one, kind) or isinstance(one, bool)]:
        raise ArgumentError(f"{what} holds {_shown(wrong[0])}; {advice}.")
    return sequence


def whole_numbers(given: Any, below: int, what: str) -> list[int]:
    """Whole numbers from 0 to ``below`` - 1. Raises ArgumentError for anything else, negative numbers included."""
    numbers = [_whole_number(one) for one in _items(given, what, f"whole numbers from 0 to {below - 1}")]
    if wrong := [one for one in numbers if one is None or not 0 <= one < below]:
        raise ArgumentError(f"{what} is {_shown(given)}; {wrong[0]} is not a whole number from 0 to {below - 1}.")
    return [one for one in numbers if one is not None]


@runtime_checkable
class HasFeatures(Protocol):
    """A collection of features that names them, such as a circuit."""

    def ids(self) -> list[Any]:
        """Its features, as pairs (layer, index)."""
        ...


def feature_pairs(given: Iterable[T] | HasFeatures, what: str = "features") -> list[T]:
    """Features as given, each a pair of whole numbers (layer, index), or those of a circuit.

    Raises ArgumentError for anything else.
    """
    if isinstance(given, HasFeatures):
        given = given.ids()
    advice = "give pairs (layer, index), such as [(2, 17)]"
    features = _items(given, what, advice)
    for one in features:
        if not isinstance(one, Sequence) or len(one) != 2 or any(_whole_number(number) is None for number in one):
            raise ArgumentError(f"{what} holds {_shown(one)}; {advice}.")
    return features


def prompt_response_pairs(given: Any) -> list[tuple[str, str]]:
    """(question, response) pairs, given as pairs of texts or as rows {"prompt": ..., "response": ...}.

    Raises ArgumentError, with the number of the row, for anything else.
    """
    advice = 'give pairs of texts, (question, response), or rows {"prompt": ..., "response": ...}'
    return [_pair(row, number, advice) for number, row in enumerate(_items(given, "pairs", advice), start=1)]


def choice(given: Any, allowed: Sequence[str], what: str) -> None:
    """Raise ArgumentError, with the most similar allowed name, where ``given`` is not allowed."""
    if given not in allowed:
        similar = difflib.get_close_matches(str(given), allowed, n=1)
        raise ArgumentError(
            f"{what} is {given!r}; allowed: {', '.join(map(repr, allowed))}."
            + (f" Did you mean {similar[0]!r}?" if similar else "")
        )


def _items(given: Any, what: str, advice: str) -> list[Any]:
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise ArgumentError(f"{what} is {_shown(given)}; {advice if advice.startswith('give') else f'give {advice}'}.")
    return list(given)


def _pair(row: Any, number: int, advice: str) -> tuple[str, str]:
    values: Sequence[Any] = ()
    if isinstance(row, Mapping):
        values = [row.get("prompt"), row.get("response")]
    elif isinstance(row, Sequence) and not isinstance(row, (str, bytes)):
        values = row
    if len(values) != 2 or not all(isinstance(value, str) for value in values):
        raise ArgumentError(f"Row {number} of the pairs is {_shown(row)}; {advice}.")
    return values[0], values[1]


def _whole_number(one: Any) -> int | None:
    try:
        return None if isinstance(one, bool) else index(one)
    except TypeError:
        return None


def _shown(given: Any) -> str:
    text = repr(given)
    return f"{text if len(text) <= 80 else text[:80] + '...'} ({type(given).__name__})"
