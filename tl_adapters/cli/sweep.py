"""The subcommand sweep: sparsity against faithfulness over training options."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from tl_adapters.cli.common import Subcommands, device_of
from tl_adapters.cli.train import run_config
from tl_adapters.errors import UserError
from tl_adapters.utils.printing import show


def add_sweep(subcommands: Subcommands, common: argparse.ArgumentParser) -> None:
    """Adds `sweep`, which trains and measures adapters for every combination of options."""
    sweep = subcommands.add_parser(
        "sweep", parents=[common], help="train over training options: sparsity against faithfulness"
    )
    sweep.add_argument("--over", nargs="+", metavar="OPTION=V,V", help="such as l1_weight=3e-4,1e-3 n_features=128,512")
    sweep.add_argument("--base", help="folder or hub name of the base (default: the model organism)")
    sweep.add_argument("--target", help="folder or hub name of the target")
    sweep.add_argument("--data", help="training documents: a .jsonl file, or a dataset's name on the hub")
    sweep.add_argument("--config", help="a YAML or JSON file, or the name of a shipped configuration")
    sweep.add_argument("--held-out", metavar="DATA", help="held-out documents (not needed for the model organism)")
    sweep.add_argument(
        "--documents", type=int, metavar="N", help="held-out problems or documents to use (default: 300)"
    )
    folder_options = sweep.add_mutually_exclusive_group(required=True)
    folder_options.add_argument("--out", type=Path, help="folder to make or to continue")
    folder_options.add_argument("--resume", type=Path, metavar="DIR", help="sweep to continue with its own options")
    sweep.set_defaults(run=_sweep)


def _sweep(args: argparse.Namespace) -> None:
    from tl_adapters.pages.sweep_page import SWEEP_PAGE_FILE, points_on_front, sweep_markdown
    from tl_adapters.study.grid import read_grid
    from tl_adapters.study.sweep import resume_sweep, sweep

    device, progress = device_of(args.device), not args.quiet
    if args.resume:
        names = ("over", "base", "target", "data", "config", "held_out", "documents", "seed", "dtype")
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
        if given:
            raise UserError(f"--resume takes the sweep's own options; leave out {', '.join(given)}.")
        points = resume_sweep(args.resume, device, progress=progress)
    else:
        if not args.over:
            raise UserError("--over is missing; give options with their values, such as l1_weight=3e-4,1e-3,3e-3.")
        config = run_config(args)
        if config.target and not config.data.source:
            raise UserError(
                "--data is missing; give the training documents as a .jsonl file or a dataset's name on the hub."
            )
        points = sweep(
            config, args.out, read_grid(args.over), held_out=args.held_out,
            documents=300 if args.documents is None else args.documents, device=device, progress=progress,
        )  # fmt: skip
    folder = args.resume or args.out
    show(f"{sweep_markdown(points)}\n\npage: {folder / SWEEP_PAGE_FILE}\nfigures: {folder / 'sweep.json'}")
    best = shlex.quote(str(folder / (points_on_front(points) or points)[0].name))
    show(f"next: tl-adapters evaluate {best}{'' if points[0].recovered else ' --data HELD_OUT.jsonl'}")
