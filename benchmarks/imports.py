"""The time of imports, each in a fresh process: ``python benchmarks/imports.py``.

`import tl_adapters` defers its imports until a name is asked for; "names" asks for the three with which a user begins.
Beside them are `import torch` and `import transformer_lens`, which these names need. All take turns, after a turn that
is not counted and that leaves the files in the system's cache; given are medians over the runs of the time over that of
`import transformer_lens` in the same run, with their ranges. The start of the interpreter is not timed. ``--record``
writes the block "imports" of results.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from typing import Any

from recorded import record, timing_options, value_and_range

STATEMENTS = {
    "torch": "import torch",
    "transformer_lens": "import transformer_lens",
    "tl_adapters": "import tl_adapters",
    "names": "from tl_adapters import AdapterSet, PairedModel, train",
}
"""What is timed, by name."""
BESIDE = "transformer_lens"
"""What the others are measured against."""
TIMED = """
import time
started = time.perf_counter()
{statement}
print("seconds", time.perf_counter() - started)
"""


def seconds(statement: str, threads: int) -> float:
    """Seconds of a statement in a fresh process."""
    command = [sys.executable, "-c", TIMED.format(statement=statement)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return float(said.splitlines()[-1].removeprefix("seconds "))


def block(statements: dict[str, str], repeats: int, threads: int) -> dict[str, Any]:
    """What is recorded: of each statement its time over that of `BESIDE`, and its seconds."""
    runs = [{name: seconds(text, threads) for name, text in statements.items()} for _ in range(repeats + 1)][1:]
    found: dict[str, Any] = {}
    for name, statement in statements.items():
        ratios = [run[name] / run[BESIDE] for run in runs]
        taken = statistics.median(run[name] for run in runs)
        over = value_and_range(statistics.median(ratios), ratios)
        found[name] = {"statement": statement, "over_transformer_lens": over, "seconds": taken}
    return found


def main() -> None:
    options = timing_options(__doc__, "the block imports").parse_args()
    found = block(STATEMENTS, options.repeats, options.threads)
    for name, figures in found.items():
        print(name, json.dumps(figures))
    if options.record:
        conditions = {"repeats": options.repeats, "threads": options.threads}
        record("imports", {**conditions, "statements": found})


if __name__ == "__main__":
    main()
