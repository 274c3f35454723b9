"""Calls in the package are checked against their annotations, at a cost that a whole suite can bear.

jaxtyping checks shapes: it binds the names of axes anew in each call, which takes about 25 microseconds, and compiles
two functions for every definition, which takes a millisecond. Most functions have no shapes, and beartype alone checks
the same annotations of theirs in one microsecond. A function within a function is defined again in every call of the
outer one, so that its checks are compiled once for all. Of every function the first calls of each test are checked,
those of its fixtures included: loops call some functions a million times, and all of these checks would take a third of
the suite's time.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
import typing
from collections.abc import Callable
from inspect import Signature
from types import CellType, CodeType, FunctionType
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, TypeCheckError, install_import_hook

check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeCheckError))  # an int is a float
_check_shapes = jaxtyping.jaxtyped
CHECKED_CALLS = 100
"""Number of calls of a function that are checked in a test."""
_calls: dict[object, int] = {}
"""Number of checked calls of each function in this test; a key stands for a definition."""


def check_types(package: str) -> None:
    """Check the calls of every module of ``package`` that is imported from now on."""
    jaxtyping.jaxtyped = lambda *, typechecker: _checked  # the decorator that the hook writes above each definition
    install_import_hook(package, f"{__name__}.check")


def begin_test() -> None:
    """Check the next calls of every function again."""
    _calls.clear()


def _is_checked(definition: object) -> bool:
    """Whether this call of a function is checked; counts it if so. jaxtyping's own switch counts, too."""
    n = _calls.get(definition, 0)
    if n >= CHECKED_CALLS or jaxtyping.config.jaxtyping_disable:
        return False
    _calls[definition] = n + 1
    return True


def _checked(defined: Any) -> Any:
    """The class or function with its calls checked."""
    if not inspect.isclass(defined):
        return _checked_function(defined)
    if dataclasses.is_dataclass(defined) and not hasattr(defined.__init__, "__wrapped__"):
        defined.__init__ = _checked_function(defined.__init__)
    return defined


def _checked_function(function: FunctionType) -> Callable[..., Any]:
    if "<locals>" in function.__qualname__:
        return _checked_closure(function)
    signature = _resolved(function)
    if _has_shapes(signature):
        return _at_first(function, _check_shapes(function, typechecker=check), object())
    written = function.__annotations__
    function.__annotations__ = _annotations(signature)
    wrapper = check(function)
    function.__annotations__ = written
    if wrapper is function:
        return function
    wrapper.__annotations__ = written
    return _at_first(function, wrapper, object())


def _at_first(function: FunctionType, wrapper: Callable[..., Any], definition: object) -> Callable[..., Any]:
    """The function with the checks of its wrapper in the first calls of a test."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (wrapper if _is_checked(definition) else function)(*args, **kwargs)

    return call


# -- functions within functions ----------------------------------------------------------------------------------------

_Around = Callable[[FunctionType], Callable[..., Any]]
_compiled: dict[tuple[str, str, CodeType], _Around] = {}
"""By the code that closures share, what puts the checks around one of them."""


def _checked_closure(function: FunctionType) -> Callable[..., Any]:
    key = function.__module__, function.__qualname__, function.__code__
    if key not in _compiled:
        signature = _resolved(function)
        _compiled[key] = (_around_shaped if _has_shapes(signature) else _around_plain)(function, signature)
    return _compiled[key](function)


def _around_plain(function: FunctionType, signature: Signature) -> _Around:
    """beartype's wrapper of an empty closure is compiled once; in its copies a given closure stands in that place."""
    cells = tuple(CellType() for _ in function.__code__.co_freevars)
    empty = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
    empty.__annotations__, empty.__qualname__ = _annotations(signature), function.__qualname__
    wrapper: Any = check(empty)
    if wrapper is empty:  # it has no annotations
        return lambda function: function
    assert [*wrapper.__kwdefaults__.values()].count(empty) == 1
    definition = object()

    def around(function: FunctionType) -> Callable[..., Any]:
        copy = FunctionType(wrapper.__code__, wrapper.__globals__, function.__name__, wrapper.__defaults__)
        copy.__kwdefaults__ = {k: function if v is empty else v for k, v in wrapper.__kwdefaults__.items()}
        return _at_first(function, functools.wraps(function)(copy), definition)

    return around


_called = threading.local()


def _around_shaped(function: FunctionType, signature: Signature) -> _Around:
    """jaxtyping's wrapper of a function that calls the given closure is compiled once; it keeps no closure alive."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return _called.functions[-1](*args, **kwargs)

    defaults = [p if p.default is p.empty else p.replace(default=None) for p in signature.parameters.values()]
    call.__signature__ = signature.replace(parameters=defaults)  # type: ignore[attr-defined]
    call.__name__, call.__qualname__, call.__module__ = function.__name__, function.__qualname__, function.__module__
    compiled = _check_shapes(call, typechecker=check)
    definition = object()

    def around(function: FunctionType) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not _is_checked(definition):
                return function(*args, **kwargs)
            functions = _called.__dict__.setdefault("functions", [])
            functions.append(function)
            try:
                return compiled(*args, **kwargs)
            finally:
                functions.pop()

        return wrapper

    return around


# -- annotations -------------------------------------------------------------------------------------------------------


def _resolved(function: FunctionType) -> Signature:
    """The signature with types for their names; a name that is not defined yet stands for anything, as in jaxtyping."""
    signature = inspect.signature(function)
    resolve = lambda annotation: _type_of(annotation, function.__globals__)  # noqa: E731
    parameters = [p.replace(annotation=resolve(p.annotation)) for p in signature.parameters.values()]
    return signature.replace(parameters=parameters, return_annotation=resolve(signature.return_annotation))


def _type_of(annotation: Any, names: dict[str, Any]) -> Any:
    if annotation is Signature.empty:
        return annotation
    try:
        return typing.get_type_hints(_Holder(annotation), names, include_extras=True)["value"]
    except Exception:  # whatever the evaluation of an annotation raises
        return Any


class _Holder:
    """An object with one annotation, as `typing.get_type_hints` reads it."""

    def __init__(self, annotation: Any) -> None:
        self.__annotations__ = {"value": annotation}


def _annotations(signature: Signature) -> dict[str, Any]:
    named = {p.name: p.annotation for p in signature.parameters.values()} | {"return": signature.return_annotation}
    return {name: annotation for name, annotation in named.items() if annotation is not Signature.empty}


def _has_shapes(signature: Signature) -> bool:
    return any(map(_is_shaped, _annotations(signature).values()))


def _is_shaped(annotation: Any) -> bool:
    if isinstance(annotation, list | tuple):  # the parameters of a Callable
        return any(map(_is_shaped, annotation))
    if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
        return True
    return any(map(_is_shaped, typing.get_args(annotation)))
