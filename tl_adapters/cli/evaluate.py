"""The subcommand evaluate: a run's adapters measured on held-out traces."""

from __future__ import annotations

import argparse
from pathlib import Path

from tl_adapters.cli.common import Subcommands, device_of
from tl_adapters.utils.printing import show


def add_evaluate(subcommands: Subcommands, common: argparse.ArgumentParser) -> None:
    """Adds `evaluate`, which measures a run's adapters."""
    evaluate = subcommands.add_parser("evaluate", parents=[common], help="measure a run's adapters on held-out traces")
    evaluate.add_argument("run_folder", type=Path, metavar="RUN", help="folder that train or demo made")
    evaluate.add_argument(
        "--data", help="a .jsonl file of held-out traces, or a dataset's name (not needed for the model organism)"
    )
    evaluate.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> None:
    from tl_adapters.pages.report import write_report
    from tl_adapters.study.evaluate import evaluate_run

    evaluate_run(args.run_folder, args.data, device_of(args.device), args.dtype)
    show(f"report: {write_report(args.run_folder)}\nfigures: {args.run_folder / 'results.json'}")
