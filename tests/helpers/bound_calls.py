"""Code that cannot be run here, read: do its names of tl_adapters exist, and do the arguments of its calls bind?

    check_calls("import tl_adapters as tla\\npair = tla.load(\"runs/mine\", devise=0)")  # raises TypeError

What a name holds is followed through imports, assignments and `with`, by the annotations of what is called. A value
that is of no class of tl_adapters is not followed.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tl_adapters

PACKAGE = Path(tl_adapters.__file__).parent


class _Instance(NamedTuple):
    """An object of a class, of which nothing else is known."""

    of: type


class _Unimportable(NamedTuple):
    """A public class or function whose module needs a library that is not installed here."""

    signature: inspect.Signature


def check_calls(source: str, known: Mapping[str, object] | None = None) -> int:
    """The number of calls of tl_adapters in a source, all of which bind.

    Args:
        source: statements of Python.
        known: what names hold before: modules, functions, classes.

    Raises SyntaxError; AttributeError and ImportError for a name that does not exist, TypeError for wrong arguments.
    """
    reader = _Reader(dict(known or {}))
    for statement in ast.parse(source).body:
        reader.visit(statement)
    return reader.calls


class _Reader(ast.NodeVisitor):
    def __init__(self, names: dict[str, object]) -> None:
        self.names, self.calls = names, 0

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] == "tl_adapters":
                self.names[alias.asname or "tl_adapters"] = importlib.import_module(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if (node.module or "").split(".")[0] == "tl_adapters":
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                self.names[alias.asname or alias.name] = _attribute(module, alias.name)

    def visit_Assign(self, node: ast.Assign) -> None:
        held = self.value(node.value)
        for target in node.targets:
            self._hold(target, held)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            held = self.value(item.context_expr)
            if item.optional_vars is not None:
                self._hold(item.optional_vars, held)
        for statement in node.body:
            self.visit(statement)

    def visit_Expr(self, node: ast.Expr) -> None:
        self.value(node.value)

    def _hold(self, target: ast.expr, held: object) -> None:
        for name in ast.walk(target):
            if isinstance(name, ast.Name):
                self.names[name.id] = held if name is target else None

    def value(self, node: ast.expr) -> object:
        """What an expression holds as far as it can be told, else None; calls within it are checked."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            return _attribute(self.value(node.value), node.attr)
        if isinstance(node, ast.Call):
            called = self.value(node.func)
            for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
                self.value(argument)
            return self._called(called, node)
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.expr):
                self.value(part)
        return None

    def _called(self, called: object, node: ast.Call) -> object:
        if called is None or isinstance(called, _Instance):
            return None
        self.calls += 1
        signature = (
            called.signature if isinstance(called, _Unimportable) else inspect.signature(typing.cast(Any, called))
        )
        if not any(isinstance(a, ast.Starred) for a in node.args) and all(k.arg for k in node.keywords):
            try:
                signature.bind(*node.args, **{str(k.arg): k.value for k in node.keywords})
            except TypeError as error:
                raise TypeError(f"{ast.unparse(node)}: {error}") from None
        return _returned(called)


def _attribute(owner: object, name: str) -> object:
    """An attribute of a module, a class or an object of a class; None where the owner is not known."""
    if owner is None or isinstance(owner, _Unimportable):
        return None
    if owner is tl_adapters and name in tl_adapters.EXPORTS:
        try:
            return getattr(tl_adapters, name)
        except ImportError:
            return _Unimportable(_written_signature(tl_adapters.EXPORTS[name], name))
    if not isinstance(owner, _Instance):
        return getattr(owner, name)
    found = inspect.getattr_static(owner.of, name, None)
    if isinstance(found, property) or name in inspect.get_annotations(owner.of):
        return None
    bound = getattr(owner.of, name)  # raises AttributeError where there is none
    if not inspect.isfunction(bound):
        return bound
    own, *others = inspect.signature(bound).parameters.values()
    return _Unimportable(inspect.Signature(others))


def _written_signature(module: str, name: str) -> inspect.Signature:
    """The signature of a class or function, read from its source."""
    tree = ast.parse((PACKAGE / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8"))
    found = next(n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name)
    if isinstance(found, ast.ClassDef):
        found = next(n for n in found.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
        found.args.args = found.args.args[1:]
    given = found.args
    for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs):
        argument.annotation = None
    given.defaults = [ast.Constant(None) for _ in given.defaults]
    given.kw_defaults = [default and ast.Constant(None) for default in given.kw_defaults]
    return inspect.signature(eval(f"lambda {ast.unparse(given)}: None"))


def _returned(called: object) -> object:
    """An object of the class of tl_adapters that a call returns, or that a context gives; None for anything else."""
    if inspect.isclass(called):
        return _Instance(called)
    if inspect.ismethod(called) and inspect.isclass(called.__self__):
        return _Instance(called.__self__)  # from_pretrained and its like
    try:
        hint = typing.get_type_hints(called).get("return")
    except (NameError, TypeError):  # annotations that are imported for type checkers alone
        return None
    hint = next(iter(typing.get_args(hint)), hint)  # Iterator[X] is what a context gives
    return _Instance(hint) if inspect.isclass(hint) and hint.__module__.startswith("tl_adapters") else None
