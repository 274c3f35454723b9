"""Pages of hostile files: one clear error, or a page in which nothing runs, is loaded or leads elsewhere."""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import Browser, browser  # noqa: F401  # a fixture
from helpers.page_values import ANSWERS, EXAMPLES, METRICS, SWEEP, made, whole_results
from markupsafe import Markup

from tl_adapters.errors import UserError
from tl_adapters.pages import report
from tl_adapters.pages.circuit_page import write_circuit_page
from tl_adapters.pages.graph_viewer import ViewerData, ViewerNode, write_viewer
from tl_adapters.pages.plots import Plot
from tl_adapters.pages.report import write_report
from tl_adapters.pages.server import _PageHandler
from tl_adapters.pages.sweep_page import read_sweep_point, write_sweep_page

MARKUP = (
    "\"'><script>window.ran = 1</script><img src=x onerror=window.ran=1></script></style></title></textarea>-->"
    "<svg onload=window.ran=1><a href=javascript:window.ran=1>{{ 7 * 7 }}{% raw %}\u202e\ud800\x00\x1b[31m"
)
ADDRESS = "javascript:window.ran=1"
CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda leaf: leaf,
    "markup in texts": lambda leaf: MARKUP if isinstance(leaf, str) else leaf,
    "addresses in texts": lambda leaf: ADDRESS if isinstance(leaf, str) else leaf,
    "markup in numbers": lambda leaf: MARKUP if is_number(leaf) else leaf,
    "numbers as texts": lambda leaf: str(leaf) if is_number(leaf) else leaf,
    "null everywhere": lambda leaf: None,
}


REFUSED = {"markup in numbers", "numbers as texts", "null everywhere"}


def is_number(leaf: Any) -> bool:
    return isinstance(leaf, int | float) and not isinstance(leaf, bool)


def changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """The value with every leaf changed; the schema version stays, so that the rest is read."""
    if isinstance(value, dict):
        return {key: item if key == "schema_version" else changed(item, change) for key, item in value.items()}
    return [changed(item, change) for item in value] if isinstance(value, list | tuple) else change(value)


def write_run(folder: Path, results: Any, metrics: Any = METRICS, answers: Any = ANSWERS) -> None:
    """The files of a run that its report is made of."""
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results).replace("NaN", "null"))
    for name, lines in (("metrics", metrics), ("validation", metrics), ("answers", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def report_page(folder: Path, change: Callable[[Any], Any]) -> Path:
    write_run(folder, *(changed(value, change) for value in (whole_results(), METRICS, ANSWERS)))
    return write_report(folder)


def circuit_page(folder: Path, change: Callable[[Any], Any]) -> Path:
    folder.mkdir(exist_ok=True)
    text = lambda value: str(change(value) or "")  # noqa: E731
    circuit = replace(
        made(words=(text("Wait"),)), behavior=text("hesitation"), split=text("select"), function=text("f")
    )
    block = changed(whole_results()["hesitation"], change)
    return write_circuit_page(folder, block, circuit, None, changed(EXAMPLES, change))


def sweep_page(folder: Path, change: Callable[[Any], Any]) -> Path:
    folder.mkdir(exist_ok=True)
    record = changed(SWEEP, change)
    return write_sweep_page(folder, record, [read_sweep_point(point) for point in record["points"]])


def visit(browser: Browser, page: Path) -> None:  # noqa: F811
    """Open a page and look for everything that must not have happened."""
    browser.errors.clear()
    browser.send("Page.navigate", url="about:blank")
    browser.send("Page.navigate", url=page.as_uri())
    browser.until(lambda: browser.js("location.protocol === 'file:' && document.readyState === 'complete'"))
    assert_harmless(browser)


def assert_harmless(browser: Browser) -> None:  # noqa: F811
    assert browser.js("window.ran === undefined")
    assert browser.js("performance.getEntriesByType('resource').length") == 0
    assert browser.js("[...document.links].every(a => a.protocol === 'file:' || a.protocol === 'blob:')")
    assert browser.js("document.querySelectorAll('img, iframe, object, embed, base, form:not(#filters)').length") == 0
    policy = browser.js("document.querySelector('meta[http-equiv=Content-Security-Policy]').content")
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    assert not browser.errors, "a violation of the policy, or an error of a script"


@pytest.mark.browser
@pytest.mark.parametrize("write", [report_page, circuit_page, sweep_page])
@pytest.mark.parametrize("kind", CHANGES)
def test_a_page_or_one_error(
    browser: Browser, tmp_path: Path, kind: str, write: Callable[[Path, Callable[[Any], Any]], Path]  # noqa: F811
) -> None:  # fmt: skip
    if kind in REFUSED:
        with pytest.raises(UserError, match="Restore (the file|it) from a copy"):
            write(tmp_path / "run", CHANGES[kind])
        assert not list(tmp_path.rglob("*.html"))
        return
    page = write(tmp_path / "run", CHANGES[kind])
    visit(browser, page)
    shown = browser.js("document.body.innerText")
    assert "NaN" not in shown and "undefined" not in shown and "[object" not in shown
    if kind == "markup in texts":
        assert "<img src=x onerror=window.ran=1>" in shown and "{{ 7 * 7 }}" in shown and "\\u202e\\ud800" in shown
    if kind == "addresses in texts":
        assert ADDRESS in shown


PAGES = {"features/pages/index.html", "graphs/moment-1.html", "hesitation.html"}


class Tags(HTMLParser):
    """What a page consists of."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every leaf; of a list only the first item is gone into."""
    items = (
        value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else None
    )
    if items is None:
        yield path
    for key, item in items or ():
        yield from leaves(item, (*path, key))


def test_every_field_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each leaf of results.json becomes something else, with plots left out, which are slow."""
    monkeypatch.setattr(report, "plot", lambda *args, **kwargs: Plot(Markup(), ""))
    monkeypatch.setattr(report, "measured_line", lambda *args: None)
    monkeypatch.setattr(report, "write_output", lambda folder, name, text: written.append(text) or folder / name)
    written: list[str] = []
    results = whole_results()
    shown = ("words", "circuit", "criteria", "page")  # by the report, besides rates
    results["hesitation"] = {key: value for key, value in results["hesitation"].items() if key in shown}
    others = [MARKUP, None, "12", ADDRESS, -1, [], {}, 10**300, True]
    write_run(tmp_path / "run", results)
    write_report(tmp_path / "run")
    assert "Provenance" in written.pop()
    refused = 0
    alike = {path[-2:]: path for path in leaves(results) if path[-1] != "schema_version"}  # one of many intervals
    for number, path in enumerate(alike.values()):
        damaged = copy.deepcopy(results)
        place = damaged
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = others[number % len(others)]
        (tmp_path / "run" / "results.json").write_text(json.dumps(damaged))
        try:
            write_report(tmp_path / "run")
        except UserError:
            refused += 1
            continue
        tags = Tags(written.pop()).tags
        assert not {tag for tag, _ in tags} & {"script", "img", "svg", "iframe", "object", "form"}, path
        assert not any(name.startswith("on") or name == "style" for _, given in tags for name in given), path
        sections = {f"#{given['id']}" for _, given in tags if "id" in given}
        assert {given["href"] for tag, given in tags if "href" in given} <= {"data:,", *PAGES, "12", *sections}, path
    assert 20 < refused < number


@pytest.mark.browser
def test_the_page_of_a_graph(browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    usual: dict[str, Any] = dict(label=MARKUP, probability=None, top=((MARKUP, 1.0),), bottom=((MARKUP, -1.0),))
    nodes = (
        ViewerNode(id=MARKUP, kind="feature", layer=0, position=0, feature=3, activation=1.0, influence=0.5,
                   cumulative=0.5, examples=(((MARKUP, 1.0),),), **usual),
        ViewerNode(id=ADDRESS, kind="token", layer=-1, position=0, feature=None, activation=None, influence=0.0,
                   cumulative=0.0, examples=(), **usual),
    )  # fmt: skip
    write_viewer(tmp_path / "g.html", ViewerData(MARKUP, (MARKUP,), 1, nodes, ((1, 0, 0.5),), {MARKUP: MARKUP, "n": 1}))
    visit(browser, tmp_path / "g.html")
    browser.click(".node")
    browser.key("p")
    browser.key("g")
    assert "<img src=x" in browser.js("document.querySelector('#panel').textContent")
    assert_harmless(browser)


@pytest.mark.browser
def test_the_list_of_pages(browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "root").mkdir()
    for name in ("<img src=x onerror=window.ran=1>.html", "javascript:window.ran=1.html", "{{ 7 * 7 }}\u202e.html"):
        (tmp_path / "root" / name).write_text("")
    handler = _PageHandler.__new__(_PageHandler)  # whose constructor answers a request
    handler.root = tmp_path / "root"
    (tmp_path / "list.html").write_bytes(handler._page_list())
    visit(browser, tmp_path / "list.html")
    assert browser.js("document.links.length") == 3
