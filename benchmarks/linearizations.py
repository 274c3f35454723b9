"""Rank correlation of each linearization with real ablations. ``python benchmarks/linearizations.py RUN ...``.

Every RUN is a finished run on the model organism, made by train, demo or ``benchmarks/hesitation.py``. On the first
onset of hesitation in each of 30 answers, every active feature is ablated in the real model, one at a time, and the
effects on the logit are compared with those that RelP, frozen MLPs and the gradient attribute (Spearman). The means
with their intervals over prompts go into the block attribution of each run's results.json, and into its report.
"""

import argparse
import logging
import statistics
from pathlib import Path

from tl_adapters.attribution.graph import LINEARIZATIONS
from tl_adapters.study.attribution import rank_correlations_of_run


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
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    measured = {run.name: rank_correlations_of_run(run, options.prompts) for run in options.runs}
    print(
        f"\n| {options.prompts} prompts | " + " | ".join(measured) + " | mean |\n" + "|---" * (len(measured) + 2) + "|"
    )
    for name in LINEARIZATIONS:
        mean = statistics.mean(fields["rank_correlation"][name] for fields in measured.values())
        print(f"| {name} | " + " | ".join(interval(fields, name) for fields in measured.values()) + f" | {mean:.2f} |")


if __name__ == "__main__":
    main()
