"""The verbs that run a model: generate, benchmark."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tl_adapters.cli.common import Subcommands, device_of, feature_ids, insertion_strength, read_prompt
from tl_adapters.errors import UserError

if TYPE_CHECKING:
    from tl_adapters.cli.columns import Column
    from tl_adapters.generation.compare_variants import Continuation
    from tl_adapters.interventions.variants import Variant


_STRENGTH = "how strongly --insert's features fire (default: a circuit's own strength; 1 for features by name)"


def add_generate(subcommands: Subcommands, common: argparse.ArgumentParser) -> None:
    """The verb generate."""
    generate = subcommands.add_parser(
        "generate", parents=[common], help="what routes and changed features say, side by side"
    )
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
    from tl_adapters.generation.compare_variants import generate_variants, tokenize_question
    from tl_adapters.generation.generation_config import decoding_of, longest_answer
    from tl_adapters.study.open_run import open_run

    text = args.prompt if args.prompt_file is None else read_prompt(args.prompt_file)
    variants = _variants(args)
    pair = open_run(args.run_folder, device_of(args.device), args.dtype)
    think_start = RunConfig.load(args.run_folder / "config.json").data.think_start
    prompt = tokenize_question(
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
    from tl_adapters.generation.compare_variants import DEFAULT_ROUTES
    from tl_adapters.interventions.variants import on_route, rescaled, with_negated, with_only, without

    return [
        *(on_route(route) for route in args.route or DEFAULT_ROUTES),
        *(without(feature_ids(names)) for names in args.ablate),
        *(with_only(feature_ids(names), _strength(args.strength, names)) for names in args.insert),
        *(with_negated(feature_ids(names)) for names in args.negate),
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
