"""The whole fuzz: ``make fuzz``, or ``PYTHONPATH=tests python -m fuzz --reader graph --cases 10000``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
if "--types" in sys.argv:
    import conftest  # noqa: F401  # before the package is imported

from fuzz.fuzzing import Tally, fuzz
from fuzz.readers import READERS

STRANGERS_CASES, OUR_CASES = 10_000, 1_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--reader", action="append", choices=sorted(READERS), help="readers to run (default: all)")
    parser.add_argument(
        "--cases", type=int, help="cases per reader (default: 10,000 of strangers' files, 1,000 of ours)"
    )
    parser.add_argument("--first", type=int, default=0, help="number of the first case; to repeat one, with --cases 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--types", action="store_true", help="check annotations, too, as the tests do; three times slower"
    )
    args = parser.parse_args()
    print("| reader | files | cases | accepted | refused with our error | anything else | cases/s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    failed: list[tuple[str, Tally]] = []
    for name in args.reader or READERS:
        reader = READERS[name]
        cases = args.cases or (STRANGERS_CASES if reader.from_strangers else OUR_CASES)
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            start = time.perf_counter()
            tally = fuzz(reader, Path(folder) / "files", cases, args.seed, args.first)
            rate = tally.cases / (time.perf_counter() - start)
        origin = "strangers'" if reader.from_strangers else "ours"
        counts = f"{tally.cases:,} | {tally.accepted:,} | {tally.refused:,} | {len(tally.strays):,} | {rate:,.0f}"
        print(f"| {name} | {origin} | {counts} |", flush=True)
        if tally.strays:
            failed.append((name, tally))
    for name, tally in failed:
        print(f"\n{name}: {len(tally.strays)} failures at {len(tally.places)} places (seed {args.seed})")
        for (what, place), strays in sorted(tally.places.items(), key=lambda item: -len(item[1])):
            one = strays[0]
            print(f"  {len(strays):5} {what} at {place}; case {one.case}, {one.file}: {one.what}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
