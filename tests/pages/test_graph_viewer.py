"""The page of an attribution graph: what it holds, and what it does in a browser with the network blocked."""

import json
import random
import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from helpers.browser import PANEL, SELECTED, Browser, browser, command  # noqa: F401  # a fixture

from tl_adapters.pages import graph_viewer as viewer
from tl_adapters.pages.graph_viewer import ViewerData, ViewerDataError, ViewerNode, write_viewer

HOSTILE = "</script><img src=x onerror=\"console.error('ran')\">"
WORDS = [" the", " sum", " of", "<think>", " 47", "+", "85", "=", "\n", " Wait", ",", " so", " 132", ".", " let", " me",
         " check", " carry", " digit", " first"]  # fmt: skip


def node(kind: str, name: str, layer: int, position: int, **other: Any) -> ViewerNode:
    """A node with nothing to say beyond what is given."""
    usual: dict[str, Any] = dict(
        label="", feature=None, activation=None, influence=0.0, cumulative=0.0, probability=None, examples=(), top=(),
        bottom=(),
    )  # fmt: skip
    return ViewerNode(id=name, kind=kind, layer=layer, position=position, **{**usual, **other})


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
        label = rng.choice(
            ["says “Wait” before a check", "carry of a sum", "end of a step", "digit 7 in a sum", "", ""]
        )
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
    write_viewer(tmp_path / "graph.html", data)
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
    write_viewer(tmp_path / "graph.html", small())
    page = (tmp_path / "graph.html").read_text(encoding="utf-8")
    markup = re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href)=["']?(?!data:,|#)[^"'> ]+""", markup)
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?\s*https?:""", page)
    assert "@import" not in page and "url(" not in page_file("viewer.css").read_text(encoding="utf-8")
    assert "default-src &#39;none&#39;" in page and "unsafe" not in page.partition("<style>")[0]
    assert "Copyright 2010-2023 Mike Bostock" in page and "{{" not in markup
    script = page_file("viewer.js").read_text(encoding="utf-8")
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|\.html\(|eval\(|fetch\(|XMLHttp", script)


def page_file(name: str) -> Path:
    """A file that the page is made of."""
    return Path(viewer.__file__).parent / "templates" / "graph_viewer" / name


def test_text_that_looks_like_a_place_to_fill_is_left_alone(tmp_path: Path) -> None:
    write_viewer(tmp_path / "graph.html", replace(small(), title="@@d3@@ @@nothing@@"))
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
        write_viewer(tmp_path / "graph.html", change(small()))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tab(browser: Browser, tmp_path: Path) -> Iterator[Browser]:  # noqa: F811
    """The small graph, open; a test that makes the page complain fails."""
    write_viewer(tmp_path / "graph.html", small())
    browser.errors.clear()
    browser.open(tmp_path / "graph.html")
    yield browser
    browser.js("0")
    assert not browser.errors


PINNED = "[...document.querySelectorAll('.node.pinned')].map(e => e.dataset.id).sort()"


def entries(side: str) -> str:
    row = "e => [e.querySelector('.what').firstChild.textContent, e.querySelector('.weight').textContent]"
    return f"[...document.querySelectorAll('[data-side={side}] .entry')].map({row})"


def dot(name: str) -> str:
    return f'.node[data-id="{name}"]'


@pytest.mark.browser
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """Rendered with the network blocked, at an address that names a node: drawn, selected, nothing on the console."""
    write_viewer(tmp_path / "graph.html", small())
    more = (f"--screenshot={tmp_path / 'page.png'}", "--window-size=1400,900", "--dump-dom")
    url = (tmp_path / "graph.html").as_uri() + "#select=f-strong"
    done = subprocess.run(
        command(tmp_path / "profile", *more, url), capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    assert len(re.findall(r'<path[^>]* data-id="', done.stdout)) == len(small().nodes)
    assert "<h2>0/117</h2>" in done.stdout and "+2.00" in done.stdout and "\u22120.250" in done.stdout
    assert "<img" not in done.stdout and 'class="example"' in done.stdout
    assert (tmp_path / "page.png").stat().st_size > 20_000


@pytest.mark.browser
def test_a_click_opens_the_panel(tab: Browser) -> None:
    assert tab.js("document.querySelectorAll('.node').length") == len(small().nodes)
    assert tab.js("document.querySelectorAll('.link').length") == 0
    tab.click(dot("f-strong"))
    assert tab.js(SELECTED) == ["f-strong"]
    assert tab.js(entries("in")) == [[HOSTILE, "+0.500"], ["\u2028 é", "\u22120.250"]]
    assert tab.js(entries("out")) == [["␣Wait", "+2.00"], [HOSTILE, "+1.50"]]
    links = tab.js(
        "[...document.querySelectorAll('.link')].map(e => [e.classList[1], +e.getAttribute('stroke-width')])"
    )
    assert [side for side, _ in links] == ["minus", "plus", "plus", "plus"]
    assert [width for _, width in links] == sorted(width for _, width in links)
    assert tab.js("document.querySelectorAll('.example span').length") == 3
    panel = tab.js(PANEL)
    for text in ("activation2.5", "influence60.0 %", "Where it is strong", "Raises", "\u22121.25", "RelP & friends"):
        assert text in panel
    tab.click("[data-side=out] .entry")
    assert tab.js(SELECTED) == ["l-0"] and "probability75.0 %" in tab.js(PANEL)
    assert tab.js("location.hash") == "#select=l-0"


@pytest.mark.browser
def test_hostile_text_is_shown_as_text(tab: Browser) -> None:
    for name in ("t-0", "f-weak", "f-strong"):
        tab.click(dot(name))
        assert HOSTILE in tab.js(PANEL)
    tab.js("document.querySelector('#search').focus()")
    tab.type("<img")
    assert tab.js("[...document.querySelectorAll('#found .what')].every(e => e.textContent.includes('<img'))")
    assert tab.js("document.querySelectorAll('img').length") == 0
    assert "</script><img…" in tab.js("[...document.querySelectorAll('text.token')].map(e => e.textContent)")
    assert tab.js("document.title") == "Why “Wait”? <b>"
    assert tab.js("performance.getEntriesByType('resource').length") == 0


@pytest.mark.browser
def test_keys_walk_pin_group_and_clear(tab: Browser) -> None:
    tab.click(dot("t-1"))
    walked = []
    for key in ("ArrowUp", "ArrowUp", "ArrowLeft", "ArrowRight", "ArrowUp", "ArrowRight", "ArrowRight"):
        tab.key(key)
        walked += tab.js(SELECTED)
    assert walked == ["f-strong", "f-weak", "e-1", "f-weak", "l-0", "l-1", "l-1"]
    assert tab.js("document.activeElement.dataset.id") == "l-1"
    tab.key("Escape")
    assert tab.js(SELECTED) == []
    tab.key("g")
    assert "Pin the nodes" in tab.js("document.querySelector('#status').textContent")
    tab.click(dot("f-strong"))
    tab.key("p")
    tab.click(dot("f-weak"), times=2)
    tab.key("Escape")
    assert tab.js(PINNED) == ["f-strong", "f-weak"]
    assert tab.js(f"document.querySelector({dot('f-strong')!r}).ariaLabel").startswith("Feature 0/117")
    assert tab.js("document.querySelectorAll('.link').length") == 1, "links among pinned nodes stay"
    tab.key("g")
    tab.type("carry <i>")
    tab.key("Enter")
    assert tab.js("document.querySelector('.name.strong').textContent") == "carry <i>"
    tab.click("#panel .group .plain")
    assert tab.js(entries("out")) == [["␣Wait", "+1.25"], ["␣So", "+0.125"]], "summed over the members"
    tab.key("/")
    assert tab.js("document.activeElement.id") == "search"


@pytest.mark.browser
def test_the_address_keeps_the_state(tab: Browser, tmp_path: Path) -> None:
    tab.click(dot("f-strong"), times=2)
    tab.key("g")
    tab.type("a & b")
    tab.key("Enter")
    tab.click(dot("l-1"), times=2)
    tab.js("(e => { e.value = 0.7; e.dispatchEvent(new Event('input')); })(document.querySelector('#prune'))")
    address = tab.js("location.hash")
    tab.open(tmp_path / "graph.html", address)
    assert tab.js("location.hash") == address
    assert tab.js(SELECTED) == ["l-1"] and tab.js(PINNED) == ["f-strong", "l-1"]
    assert tab.js("document.querySelector('#panel .group input').value") == "a & b"
    hidden = "[...document.querySelectorAll('.node.hidden')].map(e => e.dataset.id)"
    assert tab.js(hidden) == ["f-weak", "e-1"]
    assert tab.js("document.querySelector('#kept').textContent") == "70 %: 1 of 3"
    tab.click("#panel .group .plain:nth-of-type(2)")
    assert "groups" not in tab.js("location.hash") and tab.js(PINNED) == ["f-strong", "l-1"]
    for broken in ("#select=none&pin=gone&groups=[[&prune=x", "#groups=3", "#groups=[[1,2],[null]]", "#%"):
        tab.open(tmp_path / "graph.html", broken)
        assert tab.js(SELECTED) == [] and tab.js(PINNED) == []


@pytest.mark.browser
@pytest.mark.parametrize(("query", "found"), [("1/4", "f-weak"), ("0/", "f-strong"), ("wait", "l-0"), ("é", "t-1")])
def test_search(tab: Browser, query: str, found: str) -> None:
    tab.key("/")
    tab.type(query)
    tab.key("Enter")
    assert tab.js(SELECTED) == [found]
    assert tab.js("document.querySelector('#found').hidden")


@pytest.mark.browser
def test_pictures_are_saved(tab: Browser, tmp_path: Path) -> None:
    session, tab.session = tab.session, None
    tab.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "saved"))
    tab.session = session
    tab.click(dot("f-strong"))
    for ending in ("svg", "png"):
        tab.click(f"#export-{ending}")
        tab.until(lambda ending=ending: (tmp_path / "saved" / f"Why-Wait-b.{ending}").is_file())
    root = ElementTree.fromstring((tmp_path / "saved" / "Why-Wait-b.svg").read_text())
    paths = root.findall(".//{http://www.w3.org/2000/svg}path")
    assert len(paths) == len(small().nodes) + 4 and not any("class" in path.attrib for path in paths)
    assert "</script><img…" in [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    picture = (tmp_path / "saved" / "Why-Wait-b.png").read_bytes()
    width, height = struct.unpack(">II", picture[16:24])
    assert picture.startswith(b"\x89PNG") and width > 1600 and height > 1400 and len(picture) > 20_000


@pytest.mark.browser
def test_a_thousand_nodes_are_drawn_within_a_second_and_do_not_overlap(browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    data = realistic(n_features=1000, n_tokens=90, n_layers=26, n_links=20_000)
    write_viewer(tmp_path / "graph.html", data)
    browser.errors.clear()
    browser.open(tmp_path / "graph.html")
    assert browser.js("document.querySelectorAll('.node').length") == len(data.nodes)
    assert int(browser.js("document.body.dataset.ready")) < 1000
    shapes = browser.js(
        "[...document.querySelectorAll('.node')].map(e =>"
        " [...e.getAttribute('transform').match(/[-.0-9]+/g).map(Number), e.getBBox().width / 2])"
    )
    buckets: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
    for x, y, r in shapes:
        near = [other for i in (-1, 0, 1) for j in (-1, 0, 1)
                for other in buckets.get((int(x // 30) + i, int(y // 30) + j), [])]  # fmt: skip
        assert all((x - a) ** 2 + (y - b) ** 2 > (r + c - 0.1) ** 2 for a, b, c in near)
        buckets.setdefault((int(x // 30), int(y // 30)), []).append((x, y, r))
    browser.click("#zoom-in")
    assert not browser.errors


@pytest.mark.browser
def test_a_graph_of_nothing_opens(browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    """No links, no features; then no nodes and no tokens at all."""
    bare = replace(small(), nodes=small().nodes[3:5], links=(), about={})
    for data in (bare, replace(bare, nodes=(), tokens=())):
        write_viewer(tmp_path / "graph.html", data)
        browser.errors.clear()
        browser.open(tmp_path / "graph.html")
        for key in ("ArrowUp", "p", "g", "0", "Escape"):
            browser.key(key)
        assert browser.js("document.querySelectorAll('.node').length") == len(data.nodes)
        assert not browser.errors
