"""How the words of a command become values: several words after one option, and numbers within bounds."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import typer
from typer.core import TyperCommand, TyperOption

from tl_adapters.errors import UserError
from tl_adapters.utils.printing import looks_like_option

LARGEST_SEED = 2**63 - 1
"""Largest seed that every random generator takes."""


class Words(tuple[str, ...]):
    """The words that follow one occurrence of an option, such as 2.17 and 4.3 after --ablate."""

    @classmethod
    def read(cls, text: str) -> Words:
        """The words of a text in which a shell's quotes keep spaces together."""
        return cls(shlex.split(text))


class Subcommand(TyperCommand):
    """A subcommand that typer parses and `cli.main.main` runs.

    An option whose metavar ends in "..." takes every word up to the next option, as one value (see `Words`); one whose
    metavar is in brackets may stand alone, which means 0. A word that begins with two dashes is an option, never the
    value of one, unless it is given as --option=--word.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words that follow the name of the subcommand. Raises UserError."""
        options = {name: option for option in self.params if isinstance(option, TyperOption) for name in option.opts}
        return super().parse_args(ctx, list(_with_one_value(args, options)))

    def invoke(self, ctx: Any) -> Callable[[], Any]:
        """The call of the subcommand's function, which is not made here: typer would swallow the text of Ctrl-C."""
        assert self.callback is not None
        return partial(self.callback, **ctx.params)


def _with_one_value(args: Sequence[str], options: dict[str, TyperOption]) -> Iterable[str]:
    """The words of a command, in which every option that takes values is followed by exactly one."""
    rest = list(args)
    while rest:
        word = rest.pop(0)
        name, has_value, value = word.partition("=")
        option = options.get(name)
        if word == "--":
            yield from (word, *rest)
            return
        if option is None or option.is_flag:
            if not word:
                raise UserError("An argument of the command is empty (''); give a value.")
            yield word
            continue
        metavar = option.metavar or ""
        values = [value] if has_value else []
        while rest and not looks_like_option(rest[0]) and _takes_another(metavar, values, rest[0]):
            values.append(rest.pop(0))
        if not values and metavar.startswith("["):
            values = ["0"]
        if not values or "" in values:
            follows = "an empty one" if values else f"the option {rest[0]}" if rest else "nothing"
            raise UserError(f"{name} needs a value, and {follows} follows; give {name} {metavar.removesuffix('...')}.")
        yield from (name, shlex.join(values) if metavar.endswith("...") else values[0])


def _takes_another(metavar: str, values: Sequence[str], word: str) -> bool:
    return metavar.endswith("...") or not (values or (metavar.startswith("[") and not word.isdecimal()))


# -- options ----------------------------------------------------------------------------------------------------------


def whole(name: str, help: str, least: int = 1, most: int | None = None, metavar: str = "N") -> Any:
    """An option whose value is a whole number from ``least`` to ``most``."""

    def read(given: object) -> int:
        text = str(given)  # typer reads defaults, too
        value = int(text) if text.strip().lstrip("+-").isdecimal() and len(text) < 40 else None
        if value is None or value < least or (most is not None and value > most):
            bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise UserError(f"{name} is {text}; give a whole number {bounds}.")
        return value

    return typer.Option(name, help=help, metavar=metavar, parser=read)


def number(
    name: str, help: str, least: float = 0.0, most: float = math.inf, *, above: bool = False, metavar: str = "X"
) -> Any:
    """An option whose value is a finite number from ``least``, or ``above`` it, to ``most``."""

    def read(given: object) -> float:
        text = str(given)
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not least <= value <= most or (above and value == least):
            lower = "" if math.isinf(least) else f" above {least:g}" if above else f" of at least {least:g}"
            upper = "" if math.isinf(most) else f"{' and' if lower else ''} of at most {most:g}"
            raise UserError(f"{name} is {text}; give a finite number{lower}{upper}.")
        return value

    return typer.Option(name, help=help, metavar=metavar, parser=read)


def words(name: str, help: str, metavar: str) -> Any:
    """An option that takes every word up to the next option."""
    return typer.Option(name, help=help, metavar=f"{metavar}...", parser=Words.read)


def choices(name: str, help: str, allowed: Sequence[str]) -> Any:
    """An option that may be given several times, each time with one of the ``allowed`` words."""

    def read(text: str) -> str:
        if text not in allowed:
            raise UserError(f"{name} is {text}; give one of {', '.join(allowed)}.")
        return text

    return typer.Option(name, help=help, metavar="|".join(allowed), parser=read)


def exactly_one(**given: object) -> None:
    """Raises UserError unless exactly one of two or more options, by their names with underscores, has a value."""
    names = [f"--{name.replace('_', '-')}" for name in given]
    found = [name for name, value in zip(names, given.values(), strict=True) if value is not None]
    if len(found) != 1:
        which = f"{' and '.join(found)} exclude each other" if found else f"{' and '.join(names)} are missing"
        raise UserError(f"{which}; give {' or '.join(names)}.")


def refuse(reason: str, **given: object) -> None:
    """Raises UserError for the options, by their names with underscores, that are given although nothing reads them."""
    found = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None and value is not False]
    if found:
        raise UserError(f"{reason}; leave out {', '.join(found)}.")
