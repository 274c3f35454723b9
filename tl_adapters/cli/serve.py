"""The subcommand serve: a folder's pages on this machine's own address."""

from __future__ import annotations

from http.server import HTTPServer
from pathlib import Path
from typing import Annotated

import typer

from tl_adapters.cli.common import AsJson, Quiet
from tl_adapters.cli.parsing import whole
from tl_adapters.cli.result import Result


def serve(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a run, or a folder of graphs")],
    port: Annotated[int, whole("--port", "port; 0 takes a free one", 0, 65_535, "PORT")] = 8000,
    behind: Annotated[
        str | None,
        typer.Option("--behind", metavar="NAME", help="host name of a notebook server whose proxy shows the pages"),
    ] = None,
    quiet: Quiet = False,
    json: AsJson = False,
) -> Result:
    """Show a folder's pages on 127.0.0.1, until Ctrl-C.

    Examples:
        tl-adapters serve runs/demo
        tl-adapters serve runs/demo --port 8080
        tl-adapters serve runs/demo --behind hub.example.org
    """
    from tl_adapters.pages.server import HOST, make_server

    server = make_server(folder, port, behind)
    url = f"http://{HOST}:{server.server_address[1]}/"
    return Result(
        values={"url": url}, text=f"{url}  (Ctrl-C stops the server)", then=lambda: _serve_until_stopped(server)
    )


def _serve_until_stopped(server: HTTPServer) -> None:
    with server:
        server.serve_forever()
