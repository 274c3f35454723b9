"""The verbs that make and measure a run: demo, doctor, config, train, sweep, evaluate."""

from __future__ import annotations

import argparse
import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from tl_adapters.cli.common import Verbs, device_of, dtype_of
from tl_adapters.errors import UserError

if TYPE_CHECKING:
    from tl_adapters.config import RunConfig

log = logging.getLogger(__name__)


def add_demo(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """The verb demo."""
    demo = verbs.add_parser("demo", parents=[common], help="the whole study on the built-in pair, offline, on a CPU")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder (default: runs/demo)")
    demo.add_argument("--quick", action="store_true", help="a look at everything in a few minutes")
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    import time
    from dataclasses import replace

    from tl_adapters.study import evaluate as study

    began = time.perf_counter()
    scale = study.QUICK if args.quick else study.Scale()
    if args.seed is not None:
        scale = replace(scale, training=replace(scale.training, seed=args.seed))
    moved = _move_aside(args.out)
    if moved:
        log.info("the earlier %s is now %s", args.out, moved)
    report = study.demo(args.out, scale, device_of(args.device), dtype_of(args.dtype), progress=not args.quiet)
    print(f"report: {report}\nfigures: {args.out / 'results.json'}\nadapters: {args.out / 'adapters'}")
    print(f"took: {time.perf_counter() - began:.0f} s\nnext: tl-adapters evaluate {args.out}")


def add_doctor(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """The verb doctor."""
    doctor = verbs.add_parser("doctor", parents=[common], help="will this pair work here? before anything expensive")
    doctor.add_argument("base", metavar="BASE", help="folder or hub name; of hub models no weights are downloaded")
    doctor.add_argument("target", metavar="TARGET", help="folder or hub name")
    doctor.add_argument("adapters", metavar="ADAPTERS", nargs="?", help="run, folder or hub name: do they belong?")
    doctor.add_argument("--data", help="a .jsonl file or dataset, to count lengths and truncation")
    doctor.add_argument("--config", help="a YAML or JSON file, or the name of a configuration that ships")
    doctor.add_argument("--out", type=Path, default=Path(), help="where the run would be written (default: here)")
    doctor.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from tl_adapters.study.doctor import examine, in_lines

    findings = examine(_run_config(args), args.out, device_of(args.device), args.adapters)
    print(in_lines(findings))
    if any(finding.level == "error" for finding in findings):
        return 1
    pair = f"--base {shlex.quote(args.base)} --target {shlex.quote(args.target)}"
    print(f"next: tl-adapters train {pair} --data TRACES.jsonl --out runs/mine")
    return 0


def add_config(verbs: Verbs) -> None:
    """The verb config."""
    config = verbs.add_parser("config", help="every option of a run, documented, as YAML to edit")
    config.add_argument("name", nargs="?", help="a configuration that ships, or a file (default: the defaults)")
    config.add_argument("--list", action="store_true", help="the configurations that ship")
    config.set_defaults(run=_config, quiet=False)


def _config(args: argparse.Namespace) -> None:
    from tl_adapters.config import RunConfig, commented_yaml, shipped_configs

    if args.list:
        print("\n".join(shipped_configs()))
    else:
        print(commented_yaml(RunConfig.load(args.name) if args.name else RunConfig()))


def add_train(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """The verb train."""
    train = verbs.add_parser("train", parents=[common], help="train adapters for a pair, or go on with a run")
    train.add_argument("--base", help="folder or hub name of the base (default: the built-in pair)")
    train.add_argument("--target", help="folder or hub name of the target")
    train.add_argument("--data", help="a .jsonl file of prompts and responses, or a dataset's name on the hub")
    train.add_argument("--config", help="a YAML or JSON file, or the name of a configuration that ships")
    train.add_argument("--bad-rows", choices=("refuse", "drop"), help="rows that cannot be used (default: refuse)")
    place = train.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", type=Path, help="run folder to make")
    place.add_argument("--resume", type=Path, metavar="RUN", help="run folder to go on in; takes its own options")
    train.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from tl_adapters.study import evaluate as study
    from tl_adapters.study.open_run import is_builtin

    folder = args.resume or args.out
    if args.resume:
        given = [f"--{name}" for name in ("base", "target", "data", "config", "seed", "dtype") if getattr(args, name)]
        if given:
            raise UserError(f"--resume takes the run's own options; leave out {', '.join(given)}.")
        study.resume_run(folder, device_of(args.device), progress=not args.quiet, bad_rows=args.bad_rows)
    else:
        config = _run_config(args)
        if args.bad_rows:
            config = replace(config, data=replace(config.data, bad_rows=args.bad_rows))
        if config.target and not config.data.source:
            raise UserError(
                "--data is missing: a .jsonl file of prompts and responses, or a dataset's name on the hub."
            )
        study.train_run(config, folder, device_of(args.device), progress=not args.quiet)
    data = "" if is_builtin(folder) else " --data HELD_OUT.jsonl"
    print(f"adapters: {folder / 'adapters'}\nnext: tl-adapters evaluate {folder}{data}")


def add_sweep(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """The verb sweep."""
    sweep = verbs.add_parser("sweep", parents=[common], help="sparsity against faithfulness over training options")
    sweep.add_argument("--over", nargs="+", metavar="OPTION=V,V", help="such as l1_weight=3e-4,1e-3 n_features=128,512")
    sweep.add_argument("--base", help="folder or hub name of the base (default: the built-in pair)")
    sweep.add_argument("--target", help="folder or hub name of the target")
    sweep.add_argument("--data", help="training documents: a .jsonl file, or a dataset's name on the hub")
    sweep.add_argument("--config", help="a YAML or JSON file, or the name of a configuration that ships")
    sweep.add_argument("--held-out", metavar="DATA", help="what is measured on (the built-in pair needs none)")
    sweep.add_argument("--documents", type=int, metavar="N", help="held-out problems or documents (default: 300)")
    place = sweep.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", type=Path, help="folder to make, or to go on in")
    place.add_argument("--resume", type=Path, metavar="DIR", help="folder to go on in; takes its own options")
    sweep.set_defaults(run=_sweep)


def _sweep(args: argparse.Namespace) -> None:
    from tl_adapters.pages.sweep_page import PAGE, markdown, on_the_front
    from tl_adapters.study.grid import read_grid
    from tl_adapters.study.sweep import resume_sweep, sweep

    device, progress = device_of(args.device), not args.quiet
    if args.resume:
        names = ("over", "base", "target", "data", "config", "held_out", "documents", "seed", "dtype")
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
        if given:
            raise UserError(f"--resume takes the sweep's own options; leave out {', '.join(given)}.")
        points = resume_sweep(args.resume, device, progress=progress)
    else:
        if not args.over:
            raise UserError("--over is missing: options and their values, such as l1_weight=3e-4,1e-3,3e-3.")
        config = _run_config(args)
        if config.target and not config.data.source:
            raise UserError("--data is missing: the training documents, a .jsonl file or a dataset's name on the hub.")
        points = sweep(
            config, args.out, read_grid(args.over), held_out=args.held_out,
            documents=300 if args.documents is None else args.documents, device=device, progress=progress,
        )  # fmt: skip
    folder = args.resume or args.out
    print(f"{markdown(points)}\n\npage: {folder / PAGE}\nfigures: {folder / 'sweep.json'}")
    chosen = shlex.quote(str(folder / (on_the_front(points) or points)[0].name))
    print(f"next: tl-adapters evaluate {chosen}{'' if points[0].recovered else ' --data HELD_OUT.jsonl'}")


def add_evaluate(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """The verb evaluate."""
    evaluate = verbs.add_parser("evaluate", parents=[common], help="measure a run's adapters on held-out traces")
    evaluate.add_argument("run_folder", type=Path, metavar="RUN", help="folder that train or demo made")
    evaluate.add_argument("--data", help=".jsonl of held-out traces, or a dataset (the built-in pair needs none)")
    evaluate.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> None:
    from tl_adapters.pages.report import write_report
    from tl_adapters.study import evaluate as study

    study.evaluate_run(args.run_folder, args.data, device_of(args.device), args.dtype)
    print(f"report: {write_report(args.run_folder)}\nfigures: {args.run_folder / 'results.json'}")


def _run_config(args: argparse.Namespace) -> RunConfig:
    """The configuration file, if one is named, with what the flags say instead."""
    from dataclasses import replace

    from tl_adapters.config import RunConfig

    config = RunConfig.load(args.config) if args.config else RunConfig()
    named = {name: getattr(args, name) for name in ("base", "target", "dtype") if getattr(args, name)}
    if ("base" in named) != ("target" in named):
        raise UserError("--base and --target go together; leave both out for the configuration's or the built-in.")
    config = replace(config, **named)
    if args.data is not None:
        config = replace(config, data=replace(config.data, source=args.data))
    if args.seed is not None:
        config = replace(config, training=replace(config.training, seed=args.seed))
    return config


def _move_aside(folder: Path) -> Path | None:
    """Rename an earlier run to the first free ``folder-N``; runs are never overwritten."""
    if not folder.exists():
        return None
    n = 1
    while (moved := folder.with_name(f"{folder.name}-{n}")).exists():
        n += 1
    return folder.rename(moved)
