"""The subcommand benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tl_adapters.cli.common import Subcommands, device_of, feature_ids
from tl_adapters.cli.generate import _STRENGTH, _strength


def add_benchmark(subcommands: Subcommands, common: argparse.ArgumentParser) -> None:
    """The verb benchmark."""
    benchmark = subcommands.add_parser(
        "benchmark", parents=[common], help="a route's answers to tasks: pass@1, length, waits"
    )
    benchmark.add_argument("run_folder", type=Path, metavar="RUN", help="folder that train or demo made")
    benchmark.add_argument(
        "--tasks", nargs="+", metavar="NAME[=FILE]", help="such as gsm8k,math500; FILE is a local copy of its dataset"
    )
    routes = ("target", "hybrid", "replacement", "target+adapter")
    benchmark.add_argument("--route", choices=routes, help="who answers (default: the replacement)")
    features = benchmark.add_mutually_exclusive_group()
    features.add_argument("--ablate", nargs="+", default=(), metavar="L.I", help="the replacement without these")
    features.add_argument("--insert", nargs="+", default=(), metavar="L.I", help="the hybrid with only these")
    benchmark.add_argument("--strength", type=float, metavar="F", help=_STRENGTH)
    benchmark.add_argument("--samples", type=int, metavar="N", help="answers to each problem (default: 1)")
    own = "(default: generation_config.json's"
    benchmark.add_argument(
        "--temperature", type=float, help=f"0 takes the likeliest token {own}, or 0; of the built-in problems 0)"
    )
    benchmark.add_argument("--top-p", type=float, help=f"draw from the likeliest tokens only {own}, or 1)")
    benchmark.add_argument("--top-k", type=int, help=f"draw from so many tokens only {own}, or all)")
    benchmark.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="the limit (default: the task's, 32,768; the built-in's 160)"
    )
    benchmark.add_argument(
        "--batch-size", type=int, metavar="N", help="problems at a time (default: 16 of 32,768 tokens, 250 of 160)"
    )
    benchmark.add_argument("--limit", type=int, metavar="N", help="only the first N problems of each task")
    benchmark.add_argument("--open-thinking", action="store_true", help="the prompt ends with the tag that opens it")
    benchmark.add_argument("--words", nargs="+", help='what counts, such as wait "hold on" (default: wait)')
    benchmark.add_argument("--out", type=Path, help="folder of answers (default: RUN/benchmarks)")
    benchmark.set_defaults(run=_benchmark)


def _benchmark(args: argparse.Namespace) -> None:
    from tl_adapters.data.hesitation_words import HESITATION_RATE_WORDS
    from tl_adapters.study.benchmark import BENCHMARKS_FOLDER, Answerer, benchmark_run
    from tl_adapters.utils.html import interval_text

    route = args.route or ("hybrid" if args.insert else "replacement")
    names = ("samples", "temperature", "top_p", "top_k", "max_new_tokens", "batch_size", "seed")
    strength = _strength(args.strength, args.insert)
    out = args.out or args.run_folder / BENCHMARKS_FOLDER
    try:
        measured = benchmark_run(
            args.run_folder,
            None if args.tasks is None else _tasks(args.tasks),
            Answerer(route, tuple(feature_ids(args.ablate)), tuple(feature_ids(args.insert)), strength),
            options={name: value for name in names if (value := getattr(args, name)) is not None},
            open_thinking=args.open_thinking,
            limit=args.limit,
            words=args.words or HESITATION_RATE_WORDS or HESITATION_RATE_WORDS,
            out=out,
            device=device_of(args.device),
            dtype=args.dtype,
            progress=not args.quiet,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; what was answered is in {out}, and the same command goes on.") from None
    for one in measured:
        found = one.score
        right = interval_text(vars(found.ci["pass_at_1"]), lambda share: f"{100 * share:.1f}")
        hesitates = "-" if found.hesitation_per_1k is None else f"{found.hesitation_per_1k:.1f}"
        print(
            f"{one.task}, {one.variant}: pass@1 {100 * found.pass_at_1:.1f} % ({right}) of {found.n} problems, "
            f"{found.length:.0f} tokens, {hesitates} {'/'.join(found.words)} per 1,000, {100 * found.truncated:.1f} % "
            f"cut, {100 * found.looping:.1f} % looping"
        )
        print(
            f"chosen: {one.sampling.decoding}, up to {one.sampling.max_new_tokens:,} tokens; of 1,000 tokens "
            f"{found.near_ties_per_1k:.2f} are chosen closer than rounding"
        )
        print(f"answers: {one.folder}")
    print(f"next: tl-adapters benchmark {args.run_folder} --route {'replacement' if route == 'target' else 'target'}")


def _tasks(given: Sequence[str]) -> dict[str, str | None]:
    """Names, also several between commas, and the file behind each, where there is one."""
    pairs = [name.partition("=")[::2] for names in given for name in names.split(",") if name]
    return {name: file or None for name, file in pairs}
