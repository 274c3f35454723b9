"""A local HTTP server for a folder of pages: it answers on 127.0.0.1 only and serves only page files of the folder."""

from __future__ import annotations

import logging
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from tl_adapters.errors import UserError
from tl_adapters.utils.html import render

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


_POLICY = "frame-ancestors 'none'"
"""Policy of every answer, beside that which each page states itself: a header alone can forbid frames around a page."""
_POLICIES = {".svg": f"default-src 'none'; style-src 'unsafe-inline'; sandbox; {_POLICY}"}
"""Policies by suffix; an SVG, which states none itself, runs no script."""
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
MAX_REQUESTS = 32
"""Requests answered at a time."""
REQUEST_SECONDS = 10.0
"""Seconds that the server waits for the next bytes of a request or of its receiver."""


class ServerError(UserError, OSError):
    """The folder or the port cannot be served."""


def make_server(folder: str | Path, port: int = 0, behind: str | None = None) -> ThreadingHTTPServer:
    """Return a server of ``folder`` on 127.0.0.1.

    Args:
        folder: the folder whose pages are served.
        port: the port; 0 takes a free one.
        behind: host name of a proxy on this machine that passes its own name on, such as that of a notebook server.

    Raises ServerError if the folder does not exist, the port is not available, or ``behind`` is no host name.
    """
    if behind is not None and _name_of(behind) != behind.lower():
        raise ServerError(f"{behind!r} is no host name; give it without https://, port and path, as hub.example.org.")
    root = Path(folder).resolve()
    if not root.is_dir():
        raise ServerError(f"{folder} is not a folder; give one that demo or attribute made.")
    try:
        return _PageServer((HOST, port), partial(_PageHandler, root=root, behind=behind))
    except OverflowError as error:
        raise ServerError(f"Port {port} does not exist; choose one from 1 to 65535 with --port.") from error
    except OSError as error:
        raise ServerError(f"Port {port} is not available ({error}); choose another with --port.") from error


class _PageServer(ThreadingHTTPServer):
    """A server that answers a bounded number of requests at a time, and refuses more."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._free_threads = BoundedSemaphore(MAX_REQUESTS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, or close the connection where as many as allowed are open."""
        if not self._free_threads.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free_threads.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a request, and give its place back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free_threads.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log that a connection failed, such as one that the browser closed, instead of printing a traceback."""
        log.debug("The connection of %s failed.", client_address, exc_info=True)


class _PageHandler(SimpleHTTPRequestHandler):
    """Answers GET and HEAD requests for pages under one folder."""

    timeout = REQUEST_SECONDS  # of the socket: a request that stays half-open is closed

    def __init__(self, *args: Any, root: Path, behind: str | None = None) -> None:
        self.root = root
        self.names = {HOST, "localhost"} | ({behind.lower()} if behind else set())
        super().__init__(*args, directory=str(root))

    def send_head(self) -> Any:
        """Send the file, the list of pages for "/", or an error; never a file outside the folder (``..`` or a link)."""
        if _name_of(self.headers.get("Host") or "") not in self.names:
            # DNS rebinding: a page from another site, whose name now resolves to this machine, sends that name.
            explain = "This server is read as 127.0.0.1. Behind a proxy, start it with: tl-adapters serve --behind NAME"
            self.send_error(HTTPStatus.FORBIDDEN, explain=explain)
            return None
        name = unquote(urlsplit(self.path).path).lstrip("/")
        if not name:
            return self._send(self._page_list(), ".html")
        path = self._served_file(name)
        if path is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        return self._send(path.read_bytes(), path.suffix)

    def _served_file(self, name: str) -> Path | None:
        """Return the file of a name below the folder; None if it is not served, which holds for where links lead."""
        try:
            path = (self.root / name).resolve()
            allowed = path.is_relative_to(self.root) and path.is_file() and path.suffix in _CONTENT_TYPES
        except (OSError, RuntimeError, ValueError):  # a name too long, links in a circle, a null character
            return None
        if not allowed:
            return None
        parts = (*Path(name).parts, *path.relative_to(self.root).parts)
        return None if any(part.startswith(".") for part in parts) else path

    def _send(self, body: bytes, suffix: str) -> BytesIO:
        """Send the headers and return the body for the caller to copy."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", _CONTENT_TYPES[suffix])
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", _POLICIES.get(suffix, _POLICY))
        for header, value in _HEADERS.items():
            self.send_header(header, value)
        self.end_headers()
        return BytesIO(body)

    def _page_list(self) -> bytes:
        names = sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*.html"))
        pages = [(quote(name), name) for name in names if self._served_file(name) is not None]
        return render("server/pages.html.j2", pages=pages).encode()

    def log_message(self, format: str, *args: Any) -> None:
        """Log requests to this module's logger instead of standard error."""
        log.debug(format, *args)


def _name_of(host: str) -> str | None:
    """Return the name in a Host header, without its port, which browsers leave out for port 80."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
