"""Result records: what they are in a notebook, as JSON and as a data frame; and that every public result is one."""

import importlib
import inspect
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import pytest
from helpers.pairs import make
from helpers.stores import HOSTILE

import tl_adapters
from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.attribution.validation import FaithfulnessCurve
from tl_adapters.autointerp.category_shares import CategoryShare
from tl_adapters.autointerp.detection import DetectionScore, DetectionScores, InterpretationReport
from tl_adapters.autointerp.endpoint import EndpointUsage
from tl_adapters.autointerp.judge import JudgeReport
from tl_adapters.data.traces import Trace
from tl_adapters.evaluation.behaviors import Behavior
from tl_adapters.evaluation.sampled_kl import SampledKL
from tl_adapters.generation.compare_variants import VariantCompletion, VariantCompletions
from tl_adapters.generation.responses import Response
from tl_adapters.utils.measurement import Measurement
from tl_adapters.utils.notebook import RecordTable, ResultRecord

SHARE = Measurement(0.5, 0.4, 0.6, 10, "share", "tune")
NO_RESULTS = {
    "AdapterSet": "a module of torch, whose repr is torch's",
    "PairedModel": "a model",
    "Variant": "an option",
    "Trace": "a text, which is an input",
    "Label": "a category and an explanation, kept in a store",
    "Subject": "problems, which are an input",
    "RunConfig": "a configuration",
    "NotebookView": "HTML",
    "FeatureId": "two numbers",
    "GraphPaths": "names of files",
    "ServedRun": "an engine",
}
"""What public functions return that is no result: it needs no table."""


@dataclass(frozen=True)
class Found(ResultRecord):
    feature: FeatureId
    share: Measurement
    text: str = ""
    value: float = math.nan


def test_a_record_shows_its_fields_and_is_json() -> None:
    found = Found(FeatureId(3, 7), SHARE, HOSTILE)
    html = found._repr_html_()
    assert ">3.7<" in html and "0.5 <small>0.4 to 0.6<" in html and "&lt;/script&gt;&lt;img" in html
    assert "<img" not in html and "<script" not in html
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["value"] is None
    short = repr(replace(found, text="one\ntwo " * 99))
    assert short.startswith("Found: feature 3.7, share 0.5") and "0.4 to 0.6" in short and "<" not in short
    assert "\n" not in short and len(short) < 400


def test_what_is_no_result_is_short_in_a_terminal() -> None:
    trace = Trace(tuple(range(1000)), 40, 900, "math", republish=False)
    words = "Trace of 1,000 tokens: prompt 40, response 960, of which thinking 900, domain math, not to be republished"
    assert repr(trace) == words and repr(Trace((1, 2, 3), 2)) == "Trace of 3 tokens: prompt 2, response 1"
    pair = make("Qwen2ForCausalLM", "hooked")
    assert repr(pair) == (
        f"PairedModel of {pair.target_id or 'an unnamed target'} and {pair.base_id or 'an unnamed base'}: 4 layers, "
        "adapters of 24 features a layer, on cpu"
    )


def test_a_table_has_a_row_for_each_record() -> None:
    table = RecordTable([Found(FeatureId(i, 2), SHARE, "t" * 400) for i in range(3)])
    assert table._repr_html_().count("<tr>") == 1 + 3 and len(table._repr_html_()) < 4000, "long texts are cut"
    frame = table.to_pandas()
    assert list(frame) == ["layer", "index", "share", "share_low", "share_high", "text", "value"]
    assert frame["layer"].tolist() == [0, 1, 2] and frame["share_low"].tolist() == [0.4] * 3
    assert [record["feature"] for record in table.to_dict()["records"]] == [[0, 2], [1, 2], [2, 2]]
    assert repr(table).count("\n") == 2 and table == list(table)
    many = RecordTable(table * 50)
    assert "... and 50 more rows" in many._repr_html_() and "... and 144 more" in repr(many) and len(many) == 150
    assert "no rows" in RecordTable()._repr_html_() and not len(RecordTable().to_pandas())


def completion(variant: str, text: str) -> VariantCompletion:
    return VariantCompletion((1, 2), tuple(range(len(text))), text, False, variant, None)


def test_completions_stand_side_by_side_with_hesitation_words_marked() -> None:
    both = VariantCompletions([completion("target", f"Wait, {HOSTILE}"), completion("<i>", "But no.")])
    html = both._repr_html_()
    assert html.count("<pre") == 2 and "<mark>Wait</mark>" in html and "<mark>But</mark>" in html
    assert "<img" not in html and "<i>" not in html and html.count("<style>") == 1 and "<script" not in html
    assert both[0]._repr_html_().count("<pre") == 1
    frame = both.to_pandas()
    assert frame["variant"].tolist() == ["target", "<i>"] and frame["hesitations"].tolist() == [1, 1]
    assert both.to_dict()["records"][1]["text"] == "But no."


def test_responses_are_a_table() -> None:
    response = Response((1,), (2, 3), "wait, wait", False, True)
    assert {"correct": True, "hesitations": 2, "new_tokens": 2}.items() <= response.row().items()
    assert ">yes<" in RecordTable([response])._repr_html_()


def test_a_behavior_says_what_defines_it() -> None:
    assert Behavior().to_dict() == {"name": "hesitation", "words": ["Wait"]}
    found = Behavior("sums", find=lambda trace: [])
    assert "&lt;lambda&gt;" in found._repr_html_() and "function" in json.dumps(found.to_dict())


def test_the_error_of_one_text_is_not_known() -> None:
    assert SampledKL(0.1, math.inf, 1, 9).to_dict()["standard_error"] is None
    assert SampledKL(0.1, 0.02, 9, 99).to_dict()["standard_error"] == 0.02


def test_reports_of_judges_are_tables_of_categories_and_of_features() -> None:
    usage, share = EndpointUsage(3, 99, 0), CategoryShare(5, SHARE, SHARE, {0: 0.5})
    report = JudgeReport("judge", 20, 10, {"0.1": "no reply"}, {HOSTILE: share}, {}, SHARE, None, None, usage, 0)
    html = report._repr_html_()
    assert "agreement" in html and "0.4 to 0.6" in html and "<img" not in html and html.count("<table") == 2
    assert report.to_pandas()["share_of_alive_high"].tolist() == [0.6] and report.to_dict()["spent"]["tokens"] == 99
    unit = DetectionScore("0.1", "says Wait", 0.9, 0.9, 0.9, 20, 0.1)
    scores = DetectionScores(SHARE, 0.9, 0.9, 0.1, {}, {}, (unit, unit))
    both = InterpretationReport("judge", scores, scores, SHARE, usage, 0)
    assert both.to_pandas()["kind"].tolist() == ["feature", "feature", "neuron", "neuron"]
    alone = InterpretationReport("judge", scores, None, None, usage, 0)
    assert len(alone.to_pandas()) == 2 and "neurons" not in alone._repr_html_()


def test_a_curve_is_a_table() -> None:
    assert FaithfulnessCurve([0, 1], [0.0, 1.0], [1.0, 0.0]).to_pandas()["removing"].tolist() == [1.0, 0.0]


def results() -> Iterator[type]:
    """The classes of this package that the public functions return, alone or in a list, and public classes."""
    found: dict[str, type] = {}
    for name, module in tl_adapters.EXPORTS.items():
        if name == "HarnessModel":  # whose module needs an extra
            continue
        scope = vars(importlib.import_module(f"tl_adapters.{module}"))
        if inspect.isfunction(scope[name]):
            for word in re.findall(r"\w+", str(scope[name].__annotations__.get("return", ""))):
                if inspect.isclass(one := scope.get(word)) and one.__module__.startswith("tl_adapters"):
                    found[word] = one
    found |= {name: getattr(tl_adapters, name) for name in ("AttributionGraph", "Behavior", "Circuit", "FeatureStore")}
    yield from (found[name] for name in sorted(found) if name not in NO_RESULTS)


@pytest.mark.parametrize("result", results(), ids=lambda one: one.__name__)
def test_every_public_result_is_frozen_draws_itself_and_is_json(result: Any) -> None:
    assert callable(getattr(result, "_repr_html_", None))
    assert callable(getattr(result, "to_dict", None))
    if is_dataclass(result):
        assert result.__dataclass_params__.frozen  # type: ignore[attr-defined]
