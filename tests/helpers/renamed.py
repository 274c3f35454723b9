"""Arguments of the package's functions that were renamed, read from its source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import tl_adapters

PACKAGE = Path(tl_adapters.__file__).parent


def renamed_arguments_by_function() -> dict[str, dict[str, str]]:
    """Function, or class and method ("Circuit.push_to_hub") -> old name -> present name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for owner, function in _functions(ast.parse(path.read_text(encoding="utf-8"))):
            for decorator in function.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "renamed_arguments":
                    pairs = {str(k.arg): ast.literal_eval(k.value) for k in decorator.keywords}
                    arguments = {a.arg for a in (*function.args.args, *function.args.kwonlyargs)}
                    assert set(pairs.values()) <= arguments and not set(pairs) & arguments, (owner, function.name)
                    found[f"{owner}{function.name}"] = pairs
    return found


def _functions(module: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in module.body:
        for inner in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(inner, ast.FunctionDef):
                yield (f"{node.name}." if isinstance(node, ast.ClassDef) else ""), inner
