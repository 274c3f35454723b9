"""The subcommand demo."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from tl_adapters.cli.common import Subcommands, device_of, dtype_of

log = logging.getLogger(__name__)


def add_demo(subcommands: Subcommands, common: argparse.ArgumentParser) -> None:
    """The verb demo."""
    demo = subcommands.add_parser(
        "demo", parents=[common], help="the whole study on the built-in pair, offline, on a CPU"
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder (default: runs/demo)")
    demo.add_argument("--quick", action="store_true", help="a look at everything in a few minutes")
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    import time
    from dataclasses import replace

    from tl_adapters.study.demo import QUICK, demo
    from tl_adapters.study.scale import Scale

    began = time.perf_counter()
    scale = QUICK if args.quick else Scale()
    if args.seed is not None:
        scale = replace(scale, training=replace(scale.training, seed=args.seed))
    moved = _move_aside(args.out)
    if moved:
        log.info("the earlier %s is now %s", args.out, moved)
    report = demo(args.out, scale, device_of(args.device), dtype_of(args.dtype), progress=not args.quiet)
    print(f"report: {report}\nfigures: {args.out / 'results.json'}\nadapters: {args.out / 'adapters'}")
    print(f"took: {time.perf_counter() - began:.0f} s\nnext: tl-adapters evaluate {args.out}")


def _move_aside(folder: Path) -> Path | None:
    """Rename an earlier run to the first free ``folder-N``; runs are never overwritten."""
    if not folder.exists():
        return None
    n = 1
    while (moved := folder.with_name(f"{folder.name}-{n}")).exists():
        n += 1
    return folder.rename(moved)
