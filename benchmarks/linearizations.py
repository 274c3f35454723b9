"""Rank correlation of each linearization with real ablations. ``python benchmarks/linearizations.py RUN ...``.

Every RUN is a finished run on the model organism, made by train, demo or ``benchmarks/hesitation.py``. On the first
onset of hesitation in each of 30 answers, every active feature is ablated in the real model, one at a time, and the
effects on the logit are compared with those that RelP, frozen MLPs and the gradient attribute (Spearman). The means
with their intervals over prompts go into the block attribution of each run's results.json, and into its report.
``--record`` writes them to results.json beside this file; every RUN is then a seed of one recipe.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

from recorded import record, value_and_range

from tl_adapters.attribution.graph import LINEARIZATIONS
from tl_adapters.study.attribution import rank_correlations_of_run


def block(measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of each linearization the mean over runs, its range over them, and every run's own with its interval."""
    correlations = {}
    for name in LINEARIZATIONS:
        means = [fields["rank_correlation"][name] for fields in measured.values()]
        runs = [
            {"value": mean, **vars(fields["rank_correlation_ci"][name])}
            for mean, fields in zip(means, measured.values(), strict=True)
        ]
        correlations[name] = {**value_and_range(sum(means) / len(means), means), "runs": runs}
    prompts = {fields["rank_correlation_prompts"] for fields in measured.values()}
    return {"prompts": max(prompts), "rank_correlation": correlations}


def interval(fields: dict, name: str) -> str:
    """Mean, interval and range of one linearization on one run."""
    mean, ends = fields["rank_correlation"][name], fields["rank_correlation_ci"][name]
    values = [value for value in fields["rank_correlation_by_prompt"][name] if value is not None]
    span = f"range {min(values):.2f} to {max(values):.2f}"
    return f"{mean:.2f} (no interval; {span})" if ends.low is None else (
        f"{mean:.2f} ({ends.low:.2f} to {ends.high:.2f}; {span})"
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--record", action="store_true", help="write the table to benchmarks/results.json")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    measured = {run.name: rank_correlations_of_run(run, options.prompts) for run in options.runs}
    found = block(measured)
    print(
        f"\n| {options.prompts} prompts | " + " | ".join(measured) + " | mean |\n" + "|---" * (len(measured) + 2) + "|"
    )
    for name, figure in found["rank_correlation"].items():
        cells = [interval(fields, name) for fields in measured.values()]
        print(f"| {name} | " + " | ".join(cells) + f" | {figure['value']:.2f} |")
    if options.record:
        record("linearizations", found)


if __name__ == "__main__":
    main()
