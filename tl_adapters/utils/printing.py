"""Text for a terminal: characters that a terminal would act on, or would not show, are written as escapes.

Names and texts that we did not write (of a downloaded set, a model, a file, an answer) may hold an escape sequence,
which moves the cursor, renames the window or hides text, or a mark that changes the direction of writing. `show` and
`show_error` are the only functions of the package that print, and `VisibleRecord` does the same for log messages.
A command that a message names is written by `command`, so that a shell reads it as it was meant.
"""

from __future__ import annotations

import logging
import shlex
import sys
import traceback
import unicodedata
from types import TracebackType
from typing import Any

_INVISIBLE = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")


def show(text: str, *, escaped: bool = False) -> None:
    """Prints a text and a line break to the standard output, with everything invisible made visible.

    Args:
        text: one or more lines.
        escaped: the text went through `printable` already, and its escape sequences are meant, such as those for bold.
    """
    _print(text if escaped else printable(text), sys.stdout)


def show_error(text: str) -> None:
    """Prints a text and a line break to the standard error, with everything invisible made visible."""
    _print(printable(text), sys.stderr)


def _print(text: str, stream: Any) -> None:
    encoding = stream.encoding or "utf-8"
    # A terminal of another encoding shows escapes instead of failing.
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def printable(text: str) -> str:
    """The text with every character escaped that a terminal would act on or not show; line breaks stay."""
    return "".join(character if character == "\n" else printable_character(character) for character in text)


def printable_line(text: str) -> str:
    """The text on one line: as `printable`, and line breaks are escaped as well."""
    return "".join(map(printable_character, text))


def printable_character(character: str) -> str:
    """The character, or its escape where a terminal would act on it or not show it; four spaces for a tab."""
    if character == "\t":
        return "    "
    return ascii(character)[1:-1] if unicodedata.category(character) in _INVISIBLE else character


def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A `sys.excepthook` whose traceback is printable."""
    show_error("".join(traceback.format_exception(kind, error, trace)).rstrip())


class VisibleRecord(logging.LogRecord):
    """A record of which every handler, also one that another library has added, writes a printable message."""

    def getMessage(self) -> str:
        """The message, with everything invisible made visible."""
        return printable(super().getMessage())


def command(*words: object, **options: object) -> str:
    """A command of ours as a shell reads it: `command("evaluate", run, data="my file.jsonl")`.

    Args:
        words: the subcommand and its arguments.
        options: options by their names with underscores. None and False leave an option out, True gives it alone, and a
            list gives it once, with all values after it.
    """
    subcommand, *arguments = map(str, words)
    line = ["tl-adapters", subcommand]
    for name, value in options.items():
        if value is not None and value is not False:
            line += _option(f"--{name.replace('_', '-')}", value)
    if any(argument.startswith("-") for argument in arguments):
        return " ".join(map(quoted, [*line, "--", *arguments]))
    return " ".join(map(quoted, [*line[:2], *arguments, *line[2:]]))


def _option(name: str, value: object) -> list[str]:
    if value is True:
        return [name]
    values = [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]
    if any(map(looks_like_option, values)):
        return [f"{name}={text}" for text in values]
    return [name, *values]


def looks_like_option(word: str) -> bool:
    """Whether the command line takes a word for the name of an option, and never for the value of one."""
    name = word.partition("=")[0]  # what follows is its value, which may hold spaces
    return name.startswith("--") and not any(space in name for space in " \n\t")


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
    if "\udc80" <= character <= "\udcff":  # a byte of a name that is not UTF-8, as Python holds it
        return f"\\x{ord(character) & 0xFF:02x}"
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"
