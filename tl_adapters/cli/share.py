"""The subcommands export, push and pull: adapters for other tools and other people."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
from pathlib import Path

from tl_adapters.cli.common import Subcommands, feature_ids
from tl_adapters.errors import UserError
from tl_adapters.utils.printing import show


def add_export(subcommands: Subcommands, quiet: argparse.ArgumentParser) -> None:
    """Adds `export`, which writes adapters, models or features for other tools."""
    export = subcommands.add_parser(
        "export", parents=[quiet], help="write adapters, models or features for other tools"
    )
    export.add_argument("adapters", metavar="RUN", help="run folder, folder of adapters, or hub name")
    formats = ("saelens", "authors", "hybrid", "target", "neuronpedia", "sae-dashboard")
    export.add_argument("--to", choices=formats, required=True, help="format; the last two take a run's features")
    export.add_argument("--out", type=Path, required=True, help="folder to make")
    _add_reads(export)
    export.add_argument("--base", help="folder or hub name of the base (default: the one the adapters record)")
    export.add_argument("--target", help="folder or hub name of the target (default: likewise)")
    export.add_argument("--model-id", help="neuronpedia: its name of the model (default: the target's name)")
    export.add_argument("--set", default="tl-adapters", help="neuronpedia: its name of the set (default: tl-adapters)")
    export.add_argument("--features", nargs="+", metavar="L.I", help="sae-dashboard: features to draw, as layer.index")
    export.add_argument("--data", help="sae-dashboard: documents (not needed for the model organism)")
    export.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> None:
    from tl_adapters.interop.export import export

    if args.to in ("neuronpedia", "sae-dashboard"):
        _export_features(args)
        return
    export(args.adapters, args.to, args.out, reads=args.reads, base=args.base, target=args.target)
    show(f"{args.to}: {args.out}")
    if args.to == "saelens":
        show(f'next: sae_lens.SAE.load_from_disk("{args.out}/layer_0")')
        if importlib.util.find_spec("sae_lens") is None:
            show("SAELens is not installed here. It needs TransformerLens 3: pip install 'tl-adapters[saelens]'")
    elif args.to != "authors":
        show(f'next: transformers.AutoModelForCausalLM.from_pretrained("{args.out}")')


def _export_features(args: argparse.Namespace) -> None:
    from tl_adapters.study.features import export_neuronpedia, export_sae_dashboard

    run = Path(args.adapters)
    if args.to == "neuronpedia":
        show(f"neuronpedia: {export_neuronpedia(run, args.out, args.model_id, args.set)}")
        return
    if args.features is None:
        raise UserError("--features is missing; give the features to draw as layer.index, such as 2.17 4.3.")
    pages = export_sae_dashboard(run, args.out, feature_ids(args.features), args.data)
    show("sae-dashboard: " + "\n".join(map(str, pages)))


def add_push(subcommands: Subcommands, quiet: argparse.ArgumentParser) -> None:
    """Adds `push`, which uploads adapters with their model card."""
    push = subcommands.add_parser(
        "push", parents=[quiet], help="upload adapters with their model card to the hub (reads HF_TOKEN)"
    )
    push.add_argument("adapters", metavar="RUN", help="run folder or folder of adapters")
    push.add_argument("repo", metavar="USER/REPO", help="repository, created if it does not exist")
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push.add_argument("--revision", help="branch, created if it does not exist")
    _add_reads(push)
    push.set_defaults(run=_push)


def _push(args: argparse.Namespace) -> None:
    from tl_adapters.interop.export import load_adapters_with_measurements
    from tl_adapters.interop.hub import push_to_hub

    adapters = load_adapters_with_measurements(args.adapters)
    address = push_to_hub(adapters, args.repo, private=args.private, revision=args.revision, reads=args.reads)
    show(f"commit: {address}\nnext: tl-adapters pull {args.repo} --out adapters")


def add_pull(subcommands: Subcommands, quiet: argparse.ArgumentParser) -> None:
    """Adds `pull`, which downloads adapters from the hub."""
    pull = subcommands.add_parser("pull", parents=[quiet], help="download adapters from the hub into a new folder")
    pull.add_argument("repo", metavar="USER/REPO", help="repository of the hub")
    pull.add_argument("--out", type=Path, required=True, help="folder to make")
    pull.add_argument("--layers", type=int, nargs="+", help="these layers only")
    pull.add_argument("--revision", help="branch, tag or commit")
    pull.set_defaults(run=_pull)


def _pull(args: argparse.Namespace) -> None:
    from tl_adapters.interop.hub import pull

    adapters = pull(args.repo, args.out, layers=args.layers, revision=args.revision)
    about = adapters.metadata
    show(f"adapters: {args.out} ({len(adapters)} of {adapters.n_layers} layers, {adapters.n_features} features each)")
    names = {"BASE": about.base, "TARGET": about.target}
    for word, name in names.items():
        if name.startswith("./"):
            show(f"The {word.lower()} was {name}, a folder of another machine: give your copy for {word} below.")
            names[word] = ""
    base, target = (shlex.quote(name or word) for word, name in names.items())
    show(f"next: tl-adapters doctor {base} {target} {shlex.quote(str(args.out))}")


def _add_reads(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument(
        "--reads",
        choices=("normalized", "mlp_input"),
        default="normalized",
        help="normalized: right on processed models too (default); mlp_input: as trained, for unprocessed models",
    )
