"""The configurations of a grid of training options: one for every combination of its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from tl_adapters.config import RunConfig, option_path, parse_option, with_options
from tl_adapters.errors import UserError

_SWEPT = "training."


class GridError(UserError, ValueError):
    """A grid without configurations, or with one twice."""


def swept_option(name: str) -> str:
    """The path of a training option within `TrainingConfig`, such as lr for training.lr, or loss_weights.nmse for nmse.

    Raises ConfigError for an unknown option, and GridError for one outside training.
    """
    path = option_path(name)
    if not path.startswith(_SWEPT):
        raise GridError(f"{path} cannot be swept; options of training can, such as sparsity_weight.")
    return path.removeprefix(_SWEPT)


def grid_configurations(config: RunConfig, grid: Mapping[str, Sequence[Any]]) -> dict[str, RunConfig]:
    """The configuration of every point of a grid, by the name of its folder. Raises ConfigError and GridError."""
    if not grid:
        raise GridError("A sweep needs options and their values, such as sparsity_weight=0.1,0.4; the grid is empty.")
    for option, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise GridError(f"The values of {option} are {values!r}; give a list of one or more.")
    options = [swept_option(name) for name in grid]
    configurations: dict[str, RunConfig] = {}
    for values in product(*grid.values()):
        chosen = dict(zip(options, values, strict=True))
        run = with_options(config, {f"{_SWEPT}{option}": value for option, value in chosen.items()})
        name = "_".join(f"{option}-{_in_a_name(value)}" for option, value in chosen.items())
        if name in configurations:
            raise GridError(f"The grid names {name} twice; give each value once.")
        configurations[name] = run
    return configurations


def _in_a_name(value: Any) -> str:
    """A value as part of a folder's name: 1 and 1.0 are equal, and only letters, digits, - and . stay."""
    text = "+".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value).removesuffix(".0")
    return "".join(c if c.isalnum() or c in "+-." else "+" for c in text)


def read_grid(options: Sequence[str]) -> dict[str, list[Any]]:
    """The grid of options such as "sparsity_weight=0.1,0.4", whose values are read as `config.parse_option` reads them.

    Raises GridError and ConfigError.
    """
    grid: dict[str, list[Any]] = {}
    for option in options:
        name, _, values = option.partition("=")
        if not name or not values:
            raise GridError(
                f"{option!r} does not name an option and its values; give each option once, as OPTION=VALUE,VALUE,..."
            )
        if (swept := swept_option(name)) in grid:
            raise GridError(f"{option!r} names {swept} a second time; give each option once, as OPTION=VALUE,VALUE,...")
        grid[swept] = [parse_option(f"{_SWEPT}{swept}", value) for value in values.split(",")]
    return grid
