"""The command line. torch and the libraries behind it are imported when a subcommand runs, not before.

A subcommand is a function: its parameters are the options, the first paragraph of its docstring is the help, and what
follows "Examples:" is shown below it. The function returns a `Result`, which `main` prints.
"""

from __future__ import annotations

import errno
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from functools import cache
from typing import Annotated, Any

import typer

from tl_adapters import __version__
from tl_adapters.cli.attribute import attribute
from tl_adapters.cli.demo import demo
from tl_adapters.cli.doctor import doctor
from tl_adapters.cli.evaluate import benchmark, evaluate
from tl_adapters.cli.features import features, label
from tl_adapters.cli.generate import generate
from tl_adapters.cli.hesitation import hesitation
from tl_adapters.cli.parsing import Subcommand
from tl_adapters.cli.result import Result, to_json
from tl_adapters.cli.serve import serve
from tl_adapters.cli.share import export, open, pull, push
from tl_adapters.cli.train import config, sweep, train, transcoders
from tl_adapters.errors import UserError
from tl_adapters.utils.printing import VisibleRecord, printable_line, show, show_error, show_traceback

SUBCOMMANDS: tuple[Callable[..., Result], ...] = (
    demo, doctor, config, train, sweep, transcoders, open, evaluate, features, label, attribute, generate, benchmark,
    hesitation, serve, export, push, pull,
)  # fmt: skip
"""Every subcommand, in the order of the help."""
TOGETHER = ("train", "evaluate", "features")
"""Subcommands on which several processes of one launch work together; the others run in one."""
EXIT_CODES = """Exit codes: 0 done; 1 an error of this program, which shows a traceback, or a pair in which doctor found
errors; 2 a command, a file or a machine that does not fit, in one line that says what to do; 130 stopped, by Ctrl-C or
because nobody reads the output any more."""
_PLACES = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOSPC}
"""What the system says of a place where nothing can be read or written; other errors are ours."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code (see `EXIT_CODES`).

    With --json, the standard output holds one JSON object, also where it is {"error": message}.
    """
    if argv is None:  # the command itself, whose process is ours
        # By default a thread that waits for another one keeps its processor busy, which other processes then lack.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    argv = sys.argv[1:] if argv is None else list(argv)
    as_json = "--json" in argv
    with _visible_messages():
        try:
            call = _parsed(argv)
            if isinstance(call, int):
                return call
            is_main = _is_main_process(call)
            quiet = call.keywords.get("quiet") or not is_main
            logging.getLogger("tl_adapters").setLevel(logging.WARNING if quiet else logging.INFO)
            _silence_loading_bars()
            with redirect_stdout(sys.stderr) if as_json else nullcontext():
                result: Result = call()
            if is_main:
                result.show(as_json)
            if result.then is not None:
                result.then()
            return result.status
        except UserError as error:
            return _failed(error, str(error), as_json, 2)
        except BrokenPipeError:  # such as the command "head", which has read enough
            with suppress(BrokenPipeError):
                sys.stdout.close()  # or its buffer would be written once more when the process ends
            return 130
        except OSError as error:
            if error.errno not in _PLACES:
                raise
            where = f"{error.filename}: {error.strerror}. Choose another place, or change that one."
            return _failed(error, where, as_json, 2)
        except KeyboardInterrupt as interrupt:
            return _failed(interrupt, str(interrupt) or "stopped.", as_json, 130)


def parse(argv: Sequence[str]) -> Any:
    """The call of a subcommand's function, not yet made, or the exit code where there is nothing to call (--help).

    Raises UserError for words that no subcommand takes.
    """
    try:
        return app().main(list(argv), prog_name="tl-adapters", standalone_mode=False)
    except typer.TyperException as error:
        name = argv[0] if argv and argv[0] in {function.__name__ for function in SUBCOMMANDS} else ""
        help = " ".join(filter(None, ["tl-adapters", name, "--help"]))
        message = " ".join(error.format_message().replace("Value error, ", "").split())
        raise UserError(f"{message}{'' if message.endswith(('.', '?')) else '.'} See {help}.") from error


def _parsed(argv: Sequence[str]) -> Any:
    """As `parse`, in every process of a launch, all of which are given the same words."""
    try:
        return parse(argv)
    except UserError as error:
        from tl_adapters.processes import everywhere

        raise everywhere(error)  # noqa: B904  # it is the same error


@cache
def app() -> Any:
    """The command line as typer's command."""
    commands = typer.Typer(
        help="What did reasoning training change in a model?",
        epilog=EXIT_CODES,
        subcommand_metavar="SUBCOMMAND ...",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    commands.callback()(_options_of_all)
    for function in SUBCOMMANDS:
        help, _, examples = (inspect.getdoc(function) or "").partition("\nExamples:\n")
        epilog = "Examples:\n\n\b\n" + examples.rstrip()
        commands.command(cls=Subcommand, help=help.strip(), epilog=epilog)(function)
    return typer.main.get_command(commands)


def _version(asked: bool) -> bool:
    if asked:
        show(f"tl-adapters {__version__}")
        raise typer.Exit
    return asked


def _options_of_all(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, help="print the version", callback=_version)
    ] = False,
) -> None:
    """Options that are given before the subcommand."""


def _failed(error: BaseException, message: str, as_json: bool, status: int) -> int:
    """Print why a subcommand ends, and return its exit code. What all processes of a launch raise, the main one prints.

    Of several processes only the main one writes to the standard output, which holds one object with --json.
    """
    from tl_adapters.processes import is_everywhere, processes

    if not processes().is_main and is_everywhere(error):
        processes().wait()
        return status
    if not processes().is_main:
        show_error(f"process {processes().index}: {printable_line(message)}")
    elif as_json:
        show(to_json({"error": message}))
    else:
        show_error(f"{'error: ' if status == 2 else ''}{printable_line(message)}")
    if is_everywhere(error):
        processes().wait()  # the launcher ends all processes as soon as one has failed
    return status


def _is_main_process(call: Any) -> bool:
    """Whether this process prints and writes: one alone, or the first of those that work on a subcommand together.

    Raises ProcessesError for a subcommand that runs in one process.
    """
    from tl_adapters.processes import processes

    name = call.func.__name__
    if name not in TOGETHER or call.keywords.get("plan") or call.keywords.get("share"):
        processes().require_one(f"tl-adapters {name}")
    return processes().is_main


@contextmanager
def _visible_messages() -> Iterator[None]:
    """Logs, warnings and tracebacks go to the standard error, with everything invisible made visible."""
    factory = logging.getLogRecordFactory()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.setLogRecordFactory(VisibleRecord)
    logging.captureWarnings(True)
    try:
        yield
    except Exception:
        sys.excepthook = show_traceback  # the interpreter calls it when the exception leaves the program
        raise
    finally:
        logging.captureWarnings(False)
        logging.setLogRecordFactory(factory)


def _silence_loading_bars() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
