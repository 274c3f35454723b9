"""The subcommand doctor: checks of a pair before anything expensive."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from tl_adapters.cli.common import Subcommands, device_of
from tl_adapters.cli.train import run_config
from tl_adapters.utils.printing import show


def add_doctor(subcommands: Subcommands, common: argparse.ArgumentParser) -> None:
    """Adds `doctor`, which checks a pair, its data and this machine."""
    doctor = subcommands.add_parser(
        "doctor", parents=[common], help="check whether a pair works here, before anything expensive"
    )
    doctor.add_argument("base", metavar="BASE", help="folder or hub name; the weights of hub models are not downloaded")
    doctor.add_argument("target", metavar="TARGET", help="folder or hub name")
    doctor.add_argument(
        "adapters",
        metavar="ADAPTERS",
        nargs="?",
        help="run, folder or hub name of adapters, to check that they belong to the pair",
    )
    doctor.add_argument("--data", help="a .jsonl file or a dataset's name, to count lengths and truncation")
    doctor.add_argument("--config", help="a YAML or JSON file, or the name of a shipped configuration")
    doctor.add_argument(
        "--out", type=Path, default=Path(), help="where the run would be written (default: the current folder)"
    )
    doctor.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from tl_adapters.study.doctor import diagnose, format_findings

    findings = diagnose(run_config(args), args.out, device_of(args.device), args.adapters)
    show(format_findings(findings))
    if any(finding.level == "error" for finding in findings):
        return 1
    pair = f"--base {shlex.quote(args.base)} --target {shlex.quote(args.target)}"
    show(f"next: tl-adapters train {pair} --data TRACES.jsonl --out runs/mine")
    return 0
