"""A chat server on this machine that answers as a test specifies, and records the requests."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-a-key-that-must-never-be-seen-anywhere"


@dataclass(frozen=True)
class Says:
    """The server's response to one request."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    body: str | None = None  # instead of a chat completion
    usage: dict[str, int] | None = field(default_factory=lambda: {"total_tokens": 10})


class FakeChat:
    """Replies to each request with what ``answer`` returns for its messages; a text is an ordinary reply."""

    def __init__(self, answer: Callable[[list[dict[str, str]]], str | Says]) -> None:
        self.answer, self.asked, self.headers = answer, [], []
        self.now, self.most_at_once, self.times = 0, 0, []
        self._lock = threading.Lock()

    def __enter__(self) -> FakeChat:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with fake._lock:
                    fake.now += 1
                    fake.most_at_once = max(fake.most_at_once, fake.now)
                    fake.asked.append({"path": self.path, **body})
                    fake.headers.append({k.lower(): v for k, v in self.headers.items()})
                    fake.times.append(time.monotonic())
                says: str | Says = ""
                try:
                    says = fake.answer(body["messages"])
                    time.sleep(0.0 if isinstance(says, str) else says.delay)
                finally:  # before the reply: whoever gets it may ask again at once
                    with fake._lock:
                        fake.now -= 1
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    fake.reply(self, Says(says) if isinstance(says, str) else says)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    @staticmethod
    def reply(handler: BaseHTTPRequestHandler, says: Says) -> None:
        completion = {"choices": [{"message": {"role": "assistant", "content": says.text}}], "usage": says.usage}
        data = (json.dumps(completion) if says.body is None else says.body).encode()
        handler.send_response(says.status)
        for name, value in {"content-length": str(len(data)), **says.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    @property
    def questions(self) -> list[str]:
        """The last message of each request."""
        return [asked["messages"][-1]["content"] for asked in self.asked]
