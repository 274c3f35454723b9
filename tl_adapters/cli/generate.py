"""The verbs that run a model: generate, benchmark."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tl_adapters.cli.common import Verbs, device_of, feature_ids, insertion_strength, read_prompt
from tl_adapters.errors import UserError

if TYPE_CHECKING:
    from tl_adapters.cli.columns import Column
    from tl_adapters.generation.compare_variants import Continuation, Variant


_STRENGTH = "how strongly --insert's features fire (default: a circuit's own strength; 1 for features by name)"


def add_generate(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """The verb generate."""
    generate = verbs.add_parser("generate", parents=[common], help="what routes and changed features say, side by side")
    generate.add_argument("run_folder", type=Path, metavar="RUN", help="folder that train or demo made")
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="a question; the target's chat template is put around it")
    prompt.add_argument("--prompt-file", type=Path, help="a text file that holds it")
    generate.add_argument("--raw", action="store_true", help="the prompt is what the model reads, chat tokens included")
    generate.add_argument("--open-thinking", action="store_true", help="the prompt ends with the tag that opens it")
    routes = ("target", "hybrid", "replacement", "target+adapter")
    generate.add_argument("--route", action="append", choices=routes, help="(default: the first three)")
    variant = dict(action="append", nargs="+", default=[])
    generate.add_argument("--ablate", **variant, metavar="L.I", help="also the replacement without these features")
    generate.add_argument("--insert", **variant, metavar="L.I", help="also the hybrid with only these")
    generate.add_argument("--strength", type=float, metavar="F", help=_STRENGTH)
    generate.add_argument("--negate", **variant, metavar="L.I", help="also the target with half of these taken off")
    generate.add_argument(
        "--scale", **variant, metavar=("FACTOR", "L.I"), help="also the replacement with these so many times as strong"
    )
    own = "(default: generation_config.json's"
    generate.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"the limit {own}, or 32,768, or what the context leaves)"
    )
    generate.add_argument("--temperature", type=float, help=f"0 takes the likeliest token {own}, or 0)")
    generate.add_argument("--top-p", type=float, help=f"draw from the likeliest tokens only {own}, or 1)")
    generate.add_argument("--top-k", type=int, help=f"draw from so many tokens only {own}, or all)")
    generate.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> None:
    from tl_adapters.cli.columns import side_by_side
    from tl_adapters.config import RunConfig
    from tl_adapters.generation.compare_variants import generate_variants, prompt_tokens
    from tl_adapters.generation.generation_config import decoding_of, longest_answer
    from tl_adapters.study.open_run import open_run

    text = args.prompt if args.prompt_file is None else read_prompt(args.prompt_file)
    variants = _variants(args)
    pair = open_run(args.run_folder, device_of(args.device), args.dtype)
    think_start = RunConfig.load(args.run_folder / "config.json").data.think_start
    prompt = prompt_tokens(
        pair.model.tokenizer, text, raw=args.raw, open_thinking=args.open_thinking, think_start=think_start
    )
    said = generate_variants(
        pair,
        prompt,
        variants,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed or 0,
        progress=not args.quiet,
    )
    width = shutil.get_terminal_size((100, 24)).columns
    lines = side_by_side([_column(one, said[0]) for one in said], width, styled=sys.stdout.isatty())
    encoding = sys.stdout.encoding or "utf-8"  # a terminal of another encoding gets escapes, no traceback
    print(lines.encode(encoding, "backslashreplace").decode(encoding))
    limit = longest_answer(pair.model) if args.max_new_tokens is None else args.max_new_tokens
    how = decoding_of(pair.model, args.temperature, args.top_p, args.top_k)
    print(f"chosen: {how}, up to {min(limit, pair.model.cfg.n_ctx - len(prompt)):,} tokens")
    print(f"next: tl-adapters attribute {args.run_folder} --prompt TEXT --target Wait")


def _variants(args: argparse.Namespace) -> list[Variant]:
    """The routes asked for, and the variants in the order of the options' help."""
    from tl_adapters.generation.compare_variants import DEFAULT_ROUTES, less, on_route, rescaled, with_only, without

    return [
        *(on_route(route) for route in args.route or DEFAULT_ROUTES),
        *(without(feature_ids(names)) for names in args.ablate),
        *(with_only(feature_ids(names), _strength(args.strength, names)) for names in args.insert),
        *(less(feature_ids(names)) for names in args.negate),
        *(rescaled(feature_ids(names), _factor(factor, names)) for factor, *names in args.scale),
    ]


def _strength(given: float | None, names: Sequence[str]) -> float:
    if given is not None and not (names and math.isfinite(given)):
        raise UserError(f"--strength is {given:g}; give a number, together with --insert.")
    return insertion_strength(names) if given is None else given


def _factor(text: str, names: list[str]) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not math.isfinite(factor) or not names:
        given = " ".join([text, *names])
        raise UserError(f"--scale is {given}; give a factor and features, such as --scale 2 2.17 4.3.")
    return factor


def _column(said: Continuation, first: Continuation) -> Column:
    from tl_adapters.cli.columns import Column

    same = said is not first and said.parts_at is None
    footer = said.summary + (f"; the same as {first.variant}" if same else "")
    return Column(said.variant, said.text, footer, said.hesitations, said.parts_at)


def add_benchmark(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """The verb benchmark."""
    benchmark = verbs.add_parser(
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
    benchmark.add_argument(
        "--words", nargs="+", default=("wait",), help='what counts, such as wait "hold on" (default: wait)'
    )
    benchmark.add_argument("--out", type=Path, help="folder of answers (default: RUN/benchmarks)")
    benchmark.set_defaults(run=_benchmark)


def _benchmark(args: argparse.Namespace) -> None:
    from tl_adapters.study.benchmark import FOLDER, Answerer, benchmark_run
    from tl_adapters.utils.html import interval_text

    route = args.route or ("hybrid" if args.insert else "replacement")
    names = ("samples", "temperature", "top_p", "top_k", "max_new_tokens", "batch_size", "seed")
    strength = _strength(args.strength, args.insert)
    out = args.out or args.run_folder / FOLDER
    try:
        measured = benchmark_run(
            args.run_folder,
            None if args.tasks is None else _tasks(args.tasks),
            Answerer(route, tuple(feature_ids(args.ablate)), tuple(feature_ids(args.insert)), strength),
            options={name: value for name in names if (value := getattr(args, name)) is not None},
            open_thinking=args.open_thinking,
            limit=args.limit,
            words=args.words,
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
