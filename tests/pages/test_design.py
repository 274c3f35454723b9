"""The one design of all pages: contrast in both themes, names for screen readers, no network, no scrolling sideways."""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from helpers.browser import Browser, browser  # noqa: F401  # a fixture
from helpers.page_values import ANSWERS, EXAMPLES, METRICS, SWEEP, made, whole_results
from helpers.stores import new_store

from tl_adapters.pages import circuit_sections, dose_curve_plots, plots, report, sweep_page
from tl_adapters.pages.circuit_page import write_circuit_page
from tl_adapters.pages.feature_pages import write_feature_pages
from tl_adapters.pages.graph_viewer import ViewerData, ViewerNode, write_viewer
from tl_adapters.pages.navigation import page_links
from tl_adapters.pages.report import write_report
from tl_adapters.pages.sweep_page import read_sweep_point, write_sweep_page

TEMPLATES = Path(report.__file__).parent / "templates"
PAGE_CSS = (TEMPLATES / "shared" / "page.css").read_text()

# -- colors ----------------------------------------------------------------------------------------------------------

TEXTS = {
    "paper": [
        "ink",
        "soft",
        "faint",
        "link",
        "plus",
        "minus",
        "template",
        "output",
        "continuation",
        "other",
        "suppress",
    ],
    "tint": ["ink", "soft", "faint", "link", "plus", "minus"],
    "hair": ["link", "ink"],  # a link of the navigation under the pointer
    "here": ["ink"],
    "mark": ["mark-ink"],
    "warn-tint": ["warn"],
    "tip": ["tip-ink"],
    "heat": ["ink"],
}
"""Background -> colors of text on it."""
SHAPES = {
    "paper": ["node", "node-strong", "match-line", "plus", "minus", "link", "soft"],
    "tint": ["node", "node-strong"],
}
"""Background -> colors of shapes and outlines on it."""
HEAT = 0.9
"""Largest opacity of a token's background; "heat" is a color without one."""


def themes() -> dict[str, dict[str, str]]:
    """Theme -> custom property -> value."""
    light, dark = re.findall(r":root \{(.*?)\}", PAGE_CSS, re.DOTALL)
    properties = lambda text: dict(re.findall(r"--([\w-]+): ([^;]+);", text))  # noqa: E731
    return {"light": properties(light), "dark": {**properties(light), **properties(dark)}}


def rgb(value: str) -> tuple[float, ...]:
    if value.startswith("#"):
        return tuple(int(value[i : i + 2], 16) for i in (1, 3, 5))
    return tuple(map(float, value.split()))


def contrast(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    """The ratio of WCAG 2: 1 for the same color, 21 for black on white."""

    def luminance(color: tuple[float, ...]) -> float:
        linear = [c / 255 / 12.92 if c <= 10.31475 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_measured_as_wcag_does() -> None:
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_and_shapes_stand_out_from_what_they_are_on(theme: str) -> None:
    colors = themes()[theme]
    weak = []
    for backgrounds, least in ((TEXTS, 4.5), (SHAPES, 3.0)):
        for name, others in backgrounds.items():
            ground = rgb(colors[name])
            if name == "heat":
                paper = rgb(colors["paper"])
                ground = tuple(HEAT * g + (1 - HEAT) * p for g, p in zip(ground, paper, strict=True))
            for other in others:
                ratio = contrast(rgb(colors[other]), ground)
                if ratio < least:
                    weak.append(f"{other} on {name}: {ratio:.2f}")
    assert not weak


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lines_of_plots_stand_out_from_the_page(theme: str) -> None:
    paper = rgb(themes()[theme]["paper"])
    ratios = {color: contrast(rgb(color), paper) for color, *_ in plots._STYLES if color != "#000000"}
    assert len(ratios) == 6 and min(ratios.values()) >= 3, ratios


def own_files(*suffixes: str) -> Iterator[Path]:
    """Styles and scripts of our pages; a notebook has the style of its own page, and d3 is another's."""
    for path in sorted(TEMPLATES.rglob("*")):
        if path.suffix in suffixes and path.parent.name not in ("d3", "notebook", "sae_dashboard"):
            yield path


def test_one_style_sheet_holds_every_color() -> None:
    light = themes()["light"]
    assert themes()["dark"].keys() == light.keys()
    for path in own_files(".css", ".js"):
        text = path.read_text()
        assert set(re.findall(r"var\(--([\w-]+)\)", text)) <= light.keys(), path
        assert "url(" not in re.sub(r"url\(#\w+\)", "", text) and "@import" not in text, path
        if path != TEMPLATES / "shared" / "page.css" and path.suffix == ".css":
            assert not re.search(r"#[0-9a-f]{3,8}\b(?![^{}]*\{)|rgba?\((?!var)", text), path
    pages = [path for path in TEMPLATES.rglob("*.html.j2") if path.parent.name not in ("notebook", "shared")]
    for path in pages:
        text = path.read_text()
        assert "set styles" not in text or 'asset("shared/page.css")' in text or path.name == "dashboard.html.j2", path


# -- the pages of a run ----------------------------------------------------------------------------------------------

KINDS = {
    "report": "sweep/run/report.html",
    "features": "sweep/run/features/pages/index.html",
    "feature": "sweep/run/features/pages/layer_*/features_0.html",
    "graph": "sweep/run/graphs/moment-1.html",
    "circuit": "sweep/run/hesitation.html",
    "sweep": "sweep/sweep.html",
}


def write_graph_page(path: Path) -> None:
    usual = dict(influence=0.5, cumulative=0.5, examples=((("Wait", 1.0), (" 4", 0.0)),))
    lists = dict(top=((" Wait", 1.5),), bottom=((" So", -1.25),))
    nodes = (
        ViewerNode(id="f", kind="feature", layer=0, position=1, label="says “Wait”", feature=3, activation=1.0,
                   probability=None, **usual, **lists),
        ViewerNode(id="l", kind="logit", layer=1, position=1, label=" Wait", feature=None, activation=None,
                   probability=0.5, **usual, **lists),
    )  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    write_viewer(path, ViewerData("Why “Wait”?", ("47", "="), 1, nodes, ((0, 1, 0.5),), {"n": 1}), page_links(path))


@pytest.fixture(scope="module", autouse=True)
def each_plot_is_drawn_once() -> Iterator[None]:
    """Plots are slow, and the pages of the run are written several times."""
    drawn: dict[str, plots.Plot] = {}
    real = plots.plot

    def remembered(lines: Any, **options: Any) -> plots.Plot:
        key = repr((lines, options))
        if key not in drawn:
            drawn[key] = real(lines, **options)
        return drawn[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (circuit_sections, dose_curve_plots, report, sweep_page):
            patch.setattr(module, "plot", remembered)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep with one run, whose pages were written in the order of its stages."""
    folder = tmp_path_factory.mktemp("pages")
    run = folder / "sweep" / "run"
    run.mkdir(parents=True)
    results = json.loads(json.dumps(whole_results()).replace("NaN", "null"))
    (run / "results.json").write_text(json.dumps(results))
    answers = [{**ANSWERS[0], "base": "9 " * 400}, *ANSWERS]
    for name, lines in (("metrics", METRICS), ("answers", answers)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {**SWEEP, "points": [{**point, "name": "run"} for point in SWEEP["points"][:1]]}
    (folder / "sweep" / "sweep.json").write_text("{}")
    write_feature_pages(new_store(), run / "features" / "pages", features=new_store().ids()[:3], progress=False)
    write_graph_page(run / "graphs" / "moment-1.html")
    write_circuit_page(run, results["hesitation"], made(), None, EXAMPLES)
    write_report(run)
    write_sweep_page(folder / "sweep", record, [read_sweep_point(point) for point in record["points"]])
    write_report(run)  # of the sweep it now knows
    return folder


def page_of(folder: Path, kind: str) -> Path:
    return next(folder.glob(KINDS[kind]))


class Elements(HTMLParser):
    """The elements of a page with their attributes and the texts within them, those of scripts and styles left out."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[list[str]] = []
        self.around: list[list[int]] = []
        self.open: list[int] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "link", "input", "br"):
            self.open.append(len(self.found) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.texts.append([])
        self.around.append(list(self.open))

    def handle_endtag(self, tag: str) -> None:
        assert self.found[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        if self.found[self.open[-1]][0] not in ("script", "style") if self.open else False:
            for number in self.open:
                self.texts[number].append(data)

    def of(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        pairs = zip(self.found, self.texts, strict=True)
        return [(given, "".join(texts)) for (name, given), texts in pairs if name == tag]


@pytest.mark.parametrize("kind", KINDS)
def test_pages_name_what_they_hold(folder: Path, kind: str) -> None:
    page = page_of(folder, kind).read_text()
    elements = Elements(page)
    assert elements.found[0] == ("html", {"lang": "en"}) and len(elements.of("main")) == 1
    assert PAGE_CSS in page
    ids = [given["id"] for _, given in elements.found if "id" in given]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in re.findall(r'xlink:href="(#[^"]*)"', page)} <= set(ids), "markers of plots"
    links = [given["href"] for given, _ in elements.of("a") if "href" in given]
    assert {link[1:] for link in links if link and link.startswith("#")} <= set(ids)
    for given, _ in elements.of("svg"):
        assert given.get("aria-label") or given.get("id") == "heat", "its script names the heat map"
        assert given.get("role") in ("img", "group")
    for given, text in elements.of("th"):
        assert given.get("scope") in ("col", "row") and text.strip()
    for given, _ in elements.of("nav"):
        assert given.get("aria-label")
    for _, given in elements.found:
        if given.get("tabindex") == "0" or given.get("class") == "scroll":
            assert given.get("role") and given.get("aria-label"), given
    if kind in ("report", "circuit", "sweep"):
        assert elements.of("table") and elements.of("section" if kind == "report" else "h1")
        tables = re.findall(r"<table>.*?</table>", page, re.DOTALL)
        for table in tables:
            caption = Elements(table).of("caption")
            assert len(caption) == 1 and caption[0][1].strip()
            if "hybrid" in table.lower():
                assert "The hybrid is the target with the base's MLPs" in caption[0][1]
        assert any("hybrid" in table.lower() for table in tables) and "<caption></caption>" not in page


CONTROLS = ("input", "select", "textarea", "button")


def nameless(page: str) -> list[str | None]:
    """The ids of the controls that a screen reader has no name for; what a list offers is no name."""
    elements = Elements(page)
    texts = ["".join(parts) for parts in elements.texts]
    by_id = {given["id"]: text for (_, given), text in zip(elements.found, texts, strict=True) if "id" in given}
    missing = []
    for number, (tag, given) in enumerate(elements.found):
        if tag not in CONTROLS or given.get("type") == "hidden":
            continue
        own = texts[number] if tag == "button" else ""
        labels = [
            text.replace(texts[number], "")
            for i, ((other, label), text) in enumerate(zip(elements.found, texts, strict=True))
            if other == "label" and (i in elements.around[number] or label.get("for") == given.get("id", ""))
        ]
        others = [by_id.get(id, "") for id in (given.get("aria-labelledby") or "").split()]
        names = [own, given.get("aria-label"), given.get("title"), *labels, *others]
        if not any(name and name.strip() for name in names):
            missing.append(given.get("id"))
    return missing


@pytest.mark.parametrize("kind", KINDS)
def test_every_control_has_a_name(folder: Path, kind: str) -> None:
    page = page_of(folder, kind).read_text()
    assert nameless(page) == []
    count = sum(tag in CONTROLS for tag, _ in Elements(page).found)
    assert (count > 5) == (kind in ("features", "graph")), "the other pages only show"


def test_a_control_without_a_name_is_found() -> None:
    named = (
        "<p id=there>A</p><button>A</button><input title=A><textarea aria-label=A></textarea><label>A<select>"
        "<option>B</option></select></label><label for=far>A</label><input id=far><input aria-labelledby='no there'>"
    )
    assert nameless(named) == []
    without = (
        "<button id=a> </button><input id=b title=''><textarea id=c>A</textarea><label><select id=d><option>B</option>"
        "</select></label><label for=gone>A</label><input id=e aria-labelledby=no placeholder=A><label>A</label>"
    )
    assert nameless(without) == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("kind", KINDS)
def test_pages_refer_to_no_network(folder: Path, kind: str) -> None:
    page = page_of(folder, kind).read_text()
    markup = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    addresses = re.findall(r"""\b(?:src|href|action|srcset|poster)=["']([^"']*)""", markup)
    assert addresses and all(not urlsplit(address).netloc for address in addresses)
    assert all(urlsplit(address).scheme in ("", "data") for address in addresses)
    assert "default-src &#39;none&#39;" in markup and "unsafe" not in markup
    # Names of SVG's and HTML's languages; d3's script and licence name its home.
    known = r"https?://(www\.w3\.org/|d3js\.org)"
    assert not re.findall(r"https?://\S+", re.sub(known, "", page if kind != "graph" else markup))


@pytest.mark.parametrize("kind", KINDS)
def test_every_page_leads_to_the_others(folder: Path, kind: str) -> None:
    path = page_of(folder, kind)
    (navigation,) = re.findall(r'<nav class="pages".*?</nav>', path.read_text(), re.DOTALL)
    linked = {(path.parent / unquote(address)).resolve() for address in re.findall(r'href="([^"]*)"', navigation)}
    assert all(page.is_file() for page in linked)
    assert path.resolve() not in linked
    expected = {page_of(folder, other).resolve() for other in ("report", "features", "graph", "circuit", "sweep")}
    if kind == "feature":  # written before the pages of later stages, and then left as it is
        expected = {page_of(folder, other).resolve() for other in ("report", "features")}
    if kind == "sweep":
        expected = {page_of(folder, "report").resolve()}
    assert linked >= expected - {path.resolve()}
    assert navigation.count('aria-current="page"') == (kind != "feature")


def test_navigation_is_brought_up_to_date_and_nothing_else_changes(folder: Path) -> None:
    run = page_of(folder, "report").parent
    paths = [page_of(folder, kind) for kind in ("features", "graph", "circuit", "report")]
    without = lambda: [re.sub(r'<nav class="pages".*?</nav>', "", p.read_text(), flags=re.DOTALL) for p in paths]  # noqa: E731
    before, rest = [path.read_text() for path in paths], without()
    other = run / "graphs" / "mine.html"
    other.write_bytes(b"<p>\xff no text, and no navigation</p>")
    write_report(run)
    assert without() == rest and all('href="' in path.read_text() for path in paths)
    assert all("mine.html" in path.read_text() for path in paths)
    assert other.read_bytes() == b"<p>\xff no text, and no navigation</p>"
    other.unlink()
    write_report(run)
    assert [path.read_text() for path in paths] == before, "as it was, byte for byte"


def test_a_page_that_the_user_changed_keeps_its_navigation(folder: Path) -> None:
    run, circuit = page_of(folder, "report").parent, page_of(folder, "circuit")
    original = circuit.read_text()
    circuit.write_text(original.replace("The hesitation circuit", "My circuit"))
    changed = circuit.read_text()
    (run / "graphs" / "new.html").write_text("")
    write_report(run)
    assert circuit.read_text() == changed
    (run / "graphs" / "new.html").unlink()
    circuit.write_text(original)
    write_report(run)


def test_pages_outside_of_runs_have_no_navigation(tmp_path: Path) -> None:
    assert page_links(tmp_path / "graph.html") == []
    (tmp_path / "results.json").write_text('{"of": "another program"}')
    assert page_links(tmp_path / "graph.html") == []


# -- in a browser -----------------------------------------------------------------------------------------------------

SIDEWAYS = """
[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg') && !e.closest('.unseen')
  && e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))
"""
SMALLEST_TEXT = """
Math.min(...[...document.querySelectorAll('figure > svg text, .scroll > svg text')].filter(e => e.textContent.trim())
  .map(e => [parseFloat(getComputedStyle(e).fontSize), e.getScreenCTM()])
  .map(([size, scale]) => size * Math.hypot(scale.a, scale.b)))
"""


def look(browser: Browser, page: Path, width: int, theme: str) -> None:  # noqa: F811
    """Open a page at a width, in a theme."""
    browser.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
    browser.errors.clear()
    browser.send("Page.navigate", url="about:blank")
    browser.send("Page.navigate", url=page.as_uri())
    browser.until(lambda: browser.js("location.protocol === 'file:' && document.readyState === 'complete'"))


@pytest.mark.browser
@pytest.mark.parametrize("kind", KINDS)
def test_pages_are_readable_at_every_width_in_both_themes(browser: Browser, folder: Path, kind: str) -> None:  # noqa: F811
    page = page_of(folder, kind)
    for width, theme in itertools.product((400, 900, 1400), ("light", "dark")):
        look(browser, page, width, theme)
        assert browser.js("document.documentElement.scrollWidth") <= width
        assert browser.js(SIDEWAYS) == []
        paper = browser.js("getComputedStyle(document.body).backgroundColor")
        assert paper == "rgb({:.0f}, {:.0f}, {:.0f})".format(*rgb(themes()[theme]["paper"]))
        if width == 400 and kind in ("report", "circuit", "sweep"):
            assert browser.js(SMALLEST_TEXT) >= 10.9, "labels of plots, in pixels"
        assert not browser.errors and browser.js("performance.getEntriesByType('resource').length") == 0


@pytest.mark.browser
@pytest.mark.parametrize("kind", KINDS)
def test_the_keyboard_shows_where_it_is(browser: Browser, folder: Path, kind: str) -> None:  # noqa: F811
    look(browser, page_of(folder, kind), 1400, "light")
    focused, places = "document.activeElement", []
    for _ in range(2 if kind == "sweep" else 3):  # which has no more to go to
        for event in ("keyDown", "keyUp"):
            browser.send("Input.dispatchKeyEvent", type=event, key="Tab", windowsVirtualKeyCode=9)
        places.append(browser.js(f"[...document.querySelectorAll('*')].indexOf({focused})"))
        style = browser.js(f"getComputedStyle({focused}).outlineStyle + getComputedStyle({focused}).outlineWidth")
        assert style == "solid2px"
    assert places == sorted(set(places)), "on through the page"


ROLES = ("button", "textbox", "searchbox", "combobox", "slider", "spinbutton", "checkbox", "radio", "listbox")


@pytest.mark.browser
@pytest.mark.parametrize("kind", ["features", "graph"])
def test_controls_that_a_script_made_have_names(browser: Browser, folder: Path, kind: str) -> None:  # noqa: F811
    """Names as Chromium computes them, after a feature of the graph was selected, pinned and grouped."""
    look(browser, page_of(folder, kind), 1400, "light")
    if kind == "graph":
        browser.click('[data-id="f"]')
        for key in "pg":
            browser.key(key)
    made = browser.js("document.querySelectorAll('th button, #panel button, #panel input').length")
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    controls = [node for node in nodes if not node["ignored"] and node["role"]["value"] in ROLES]
    assert 4 < made < len(controls)
    assert not [node for node in controls if not node["name"]["value"].strip()]


@pytest.mark.browser
def test_the_first_screen_holds_the_answer(browser: Browser, folder: Path) -> None:  # noqa: F811
    """Question, sentences, one prompt beside four models, and the head of the figures, at 1,400 by 900 pixels."""
    look(browser, page_of(folder, "report"), 1400, "light")
    bottom = lambda selector: browser.js(f"document.querySelector('{selector}').getBoundingClientRect().bottom")  # noqa: E731
    assert bottom("h1") < bottom("#answer") < bottom("#one-prompt") < bottom(".headlines .value") < 900
    assert browser.js("[...document.querySelectorAll('#one-prompt h4')].map(e => e.textContent)") == [
        "base", "target", "hybrid", "replacement",
    ]  # fmt: skip
    lefts = browser.js("[...document.querySelectorAll('#one-prompt h4')].map(e => e.getBoundingClientRect().top)")
    assert len(set(lefts)) == 1, "side by side"
    top, height = browser.js(
        "(({top, height}) => [top, height])(document.querySelector('#dose svg').getBoundingClientRect())"
    )
    assert bottom("#one-prompt") <= top and top + 0.6 * height < 900, (
        "the curves of the dose figure; its legend ends below"
    )
    assert browser.js("document.querySelector('#dose').getBoundingClientRect().left") > browser.js(
        "document.querySelector('.headlines').getBoundingClientRect().right"
    ), "beside the figures"
    assert browser.js("document.querySelector('#one-prompt .answers mark').textContent") == "Wait"


def test_a_page_with_nothing_measured_still_opens(tmp_path: Path) -> None:
    """The report of a run that was trained only: no answer yet, no figures, and no empty element in their place."""
    whole = whole_results()
    only = {key: whole[key] for key in ("schema_version", "pair", "train", "seconds", "versions", "seeds")}
    (tmp_path / "results.json").write_text(json.dumps(only))
    page = write_report(tmp_path).read_text()
    elements = Elements(page)
    assert not {given.get("class") for _, given in elements.found} & {"lead", "headlines", "answers"}
    assert "What did reasoning training change" in page and "Provenance" in page
    assert replace(page_links(tmp_path / "report.html")[0], current=False).address == "report.html"
