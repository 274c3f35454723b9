"""All kills: ``make kill``, or ``PYTHONPATH=tests python -m kill --subcommand train --kills 30``."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from kill.killing import Tally, _run, kill_often
from kill.subcommands import SUBCOMMANDS, Subcommand, prepare, shrink


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kill", description=__doc__)
    parser.add_argument("--subcommand", action="append", choices=list(SUBCOMMANDS), help="which (default: all)")
    parser.add_argument("--kills", type=int, help="kills of each (default: 30 of train and features, 5 of the others)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    shrink()
    failed: dict[str, Tally] = {}
    print("| subcommand | killed | of these at a call that writes | the same after running again | left behind | s |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as base:
        prepared, work = Path(base) / "prepared", Path(base) / "work"
        prepared.mkdir()
        work.mkdir()
        assert _run(Subcommand(lambda folder: prepare(folder)), prepared) == 0, (prepared.parent / "stderr").read_text()
        for name in args.subcommand or SUBCOMMANDS:
            started = time.perf_counter()
            tally = kill_often(SUBCOMMANDS[name], prepared, work, args.kills or SUBCOMMANDS[name].kills, args.seed)
            tried = args.kills or SUBCOMMANDS[name].kills
            left = sum("left behind" in text for text in tally.failures)
            same = tried - len({text.partition(":")[0] for text in tally.failures if "left behind" not in text})
            late = f" ({tally.finished} had finished)" if tally.finished else ""
            seconds = time.perf_counter() - started
            counts = f"{tally.kills}{late} | {tally.at_calls} | {same} of {tried} | {left} | {seconds:.0f}"
            print(f"| {name} | {counts} |", flush=True)
            if tally.failures:
                failed[name] = tally
                for text in tally.failures[:5]:
                    print(f"  {name}: {text}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
