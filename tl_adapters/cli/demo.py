"""The subcommand demo: the whole study on the model organism."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from tl_adapters.cli.common import AsJson, Device, Dtype, Quiet, Seed, device_of, dtype_of, given_device
from tl_adapters.cli.result import Result
from tl_adapters.errors import UserError
from tl_adapters.utils.printing import command

log = logging.getLogger(__name__)

_WIDER = "Intervals are wider than those of the whole study (--full), because fewer problems are read."
_Out = Annotated[
    Path,
    typer.Option(
        "--out",
        metavar="DIR",
        help="run folder; if it exists, the next free name is taken: runs/demo-2, ...",
    ),
]
_Full = Annotated[
    bool, typer.Option("--full", help="the whole study: more problems, narrower intervals, every control")
]


def demo(
    out: _Out = Path("runs/demo"),
    full: _Full = False,
    quiet: Quiet = False,
    json: AsJson = False,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = None,
) -> Result:
    """Run every stage of a study on the model organism, offline, on a CPU.

    Examples:
        tl-adapters demo
        tl-adapters demo --full --out runs/study
    """
    import time
    from dataclasses import replace

    from tl_adapters.study.demo import DEMO_SCALE
    from tl_adapters.study.demo import demo as run_demo
    from tl_adapters.study.run_size import StudyScale
    from tl_adapters.utils.files import next_free_name, require_writable

    began = time.perf_counter()
    scale = StudyScale() if full else DEMO_SCALE
    if seed is not None:
        scale = replace(scale, training=replace(scale.training, seed=seed))
    chosen, torch_dtype = device_of(device), dtype_of(dtype)
    require_name(out)
    folder = next_free_name(out)
    require_writable(folder)
    if folder != out:
        log.info("%s exists already and stays as it is; this run is %s", out, folder)
    report = run_demo(folder, scale, chosen, torch_dtype, progress=not quiet)
    seconds = time.perf_counter() - began
    return Result(
        paths={"report": report, "figures": folder / "results.json", "adapters": folder / "adapters"},
        values={"seconds": round(seconds)},
        text=f"took: {seconds:.0f} s" + ("" if full else f"\n{_WIDER}"),
        address=report.resolve().as_uri(),
        next=command("evaluate", folder, device=given_device(device), dtype=dtype),
    )


def require_name(folder: Path) -> None:
    """Raises UserError where the path cannot be the name of a new folder: ".", "..", "/", or a file."""
    if folder.name in ("", ".."):
        raise UserError(
            f"--out {str(folder)!r} is a folder that exists already; give the name of a new one, such as runs/demo."
        )
    if os.path.isfile(folder):
        raise UserError(f"--out {folder} is a file; give the name of a new folder, such as runs/demo.")
