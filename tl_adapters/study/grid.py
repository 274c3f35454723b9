"""The configurations of a grid of training options: one for every combination of its values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from tl_adapters.config import RunConfig
from tl_adapters.errors import UserError


class GridError(UserError, ValueError):
    """A grid without configurations, or with one twice."""


def grid_configurations(config: RunConfig, grid: Mapping[str, Sequence[Any]]) -> dict[str, RunConfig]:
    """The configuration of every point of a grid, by the name of its folder. Raises ConfigError and GridError."""
    if not grid:
        raise GridError("A sweep needs options and their values, such as l1_weight=0.001,0.01; the grid is empty.")
    for option, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise GridError(f"The values of {option} are {values!r}; give a list of one or more.")
    given = config.to_dict()
    configurations: dict[str, RunConfig] = {}
    for values in product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        run = RunConfig.from_dict({**given, "training": {**given["training"], **chosen}})
        name = "_".join(f"{option}-{_in_a_name(value)}" for option, value in chosen.items())
        if name in configurations:
            raise GridError(f"The grid names {name} twice; give each value once.")
        configurations[name] = run
    return configurations


def _in_a_name(value: Any) -> str:
    """A value as part of a folder's name: 1 and 1.0 are equal, and only letters, digits, - and . stay."""
    text = "+".join(value) if isinstance(value, (list, tuple)) else str(value).removesuffix(".0")
    return "".join(c if c.isalnum() or c in "+-." else "+" for c in text)


def read_grid(options: Sequence[str]) -> dict[str, list[Any]]:
    """The grid of options such as "l1_weight=1e-3,1e-2"; values are read as JSON, or else as text. Raises GridError."""
    grid: dict[str, list[Any]] = {}
    for option in options:
        name, _, values = option.partition("=")
        if not name or not values or name in grid:
            raise GridError(
                f"{option!r} does not name an option and its values; give each option once, as OPTION=VALUE,VALUE,..."
            )
        grid[name] = [_scalar(value) for value in values.split(",")]
    return grid


def _scalar(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
