"""The subcommand serve: a folder's pages on this machine's own address."""

from __future__ import annotations

import argparse
from pathlib import Path

from tl_adapters.cli.common import Subcommands
from tl_adapters.utils.printing import show


def add_serve(subcommands: Subcommands, quiet: argparse.ArgumentParser) -> None:
    """Adds `serve`, which shows a folder's pages on 127.0.0.1."""
    serve = subcommands.add_parser("serve", parents=[quiet], help="show a folder's pages on 127.0.0.1")
    serve.add_argument("folder", type=Path, metavar="DIR", help="a run, or a folder of graphs")
    serve.add_argument("--port", type=int, default=8000, help="port (default: 8000)")
    serve.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> None:
    from tl_adapters.pages.server import HOST, make_server

    with make_server(args.folder, args.port) as server:
        show(f"http://{HOST}:{server.server_address[1]}/  (Ctrl-C stops the server)")
        server.serve_forever()
