"""The feature pages: what they hold, and what they do in a browser with the network blocked."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import Browser, browser  # noqa: F401  # a fixture
from helpers.stores import HOSTILE, OPTIONS, WORDS, documents, new_store, random_pair, store

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.features.collect import collect_features
from tl_adapters.features.feature import Example, FeatureStoreError, Label
from tl_adapters.features.store import FeatureStore
from tl_adapters.features.stream_agreement import stream_agreement
from tl_adapters.pages import feature_pages
from tl_adapters.pages.feature_pages import INDICES_PER_PAGE, feature_address, write_feature_pages
from tl_adapters.utils.files import FolderExistsError


def held(page: Path) -> dict[str, Any]:
    """The data in a page."""
    found = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    assert len(found) == 1
    assert not set("<>&\u2028\u2029") & set(found[0])
    return json.loads(found[0])


def close(shown: Any, true: Any) -> bool:
    """Equal to four figures, lists within lists too."""
    if isinstance(true, list | tuple):
        return len(shown) == len(true) and all(map(close, shown, true))
    return shown == pytest.approx(true, rel=1e-3, abs=1e-12)


@pytest.fixture(scope="module")
def hostile() -> FeatureStore:
    """A store in which the names of the models, the commonest token, a label and a category look like HTML."""
    found = new_store()
    found.about = replace(found.about, base=HOSTILE, target=HOSTILE)
    vocabulary = list(found.vocabulary)
    vocabulary[vocabulary.index("+")] = HOSTILE
    vocabulary[vocabulary.index(".\n")] = ". \n\u202e"
    found.vocabulary = vocabulary
    found.set_labels({found.ids()[0]: Label(HOSTILE, HOSTILE, HOSTILE, 0.5)})
    return found


@pytest.fixture(scope="module")
def folder(hostile: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages of it."""
    return write_feature_pages(hostile, tmp_path_factory.mktemp("pages") / "pages", progress=False).parent


def test_the_index_holds_the_table(folder: Path, hostile: FeatureStore) -> None:
    data, table = held(folder / "index.html"), hostile.table()
    columns, strings = data["columns"], data["strings"]
    for name in ("layer", "index", "firings"):
        assert columns[name] == table[name]
    for name in ("density", "mean", "max", "decoder_norm", "region_share"):
        assert close(columns[name], table[name])
    for name in ("region", "label", "category"):
        assert [strings[i] if i >= 0 else "" for i in columns[name]] == table[name]
    for name, column in (("fires_on", "fires_on"), ("promotes", "top_logits"), ("suppresses", "bottom_logits")):
        flat = [strings[i] if i >= 0 else None for i in data["lists"][name]]
        rows = [[text for text in flat[i : i + data["width"]] if text is not None] for i in range(0, len(flat), 3)]
        assert rows == table[column]
    assert data["words"] == list(WORDS)
    for place, values in enumerate(data["effects"]):
        assert close(values, [row[place] for row in table["effects"]])
    assert len(set(strings)) == len(strings) and all(columns["page"])
    facts = dict(data["facts"])
    assert f"{hostile.tokens:,} tokens" in facts["read on"] and "report" in facts["read on"]
    assert facts["alive features"].startswith(f"{len(hostile.ids())} of 200")
    assert dict(data["more"])["fingerprint, adapters"] == hostile.about.fingerprints["adapters"]


def all_pages(folder: Path) -> dict[FeatureId, tuple[Path, dict[str, Any], dict[str, Any]]]:
    """Feature -> its page's path, the page's data, and its own."""
    pages = [(path, held(path)) for path in sorted(folder.glob("*/*.html"))]
    return {FeatureId(d["layer"], f["index"]): (path, d, f) for path, d in pages for f in d["features"]}


def test_every_alive_feature_has_one_page_at_its_address(folder: Path, hostile: FeatureStore) -> None:
    found = all_pages(folder)
    assert sorted(found) == hostile.ids()
    assert sum(len(held(p)["features"]) for p in (folder).glob("*/*.html")) == len(found)
    for name, (path, data, _) in found.items():
        assert f"{path.parent.name}/{path.name}#{name.index}" == feature_address(name)
        assert {f["index"] // INDICES_PER_PAGE for f in data["features"]} == {name.index // INDICES_PER_PAGE}
    ends = {tuple(d["before"] or ()) for _, d, _ in found.values()}
    order = hostile.ids()
    firsts = [name for name in order if found[name][1]["features"][0]["index"] == name.index]
    assert ends == {(), *(order[order.index(name) - 1] for name in firsts[1:])}
    assert all(found[name][1]["after"] == list(order[order.index(name) + len(found[name][1]["features"])])
               for name in firsts[:-1])  # fmt: skip


def test_a_page_holds_the_feature(folder: Path, hostile: FeatureStore) -> None:
    for name, (_, data, shown) in list(all_pages(folder).items())[::17]:
        feature, strings = hostile.feature(name), data["strings"]
        for figure in ("density", "mean", "max", "decoder_norm", "effect_spread", "effect_kurtosis"):
            assert close(shown[figure], getattr(feature, figure))
        assert shown["firings"] == feature.firings
        for key, logits in (("promotes", feature.top_logits), ("suppresses", feature.bottom_logits)):
            assert [strings[i] for i, _ in shown[key]] == [text for text, _ in logits]
            assert close([v for _, v in shown[key]], [v for _, v in logits])
        assert close(shown["effects"], list(feature.effects.values()))
        assert sum(count for _, _, count in shown["histogram"]) == feature.firings
        assert close(shown["effect_histogram"], feature.effect_histogram)
        assert shown["regions"] == [
            [region, pytest.approx(rate, rel=1e-3), pytest.approx(feature.region_share[region], rel=1e-3)]
            for region, rate in feature.regions.items()
        ]
        assert close(shown["thinking"], list(feature.thinking_deciles))
        assert shown["domains"] == [["sums", pytest.approx(feature.domains["sums"], rel=1e-3)]]
        examples: tuple[Example, ...]
        for key, examples in (("top", feature.top_examples), ("sample", feature.random_examples)):
            assert len(shown[key]) == len(examples) > 0
            for example, (at, document, position, region, tokens, values) in zip(examples, shown[key], strict=True):
                assert (at, document, position) == (example.token_index, example.document, example.position)
                assert region == hostile.region_of(example)
                assert [strings[i] for i in tokens] == list(example.tokens)
                dense = [0.0] * len(tokens)
                for place, value in values:
                    dense[place] = value
                assert close(dense, list(example.values)) and dense[at] > 0
        assert [tuple(n["id"]) for n in shown["neighbours"]] == [n.id for n in feature.coactivating]


def test_neurons_are_called_neurons(tmp_path: Path) -> None:
    found = collect_features(
        random_pair(), documents()[:8], kind="neuron", stream="target", split="report", options=OPTIONS, progress=False
    )
    write_feature_pages(found, tmp_path / "pages", features=found.ids()[:2], progress=False)
    (layer,) = {name.layer for name in found.ids()[:2]}
    assert {path.name for path in (tmp_path / "pages" / f"layer_{layer}").iterdir()} == {
        Path(feature_address(name, "neuron")).name.partition("#")[0] for name in found.ids()[:2]
    }
    data = held(tmp_path / "pages" / "index.html")
    assert data["kind"] == "neuron" and data["words"] == [] == data["effects"]
    assert "alive neurons" in dict(data["facts"]) and "MLPs" in dict(data["facts"])["stream"]
    body = (tmp_path / "pages" / "index.html").read_text().rpartition("</style>")[2].partition("<script")[0]
    assert "feature" not in body.lower() and "neuron" in body


def test_the_agreement_of_the_streams_is_told(tmp_path: Path) -> None:
    found = new_store()
    found.set_agreement(stream_agreement(random_pair(), documents()[:8]))
    write_feature_pages(found, tmp_path / "pages", features=[], progress=False)
    data = held(tmp_path / "pages" / "index.html")
    overlaps = [layer["overlap"]["value"] for layer in found.agreement]
    assert f"{min(overlaps):.0%} to {max(overlaps):.0%}" in dict(data["facts"])["streams agree on"]
    assert [dict(data["more"])[f"streams, layer {i}"].split("%")[0] for i in range(5)] == [
        f"{100 * value:.1f}" for value in overlaps
    ]


class Tags(HTMLParser):
    """Every tag closed, and what is asked of an accessible page."""

    void = ("meta", "link", "input", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_pages_are_valid_self_contained_and_run_only_their_own_script(folder: Path) -> None:
    for path in (folder / "index.html", next(folder.glob("layer_0/*.html"))):
        page = path.read_text()
        tags = Tags()
        tags.feed(page)
        assert not tags.open and ("html", {"lang": "en"}) in tags.seen
        assert [tag for tag, _ in tags.seen].count("title") == 1 and "@@" not in page
        assert "main" in [tag for tag, _ in tags.seen]
        ids = [a["id"] for _, a in tags.seen if "id" in a]
        assert len(ids) == len(set(ids))
        assert not any("style" in a or any(key.startswith("on") for key in a) for _, a in tags.seen)
        links = [a[key] for _, a in tags.seen for key in ("src", "href") if key in a]
        assert set(links) <= {"data:,", "../index.html"}
        policy = next(a["content"] for tag, a in tags.seen if a.get("http-equiv") == "Content-Security-Policy")
        assert policy is not None and policy.startswith("default-src 'none'") and "unsafe" not in policy
        for kind, pattern in (("script-src", r"<script>(.*?)</script>"), ("style-src", r"<style>(.*?)</style>")):
            texts = re.findall(pattern, page, re.DOTALL)
            digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
            hashes = " ".join(f"'sha256-{digest}'" for digest in digests)
            assert hashes and f"{kind} {hashes};" in policy
    for name in ("common.js", "index.js", "feature.js"):
        script = (Path(feature_pages.__file__).parent / "templates" / "feature_pages" / name).read_text()
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|XMLHttp", script)


def test_what_cannot_be_shown_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    for wrong, message in (
        ({"words": ["Wait", "nothing"]}, "no effects on 'nothing'; it has 'Wait', 'Hmm', '='"),
        ({"features": [(0, 40)]}, r"0\.40 is not alive"),
    ):
        with pytest.raises(FeatureStoreError, match=message):
            write_feature_pages(store(), tmp_path / "pages", progress=False, **wrong)
    broken = new_store()
    statistics, _ = broken.layer(broken.about.layers[-1])
    statistics.summed_activation[broken.ids()[-1].index] = float("nan")
    with pytest.raises(FeatureStoreError, match="not finite"):
        write_feature_pages(broken, tmp_path / "pages", progress=False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "pages").mkdir()
    with pytest.raises(FolderExistsError):
        write_feature_pages(store(), tmp_path / "pages", progress=False)
    assert not list((tmp_path / "pages").iterdir())


def test_chosen_features_and_words(tmp_path: Path) -> None:
    """The index still lists all; only those with a page are linked, and walked through."""
    chosen = [store().ids()[3], store().ids()[120]]
    write_feature_pages(store(), tmp_path / "pages", words=["=", "Wait"], features=chosen, progress=False)
    index, found = held(tmp_path / "pages" / "index.html"), all_pages(tmp_path / "pages")
    assert len(index["columns"]["layer"]) == len(store().ids()) and sum(index["columns"]["page"]) == 2
    assert index["words"] == ["=", "Wait"]
    assert close(index["effects"], [[row[i] for row in store().table()["effects"]] for i in (2, 0)])
    assert sorted(found) == chosen
    first, second = (found[name][1] for name in chosen)
    assert (first["before"], first["after"], second["before"], second["after"]) == (
        None, list(chosen[1]), list(chosen[0]), None)  # fmt: skip
    assert all(n["page"] == (tuple(n["id"]) in chosen) for _, _, f in found.values() for n in f["neighbours"])


# -- in a browser -------------------------------------------------------------------------------------------------

ROWS = "[...document.querySelectorAll('#rows tr')].map(row => row.dataset.name)"
COUNT = "document.querySelector('#count').textContent"


@pytest.fixture
def tab(browser: Browser, folder: Path) -> Iterator[Browser]:  # noqa: F811
    """The index, open; a test that makes a page complain fails."""
    browser.errors.clear()
    browser.open(folder / "index.html")
    browser.js("sessionStorage.clear()")
    yield browser
    browser.js("0")
    assert not browser.errors


def choose(tab: Browser, name: str, value: str) -> None:
    """Set a filter as a hand would."""
    tab.js(
        f"(e => {{ e.value = {json.dumps(value)}; e.dispatchEvent(new Event('input', {{bubbles: true}})); }})"
        f"(document.getElementById('{name}'))"
    )
    tab.js("new Promise(done => setTimeout(done, 30))")


def names(hostile: FeatureStore, chosen: list[int]) -> list[str]:
    table = hostile.table()
    return [f"{table['layer'][i]}.{table['index'][i]}" for i in chosen]


@pytest.mark.browser
def test_the_index_sorts(tab: Browser, hostile: FeatureStore) -> None:
    table = hostile.table()
    n = range(len(table["layer"]))
    assert tab.js(ROWS) == names(hostile, list(n)) and tab.js(COUNT) == f"1\u2013{len(n)} of {len(n)}"
    short = [float(f"{density:.4g}") for density in table["density"]]
    tab.click("[data-sort=density]")
    assert tab.js(ROWS) == names(hostile, sorted(n, key=lambda i: (-short[i], -i)))
    assert tab.js("document.querySelector('[aria-sort]').textContent") == "Density"
    tab.click("[data-sort=density]")
    assert tab.js(ROWS) == names(hostile, sorted(n, key=lambda i: short[i]))
    choose(tab, "word", "1")
    tab.click("[data-sort=effect]")
    first = max(n, key=lambda i: table["effects"][i][1])
    assert tab.js(ROWS)[0] == names(hostile, [first])[0]
    tab.click("[data-sort=label]")
    assert tab.js(ROWS)[:3] == names(hostile, [0, 1, 2]), "labelled ones first, the others in their order"
    tab.click("[data-sort=label]")
    assert tab.js(ROWS)[:2] == names(hostile, [1, 0]), "and still before those without a label"


@pytest.mark.browser
def test_the_index_filters_and_searches(tab: Browser, hostile: FeatureStore) -> None:
    table = hostile.table()
    n = range(len(table["layer"]))
    choose(tab, "layer", "3")
    assert tab.js(ROWS) == names(hostile, [i for i in n if table["layer"][i] == 3])
    choose(
        tab, "region", tab.js("[...document.querySelector('#region').options].find(o => o.text == 'thinking').value")
    )
    choose(tab, "density-from", "0.1")
    choose(tab, "effect-to", "0")
    expected = [i for i in n if table["layer"][i] == 3 and table["region"][i] == "thinking"
                and table["density"][i] >= 0.1 and table["effects"][i][0] <= 0]  # fmt: skip
    assert 0 < len(expected) < 40 and tab.js(ROWS) == names(hostile, expected)
    address = tab.js("location.hash")
    tab.js("history.replaceState(null, '', '#')")
    tab.click("#clear")
    assert len(tab.js(ROWS)) == len(n) and tab.js("location.hash") == ""
    tab.js(f"location.hash = {json.dumps(address)}")
    tab.js("new Promise(done => setTimeout(done, 30))")
    assert tab.js(ROWS) == names(hostile, expected), "the address says it all"
    tab.click("#clear")
    tab.key("/")
    tab.type("<IMG")
    tab.js("new Promise(done => setTimeout(done, 30))")
    lists = [table[key] for key in ("fires_on", "top_logits", "bottom_logits")]
    expected = [i for i in n if HOSTILE in [*(text for rows in lists for text in rows[i]), table["label"][i]]]
    assert 0 < len(expected) < len(n) and tab.js(ROWS) == names(hostile, expected)
    choose(tab, "q", "2.1")
    assert tab.js(ROWS) == names(
        hostile, [i for i in n if re.match(r"2\.1", f"{table['layer'][i]}.{table['index'][i]}")]
    )
    choose(tab, "q", "no such thing")
    assert tab.js(ROWS) == [] and tab.js("document.querySelector('#nothing').checkVisibility()")
    for broken in ("#layer=99&sort=none&page=x&word=7&densityFrom=-", "#%", "#page=99"):
        tab.js(f"location.hash = {json.dumps(broken)}")
        tab.js("new Promise(done => setTimeout(done, 30))")
        assert len(tab.js(ROWS)) == len(n)


@pytest.mark.browser
def test_the_plot_counts_and_chooses(tab: Browser, hostile: FeatureStore) -> None:
    assert tab.js("[...document.querySelectorAll('.cell')].reduce((a, e) => a + Number(e.dataset.count), 0)") == len(
        hostile.ids()
    )
    fullest = "[...document.querySelectorAll('.cell')].sort((a, b) => b.dataset.count - a.dataset.count)[0]"
    count = int(tab.js(f"{fullest}.dataset.count"))
    tab.js(f"{fullest}.dispatchEvent(new Event('click'))")
    assert len(tab.js(ROWS)) == count > 0
    assert tab.js("document.querySelectorAll('.cell.chosen').length") == 1
    tab.js("document.querySelector('.cell.chosen').dispatchEvent(new Event('click'))")
    assert len(tab.js(ROWS)) == len(hostile.ids())


@pytest.mark.browser
def test_a_link_leads_to_the_feature_and_back(tab: Browser, hostile: FeatureStore) -> None:
    choose(tab, "layer", "2")
    name = [id for id in hostile.ids() if id.layer == 2][4]
    feature = hostile.feature(name)
    tab.click(f"[data-name='{feature.name}'] a")
    ready = lambda text: tab.until(lambda: tab.js("document.body?.dataset.ready") == text)  # noqa: E731
    ready(feature.name)
    assert tab.js("document.querySelector('h1').textContent") == f"Feature {feature.name}"
    assert tab.js("document.title").startswith(feature.name)
    assert f"{feature.firings:,} in all" in tab.js("document.querySelector('.figures').textContent")
    at = tab.js("[...document.querySelectorAll('.at')].map(e => [e.textContent, Number(e.dataset.value)])")
    examples = (*feature.top_examples, *feature.random_examples)
    assert [text for text, _ in at] == [e.tokens[e.token_index] for e in examples]
    assert close([value for _, value in at], [e.values[e.token_index] for e in examples])
    texts = tab.js("[...document.querySelectorAll('.text')].map(e => e.textContent)")
    assert texts == ["".join(e.tokens) for e in examples], "signs are not part of the text"
    active = tab.js("[...document.querySelectorAll('.text [data-value]')].length")
    assert active == sum(value > 0 for e in examples for value in e.values)
    order = hostile.ids()
    after = order[order.index(name) + 1]
    tab.key("ArrowRight")
    ready(f"{after.layer}.{after.index}")
    tab.click("#before")
    ready(feature.name)
    near = next(n for n in feature.coactivating if n.id.layer != 2)
    link = f"a[href='../{feature_address(near.id)}']"
    assert tab.js(f'document.querySelector("{link}").textContent') == f"{near.id.layer}.{near.id.index}"
    tab.js(f'document.querySelector("{link}").click()')
    ready(f"{near.id.layer}.{near.id.index}")
    tab.click("#index")
    tab.until(lambda: tab.js("document.querySelectorAll('#rows tr').length"))
    assert tab.js("document.querySelector('#layer').value") == "2", "back to where one was"


@pytest.mark.browser
def test_any_feature_of_a_page_is_shown(tab: Browser, folder: Path, hostile: FeatureStore) -> None:
    path = folder / "layer_1" / "features_0.html"
    tab.open(path)
    first = held(path)["features"][0]["index"]
    assert tab.js("document.body.dataset.ready") == f"1.{first}"
    for feature in held(path)["features"][::5]:
        tab.js(f"location.hash = '#{feature['index']}'")
        tab.until(lambda f=feature: tab.js("document.body.dataset.ready") == f"1.{f['index']}")
        assert tab.js("document.querySelectorAll('.examples li').length") == len(feature["top"] + feature["sample"])
    tab.js("location.hash = '#999'")
    tab.until(lambda: "holds no feature 1.999" in tab.js("document.querySelector('main').textContent"))


@pytest.mark.browser
def test_hostile_text_is_shown_as_text(tab: Browser, folder: Path, hostile: FeatureStore) -> None:
    name = hostile.ids()[0]
    assert HOSTILE in tab.js("document.querySelector('#rows .label').textContent")
    assert HOSTILE in tab.js("[...document.querySelectorAll('#rows .token')].map(e => e.textContent)")
    assert HOSTILE in tab.js("[...document.querySelectorAll('#category option')].map(e => e.textContent)")
    assert tab.js("document.querySelectorAll('img, b').length") == 0
    tab.open(folder / feature_address(name).partition("#")[0], f"#{name.index}")
    assert tab.js("document.querySelector('h1').textContent").endswith(HOSTILE)
    assert HOSTILE in tab.js("document.querySelector('main').textContent")
    assert tab.js("document.querySelectorAll('img, b').length") == 0
    assert tab.js("performance.getEntriesByType('resource').length") == 0
    signs = tab.js("[...new Set([...document.querySelectorAll('.text .sign')].map(e => e.dataset.sign))].sort()")
    assert signs == ["·", "↵", "⟨202E⟩"], "what cannot be seen, or turns the text around, has a sign"


@pytest.mark.browser
def test_a_copy_has_the_text_itself(tab: Browser, folder: Path, hostile: FeatureStore) -> None:
    name = next(id for id in hostile.ids() if "\n" in "".join(hostile.feature(id).top_examples[0].tokens))
    tab.open(folder / feature_address(name).partition("#")[0], f"#{name.index}")
    copied = tab.js(
        "(() => { getSelection().selectAllChildren(document.querySelector('.text'));"
        " const event = new ClipboardEvent('copy', {clipboardData: new DataTransfer(), bubbles: true});"
        " document.dispatchEvent(event); return event.clipboardData.getData('text/plain'); })()"
    )
    assert copied == "".join(hostile.feature(name).top_examples[0].tokens)
    assert tab.js("document.querySelector('.text').innerText.includes('\\n')") is False, "yet a line is a line"


@pytest.mark.browser
def test_a_script_put_into_the_page_does_not_run(browser: Browser, folder: Path) -> None:  # noqa: F811
    browser.open(folder / "index.html")
    browser.js(
        "(() => { const e = document.createElement('script'); e.textContent = 'window.ran = true';"
        " document.body.append(e); })()"
    )
    assert browser.js("window.ran === undefined")
    browser.js("0")
    assert browser.errors and all("Content Security Policy" in error for error in browser.errors)
    browser.errors.clear()


def test_half_a_character_in_a_label_is_replaced(tmp_path: Path) -> None:
    """A judge's JSON can spell one, and no page can hold it."""
    found = copy(store())
    id = found.ids()[0]
    found.set_labels({id: Label("a\ud83d", "b\ud83d", "c\ud83d")})
    assert found.labels[id] == Label("a?", "b?", "c?")
    index = write_feature_pages(found, tmp_path / "pages", features=[id], progress=False)
    assert "a?" in index.read_text()
