"""Notebook views of features: their contents, escaped and without network."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.browser import Browser, browser  # noqa: F401  # a fixture
from helpers.stores import HOSTILE, documents, random_pair, store

from tl_adapters.data.tokens import WITHHELD
from tl_adapters.data.traces import Trace
from tl_adapters.errors import UserError
from tl_adapters.features.feature import Label, feature_view
from tl_adapters.features.firing_reader import features_read_on
from tl_adapters.features.notebook_view import show_attention, show_features
from tl_adapters.models.paired_model import ACTS_HOOK
from tl_adapters.utils.notebook import NotebookView, circuitsvis_view

CALL = re.compile(r'CircuitsVis\.render\("([\w-]+)", CircuitsVis\.(\w+), (\{.*?\})\);')


def calls(view: NotebookView) -> list[tuple[str, dict[str, object]]]:
    """The components of a view, and what they are given; each has its place, the script is there once."""
    html = view._repr_html_()
    assert html.count('<script type="module">') == html.count("</script>") <= 1
    head, _, script = html.partition("<script")
    found = CALL.findall(script)
    assert all(f'<div id="{name}"' in head for name, _, _ in found) and len({name for name, _, _ in found}) == len(
        found
    )
    return [(component, json.loads(properties)) for _, component, properties in found]


def test_a_feature_shows_its_examples_and_statistics() -> None:
    feature = store().feature(store().ids()[7])
    view = feature_view(feature)
    (top, given_top), (sample, given_sample) = calls(view)
    assert top == sample == "TopkSamples" and len(view.html) < 2_000_000, "circuitsvis's 1.3 MB once"
    for given, examples in ((given_top, feature.top_examples), (given_sample, feature.random_examples)):
        assert given["activations"] == [[[list(e.values) for e in examples]]]
        shown = [[text.replace("↵\n", "\n") for text in tokens] for tokens in given["tokens"][0][0]]  # type: ignore[index]
        assert [[t.replace("&lt;", "<").replace("&gt;", ">") for t in tokens] for tokens in shown] == [
            list(e.tokens) for e in examples
        ]
    head = view.html.partition("<script")[0]
    assert f"Feature {feature.name}" in head and f"({feature.firings:,} times)" in head
    assert f"{feature.top_logits[0][1]:+.3g}" in head and f"{feature.bottom_logits[0][1]:+.3g}" in head


def test_a_feature_that_never_fired_needs_no_script() -> None:
    feature = replace(
        store().feature(store().ids()[0]), top_examples=(), random_examples=(), label=None, regions={}, region_share={}
    )
    assert calls(feature_view(feature)) == []


@pytest.mark.parametrize("stream", ["replacement", "target"])
def test_a_text_is_colored_by_the_activations(stream: str) -> None:
    """The activations are in decoder-norm units, and read on the given stream."""
    pair, tokens, ids = random_pair(), documents()[0].tokens, store().ids()[::60]
    ((component, given),) = calls(show_features(pair, tokens, ids, stream=stream))
    assert component == "ColoredTokensMulti" and given["labels"] == [f"{f.layer}.{f.index}" for f in ids]
    with torch.no_grad(), features_read_on(pair, stream), pair.recorded(ACTS_HOOK) as acts:
        pair.model(torch.tensor([tokens]))
    values = torch.tensor(given["values"])
    assert values.shape == (len(tokens), len(ids)) and (values > 0).any()
    for place, (layer, index) in enumerate(ids):
        expected = acts[layer][0, :, index] * pair.installed_adapters()[layer].W_dec[index].detach().norm()
        assert torch.allclose(values[:, place], expected, atol=1e-5)
    assert {route.adapter for route in pair.routes} == {False}, "the model is as it was"


def test_text_and_its_ids_are_the_same() -> None:
    pair, ids = random_pair(), [tuple(store().ids()[3])]
    tokens = documents()[1].tokens
    text = pair.model.tokenizer.decode(tokens)
    document = Trace(tokens, 2)
    for same in (text, torch.tensor(tokens), torch.tensor([tokens]), document):
        assert calls(show_features(pair, same, ids)) == calls(show_features(pair, tokens, ids))
        assert calls(show_attention(pair, same, 1)) == calls(show_attention(pair, tokens, 1))
    with pytest.warns(FutureWarning, match=r"show_features\(ids=\) is now show_features\(features=\)"):
        assert calls(show_features(pair, tokens, ids=ids)) == calls(show_features(pair, tokens, ids))  # type: ignore[call-arg]


def test_a_document_that_is_not_to_be_republished_has_no_text() -> None:
    pair, document = random_pair(), replace(documents()[1], republish=False)
    for view in (show_features(pair, document, [(0, 1)]), show_attention(pair, document, 1)):
        ((_, given),) = calls(view)
        assert set(given["tokens"]) == {WITHHELD} and len(given["tokens"]) == len(document.tokens)


@pytest.mark.parametrize(
    ("text", "ids", "message"),
    [
        ("", [(0, 1)], "The text has 0 tokens"),
        ([], [(0, 1)], "The text has 0 tokens"),
        ("1+1", [], "none; the adapters have 40"),
        ("1+1", [(0, 40)], r"FeatureId\(layer=0, index=40\)"),
        ("1+1", [(9, 0)], r"layers \[0, 1, 2, 3, 4\]"),
        ("1+1", [(0, -1)], "from 0"),
    ],
)
def test_wrong_arguments_are_refused(text: str | list[int], ids: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        show_features(random_pair(), text, ids)


@torch.no_grad()
@pytest.mark.parametrize("route", ["target", "replacement"])
def test_attention_is_that_of_the_route(route: str) -> None:
    pair, tokens = random_pair(), documents()[0].tokens
    ((component, given),) = calls(show_attention(pair, tokens, 3, [2, 0], route=route))
    assert component == "AttentionHeads" and given["attentionHeadNames"] == ["3.2", "3.0"]
    with pair.routed(route):
        _, cache = pair.model.run_with_cache(torch.tensor([tokens]))
    assert torch.allclose(torch.tensor(given["attention"]), cache["blocks.3.attn.hook_pattern"][0, [2, 0]], atol=1e-5)
    assert len(given["tokens"]) == len(tokens)  # type: ignore[arg-type]
    assert {r.adapter for r in pair.routes} == {False}, "the model is as it was"


@pytest.mark.parametrize(("layer", "heads"), [(5, None), (-1, None), (0, []), (0, [99])])
def test_heads_and_layers_that_do_not_exist_are_refused(layer: int, heads: list[int] | None) -> None:
    with pytest.raises(UserError, match="5 layers of 4 heads"):
        show_attention(random_pair(), "1+1", layer, heads)


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match=r"values\[0\] is nan"):
        circuitsvis_view([("ColoredTokens", {"tokens": ["a"], "values": [float("nan")]})])


@pytest.mark.browser
def test_hostile_text_in_a_browser(browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    """Drawn from its own script; what looks like HTML is text."""
    feature = store().feature(store().ids()[0])
    example = replace(feature.top_examples[0], tokens=(HOSTILE, *feature.top_examples[0].tokens[1:]))
    feature = replace(
        feature,
        top_examples=(example, *feature.top_examples[1:]),
        top_logits=((HOSTILE, 1.0),),
        label=Label(HOSTILE, HOSTILE),
    )
    page = "<!doctype html><title>t</title><link rel=icon href='data:,'><body>{}<script>document.body.dataset.ready = 1"
    (tmp_path / "page.html").write_text(page.format(feature_view(feature).html) + "</script>", encoding="utf-8")
    browser.errors.clear()
    browser.open(tmp_path / "page.html")
    browser.until(lambda: browser.js("document.querySelectorAll('.colored-tokens').length"))
    shown = browser.js("document.body.innerText")
    assert shown.count(HOSTILE) == 2 and HOSTILE.replace(" ", "·") in shown
    assert browser.js("document.querySelectorAll('img').length") == 0
    assert HOSTILE in browser.js("document.querySelector('.colored-tokens').textContent.replaceAll('\\u00a0', ' ')")
    assert browser.js("performance.getEntriesByType('resource').length") == 0
    assert not browser.errors
