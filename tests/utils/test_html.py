"""Pieces of pages: escaped, offline."""

import pytest
from jinja2 import UndefinedError

from tl_adapters.pages.plots import Line, plot
from tl_adapters.utils.html import (
    highlight_spans,
    highlight_words,
    interval_text,
    markdown_text,
    percent,
    relative_address,
    render,
)
from tl_adapters.utils.notebook import colored_tokens


def test_a_template_shows_text_exactly_and_what_is_invisible() -> None:
    page = render("server/pages.html.j2", pages=[("a", "<think>&\"' {{ 7 * 7 }}\u202e\ud800\x1b[31m")])
    assert "&lt;think&gt;&amp;&#34;&#39; {{ 7 * 7 }}\\u202e\\ud800\\x1b[31m" in page
    with pytest.raises(UndefinedError, match="pages"):
        render("server/pages.html.j2")


def test_pieces_of_a_text_are_marked() -> None:
    assert highlight_words("<b>Wait, waiter wait", ["wait"]) == [
        ("<b>", False), ("Wait", True), (", waiter ", False), ("wait", True),
    ]  # fmt: skip
    assert highlight_spans("abcdef", [(1, 3), (2, 4)]) == [("a", False), ("bc", True), ("d", True), ("ef", False)]
    assert highlight_spans("", []) == []


@pytest.mark.parametrize(
    "address", ["report.html", "features/pages/index.html", "layer_3/features_0.html#3", "a%3Fb.html"]
)
def test_pages_beside_and_below_are_linked(address: str) -> None:
    assert relative_address(address) == address


@pytest.mark.parametrize(
    "address",
    [
        None, "", "javascript:alert(1)", "JaVaScRiPt:alert(1)", " javascript:alert(1)", "java\nscript:alert(1)",
        "data:text/html,x", "http://evil.example", "//evil.example", "/etc/passwd", "../up.html", "a/../../up.html",
        "a\\b.html", "a\u202e.html", "http://[", "x.html?q", "%2e%2e/up.html", "a\tb.html",
    ],
)  # fmt: skip
def test_no_other_address_is_linked(address: object) -> None:
    assert relative_address(address) is None


def test_markdown_shows_exactly_the_text() -> None:
    hostile = "a|b\n# <script> `x` [y](javascript:1) _z_ $$ \u202e"
    assert markdown_text(hostile) == ("a\\|b \\# \\<script\\> \\`x\\` \\[y\\](javascript\\:1) \\_z\\_ \\$\\$ \\\\u202e")


def test_coloured_tokens_are_escaped_and_offline() -> None:
    view = colored_tokens(["<think>", "</script>", "4"], [0.0, 1.0, 2.0])._repr_html_()
    assert "\\u0026lt;think\\u0026gt;" in view and "\\u0026lt;/script\\u0026gt;" in view
    assert '"<think>"' not in view and "unpkg" not in view.rsplit("CircuitsVis.render", 1)[-1]
    for values in ([0.0, 1.0], [0.0, 1.0, float("nan")]):
        with pytest.raises(ValueError, match="one finite value for each token"):
            colored_tokens(["a", "b", "c"], values)


def test_a_plot_is_the_same_every_time() -> None:
    draw = lambda: plot([Line("a<b\x01", [0, 1], [1.0, 2.0])], xlabel="x", ylabel="y", caption="c").svg  # noqa: E731
    assert draw() == draw() and draw().startswith("<svg") and "a&lt;b\\x01" in draw()
    assert "style" not in draw() and "stroke-width" in draw(), "styles are attributes, which every policy allows"


def test_labelled_places_are_points_with_their_texts_as_they_are() -> None:
    labels = ["$1", "<b>$\\frac$"]
    places = Line("width", [0.1, 10.0], [0.5, 0.05], ([0.4, 0.04], [0.6, 0.06]), labels=labels)
    draw = lambda **scale: plot([places], xlabel="x", ylabel="y", caption="c", **scale).svg  # noqa: E731
    svg = draw(log=True, log_x=True)
    assert "$1" in svg and "&lt;b&gt;$\\frac$" in svg and "<b>" not in svg
    assert svg != draw(log=True) and draw(log=True) != draw()


def test_an_interval_without_width_is_told_as_none() -> None:
    alike, spread = {"value": 1.0, "low": 1.0, "high": 1.0}, {"value": 1.0, "low": 0.9, "high": 1.0}
    assert interval_text(alike, percent) == "no interval: all that was measured agrees"
    assert interval_text(spread, percent) == "90.0 % to 100.0 %"
