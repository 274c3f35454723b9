"""What a subcommand prints when it is done: lines for a person, or one JSON object, and the command to run next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tl_adapters.utils.printing import printable_character, printable_line, show


@dataclass(frozen=True)
class Result:
    """What a subcommand made and measured."""

    paths: Mapping[str, str | Path | Sequence[str | Path]] = field(default_factory=dict)
    """Name -> path or address of what was written; each is a line."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """What was measured, as plain values; printed with --json only, since ``text`` says the same to a person."""
    text: str = ""
    """Lines for a person, before the paths."""
    next: str | None = None
    """The command to run next, as a shell reads it."""
    escaped: bool = False
    """Whether ``text`` is printable already, and its escape sequences are meant."""
    status: int = 0
    """Exit code."""
    then: Callable[[], object] | None = None
    """What runs once the result is printed, until the user stops it."""

    def show(self, as_json: bool = False) -> None:
        """Print the result."""
        if as_json:
            lists = {name: _texts(path) for name, path in self.paths.items()}
            paths = {name: texts[0] if len(texts) == 1 else texts for name, texts in lists.items()}
            show(to_json({"results": self.values, "paths": paths, "next": self.next}))
            return
        if self.text:
            show(self.text, escaped=self.escaped)
        for name, path in self.paths.items():
            show("\n".join(f"{name}: {printable_line(text)}" for text in _texts(path)))
        if self.next:
            show(f"next: {printable_line(self.next)}")


def to_json(value: Mapping[str, Any]) -> str:
    """One line of JSON, in ASCII, so that no terminal acts on what is in it."""
    return json.dumps(value, default=str)


def command(*words: object, **options: object) -> str:
    """A command of ours as a shell reads it: `command("evaluate", run, data="my file.jsonl")`.

    Args:
        words: the subcommand and its arguments.
        options: options by their names with underscores. None and False leave an option out, True gives it alone, and a
            list gives it once, with all values after it.
    """
    line = ["tl-adapters", *map(str, words)]
    for name, value in options.items():
        if value is None or value is False:
            continue
        line.append(f"--{name.replace('_', '-')}")
        line += [] if value is True else map(str, value) if isinstance(value, list | tuple) else [str(value)]
    return " ".join(map(quoted, line))


def quoted(word: str) -> str:
    """A word as a shell reads it, without characters that a terminal acts on (bash and zsh read them from $'...')."""
    if "".join(map(printable_character, word)) == word:
        return shlex.quote(word)
    return f"$'{''.join(map(_ansi_c, word))}'"


def _ansi_c(character: str) -> str:
    """A character between $' and '."""
    if character in "\\'":
        return f"\\{character}"
    if printable_character(character) == character:
        return character
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"


def _texts(path: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(path)] if isinstance(path, str | Path) else [str(item) for item in path]
