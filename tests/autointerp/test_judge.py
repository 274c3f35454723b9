"""Explaining, detecting and judging with models that read the prompts, and the invariants of detection tasks."""

import json
import random
import re
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fake_chat import FakeChat, Says
from helpers.judges import fired, knowing, shown
from helpers.made_stores import (
    LAYERS,
    PER_LAYER,
    Fires,
    MadeStore,
    after_its_token,
    anywhere,
    at_one_position,
    in_thinking_only,
    made_store,
    on_its_token,
    real_store,
)

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.autointerp import endpoint as endpoint_module
from tl_adapters.autointerp.detection import auto_interpret, detection_question, detection_score, explanation_question
from tl_adapters.autointerp.detection_tasks import (
    MAX_FIRING_PROBABILITY,
    MIN_POSITIVES,
    NEAR_SHARE,
    NEAR_TOKENS,
    DetectionTask,
    NegativeSampler,
    TokenCounts,
    detection_tasks,
    known_firings,
)
from tl_adapters.autointerp.endpoint import BudgetError, Endpoint
from tl_adapters.autointerp.judge import JudgingError, drawn_evenly, judge
from tl_adapters.autointerp.prompts import JUDGE_CATEGORIES, activation_excerpt, detection_excerpt
from tl_adapters.features.feature import Example, Label
from tl_adapters.features.store import FeatureStore
from tl_adapters.utils.results import plain

Messages = list[dict[str, str]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT", 0.01)


@pytest.fixture(scope="module")
def token_store() -> MadeStore:
    return made_store(on_its_token)


@pytest.fixture(scope="module")
def neuron_store() -> MadeStore:
    return made_store(anywhere, "neuron", seed=1)


def client(fake: FakeChat, **options: Any) -> Endpoint:
    return Endpoint(fake.url, "judge-1", "sk-nobody-sees-this-key", **options)


# -- explanations and detection scores --------------------------------------------------------------------------------


def test_a_perfect_judge_scores_one_on_token_features_and_half_on_random_ones(
    token_store: MadeStore, neuron_store: MadeStore, tmp_path: Path
) -> None:
    with FakeChat(knowing) as fake:
        report = auto_interpret(
            token_store, neuron_store, client(fake, cache=tmp_path, concurrency=1), n=20, progress=False
        )
        asked = len(fake.asked)
        again = auto_interpret(token_store, neuron_store, client(fake, cache=tmp_path), n=20, progress=False)
    assert report.neurons is not None and report.difference is not None
    assert report.features.score.value == 1 and report.features.true_positive_rate == 1
    assert report.features.score.low == pytest.approx(0.025 ** (1 / 20))  # all 20 are right, which is not certainty
    assert 0.4 < report.neurons.score.value < 0.6
    assert report.difference.value == pytest.approx(report.features.score.value - report.neurons.score.value)
    assert 0.3 < report.difference.low < report.difference.value < report.difference.high < 0.65
    assert len(report.features.units) == report.features.score.n == 20 and not report.features.failed
    # The store's labels hold the scores.
    for unit in report.features.units:
        assert token_store.labels[FeatureId(*map(int, unit.name.split(".")))] == Label(
            unit.explanation, "", "judge-1", unit.score
        )
    # A repetition costs nothing and gives the same.
    assert len(fake.asked) == asked == report.usage.requests and again.usage.requests == 0
    assert (again.features, again.neurons) == (report.features, report.neurons)
    assert json.loads(json.dumps(plain(report), allow_nan=False))["features"]["score"]["n"] == 20


def test_the_judge_cannot_tell_features_from_neurons(token_store: MadeStore, neuron_store: MadeStore) -> None:
    with FakeChat(knowing) as fake:
        auto_interpret(token_store, neuron_store, client(fake, concurrency=1), n=20, progress=False)
    describing = [a["messages"] for a in fake.asked if "numbered excerpts" not in a["messages"][0]["content"]]
    detecting = [a["messages"] for a in fake.asked if "numbered excerpts" in a["messages"][0]["content"]]
    for asked in (describing, detecting):
        assert len({messages[0]["content"] for messages in asked}) == 1
        assert len({tuple(shown(messages)) for messages in asked}) == 1
        assert not re.search(r"neuron|adapter|layer|feature|store|document", asked[0][0]["content"])
    # Both kinds are asked about in one shuffled row: a random unit fires on many texts, a token's on one or few.
    kinds = ["token" if len(set(fired(shown(m)["excerpts"]))) < 6 else "random" for m in describing]
    assert Counter(kinds) == {"token": 20, "random": 20}
    assert 8 <= sum(a != b for a, b in pairwise(kinds)) <= 32
    # The place of an excerpt says nothing of what is right, and neither does anything else in it.
    for messages in detecting:
        for number, excerpt in enumerate(shown(messages)["excerpts"], start=1):
            assert list(excerpt) == ["number", "before", "token", "after"] and excerpt["number"] == number


@pytest.mark.parametrize("always", [True, False])
def test_a_judge_that_always_says_the_same_gets_exactly_half(always: bool, token_store: MadeStore) -> None:
    def answer(messages: Messages) -> str:
        if "numbered excerpts" in messages[0]["content"]:
            return json.dumps({"fires": [e["number"] for e in shown(messages)["excerpts"] if always]})
        return knowing(messages)

    with FakeChat(answer) as fake:
        report = auto_interpret(token_store, None, client(fake), n=6, progress=False)
    assert {unit.score for unit in report.features.units} == {0.5}
    assert (report.features.true_positive_rate, report.features.true_negative_rate) == (
        float(always),
        float(not always),
    )
    assert report.neurons is None and report.difference is None


def test_the_score_is_balanced_accuracy(token_store: MadeStore) -> None:
    (task,) = detection_tasks(token_store, [FeatureId(0, 1)])
    assert isinstance(task, DetectionTask)
    firings = {i for i, fires in enumerate(task.fires, start=1) if fires}
    others = set(range(1, len(task.fires) + 1)) - firings
    assert len(firings) == len(others)
    assert detection_score(task, "", firings).score == 1 and detection_score(task, "", others).score == 0
    half = set(sorted(firings)[: len(firings) // 2])
    assert detection_score(task, "", half).score == 0.5 + len(half) / len(firings) / 2


def test_a_stopped_run_asks_no_question_twice(token_store: MadeStore, neuron_store: MadeStore, tmp_path: Path) -> None:
    with FakeChat(knowing) as fake:
        whole = auto_interpret(token_store, neuron_store, client(fake), n=5, progress=False)
        fake.asked.clear()
        for budget in (3, 8, 6):  # each run is stopped, in both halves of the work
            with pytest.raises(BudgetError, match=re.escape(str(tmp_path))):
                auto_interpret(
                    token_store, neuron_store, client(fake, cache=tmp_path, request_budget=budget), n=5, progress=False
                )
        report = auto_interpret(token_store, neuron_store, client(fake, cache=tmp_path), n=5, progress=False)
        assert len(fake.asked) == len({json.dumps(asked) for asked in fake.asked}) == 20
    assert (report.features, report.neurons) == (whole.features, whole.neurons)


def test_units_without_a_usable_reply_are_named() -> None:
    def answer(messages: Messages) -> str:
        given = shown(messages)
        if "numbered excerpts" in messages[0]["content"]:
            return json.dumps({"fires": [99]}) if '" w7"' in given["fires"] else knowing(messages)
        return "?" if Counter(fired(given["excerpts"])).most_common(1)[0][0] == " w2" else knowing(messages)

    store = made_store(on_its_token)  # twelve features a layer: tokens " w2" and " w7" are numbers 15 and 20
    with FakeChat(answer) as fake:
        report = auto_interpret(store, None, client(fake), n=24, progress=False)
    assert set(report.features.failed) == {"2.3", "2.8"} and len(report.features.units) == 22
    assert "no usable JSON" in report.features.failed["2.3"] and "from 1 to" in report.features.failed["2.8"]
    assert not {FeatureId(2, 3), FeatureId(2, 8)} & set(store.labels)


# -- invariants of a task ---------------------------------------------------------------------------------------------


@cache
def every_task(store: FeatureStore) -> list[DetectionTask]:
    found = [task for task in detection_tasks(store, store.ids()) if isinstance(task, DetectionTask)]
    assert found
    return found


@pytest.fixture(scope="module", params=["tokens", "thinking", "real"])
def a_store(request: pytest.FixtureRequest, token_store: MadeStore) -> FeatureStore:
    if request.param == "real":
        return real_store()
    return token_store if request.param == "tokens" else made_store(in_thinking_only, seed=2)


def test_no_document_is_used_for_explanation_and_test(a_store: FeatureStore) -> None:
    for task in every_task(a_store):
        assert not {e.document for e in task.explanation_examples} & {e.document for e in task.excerpts}


def test_each_negative_lies_in_the_region_of_its_firing_and_near_it(a_store: FeatureStore) -> None:
    """Firings and negatives are matched one to one."""
    near: list[bool] = []
    for task in every_task(a_store):
        assert sorted(task.counterpart) == list(range(len(task.excerpts)))
        assert [task.fires[i] for i in task.counterpart] == [not fires for fires in task.fires]
        for excerpt, partner in zip(task.excerpts, task.counterpart, strict=True):
            other = task.excerpts[partner]
            assert a_store.region_of(excerpt) == a_store.region_of(other)
        near += [
            abs(e.position - task.excerpts[m].position) <= max(NEAR_TOKENS, NEAR_SHARE * task.excerpts[m].position)
            for e, fires, m in zip(task.excerpts, task.fires, task.counterpart, strict=True)
            if not fires
        ]
    assert sum(near) > 0.95 * len(near)  # where few documents reach a region so late, it is the nearest there is


def test_all_excerpts_of_a_feature_of_one_region_lie_in_that_region() -> None:
    """The explanation "fires in the thinking" does not help to detect a feature that fires in the thinking only."""
    store = made_store(in_thinking_only, seed=2)
    for task in every_task(store):
        assert {store.region_of(e) for e in task.excerpts} == {"thinking"}


@pytest.mark.parametrize("fires", [on_its_token, in_thinking_only, after_its_token, at_one_position])
def test_firings_fire_and_negatives_are_not_known_to(fires: Fires) -> None:
    """The share of negatives that fire although the store does not hold it is the expected share."""
    store = made_store(fires, seed=3)
    unknown, expected, n = 0, 0.0, 0
    for task in every_task(store):
        id = task.feature.id
        values = store.values[LAYERS.index(id.layer) * PER_LAYER + id.index]
        known = known_firings(task.feature)
        assert task.expected_firing_negatives <= MAX_FIRING_PROBABILITY
        for excerpt, firing in zip(task.excerpts, task.fires, strict=True):
            truly = bool(values[excerpt.document, excerpt.position] > 0)
            assert truly or not firing
            if not firing:
                assert (excerpt.document, excerpt.position) not in known
                unknown, expected, n = unknown + truly, expected + task.expected_firing_negatives, n + 1
    assert n > 100 and abs(unknown - expected) < 4 * max(1, expected) ** 0.5


def test_a_token_on_which_a_feature_always_fires_is_never_a_negative(token_store: MadeStore) -> None:
    """Most firings of these features are unknown to the store, and a random token is one of them in 1 of 40 cases."""
    for task in every_task(token_store):
        own = task.feature.id.layer // 2 * PER_LAYER + task.feature.id.index
        tokens = [e.token_ids[e.token_index] for e in task.excerpts]
        assert [token == own for token in tokens] == list(task.fires)


def test_unlikely_positions_are_those_with_a_small_firing_probability() -> None:
    """Against a plain loop, for features that fire on few and on most types of a region."""
    sides = set()
    for share in (0.05, 0.4):
        store = made_store(lambda feature, tokens, g, s=share: (tokens < 40 * s) | on_its_token(feature, tokens, g))
        counts = TokenCounts(store)
        for feature in store.features(store.ids()[::5]):
            negatives = NegativeSampler(store, feature, counts, set(), set())
            for document in range(3):
                ids, regions = store.document(document)
                for region in range(len(store.about.regions)):
                    plainly = [
                        p
                        for p, (token, name) in enumerate(zip(ids, regions, strict=True))
                        if name == store.about.regions[region]
                        and negatives.firing_probability(region, token)[1] <= MAX_FIRING_PROBABILITY
                    ]
                    assert negatives.unlikely_positions(document, region).tolist() == plainly
                    sides.add((negatives.firing_probability(region, -1)[1] > MAX_FIRING_PROBABILITY, bool(plainly)))
    assert {(True, False), (False, True)} <= sides


def test_the_firing_probability_of_a_type_is_its_firings_over_its_tokens() -> None:
    store = made_store(on_its_token)
    counts = TokenCounts(store)
    tokens = [store.document(d) for d in range(store.documents)]
    for feature in store.features(store.ids()):
        own, region = (
            feature.random_examples[0].token_ids[feature.random_examples[0].token_index],
            store.region_of(feature.random_examples[0]),
        )
        code = store.about.regions.index(region)
        there = sum((t, r) == (own, region) for ids, names in tokens for t, r in zip(ids, names, strict=True))
        assert counts.of(code, own) == there
        negatives = NegativeSampler(store, feature, counts, set(), set())
        hits = sum(store.region_of(e) == region for e in feature.random_examples)
        unknown = feature.firings - len(known_firings(feature))
        low, high = negatives.firing_probability(code, own)
        assert low == pytest.approx(min(1, unknown * hits / len(feature.random_examples) / there)) and low <= high <= 1


def test_known_firings_are_those_that_the_examples_show(a_store: FeatureStore) -> None:
    for feature in a_store.features(a_store.ids()[:5]):
        chosen = {(e.document, e.position) for e in (*feature.top_examples, *feature.random_examples)}
        assert chosen <= known_firings(feature)
        if isinstance(a_store, MadeStore):
            values = a_store.values[LAYERS.index(feature.id.layer) * PER_LAYER + feature.id.index]
            assert all(values[place] > 0 for place in known_firings(feature))


def test_the_index_of_an_excerpt_does_not_reveal_whether_it_fires(a_store: FeatureStore) -> None:
    """At each index, firings and negatives are equally frequent, and counterparts are not next to each other."""
    every = [task for task in every_task(a_store) if len(task.fires) == 20]
    for place in range(20):
        firings = sum(task.fires[place] for task in every)
        assert abs(firings - len(every) / 2) < 4 * (len(every) / 4) ** 0.5
    apart = [abs(i - m) for task in every for i, m in enumerate(task.counterpart)]
    assert 5 < sum(apart) / len(apart) < 9  # 7 where all orders are equally likely


def test_firings_are_spread_over_the_activations(token_store: MadeStore) -> None:
    for task in every_task(token_store):
        testing = {e.document for e, fires in zip(task.excerpts, task.fires, strict=True) if fires}
        tested = [e.values[e.token_index] for e, fires in zip(task.excerpts, task.fires, strict=True) if fires]
        there = [e.values[e.token_index] for e in task.feature.random_examples if e.document in testing]
        assert max(tested) == max(there) and min(tested) == min(there)


def test_a_task_depends_on_its_seed_alone(a_store: FeatureStore) -> None:
    ids = a_store.ids()[:8]
    once, again, other = (list(detection_tasks(a_store, ids, seed)) for seed in (0, 0, 1))
    assert once == again != other
    assert list(detection_tasks(a_store, ids[::-1], 0)) == once[::-1]


def test_features_that_cannot_be_tested_are_skipped(token_store: MadeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = made_store(lambda feature, tokens, g: torch.rand(tokens.shape, generator=g) < 0.5)
    assert set(detection_tasks(dense, dense.ids())) == {"too few tokens like its firings on which it does not fire"}
    one = made_store(lambda feature, tokens, g: (tokens == feature) & (torch.arange(80) == 7)[:, None] & (tokens >= 0))
    few = list(detection_tasks(one, one.ids(1)))
    assert few and set(few) == {"too few firings, or in too few documents"}
    with FakeChat(knowing) as fake, pytest.raises(JudgingError, match="Collect more documents"):
        auto_interpret(dense, None, client(fake), n=5, progress=False)
    assert 0 < MAX_FIRING_PROBABILITY < 0.5 and MIN_POSITIVES >= 2


def test_a_feature_of_the_first_token_has_no_negatives() -> None:
    """Every token like its firings is one of its firings."""
    first = made_store(lambda feature, tokens, g: (torch.arange(tokens.shape[1]) < 2).expand(tokens.shape))
    assert {str(t) for t in detection_tasks(first, first.ids())} == {
        "too few tokens like its firings on which it does not fire"
    }


# -- excerpts ---------------------------------------------------------------------------------------------------------


def test_excerpts_hold_all_text_and_mark_the_firings(a_store: FeatureStore) -> None:
    for feature in a_store.features(a_store.ids()[:10]):
        for example in (*feature.top_examples, *feature.random_examples):
            pieces = activation_excerpt(example, feature.max)
            texts = [p if isinstance(p, str) else str(p["fires"]) for p in pieces]
            assert "".join(texts) == "".join(example.tokens)
            firing = "".join(str(p["fires"]) for p in pieces if isinstance(p, dict))
            assert firing == "".join(t for t, v in zip(example.tokens, example.values, strict=True) if v > 0)
            assert all(1 <= p["strength"] <= 10 for p in pieces if isinstance(p, dict))  # type: ignore[operator]
            asked = detection_excerpt(example)
            assert asked["before"] + asked["token"] + asked["after"] == "".join(example.tokens)
            assert asked["token"] == example.tokens[example.token_index]
            anew = a_store.excerpt(example.document, example.position)
            assert (anew.tokens, anew.token_ids, anew.token_index) == (
                example.tokens,
                example.token_ids,
                example.token_index,
            )


def test_the_largest_activation_has_strength_ten() -> None:
    example = Example(("a", "b", "c", "d"), (0, 1, 2, 3), (4.0, 0.0, 0.1, 2.0), 0, 0, 0)
    assert activation_excerpt(example, 4.0) == [
        {"fires": "a", "strength": 10}, "b", {"fires": "cd", "strength": 5},
    ]  # fmt: skip


def test_odd_tokens_are_unchanged_by_the_json(token_store: MadeStore) -> None:
    """Quotes, braces, line ends and instructions to the judge come out of the JSON as they went in."""
    for task in every_task(token_store):
        for messages in (explanation_question(task), detection_question(task, 'fires on "}]\\')):
            json.dumps(messages, ensure_ascii=False).encode("utf-8")  # can be sent
            shown(messages)  # type: ignore[arg-type]
        excerpts = shown(detection_question(task, ""))["excerpts"]  # type: ignore[arg-type]
        sent = [e["token"] for e in excerpts]
        assert sent == [e.tokens[e.token_index].replace("\ud800", "?") for e in task.excerpts]


# -- the judge --------------------------------------------------------------------------------------------------------


def test_the_judge_sorts_and_labels(token_store: MadeStore, tmp_path: Path) -> None:
    store = made_store(on_its_token)
    with FakeChat(knowing) as fake:
        report = judge(store, client(fake, cache=tmp_path), retest=10, progress=False)
        assert len(fake.asked) == 34 == report.usage.requests
        judge(store, client(fake, cache=tmp_path), retest=10, progress=False)
        assert len(fake.asked) == 34
    assert (report.judged, report.alive, report.failed) == (24, 24, {})
    for id in store.ids():
        token = store.vocabulary[(LAYERS.index(id.layer)) * 12 + id.index]
        token = token.replace("\ud800", "?")
        label = store.labels[id]
        assert label.text == " ".join(f"fires on {json.dumps(token)}".split())
        assert (
            label.category == list(JUDGE_CATEGORIES)[len(token) % len(JUDGE_CATEGORIES)] and label.source == "judge-1"
        )
    counts = Counter(label.category for label in store.labels.values())
    assert {c: s.count for c, s in report.shares.items()} == {c: counts[c] for c in JUDGE_CATEGORIES}
    assert sum(s.weighted.value for s in report.shares.values()) == pytest.approx(1)
    domains = sum(s.count for c, s in report.shares.items() if c.startswith("domain"))
    assert report.groups["domain"].count == domains
    assert report.agreement is not None and report.kappa is not None
    assert report.agreement.value == 1 and report.kappa.value == 1 and report.agreement.n == 10
    assert report.agreement.low < 0.8  # ten of ten prove little
    json.dumps(plain(report), allow_nan=False)


def test_a_judge_that_tosses_coins_does_not_agree_with_itself() -> None:
    coins = random.Random(0)

    def answer(messages: Messages) -> str:
        return json.dumps({"category": coins.choice(list(JUDGE_CATEGORIES)), "label": "x", "reason": "y"})

    with FakeChat(answer) as fake:
        report = judge(made_store(on_its_token), client(fake), retest=24, progress=False)
    assert report.agreement is not None and report.kappa is not None
    assert report.kappa.low < 0.1 and report.agreement.value < 0.5
    assert report.kappa.value == pytest.approx(report.agreement.value, abs=0.25)


def test_the_second_question_shows_the_same_feature_in_another_order(token_store: MadeStore) -> None:
    with FakeChat(knowing) as fake:
        judge(token_store, client(fake, concurrency=1), retest=24, progress=False)
    first, second = fake.asked[:24], fake.asked[24:]
    for a, b in zip(first, second, strict=True):
        assert a != b
        mine, yours = shown(a["messages"]), shown(b["messages"])
        assert mine["excerpts"] != yours["excerpts"]
        assert {k: v for k, v in mine.items() if k != "excerpts"} == {k: v for k, v in yours.items() if k != "excerpts"}
        for name in JUDGE_CATEGORIES:
            assert f'"{name}"' in a["messages"][0]["content"] and f'"{name}"' in b["messages"][0]["content"]
    assert len({a["messages"][0]["content"] for a in first}) > 10  # the order of the categories


def test_without_a_second_verdict_there_is_no_agreement(token_store: MadeStore) -> None:
    with FakeChat(knowing) as fake:
        report = judge(made_store(on_its_token), client(fake), n=6, retest=0, progress=False)
    assert report.agreement is report.kappa is None and report.judged == 6
    assert report.shares["language"].weighted.n == 6


def test_wrong_categories_are_asked_again_then_reported() -> None:
    def answer(messages: Messages) -> str:
        given = shown(messages)
        if " w10" in fired(given["excerpts"]):  # the feature of token 23
            return json.dumps({"category": "domain: poetry", "label": "x", "reason": "y"})
        return knowing(messages)

    store = made_store(on_its_token)
    with FakeChat(answer) as fake:
        report = judge(store, client(fake), retest=0, progress=False)
        assert len(fake.asked) == 24 + len(report.failed)
    assert "2.11" in report.failed and "domain: poetry" in report.failed["2.11"]
    assert FeatureId(2, 11) not in store.labels and report.judged == 24 - len(report.failed)


def test_a_judge_without_a_usable_reply_labels_nothing() -> None:
    store = made_store(on_its_token)
    with FakeChat(lambda messages: Says("I cannot")) as fake, pytest.raises(JudgingError, match="None of 24"):
        judge(store, client(fake), retest=0, progress=False)
    assert not store.labels


def test_features_are_drawn_evenly_from_the_layers() -> None:
    ids = [FeatureId(0, i) for i in range(100)] + [FeatureId(1, i) for i in range(3)] + [FeatureId(5, 7)]
    for n in (1, 2, 10, 50):
        drawn = drawn_evenly(ids, n, seed=0)
        counts = Counter(id.layer for id in drawn)
        assert len(set(drawn)) == len(drawn) == n and counts[1] <= 3
        assert counts[0] >= max(counts[1], counts[5]) - 1
    assert sorted(drawn_evenly(ids, 200, 0)) == sorted(ids)
    assert drawn_evenly(ids, 10, 0) == drawn_evenly(ids[::-1], 10, 0) != drawn_evenly(ids, 10, 1)


@pytest.mark.parametrize("options", [{"n": 0}, {"n": -1}, {"retest": -1}])
def test_counts_below_one_are_refused(options: dict[str, int], token_store: MadeStore) -> None:
    with FakeChat(knowing) as fake:
        with pytest.raises(JudgingError, match="n >= 1"):
            judge(token_store, client(fake), progress=False, **options)  # type: ignore[arg-type]
        if "n" in options:
            with pytest.raises(JudgingError, match="n >= 1"):
                auto_interpret(token_store, None, client(fake), progress=False, **options)
        assert not fake.asked


def test_stores_of_the_wrong_kind_are_refused(token_store: MadeStore, neuron_store: MadeStore) -> None:
    with FakeChat(knowing) as fake:
        for given in ((neuron_store, None), (token_store, token_store)):
            with pytest.raises(JudgingError, match="neurons"):
                auto_interpret(*given, client(fake), n=3, progress=False)


def test_categories_stay_when_an_explanation_is_tested() -> None:
    store = made_store(on_its_token)
    store.set_labels({id: Label("was", "language", "other") for id in store.ids()})
    with FakeChat(knowing) as fake:
        auto_interpret(store, None, client(fake), n=4, progress=False)
    tested = [label for label in store.labels.values() if label.score is not None]
    assert len(tested) == 4 and {label.category for label in tested} == {"language"}
    assert sum(label.text == "was" for label in store.labels.values()) == 20


def test_a_collected_store_is_explained_and_judged(tmp_path: Path) -> None:
    store = real_store()
    with FakeChat(knowing) as fake:
        it = client(fake, cache=tmp_path)
        report = auto_interpret(store, None, it, n=12, progress=False)
        judged = judge(store, it, n=12, retest=4, progress=False)
    assert report.features.score.n > 4 and judged.judged == 12
    assert 0.4 < report.features.score.value <= 1
