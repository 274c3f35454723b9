"""The verbs that look at a run: features, label, attribute, hesitation, serve."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from tl_adapters.cli.common import Subcommands, device_of
from tl_adapters.errors import UserError


def add_features(subcommands: Subcommands, common: argparse.ArgumentParser) -> None:
    """The verb features."""
    features = subcommands.add_parser(
        "features", parents=[common], help="what every feature fires on and promotes, as pages"
    )
    features.add_argument("run_folder", type=Path, metavar="RUN", help="folder that train or demo made")
    features.add_argument("--data", help=".jsonl of traces, or a dataset (the built-in pair needs none)")
    features.add_argument("--stream", choices=("replacement", "target"), default="replacement", help="what they read")
    features.add_argument("--examples", type=int, metavar="N", help="strongest firings kept of each (default: 20)")
    features.add_argument("--sample", type=int, metavar="N", help="random firings kept of each (default: 20)")
    features.add_argument("--tokens-per-batch", type=int, metavar="N", help="in a forward pass (default: 4096)")
    features.add_argument("--share", metavar="I/N", help="this is process I of N (from 0); then once more without it")
    features.set_defaults(run=_features)


def _features(args: argparse.Namespace) -> None:
    from tl_adapters.features.store_description import StoreOptions
    from tl_adapters.pages.report import write_report
    from tl_adapters.study.features import FEATURES_FOLDER, STORE_FOLDER, describe_run

    given = {"examples": args.examples, "sample": args.sample, "tokens_per_batch": args.tokens_per_batch}
    options = StoreOptions(
        **{name: n for name, n in given.items() if n is not None}, **({} if args.seed is None else {"seed": args.seed})
    )
    run = args.run_folder
    page = describe_run(
        run,
        args.data,
        stream=args.stream,
        options=options,
        share=None if args.share is None else _share(args.share),
        device=device_of(args.device),
        dtype=args.dtype,
        progress=not args.quiet,
    )
    if page is None:
        print(
            f"parts: {run / FEATURES_FOLDER / STORE_FOLDER}\nnext: the same without --share, when every process is done"
        )
        return
    print(f"pages: {page}\nstore: {run / FEATURES_FOLDER / STORE_FOLDER}\nreport: {write_report(run)}")
    print(f"next: tl-adapters label {run}")


def _share(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise UserError(f"--share is {text!r}; allowed is I/N, such as 0/4, the first of four processes.")
    return int(match[1]), int(match[2])


def add_label(subcommands: Subcommands, quiet: argparse.ArgumentParser) -> None:
    """The verb label."""
    label = subcommands.add_parser(
        "label", parents=[quiet], help="what to call a run's features: by rules, and by a judge"
    )
    label.add_argument("run_folder", type=Path, metavar="RUN", help="folder whose features were collected")
    label.add_argument("--judge", type=int, nargs="?", const=0, metavar="N", help="sort N features, or all, by a model")
    label.add_argument("--retest", type=int, default=50, metavar="N", help="of them judged twice (default: 50)")
    label.add_argument("--auto-interp", type=int, metavar="N", help="describe N features and N neurons, and test it")
    label.add_argument("--base-url", help="of an OpenAI-compatible endpoint (default: TL_ADAPTERS_BASE_URL)")
    label.add_argument("--model", help="who judges (default: TL_ADAPTERS_MODEL); the key is TL_ADAPTERS_API_KEY")
    label.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at once (default: 8)")
    label.add_argument("--max-requests", type=int, metavar="N", help="stop there, and keep what was answered")
    label.add_argument(
        "--max-tokens", type=int, metavar="N", help="stop when all replies together have used so many tokens"
    )
    label.add_argument(
        "--reply-tokens", type=int, default=4096, metavar="N", help="longest reply, thinking included (default: 4096)"
    )
    label.add_argument("--seed", type=int, default=0, help="of draws and orders (default: 0)")
    label.set_defaults(run=_label)


def _label(args: argparse.Namespace) -> None:
    from tl_adapters.pages.report import write_report
    from tl_adapters.study.label import label_run

    block = label_run(
        args.run_folder,
        judge_n=args.judge,
        retest=args.retest,
        interpret_n=args.auto_interp,
        endpoint=dict(
            base_url=args.base_url,
            model=args.model,
            concurrency=args.concurrency,
            request_budget=args.max_requests,
            token_budget=args.max_tokens,
            reply_tokens=args.reply_tokens,
        ),
        seed=args.seed,
        progress=not args.quiet,
    )
    for name, share in block["rules"].items():
        print(f"{name}: {share['count']} features, {100 * share['weighted']['value']:.1f} % of the alive")
    for name, share in (block.get("judge") or {}).get("shares", {}).items():
        print(f"{name}: {share['count']} judged, {100 * share['weighted']['value']:.1f} %")
    if detection := block.get("detection"):
        for unit in ("features", "neurons"):
            if detection[unit]:
                print(f"detection score of {unit}: {detection[unit]['score']['value']:.3f}")
    print(f"report: {write_report(args.run_folder)}\nnext: tl-adapters serve {args.run_folder}")
