"""Old names of attributes and arguments give what new ones give, and warn; none is kept whose new one is gone."""

import ast
import importlib
from pathlib import Path

import pytest
from helpers.renamed import PACKAGE, renamed_arguments_by_function

from tl_adapters.data.traces import Trace
from tl_adapters.utils.renamed import renamed_arguments, renamed_attributes


@renamed_attributes(old="new", say="greet")
class Renamed:
    new = 3

    def greet(self, name: str) -> str:
        return f"hello {name}"


def test_an_old_name_reads_the_new_attribute_and_warns() -> None:
    with pytest.warns(FutureWarning, match=r"Renamed\.old is now Renamed\.new"):
        assert Renamed().old == 3  # type: ignore[attr-defined]
    with pytest.warns(FutureWarning, match=r"Renamed\.say is now Renamed\.greet"):
        assert Renamed().say("you") == "hello you"  # type: ignore[attr-defined]


def test_a_dataclass_keeps_its_fields() -> None:
    trace = Trace((1, 2, 3), 1)
    with pytest.warns(FutureWarning, match="has_counted_tokens"):
        old = trace.counts  # type: ignore[attr-defined]
    assert old == trace.has_counted_tokens
    assert trace == Trace((1, 2, 3), 1)
    assert "counts" not in repr(trace)


def decorated() -> list[tuple[str, str, str, str]]:
    """(module, class, old name, new name) of every renamed attribute of the package."""
    rows = []
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            for call in getattr(node, "decorator_list", []):
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "renamed_attributes":
                    assert isinstance(node, ast.ClassDef)
                    rows += [(module, node.name, k.arg or "", ast.literal_eval(k.value)) for k in call.keywords]
    return rows


@pytest.mark.parametrize(("module", "owner", "old", "new"), decorated())
def test_the_new_name_exists(module: str, owner: str, old: str, new: str) -> None:
    cls = getattr(importlib.import_module(module), owner)
    assert isinstance(vars(cls)[old], property)
    fields = set(getattr(cls, "__dataclass_fields__", ()))
    source = Path(PACKAGE.parent, *module.split(".")).with_suffix(".py").read_text()
    assigned = {n.attr for n in ast.walk(ast.parse(source))
                if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}  # fmt: skip
    assert hasattr(cls, new) or new in fields | assigned


@renamed_arguments(old="new")
def doubled(value: int, *, new: int = 0) -> int:
    return 2 * value + new


def test_an_old_argument_is_the_new_one_and_warns() -> None:
    with pytest.warns(FutureWarning, match=r"doubled\(old=\) is now doubled\(new=\)"):
        assert doubled(2, old=1) == 5  # type: ignore[call-arg]
    assert doubled(2, new=1) == 5 and doubled(2) == 4
    with pytest.raises(TypeError, match="got old= and new=, which are one argument"):
        doubled(2, old=1, new=1)  # type: ignore[call-arg]


def test_the_new_arguments_exist() -> None:
    assert set(renamed_arguments_by_function()) >= {"attribute", "Circuit.push_to_hub"}
