"""The measurements of the benchmarks, results.json beside this file; each benchmark replaces its own block only.

A block holds what was measured, and with what: command, commit, machine and versions. A value that was measured
several times is ``{"value", "range"}``: over all runs, and its lowest and highest value in one of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tl_adapters.utils.results import read_results, versions, write_results

FOLDER = Path(__file__).resolve().parent
PRODUCT_SIZE = 512
"""Rows and columns of the matrices by which `product_speed` is measured."""


def record(
    name: str,
    block: Mapping[str, Any],
    commits: Sequence[str] = (),
    folder: Path = FOLDER,
    measured_on: Mapping[str, Any] | None = None,
) -> None:
    """Replace one block; those of other benchmarks stay as they are, also those that are parts of this one.

    Args:
        name: the benchmark; "generation.vllm" is the part "vllm" of the block "generation".
        block: what it measured.
        commits: commits at which its runs were made; none is the present one.
        folder: where results.json is.
        measured_on: "machine" and "versions" of the runs (`here`); None is this machine.
    """
    made = {"command": command(), "commits": sorted(set(commits)) or [commit()], **(measured_on or here())}
    whole, _, part = name.partition(".")
    before = recorded(whole, folder) or {}
    of_others = {key: value for key, value in before.items() if isinstance(value, dict) and "command" in value}
    found = {**before, part: {**block, **made}} if part else {**of_others, **block, **made}
    write_results(folder, **{whole: found})


def recorded(name: str, folder: Path = FOLDER) -> dict[str, Any] | None:
    """One block, or a part of one as `record` names it; None where the benchmark has recorded nothing yet."""
    whole, _, part = name.partition(".")
    found = read_results(folder).get(whole)
    return found.get(part) if part and found else found


def timing_options(about: str, blocks: str, repeats: int = 5) -> argparse.ArgumentParser:
    """The options of a benchmark of running times: how often, on how many threads, and whether it is recorded."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help="runs that count")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--record", action="store_true", help=f"write {blocks} of results.json")
    return parser


def value_and_range(value: float, values: Sequence[float]) -> dict[str, Any]:
    """A value over all runs, with its lowest and highest value in one of them."""
    return {"value": value, "range": [min(values), max(values)]}


def ratio_in_turns(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    """The median ratio, with its range, of two sides that took turns."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return value_and_range(statistics.median(ratios), ratios)


def command() -> str:
    """The command that runs, as it can be repeated elsewhere: a folder of this machine is one of its name in runs/."""
    script = Path(sys.argv[0])
    given = [f"runs/{Path(arg).name}" if Path(arg).is_absolute() else arg for arg in sys.argv[1:]]
    return shlex.join(["python", f"{script.parent.name}/{script.name}", *given])


def commit() -> str:
    """The commit of this repository, with "+" where files are changed that it tracks; "unknown" outside of one.

    That another benchmark has just recorded its block changes nothing that is measured.
    """
    git = ["git", "-C", str(FOLDER)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "diff", "--quiet", "HEAD", "--", "..", ":(exclude)results.json"], check=False
        ).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed else "")


def machine() -> dict[str, Any]:
    """What running times depend on; nothing that identifies the machine."""
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "gflops": product_speed(),
    }


def product_speed() -> float:
    """Billions of operations per second of float32 products on the CPU, with the threads of this process.

    Ratios of times depend on it: the faster the products are, the more everything beside them counts.
    """
    factor, seconds = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE), list[float]()
    for _ in range(10):
        started = time.perf_counter()
        torch.mm(factor, factor)
        seconds.append(time.perf_counter() - started)
    return 2 * PRODUCT_SIZE**3 / min(seconds) / 1e9


def here() -> dict[str, Any]:
    """This machine and the versions of what runs on it."""
    return {"machine": machine(), "versions": versions()}


def read_cell(path: Path) -> dict[str, Any] | None:
    """One run of a benchmark, None where it was not made yet."""
    return json.loads(path.read_text()) if path.is_file() else None


def standalone(svg: str) -> str:
    """A plot as a file by itself: in a page it takes the page's background and text color, and a file has no page."""
    plain = str(svg)  # `replace` of a drawing's own type would escape what it looks for
    return plain.replace("<svg ", '<svg style="color: #000; background: #fff" ', 1)
