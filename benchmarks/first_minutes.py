"""What a user waits for at first: ``python benchmarks/first_minutes.py``.

The demo's command, and every tutorial as it is written, each in a fresh process and a temporary folder, one after the
other; given are seconds from the start of the process to its end. A tutorial's first cell, which installs, does nothing
where the package is there already, and cells that need a network and a GPU are skipped without one. ``--record`` writes
the block "first_minutes" of results.json.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from recorded import record, timing_options, value_and_range

TUTORIALS = sorted((Path(__file__).resolve().parents[1] / "tutorials").glob("*.ipynb"))
EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
NotebookClient(nbformat.read(sys.argv[1], as_version=4), timeout=900).execute()
"""
COMMANDS = {
    "make demo, installed": [sys.executable, "-m", "tl_adapters", "demo"],
    **{f"tutorials/{path.name}": [sys.executable, "-c", EXECUTE, str(path)] for path in TUTORIALS},
}
"""What is timed, by name."""


def seconds(command: list[str], threads: int) -> float:
    """Seconds of a command in a new folder. Raises CalledProcessError where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, cwd=folder, env=environment)
        return time.perf_counter() - started


def main() -> None:
    options = timing_options(__doc__, "the block first_minutes", repeats=1).parse_args()
    found = {}
    for name, command in COMMANDS.items():
        runs = [seconds(command, options.threads) for _ in range(options.repeats)]
        found[name] = value_and_range(statistics.median(runs), runs)
        print(f"{name}: {found[name]['value']:.0f} s", flush=True)
    if options.record:
        record("first_minutes", {"repeats": options.repeats, "threads": options.threads, "seconds": found})


if __name__ == "__main__":
    main()
