"""Attributes of public classes that were renamed: the old names still work, with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

C = TypeVar("C", bound=type)


def renamed_attributes(**renamed: str) -> Callable[[C], C]:
    """A class decorator that keeps old names of attributes and methods readable.

    Args:
        renamed: old name -> present name. Reading the old name gives the present attribute and a FutureWarning.
    """

    def decorate(cls: C) -> C:
        for old, new in renamed.items():
            setattr(cls, old, _alias(cls.__name__, old, new))
        return cls

    return decorate


def _alias(owner: str, old: str, new: str) -> property:
    def read(self: Any) -> Any:
        warnings.warn(f"{owner}.{old} is now {owner}.{new}.", FutureWarning, stacklevel=2)
        return getattr(self, new)

    return property(read, doc=f"The old name of `{new}`.")
