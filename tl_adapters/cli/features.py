"""The subcommands features and label: what a run's features fire on, and what they are called."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from tl_adapters.cli.common import Subcommands, device_of
from tl_adapters.errors import UserError
from tl_adapters.utils.printing import show


def add_features(subcommands: Subcommands, common: argparse.ArgumentParser) -> None:
    """Adds `features`, which collects a run's features and writes their pages."""
    features = subcommands.add_parser(
        "features", parents=[common], help="collect what every feature fires on and writes, and draw pages"
    )
    features.add_argument("run_folder", type=Path, metavar="RUN", help="folder that train or demo made")
    features.add_argument(
        "--data", help="a .jsonl file of traces, or a dataset's name (not needed for the model organism)"
    )
    features.add_argument(
        "--stream", choices=("replacement", "target"), default="replacement", help="whose residual stream they read"
    )
    features.add_argument(
        "--examples", type=int, metavar="N", help="top activating examples kept per feature (default: 20)"
    )
    features.add_argument("--sample", type=int, metavar="N", help="random examples kept per feature (default: 20)")
    features.add_argument("--tokens-per-batch", type=int, metavar="N", help="tokens of a forward pass (default: 4096)")
    features.add_argument(
        "--share", metavar="I/N", help="collect part I of N (from 0); run once more without --share at the end"
    )
    features.set_defaults(run=_features)


def _features(args: argparse.Namespace) -> None:
    from tl_adapters.features.store_description import StoreOptions
    from tl_adapters.pages.report import write_report
    from tl_adapters.study.features import FEATURES_FOLDER, STORE_FOLDER, features_run

    given = {"examples": args.examples, "sample": args.sample, "tokens_per_batch": args.tokens_per_batch}
    options = StoreOptions(
        **{name: n for name, n in given.items() if n is not None}, **({} if args.seed is None else {"seed": args.seed})
    )
    run = args.run_folder
    page = features_run(
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
        show(
            f"parts: {run / FEATURES_FOLDER / STORE_FOLDER}\nnext: the same command without --share, when every "
            "process is done"
        )
        return
    show(f"pages: {page}\nstore: {run / FEATURES_FOLDER / STORE_FOLDER}\nreport: {write_report(run)}")
    show(f"next: tl-adapters label {run}")


def _share(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise UserError(f"--share is {text!r}; give I/N, such as 0/4 for the first of four processes.")
    return int(match[1]), int(match[2])


def add_label(subcommands: Subcommands, quiet: argparse.ArgumentParser) -> None:
    """Adds `label`, which labels a run's features by rules and by an LLM judge."""
    label = subcommands.add_parser("label", parents=[quiet], help="label a run's features by rules and by an LLM judge")
    label.add_argument("run_folder", type=Path, metavar="RUN", help="run whose features were collected")
    label.add_argument(
        "--judge", type=int, nargs="?", const=0, metavar="N", help="let an LLM sort N features, or all, into categories"
    )
    label.add_argument(
        "--retest", type=int, default=50, metavar="N", help="features of these that are judged twice (default: 50)"
    )
    label.add_argument(
        "--auto-interp", type=int, metavar="N", help="explain N features and N neurons and score the explanations"
    )
    label.add_argument("--base-url", help="an OpenAI-compatible endpoint (default: TL_ADAPTERS_BASE_URL)")
    label.add_argument(
        "--model", help="the judge (default: TL_ADAPTERS_MODEL); its key is read from TL_ADAPTERS_API_KEY"
    )
    label.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at once (default: 8)")
    label.add_argument("--max-requests", type=int, metavar="N", help="stop after N requests and keep their replies")
    label.add_argument("--max-tokens", type=int, metavar="N", help="stop when all replies together have used N tokens")
    label.add_argument(
        "--reply-tokens",
        type=int,
        default=4096,
        metavar="N",
        help="longest reply in tokens, thinking included (default: 4096)",
    )
    label.add_argument("--seed", type=int, default=0, help="seed of sampling and order (default: 0)")
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
        show(f"{name}: {share['count']} features, {100 * share['weighted']['value']:.1f} % of the alive")
    for name, share in (block.get("judge") or {}).get("shares", {}).items():
        show(f"{name}: {share['count']} judged, {100 * share['weighted']['value']:.1f} %")
    if detection := block.get("detection"):
        for unit in ("features", "neurons"):
            if detection[unit]:
                show(f"detection score of {unit}: {detection[unit]['score']['value']:.3f}")
    show(f"report: {write_report(args.run_folder)}\nnext: tl-adapters serve {args.run_folder}")
