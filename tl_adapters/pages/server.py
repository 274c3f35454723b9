"""A local HTTP server for a folder of pages: it answers on 127.0.0.1 only and serves only page files of the folder."""

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
_CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".gz": "application/gzip",
    ".bin": "application/octet-stream",
}
"""Content types by suffix; files with other suffixes are not served."""


class ServerError(UserError, OSError):
    """The folder or the port cannot be served."""


def make_server(folder: str | Path, port: int = 0) -> ThreadingHTTPServer:
    """Return a server of ``folder`` on 127.0.0.1; port 0 takes a free port.

    Raises ServerError if the folder does not exist or the port is not available.
    """
    root = Path(folder).resolve()
    if not root.is_dir():
        raise ServerError(f"{folder} is not a folder; give one that demo or attribute made.")
    try:
        return ThreadingHTTPServer((HOST, port), partial(_PageHandler, root=root))
    except OSError as error:
        raise ServerError(f"Port {port} is not available ({error}); choose another with --port.") from error


class _PageHandler(SimpleHTTPRequestHandler):
    """Answers GET and HEAD requests for pages under one folder."""

    def __init__(self, *args: Any, root: Path) -> None:
        self.root = root
        super().__init__(*args, directory=str(root))

    def send_head(self) -> Any:
        """Send the file, the list of pages for "/", or an error; never a file outside the folder (``..`` or a link)."""
        if (self.headers.get("Host") or "").rpartition(":")[0] not in (HOST, "localhost"):
            # DNS rebinding: a page from another site, whose name now resolves to this machine, sends that name.
            self.send_error(HTTPStatus.FORBIDDEN)
            return None
        name = unquote(urlsplit(self.path).path).lstrip("/")
        if not name:
            return self._send(self._page_list(), ".html")
        if "\0" in name:
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        path = (self.root / name).resolve()
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if hidden or not path.is_relative_to(self.root) or not path.is_file() or path.suffix not in _CONTENT_TYPES:
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        return self._send(path.read_bytes(), path.suffix)

    def _send(self, body: bytes, suffix: str) -> BytesIO:
        """Send the headers and return the body for the caller to copy."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", _CONTENT_TYPES[suffix])
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        return BytesIO(body)

    def _page_list(self) -> bytes:
        pages = sorted(
            path.relative_to(self.root).as_posix()
            for path in self.root.rglob("*.html")
            if not any(part.startswith(".") for part in path.relative_to(self.root).parts)
        )
        items = "".join(f'<li><a href="/{quote(page)}">{escape(page)}</a></li>' for page in pages)
        return f"<!doctype html><meta charset=utf-8><title>Pages</title><ul>{items}</ul>".encode()

    def log_message(self, format: str, *args: Any) -> None:
        """Log requests to this module's logger instead of standard error."""
        log.debug(format, *args)
