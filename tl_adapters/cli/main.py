"""The command line. torch and the libraries behind it are imported when a subcommand runs, not before.

tl-adapters demo                                  the whole study on the model organism
tl-adapters doctor B T                            check a pair before anything expensive
tl-adapters config                                every option of a run, documented, as a file to edit
tl-adapters train --base B --target T --data F    train adapters for any pair
tl-adapters train --resume RUN                    resume a run that was stopped or killed
tl-adapters sweep --over l1_weight=3e-4,1e-3 --out DIR    L0 against KL over training options
tl-adapters evaluate RUN --data F                 measure a run's adapters on held-out traces
tl-adapters features RUN                          what every feature fires on and writes, as pages
tl-adapters label RUN                             label them by rules and by an LLM judge
tl-adapters attribute RUN --prompt TEXT           attribute the next token to features and input tokens
tl-adapters generate RUN --prompt TEXT            completions of routes and changed features, side by side
tl-adapters benchmark RUN --tasks gsm8k           answer tasks on one route: pass@1, length, hesitation
tl-adapters hesitation RUN                        find and test the features that say "Wait"
tl-adapters serve DIR                             show a folder's pages on 127.0.0.1
tl-adapters export RUN --to saelens --out DIR     adapters, models or dashboards, for other tools
tl-adapters push RUN USER/REPO                    upload adapters with their model card
tl-adapters pull USER/REPO --out DIR              download adapters
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tl_adapters import __version__
from tl_adapters.cli import (
    attribute,
    benchmark,
    demo,
    doctor,
    evaluate,
    features,
    generate,
    hesitation,
    serve,
    share,
    sweep,
    train,
)
from tl_adapters.cli.common import common_parent, quiet_parent
from tl_adapters.errors import UserError
from tl_adapters.utils.printing import VisibleRecord, show_error, show_traceback


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status; 2 is a UserError, 130 is Ctrl-C."""
    args = _parser().parse_args(argv)
    with _visible_messages(quiet=args.quiet):
        try:
            _silence_loading_bars()
            return args.run(args) or 0
        except UserError as error:
            show_error(f"error: {error}")
            return 2
        except KeyboardInterrupt as interrupt:
            show_error(str(interrupt) or "stopped.")
            return 130


@contextmanager
def _visible_messages(quiet: bool) -> Iterator[None]:
    """Logs, warnings and tracebacks go to the standard error, with everything invisible made visible."""
    factory = logging.getLogRecordFactory()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("tl_adapters").setLevel(logging.WARNING if quiet else logging.INFO)
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


def _parser() -> argparse.ArgumentParser:
    quiet = quiet_parent()
    common = common_parent(quiet)
    parser = argparse.ArgumentParser(prog="tl-adapters", description="What did reasoning training change in a model?")
    parser.add_argument("--version", action="version", version=f"tl-adapters {__version__}")
    subcommands = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    demo.add_demo(subcommands, common)
    doctor.add_doctor(subcommands, common)
    train.add_config(subcommands)
    train.add_train(subcommands, common)
    sweep.add_sweep(subcommands, common)
    evaluate.add_evaluate(subcommands, common)
    features.add_features(subcommands, common)
    features.add_label(subcommands, quiet)
    attribute.add_attribute(subcommands, common)
    generate.add_generate(subcommands, common)
    benchmark.add_benchmark(subcommands, common)
    hesitation.add_hesitation(subcommands, common)
    serve.add_serve(subcommands, quiet)
    share.add_export(subcommands, quiet)
    share.add_push(subcommands, quiet)
    share.add_pull(subcommands, quiet)
    return parser


def _silence_loading_bars() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
