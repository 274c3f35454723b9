"""The server: pages of one folder, on this machine's own address, and nothing else."""

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tl_adapters.cli.main import main
from tl_adapters.pages.server import HOST, ServerError, make_server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "a.html").write_text("<p>a</p>")
    (root / "sub" / "<b>.html").write_text("b")
    (root / "graph.safetensors").write_bytes(b"secret weights")
    (root / ".hidden.html").write_text("hidden")
    (tmp_path / "outside.html").write_text("outside")
    (root / "link.html").symlink_to(tmp_path / "outside.html")
    return root


@pytest.fixture
def port(folder: Path) -> Iterator[int]:
    with make_server(folder) as server:
        assert server.server_address[0] == "127.0.0.1"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield int(server.server_address[1])
        server.shutdown()
        thread.join()


def get(port: int, path: str, host: str = HOST, method: str = "GET") -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", f"{host}:{port}")
    connection.endheaders()
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body, dict(response.getheaders())


def test_pages_are_served_and_listed(port: int) -> None:
    status, body, headers = get(port, "/a.html")
    assert (status, body) == (200, b"<p>a</p>") and headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    status, body, _ = get(port, "/")
    assert status == 200 and b'href="a.html"' in body and b"sub/&lt;b&gt;.html" in body and b"hidden" not in body
    assert get(port, "/sub/%3Cb%3E.html?x=1#y")[1] == b"b"
    assert get(port, "/a.html", method="HEAD")[:2] == (200, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/../outside.html", "/%2e%2e/outside.html", "/sub/../../outside.html", "//etc/passwd", "/..%2foutside.html",
        "/link.html", "/graph.safetensors", "/.hidden.html", "/sub", "/sub/", "/none.html", "/%00a.html",
    ],
)  # fmt: skip
def test_nothing_else_is_there(port: int, path: str) -> None:
    status, body, _ = get(port, path)
    assert status in (400, 404) and b"outside" not in body and b"secret" not in body and b"root:" not in body


def test_only_this_machines_names_are_answered(port: int) -> None:
    assert get(port, "/a.html", host="localhost")[0] == 200
    assert get(port, "/a.html", host="evil.example")[0] == 403
    assert get(port, "/a.html", method="POST")[0] == 501


def test_what_cannot_be_served_is_said(folder: Path, port: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ServerError, match="is not a folder"):
        make_server(folder / "none")
    with pytest.raises(ServerError, match=f"Port {port} is not available"):
        make_server(folder, port)
    assert main(["serve", str(folder / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
