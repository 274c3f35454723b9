"""All kills: ``make kill``, or ``PYTHONPATH=tests python -m kill --subcommand train --kills 30``.

``--refuse 20`` lets the system refuse every write from a random one on, and ``--two 3`` starts each subcommand twice at
once, in place of the kills.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from kill.killing import _start, _wait, kill_often, refuse_often, run_two_at_once
from kill.subcommands import SUBCOMMANDS, Subcommand, prepare, shrink


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kill", description=__doc__)
    parser.add_argument("--subcommand", action="append", choices=list(SUBCOMMANDS), help="which (default: all)")
    parser.add_argument("--kills", type=int, help="kills of each (default: 30 of train and features, 5 of the others)")
    parser.add_argument("--refuse", type=int, metavar="N", help="refuse writes N times instead")
    parser.add_argument("--two", type=int, metavar="N", help="run two at once N times instead")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    shrink()
    ended = "refused" if args.refuse or args.two else "killed"
    print(f"| subcommand | cases | {ended} | finished | the same after running again | left behind | s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as base:
        prepared, work = Path(base) / "prepared", Path(base) / "work"
        prepared.mkdir()
        work.mkdir()
        assert _wait(_start(Subcommand(prepare), prepared)) == 0, (Path(base) / "stderr").read_text()
        for name in args.subcommand or SUBCOMMANDS:
            started, subcommand = time.perf_counter(), SUBCOMMANDS[name]
            cases = args.refuse or args.two or args.kills or subcommand.kills
            how = refuse_often if args.refuse else run_two_at_once if args.two else kill_often
            tally = how(subcommand, prepared, work, cases, args.seed)
            left = sum("left behind" in text for text in tally.failures)
            same = cases - len({text.partition(":")[0] for text in tally.failures if "left behind" not in text})
            counts = f"{cases} | {tally.kills} | {tally.finished} | {same} | {left}"
            print(f"| {name} | {counts} | {time.perf_counter() - started:.0f} |", flush=True)
            failures += [f"{name}: {text}" for text in tally.failures]
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
