"""Attributes of public classes and arguments of public functions that were renamed: old names still work, and warn."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

C = TypeVar("C", bound=type)
P = ParamSpec("P")
T = TypeVar("T")


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


def renamed_arguments(**renamed: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator that keeps old names of keyword arguments usable.

    Args:
        renamed: old name -> present name. Giving the old name gives the present argument and a FutureWarning; giving
            both is a TypeError.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            for old in renamed.keys() & kwargs.keys():
                new, name = renamed[old], function.__name__
                if new in kwargs:
                    raise TypeError(f"{name}() got {old}= and {new}=, which are one argument; give {new}=.")
                warnings.warn(f"{name}({old}=) is now {name}({new}=).", FutureWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def _alias(owner: str, old: str, new: str) -> property:
    def read(self: Any) -> Any:
        warnings.warn(f"{owner}.{old} is now {owner}.{new}.", FutureWarning, stacklevel=2)
        return getattr(self, new)

    return property(read, doc=f"The old name of `{new}`.")
