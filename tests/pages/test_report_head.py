"""The first screen of the report: its sentences, figures and warnings are made from what a run measured alone."""

import copy
from typing import Any

import pytest
from helpers.page_values import figure, whole_results

from tl_adapters.circuits.results_block import upgraded_block
from tl_adapters.pages.report_head import answer_sentences, behavior_words, headlines, side_by_side, size_warning


def parts(**changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """results.json and its circuit block, with blocks replaced; None leaves one out."""
    results = {key: value for key, value in {**copy.deepcopy(whole_results()), **changes}.items() if value is not None}
    return results, upgraded_block(results["hesitation"]) if "hesitation" in results else {}


def headline(name: str, results: dict[str, Any], circuit: dict[str, Any]) -> Any:
    return next(h for h in headlines(results, circuit) if h.name == name)


def test_the_answer_is_made_of_the_figures() -> None:
    explained, features, circuit = answer_sentences(*parts())
    assert "80.0 % (78.0 % to 82.0 %)" in explained and "0.6 nats" in explained and "0.1 with the adapters" in explained
    assert "70 features that are alive" in features and "0.15 are active" in features
    # The curve's random features are those that harm as much; both at the circuit's own strength.
    assert "10 of them are the circuit of “Wait”" in circuit and "100.0 % (90.0 % to 110.0 %)" not in circuit
    full = {name: points[1] for name, points in whole_results()["hesitation"]["dose_curves"]["curves"].items()}
    assert f"{100 * full['circuit']['behavior_left']['value']:.1f} %" in circuit
    assert f"{100 * full['random']['behavior_left']['value']:.1f} %" in circuit
    assert f"{full['circuit']['kl_elsewhere']['value']:.3g} nats" in circuit


@pytest.mark.parametrize("missing", ["faithfulness", "features", "hesitation", "behaviour"])
def test_what_was_not_measured_is_not_said(missing: str) -> None:
    results, circuit = parts(**{missing: None})
    names = [h.name for h in headlines(results, circuit)]
    lost = {
        "faithfulness": {"Difference explained", "Active features (L0)"},
        "features": {"Features alive"},
        "hesitation": {"Behavior without its circuit"},
        "behaviour": {"Accuracy recovered"},
    }
    everything = set().union(*lost.values())
    assert set(names) == everything - lost[missing]
    assert len(answer_sentences(results, circuit)) == 3 - (missing in ("faithfulness", "hesitation"))
    assert answer_sentences({}, {}) == [] == headlines({}, {}) and size_warning({}) == ""


def test_without_dose_curves_the_rates_of_answers_are_told() -> None:
    results, circuit = parts()
    del circuit["dose_curves"]
    sentence = answer_sentences(results, circuit)[-1]
    assert "fall from 20.0 to 1.0 per 1,000 tokens (19.0 without matched random features)" in sentence
    assert "80.0 % to 80.0 %" in sentence
    assert answer_sentences(results, {**circuit, "circuit": {"n": 0}})[-1].startswith("No circuit of “Wait”")


def test_adapters_that_explain_nothing_are_not_praised() -> None:
    results, circuit = parts()
    results["faithfulness"]["kl_of_hybrid"] = figure(1.25)
    assert answer_sentences(results, circuit)[0].startswith("The adapters explain nothing")
    assert headline("Difference explained", results, circuit).value == "-25.0 %"


def behaves(hybrid: float, opened: float, target: float = 0.9) -> dict[str, Any]:
    rate = whole_results()["behaviour"]["target"]
    return {
        "base": rate, "replacement": {**rate, "accuracy": target},
        "target": {**rate, "accuracy": target, "think_opened": 1.0},
        "hybrid": {**rate, "accuracy": hybrid, "think_opened": opened},
        "recovered": {"hybrid": figure(0.98), "base": figure(0.97)},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("behavior", "given", "warning"),
    [
        (behaves(0.0, 0.0), 0.996, "Mostly the opening of the thinking: the hybrid opens its thinking in 0.0 % of"),
        (behaves(0.0, 0.0), 0.2, ""),  # given the opening it still fails: the adapters do the rest
        (behaves(0.0, 1.0), 0.996, ""),  # it opens its thinking by itself
        (behaves(0.0, 0.1), None, "Part of it may be the opening of the thinking"),
        (behaves(0.9, 0.1), 0.9, "there is nothing to recover"),
    ],
)
def test_the_warning_of_recovered_accuracy_follows_the_figures(
    behavior: dict[str, Any], given: float | None, warning: str
) -> None:
    results, circuit = parts(behaviour=behavior)
    if given is None:
        del circuit["sufficiency"]["none"]
    else:
        circuit["sufficiency"]["none"]["accuracy"] = given
    found = headline("Accuracy recovered", results, circuit)
    assert warning in found.warning and bool(warning) == bool(found.warning)
    if given == 0.996 and warning:
        assert "solves 99.6 % by itself" in found.warning
    results["pair"] = {**results["pair"], "base": "other", "target": "names"}
    assert headline("Accuracy recovered", results, circuit) == found, "whatever the pair is called"


def test_the_warning_of_the_circuit_follows_the_figures() -> None:
    results, circuit = parts()
    curves = circuit["dose_curves"]["curves"]
    point, random = (next(p for p in curves[name] if p["factor"] == 1) for name in ("circuit", "random"))
    point["behavior_left"], random["behavior_left"] = figure(0.1), figure(0.105)
    assert "not told apart" in headline("Behavior without its circuit", results, circuit).warning
    random["behavior_left"] = figure(0.8)
    point["corrected"], circuit["dose_curves"]["unchanged"]["corrected"] = figure(0.7), figure(0.8)
    assert "than the correction does: 70.0 %" in headline("Behavior without its circuit", results, circuit).warning
    point["corrected"] = figure(0.1)
    assert headline("Behavior without its circuit", results, circuit).warning == ""


def test_warnings_of_features_and_of_partial_replacement() -> None:
    results, circuit = parts()
    assert headline("Features alive", results, circuit).warning == ""
    results["features"]["alive"] = 20
    assert "75.0 % are not" in headline("Features alive", results, circuit).warning
    assert headline("Difference explained", results, circuit).warning == ""
    results["faithfulness"]["partial_of_full"]["only"][0] = figure(1.5)
    assert "1.50 times" in headline("Difference explained", results, circuit).warning


def test_a_small_run_says_so() -> None:
    results, _ = parts()
    assert "1,000 response tokens (at least 100,000)" in size_warning(results)
    results["faithfulness"]["tokens"]["response"] = 100_000
    assert size_warning(results) == "", "1,200 problems are enough"


def test_four_models_answer_side_by_side() -> None:
    texts = {"replacement": "4. Wait, 5", "target": "Wait", "hybrid": "4", "question": "2+2=?"}
    shown = side_by_side("2+2=?", texts)
    assert [name for name, _, _ in shown["boxes"]] == ["target", "hybrid", "replacement"]
    assert shown["boxes"][2][2] == [("4. ", False), ("Wait", True), (", 5", False)]
    assert side_by_side("", {**texts, "base": ""})["boxes"][0][0] == "base"
    assert behavior_words({"words": ["Wait", " Wait", "wait", "Hmm"]}) == "“Wait” or “Hmm”"
    assert behavior_words({"behaviour": "rhyme"}) == "rhyme"
