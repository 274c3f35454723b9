"""Write docs/commands.md: the reference of the command line, from its parser, and the table of wrong calls.

Before that, every call of tests/cli/wrong_calls.toml is run, and the line that it prints is written into that file, so
that a change of wording is one run of `make commands` and a look at the difference.
"""

import contextlib
import io
import json
import os
import re
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "commands.md"
CALLS = ROOT / "tests" / "cli" / "wrong_calls.toml"

JSON = """With `--json`, the standard output holds one JSON object: `results` (what was measured), `paths` (what was
written) and `next` (the command to run next, or null), or `{"error": message}`. The exit code is the same; progress and
log messages go to the standard error."""
SPELLING = """Options are spelled out. One whose value is shown with `...` takes every word up to the next option, and
one whose value is in brackets may stand alone. `tl-adapters --install-completion` lets the shell complete them."""

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def page() -> str:
    """The text of docs/commands.md."""
    from tl_adapters.cli.main import EXIT_CODES, SUBCOMMANDS, app

    commands = app()
    context = commands.context_class(commands, info_name="tl-adapters")
    index = [f"* [`{name}`](#{name}): {_paragraphs(command.help)[0]}" for name, command in commands.commands.items()]
    parts = [
        "# Commands",
        "This page is written by `make commands`, from the command line itself; `tl-adapters SUBCOMMAND --help` prints "
        "the same.",
        "\n".join(index),
        _joined(EXIT_CODES),
        _joined(JSON),
        _joined(SPELLING),
        *(_section(function.__name__, commands, context) for function in SUBCOMMANDS),
        "## Wrong calls",
        "Each prints one line, `error: ...`, leaves nothing behind, and ends with exit code 2.",
        "\n".join(["| call | message |", "|---|---|", *(_row(call, said) for call, said in calls().items())]),
    ]
    return "\n\n".join(parts) + "\n"


def _section(name: str, commands: Any, context: Any) -> str:
    command = commands.commands[name]
    own = command.context_class(command, info_name=name, parent=context)
    records = [record for parameter in command.get_params(own) if (record := parameter.get_help_record(own))]
    rows = [_row(option, help) for option, help in records if "--help" not in option]
    usage = f"tl-adapters {name} {' '.join(command.collect_usage_pieces(own))}".replace("{", "").replace("}", "")
    examples = [line.strip() for line in command.epilog.splitlines() if line.strip().startswith("tl-adapters")]
    return "\n\n".join(
        [
            f"## {name}",
            " ".join(_paragraphs(command.help)),
            "\n".join(["```sh", f"{usage}", "", *examples, "```"]),
            "\n".join(["| option | |", "|---|---|", *rows]),
        ]
    )


def _paragraphs(text: str) -> list[str]:
    return [_joined(paragraph) for paragraph in text.split("\n\n")]


def _joined(text: str) -> str:
    return " ".join(text.split())


def _row(code: str, text: str) -> str:
    """A row of a table; what has a meaning in Markdown is shown as it is."""
    shown = re.sub(r"([\\`*_<>\[\]|])", r"\\\1", _joined(text))
    escaped = code.replace("|", "\\|")
    return f"| {f'`{escaped}`' if code else 'no words'} | {shown} |"


def calls() -> dict[str, str]:
    """The wrong calls and their messages."""
    return tomllib.loads(CALLS.read_text(encoding="utf-8"))


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from helpers.wrong_calls import message_of, write_small_place

    header = [line for line in CALLS.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    place = Path(tempfile.mkdtemp()).resolve()
    write_small_place(place)
    os.chdir(place)
    lines = []
    for call in calls():
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            status, message = message_of(call, place)
        lines.append(f"{json.dumps(call)} = {json.dumps(message, ensure_ascii=False)}")
        if status != 2:
            raise SystemExit(f"{call}: exit code {status}\n{errors.getvalue()}")
    CALLS.write_text("\n".join([*header, *lines]) + "\n", encoding="utf-8")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
