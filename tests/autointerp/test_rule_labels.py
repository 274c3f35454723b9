"""Labels by rules depend on what a feature does, and need enough firings and effects that stand out."""

import json
import math
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import stores
from helpers.made_stores import anywhere, made_store, on_its_token, real_store

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.autointerp.category_shares import CategoryShare, label_shares
from tl_adapters.autointerp.rule_labels import (
    MAX_TOKEN_TYPES,
    MIN_FEATURES_FOR_MEDIAN,
    MOSTLY_SHARE,
    RULE_CATEGORIES,
    label_by_rules,
    quoted,
    rule_labels,
)
from tl_adapters.features.feature import Example, Feature, Label
from tl_adapters.features.logit_effects import layer_effects
from tl_adapters.utils.bootstrap import bootstrap_kappa, bootstrap_strata
from tl_adapters.utils.clustered_intervals import difference_of_means
from tl_adapters.utils.results import plain
from tl_adapters.utils.share_intervals import share_interval

REGIONS = {"question": 3000, "thinking": 6000, "answer": 1000}
VOCABULARY = 150_000


def firing(token: str, value: float = 1.0) -> Example:
    return Example(("a", token, "b"), (0, 1, 2), (0.0, value, 0.0), 1, 0, 7)


def feature(
    sample: list[str] | None = None,
    top: list[str] | None = None,
    promotes: dict[str, float] | None = None,
    suppresses: dict[str, float] | None = None,
    effects: dict[str, float] | None = None,
    kurtosis: float = 0.0,
    region_share: dict[str, float] | None = None,
    firings: int = 1000,
    number: int = 0,
) -> Feature:
    """A feature that fires on many tokens and moves none much, unless said otherwise; effects in units of 0.5."""
    sample = [f"s{i}" for i in range(20)] if sample is None else sample
    top = [f"t{i}" for i in range(20)] if top is None else top
    scaled = lambda given: {token: 0.5 * z for token, z in (given or {}).items()}  # noqa: E731
    return Feature(
        FeatureId(0, number), "feature", firings, 0.1, 1.0, 2.0, 1.0, (), (),
        dict.fromkeys(REGIONS, 0.1), region_share or {"question": 0.3, "thinking": 0.6, "answer": 0.1}, (), {},
        tuple((scaled(promotes) or {"x": 2.0}).items()), tuple((scaled(suppresses) or {"y": -2.0}).items()),
        scaled(effects), 0.5, kurtosis, ((-2.0, 2.0, VOCABULARY),),
        tuple(map(firing, top)), tuple(map(firing, sample)),
    )  # fmt: skip


def label(made: Feature) -> Label:
    return rule_labels([made], REGIONS)[made.id]


# -- input ------------------------------------------------------------------------------------------------------------


def test_few_tokens_name_an_input_feature() -> None:
    assert label(feature(sample=[" ="] * 18 + ["a", "b"])) == Label('fires on " ="', "input", "rules")
    assert label(feature(sample=["x"] * 8 + ["y"] * 6 + ["z"] * 4 + ["a", "b"])).text == 'fires on "x", "y", "z"'
    assert label(feature(sample=["x"] * 17 + ["y"] * 3)).text == 'fires on "x"'  # no more than it takes


@pytest.mark.parametrize("n_types", [1, 2, 3, 4, 5, 10])
def test_an_input_feature_has_at_most_three_token_types(n_types: int) -> None:
    made = feature(sample=[f"w{i % n_types}" for i in range(20)])
    assert (label(made).category == "input") == (n_types <= MAX_TOKEN_TYPES)


@pytest.mark.parametrize("n", range(1, 21))
def test_the_share_must_be_high_and_certain(n: int) -> None:
    for hits in range(n + 1):
        made = feature(sample=["x"] * hits + [f"o{i}" for i in range(n - hits)])
        # Other types may be among the three: count those too.
        best = [sum(sorted([hits, *([1] * (n - hits))], reverse=True)[:k]) for k in (1, 2, 3)]
        holds = any(h / n >= MOSTLY_SHARE and share_interval(h, n)[0] > 0.5 for h in best)
        assert (label(made).category == "input") == holds
    assert label(feature(sample=["x"] * 3)).category == "unlabelled"  # three firings prove nothing


def test_the_random_sample_decides_and_the_top_examples_are_named_beside() -> None:
    many, one = [f"s{i}" for i in range(20)], ["x"] * 20
    assert label(feature(sample=many, top=one)) == Label('strongest on "x"', "unlabelled", "rules")
    assert label(feature(sample=one, top=["z"] * 20)).text == 'fires on "x"; strongest on "z"'
    assert label(feature(sample=one, top=[" X"] * 20)).text == 'fires on "x"'


def test_spellings_of_a_word_are_one_type_named_by_the_commonest() -> None:
    assert label(feature(sample=["so"] * 5 + [" so"] * 6 + ["So"] * 5 + [" SO"] * 4)).text == 'fires on " so"'
    assert label(feature(sample=["\n"] * 10 + [" "] * 10)).text == r'fires on "\n", " "'  # space is not nothing


# -- output -----------------------------------------------------------------------------------------------------------


def test_few_strong_effects_name_an_output_feature() -> None:
    assert label(feature(promotes={" so": 30, "So": 20, "x": 3}, kurtosis=50)) == Label(
        'promotes " so", "So"', "output", "rules"
    )
    assert label(feature(suppresses={"z": -30}, kurtosis=50)) == Label('suppresses "z"', "output", "rules")


def test_effects_must_be_concentrated_and_stand_out() -> None:
    assert label(feature(promotes={"q": 30}, kurtosis=1)).category == "unlabelled"
    assert label(feature(promotes={"q": 5}, kurtosis=50)).category == "unlabelled"
    chance = 1.5 * math.sqrt(2 * math.log(VOCABULARY))
    assert label(feature(promotes={"q": 1.01 * chance}, kurtosis=50)).category == "output"
    assert label(feature(promotes={"q": 0.99 * chance}, kurtosis=50)).category == "unlabelled"


def test_a_feature_that_writes_nothing_has_no_output_label() -> None:
    silent = replace(feature(promotes={"q": 30}, kurtosis=50), effect_spread=0.0)
    assert label(silent).category == "unlabelled"


def test_effects_that_all_features_have_are_not_named() -> None:
    """Where every feature moves some token that much, only a much larger effect stands out."""
    common = [feature(promotes={"q": 12}, kurtosis=50, number=i) for i in range(MIN_FEATURES_FOR_MEDIAN)]
    special = feature(promotes={"q": 30}, kurtosis=50, number=99)
    found = rule_labels([*common, special], REGIONS)
    assert {id.index for id, label in found.items() if label.category == "output"} == {99}
    assert all(label(one).category == "output" for one in common[:2])  # of few features no median is taken


def test_a_leading_hesitation_word_needs_a_smaller_effect() -> None:
    """Where the median feature has an effect of 12, 19 are enough for a leading word, and 25 for others."""
    common = [feature(promotes={"q": 12}, number=i) for i in range(MIN_FEATURES_FOR_MEDIAN)]
    cases = {
        50: ({"Wait": 19}, True), 51: ({"q": 19.5, "Wait": 19}, False), 52: ({"q": 40, "Wait": 25}, True),
        53: ({"Wait": 17}, False), 54: ({"Wait": -19, "q": 30}, True), 55: ({"Wait": 19, "Hmm": 18.5}, True),
    }  # fmt: skip
    made = [feature(effects=moved, promotes=moved, number=i) for i, (moved, _) in cases.items()]
    found = rule_labels([*common, *made], REGIONS)
    for i, (_, holds) in cases.items():
        assert (found[FeatureId(0, i)].category == "hesitation") == holds, i
    assert found[FeatureId(0, 55)].text == 'promotes "Wait", "Hmm"'


@cache
def directions(seed: int) -> list[Feature]:
    """Features that write at random, through the model organism's unembedding."""
    pair = stores.random_pair()
    written = torch.randn(400, pair.model.cfg.d_model, generator=torch.Generator().manual_seed(seed))
    return _features(written)


def _features(written: torch.Tensor) -> list[Feature]:
    pair = stores.random_pair()
    effects, vocabulary = layer_effects(pair, 0, written), real_store().vocabulary
    named = lambda ids, by: tuple((vocabulary[i], e) for i, e in zip(ids.tolist(), by.tolist(), strict=True))  # noqa: E731
    return [
        replace(
            feature(number=i),
            top_logits=named(effects.top_tokens[i], effects.top[i]),
            bottom_logits=named(effects.bottom_tokens[i], effects.bottom[i]),
            effect_spread=float(effects.spread[i]),
            effect_kurtosis=float(effects.kurtosis[i]),
            effect_histogram=((-1.0, 1.0, len(vocabulary)),),
        )
        for i in range(len(written))
    ]


def test_random_directions_rarely_get_a_label() -> None:
    """In the model organism's vocabulary, of which few tokens are in use, hence where all of it moves few tokens."""
    found = rule_labels(directions(0), REGIONS)
    assert sum(label.category != "unlabelled" for label in found.values()) < 0.05 * len(found)


def test_a_planted_output_feature_is_found_and_named() -> None:
    """It writes the direction that raises one token more than all others."""
    pair = stores.random_pair()
    vocabulary = real_store().vocabulary
    tokens = [vocabulary.index(text) for text in ("Wait", "Hmm", "7", "=", "<think>")]
    unembedding = pair.backend.unembedding().detach().float() * pair.backend.norm("ln_final").float()
    whitened = torch.linalg.pinv(unembedding - unembedding.mean(0))  # raises one token and as few others as it can
    planted = _features(whitened.T[tokens])
    found = rule_labels([*directions(0), *(replace(f, id=FeatureId(1, i)) for i, f in enumerate(planted))], REGIONS)
    for i, token in enumerate(tokens):
        said = found[FeatureId(1, i)]
        assert said.category == ("hesitation" if i < 2 else "output")
        assert said.text.startswith(f"promotes {quoted(vocabulary[token])}")


# -- region, hesitation, several --------------------------------------------------------------------------------------


def test_a_region_counts_where_it_is_not_most_of_the_trace() -> None:
    assert label(feature(region_share={"answer": 0.9, "thinking": 0.1})) == Label(
        "in the region answer", "region", "rules"
    )
    assert label(feature(region_share={"thinking": 1.0})).category == "unlabelled"  # as are six tokens of ten
    assert label(feature(region_share={"answer": 0.7, "thinking": 0.3})).category == "unlabelled"
    assert label(feature(region_share={"answer": 1.0}, firings=3)).category == "unlabelled"


@pytest.mark.parametrize("word", ["Wait", " wait", "HMM", " Alternatively"])
def test_hesitation_in_any_spelling_from_either_side(word: str) -> None:
    assert label(feature(promotes={"q": 40, word: 20})).category == "hesitation"  # whatever the kurtosis
    assert label(feature(promotes={"q": 40, word: 20})).text == f"promotes {quoted(word)}"
    assert label(feature(effects={word: 20})).text == f"promotes {quoted(word)}"  # not among the first ten
    assert label(feature(effects={word: -20})) == Label(f"suppresses {quoted(word)}", "hesitation", "rules")
    assert label(feature(sample=[word] * 20)) == Label(f"fires on {quoted(word)}", "hesitation", "rules")
    assert label(feature(effects={word: 4})).category == "unlabelled"


def test_hesitation_may_be_many_words() -> None:
    many = ["Wait"] * 4 + ["Hmm"] * 4 + ["But"] * 4 + ["Actually"] * 4 + ["However"] * 4
    assert label(feature(sample=many)).category == "hesitation"
    some = ["Wait"] * 8 + [f"o{i}" for i in range(12)]
    assert label(feature(sample=some)).category == "unlabelled"
    mixed = ["Wait"] * 8 + ["="] * 12  # a token feature, of which less than most is hesitation
    assert label(feature(sample=mixed)).category == "input"


def test_other_words_can_be_hesitation() -> None:
    made = feature(promotes={"No": 40}, sample=["Wait"] * 20)
    assert rule_labels([made], REGIONS, ["No"])[made.id] == Label(
        'promotes "No"; fires on "Wait"', "hesitation", "rules"
    )
    assert rule_labels([made], REGIONS, ["Nay"])[made.id].category == "input"


def test_one_label_says_all_and_the_category_follows_the_order() -> None:
    region, tokens = {"answer": 1.0}, ["="] * 20
    everything = feature(sample=tokens, promotes={"Wait": 40}, suppresses={"z": -40}, kurtosis=99, region_share=region)
    assert label(everything) == Label(
        'promotes "Wait"; suppresses "z"; fires on "="; in the region answer', "hesitation", "rules"
    )
    output = feature(sample=tokens, promotes={"q": 40}, kurtosis=99, region_share=region)
    assert label(output).category == "output" and label(feature(sample=tokens, region_share=region)).category == "input"
    assert RULE_CATEGORIES == ("hesitation", "output", "input", "region", "unlabelled")


@pytest.mark.parametrize("odd", ["\n", "\u2028", '"', "\\", "\x85", "\ud800", "<b>", "\x00"])
def test_a_label_is_one_line_whatever_the_token(odd: str) -> None:
    text = label(feature(sample=[odd] * 20)).text
    assert len(text.splitlines()) == 1 and text.encode("utf-8")
    assert json.loads(text.removeprefix("fires on ")) == odd


def test_a_feature_to_which_no_rule_applies_is_unlabelled() -> None:
    assert label(feature()) == Label("", "unlabelled", "rules") and rule_labels([], REGIONS) == {}
    assert label(feature(sample=[], top=[], firings=0, region_share={"answer": 0.0})).category == "unlabelled"


# -- stores -----------------------------------------------------------------------------------------------------------


def test_token_features_of_a_store_are_found_and_random_ones_are_not() -> None:
    tokens, chance = made_store(on_its_token), made_store(anywhere, seed=4)
    found = label_by_rules(tokens)
    assert set(found) == set(tokens.ids()) and tokens.labels == found
    for id, given in found.items():
        text = tokens.vocabulary[(0, 2).index(id.layer) * 12 + id.index]
        assert given.category == "input" and f"fires on {quoted(text)}" in given.text
    assert {given.category for given in label_by_rules(chance).values()} == {"unlabelled"}


def test_labels_by_models_and_persons_are_kept(tmp_path: Path) -> None:
    store = made_store(on_its_token)
    first, second, *_ = store.ids()
    store.set_labels({first: Label("mine", "language", "judge-1"), second: Label("old", "input", "rules")})
    found = label_by_rules(store)
    assert store.labels[first] == Label("mine", "language", "judge-1") and found[first].category == "input"
    assert store.labels[second] == found[second] != Label("old", "input", "rules")


def test_a_real_store_is_labelled_and_its_shares_add_up() -> None:
    store = real_store()
    store.labels.clear()
    found = label_by_rules(store)
    shares = label_shares(store.labels, store.ids(), split=store.about.split)
    assert sum(s.count for s in shares.values()) == len(found) == len(store.ids())
    assert sum(s.share.value for s in shares.values()) == pytest.approx(1)
    for share in shares.values():  # all are labelled: what they are weighted with changes nothing
        assert share.weighted.value == pytest.approx(share.share.value)
    json.dumps(plain(shares), allow_nan=False)


# -- shares -----------------------------------------------------------------------------------------------------------


def some_labels(counts: dict[int, dict[str, int]]) -> dict[FeatureId, Label]:
    return {
        FeatureId(layer, i): Label("", category)
        for layer, of in counts.items()
        for i, category in enumerate(Counter(of).elements())
    }


def test_layers_are_weighted_by_their_alive_features() -> None:
    """Ten judged in each of two layers, of 10 and of 90 alive."""
    labels = some_labels({0: {"input": 10}, 1: {"output": 10}})
    alive = [FeatureId(0, i) for i in range(10)] + [FeatureId(1, i) for i in range(90)]
    shares = label_shares(labels, alive, split="report")
    assert shares["input"].share.value == 0.5 and shares["input"].weighted.value == pytest.approx(0.1)
    assert shares["output"].weighted.value == pytest.approx(0.9)
    assert shares["input"].by_layer == {0: 1.0, 1: 0.0} and shares["input"].weighted.split == "report"


def test_none_of_few_is_not_certain_to_be_none() -> None:
    labels = some_labels({0: {"input": 10}, 1: {"input": 10}})
    shares = label_shares(labels, labels)
    assert shares["output"].count == 0 and shares["output"].weighted.low == 0
    assert (
        shares["output"].weighted.high == pytest.approx(share_interval(0, 20)[1])
        and 0.1 < share_interval(0, 20)[1] < 0.2
    )
    assert shares["input"].weighted.high == 1 and 0.8 < shares["input"].weighted.low < 0.9


def test_dead_features_and_other_categories_do_not_count() -> None:
    labels = some_labels({0: {"input": 2, "language": 3}})
    shares = label_shares(labels, [FeatureId(0, 0), FeatureId(0, 3)])
    assert shares["input"].share.n == 1 and label_shares(labels, []) == {} == label_shares({}, list(labels))


def test_the_weighted_interval_covers() -> None:
    """Two layers of 100 and 300 features, of which 10 % and 50 % are inputs; 40 of each are judged."""
    generator = torch.Generator().manual_seed(0)
    alive = [FeatureId(0, i) for i in range(100)] + [FeatureId(1, i) for i in range(300)]
    covered, width = 0, []
    for _ in range(200):
        hits = [int((torch.rand(40, generator=generator) < p).sum()) for p in (0.1, 0.5)]
        labels = some_labels({i: {"input": h, "output": 40 - h} for i, h in enumerate(hits)})
        figure = label_shares(labels, alive)["input"].weighted
        covered += figure.low <= 0.4 <= figure.high
        width.append(figure.high - figure.low)
    assert 180 <= covered <= 199 and 0.15 < sum(width) / 200 < 0.3


# -- intervals that only labels use -----------------------------------------------------------------------------------


def test_strata_of_one_weight_are_a_mean_of_means() -> None:
    strata = [torch.tensor([0.0, 1.0]), torch.tensor([1.0])]
    found = bootstrap_strata(strata, [1, 3])
    assert found.value == 0.25 * 0.5 + 0.75 and found.low == 0.75 and found.high == 1.0
    assert bootstrap_strata(strata, [10, 30]) == found


def test_a_difference_has_the_interval_of_both() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(200):
        a, b = torch.randn(40, generator=generator) + 1, 2 * torch.randn(60, generator=generator)
        found = difference_of_means(a, b, seed)
        assert found.value == pytest.approx(float(a.double().mean() - b.double().mean()))
        covered += found.low <= 1 <= found.high
    assert 180 <= covered <= 199


def test_kappa() -> None:
    first = torch.tensor([0] * 20 + [0] * 5 + [1] * 10 + [1] * 15)
    second = torch.tensor([0] * 20 + [1] * 5 + [0] * 10 + [1] * 15)
    found = bootstrap_kappa(first, second)
    assert found.value == pytest.approx(0.4) and found.low < 0.4 < found.high  # a textbook's: (0.7 - 0.5) / (1 - 0.5)
    alike = bootstrap_kappa(first, first)
    assert alike.value == 1 and alike.low is None and "no variation" in alike.reason
    assert bootstrap_kappa(first, 1 - first).value < 0
    same = bootstrap_kappa(torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.long))
    assert same.value is None and "same rating" in same.reason
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(5, (2, 4000), generator=generator)
    assert abs(bootstrap_kappa(*random).value) < 0.03


def test_shares_are_records() -> None:
    labels = some_labels({0: {"input": 3}})
    assert all(isinstance(share, CategoryShare) for share in label_shares(labels, labels).values())
