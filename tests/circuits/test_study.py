"""The whole analysis, on the built-in pair and adapters trained for seconds: every part is what it says it is."""

import json
import math
import random
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from helpers.pairs import state
from helpers.random_models import randomise

import tl_adapters.circuits.comparisons as comparisons
from tl_adapters import organism
from tl_adapters.circuits.circuit import ROLES
from tl_adapters.circuits.control_strengths import EFFECT_TOLERANCE, HARM_TOLERANCE, TuningTexts
from tl_adapters.circuits.criteria import MIN_HESITATION_CUT
from tl_adapters.circuits.dose_curves import INTERVENTIONS
from tl_adapters.circuits.measurements import ReplacementResiduals, answers, probabilities, record
from tl_adapters.circuits.onsets import Behavior, BehaviorError, find_onsets
from tl_adapters.circuits.search import FEWEST_ONSETS, SearchOptions, find_circuit
from tl_adapters.circuits.study import BehaviorStudy, StudyOptions, analyze_behavior, analyze_hesitation
from tl_adapters.circuits.subject import Injection, OwnEngine, Subject, builtin_subject
from tl_adapters.config import TrainingConfig
from tl_adapters.data.chat_format import encode_traces
from tl_adapters.data.traces import Trace
from tl_adapters.generation.responses import respond, traces_of
from tl_adapters.interventions.feature_edits import only
from tl_adapters.interventions.variants import Variant, on_route, rescaled, without
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel
from tl_adapters.organism.census import corrects, with_injected_slip
from tl_adapters.organism.traces import prompt
from tl_adapters.study.open_run import load_organism_pair
from tl_adapters.training.trainer import train
from tl_adapters.utils.measurement import Measurement, SetsMeasurement
from tl_adapters.utils.results import plain
from tl_adapters.utils.share_intervals import mcnemar, newcombe

SEARCH = SearchOptions(share=0.1, documents=16)
LIMIT = 40
OPTIONS = StudyOptions(SEARCH, draws=1, probability_draws=2, curve_factors=(0.5, 1.0))
REMOVALS = (
    "none",
    "output",
    "template",
    "circuit",
    "random",
    "random_scaled",
    "random_equal_harm",
    "others",
    "others_scaled",
    "others_equal_harm",
    "bias_only",
    "ban",
    "logit_bias",
    "steering",
    "neurons",
    "low_rank",
)
"""Conditions that remove something; other_tokens is among them where there are control positions."""
BASELINES = ("logit_bias", "steering", "neurons", "low_rank")
SETS, FORMS = ("random", "others"), ("", "_scaled", "_equal_harm")
"""Other features that are taken away, and how many."""


@pytest.fixture(scope="module")
def pair() -> PairedModel:
    pair = load_organism_pair()
    traces = encode_traces(organism.reasoning_pairs("train", 100), pair.model.tokenizer)
    train(
        pair,
        traces,
        TrainingConfig(stages=("end_to_end",), n_features=32, steps=16, tokens_per_batch=512),
        progress=False,
    )
    return pair


@pytest.fixture(scope="module")
def subject(pair: PairedModel) -> Subject:
    """Sums of two terms, which are answered soon; nearly all of them in answers that hesitate."""
    chosen = []
    for split, n, n_doubted, n_sure in (("select", 60, 26, 4), ("report", 30, 3, 1)):
        asked = organism.problems(split, n, n_terms=(2,))  # type: ignore[arg-type]
        said = respond(pair.model, asked, max_new_tokens=LIMIT)
        doubted = [p for p, r in zip(asked, said, strict=True) if r.hesitations and not r.truncated]
        sure = [p for p, r in zip(asked, said, strict=True) if not r.hesitations and not r.truncated]
        chosen.append([*doubted[:n_doubted], *sure[:n_sure]])
    select, report = chosen
    rng, injections = random.Random(0), []
    for problem in report[:2]:
        text, step = with_injected_slip(problem, rng)
        injections.append(Injection(problem, text.removeprefix(prompt(problem)), partial(corrects, step=step)))
    made = builtin_subject(1, 1)
    return replace(made, select=select, report=report, injections=injections, max_new_tokens=LIMIT)


class RecordingEngine(OwnEngine):
    """Our own engine, which keeps what it was asked for."""

    def __init__(self) -> None:
        self.variants: list[Variant] = []

    def entered(self, pair: PairedModel, variant: Variant) -> AbstractContextManager[Any]:
        self.variants.append(variant)
        return super().entered(pair, variant)

    def facts(self) -> dict[str, Any]:
        return {"name": "recording", "dtype": "float32", "by_our_own": []}


ENGINE = RecordingEngine()
OTHER_KINDS = ("words banned", "words' logits", "steered", "without", "adapters without")
"""How the names of conditions begin that are no factors of features; the last two leave out neurons and directions."""


@pytest.fixture(scope="module")
def study(pair: PairedModel, subject: Subject) -> BehaviorStudy:
    before, doses = state(pair), comparisons.DOSES
    comparisons.DOSES = (4, 1000)
    try:
        found = analyze_hesitation(pair, replace(subject, engine=ENGINE), OPTIONS, progress=False)
    finally:
        comparisons.DOSES = doses
    assert state(pair) == before, "weights, hooks and routes are given back"
    return found


def test_every_answer_is_asked_of_the_engine(study: BehaviorStudy) -> None:
    """And most conditions say the factors of their features, so that another engine can compute them."""
    assert study.block["engine"] == ENGINE.facts()
    names = [variant.name for variant in ENGINE.variants]
    assert names[0] == "target" and {"replacement", "hybrid", "decoder biases only", "words banned"} <= {*names}
    answered = len(study.block["necessity"]) + len(study.block["sufficiency"]) + len(study.block["injected"])
    assert len(names) >= answered
    others = {variant.name for variant in ENGINE.variants if variant.factors is None}
    kinds = {next((kind for kind in OTHER_KINDS if name.startswith(kind)), name) for name in others}
    assert kinds == {*OTHER_KINDS}


def figures(block: Any) -> list[Measurement]:
    if isinstance(block, Measurement):
        return [block]
    inner = block.values() if isinstance(block, dict) else block if isinstance(block, list) else ()
    return [figure for item in inner for figure in figures(item)]


# -- the block ----------------------------------------------------------------------------------------------------


def test_every_part_is_there_and_goes_into_results(study: BehaviorStudy) -> None:
    block = json.loads(json.dumps(plain(study.block), allow_nan=False))
    assert set(block) == {
        "schema_version", "behaviour", "words", "engine", "moments", "circuit", "probabilities", "other_words",
        "necessity", "sufficiency", "transfer", "injected", "mediation", "dose", "smallest", "kinds", "sampled",
        "suppressors", "bystanders", "criteria", "controls", "injected_more", "dose_curves",
    }  # fmt: skip
    assert (block["behaviour"], set(block["words"])) == ("hesitation", {"Wait", "wait", " Wait"})
    assert set(block["necessity"]) == {*REMOVALS, "other_tokens"}
    assert set(block["sufficiency"]) == {
        "none",
        "output",
        "template",
        "circuit",
        "circuit_at_strength",
        "random",
        "random_scaled",
        "random_at_strength",
        "others",
        "others_scaled",
        "others_at_strength",
        "b_dec_only",
    }
    assert set(block["transfer"]) == {"none", "negated", "negated_random"}
    removed_in_part = {"output", "template", "circuit", "other_tokens", *(f"{of}{how}" for of in SETS for how in FORMS)}
    conditions = {f"replacement - {name}" for name in removed_in_part} | {f"replacement, {name}" for name in BASELINES}
    conditions |= {f"hybrid + {name}" for name in set(block["sufficiency"]) - {"none", "b_dec_only"}}
    assert set(block["probabilities"]) == conditions | {"target", "replacement", "hybrid"}
    assert set(block["controls"]) == {"circuit", *BASELINES, *(f"{of}{how}" for of in SETS for how in FORMS)}
    assert set(block["injected"]) == {
        "target", "replacement", "hybrid", "word banned", "replacement - circuit", "hybrid + circuit",
        "hybrid + circuit_at_strength", "hybrid + random", "hybrid + others",
        *(f"replacement, {name}" for name in BASELINES), *(f"replacement - {of}{how}" for of in SETS for how in FORMS),
    }  # fmt: skip
    assert set(block["injected_more"]) == {f"{of}{how}" for of in SETS for how in FORMS}
    templates = study.found.roles.templates  # type: ignore[union-attr]
    measured = {"total", "through_output", "interaction"} if templates else set()
    assert set(block["mediation"]) - {"share"} == {"n", *measured}
    assert block["mediation"]["n"] == len(templates)
    assert set(block["sampled"]) == {"none", "circuit"}
    assert {of: sum(kinds.values()) for of, kinds in block["kinds"].items()}["target"] >= 3
    assert len(study.examples) == 4
    assert all(set(e) >= {"question", "replacement", "with the circuit"} for e in study.examples)
    assert all(c["name"] in study._repr_html_() for c in block["criteria"] if not set("<>&'") & set(c["name"]))
    values = [float("nan") if c["value"] is None else c["value"] for c in block["criteria"]]
    assert study.to_pandas()["measured"].tolist() == pytest.approx(values, nan_ok=True)
    assert study.to_dict() == plain(block) and repr(study.circuit) in repr(study)
    assert study.found.to_pandas().equals(study.circuit.to_pandas()) and repr(study.circuit) in repr(study.found)
    assert study.found.to_dict()["objectives"][0]["n"] == 0


def test_every_figure_is_of_the_report_problems(study: BehaviorStudy) -> None:
    found = figures(study.block)
    assert len(found) > 50
    assert {f.split for f in found} == {"report"}
    assert max(f.n for f in found) == 4, "several draws are no more problems"
    drawn = study.block["probabilities"]["replacement - random"]["moment"]
    assert isinstance(drawn, SetsMeasurement) and drawn.draws == OPTIONS.probability_draws
    assert drawn.min <= drawn.value <= drawn.max and "only 2 sets" in drawn.reason
    assert {f.seeds for f in found} == {(0,)}
    assert study.circuit.split == "select"


def test_the_circuit_is_as_large_as_it_says(study: BehaviorStudy, pair: PairedModel) -> None:
    size, found, circuit = study.block["circuit"], study.found, study.circuit
    promoting = circuit.ids()
    assert found.search is not None
    assert set(promoting) == set(found.search.order)
    assert size["n"] == len(promoting) == round(SEARCH.share * size["alive"]) == sum(size["by_layer"])
    assert size["n"] == sum(size[role] for role in ROLES if role != "suppress")
    assert size["suppress"] == len(circuit.ids("suppress"))
    assert size["alive"] == int(found.alive.sum())
    assert size["share_of_alive"] == size["n"] / size["alive"]
    assert size["share_of_all"] == size["n"] / (pair.n_layers * 32)
    assert 0 < size["share_of_activation"] < 1
    assert 1 <= size["distinct_directions"] <= size["n"]
    assert circuit.strength == size["strength"] == SEARCH.strength
    assert circuit.fingerprints["adapters"] == pair.installed_adapters().fingerprint
    assert study.block["moments"]["select"] == found.onsets.counts


def test_what_fires_is_counted_over_the_response(study: BehaviorStudy, pair: PairedModel) -> None:
    found = study.found
    with torch.no_grad(), pair.routed("replacement"), pair.recorded(ACTS_HOOK) as acts:
        pair.model(found.onsets.tokens)
    at = found.onsets.predicting
    fired = torch.stack([(acts[layer][at] > 0).sum(0) for layer in range(pair.n_layers)])
    assert torch.equal(found.alive, fired > 0)
    assert abs(found.l0 - float(fired.sum()) / (int(at.sum()) * pair.n_layers)) < 1e-3
    adapters = pair.installed_adapters()
    activation = torch.stack([acts[i][at].sum(0) * adapters[i].W_dec.norm(dim=1) for i in range(pair.n_layers)])
    assert torch.allclose(found.firings, activation.detach(), rtol=1e-3, atol=1e-3)


def test_conditions_are_what_their_names_say(study: BehaviorStudy, pair: PairedModel, subject: Subject) -> None:
    order, words = list(study.found.search.order), ["wait"]  # type: ignore[union-attr]
    slips = [subject.slipped(p, r) for p, r in zip(subject.report, respond(pair.model, subject.report), strict=True)]  # type: ignore[misc]

    def said(variant: Variant, opened: bool = False) -> Any:
        return answers(pair, subject, variant, opened=opened)

    def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
        assert plain({k: v for k, v in found.items() if k != "signs"}) == plain(expected)

    none, both = said(on_route("replacement")), said(without(order))
    same(study.block["necessity"]["none"], record(none, none, words, "report", slips))
    same(study.block["necessity"]["circuit"], record(both, none, words, "report", slips))
    none = said(on_route("hybrid"), True)
    for name, strength in (("circuit_at_strength", study.circuit.strength), ("circuit", 1.0)):
        inserted = Variant("in", partial(only, features=order, route="replacement", factor=strength))
        same(study.block["sufficiency"][name], record(said(inserted, True), none, words, "report", slips))
    negated = Variant("negated", lambda pair: only(pair, order, "target+adapter", -0.5))
    none, both = said(on_route("target")), said(negated)
    same(study.block["transfer"]["negated"], record(both, none, words, "report", slips))
    onsets = find_onsets(pair, traces_of(none, pair.model.tokenizer))
    assert study.block["moments"]["report"] == onsets.counts
    assert onsets.counts["moments"] >= 3
    residuals = ReplacementResiduals.read(pair, onsets)
    for name, variant in (("replacement - circuit", without(order)), ("hybrid + circuit", inserted)):
        found = probabilities(pair, onsets, variant, "report", residuals)
        assert plain(study.block["probabilities"][name]) == plain(found)


def test_controls_are_set_on_the_select_split_and_read_on_the_other(study: BehaviorStudy, pair: PairedModel) -> None:
    controls, given = study.block["controls"], study.block["probabilities"]
    texts, circuit = TuningTexts(pair, study.found.onsets), controls["circuit"]
    measured = texts.measure(without(list(study.found.search.order)))  # type: ignore[union-attr]
    assert (circuit["p_onset"], circuit["kl_elsewhere"]) == (measured.p_onset, measured.kl_elsewhere)
    assert circuit["write_norm"] == pytest.approx(1)
    effect = texts.unchanged.p_onset - measured.p_onset
    for name in BASELINES:
        reached = abs(controls[name]["p_onset"] - measured.p_onset) <= EFFECT_TOLERANCE * effect
        assert controls[name]["reached"] == reached
        assert 0 <= given[f"replacement, {name}"]["kl_elsewhere"].value < math.inf
    assert controls["logit_bias"]["reached"]
    assert given["replacement, logit_bias"]["moment"].value > 0, "and so it is no ban"
    for of in SETS:
        assert controls[of]["size"] <= circuit["size"]
        assert controls[f"{of}_scaled"]["write_norm"] == pytest.approx(1)
        off = abs(controls[f"{of}_equal_harm"]["kl_elsewhere"] - measured.kl_elsewhere)
        assert controls[f"{of}_equal_harm"]["reached"] == (off <= HARM_TOLERANCE * measured.kl_elsewhere)
    assert given["replacement"]["kl_elsewhere"].value == 0
    assert given["hybrid"]["kl_elsewhere"].value > 0
    more, injected = study.block["injected_more"], study.block["injected"]
    for name, figure in more.items():
        apart = injected[f"replacement - {name}"].value - injected["replacement - circuit"].value
        assert figure.value == pytest.approx(apart)


def test_words_that_nothing_was_chosen_on_are_read_at_the_same_places(
    study: BehaviorStudy, pair: PairedModel, subject: Subject
) -> None:
    tokenizer, found = pair.model.tokenizer, study.block["other_words"]
    held_out = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("Hmm", " Hmm", "hmm", " hmm", "No")]
    assert all(len(ids) == 1 for ids in held_out)
    onsets = find_onsets(pair, traces_of(respond(pair.model, subject.report, max_new_tokens=LIMIT), tokenizer))
    others = replace(onsets, phrases=tuple(ids[0] for ids in held_out))
    expected = probabilities(pair, others, without(list(study.found.search.order)), "report")  # type: ignore[union-attr]
    assert plain(found["replacement - circuit"]) == plain(expected)
    conditions = {"target", "replacement", "replacement - circuit", "words banned", "hybrid", "hybrid + circuit"}
    assert set(found) == {*conditions, "hybrid + circuit_at_strength"}
    assert found["words banned"]["moment"].value > found["replacement"]["moment"].value, "what is banned goes there"


def test_doses_grow_to_the_whole(study: BehaviorStudy) -> None:
    doses, block = study.block["dose"], study.block
    found = study.found.search
    assert found is not None
    n, further = block["circuit"]["n"], len(found.further)
    assert 0 < further == round(SEARCH.further * SEARCH.share * block["circuit"]["alive"]) - n
    assert [d["n"] for d in doses] == [4, n, n + further]
    whole = doses[1]
    assert whole["hesitation_per_1k"].value == block["necessity"]["circuit"]["hesitation_per_1k"]
    assert whole["p_moment"] == pytest.approx(block["probabilities"]["replacement - circuit"]["moment"].value)
    assert whole["p_inserted"] == pytest.approx(block["probabilities"]["hybrid + circuit"]["moment"].value)
    assert whole["p_moment"] < doses[0]["p_moment"] < block["probabilities"]["replacement"]["moment"].value
    enough = [d["n"] for d in doses if d["hesitation_cut"] >= MIN_HESITATION_CUT]
    assert block["smallest"]["n"] == min(enough, default=None)


def test_dose_curves_end_in_the_conditions_that_other_parts_measure(
    study: BehaviorStudy, pair: PairedModel, subject: Subject
) -> None:
    block, found = study.block, study.block["dose_curves"]
    given, before = block["probabilities"], block["probabilities"]["replacement"]["moment"]
    assert plain(found["unchanged"]["p_onset"]) == plain(before)
    assert found["unchanged"]["corrected"].value == block["injected"]["replacement"].value
    full = {"circuit": "replacement - circuit"} | {name: f"replacement, {name}" for name in BASELINES}
    full |= {of: f"replacement - {of}_equal_harm" for of in SETS}
    assert set(found["curves"]) == set(full) == set(INTERVENTIONS)
    for name, condition in full.items():
        half, whole = found["curves"][name]
        assert (half["factor"], whole["factor"]) == (0.5, 1.0) and half["size"] == pytest.approx(whole["size"] / 2)
        assert whole["size"] == pytest.approx(
            1 if name == "circuit" else block["controls"][INTERVENTIONS[name]]["size"]
        )
        harm, same = whole["kl_elsewhere"], given[condition]["kl_elsewhere"]
        assert (harm.value, harm.low, harm.high) == pytest.approx((same.value, same.low, same.high))
        assert whole["behavior_left"].value == pytest.approx(given[condition]["moment"].value / before.value)
        assert whole["behavior_left"].low <= whole["behavior_left"].value <= whole["behavior_left"].high
        assert whole["corrected"].value == block["injected"][condition].value
        assert half["kl_elsewhere"].value > 0
        if name in ("circuit", "logit_bias"):
            assert whole["behavior_left"].value < half["behavior_left"].value < 1, "half as strong leaves more"
    onsets = find_onsets(pair, traces_of(answers(pair, subject, on_route("target")), pair.model.tokenizer))
    half = rescaled(list(study.found.search.order), 0.5)  # type: ignore[union-attr]
    by_hand = probabilities(pair, onsets, half, "report")["moment"].value / before.value
    assert found["curves"]["circuit"][0]["behavior_left"].value == pytest.approx(by_hand, rel=1e-4)


def test_a_circuit_does_more_than_random_features_that_are_as_active(study: BehaviorStudy) -> None:
    said = {name: p["moment"].value for name, p in study.block["probabilities"].items()}
    assert said["replacement - circuit"] < 0.7 * said["replacement"]
    assert said["replacement - circuit"] < said["replacement - random"]
    assert said["hybrid + circuit"] > said["hybrid + random"]
    assert said["hybrid + circuit_at_strength"] > 3 * said["hybrid"]
    assert said["hybrid + circuit_at_strength"] > said["hybrid + circuit"] > said["hybrid"]


def test_criteria_are_read_off_the_block(study: BehaviorStudy) -> None:
    criteria, block = study.block["criteria"], study.block
    assert len({c["name"] for c in criteria}) == len(criteria) >= 9
    for c in criteria:
        assert set(c) == {"name", "value", "bar", "reached", "n", "needs"}
        assert (c["value"] is None and c["reached"] is None) or math.isfinite(c["value"])
        assert c["reached"] is None or isinstance(c["reached"], bool)
        assert c["needs"] is None or (f"needs n >= {c['needs']:,}; n = {c['n']}" in c["bar"])
        assert c["bar"]
    asked = {c["name"]: c for c in criteria}
    gone, measured = asked["hesitation gone without it"], block["necessity"]["circuit"].get("hesitation_cut")
    assert gone["value"] == (None if measured is None else measured.value), "none was there to be gone"
    equal = asked["accuracy, hybrid + circuit less hybrid"]
    assert (equal["reached"], equal["n"]) == (None, 4) and "not enough problems" in equal["bar"]
    share = asked["circuit, share of the alive features"]
    assert (share["value"], share["reached"]) == (block["circuit"]["share_of_alive"], False), "10 % is above 3 %"
    said = block["probabilities"]
    kept = asked["P(word) at the target's onsets, hybrid + circuit over target"]
    assert kept["value"] == said["hybrid + circuit"]["moment"].value / said["target"]["moment"].value
    shorter = asked["responses shorter without it"]
    assert shorter["value"] == -block["necessity"]["circuit"]["length_change"].value
    assert shorter["reached"] == (shorter["value"] >= 0.2)
    counts, by = block["moments"]["report"], said["hybrid + circuit"]
    everywhere = asked["P(word) at all other places of the response, hybrid + circuit"]["value"]
    low, high = sorted((by["boundary"].value, by["elsewhere"].value))
    assert low < everywhere < high
    assert counts["boundaries"] > 0
    i = block["injected"]
    lost = asked["injected errors corrected: lost without it"]
    assert lost["value"] == i["replacement"].value - i["replacement - circuit"].value
    with_it, without_it = (i[name].outcomes for name in ("replacement", "replacement - circuit"))
    pairs = list(zip(with_it, without_it, strict=True))
    change = newcombe(*map(pairs.count, product("10", repeat=2)))
    assert lost["reached"] == (change.low > 0 and mcnemar(with_it, without_it) < 0.05)


# -- finding alone ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traces(pair: PairedModel, subject: Subject) -> list[Trace]:
    return traces_of(respond(pair.model, subject.select, max_new_tokens=LIMIT), pair.model.tokenizer)


def test_finding_is_the_first_part_and_the_same_twice(
    study: BehaviorStudy, pair: PairedModel, traces: list[Trace]
) -> None:
    found = find_circuit(pair, traces, options=SEARCH, progress=False)
    assert found.circuit == study.circuit
    assert found.search == study.found.search
    assert found.roles is not None
    assert found.roles.features == found.circuit.features
    assert found.circuit.threshold == found.roles.threshold > 0
    assert {e.target for e in found.circuit.edges} & {None}


def test_a_function_finds_what_the_word_finds(pair: PairedModel, traces: list[Trace]) -> None:
    wait = pair.model.tokenizer("Wait", add_special_tokens=False)["input_ids"][0]
    behavior = Behavior("doubt", find=lambda trace: [i for i, t in enumerate(trace.tokens) if t == wait])
    options = replace(SEARCH, share=0.03)
    found = find_circuit(pair, traces, behavior, split="tune", options=options, progress=False)
    plainly = find_circuit(pair, traces, "Wait", options=options, progress=False)
    assert torch.equal(found.onsets.onset, plainly.onsets.onset)
    assert len(found.circuit.ids()) == len(plainly.circuit.ids()) > 2
    assert len({*found.circuit.ids()} & {*plainly.circuit.ids()}) > 0.5 * len(plainly.circuit.ids())
    assert (found.circuit.behavior, found.circuit.split) == ("doubt", "tune")
    assert found.circuit.words == ("Wait",)


def test_fewer_onsets_than_that_are_no_behavior(pair: PairedModel, traces: list[Trace]) -> None:
    wait = pair.model.tokenizer("Wait", add_special_tokens=False)["input_ids"][0]
    doubting = [trace for trace in traces if wait in trace.tokens[trace.prompt_length :]]
    each = [trace.tokens.count(wait) for trace in doubting]
    enough = next(n for n in range(len(each)) if sum(each[:n]) >= FEWEST_ONSETS)
    options = replace(SEARCH, share=0.01)
    assert len(find_circuit(pair, doubting[:enough], options=options, progress=False).circuit)
    found = find_circuit(pair, doubting[: enough - 1], options=options, progress=False)
    assert (found.search, found.roles, found.circuit.features, found.circuit.edges) == (None, None, (), ())
    assert found.circuit.words
    assert found.onsets.onset.any()


def test_adapters_that_do_nothing_have_no_circuit(traces: list[Trace]) -> None:
    other = load_organism_pair()
    other.new_adapters(8)
    with torch.no_grad():
        for adapter in other.installed_adapters():
            adapter.b_enc.fill_(-1e3)
    with pytest.raises(BehaviorError, match="No feature of these adapters fires.*train them first"):
        find_circuit(other, traces, progress=False)
    never = find_circuit(other, traces, Behavior("doubt", ("Perchance",)), progress=False)
    assert never.circuit.features == (), "where nothing is said there is nothing to find, dead or not"


# -- nothing to find ----------------------------------------------------------------------------------------------


def test_a_target_that_never_says_the_word_has_no_circuit_and_no_conditions() -> None:
    """The base as its own target: it answers at once."""
    null = PairedModel.from_pretrained(organism.BASE, organism.BASE)
    randomise(null, 8)
    before = state(null)
    study = analyze_hesitation(null, builtin_subject(30, 5), OPTIONS, progress=False)
    assert study.block["moments"]["select"] == {"documents": 30, "moments": 0, "boundaries": 0}
    assert study.block["moments"]["report"]["moments"] == 0
    assert set(study.block) == {"schema_version", "behaviour", "words", "moments", "circuit"}
    size = study.block["circuit"]
    assert size["alive"] > 0
    assert {size[name] for name in ("n", *ROLES, "share_of_alive")} == {0}
    assert (study.circuit.features, study.examples) == ((), [])
    assert study.found.search is None
    json.dumps(plain(study.block), allow_nan=False)
    assert "no features" in study._repr_html_() and "nothing measured" in repr(study) and not len(study.to_pandas())
    assert state(null) == before


def test_a_report_without_an_onset_has_a_circuit_and_no_conditions(pair: PairedModel, subject: Subject) -> None:
    study = analyze_behavior(
        pair,
        replace(subject, report=subject.report[3:]),
        Behavior("doubt"),
        options=OPTIONS,
        seeds=(4,),
        progress=False,
    )
    assert set(study.block) == {"schema_version", "behaviour", "words", "moments", "circuit"}
    assert study.block["circuit"]["n"] > 0
    assert study.circuit.behavior == study.block["behaviour"] == "doubt"
