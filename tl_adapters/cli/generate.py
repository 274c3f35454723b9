"""The subcommand generate: what routes and changed features write after one prompt."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tl_adapters.cli.common import STRENGTH_HELP, Subcommands, device_of, feature_ids, read_prompt, strength_of
from tl_adapters.errors import UserError
from tl_adapters.utils.printing import show

if TYPE_CHECKING:
    from tl_adapters.cli.columns import Column
    from tl_adapters.generation.compare_variants import VariantCompletion
    from tl_adapters.interventions.variants import Variant


def add_generate(subcommands: Subcommands, common: argparse.ArgumentParser) -> None:
    """Adds `generate`, which prints the completions of several variants side by side."""
    generate = subcommands.add_parser(
        "generate", parents=[common], help="completions of routes and changed features, side by side"
    )
    generate.add_argument("run_folder", type=Path, metavar="RUN", help="folder that train or demo made")
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="a question; the target's chat template is applied")
    prompt.add_argument("--prompt-file", type=Path, help="a text file with the prompt")
    generate.add_argument(
        "--raw", action="store_true", help="the prompt is the model's whole input, chat tokens included"
    )
    generate.add_argument(
        "--open-thinking", action="store_true", help="end the prompt with the tag that opens the thinking"
    )
    routes = ("target", "hybrid", "replacement", "target+adapter")
    generate.add_argument("--route", action="append", choices=routes, help="a route to show (default: the first three)")
    variant = dict(action="append", nargs="+", default=[])
    generate.add_argument("--ablate", **variant, metavar="L.I", help="also the replacement without these features")
    generate.add_argument("--insert", **variant, metavar="L.I", help="also the hybrid with only these")
    generate.add_argument("--strength", type=float, metavar="F", help=STRENGTH_HELP)
    generate.add_argument(
        "--negate", **variant, metavar="L.I", help="also the target less half of these features' output"
    )
    generate.add_argument(
        "--scale", **variant, metavar=("FACTOR", "L.I"), help="also the replacement with these features times FACTOR"
    )
    own = "(default: generation_config.json's"
    generate.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"longest completion {own}, or 32,768, or what the context leaves)",
    )
    generate.add_argument("--temperature", type=float, help=f"0 is greedy {own}, or 0)")
    generate.add_argument("--top-p", type=float, help=f"nucleus sampling {own}, or 1)")
    generate.add_argument("--top-k", type=int, help=f"sample from the N most probable tokens {own}, or all)")
    generate.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> None:
    from tl_adapters.cli.columns import side_by_side
    from tl_adapters.config import RunConfig
    from tl_adapters.generation.compare_variants import generate_variants, tokenize_question
    from tl_adapters.generation.generation_config import default_max_new_tokens, sampling_parameters
    from tl_adapters.study.open_run import open_run

    text = args.prompt if args.prompt_file is None else read_prompt(args.prompt_file)
    variants = _variants(args)
    pair = open_run(args.run_folder, device_of(args.device), args.dtype)
    think_start = RunConfig.of_run(args.run_folder).data.think_start
    prompt = tokenize_question(
        pair.model.tokenizer, text, raw=args.raw, open_thinking=args.open_thinking, think_start=think_start
    )
    completions = generate_variants(
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
    lines = side_by_side(
        [_column(completion, completions[0]) for completion in completions], width, styled=sys.stdout.isatty()
    )
    show(lines, escaped=True)
    limit = default_max_new_tokens(pair.model) if args.max_new_tokens is None else args.max_new_tokens
    decoding = sampling_parameters(pair.model, args.temperature, args.top_p, args.top_k)
    show(f"decoding: {decoding}, up to {min(limit, pair.model.cfg.n_ctx - len(prompt)):,} tokens")
    show(f"next: tl-adapters attribute {args.run_folder} --prompt TEXT --target Wait")


def _variants(args: argparse.Namespace) -> list[Variant]:
    """The routes and variants of the options, in the order of their help."""
    from tl_adapters.generation.compare_variants import DEFAULT_ROUTES
    from tl_adapters.interventions.variants import on_route, rescaled, with_negated, with_only, without

    return [
        *(on_route(route) for route in args.route or DEFAULT_ROUTES),
        *(without(feature_ids(names)) for names in args.ablate),
        *(with_only(feature_ids(names), strength_of(args.strength, names)) for names in args.insert),
        *(with_negated(feature_ids(names)) for names in args.negate),
        *(rescaled(feature_ids(names), _factor(factor, names)) for factor, *names in args.scale),
    ]


def _factor(text: str, names: list[str]) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not math.isfinite(factor) or not names:
        given = " ".join([text, *names])
        raise UserError(f"--scale is {given}; give a factor and features, such as --scale 2 2.17 4.3.")
    return factor


def _column(completion: VariantCompletion, first: VariantCompletion) -> Column:
    from tl_adapters.cli.columns import Column

    same = completion is not first and completion.differs_at is None
    footer = completion.summary + (f"; the same as {first.variant}" if same else "")
    return Column(completion.variant, completion.text, footer, completion.hesitation_spans, completion.differs_at)
