"""The dose curves of a circuit on its page: told apart without color, legible, and left out where not measured."""

import copy
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import Browser, browser  # noqa: F401  # a fixture
from helpers.page_values import EXAMPLES, dose_curves, made, whole_block

from tl_adapters.circuits.dose_curves import INTERVENTIONS
from tl_adapters.pages.circuit_page import write_circuit_page
from tl_adapters.pages.dose_curve_plots import dose_curve_plots, dose_curves_section
from tl_adapters.pages.plots import Line, _style, plot


def block(**changes: Any) -> dict[str, Any]:
    """A block whose curves are those that a study measures."""
    part = dose_curves()
    part["curves"] = {name: part["curves"][name] for name in INTERVENTIONS}
    return {"dose_curves": {**part, **changes}}


def test_curves_differ_in_color_marker_and_dashes() -> None:
    drawn = dose_curve_plots(block())
    assert len(drawn) == 2
    for each in drawn:
        # The line of a curve is the only path that is dashed or solid at its width and not filled.
        lines = re.findall(
            r"<path [^>]*stroke-width: ?1\.3[^>]*>|<path [^>]*stroke-width=\"1\.3\"[^>]*>", str(each.svg)
        )
        of = lambda name, line: (re.search(rf'{name}="([^"]*)"', line) or ["", ""])[1]  # noqa: E731
        colors, dashes = ({of(name, line) for line in lines} for name in ("stroke", "stroke-dasharray"))
        assert len(colors) == len(dashes) == len(INTERVENTIONS), "one each, in the plot and in its legend"
        markers = set(re.findall(r'xlink:href="#(m\w+)"', str(each.svg)))
        assert len(markers) >= 2 * len(INTERVENTIONS), "a small and a large one each"


def test_lines_of_every_plot_differ_in_grey() -> None:
    for without_color in (False, True):
        lines = {_style(number, False, without_color)[1:] for number in range(49)}
        assert len(lines) == 49, "markers and dashes"
    references = {_style(number, True, False)[1:] for number in range(6)}
    assert len(references) == 6 and not references & {_style(number, False, False)[1:] for number in range(49)}


def test_markers_and_dashes_are_in_the_legend_too() -> None:
    lines = [Line(name, [0, 1], [0.5, 0.7], dashed=name == "c") for name in "abc"]
    svg = str(plot(lines, xlabel="x", ylabel="y", caption="", whole=True).svg)
    markers = dict(re.findall(r'<path id="(m\w+)" d="([^"]* z )"', svg))  # ticks are no closed paths
    uses = Counter(re.findall(r'<use [^>]*xlink:href="#(m\w+)"', svg))
    assert len(set(markers.values())) == 2 and all(uses[id] == 3 for id in markers), "two points and the legend"
    assert len(set(re.findall(r'stroke-dasharray="([^"]*)"', svg))) == 1 and svg.count("stroke-dasharray") == 2
    many = str(plot([Line("a", range(400), range(400))], xlabel="x", ylabel="y", caption="").svg)
    assert 8 <= many.count("<use") < 40, "some of the points"
    points = [Line(name, [1, 2], [3, 4], labels="xy") for name in "ab"]
    assert "#1f77b4" not in str(plot(points, xlabel="x", ylabel="y", caption="").svg), "the colors of lines"


def test_a_curve_is_where_it_was_measured() -> None:
    one = Line(
        "a", [0.01, 0.1], [0.9, 0.3], ([0.8, 0.2], [1.0, 0.4]), x_band=([0.005, 0.05], [0.02, 0.2]), large=[False, True]
    )
    same = plot([one], xlabel="x", ylabel="y", caption="", log_x=True, from_zero=True, without_color=True)
    moved = plot([one, one], xlabel="x", ylabel="y", caption="", log_x=True, from_zero=True, without_color=True)
    assert str(same.svg) != str(moved.svg)
    for missing in ("x_band", "band", "large"):
        less = plot(
            [Line(**{**vars(one), missing: None})], xlabel="x", ylabel="y", caption="", log_x=True, from_zero=True,
            without_color=True,
        )  # fmt: skip
        assert str(less.svg).count("<use") < str(same.svg).count("<use") or len(less.svg) < len(same.svg), missing


def test_the_table_says_what_full_strength_does() -> None:
    section = dose_curves_section(block())
    assert section is not None and "P(word) at the onsets is 80.0 %" in section.text
    rows = {row[0]: row[1:] for row in section.tables[0].rows}
    assert len(rows) == 1 + len(INTERVENTIONS)
    assert rows["the circuit"][0] == "all of it" and rows["matched random features"][0] == "12.5 features"
    left, harm, corrected = rows["matched random features"][1:]
    assert (left.text, left.note) == ("55.0 %", "49.5 % to 60.5 %")
    assert (harm.text, corrected.text) == ("0.00391", "65.0 %")


def test_what_was_not_measured_is_left_out() -> None:
    without = copy.deepcopy(block())
    for points in without["dose_curves"]["curves"].values():
        for point in points:
            del point["corrected"]
    without["dose_curves"]["curves"]["steering"] = []
    del without["dose_curves"]["unchanged"]["corrected"]
    only = dose_curve_plots(without)
    assert [each.caption.partition(" against")[0] for each in only] == ["Behavior left"]
    assert "a steering vector" not in str(only[0].svg)
    assert dose_curves_section({}) is None and dose_curve_plots({"dose_curves": {"curves": {}}}) == []


OVERLAPS = """
(() => {
  const found = [];
  for (const svg of document.querySelectorAll('.plots svg')) {
    const whole = svg.getBoundingClientRect();
    const boxes = [...svg.querySelectorAll('text')].map(e => [e.textContent, e.getBoundingClientRect()]);
    boxes.forEach(([text, a], i) => {
      if (a.left < whole.left - 1 || a.right > whole.right + 1) found.push(text + ' is cut');
      if (a.top < whole.top - 1 || a.bottom > whole.bottom + 1) found.push(text + ' is cut');
      if (a.height < 7 || a.width < 3) found.push(text + ' is too small');
      for (const [other, b] of boxes.slice(i + 1))
        if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)
          found.push(text + ' overlaps ' + other);
    });
  }
  return found;
})()
"""


@pytest.mark.browser
def test_labels_are_legible_in_a_browser(browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    measured = {**whole_block(), **block()}
    del measured["dose"]  # other plots
    page = write_circuit_page(tmp_path, measured, made(), None, EXAMPLES)
    browser.send("Page.navigate", url=page.as_uri())
    browser.until(lambda: browser.js("document.querySelectorAll('.plots svg').length") == 2)
    assert browser.js("document.querySelectorAll('.plots svg text').length") > 2 * len(INTERVENTIONS)
    assert browser.js(OVERLAPS) == []
