"""The subcommand benchmark: answers to tasks, with pass@1, length and hesitation rate."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tl_adapters.cli.common import STRENGTH_HELP, Subcommands, device_of, feature_ids, strength_of
from tl_adapters.utils.printing import show


def add_benchmark(subcommands: Subcommands, common: argparse.ArgumentParser) -> None:
    """Adds `benchmark`, which answers tasks on one route and scores the answers."""
    benchmark = subcommands.add_parser(
        "benchmark", parents=[common], help="answer tasks on one route: pass@1, length, hesitation rate"
    )
    benchmark.add_argument("run_folder", type=Path, metavar="RUN", help="folder that train or demo made")
    benchmark.add_argument(
        "--tasks", nargs="+", metavar="NAME[=FILE]", help="such as gsm8k,math500; FILE is a local copy of the dataset"
    )
    routes = ("target", "hybrid", "replacement", "target+adapter")
    benchmark.add_argument("--route", choices=routes, help="the route that answers (default: replacement)")
    features = benchmark.add_mutually_exclusive_group()
    features.add_argument(
        "--ablate", nargs="+", default=(), metavar="L.I", help="answer with the replacement without these features"
    )
    features.add_argument(
        "--insert", nargs="+", default=(), metavar="L.I", help="answer with the hybrid and only these features"
    )
    benchmark.add_argument("--strength", type=float, metavar="F", help=STRENGTH_HELP)
    benchmark.add_argument("--samples", type=int, metavar="N", help="answers to each problem (default: 1)")
    own = "(default: generation_config.json's"
    benchmark.add_argument("--temperature", type=float, help=f"0 is greedy {own}, or 0; for the built-in problems 0)")
    benchmark.add_argument("--top-p", type=float, help=f"nucleus sampling {own}, or 1)")
    benchmark.add_argument("--top-k", type=int, help=f"sample from the N most probable tokens {own}, or all)")
    benchmark.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="longest answer (default: 32,768; 160 for the built-in problems)",
    )
    benchmark.add_argument(
        "--batch-size", type=int, metavar="N", help="problems per batch (default: 16 at 32,768 tokens, 250 at 160)"
    )
    benchmark.add_argument("--limit", type=int, metavar="N", help="the first N problems of each task only")
    benchmark.add_argument(
        "--open-thinking", action="store_true", help="end the prompts with the tag that opens the thinking"
    )
    benchmark.add_argument(
        "--words",
        nargs="+",
        help='words of the hesitation rate, such as wait "hold on" (default: wait)',
    )
    benchmark.add_argument("--out", type=Path, help="folder of answers (default: RUN/benchmarks)")
    benchmark.set_defaults(run=_benchmark)


def _benchmark(args: argparse.Namespace) -> None:
    from tl_adapters.data.hesitation_words import HESITATION_RATE_WORDS
    from tl_adapters.study.benchmark import BENCHMARKS_FOLDER, BenchmarkVariant, benchmark_run
    from tl_adapters.utils.html import interval_text

    route = args.route or ("hybrid" if args.insert else "replacement")
    names = ("samples", "temperature", "top_p", "top_k", "max_new_tokens", "batch_size", "seed")
    strength = strength_of(args.strength, args.insert)
    out = args.out or args.run_folder / BENCHMARKS_FOLDER
    try:
        results = benchmark_run(
            args.run_folder,
            None if args.tasks is None else _tasks(args.tasks),
            BenchmarkVariant(route, tuple(feature_ids(args.ablate)), tuple(feature_ids(args.insert)), strength),
            options={name: value for name in names if (value := getattr(args, name)) is not None},
            open_thinking=args.open_thinking,
            limit=args.limit,
            words=args.words or HESITATION_RATE_WORDS,
            out=out,
            device=device_of(args.device),
            dtype=args.dtype,
            progress=not args.quiet,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; the answers so far are in {out}, and the same command continues.") from None
    for result in results:
        score = result.score
        right = interval_text(vars(score.ci["pass_at_1"]), lambda share: f"{100 * share:.1f}")
        hesitates = "-" if score.hesitation_per_1k is None else f"{score.hesitation_per_1k:.1f}"
        show(
            f"{result.task}, {result.variant}: pass@1 {100 * score.pass_at_1:.1f} % ({right}) of {score.n} problems, "
            f"{score.length:.0f} tokens, {hesitates} {'/'.join(score.words)} per 1,000, {100 * score.truncated:.1f} % "
            f"cut, {100 * score.looping:.1f} % looping"
        )
        show(
            f"decoding: {result.sampling.parameters}, up to {result.sampling.max_new_tokens:,} tokens; of 1,000 tokens "
            f"{score.near_ties_per_1k:.2f} are chosen by a margin below rounding"
        )
        show(f"answers: {result.folder}")
    show(f"next: tl-adapters benchmark {args.run_folder} --route {'replacement' if route == 'target' else 'target'}")


def _tasks(given: Sequence[str]) -> dict[str, str | None]:
    """Name of each task, also where commas join several, and its file or Nresult."""
    pairs = [name.partition("=")[::2] for names in given for name in names.split(",") if name]
    return {name: file or None for name, file in pairs}
