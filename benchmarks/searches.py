"""What a quicker search of the hesitation circuit costs: ``python benchmarks/searches.py RUN``.

The circuit of a run of the model organism is found by every method, and each is studied by the same interventions on
the same problems. Printed are the seconds of the search (of one thread) and the criteria's values; ``--record`` writes
both to results.json.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from recorded import record

from tl_adapters.circuits import search
from tl_adapters.circuits.study import StudyOptions, analyze_hesitation
from tl_adapters.circuits.subject import builtin_subject
from tl_adapters.study.open_run import open_run


def studied(run: Path, method: str, select: int, report: int) -> dict[str, Any]:
    """Seconds and criteria of one method."""
    pair, options = open_run(run), StudyOptions(draws=1, probability_draws=3, curve_factors=(1.0,))
    options = replace(options, search=replace(options.search, method=method))
    seconds, searched = [], search.search_circuit

    def timed(*args: Any, **options: Any) -> search.Search:
        started = time.process_time()
        found = searched(*args, **options)
        seconds.append(time.process_time() - started)
        return found

    search.search_circuit = timed
    try:
        block = analyze_hesitation(pair, builtin_subject(select, report), options, progress=False).block
    finally:
        search.search_circuit = searched
    criteria = {c["name"]: c["value"] for c in block["criteria"]}
    return {"seconds": seconds[0], "features": block["circuit"]["n"], "criteria": criteria}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--problems", type=int, nargs=2, default=[200, 150], help="to choose on, and to report on")
    parser.add_argument("--record", action="store_true", help="write the figures to benchmarks/results.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for method in get_args(search.SearchMethod):
        found[method] = studied(args.run, method, *args.problems)
        print(method, found[method], flush=True)
    if args.record:
        record("searches", {"problems": args.problems, "methods": found})


if __name__ == "__main__":
    main()
