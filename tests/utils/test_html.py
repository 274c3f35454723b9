"""Pieces of pages: escaped, offline."""

import pytest

from tl_adapters.pages.plots import Line, plot
from tl_adapters.utils.html import escape, highlight_words
from tl_adapters.utils.notebook import colored_tokens


def test_text_shows_exactly_itself() -> None:
    assert escape("<think>&\"'") == "&lt;think&gt;&amp;&quot;&#x27;"
    assert highlight_words("<b>Wait, waiter wait", ["wait"]) == "&lt;b&gt;<mark>Wait</mark>, waiter <mark>wait</mark>"


def test_coloured_tokens_are_escaped_and_offline() -> None:
    view = colored_tokens(["<think>", "</script>", "4"], [0.0, 1.0, 2.0])._repr_html_()
    assert "&lt;think&gt;" in view and "&lt;/script&gt;" in view
    assert '"<think>"' not in view and "unpkg" not in view.rsplit("</script>", 2)[-2]
    for values in ([0.0, 1.0], [0.0, 1.0, float("nan")]):
        with pytest.raises(ValueError, match="one finite value for each token"):
            colored_tokens(["a", "b", "c"], values)


def test_a_plot_is_the_same_every_time() -> None:
    draw = lambda: plot([Line("a<b", [0, 1], [1.0, 2.0])], xlabel="x", ylabel="y", caption="c")  # noqa: E731
    assert draw() == draw() and "<svg" in draw() and "a&lt;b" in draw()


def test_labelled_places_are_points_with_their_texts_as_they_are() -> None:
    labels = ["$1", "<b>$\\frac$"]
    places = Line("width", [0.1, 10.0], [0.5, 0.05], ([0.4, 0.04], [0.6, 0.06]), labels=labels)
    draw = lambda **scale: plot([places], xlabel="x", ylabel="y", caption="c", **scale)  # noqa: E731
    svg = draw(log=True, log_x=True)
    assert "$1" in svg and "&lt;b&gt;$\\frac$" in svg and "<b>" not in svg
    assert svg != draw(log=True) and draw(log=True) != draw()
