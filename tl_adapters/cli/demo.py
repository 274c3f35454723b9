"""The subcommand demo: the whole study on the model organism."""

from __future__ import annotations

import argparse
import logging
import os
from itertools import chain, count
from pathlib import Path

from tl_adapters.cli.common import Subcommands, device_of, dtype_of
from tl_adapters.utils.printing import show

log = logging.getLogger(__name__)


def add_demo(subcommands: Subcommands, common: argparse.ArgumentParser) -> None:
    """Adds `demo`, which runs every stage on the model organism."""
    demo = subcommands.add_parser(
        "demo", parents=[common], help="run the whole study on the model organism, offline, on a CPU"
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        help="run folder (default: runs/demo); if it exists, the next free name is taken: runs/demo-2, ...",
    )
    demo.add_argument("--quick", action="store_true", help="a smaller study that takes a few minutes")
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    import time
    from dataclasses import replace

    from tl_adapters.study.demo import QUICK_SCALE, demo
    from tl_adapters.study.scale import StudyScale
    from tl_adapters.utils.files import require_writable

    began = time.perf_counter()
    scale = QUICK_SCALE if args.quick else StudyScale()
    if args.seed is not None:
        scale = replace(scale, training=replace(scale.training, seed=args.seed))
    device, dtype = device_of(args.device), dtype_of(args.dtype)
    out = free_name(args.out)
    require_writable(out)
    if out != args.out:
        log.info("%s exists already and stays as it is; this run is %s", args.out, out)
    report = demo(out, scale, device, dtype, progress=not args.quiet)
    show(f"report: {report}\nfigures: {out / 'results.json'}\nadapters: {out / 'adapters'}")
    show(f"took: {time.perf_counter() - began:.0f} s\nnext: tl-adapters evaluate {out}")


def free_name(folder: Path) -> Path:
    """``folder``, or the first of folder-2, folder-3, ... that does not exist; what exists is never touched.

    Raises UserError where the path names no new folder: "", ".", "..", "/", or a file.
    """
    from tl_adapters.errors import UserError

    if folder.name in ("", ".."):
        raise UserError(
            f"--out {str(folder)!r} is a folder that exists already; give the name of a new one, such as runs/demo."
        )
    if os.path.isfile(folder):
        raise UserError(f"--out {folder} is a file; give the name of a new folder, such as runs/demo.")
    names = chain([folder], (folder.with_name(f"{folder.name}-{n}") for n in count(2)))
    return next(name for name in names if not os.path.lexists(name))
