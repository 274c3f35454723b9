"""The subcommands config and train: the options of a run, and the run itself."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tl_adapters.cli.common import Subcommands, device_of
from tl_adapters.errors import UserError
from tl_adapters.utils.printing import show

if TYPE_CHECKING:
    from tl_adapters.config import RunConfig


def add_config(subcommands: Subcommands) -> None:
    """Adds `config`, which prints every option of a run as YAML."""
    config = subcommands.add_parser("config", help="print every option of a run, documented, as YAML to edit")
    config.add_argument("name", nargs="?", help="a shipped configuration or a file (default: the default options)")
    config.add_argument("--list", action="store_true", help="list the shipped configurations")
    config.set_defaults(run=_config, quiet=False)


def _config(args: argparse.Namespace) -> None:
    from tl_adapters.config import RunConfig, commented_yaml, shipped_configs

    if args.list:
        show("\n".join(shipped_configs()))
    else:
        show(commented_yaml(RunConfig.load(args.name) if args.name else RunConfig()))


def add_train(subcommands: Subcommands, common: argparse.ArgumentParser) -> None:
    """Adds `train`, which trains adapters for a pair or resumes a run."""
    train = subcommands.add_parser("train", parents=[common], help="train adapters for a pair, or resume a run")
    train.add_argument("--base", help="folder or hub name of the base (default: the model organism)")
    train.add_argument("--target", help="folder or hub name of the target")
    train.add_argument("--data", help="a .jsonl file of prompts and responses, or a dataset's name on the hub")
    train.add_argument("--config", help="a YAML or JSON file, or the name of a shipped configuration")
    train.add_argument("--bad-rows", choices=("refuse", "drop"), help="what to do with unusable rows (default: refuse)")
    folder_options = train.add_mutually_exclusive_group(required=True)
    folder_options.add_argument("--out", type=Path, help="run folder to make")
    folder_options.add_argument("--resume", type=Path, metavar="RUN", help="run folder to resume with its own options")
    train.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from tl_adapters.study.open_run import is_organism_run
    from tl_adapters.study.train import resume_run, train_run

    folder = args.resume or args.out
    if args.resume:
        given = [f"--{name}" for name in ("base", "target", "data", "config", "seed", "dtype") if getattr(args, name)]
        if given:
            raise UserError(f"--resume takes the run's own options; leave out {', '.join(given)}.")
        resume_run(folder, device_of(args.device), progress=not args.quiet, bad_rows=args.bad_rows)
    else:
        config = run_config(args)
        if args.bad_rows:
            config = replace(config, data=replace(config.data, bad_rows=args.bad_rows))
        if config.target and not config.data.source:
            raise UserError(
                "--data is missing; give a .jsonl file of prompts and responses, or a dataset's name on the hub."
            )
        train_run(config, folder, device_of(args.device), progress=not args.quiet)
    data = "" if is_organism_run(folder) else " --data HELD_OUT.jsonl"
    show(f"adapters: {folder / 'adapters'}\nnext: tl-adapters evaluate {folder}{data}")


def run_config(args: argparse.Namespace) -> RunConfig:
    """The configuration of --config or the defaults, with the options that the flags override."""
    from dataclasses import replace

    from tl_adapters.config import RunConfig

    config = RunConfig.load(args.config) if args.config else RunConfig()
    named = {name: getattr(args, name) for name in ("base", "target", "dtype") if getattr(args, name)}
    if ("base" in named) != ("target" in named):
        raise UserError(
            "--base and --target are given together; leave both out for the configuration's pair or the model organism."
        )
    config = replace(config, **named)
    if args.data is not None:
        config = replace(config, data=replace(config.data, source=args.data))
    if args.seed is not None:
        config = replace(config, training=replace(config.training, seed=args.seed))
    return config
