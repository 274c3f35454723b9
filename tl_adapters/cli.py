"""The command line. Nothing heavy is imported until a verb runs.

tl-adapters demo                                  the whole study on the built-in pair
tl-adapters train --base B --target T --data F    train adapters for any pair
tl-adapters evaluate RUN --data F                 measure a run's adapters on held-out traces
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from tl_adapters import __version__
from tl_adapters.errors import UserError

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16", "float64")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status (2 for an error the user can mend, 130 for Ctrl-C)."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("tl_adapters").setLevel(logging.WARNING if args.quiet else logging.INFO)
    try:
        _silence_loading_bars()
        args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--seed", type=int, default=None, help="seed of encoders, document order and cuts (default 0)")
    common.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
    common.add_argument("--dtype", choices=DTYPES, default=None, help="of the models (default: the target's own)")
    common.add_argument("--quiet", action="store_true", help="no progress, only what was written")

    parser = argparse.ArgumentParser(prog="tl-adapters", description="What did reasoning training change in a model?")
    parser.add_argument("--version", action="version", version=f"tl-adapters {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    demo = verbs.add_parser("demo", parents=[common], help="the whole study on the built-in pair, offline, on a CPU")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder (default: runs/demo)")
    demo.add_argument("--quick", action="store_true", help="a look at everything in under 90 seconds")
    demo.set_defaults(run=_demo)

    train = verbs.add_parser("train", parents=[common], help="train adapters for a pair")
    train.add_argument("--base", help="folder or hub name of the base (default: the built-in pair)")
    train.add_argument("--target", help="folder or hub name of the target")
    train.add_argument("--data", type=Path, help='jsonl of {"prompt": ..., "response": "<think>..."}')
    train.add_argument("--config", type=Path, help="YAML or JSON file of training options")
    train.add_argument("--out", type=Path, required=True, help="run folder to make")
    train.set_defaults(run=_train)

    evaluate = verbs.add_parser("evaluate", parents=[common], help="measure a run's adapters on held-out traces")
    evaluate.add_argument("run_folder", type=Path, metavar="RUN", help="folder that train or demo made")
    evaluate.add_argument("--data", type=Path, help="jsonl of held-out traces (the built-in pair needs none)")
    evaluate.set_defaults(run=_evaluate)
    return parser


def _demo(args: argparse.Namespace) -> None:
    import time
    from dataclasses import replace

    from tl_adapters import study

    began = time.perf_counter()
    scale = study.QUICK if args.quick else study.Scale()
    if args.seed is not None:
        scale = replace(scale, training=replace(scale.training, seed=args.seed))
    moved = _move_aside(args.out)
    if moved:
        log.info("the earlier %s is now %s", args.out, moved)
    report = study.demo(args.out, scale, _device(args.device), _dtype(args.dtype), progress=not args.quiet)
    print(f"report: {report}\nfigures: {args.out / 'results.json'}\nadapters: {args.out / 'adapters'}")
    print(f"took: {time.perf_counter() - began:.0f} s\nnext: tl-adapters evaluate {args.out}")


def _train(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from tl_adapters import organism, study
    from tl_adapters.config import TrainingConfig
    from tl_adapters.data import encode_traces, read_jsonl
    from tl_adapters.paired import PairedModel

    if (args.base is None) != (args.target is None):
        raise UserError("--base and --target go together; leave both out for the built-in pair.")
    if args.base is not None and args.data is None:
        raise UserError("--data is missing: a jsonl file of prompts and responses to train on.")
    config = TrainingConfig.load(args.config) if args.config else TrainingConfig()
    if args.seed is not None:
        config = replace(config, seed=args.seed)
    device, dtype = _device(args.device), _dtype(args.dtype)
    if args.base is None:
        pair = study.load_builtin_pair(device, dtype)
        pairs = organism.reasoning_pairs("train", study.Scale().training_traces, config.seed)
    else:
        pair = PairedModel.from_pretrained(args.base, args.target, device=device, dtype=dtype)
        pairs = []
    if args.data is not None:
        pairs = list(read_jsonl(args.data))
    traces = encode_traces(pairs, pair.model.tokenizer, max_tokens=pair.model.cfg.n_ctx)
    study.train_stage(pair, traces, config, args.out, progress=not args.quiet)
    data = "" if args.base is None else " --data HELD_OUT.jsonl"
    print(f"adapters: {args.out / 'adapters'}\nnext: tl-adapters evaluate {args.out}{data}")


def _evaluate(args: argparse.Namespace) -> None:
    from tl_adapters import organism, study
    from tl_adapters.adapter import AdapterSet
    from tl_adapters.data import encode_traces, read_jsonl
    from tl_adapters.paired import PairedModel
    from tl_adapters.report import write_report
    from tl_adapters.results import read_results

    adapters = AdapterSet.from_pretrained(args.run_folder / "adapters")
    recorded = read_results(args.run_folder).get("pair")
    if recorded is None:
        raise UserError(f"{args.run_folder / 'results.json'} names no pair; is this a folder that train or demo made?")
    device, dtype = _device(args.device), _dtype(args.dtype)
    is_builtin = recorded["target"] == study.BUILTIN_TARGET
    if is_builtin:
        pair = study.load_builtin_pair(device, dtype)
    else:
        pair = PairedModel.from_pretrained(recorded["base"], recorded["target"], device=device, dtype=dtype)
    pair.load_adapters(adapters)
    if args.data is not None:
        traces = encode_traces(read_jsonl(args.data), pair.model.tokenizer, max_tokens=pair.model.cfg.n_ctx)
        study.faithfulness_stage(pair, traces, args.run_folder, split=args.data.name)
    elif is_builtin:
        fit = encode_traces(organism.reasoning_pairs("train", study.Scale().documents), pair.model.tokenizer)
        study.evaluate_builtin(pair, args.run_folder, study.Scale(), fit)
    else:
        raise UserError("--data is missing: a jsonl file of held-out prompts and responses.")
    print(f"report: {write_report(args.run_folder)}\nfigures: {args.run_folder / 'results.json'}")


def _silence_loading_bars() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _device(name: str) -> str:
    import torch

    kind = name.partition(":")[0]
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in there:
        raise UserError(f"--device {name!r} is not known; allowed are cpu, cuda, cuda:N and mps.")
    if not there[kind]:
        raise UserError(f"--device {name}: this machine has none, or torch was built without it. Try --device cpu.")
    return name


def _dtype(name: str | None):  # type: ignore[no-untyped-def]  # torch is not imported here
    import torch

    return None if name is None else getattr(torch, name)


def _move_aside(folder: Path) -> Path | None:
    """Rename an earlier run to the first free ``folder-N``; runs are never overwritten."""
    if not folder.exists():
        return None
    n = 1
    while (moved := folder.with_name(f"{folder.name}-{n}")).exists():
        n += 1
    return folder.rename(moved)


if __name__ == "__main__":
    sys.exit(main())
