"""Print pip constraints that pin every direct dependency to the lowest version which pyproject.toml allows.

`make versions` installs by them, so that each lower bound is one that was tried.
"""

import re
import tomllib
from pathlib import Path

EXTRAS = ("saelens",)
"""Extras whose bounds are tried beside those of the package itself."""


def lowest(project: dict) -> list[str]:
    """`name==version` of each requirement that has a lower bound."""
    requirements = [*project["dependencies"], *(r for extra in EXTRAS for r in project["optional-dependencies"][extra])]
    bounds = (re.match(r"([\w-]+)[^>]*>=([\w.]+)", requirement) for requirement in requirements)
    return [f"{found[1]}=={found[2]}" for found in bounds if found]


if __name__ == "__main__":
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    print("\n".join(lowest(tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"])))
