"""The command line. Nothing heavy is imported until a verb runs.

tl-adapters demo                                  the whole study on the built-in pair
tl-adapters doctor B T                            will this pair work here? before anything expensive
tl-adapters config                                every option of a run, documented, as a file to edit
tl-adapters train --base B --target T --data F    train adapters for any pair
tl-adapters train --resume RUN                    go on with a run that was stopped or killed
tl-adapters evaluate RUN --data F                 measure a run's adapters on held-out traces
tl-adapters attribute RUN --prompt TEXT           from the next token back to features and input tokens
tl-adapters serve DIR                             look at a folder's pages, on this machine only
tl-adapters export RUN --to saelens --out DIR     adapters, or the models they belong to, for other tools
tl-adapters push RUN USER/REPO                    adapters with their card to the hub
tl-adapters pull USER/REPO --out DIR              and back
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tl_adapters import __version__
from tl_adapters.errors import UserError

if TYPE_CHECKING:
    from tl_adapters.config import RunConfig

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16", "float64")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status (2 for an error the user can mend, 130 for Ctrl-C)."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("tl_adapters").setLevel(logging.WARNING if args.quiet else logging.INFO)
    try:
        _silence_loading_bars()
        return args.run(args) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "stopped.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    quiet = argparse.ArgumentParser(add_help=False)
    quiet.add_argument("--quiet", action="store_true", help="no progress, only what was written")
    common = argparse.ArgumentParser(add_help=False, parents=[quiet])
    common.add_argument("--seed", type=int, default=None, help="seed of encoders, document order and cuts (default 0)")
    common.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
    common.add_argument("--dtype", choices=DTYPES, default=None, help="of the models (default: the target's own)")

    parser = argparse.ArgumentParser(prog="tl-adapters", description="What did reasoning training change in a model?")
    parser.add_argument("--version", action="version", version=f"tl-adapters {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    demo = verbs.add_parser("demo", parents=[common], help="the whole study on the built-in pair, offline, on a CPU")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder (default: runs/demo)")
    demo.add_argument("--quick", action="store_true", help="a look at everything in under 90 seconds")
    demo.set_defaults(run=_demo)

    doctor = verbs.add_parser("doctor", parents=[common], help="will this pair work here? before anything expensive")
    doctor.add_argument("base", metavar="BASE", help="folder or hub name; of hub models no weights are downloaded")
    doctor.add_argument("target", metavar="TARGET", help="folder or hub name")
    doctor.add_argument("adapters", metavar="ADAPTERS", nargs="?", help="run, folder or hub name: do they belong?")
    doctor.add_argument("--data", help="a .jsonl file or dataset, to count lengths and truncation")
    doctor.add_argument("--config", help="a YAML or JSON file, or the name of a configuration that ships")
    doctor.add_argument("--out", type=Path, default=Path(), help="where the run would be written (default: here)")
    doctor.set_defaults(run=_doctor)

    config = verbs.add_parser("config", help="every option of a run, documented, as YAML to edit")
    config.add_argument("name", nargs="?", help="a configuration that ships, or a file (default: the defaults)")
    config.add_argument("--list", action="store_true", help="the configurations that ship")
    config.set_defaults(run=_config, quiet=False)

    train = verbs.add_parser("train", parents=[common], help="train adapters for a pair, or go on with a run")
    train.add_argument("--base", help="folder or hub name of the base (default: the built-in pair)")
    train.add_argument("--target", help="folder or hub name of the target")
    train.add_argument("--data", help="a .jsonl file of prompts and responses, or a dataset's name on the hub")
    train.add_argument("--config", help="a YAML or JSON file, or the name of a configuration that ships")
    place = train.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", type=Path, help="run folder to make")
    place.add_argument("--resume", type=Path, metavar="RUN", help="run folder to go on in; takes its own options")
    train.set_defaults(run=_train)

    evaluate = verbs.add_parser("evaluate", parents=[common], help="measure a run's adapters on held-out traces")
    evaluate.add_argument("run_folder", type=Path, metavar="RUN", help="folder that train or demo made")
    evaluate.add_argument("--data", help=".jsonl of held-out traces, or a dataset (the built-in pair needs none)")
    evaluate.set_defaults(run=_evaluate)

    attribute = verbs.add_parser("attribute", parents=[common], help="from the next token back to features and tokens")
    attribute.add_argument("run_folder", type=Path, metavar="RUN", help="folder that train or demo made")
    prompt = attribute.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text as the model reads it, chat tokens included")
    prompt.add_argument("--prompt-file", type=Path, help="a text file that holds it")
    attribute.add_argument("--target", action="append", help="a token to explain (default: the likeliest next ones)")
    attribute.add_argument("--linearisation", choices=("relp", "frozen_mlp", "gradient"), default="relp")
    attribute.add_argument("--max-feature-nodes", type=int, default=5000, metavar="N", help="the most influential")
    attribute.add_argument("--window", type=int, metavar="N", help="nodes at the last N positions only")
    attribute.add_argument("--exclude-bos", action="store_true", help="no features at the first position")
    attribute.add_argument("--node-threshold", type=float, default=0.8, help="influence that the page's nodes hold")
    attribute.add_argument("--edge-threshold", type=float, default=0.98, help="likewise its edges")
    attribute.add_argument("--out", type=Path, help="folder of graphs (default: RUN/graphs)")
    attribute.add_argument("--name", help="of the page (default: graph-1, graph-2, ...)")
    attribute.set_defaults(run=_attribute)

    serve = verbs.add_parser("serve", parents=[quiet], help="look at a folder's pages, on this machine only")
    serve.add_argument("folder", type=Path, metavar="DIR", help="a run, or a folder of graphs")
    serve.add_argument("--port", type=int, default=8000, help="on 127.0.0.1 (default: 8000)")
    serve.set_defaults(run=_serve)

    export = verbs.add_parser("export", parents=[quiet], help="adapters, or the models they belong to, for other tools")
    export.add_argument("adapters", metavar="RUN", help="run folder, folder of adapters, or hub name")
    export.add_argument("--to", choices=("saelens", "authors", "hybrid", "target"), required=True, help="format")
    export.add_argument("--out", type=Path, required=True, help="folder to make")
    _add_reads(export)
    export.add_argument("--base", help="where the base is, if not where the adapters say")
    export.add_argument("--target", help="likewise the target")
    export.set_defaults(run=_export)

    push = verbs.add_parser("push", parents=[quiet], help="adapters with their card to the hub (HF_TOKEN)")
    push.add_argument("adapters", metavar="RUN", help="run folder or folder of adapters")
    push.add_argument("repo", metavar="USER/REPO", help="made if it is not there")
    push.add_argument("--private", action="store_true", default=None, help="of a new repository")
    push.add_argument("--revision", help="branch, made if it is not there")
    _add_reads(push)
    push.set_defaults(run=_push)

    pull = verbs.add_parser("pull", parents=[quiet], help="adapters from the hub into a folder, whole or not at all")
    pull.add_argument("repo", metavar="USER/REPO", help="repository of the hub")
    pull.add_argument("--out", type=Path, required=True, help="folder to make")
    pull.add_argument("--layers", type=int, nargs="+", help="only these")
    pull.add_argument("--revision", help="branch, tag or commit")
    pull.set_defaults(run=_pull)
    return parser


def _add_reads(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--reads",
        choices=("normalized", "mlp_input"),
        default="normalized",
        help="normalized: right on processed models too (default); mlp_input: as trained, for models as they are",
    )


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


def _doctor(args: argparse.Namespace) -> int:
    from tl_adapters.doctor import examine, in_lines

    findings = examine(_run_config(args), args.out, _device(args.device), args.adapters)
    print(in_lines(findings))
    if any(finding.level == "error" for finding in findings):
        return 1
    pair = f"--base {shlex.quote(args.base)} --target {shlex.quote(args.target)}"
    print(f"next: tl-adapters train {pair} --data TRACES.jsonl --out runs/mine")
    return 0


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


def _config(args: argparse.Namespace) -> None:
    from tl_adapters.config import RunConfig, commented_yaml, shipped_configs

    if args.list:
        print("\n".join(shipped_configs()))
    else:
        print(commented_yaml(RunConfig.load(args.name) if args.name else RunConfig()))


def _train(args: argparse.Namespace) -> None:
    from tl_adapters import study

    folder = args.resume or args.out
    if args.resume:
        given = [f"--{name}" for name in ("base", "target", "data", "config", "seed", "dtype") if getattr(args, name)]
        if given:
            raise UserError(f"--resume takes the run's own options; leave out {', '.join(given)}.")
        study.resume_run(folder, _device(args.device), progress=not args.quiet)
    else:
        config = _run_config(args)
        if config.target and not config.data.source:
            raise UserError(
                "--data is missing: a .jsonl file of prompts and responses, or a dataset's name on the hub."
            )
        study.train_run(config, folder, _device(args.device), progress=not args.quiet)
    data = "" if study.is_builtin(folder) else " --data HELD_OUT.jsonl"
    print(f"adapters: {folder / 'adapters'}\nnext: tl-adapters evaluate {folder}{data}")


def _evaluate(args: argparse.Namespace) -> None:
    from tl_adapters import study
    from tl_adapters.report import write_report

    study.evaluate_run(args.run_folder, args.data, _device(args.device), args.dtype)
    print(f"report: {write_report(args.run_folder)}\nfigures: {args.run_folder / 'results.json'}")


def _attribute(args: argparse.Namespace) -> None:
    from tl_adapters import study
    from tl_adapters.attribution import attribute
    from tl_adapters.graph_pages import write_graph

    prompt = args.prompt if args.prompt_file is None else _read(args.prompt_file)
    pair = study.open_run(args.run_folder, _device(args.device), args.dtype)
    graph = attribute(
        pair,
        prompt,
        args.target,
        linearisation=args.linearisation,
        max_feature_nodes=args.max_feature_nodes,
        window=args.window,
        exclude_bos=args.exclude_bos,
        progress=not args.quiet,
    )
    out = args.out or args.run_folder / "graphs"
    name = args.name or next(f"graph-{i}" for i in range(1, 10**6) if not (out / f"graph-{i}").exists())
    thresholds = dict(node_threshold=args.node_threshold, edge_threshold=args.edge_threshold)
    page, url = write_graph(pair, graph, out, name, **thresholds)
    checked = f"conservation residual {graph.residual:.1e}" if graph.adds_up else "a gradient does not add up"
    print(f"{len(graph.features):,} features, {len(graph.weights):,} edges, {checked}")
    print(f"page: {page}\ngraph: {out / name}\ncircuit-tracer: {out / 'circuit-tracer'}, {url}")
    print(f"next: tl-adapters serve {out}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {path} cannot be read as text ({error}).") from error


def _serve(args: argparse.Namespace) -> None:
    from tl_adapters.server import HOST, make_server

    with make_server(args.folder, args.port) as server:
        print(f"http://{HOST}:{server.server_address[1]}/  (Ctrl-C ends it)", flush=True)
        server.serve_forever()


def _export(args: argparse.Namespace) -> None:
    from tl_adapters.publishing import export

    export(args.adapters, args.to, args.out, reads=args.reads, base=args.base, target=args.target)
    print(f"{args.to}: {args.out}")
    if args.to == "saelens":
        print(f'next: sae_lens.SAE.load_from_disk("{args.out}/layer_0")')
        if importlib.util.find_spec("sae_lens") is None:
            print("SAELens is not installed here. It needs TransformerLens 3: pip install 'tl-adapters[saelens]'")
    elif args.to != "authors":
        print(f'next: transformers.AutoModelForCausalLM.from_pretrained("{args.out}")')


def _push(args: argparse.Namespace) -> None:
    from tl_adapters.hub import push_to_hub
    from tl_adapters.publishing import adapters_of

    adapters = adapters_of(args.adapters)
    address = push_to_hub(adapters, args.repo, private=args.private, revision=args.revision, reads=args.reads)
    print(f"commit: {address}\nnext: tl-adapters pull {args.repo} --out adapters")


def _pull(args: argparse.Namespace) -> None:
    from tl_adapters.hub import pull

    adapters = pull(args.repo, args.out, layers=args.layers, revision=args.revision)
    about = adapters.metadata
    print(f"adapters: {args.out} ({len(adapters)} of {adapters.n_layers} layers, {adapters.n_features} features each)")
    base, target = shlex.quote(about.base or "BASE"), shlex.quote(about.target or "TARGET")
    print(f"next: tl-adapters doctor {base} {target} {args.out}")


def _silence_loading_bars() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _device(name: str) -> str:
    import torch

    kind = name.partition(":")[0]
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in there or not re.fullmatch(r"\w+(:\d+)?", name):
        raise UserError(f"--device {name!r} is not known; allowed are cpu, cuda, cuda:N and mps.")
    index = name.partition(":")[2]
    if not there[kind] or (index and (kind != "cuda" or int(index) >= torch.cuda.device_count())):
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
