"""A server on this machine that answers each request as a script says, and misbehaves in every way that TCP allows.

    with LoopbackServer(lambda request: Response(b"hello", status=503)) as server:
        httpx.get(server.url + "/any/path")
    assert server.requests[0].path == "/any/path"

`serve_files` answers GET, HEAD and PUT from a dictionary of files; `in_turn` gives each request the next answer;
`refusing_url` is an address where nothing listens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Request:
    """What a client sent."""

    method: str
    path: str  # with its query
    headers: dict[str, str]  # names in lower case
    body: bytes
    time: float  # of time.monotonic()

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Response:
    """What a client is sent, and how.

    A text or bytes go out with their content-length; an iterable of bytes (an endless one, too) goes out piece by piece
    until the client hangs up or the server is closed, and the connection is then closed.
    """

    body: str | bytes | Iterable[bytes] = b""
    status: int = 200
    headers: Mapping[str, str] | Iterable[tuple[str, str]] = field(default_factory=dict)
    reason: str | None = None  # the text behind the status
    delay: float = 0.0  # seconds before the first byte
    piece: int = 1 << 16  # bytes that are sent at once...
    pause: float = 0.0  # ...and seconds between them: a slow drip
    cut_after: int | None = None  # hang up after so many bytes of the body, whatever content-length says
    reset: bool = False  # end with a reset connection; with nothing else set, at once
    raw: bytes | Iterable[bytes] | None = None  # these bytes instead of status line, headers and body


Answer = Callable[[Request], Response]


class LoopbackServer:
    """Answers each request with what ``answer`` returns for it; an exception in ``answer`` gives status 500.

    Requests of several clients are answered at once, each in a thread. The connection is closed after each answer.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self.now = self.most_at_once = 0
        self.closing = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> LoopbackServer:
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def asked(self, request: Request) -> Response:
        """The answer to a request, which is recorded."""
        with self._lock:
            self.requests.append(request)
            self.now += 1
            self.most_at_once = max(self.most_at_once, self.now)
        try:
            response = self.answer(request)
            self.closing.wait(response.delay)
            return response
        except Exception as error:
            return Response(f"{type(error).__name__}: {error}", status=500)
        finally:  # before the reply: whoever gets it may ask again at once
            with self._lock:
                self.now -= 1


def in_turn(*responses: Response) -> Answer:
    """The first request gets the first response, and so on; the last one is repeated."""
    left, lock = list(responses), threading.Lock()

    def answer(request: Request) -> Response:
        with lock:
            return left.pop(0) if len(left) > 1 else left[0]

    return answer


def serve_files(files: MutableMapping[str, bytes]) -> Answer:
    """GET and HEAD (with ranges and ETag) from a dictionary of paths that begin with "/", and PUT into it."""

    def answer(request: Request) -> Response:
        path = request.path.partition("?")[0]
        if request.method == "PUT":
            files[path] = request.body
            return Response(status=201)
        if path not in files:
            return Response(f"no {path} here", status=404)
        whole = files[path]
        headers = {"ETag": f'"{hashlib.sha256(whole).hexdigest()}"', "Accept-Ranges": "bytes"}
        if (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))) is None:
            return Response(whole, headers=headers)
        first, last = int(asked[1]), min(int(asked[2] or len(whole) - 1), len(whole) - 1)
        if first > last:
            return Response(status=416, headers={"Content-Range": f"bytes */{len(whole)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(whole)}"
        return Response(whole[first : last + 1], status=206, headers=headers)

    return answer


@contextlib.contextmanager
def refusing_url() -> Iterator[str]:
    """An address of this machine whose port refuses connections for as long as the block runs."""
    with socket.socket() as bound:  # bound and not listening, so that nobody else gets the port
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, owner: LoopbackServer) -> None:
        self.owner = owner
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that hung up
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _any(self) -> None:
        self.close_connection = True
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, self._body(headers), time.monotonic())
        response = self.server.owner.asked(request)
        with contextlib.suppress(OSError):
            self._send(response)
        if response.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # at once: an orderly end would come before the reset

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _any

    def _body(self, headers: Mapping[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(headers.get("content-length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, response: Response) -> None:
        if response.raw is not None:
            return self._drip(response, response.raw)
        if response.reset and not response.body:
            return
        body = response.body.encode() if isinstance(response.body, str) else response.body
        headers = response.headers.items() if isinstance(response.headers, Mapping) else response.headers
        headers = [("Connection", "close"), *headers]
        if isinstance(body, bytes) and "content-length" not in {name.lower() for name, _ in headers}:
            headers.append(("Content-Length", str(len(body))))
        self.send_response_only(response.status, response.reason)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._drip(response, body)

    def _drip(self, response: Response, body: bytes | Iterable[bytes]) -> None:
        if isinstance(body, bytes):
            sent = body[: response.cut_after]
            body = [sent[i : i + response.piece] for i in range(0, len(sent), response.piece)]
        for piece in body:
            self.wfile.write(piece)
            if self.server.owner.closing.wait(response.pause):
                return

    def log_message(self, *args: Any) -> None:
        pass
