"""What a subcommand prints when it is done: lines for a person, or one JSON object, and the command to run next."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tl_adapters.utils.printing import printable_line, show


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
    """The command to run next, as a shell reads it (`utils.printing.command`). It runs as it is; where it needs what
    only the user has, a name in capitals stands for it, such as HELD_OUT.jsonl, and ``text`` says what to give."""
    escaped: bool = False
    """Whether ``text`` is printable already, and its escape sequences are meant."""
    status: int = 0
    """Exit code."""
    then: Callable[[], object] | None = None
    """What runs once the result is printed, until the user stops it."""
    address: str = ""
    """A line for a person, behind the paths: where a browser finds the page, as terminals make it clickable."""

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
        if self.address:
            show(printable_line(self.address))
        if self.next:
            show(f"next: {printable_line(self.next)}")


def to_json(value: Mapping[str, Any]) -> str:
    """One line of JSON, in ASCII, so that no terminal acts on what is in it."""
    return json.dumps(value, default=str)


def _texts(path: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(path)] if isinstance(path, str | Path) else [str(item) for item in path]
