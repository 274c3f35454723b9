"""The verbs that look at a run: features, label, attribute, hesitation, serve."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from tl_adapters.cli.common import Verbs, device_of, read_prompt
from tl_adapters.errors import UserError


def add_features(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """The verb features."""
    features = verbs.add_parser("features", parents=[common], help="what every feature fires on and promotes, as pages")
    features.add_argument("run_folder", type=Path, metavar="RUN", help="folder that train or demo made")
    features.add_argument("--data", help=".jsonl of traces, or a dataset (the built-in pair needs none)")
    features.add_argument("--stream", choices=("replacement", "target"), default="replacement", help="what they read")
    features.add_argument("--examples", type=int, metavar="N", help="strongest firings kept of each (default: 20)")
    features.add_argument("--sample", type=int, metavar="N", help="random firings kept of each (default: 20)")
    features.add_argument("--tokens-per-batch", type=int, metavar="N", help="in a forward pass (default: 4096)")
    features.add_argument("--share", metavar="I/N", help="this is process I of N (from 0); then once more without it")
    features.set_defaults(run=_features)


def _features(args: argparse.Namespace) -> None:
    from tl_adapters.features.store_files import StoreOptions
    from tl_adapters.pages.report import write_report
    from tl_adapters.study.features import FOLDER, STORE, describe_run

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
        print(f"parts: {run / FOLDER / STORE}\nnext: the same without --share, when every process is done")
        return
    print(f"pages: {page}\nstore: {run / FOLDER / STORE}\nreport: {write_report(run)}")
    print(f"next: tl-adapters label {run}")


def _share(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise UserError(f"--share is {text!r}; allowed is I/N, such as 0/4, the first of four processes.")
    return int(match[1]), int(match[2])


def add_label(verbs: Verbs, quiet: argparse.ArgumentParser) -> None:
    """The verb label."""
    label = verbs.add_parser("label", parents=[quiet], help="what to call a run's features: by rules, and by a judge")
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


def add_attribute(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """The verb attribute."""
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


def _attribute(args: argparse.Namespace) -> None:
    from tl_adapters.attribution.attribute import attribute
    from tl_adapters.features.store import FeatureStore
    from tl_adapters.pages.graph_page import write_graph
    from tl_adapters.study.features import FOLDER, STORE
    from tl_adapters.study.open_run import open_run

    prompt = args.prompt if args.prompt_file is None else read_prompt(args.prompt_file)
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
    out = args.out or args.run_folder / "graphs"
    name = args.name or next(f"graph-{i}" for i in range(1, 10**6) if not (out / f"graph-{i}").exists())
    store = FeatureStore.load(where) if (where := args.run_folder / FOLDER / STORE).is_dir() else None
    thresholds = dict(node_threshold=args.node_threshold, edge_threshold=args.edge_threshold)
    page, url = write_graph(pair, graph, out, name, **thresholds, store=store)
    checked = f"conservation residual {graph.residual:.1e}" if graph.adds_up else "a gradient does not add up"
    print(f"{len(graph.features):,} features, {len(graph.weights):,} edges, {checked}")
    print(f"page: {page}\ngraph: {out / name}\ncircuit-tracer: {out / 'circuit-tracer'}, {url}")
    print(f"next: tl-adapters serve {out}")


def add_hesitation(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """The verb hesitation."""
    hesitation = verbs.add_parser("hesitation", parents=[common], help="the features that say a word, and their trial")
    hesitation.add_argument("run_folder", type=Path, metavar="RUN", help="folder that train or demo made")
    hesitation.add_argument(
        "--task", metavar="NAME[=FILE]", help="problems (the built-in pair has its own): gsm8k, ..."
    )
    hesitation.add_argument(
        "--words",
        nargs="+",
        default=["Wait"],
        metavar="WORD",
        help='what is said, such as Wait "Hold on" (default: Wait)',
    )
    hesitation.add_argument(
        "--share", type=float, metavar="X", help="size, as a share of alive features (default: 0.03)"
    )
    hesitation.add_argument("--limit", type=int, metavar="N", help="problems, half to choose on and half to report on")
    hesitation.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="longest answer (default: the task's, or generation_config.json's, or 32,768)",
    )
    hesitation.set_defaults(run=_hesitation)


def _hesitation(args: argparse.Namespace) -> None:
    from tl_adapters.circuits.criteria import REACHED
    from tl_adapters.pages.report import write_report
    from tl_adapters.study.hesitation import hesitation_of_run

    name, _, source = (args.task or "").partition("=")
    study = hesitation_of_run(
        args.run_folder,
        (name, source or None) if name else None,
        words=args.words,
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
        print(f"no circuit: the target's answers hold {study.block['moments']['select']['moments']} moments")
    else:
        roles = ", ".join(f"{size[role]} {role}" for role in ("output", "template", "continuation"))
        print(f"{size['n']} features ({100 * size['share_of_alive']:.1f} % of the alive): {roles}")
        for asked in study.block["criteria"]:
            value = "-" if asked["value"] is None else f"{asked['value']:.3g}"
            print(f"{REACHED[asked['reached']]:9}  {asked['name']}: {value}, {asked['bar']}")
    run = args.run_folder
    print(f"page: {run / study.block['page']}\ncircuit: {run / 'circuit.json'}\nreport: {write_report(run)}")
    print(f"next: tl-adapters serve {run}")


def add_serve(verbs: Verbs, quiet: argparse.ArgumentParser) -> None:
    """The verb serve."""
    serve = verbs.add_parser("serve", parents=[quiet], help="look at a folder's pages, on this machine only")
    serve.add_argument("folder", type=Path, metavar="DIR", help="a run, or a folder of graphs")
    serve.add_argument("--port", type=int, default=8000, help="on 127.0.0.1 (default: 8000)")
    serve.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> None:
    from tl_adapters.pages.server import HOST, make_server

    with make_server(args.folder, args.port) as server:
        print(f"http://{HOST}:{server.server_address[1]}/  (Ctrl-C ends it)", flush=True)
        server.serve_forever()
