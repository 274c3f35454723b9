"""JSON that every reader can read: a number that is not finite stops at the writer, which names its key."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from tl_adapters.errors import UserError


class NotFiniteError(UserError, ValueError):
    """A record holds NaN or an infinity, which JSON has no word for."""


def dumps(value: Any, **options: Any) -> str:
    """`json.dumps` without NaN and infinities.

    Args:
        value: what is written.
        options: as `json.dumps`.

    Raises NotFiniteError with the key of the first such number.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError as error:
        if (found := next(_not_finite(value, ""), None)) is None:
            raise  # a circular record, say
        key, number = found
        raise NotFiniteError(
            f"{key or 'The value'} is {number}, and a file holds finite numbers only. What has no value is null there; "
            "look at the weights, the activations or the counts that this was computed from."
        ) from error


def _not_finite(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """Keys, as in a.b[3].c, and values of all numbers that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _not_finite(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _not_finite(item, f"{key}[{i}]")
