"""The subcommand demo: the whole study on the model organism."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from tl_adapters.cli.common import Subcommands, device_of, dtype_of
from tl_adapters.utils.printing import show

log = logging.getLogger(__name__)


def add_demo(subcommands: Subcommands, common: argparse.ArgumentParser) -> None:
    """Adds `demo`, which runs every stage on the model organism."""
    demo = subcommands.add_parser(
        "demo", parents=[common], help="run the whole study on the model organism, offline, on a CPU"
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder (default: runs/demo)")
    demo.add_argument("--quick", action="store_true", help="a smaller study that takes a few minutes")
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    import time
    from dataclasses import replace

    from tl_adapters.study.demo import QUICK_SCALE, demo
    from tl_adapters.study.scale import StudyScale

    began = time.perf_counter()
    scale = QUICK_SCALE if args.quick else StudyScale()
    if args.seed is not None:
        scale = replace(scale, training=replace(scale.training, seed=args.seed))
    moved = _move_aside(args.out)
    if moved:
        log.info("the earlier %s is now %s", args.out, moved)
    report = demo(args.out, scale, device_of(args.device), dtype_of(args.dtype), progress=not args.quiet)
    show(f"report: {report}\nfigures: {args.out / 'results.json'}\nadapters: {args.out / 'adapters'}")
    show(f"took: {time.perf_counter() - began:.0f} s\nnext: tl-adapters evaluate {args.out}")


def _move_aside(folder: Path) -> Path | None:
    """Renames an earlier run to the first free ``folder-N`` and returns that path; runs are never overwritten."""
    if not folder.exists():
        return None
    n = 1
    while (moved := folder.with_name(f"{folder.name}-{n}")).exists():
        n += 1
    return folder.rename(moved)
