"""The subcommand attribute: an attribution graph of a prompt's next token."""

from __future__ import annotations

import argparse
from pathlib import Path

from tl_adapters.cli.common import Subcommands, device_of, read_prompt
from tl_adapters.utils.printing import show


def add_attribute(subcommands: Subcommands, common: argparse.ArgumentParser) -> None:
    """Adds `attribute`, which draws the attribution graph of a prompt's next token."""
    attribute = subcommands.add_parser(
        "attribute", parents=[common], help="attribute the next token to features and input tokens"
    )
    attribute.add_argument("run_folder", type=Path, metavar="RUN", help="folder that train or demo made")
    prompt = attribute.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text as the model reads it, chat tokens included")
    prompt.add_argument("--prompt-file", type=Path, help="a text file with the prompt")
    attribute.add_argument(
        "--target", action="append", help="a token to attribute (default: the most probable next tokens)"
    )
    attribute.add_argument("--linearisation", choices=("relp", "frozen_mlp", "gradient"), default="relp")
    attribute.add_argument(
        "--max-feature-nodes", type=int, default=5000, metavar="N", help="keep the N most influential"
    )
    attribute.add_argument("--window", type=int, metavar="N", help="feature nodes of the last N positions only")
    attribute.add_argument("--exclude-bos", action="store_true", help="leave out features at the first position")
    attribute.add_argument(
        "--node-threshold",
        type=float,
        default=0.8,
        help="share of the influence that the page's nodes hold (default: 0.8)",
    )
    attribute.add_argument(
        "--edge-threshold", type=float, default=0.98, help="share that its edges hold (default: 0.98)"
    )
    attribute.add_argument("--out", type=Path, help="folder of graphs (default: RUN/graphs)")
    attribute.add_argument("--name", help="name of the page (default: graph-1, graph-2, ...)")
    attribute.set_defaults(run=_attribute)


def _attribute(args: argparse.Namespace) -> None:
    from tl_adapters.attribution.attribute import attribute
    from tl_adapters.features.store import FeatureStore
    from tl_adapters.pages.graph_page import free_graph_name, require_new_graph, write_graph
    from tl_adapters.study.features import FEATURES_FOLDER, STORE_FOLDER
    from tl_adapters.study.open_run import open_run

    prompt = args.prompt if args.prompt_file is None else read_prompt(args.prompt_file)
    out = args.out or args.run_folder / "graphs"
    name = args.name or free_graph_name(out, "graph")
    require_new_graph(out, name)
    pair = open_run(args.run_folder, device_of(args.device), args.dtype)
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
    store_folder = args.run_folder / FEATURES_FOLDER / STORE_FOLDER
    store = FeatureStore.load(store_folder) if store_folder.is_dir() else None
    thresholds = dict(node_threshold=args.node_threshold, edge_threshold=args.edge_threshold)
    page, url = write_graph(pair, graph, out, name, **thresholds, store=store)
    check = f"conservation residual {graph.residual:.1e}" if graph.adds_up else "this linearization does not conserve"
    show(f"{len(graph.features):,} features, {len(graph.weights):,} edges, {check}")
    show(f"page: {page}\ngraph: {out / name}\ncircuit-tracer: {out / 'circuit-tracer'}, {url}")
    show(f"next: tl-adapters serve {out}")
