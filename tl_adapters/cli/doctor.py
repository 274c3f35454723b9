"""The subcommand doctor."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from tl_adapters.cli.common import Subcommands, device_of
from tl_adapters.cli.train import _run_config


def add_doctor(subcommands: Subcommands, common: argparse.ArgumentParser) -> None:
    """The verb doctor."""
    doctor = subcommands.add_parser(
        "doctor", parents=[common], help="will this pair work here? before anything expensive"
    )
    doctor.add_argument("base", metavar="BASE", help="folder or hub name; of hub models no weights are downloaded")
    doctor.add_argument("target", metavar="TARGET", help="folder or hub name")
    doctor.add_argument("adapters", metavar="ADAPTERS", nargs="?", help="run, folder or hub name: do they belong?")
    doctor.add_argument("--data", help="a .jsonl file or dataset, to count lengths and truncation")
    doctor.add_argument("--config", help="a YAML or JSON file, or the name of a configuration that ships")
    doctor.add_argument("--out", type=Path, default=Path(), help="where the run would be written (default: here)")
    doctor.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from tl_adapters.study.doctor import examine, in_lines

    findings = examine(_run_config(args), args.out, device_of(args.device), args.adapters)
    print(in_lines(findings))
    if any(finding.level == "error" for finding in findings):
        return 1
    pair = f"--base {shlex.quote(args.base)} --target {shlex.quote(args.target)}"
    print(f"next: tl-adapters train {pair} --data TRACES.jsonl --out runs/mine")
    return 0
