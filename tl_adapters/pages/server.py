"""A folder of pages on this machine's own address: 127.0.0.1, nothing above the folder, nothing that is no page."""

from __future__ import annotations

import logging
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from tl_adapters.errors import UserError
from tl_adapters.utils.html import escape

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".gz": "application/gzip",
    ".bin": "application/octet-stream",
}
"""What is served; everything else in the folder is not there."""


class ServerError(UserError, OSError):
    """A folder or port that cannot be served."""


def make_server(folder: str | Path, port: int = 0) -> ThreadingHTTPServer:
    """A server of ``folder`` on 127.0.0.1; port 0 takes a free one. Raises ServerError."""
    root = Path(folder).resolve()
    if not root.is_dir():
        raise ServerError(f"{folder} is no folder; give one that demo or attribute made.")
    try:
        return ThreadingHTTPServer((HOST, port), partial(_Handler, root=root))
    except OSError as error:
        raise ServerError(f"Port {port} cannot be had ({error}); choose another with --port.") from error


class _Handler(SimpleHTTPRequestHandler):
    """GET and HEAD of pages under one folder."""

    def __init__(self, *args: Any, root: Path) -> None:
        self.root = root
        super().__init__(*args, directory=str(root))

    def send_head(self) -> Any:
        """The file, the list of pages for "/", or 404; never what lies outside, by ``..`` or by a link."""
        if (self.headers.get("Host") or "").rpartition(":")[0] not in (HOST, "localhost"):
            # a page elsewhere whose name was pointed at this machine asks with its own name
            self.send_error(HTTPStatus.FORBIDDEN)
            return None
        wanted = unquote(urlsplit(self.path).path).lstrip("/")
        if not wanted:
            return self._sent(self._list(), ".html")
        if "\0" in wanted:
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        path = (self.root / wanted).resolve()
        hidden = any(part.startswith(".") for part in Path(wanted).parts)
        if hidden or not path.is_relative_to(self.root) or not path.is_file() or path.suffix not in TYPES:
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        return self._sent(path.read_bytes(), path.suffix)

    def _sent(self, body: bytes, suffix: str) -> Any:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", TYPES[suffix])
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        return BytesIO(body)

    def _list(self) -> bytes:
        pages = sorted(
            path.relative_to(self.root).as_posix()
            for path in self.root.rglob("*.html")
            if not any(part.startswith(".") for part in path.relative_to(self.root).parts)
        )
        items = "".join(f'<li><a href="/{quote(page)}">{escape(page)}</a></li>' for page in pages)
        return f"<!doctype html><meta charset=utf-8><title>Pages</title><ul>{items}</ul>".encode()

    def log_message(self, format: str, *args: Any) -> None:
        """To our own log, not to standard error."""
        log.debug(format, *args)
