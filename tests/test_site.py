"""The documentation site: built strictly, complete, without network, and legible in a browser."""

import ast
import functools
import html
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from fontTools.ttLib import TTFont
from helpers.browser import Browser, browser  # noqa: F401  # a fixture
from helpers.readme import ROOT
from helpers.renamed import renamed_arguments_by_function

import tl_adapters
from tl_adapters import organism
from tl_adapters.adapters.set_folder import SET_READABLE_VERSIONS, SET_SCHEMA_VERSION
from tl_adapters.attribution.graph import GRAPH_SCHEMA_VERSION
from tl_adapters.circuits.circuit import CIRCUIT_SCHEMA_VERSION
from tl_adapters.circuits.results_block import HESITATION_SCHEMA_VERSION
from tl_adapters.features.store_files import STORE_SCHEMA_VERSION
from tl_adapters.interop.circuit_tracer import CIRCUIT_TRACER_SCHEMA_VERSION
from tl_adapters.study.sweep import SWEEP_SCHEMA_VERSION
from tl_adapters.utils.results import RESULTS_SCHEMA_VERSION
from tl_adapters.vllm_plugin.served_conditions import SERVING_VERSION

DOCS, PACKAGE = ROOT / "docs", ROOT / "tl_adapters"
MATH = re.compile(r"<math.*?</math>", re.S)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "built"
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(
        call, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300
    )
    assert built.returncode == 0, built.stderr[-3000:]
    return folder


def pages(site: Path) -> dict[str, str]:
    found = {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    return {name: text for name, text in found.items() if not name.startswith("repository/")}


@functools.cache
def classes() -> dict[str, ast.ClassDef]:
    """Dotted name below the package, and definition, of every class at the top of a module."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found[f"{module}.{node.name}"] = node
    return found


def test_every_public_name_is_documented_once_and_nothing_else(site: Path) -> None:
    api = {name: text for name, text in pages(site).items() if name.startswith("api/")}
    documented = [n for text in api.values() for n in re.findall(r'<h2 id="tl_adapters\.(\w+)"', text)]
    assert sorted(documented) == sorted(tl_adapters.EXPORTS)
    written = [
        n for page in DOCS.rglob("*.md") for n in re.findall(r"^::: tl_adapters\.(\w+)$", page.read_text(), re.M)
    ]
    assert sorted(written) == sorted(documented)


def test_the_built_in_pair_is_documented(site: Path) -> None:
    """Every public name of `tl_adapters.organism`: functions and classes from the code, the others in a table."""
    text = (DOCS / "api" / "organism.md").read_text(encoding="utf-8")
    written = set(re.findall(r"^::: tl_adapters\.organism\.(\w+)$", text, re.M))
    rows = {n for row in re.findall(r"^\| (`.+?) \| ", text, re.M) for n in re.findall(r"`organism\.(\w+)`", row)}
    assert written | rows == {*organism.__all__} and not written & rows
    assert written == {
        n for n in organism.__all__ if inspect.isfunction(o := getattr(organism, n)) or inspect.isclass(o)
    }
    headings = re.findall(r'<h2 id="tl_adapters\.organism\.(\w+)"', pages(site)["api/organism.html"])
    assert {*headings} == written


def test_every_error_is_listed_with_what_to_do() -> None:
    errors, found = {"errors.UserError"}, classes()
    while more := {
        name for name, node in found.items()
        if {ast.unparse(base) for base in node.bases} & {e.rpartition(".")[2] for e in errors}
    } - errors:  # fmt: skip
        errors |= more
    public = {name for name in errors - {"errors.UserError"} if not name.rpartition(".")[2].startswith("_")}
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \| (.+?) \|$", (DOCS / "errors.md").read_text(), re.M)
    assert len(public) > 40 and sorted(name for name, _, _ in rows) == sorted(public)
    assert all(meaning and advice for _, meaning, advice in rows)


def test_every_old_name_is_in_the_glossary() -> None:
    renamed = {f"tl_adapters.{old}": f"tl_adapters.{new}" for old, new in tl_adapters.RENAMED.items()}
    for name, node in classes().items():
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "renamed_attributes":
                owner = name.rpartition(".")[2]
                pairs = {str(k.arg): ast.literal_eval(k.value) for k in decorator.keywords}
                renamed |= {f"{owner}.{old}": f"{owner}.{new}" for old, new in pairs.items()}
    renamed |= {
        f"{owner}.{old}": f"{owner}.{new}"
        for owner, pairs in renamed_arguments_by_function().items()
        for old, new in pairs.items()
    }
    rows = re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|$", (DOCS / "glossary.md").read_text(), re.M)
    assert len(renamed) > 20 and dict(rows) == renamed


def test_the_versions_of_formats_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| (\d+) \| ([\d, ]+) \|$", (DOCS / "formats.md").read_text(), re.M)
    earlier = {"circuit": [1], 'block "hesitation" of results.json': [1], "adapters": list(SET_READABLE_VERSIONS[:-1])}
    written = {
        "adapters": SET_SCHEMA_VERSION, "attribution graph": GRAPH_SCHEMA_VERSION, "circuit": CIRCUIT_SCHEMA_VERSION,
        "feature store": STORE_SCHEMA_VERSION, "results of a run": RESULTS_SCHEMA_VERSION,
        'block "hesitation" of results.json': HESITATION_SCHEMA_VERSION, "sweep": SWEEP_SCHEMA_VERSION,
        "folder that vLLM serves": SERVING_VERSION, "circuit-tracer's graphs": CIRCUIT_TRACER_SCHEMA_VERSION,
    }  # fmt: skip
    expected = {name: (v, [*earlier.get(name, []), v]) for name, v in written.items()}
    assert {name: (int(v), [int(n) for n in read.split(",")]) for name, v, read in rows} == expected


def test_a_table_that_says_hybrid_defines_it_at_its_head() -> None:
    """The word is not the field's: whoever sees a table alone must not take it for the base model."""
    seen = 0
    for page in (*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "examples" / "r1_distill_7b" / "README.md"):
        if page.name == "commands.md":  # written from the command line; its options name the routes
            continue
        text = re.sub(r"<!--.*?-->\n", "", page.read_text(encoding="utf-8"))
        blocks = re.split(r"\n\s*\n", text)
        for before, block in zip(["", *blocks], blocks, strict=False):
            exports = page.name == "reliability.md"  # "export --to hybrid" is a subcommand there
            if block.startswith("|") and re.search("hybrid", block, re.I) and not exports:
                seen += 1
                defined = re.search(r"hybrid", before, re.I) and "base's MLPs" in before.replace("\n", " ")
                assert defined, f"{page.relative_to(ROOT)}: {block[:200]}"
    assert seen > 7


def test_equations_are_drawn_without_a_script(site: Path) -> None:
    found = {name: MATH.findall(text) for name, text in pages(site).items()}
    assert len(found["training.html"]) > 20 and found["figures.html"] and found["attribution.html"]
    for name, text in pages(site).items():
        prose = re.sub(r"<(pre|code|script|title|math).*?</\1>", "", text, flags=re.S)
        assert "arithmatex" not in text and "$$" not in prose, name
        assert not [math for math in found[name] if "\\" in math], f"{name}: a command that is not known"


def test_the_font_has_every_character_of_the_equations(site: Path) -> None:
    known = set(TTFont(DOCS / "fonts" / "stix_two_math.woff2").getBestCmap())
    text = "".join(re.sub(r"<[^>]+>", "", math) for found in map(MATH.findall, pages(site).values()) for math in found)
    assert {c for c in html.unescape(text) if not c.isspace()} <= {chr(code) for code in known}


def test_reading_needs_no_network(site: Path) -> None:
    for name, text in pages(site).items():
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|preload|preconnect|icon)"[^>]*href="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]*href="([^"]+)"[^>]*rel="(?:stylesheet|preload|preconnect|icon)"', text)
        assert loaded, name
        for address in loaded:
            assert not re.match(r"(\w+:)?//", address), f"{name} loads {address}"
            path = (site / name).parent / unquote(address.partition("?")[0])
            assert address.startswith("/") or path.is_file(), f"{name} loads {address}"
        assert 'class="mermaid"' not in text  # the theme would load a library for it
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(\w+:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_a_link_to_a_file_of_the_repository_leads_to_its_copy(site: Path) -> None:
    copies = {
        path.relative_to(site / "repository").as_posix() for path in (site / "repository").rglob("*") if path.is_file()
    }
    assert "tutorials/01_first_look.ipynb" in copies
    for copy in copies:
        assert (site / "repository" / copy).read_bytes() == (ROOT / copy).read_bytes()
    assert 'href="../changelog.html"' in (site / "api" / "index.html").read_text()


def opened(tab: Browser, page: Path, width: int = 1400) -> None:
    tab.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    tab.send("Page.navigate", url="about:blank")
    tab.errors.clear()
    tab.send("Page.navigate", url=page.as_uri())
    tab.until(lambda: tab.js("location.protocol === 'file:' && document.readyState === 'complete'"))


@pytest.mark.browser
def test_the_site_in_a_browser(site: Path, browser: Browser) -> None:  # noqa: F811
    opened(browser, site / "index.html")
    assert browser.js("document.querySelector('h1').textContent").startswith("tl_adapters")
    tabs = browser.js("[...document.querySelectorAll('.md-tabs__link')].map(e => e.textContent.trim())")
    assert tabs == ["Start", "Concepts", "Guides", "Reference", "Measurements", "Contributing"]
    assert browser.js("document.querySelector('article img').naturalWidth") > 300
    assert not browser.errors

    opened(browser, site / "training.html")
    sizes = browser.js("[...document.querySelectorAll('math')].map(e => e.getBoundingClientRect().height)")
    assert len(sizes) > 20 and min(sizes) > 5
    fraction = "document.querySelector('math[display=block] mfrac')"
    assert (
        browser.js(f"getComputedStyle({fraction}).display") == "block math"
        and browser.js(f"{fraction}.offsetHeight") != 0
    )
    assert not browser.errors

    opened(browser, site / "api" / "pairs.html")
    heading = "document.getElementById('tl_adapters.PairedModel')"
    assert "PairedModel" in browser.js(f"{heading}.textContent")
    assert browser.js(f"{heading}.parentElement.textContent.includes('a route per layer')")
    assert browser.js("document.getElementById('tl_adapters.PairedModel.routed') !== null")
    assert not browser.errors


@pytest.mark.browser
def test_every_picture_is_shown(site: Path, browser: Browser) -> None:  # noqa: F811
    with_pictures = [name for name, text in pages(site).items() if "<img" in text]
    assert {"index.html", "benchmarks.html", "circuits.html"} <= {*with_pictures}
    for name in with_pictures:
        opened(browser, site / name)
        widths = browser.js("[...document.querySelectorAll('img')].map(e => [e.src.split('/').at(-1), e.naturalWidth])")
        assert not [picture for picture, width in widths if width == 0], name


@pytest.mark.browser
@pytest.mark.parametrize("page", ["index", "training", "figures", "errors", "api/circuits", "benchmarks"])
def test_no_page_is_wider_than_a_phone(page: str, site: Path, browser: Browser) -> None:  # noqa: F811
    opened(browser, site / f"{page}.html", width=400)
    assert browser.js("document.documentElement.scrollWidth") <= 400
