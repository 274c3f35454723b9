"""A circuit as an artefact, drawn, and as the page of a run, on made-up circuits and figures."""

import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import stores
from helpers.loopback_hub import COMMIT, LoopbackHub, hub  # noqa: F401  # a fixture
from helpers.loopback_server import Response
from helpers.page_values import EXAMPLES, made, whole_block
from helpers.random_models import random_model, randomise
from helpers.stores import HOSTILE

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.checkpoints.hub_client import HubError
from tl_adapters.checkpoints.model_files import CheckpointError
from tl_adapters.circuits.circuit import Circuit, CircuitEdge, CircuitError, CircuitFeature
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.pages.circuit_page import draw_circuit, page_link, write_circuit_page
from tl_adapters.pages.feature_pages import write_feature_pages
from tl_adapters.pages.report import write_report

# -- the artefact --------------------------------------------------------------------------------------------------


def test_roles_and_signs() -> None:
    circuit = made()
    assert len(circuit.ids()) == 8 and circuit.ids("suppress") == [FeatureId(0, 4), FeatureId(1, 9)]
    assert circuit.ids("output", "template") == sorted(circuit.ids("output") + circuit.ids("template"))
    assert [circuit.feature(id).sign for id in ((0, 0), (0, 4))] == [1, -1]
    with pytest.raises(CircuitError, match="not in this circuit"):
        circuit.feature((3, 39))


def test_round_trip(tmp_path: Path) -> None:
    circuit = made()
    assert circuit.save(tmp_path) == tmp_path / "circuit.json"
    circuit.save(tmp_path / "other.json")
    for place in (tmp_path, tmp_path / "circuit.json", tmp_path / "other.json"):
        back = Circuit.load(place)
        assert math.isnan(back.features[0].contrast)
        whole = replace(back.features[0], contrast=0.0)
        assert replace(back, features=()) == replace(circuit, features=())
        assert (whole, *back.features[1:]) == (replace(circuit.features[0], contrast=0.0), *circuit.features[1:])
    assert "null" in (tmp_path / "circuit.json").read_text() and "NaN" not in (tmp_path / "circuit.json").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 9}, "schema_version 9; this version of tl-adapters reads 1 or 2"),
        ({"n_features": 3}, "damaged: there is no feature 3.3 in 4 layers of 3"),
        ({"features": [{"id": [0, 1], "role": "boss"}]}, "role is 'boss'; allowed is"),
        ({"words": None}, "words is None; allowed is a list"),
        ({"features": None}, "features is None; allowed is a list"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = made().save(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CircuitError, match=words) as caught:
        Circuit.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_and_cut_files(tmp_path: Path) -> None:
    with pytest.raises(CircuitError, match="There is no circuit at .*hesitation RUN"):
        Circuit.load(tmp_path)
    path = made().save(tmp_path)
    record = json.loads(path.read_text())
    del record["strength"]
    path.write_text(json.dumps(record))
    with pytest.raises(CircuitError, match="key strength is missing"):
        Circuit.load(path)
    for text in (path.read_text()[:100], "[]"):
        path.write_text(text)
        with pytest.raises(CircuitError):
            Circuit.load(path)


def test_it_is_of_one_set_of_adapters() -> None:
    pair = randomise(PairedModel.from_pretrained(*(random_model(seed, torch.float32) for seed in (1, 2))))
    adapters = pair.installed_adapters()
    replace(made(adapters.fingerprint), fingerprints={**pair.fingerprints, **adapters.fingerprints}).require_belonging(
        pair
    )
    with pytest.raises(CircuitError, match="in a pair whose base_mlps and target have other fingerprints"):
        made(adapters.fingerprint).require_belonging(pair)
    for call in (lambda: made().require_belonging(pair), lambda: made().distinct_directions(adapters)):
        with pytest.raises(CircuitError, match=f"adapters aaaa, and .* {adapters.fingerprint}"):
            call()
    with pytest.raises(CircuitError, match="the other circuit is of bbbb"):
        made().compare(made("bbbb"))


def test_distinct_directions() -> None:
    pair = randomise(PairedModel.from_pretrained(*(random_model(seed, torch.float32) for seed in (1, 2))))
    adapters, rows = pair.installed_adapters(), torch.eye(pair.installed_adapters().d_model)
    decoder = torch.stack([rows[0], rows[0] + 0.5 * rows[1], rows[0] + 1.2 * rows[1], -rows[0], rows[2]])
    with torch.no_grad():
        adapters[0].W_dec[:5] = decoder
    features = tuple(CircuitFeature(FeatureId(0, i), "output", 1.0, 0.0, 1.0, 0.0, 1.0, 1.0) for i in range(5))
    circuit = replace(made(adapters.fingerprint), features=features)
    assert circuit.distinct_directions(adapters) == 3  # a chain of three, its opposite, and another
    assert circuit.distinct_directions(adapters, cosine=0.999) == 5
    assert replace(circuit, features=()).distinct_directions(adapters) == 0


def test_compare() -> None:
    a, b = made(n=10), made(n=8)
    b = replace(b, features=(replace(b.features[0], role="output"), *b.features[1:]))
    found = a.compare(b)
    assert (len(found.shared), len(found.only_a), found.only_b) == (8, 2, ())
    assert found.jaccard == 0.8 and found.role_agreement == 7 / 8
    empty = replace(a, features=())
    assert math.isnan(empty.compare(empty).jaccard) and empty.compare(a).jaccard == 0


def test_it_draws_itself_in_a_notebook() -> None:
    html = made(n=30, words=(HOSTILE,))._repr_html_()
    assert "<script" not in html and "<img" not in html and "and 10 more" in html
    assert html.count("<circle") == 30
    empty = replace(made(), features=())
    assert "no features" in empty._repr_html_() and "<svg" not in empty._repr_html_()


def test_it_is_a_table_of_its_features() -> None:
    circuit = made(n=12)
    frame = circuit.to_pandas()
    assert list(zip(frame["layer"], frame["index"], strict=True)) == [tuple(f.id) for f in circuit.features]
    assert frame["total"].tolist() == pytest.approx([f.total for f in circuit.features], nan_ok=True)
    assert list(replace(circuit, features=()).to_pandas()) == list(frame)
    assert json.loads(json.dumps(circuit.to_dict(), allow_nan=False)) == json.loads(circuit.json_text())
    assert "'hesitation'" in repr(circuit) and len(repr(circuit)) < 200


# -- the hub -------------------------------------------------------------------------------------------------------


def test_up_and_down(hub: LoopbackHub) -> None:  # noqa: F811
    circuit = replace(made(), features=made().features[1:])
    with pytest.raises(HubError, match=r"did not take circuits/hesitation.json into user/repo, .*its adapters.*404"):
        circuit.push_to_hub("user/repo")
    with pytest.raises(HubError, match="give user/name"):
        circuit.push_to_hub("not a name")
    hub.files["user/repo"] = {}
    assert circuit.push_to_hub("user/repo") == f"{hub.server.url}/user/repo/commit/{COMMIT}"
    assert Circuit.from_hub("user/repo") == circuit
    with pytest.raises(CircuitError, match="holds no circuit 'doubt'"):
        Circuit.from_hub("user/repo", "doubt")
    with pytest.raises(CheckpointError, match="404"):
        Circuit.from_hub("user/none")
    with pytest.raises(CircuitError, match="is not a valid name of a circuit"):
        circuit.push_to_hub("user/repo", "../secret")
    hub.fault = lambda request: Response(reset=True)
    with pytest.raises(HubError, match="Check the network"):
        circuit.push_to_hub("user/repo")


# -- the drawing and the page --------------------------------------------------------------------------------------


def stored() -> tuple[Circuit, Any]:
    """A circuit of the alive features of a store with hostile tokens and labels."""
    store = stores.new_store()
    store.vocabulary = [HOSTILE if i % 2 else "\ud800\x00" for i in range(len(store.vocabulary))]
    ids = store.ids()[:20]
    features = tuple(replace(f, id=id) for f, id in zip(made(n=20).features, ids, strict=True))
    edges = (CircuitEdge(ids[1], None, 0.5), CircuitEdge(ids[0], ids[1], 0.2))
    return replace(made(store.about.fingerprints["adapters"]), features=features, edges=edges), store


def test_the_drawing() -> None:
    circuit, store = stored()
    svg = draw_circuit(replace(circuit, words=("</script><b>",)), store, lambda id: f'p"{id.index}.html')
    assert "<script" not in svg and "<b>" not in svg and "<img" not in svg and 'href="p"' not in svg
    assert svg.count("<circle") == 20 and svg.count("<path") == 2 and "nan" not in svg
    assert "a &lt;b&gt;bold&lt;/b&gt;" in svg  # the label
    assert (
        draw_circuit(made(n=300), None, lambda id: None).count("<circle") == 60 * 4
    )  # of five roles' worth, two are output
    assert draw_circuit(replace(circuit, features=(), edges=())).startswith("<svg")


def test_the_page_of_a_whole_block(tmp_path: Path) -> None:
    circuit, store = stored()
    write_feature_pages(stores.new_store(), tmp_path / "features" / "pages", features=circuit.ids(), progress=False)
    html = write_circuit_page(tmp_path, whole_block(), circuit, store, EXAMPLES).read_text()
    assert (
        "<script" not in html
        and "<img" not in html
        and "nan" not in html.lower()
        and not re.findall(r"https?:(?!//www\.w3\.org/)", html)
    )
    first = circuit.ids()[0]
    address = page_link(tmp_path, store)(first)
    assert address and (tmp_path / address.partition("#")[0]).is_file() and f'href="{address}"' in html
    for text in (
        "Necessity",
        "Sufficiency",
        "Transfer",
        "Injected",
        "On given text",
        "By number of features",
        "a steering",
    ):
        assert text in html
    assert "<mark>Wait</mark>" in html and "the words banned" in html and "missed" in html


def test_the_page_says_how_controls_were_set_and_what_every_condition_harms(tmp_path: Path) -> None:
    html = write_circuit_page(tmp_path, whole_block(), made(), None, EXAMPLES).read_text()
    controls, necessity, sufficiency, injected = (
        html.partition(f"<h2>{title}")[2].partition("<h2>")[0]
        for title in ("Controls", "Necessity", "Sufficiency", "Injected")
    )
    assert "80.0 % → 30.0 %" in controls and "<b>not reached</b>" in controls and "after layer 2" in controls
    assert controls.count("not reached") == 1
    for shown in ("KL elsewhere, nats per token", "0.0213", "0.0417"):  # of the circuit, of steering
        assert shown in necessity
    assert "KL elsewhere" not in sufficiency, "where it was not measured"
    assert "the whole circuit, at strength 1.5" in sufficiency and "as many of the most active others" in injected


def test_the_page_says_what_answered_the_problems(tmp_path: Path) -> None:
    engine = {"name": "vLLM", "dtype": "bfloat16", "by_our_own": ["words banned", "<b>steered"]}
    html = write_circuit_page(tmp_path, {**whole_block(), "engine": engine}, made(), None, EXAMPLES).read_text()
    assert "vLLM in bfloat16; by our own engine: words banned, &lt;b&gt;steered" in html
    assert "problems answered by" not in write_circuit_page(tmp_path, whole_block(), made(), None, EXAMPLES).read_text()


def test_the_page_copes_with_anything_absent(tmp_path: Path) -> None:
    block = whole_block()
    for name in [None, *block]:
        without = {k: v for k, v in block.items() if k not in (name, "dose", "dose_curves")}  # plots are slow
        write_circuit_page(tmp_path, without, made(), None, [])
        write_circuit_page(tmp_path, {name: block[name]} if name else {}, made(), None, [])
    for name in ("necessity", "sufficiency"):
        for condition in block[name]:
            less = {"circuit": block["circuit"], name: {k: v for k, v in block[name].items() if k != condition}}
            write_circuit_page(tmp_path, less, made(), None, [])
    html = write_circuit_page(tmp_path, {}, replace(made(), features=(), edges=()), stores.store(), []).read_text()
    assert "No feature was found" in html


def test_the_report_links_to_it(tmp_path: Path) -> None:
    results = {
        "schema_version": 1, "pair": {"base": "b", "target": "t", "n_layers": 4, "d_model": 8},
        "train": {"n_features": 40}, "hesitation": json.loads(json.dumps(whole_block()).replace("NaN", "null")),
    }  # fmt: skip
    for block in (results["hesitation"], {"words": ["wait"]}):
        (tmp_path / "results.json").write_text(json.dumps({**results, "hesitation": block}))
        html = write_report(tmp_path).read_text()
        assert 'href="hesitation.html"' in html and "<script" not in html and "The hesitation circuit" in html


@pytest.mark.browser
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        if os.environ.get("CI"):
            pytest.fail("CI needs a Chromium; .ci/run installs one")
        pytest.skip("no Chromium on this machine")
    circuit, store = stored()
    path = write_circuit_page(tmp_path, whole_block(), circuit, store, EXAMPLES)
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0",
        f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'page.png'}", "--window-size=1120,4600",
        "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    assert done.stdout.count("<circle") >= 20 and done.stdout.count("<svg") == 1 + 9 + 2 + 2
    assert (tmp_path / "page.png").stat().st_size > 20_000
