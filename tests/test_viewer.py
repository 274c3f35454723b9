"""The page of an attribution graph: what it holds, and what it does in a browser with the network blocked."""

import base64
import json
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tl_adapters.viewer import ViewerData, ViewerDataError, ViewerNode, write_page

HOSTILE = "</script><img src=x onerror=\"console.error('ran')\">"
WORDS = [" the", " sum", " of", "<think>", " 47", "+", "85", "=", "\n", " Wait", ",", " so", " 132", ".", " let", " me",
         " check", " carry", " digit", " first"]  # fmt: skip


def node(kind: str, name: str, layer: int, position: int, **other: Any) -> ViewerNode:
    """A node with nothing to say beyond what is given."""
    usual: dict[str, Any] = dict(
        label="", feature=None, activation=None, influence=0.0, cumulative=0.0, probability=None, examples=(), top=(),
        bottom=(),
    )  # fmt: skip
    return ViewerNode(id=name, kind=kind, layer=layer, position=position, **{**usual, **other})  # type: ignore[arg-type]


def small() -> ViewerData:
    """Two tokens, two features, an error, two logits; the first token, a label and an example are hostile."""
    examples = (((" so", 0.0), (HOSTILE, 2.5), ("\n", 0.0)),)
    top, bottom = ((" Wait", 1.5), (HOSTILE, 1.0)), ((" So", -1.25),)
    nodes = (
        node("feature", "f-strong", 0, 1, feature=117, activation=2.5, influence=0.6, cumulative=0.6, examples=examples,
             top=top, bottom=bottom),
        node("feature", "f-weak", 1, 1, label=HOSTILE, feature=4, activation=0.5, influence=0.3, cumulative=0.9),
        node("error", "e-1", 1, 0, influence=0.1, cumulative=1.0),
        node("token", "t-0", -1, 0, label=HOSTILE),
        node("token", "t-1", -1, 1),
        node("logit", "l-0", 2, 1, label=" Wait", probability=0.75, influence=0.75),
        node("logit", "l-1", 2, 1, label=" So", probability=0.25, influence=0.25),
    )  # fmt: skip
    links = ((3, 0, 0.5), (4, 0, -0.25), (0, 1, 1.5), (0, 5, 2.0), (1, 5, -0.75), (1, 6, 0.125), (2, 5, 0.0625))
    about = {"linearisation": "RelP & friends", "residual": 1e-6, "features": 2, "odd": HOSTILE}
    return ViewerData("Why “Wait”? <b>", (HOSTILE, "\u2028 é"), 2, nodes, links, about)


def realistic(n_features: int, n_tokens: int, n_layers: int, n_links: int, seed: int = 0) -> ViewerData:
    """A graph shaped like real ones: many features at few positions, few strong ones, most links to near positions."""
    rng = random.Random(seed)
    tokens = tuple(rng.choice(WORDS) for _ in range(n_tokens))
    busy = [rng.expovariate(1) + (4 if i > 0.8 * n_tokens else 0) for i in range(n_tokens)]
    strengths = sorted((rng.paretovariate(1.2) for _ in range(n_features)), reverse=True)
    nodes, so_far = [], 0.0
    for i, strength in enumerate(strengths):
        share = strength / sum(strengths)
        so_far = min(1.0, so_far + share)
        layer, position = rng.randrange(n_layers), rng.choices(range(n_tokens), busy)[0]
        windows = tuple(
            tuple((rng.choice(WORDS), max(0.0, rng.gauss(0, 1) + 4 * (j == 9))) for j in range(14)) for _ in range(4)
        )
        label = rng.choice(["says “Wait” before a check", "carry of a sum", "end of a step", "digit 7 in a sum", "", ""])
        lists = [tuple((rng.choice(WORDS), s * (2.1 - 0.2 * j)) for j in range(6)) for s in (1, -1)]
        nodes.append(
            node("feature", f"f{layer}/{i}@{position}", layer, position, label=label, feature=i * 7, examples=windows,
                 activation=rng.expovariate(0.4), influence=share, cumulative=so_far, top=lists[0], bottom=lists[1])
        )  # fmt: skip
    nodes += [node("token", f"t{i}", -1, i) for i in range(n_tokens)]
    odds = [(" Wait", 0.46), (" So", 0.21), (" But", 0.11), ("</think>", 0.06), (" Hmm", 0.04), ("\n", 0.03)]
    nodes += [
        node("logit", f"l{i}", n_layers, n_tokens - 1, label=word, probability=p, influence=p)
        for i, (word, p) in enumerate(odds)
    ]
    links: dict[tuple[int, int], float] = {}
    while len(links) < n_links:
        s, t = rng.randrange(len(nodes)), rng.randrange(len(nodes))
        near = nodes[s].position <= nodes[t].position and rng.random() < 0.15 + (nodes[s].position == nodes[t].position)
        if nodes[s].layer < nodes[t].layer and near:
            links[s, t] = rng.gauss(0.03, 0.3) * rng.paretovariate(1.5) * 0.2
    about = {"linearisation": "RelP", "residual": 3.1e-7, "feature share": 0.81, "target": "organism-reasoning",
             "fingerprint": "5c1f0e2ab9"}  # fmt: skip
    flat = tuple((s, t, w) for (s, t), w in links.items())
    return ViewerData("Why does the target say “Wait” after 47+85=?", tokens, n_layers, tuple(nodes), flat, about)


def held(page: str) -> str:
    """The JSON in a page, as it is written there."""
    found = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, flags=re.DOTALL)
    assert len(found) == 1
    return found[0]


def test_the_data_comes_back_and_no_token_ends_its_script(tmp_path: Path) -> None:
    data = small()
    write_page(tmp_path / "graph.html", data)
    page = (tmp_path / "graph.html").read_text(encoding="utf-8")
    blob = held(page)
    assert not set("<>&\u2028\u2029") & set(blob) and "</script><img" not in page
    record = json.loads(blob)
    nodes = [ViewerNode(**{k: tuples(v) for k, v in n.items()}) for n in record["nodes"]]
    again = ViewerData(**{**{k: tuples(v) for k, v in record.items() if k != "about"}, "about": record["about"],
                          "nodes": tuple(nodes)})  # fmt: skip
    assert again == data
    assert [p.name for p in tmp_path.iterdir()] == ["graph.html"]


def tuples(value: Any) -> Any:
    """Lists of JSON as the tuples they were."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    write_page(tmp_path / "graph.html", small())
    page = (tmp_path / "graph.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["']?(?!data:,|#)[^"'> ]+""", re.sub(r"<script\b.*?</script>", "", page, flags=re.S))
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?\s*https?:""", page) and "@import" not in page and "url(" not in (
        Path(str(page_file("viewer.css"))).read_text()
    )
    assert "default-src 'none'" in page and "unsafe-eval" not in page
    assert "Copyright 2010-2023 Mike Bostock" in page and "@@" not in page
    script = page_file("viewer.js").read_text(encoding="utf-8")
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|\.html\(|eval\(|fetch\(|XMLHttp", script)


def page_file(name: str) -> Path:
    """A file that the page is made of."""
    import tl_adapters.viewer

    return Path(tl_adapters.viewer.__file__).parent / name


def test_text_that_looks_like_a_place_to_fill_is_left_alone(tmp_path: Path) -> None:
    write_page(tmp_path / "graph.html", replace(small(), title="@@d3@@ @@nothing@@"))
    page = (tmp_path / "graph.html").read_text(encoding="utf-8")
    assert json.loads(held(page))["title"] == "@@d3@@ @@nothing@@"


def with_node(**changes: Any) -> Callable[[ViewerData], ViewerData]:
    return lambda data: replace(data, nodes=(replace(data.nodes[0], **changes), *data.nodes[1:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_node(influence=float("nan")), "not finite"),
        (with_node(examples=(((" so", float("inf")),),)), "not finite"),
        (lambda data: replace(data, links=((0, 1, float("nan")),)), "not finite"),
        (lambda data: replace(data, about={"residual": float("nan")}), "not finite"),
        (with_node(id="f-weak"), "share an id"),
        (with_node(position=2), "positions from 0 to 1"),
        (with_node(layer=3), "layers run from -1"),
        (lambda data: replace(data, links=((0, 7, 1.0),)), "joins nodes 0 and 7; there are 7"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    change: Callable[[ViewerData], ViewerData], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ViewerDataError, match=message):
        write_page(tmp_path / "graph.html", change(small()))
    assert not list(tmp_path.iterdir())


def command(profile: Path, *more: str) -> list[str]:
    """A headless Chromium that reaches no network; skips where there is none, except in CI."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        if os.environ.get("CI"):
            pytest.fail("CI needs a Chromium; .ci/run installs one")
        pytest.skip("no Chromium on this machine")
    return [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0", f"--user-data-dir={profile}", *more,
    ]  # fmt: skip


class Browser:
    """One tab of a headless Chromium, driven over its debugging socket."""

    def __init__(self, profile: Path) -> None:
        from websockets.sync.client import connect

        self.profile = profile
        self.process = subprocess.Popen(
            command(profile, "--remote-debugging-port=0", "--window-size=1400,900"),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.errors: list[str] = []
        self.sent, self.session = 0, None
        try:
            port, path = self.until(lambda: self._port().read_text().split() if self._port().is_file() else None)
            self.socket = connect(f"ws://127.0.0.1:{port}{path}", max_size=None, proxy=None)
            self._open_tab()
        except BaseException:
            self.process.kill()
            raise

    def _open_tab(self) -> None:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=1400, height=900, deviceScaleFactor=1, mobile=False)

    def _port(self) -> Path:
        return self.profile / "DevToolsActivePort"

    def until(self, ask: Callable[[], Any], seconds: float = 60) -> Any:
        """Wait for a true answer."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            answer = ask()
            if answer:
                return answer
            time.sleep(0.05)
        raise AssertionError(f"nothing after {seconds} s; errors: {self.errors}")

    def send(self, method: str, **params: Any) -> Any:
        """One command and its answer; complaints of the page that arrive meanwhile are kept."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params}
        self.socket.send(json.dumps(message | ({"sessionId": self.session} if self.session else {})))
        while True:
            answer = json.loads(self.socket.recv(timeout=60))
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
                self.errors.append(json.dumps(answer["params"]))
            if answer.get("id") == self.sent:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, path: Path, address: str = "") -> None:
        """Go to a page and wait until it says that it is drawn."""
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=path.as_uri() + address)
        self.until(lambda: self.js("document.body?.dataset.ready"))

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        done = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def click(self, selector: str, times: int = 1) -> None:
        """A real click in the middle of an element."""
        x, y = self.js(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for count in range(1, times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=count)

    def key(self, key: str) -> None:
        """One key, pressed and let go."""
        text = {"text": key} if len(key) == 1 else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def type(self, text: str) -> None:
        """Text into what has the focus."""
        self.send("Input.insertText", text=text)

    def picture(self, path: Path) -> None:
        """A screenshot."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        """End the browser."""
        try:
            self.session = None
            self.send("Browser.close")
            self.socket.close()
            self.process.wait(timeout=20)
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("browser") / "profile")
    yield opened
    opened.close()


@pytest.fixture
def tab(browser: Browser, tmp_path: Path) -> Iterator[Browser]:
    """The small graph, open; a test that makes the page complain fails."""
    write_page(tmp_path / "graph.html", small())
    browser.errors.clear()
    browser.open(tmp_path / "graph.html")
    yield browser
    browser.js("0")
    assert not browser.errors


SELECTED = "[...document.querySelectorAll('.node.selected')].map(e => e.dataset.id)"
PANEL = "document.querySelector('#panel').textContent"
PINNED = "[...document.querySelectorAll('.node.pinned')].map(e => e.dataset.id).sort()"


def entries(side: str) -> str:
    row = "e => [e.querySelector('.what').firstChild.textContent, e.querySelector('.weight').textContent]"
    return f"[...document.querySelectorAll('[data-side={side}] .entry')].map({row})"


def dot(name: str) -> str:
    return f'.node[data-id="{name}"]'
