"""Standard JSON, without NaN and infinities; writing one raises an error that names its key."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from tl_adapters.errors import UserError


class NotFiniteJsonError(UserError, ValueError):
    """A record holds NaN or an infinity, which JSON cannot represent."""


def dumps(value: Any, **options: Any) -> str:
    """`json.dumps` without NaN and infinities.

    Args:
        value: the record to write.
        options: as in `json.dumps`.

    Raises NotFiniteJsonError with the key of the first number that is not finite.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError as error:
        if (first := next(_not_finite(value, ""), None)) is None:
            raise  # another error, such as a circular record
        key, number = first
        raise NotFiniteJsonError(
            f"{key or 'The value'} is {number}, but JSON holds only finite numbers, and null for an undefined value. "
            "Check the weights, the activations or the counts from which it was computed."
        ) from error


def _not_finite(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """Keys, such as a.b[3].c, and values of all numbers that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _not_finite(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _not_finite(item, f"{key}[{i}]")
