"""sae-dashboard's pages, made where the package is (make dashboards); elsewhere the error that says how to get it."""

import json
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.browser import Browser, browser  # noqa: F401  # a fixture
from helpers.stores import documents, random_pair, store

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.data.traces import DataError
from tl_adapters.features.firing_reader import features_read_on
from tl_adapters.features.logit_effects import logit_effects
from tl_adapters.interop.neuronpedia import write_neuronpedia
from tl_adapters.interop.sae_dashboard import INSTALL_COMMAND, DashboardError, _safe_page, write_sae_dashboard
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel
from tl_adapters.study.open_run import load_organism_pair

installed = pytest.mark.skipif(find_spec("sae_dashboard") is None, reason="sae-dashboard is not installed here")
LENGTH = 40


@pytest.mark.skipif(find_spec("sae_dashboard") is not None, reason="sae-dashboard is installed here")
def test_without_the_package_the_error_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(DashboardError, match=re.escape(INSTALL_COMMAND)):
        write_sae_dashboard(random_pair(), documents(), [FeatureId(0, 1)], tmp_path / "pages")
    assert not list(tmp_path.iterdir())


def dashboard(page: Path) -> dict[str, Any]:
    """The data in a page of sae-dashboard, by feature."""
    found = re.search(r'\{"AGGDATA".*', page.read_text())
    assert found
    return json.JSONDecoder().raw_decode(found[0])[0]["DASHBOARD_DATA"]


@cache
def pair_of(activation: str) -> PairedModel:
    """The built-in pair with random adapters of an activation; a threshold that keeps some of what is positive."""
    if activation == "relu":
        return random_pair()
    pair = load_organism_pair()
    adapters = pair.new_adapters(40, seed=5, activation=activation, k=4 if activation == "topk" else None)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for weight in adapters.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator).abs() if weight.ndim == 1
                         else 0.3 * torch.randn(weight.shape, generator=generator))  # fmt: skip
    return pair


@installed
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize(
    ("activation", "stream"), [("relu", "replacement"), ("relu", "target"), ("jumprelu", "target")]
)
def test_it_reads_the_stream_and_writes_what_the_layer_does(activation: str, stream: str, tmp_path: Path) -> None:
    """Strongest activations and effects against our own, in decoder-norm units; the model is as it was."""
    pair = pair_of(activation)
    ids = [FeatureId(*id) for id in (store().ids()[5], *store().ids()[50:52])]  # of no set: the pair may be another
    routes = pair.routes
    pages = write_sae_dashboard(pair, documents(), ids, tmp_path / "pages", stream=stream, length=LENGTH)
    assert [page.name for page in pages] == [f"layer_{layer}.html" for layer in sorted({id.layer for id in ids})]
    assert pair.routes == routes
    rows = torch.tensor([t.tokens[:LENGTH] for t in documents() if len(t.tokens) >= LENGTH])
    with torch.no_grad(), features_read_on(pair, stream), pair.recorded(ACTS_HOOK) as acts:
        pair.model(rows)
    for layer, index in ids:
        shown = dashboard(tmp_path / "pages" / f"layer_{layer}.html")[str(index)]
        row = pair.installed_adapters()[layer].W_dec[[index]].detach()
        values = acts[layer][..., index] * row.norm()
        text = json.dumps(shown)
        maximum, density = re.search(r"MAX = ([\d.]+)", text), re.search(r"DENSITY = ([\d.]+)%", text)
        assert maximum and density
        # It takes no examples from a document's ends, and its maximum from everywhere.
        assert float(maximum[1]) == pytest.approx(float(values.max()), abs=2e-3)
        assert float(density[1]) / 100 == pytest.approx(float((values > 0).double().mean()), abs=1e-4)
        effects = logit_effects(pair, layer, row / row.norm())[0]
        (table,) = shown["logitsTableData"].values()
        best = effects.topk(10).values.tolist()
        assert [float(entry["value"]) for entry in table["posLogits"]] == pytest.approx(best, abs=6e-3)


@installed
@pytest.mark.browser
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_its_page_opens_offline(browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    (page,) = write_sae_dashboard(random_pair(), documents(), store().ids()[:2], tmp_path / "pages", length=LENGTH)
    assert not re.findall(r'<(?:script|link)[^>]+(?:src|href)="http', page.read_text())
    browser.errors.clear()
    browser.send("Page.navigate", url=page.as_uri())
    browser.until(lambda: browser.js("document.querySelectorAll('.js-plotly-plot svg').length"))
    assert "TOP ACTIVATIONS" in browser.js("document.body.innerText")
    assert not [error for error in browser.errors if '"error"' in error or "exception" in error]


@pytest.mark.browser
def test_tokens_that_look_like_html_are_text(browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    """A page built as sae-dashboard builds it, which writes tokens into a script and into HTML."""
    token = "</script><script>window.ran = 1</script><img src=x onerror=window.ran=1>"
    data = json.dumps({"AGGDATA": {}, "DASHBOARD_DATA": {"3": {"tok": token}}})
    page = (
        "<div class='grid-container'><div id='column-0' style='width: 300px'></div></div>\n<style>code { color: red }\n"
        '</style>\n<script src="https://d3js.org/d3.v6.min.js"></script>\n'
        '<script src="https://cdn.plot.ly/plotly-latest.min.js"></script>\n<script>\n'
        "const tok = defineData().DASHBOARD_DATA[3].tok;\n"
        "d3.select('#column-0').append('p').html(`<code>${tok}</code> (3)`);\n"
        "document.body.dataset.text = `|${tok}|<br>`; document.body.dataset.ready = 1;\n"
        f"function defineData() {{ return {data}; }}\n</script>\n"
    )
    (tmp_path / "page.html").write_text(_safe_page(page))
    browser.errors.clear()
    browser.open(tmp_path / "page.html")
    assert browser.js("document.querySelector('code').textContent") == token
    assert browser.js("window.ran === undefined && document.querySelectorAll('img').length === 0")
    assert "&#60;img" in browser.js("document.body.dataset.text")
    assert browser.js("performance.getEntriesByType('resource').length") == 0 and not browser.errors
    with pytest.raises(DashboardError, match="not as expected"):
        _safe_page("<p>another version</p>")


@installed
def test_its_own_reader_takes_our_neuronpedia_files(tmp_path: Path) -> None:
    from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch

    write_neuronpedia(store(), tmp_path / "up", "m", "s", progress=False)
    for path in (tmp_path / "up").glob("*/batch-*.json"):
        record = json.loads(path.read_text())
        assert NeuronpediaDashboardBatch(**record).to_dict() == record


@installed
def test_refusals(tmp_path: Path) -> None:
    pair, ids, folder = random_pair(), store().ids()[:1], tmp_path / "pages"
    for wrong, message in (([], "No features"), ([(0, 40)], "no such features in layer 0"), ([(7, 0)], "layer 7")):
        with pytest.raises(DashboardError, match=message):
            write_sae_dashboard(pair, documents(), wrong, folder)
    with pytest.raises(DashboardError, match="topk"):
        write_sae_dashboard(pair_of("topk"), documents(), ids, folder)
    with pytest.raises(DataError, match="0 documents of 9999 tokens"):
        write_sae_dashboard(pair, documents(), ids, folder, length=9999)
    with pytest.raises(DataError, match="at least 32"):
        write_sae_dashboard(pair, documents(), ids, folder, length=12)
    assert not folder.exists()
