"""Results without events: no interval of zero width, no equivalence from five problems, no NaN in a file."""

import ast
import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.random_models import random_batch

from tl_adapters.attribution.validation import rank_correlation
from tl_adapters.circuits.criteria import Criterion, criteria
from tl_adapters.circuits.measurements import record
from tl_adapters.circuits.onsets import Onsets
from tl_adapters.evaluation.faithfulness import DocumentSums, faithfulness_block
from tl_adapters.evaluation.feature_matching import Share, shares_table
from tl_adapters.evaluation.response_metrics import measure_responses
from tl_adapters.evaluation.sampled_responses import SampledResponse, score_responses
from tl_adapters.generation.responses import Response
from tl_adapters.pages.circuit_sections import conditions_section
from tl_adapters.utils.bootstrap import bootstrap_ratio, bootstrap_recovered
from tl_adapters.utils.html import Cell, measurement_cell
from tl_adapters.utils.measurement import IntervalError, Measurement, OutcomesMeasurement
from tl_adapters.utils.results import plain, read_results, write_results
from tl_adapters.utils.share_intervals import share, unseen_share
from tl_adapters.utils.strict_json import NotFiniteJsonError, dumps

PACKAGE = Path(__file__).parents[2] / "tl_adapters"


def response(text: str = "a b c d", correct: bool = True, truncated: bool = False) -> Response:
    return Response((1,), tuple(range(len(text.split()))), text, truncated, correct)


# -- rates ------------------------------------------------------------------------------------------------------------


def test_none_of_a_thousand_allows_up_to_0_37_percent() -> None:
    found = measure_responses([response()] * 1000, "report")
    for name in ("truncated", "think_opened"):
        assert (getattr(found, name), found.ci[name].low) == (0, 0)
        assert found.ci[name].high == pytest.approx(0.003682, abs=1e-6)
    assert (found.accuracy, found.ci["accuracy"].high) == (1, 1)
    assert found.ci["accuracy"].low == pytest.approx(1 - 0.003682, abs=1e-6)
    hesitates = found.ci["hesitation_per_1k"]
    assert (found.hesitation_per_1k, hesitates.low) == (0, 0)
    assert hesitates.high == pytest.approx(1000 * 3.689 / 4000, abs=1e-3) and "Poisson" in hesitates.reason


def test_samples_that_all_agree_count_once_per_problem() -> None:
    """pass@1 of eight samples to each of ten problems, all wrong; or half of each right."""
    for right in (0, 4):
        answers = [SampledResponse(i, s, response(correct=s < right)) for s in range(8) for i in range(10)]
        interval = score_responses(answers, "test").ci["pass_at_1"]
        assert interval.high == pytest.approx(unseen_share(10) if not right else 0.7634, abs=1e-4)


def test_empty_responses_have_no_hesitation_rate(tmp_path: Path) -> None:
    """Every response is empty, so hesitations per token are undefined."""
    found = measure_responses([response("", correct=False)] * 3, "report")
    assert found.hesitation_per_1k is None and found.ci["hesitation_per_1k"].reason
    write_results(tmp_path, behaviour={"target": found})
    assert read_results(tmp_path)["behaviour"]["target"]["hesitation_per_1k"] is None


def test_one_problem_has_no_bootstrap_interval() -> None:
    found = measure_responses([response("wait a b")], "report")
    for name in ("length", "hesitation_per_1k"):
        assert (found.ci[name].low, found.ci[name].high) == (None, None) and "there is one" in found.ci[name].reason
    assert found.ci["accuracy"].low == pytest.approx(0.025)


# -- a condition against another -------------------------------------------------------------------------------------


def hesitating(n: int, wrong: int = 0) -> list[Response]:
    return [response("wait a b c" if i % 2 else "a b c d", correct=i >= wrong) for i in range(n)]


def test_a_condition_that_changes_nothing_in_five_problems() -> None:
    found = record([*hesitating(5)], hesitating(5), ["wait"], "report")
    for name in ("hesitation_cut", "length_change", "accuracy_change"):
        measured = found[name]
        assert (measured.value, measured.low, measured.high) == (0, -unseen_share(5), unseen_share(5)), name
    baseline = hesitating(5)
    itself = record(baseline, baseline, ["wait"], "report")["accuracy_change"]
    assert (itself.value, itself.low, itself.high, itself.reason) == (0, 0, 0, "compared with itself")


def test_the_loss_of_all_hesitation_has_an_interval() -> None:
    silent = [response("a b c d") for _ in range(40)]
    cut = record(silent, hesitating(40), ["wait"], "report")["hesitation_cut"]
    assert cut.value == cut.high == 1 and 0.5 < cut.low < 0.95
    many = record(silent * 50, hesitating(2000), ["wait"], "report")["hesitation_cut"]
    assert cut.low < many.low < 1, "and better known from more"


def test_the_choice_of_random_sets_widens_the_interval() -> None:
    """Three sets, of which one takes all hesitation away: its choice is in the interval, its extremes have names."""
    baseline = hesitating(60)
    said = [*hesitating(60), *hesitating(60), *[response() for _ in range(60)]]
    pooled = record(said, baseline, ["wait"], "report")
    sets = record(said, baseline, ["wait"], "report", of_sets=True)
    assert sets["hesitation_cut"].value == pytest.approx(1 / 3) == pytest.approx(pooled["hesitation_cut"].value)
    assert sets["hesitation_cut"].low < 0.01 and sets["hesitation_cut"].high > 0.6
    assert pooled["hesitation_cut"].low > 0.3
    rate_ = sets["ci"]["hesitation_per_1k"]
    assert rate_["high"] - rate_["low"] > 2 * (
        pooled["ci"]["hesitation_per_1k"]["high"] - pooled["ci"]["hesitation_per_1k"]["low"]
    )


# -- criteria ---------------------------------------------------------------------------------------------------------


def block_of(n: int, wrong: int = 0, unlike: str = "a b c d") -> tuple[dict[str, Any], Onsets]:
    """An analysis in which nothing but hesitation changes, on n problems."""
    baseline = hesitating(n)
    removed_in_part = [response(unlike, correct=i >= wrong) for i in range(n)]
    p = Measurement(0.9, 0.88, 0.92, n, "probability of the word", "report")
    low = share(0, n).measurement(n, "probability of the word", "report")
    places = {"moment": p, "boundary": low, "elsewhere": low}
    corrected = {
        name: OutcomesMeasurement(right / n, None, None, n, "share", "report", outcomes="1" * right + "0" * (n - right))
        for name, right in (
            ("replacement", n), ("replacement - circuit", n // 2), ("hybrid", n // 3), ("hybrid + circuit", n // 3),
        )
    }  # fmt: skip
    block = {
        "circuit": {"share_of_alive": 0.01, "alive": 1000},
        "necessity": {
            "circuit": record(removed_in_part, baseline, ["wait"], "report"),
            "random": record([*baseline], baseline, ["wait"], "report"),
        },
        "sufficiency": {"circuit": record([*baseline], baseline, ["wait"], "report")},
        "probabilities": {"target": places, "hybrid + circuit": places},
        "injected": corrected,
    }
    batch = random_batch(0)
    some = batch.predicting_response
    drawn = torch.arange(some.shape[1]) % 3
    return block, Onsets(batch.tokens, some, *(some & (drawn == kind) for kind in range(3)), (5,))


@functools.cache  # thousands of problems are drawn a thousand times
def asked(n: int, **options: Any) -> dict[str, Criterion]:
    return {c["name"]: c for c in criteria(*block_of(n, **options))}


ABSENCES = [
    "accuracy changed (equivalence: its whole interval)",
    "hesitation gone without matched random features",
    "accuracy, hybrid + circuit less hybrid",
    "P(word) at all other places of the response, hybrid + circuit",
    "P(word) at matched control positions, hybrid + circuit (stricter)",
    "hesitation gone without it",
]


@pytest.mark.parametrize("name", ABSENCES)
def test_absence_requires_enough_problems(name: str) -> None:
    few, many = asked(5)[name], asked(4000)[name]
    assert few["reached"] is None and few["needs"] > few["n"] == 5
    assert "not enough problems" in few["bar"] and f"needs n >= {few['needs']:,}; n = 5" in few["bar"]
    assert many["reached"] is True and many["needs"] <= many["n"] == 4000, many


def test_how_many_problems_absence_requires() -> None:
    """At 3 points, what happens in 3 % of the problems must not go unseen: 122 problems, by (1 - 0.03)^n < 2.5 %."""
    name = ABSENCES[0]
    assert asked(121)[name]["reached"] is None and asked(122)[name]["reached"] is True
    assert asked(122)[name]["needs"] == 122


def test_a_clear_change_fails_a_criterion_with_few_problems_too() -> None:
    """Twenty of twenty answers made wrong are no want of problems."""
    name = ABSENCES[0]
    assert asked(20, wrong=20)[name]["reached"] is False
    assert asked(20, wrong=1)[name]["reached"] is None
    assert asked(4000, wrong=200)[name]["reached"] is False


def test_injected_errors_are_compared_pair_by_pair() -> None:
    name = "injected errors corrected: lost without it"
    assert asked(5)[name]["reached"] is False and asked(60)[name]["reached"] is True
    assert "exact test" in asked(60)[name]["bar"] and asked(60)[name]["n"] == 60
    assert asked(60)["injected errors corrected: gained by the hybrid with it"]["reached"] is False


def test_criteria_without_a_measurement_are_undecided() -> None:
    """The replacement never hesitates, so nothing can be gone; answers without a token."""
    block, texts = block_of(50)
    del block["necessity"]["circuit"]["hesitation_cut"]
    block["probabilities"]["target"] = {"moment": Measurement(0.0, 0.0, 0.1, 50, "p", "report")}
    found = {c["name"]: c for c in criteria(block, texts)}
    for name in ("hesitation gone without it", "P(word) at the target's onsets, hybrid + circuit over target"):
        assert (found[name]["value"], found[name]["reached"]) == (None, None)
    empty = asked(50, unlike="")
    assert (empty["hesitation gone without it"]["value"], empty["hesitation gone without it"]["reached"]) == (
        None,
        None,
    )
    dumps(plain(list(found.values())))


# -- ratios -----------------------------------------------------------------------------------------------------------


def test_recovered_is_undefined_where_nothing_was_gained() -> None:
    same = torch.tensor([1.0, 0.0, 1.0])
    found = bootstrap_recovered(same, same, same).measurement(3, "share", "report")
    assert (found.value, found.low, found.high) == (None, None, None) and found.reason
    seldom = torch.zeros(300)
    seldom[0] = 1.0
    found = bootstrap_recovered(seldom, torch.zeros(300), seldom).measurement(300, "share", "report")
    assert found.value == 1 and found.undefined == pytest.approx(math.exp(-1), abs=0.05)
    assert found.low is None and "draws are undefined" in found.reason


def test_dead_adapters_and_perfect_agreement_have_intervals_of_nonzero_width() -> None:
    """L0 of a layer that never fires, and agreement on every token."""
    n = 20
    ones = torch.ones(n, dtype=torch.float64)
    kl = dict.fromkeys(("hybrid", "replacement", "first[0]", "last[0]", "only[0]"), 0 * ones)
    sums = DocumentSums(
        kl, kl, 30 * ones, 30 * ones, 30 * ones, ones[:, None].expand(n, 2), ones[:, None].expand(n, 2),
        ones[:, None, None].expand(n, 2, 2), ones[:, None, None].expand(n, 2, 2), torch.zeros(n, 1).double(),
        torch.zeros(n, 1).double(), 30 * ones, 30 * ones, torch.zeros(1, 8).double(),
    )  # fmt: skip
    block = faithfulness_block(sums, "report")
    assert block["l0"][0].value == 0 and block["l0"][0].high == pytest.approx(3.689 / 600, abs=1e-5)
    assert block["top1_agreement"].value == 1 and block["top1_agreement"].low == pytest.approx(1 - unseen_share(n))
    assert block["kl_of_hybrid"].value is None and block["partial_of_full"]["only"][0].value is None
    dumps(plain(block))


# -- written files ---------------------------------------------------------------------------------------------------


def test_nan_is_refused_with_its_key(tmp_path: Path) -> None:
    write_results(tmp_path, seeds=[0])
    before = (tmp_path / "results.json").read_text()
    for bad in (math.nan, math.inf):
        with pytest.raises(NotFiniteJsonError, match=r"faithfulness\.kl\[1\]\.value is (nan|inf)"):
            write_results(tmp_path, faithfulness={"kl": [{"value": 1.0}, {"value": bad}]})
    assert (tmp_path / "results.json").read_text() == before
    assert dumps({"a": [None, 1.5]}) == json.dumps({"a": [None, 1.5]})


def test_a_measurement_is_never_nan() -> None:
    for name in ("value", "low", "high"):
        with pytest.raises(IntervalError, match=name):
            replace(Measurement(0.5, 0.4, 0.6, 3, "share", "report"), **{name: math.nan})
    with pytest.raises(IntervalError, match="1 of 3 documents"):
        bootstrap_ratio(torch.tensor([1.0, math.nan, 2.0]), torch.ones(3))


def test_every_writer_uses_strict_json() -> None:
    """Records that are only hashed, compared or shown may use json.dumps; those that are written may not."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        for call in calls:
            name = ast.unparse(call.func)
            inside = {ast.unparse(node) for argument in call.args for node in ast.walk(argument)}
            if name == "json.dump" or (name.endswith(("write_text", ".write")) and "json.dumps" in inside):
                found.append(f"{path.name}:{call.lineno}")
    assert not found, "write strict_json.dumps there, which refuses NaN with its key"


def test_an_undefined_value_is_none_and_shown_as_such() -> None:
    assert rank_correlation(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0])) is None
    assert Share(0, 0).value is None and shares_table({"x": {"all": Share(0, 0)}})[1] == [["all", Cell("-")]]
    form = "{:.2f}".format
    assert measurement_cell({"value": None, "reason": "over nothing"}, form) == Cell("-", "over nothing")
    assert measurement_cell({"value": 1.0, "low": None, "high": None, "reason": "one problem"}, form) == (
        Cell("1.00", "no interval: one problem")
    )
    assert (
        "2.0% of the draws" in measurement_cell({"value": 1.0, "low": 0.5, "high": 2.0, "undefined": 0.02}, form).note
    )
    answers = [response("wait a b")]
    section = conditions_section(
        {"necessity": {"none": plain(record(answers, answers, ["wait"], "report"))}}, "necessity", "", ""
    )
    shown = str(section)
    assert "there is one" in shown and "nan" not in shown.lower() and "'None'" not in shown
