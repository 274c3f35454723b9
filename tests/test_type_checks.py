"""The suite notices a call that does not fit the annotations, whatever kind of definition it is a call of."""

import gc
import importlib
import inspect
import weakref
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from helpers.type_checks import CHECKED_CALLS, begin_test, check_types
from jaxtyping import TypeCheckError

SOURCE = """
from __future__ import annotations
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from jaxtyping import Float
from torch import Tensor

def plain(x: int, *more: str, key: float = 1) -> str:
    return "" if x else None

def shaped(x: Float[Tensor, "a b"], y: list[Float[Tensor, "b"]]) -> Float[Tensor, "a"]:
    return x[0] if x.sum() < 0 else x[:, 0]

@dataclass
class Record:
    count: int
    values: Float[Tensor, "n n"]

class Holder:
    def method(self, x: int) -> int:
        return x
    @classmethod
    def made(cls, x: int) -> int:
        return x
    @staticmethod
    def free(x: int) -> int:
        return x
    @property
    def value(self) -> int:
        return "a"
    @cached_property
    def cached(self) -> int:
        return "a"

@contextmanager
def context(x: int) -> Iterator[int]:
    yield x

def closure(added: object):
    def inner(x: int, more: object = added) -> list[object]:
        return [x, added, more]
    return inner

def keywords(added: object):
    def inner(x: int, *more: str, key: float = 2, **others: object) -> object:
        return [x, more, key, others, added]
    return inner

def alone():
    def inner(x: int) -> int:
        return x
    return inner

def shaped_closure(added: object):
    def inner(x: Float[Tensor, "a b"]) -> Float[Tensor, "b"]:
        return x.sum(0) + (added if isinstance(added, Tensor) else 0)
    return inner
"""


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    folder = tmp_path_factory.mktemp("package")
    (folder / "checked_by_this_test.py").write_text(SOURCE)
    check_types("checked_by_this_test")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return importlib.import_module("checked_by_this_test")


SQUARE, ROW = torch.zeros(3, 3), torch.zeros(2)
WRONG: dict[str, Callable[[ModuleType], object]] = {
    "an argument": lambda m: m.plain("1"),
    "one of many arguments": lambda m: m.plain(1, "a", 2),
    "an argument by name": lambda m: m.plain(1, key="2"),
    "a returned value": lambda m: m.plain(0),
    "a number of axes": lambda m: m.shaped(ROW, []),
    "an axis of two arguments": lambda m: m.shaped(SQUARE, [ROW]),
    "a dtype": lambda m: m.shaped(SQUARE.int(), []),
    "an axis of the returned value": lambda m: m.shaped(-torch.ones(2, 3), []),
    "a field": lambda m: m.Record("1", SQUARE),
    "the shape of a field": lambda m: m.Record(1, SQUARE[:2]),
    "a method": lambda m: m.Holder().method("1"),
    "a class method": lambda m: m.Holder.made("1"),
    "a static method": lambda m: m.Holder.free("1"),
    "a property": lambda m: m.Holder().value,
    "a cached property": lambda m: m.Holder().cached,
    "a context": lambda m: m.context("1").__enter__(),
    "a function within a function": lambda m: m.closure(1)("1"),
    "another one with the same code": lambda m: [m.closure(1)(1), m.closure(2)("1")],
    "a keyword of one": lambda m: m.keywords(1)(1, key="a"),
    "many arguments of one": lambda m: m.keywords(1)(1, 2),
    "one that closes over nothing": lambda m: [m.alone()(1), m.alone()("1")],
    "the shape of one within a function": lambda m: m.shaped_closure(ROW)(ROW),
    "what another one returns": lambda m: [m.shaped_closure(ROW)(SQUARE[:, :2]), m.shaped_closure(SQUARE)(SQUARE)],
}


@pytest.mark.parametrize("call", WRONG)
def test_a_wrong_call_is_noticed(call: str, checked: ModuleType) -> None:
    with pytest.raises(TypeCheckError):
        WRONG[call](checked)


def test_a_right_call_does_what_it_says(checked: ModuleType) -> None:
    assert checked.plain(1, "a", key=2) == ""
    assert checked.shaped(torch.ones(2, 3), [torch.ones(3)]).shape == (2,)
    assert checked.Record(1, SQUARE).count == 1
    assert checked.Holder().method(2) == checked.Holder.made(2) == checked.Holder.free(2) == 2
    with checked.context(3) as value:
        assert value == 3
    one, other = checked.closure("a"), checked.closure("b")
    assert one(1) == [1, "a", "a"] and other(2) == [2, "b", "b"] and one(3, "c") == [3, "a", "c"]
    assert checked.keywords(0)(1, "a", b=3) == [1, ("a",), 2, {"b": 3}, 0] and checked.alone()(5) == 5
    assert checked.shaped_closure(ROW)(SQUARE[:, :2]).shape == (2,)
    assert one.__name__ == "inner" and inspect.signature(one).parameters["more"].default == "a"


@pytest.mark.parametrize("call", ["an argument", "a dtype", "a method", "a keyword of one", "what another one returns"])
def test_a_function_is_checked_in_its_first_calls_of_every_test(call: str, checked: ModuleType) -> None:
    def raises() -> bool:
        try:
            WRONG[call](checked)
        except TypeCheckError:
            return True
        except Exception:  # unchecked, what the function itself does with it
            pass
        return False

    raised = [raises() for _ in range(CHECKED_CALLS + 1)]
    assert raised[0] and not raised[-1]
    assert raised == sorted(raised, reverse=True)
    begin_test()
    assert raises()


def test_what_a_function_closes_over_is_not_kept(checked: ModuleType) -> None:
    class Value:
        pass

    value = Value()
    gone = weakref.ref(value)
    checked.closure(value)(1)
    checked.shaped_closure(value)(SQUARE)
    del value
    gc.collect()
    assert gone() is None
