"""The server: pages of one folder, on this machine's own address, and nothing else."""

import http.client
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tl_adapters.cli.main import main
from tl_adapters.pages import server
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
    listed = body.partition(b"</style>")[2]
    assert status == 200 and b'href="a.html"' in listed and b"sub/&lt;b&gt;.html" in listed and b"hidden" not in listed
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


def test_a_link_to_a_hidden_file_is_not_followed(folder: Path, port: int) -> None:
    (folder / "shown.html").symlink_to(folder / ".hidden.html")
    (folder / "weights.html").symlink_to(folder / "graph.safetensors")
    (folder / "circle.html").symlink_to(folder / "circle.html")
    for name in ("shown", "weights", "circle"):
        status, body, _ = get(port, f"/{name}.html")
        assert status == 404 and b"hidden" not in body and b"secret" not in body
    listed = get(port, "/")[1].partition(b"</style>")[2]
    assert b"a.html" in listed and not any(name in listed for name in (b"shown", b"weights", b"circle", b"link.html"))
    (folder / "again.html").symlink_to(folder / "a.html")
    assert get(port, "/again.html")[1] == b"<p>a</p>", "a link to a page of the folder is one"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200), ("localhost", 200), ("LOCALHOST:80", 200), ("localhost:8000", 200), ("", 403),
        ("evil.example", 403), ("evil.example:80", 403), ("localhost.evil.example", 403), ("[::", 403),
        ("localhost@evil.example", 403),
    ],
)  # fmt: skip
def test_a_host_needs_no_port(port: int, host: str, status: int) -> None:
    """Browsers leave the port out where it is 80."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    connection.putrequest("GET", "/a.html", skip_host=True)
    connection.putheader("Host", host)
    connection.endheaders()
    assert connection.getresponse().status == status
    connection.close()


def test_a_proxy_is_read_by_the_name_that_was_given(folder: Path) -> None:
    """A notebook server's proxy passes its own name on; no other name is answered, and the refusal says what to do."""
    with make_server(folder, behind="Hub.example.org") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://{HOST}:{server.server_address[1]}/a.html"
        answers, refusals = {}, []
        for host in (
            "hub.example.org",
            "hub.example.org:443",
            "127.0.0.1",
            "evil.example",
            "hub.example.org.evil.example",
        ):
            request = urllib.request.Request(url, headers={"Host": host})
            try:
                answers[host] = urllib.request.urlopen(request, timeout=5).status
            except urllib.error.HTTPError as error:
                answers[host] = error.code
                refusals.append(error.read())
        server.shutdown()
    assert list(answers.values()) == [200, 200, 200, 403, 403]
    assert all(b"--behind NAME" in refusal for refusal in refusals)
    for wrong in ("https://hub.example.org", "hub.example.org:443", "hub/lab", ""):
        with pytest.raises(ServerError, match="is no host name; give it without https://"):
            make_server(folder, behind=wrong)


def test_headers_agree_with_the_pages(folder: Path, port: int) -> None:
    (folder / "plot.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    page, drawing = get(port, "/a.html")[2], get(port, "/plot.svg")[2]
    assert page["Content-Security-Policy"] == "frame-ancestors 'none'"
    assert {"default-src 'none'", "sandbox"} <= set(drawing["Content-Security-Policy"].split("; "))
    for headers in (page, drawing, get(port, "/")[2]):
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


def is_closed(connection: socket.socket) -> bool:
    """Whether the other end closes the connection without an answer."""
    try:
        return connection.recv(100) == b""
    except ConnectionResetError:
        return True


def test_requests_that_stay_half_open_are_bounded_and_closed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_REQUESTS", 2)
    monkeypatch.setattr(server._PageHandler, "timeout", 0.3)
    with make_server(folder) as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        port = int(made.server_address[1])
        before = threading.active_count()
        half_open = [socket.create_connection((HOST, port), timeout=5) for _ in range(8)]
        for connection in half_open:
            connection.sendall(b"GET /a.html HT")
        assert all(map(is_closed, half_open[2:])) and threading.active_count() <= before + 2
        assert all(map(is_closed, half_open[:2])), "closed after the time"
        for _ in range(50):
            try:
                assert get(port, "/a.html")[0] == 200
                break
            except (ConnectionError, http.client.HTTPException):
                time.sleep(0.02)
        else:
            raise AssertionError("the places are not given back")
        made.shutdown()
        thread.join()


def test_a_port_that_does_not_exist_is_named(folder: Path) -> None:
    with pytest.raises(ServerError, match="Port 99999 does not exist; choose one from 1 to 65535"):
        make_server(folder, 99999)
