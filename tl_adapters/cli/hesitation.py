"""The subcommand hesitation: find and test the circuit of a behavior."""

from __future__ import annotations

import argparse
from pathlib import Path

from tl_adapters.cli.common import Subcommands, device_of
from tl_adapters.utils.printing import show


def add_hesitation(subcommands: Subcommands, common: argparse.ArgumentParser) -> None:
    """Add the subcommand hesitation."""
    hesitation = subcommands.add_parser(
        "hesitation", parents=[common], help="find the features that say a word, and test them by intervention"
    )
    hesitation.add_argument("run_folder", type=Path, metavar="RUN", help="folder that train or demo made")
    hesitation.add_argument(
        "--task", metavar="NAME[=FILE]", help="problems: gsm8k, ... (default: those of the model organism)"
    )
    hesitation.add_argument(
        "--words",
        nargs="+",
        metavar="WORD",
        help='words or phrases of the behavior, such as Wait "Hold on" (default: Wait)',
    )
    hesitation.add_argument(
        "--share", type=float, metavar="X", help="size of the circuit, as a share of alive features (default: 0.03)"
    )
    hesitation.add_argument(
        "--limit", type=int, metavar="N", help="number of problems: half to choose on, half to report on"
    )
    hesitation.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="longest answer (default: the task's, or generation_config.json's, or 32,768)",
    )
    hesitation.set_defaults(run=_hesitation)


def _hesitation(args: argparse.Namespace) -> None:
    from tl_adapters.circuits.circuit import CIRCUIT_FILE
    from tl_adapters.circuits.criteria import OUTCOME_NAMES
    from tl_adapters.data.hesitation_words import HESITATION_ONSET
    from tl_adapters.pages.report import write_report
    from tl_adapters.study.hesitation import hesitation_of_run
    from tl_adapters.utils.results import output_file

    name, _, source = (args.task or "").partition("=")
    study = hesitation_of_run(
        args.run_folder,
        (name, source or None) if name else None,
        words=args.words or [HESITATION_ONSET],
        share=args.share,
        limit=args.limit,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed or 0,
        device=device_of(args.device),
        dtype=args.dtype,
        progress=not args.quiet,
    )
    size = study.block["circuit"]
    if not size["n"]:
        show(f"no circuit: the target's answers have {study.block['moments']['select']['moments']} onsets")
    else:
        roles = ", ".join(f"{size[role]} {role}" for role in ("output", "template", "continuation"))
        show(f"{size['n']} features ({100 * size['share_of_alive']:.1f} % of the alive): {roles}")
        for criterion in study.block["criteria"]:
            value = "-" if criterion["value"] is None else f"{criterion['value']:.3g}"
            show(f"{OUTCOME_NAMES[criterion['reached']]:9}  {criterion['name']}: {value}, {criterion['bar']}")
    run = args.run_folder
    show(f"page: {run / study.block['page']}\ncircuit: {output_file(run, CIRCUIT_FILE)}\nreport: {write_report(run)}")
    show(f"next: tl-adapters serve {run}")
