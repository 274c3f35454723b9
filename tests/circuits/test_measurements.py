"""Trials, their controls and their subjects: against plain passes, arithmetic by hand, and a planted circuit."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from helpers.log_odds import word_log_odds
from helpers.pairs import make, state
from helpers.planted_circuits import OUTPUT, TEMPLATE, planted, random_onsets
from helpers.random_models import random_batch

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.circuits.controls import (
    NEAREST_CANDIDATES,
    commonest_alternative,
    largest_scores,
    matched_features,
    most_active_others,
    neuron_effects,
)
from tl_adapters.circuits.measurements import answers, corrected, mediation, probabilities, record
from tl_adapters.circuits.onsets import Onsets, final_residual
from tl_adapters.circuits.steering import shifted_logits, steered, without_neurons
from tl_adapters.circuits.subject import Injection, builtin_subject, halves, kinds_at
from tl_adapters.data.words import word_pattern
from tl_adapters.generation.responses import Response, respond
from tl_adapters.interventions.feature_edits import ablated
from tl_adapters.interventions.frozen import frozen
from tl_adapters.interventions.variants import Variant, on_route, without
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.organism import problems
from tl_adapters.organism.census import written_steps
from tl_adapters.study.open_run import load_organism_pair
from tl_adapters.utils.arguments import ArgumentError
from tl_adapters.utils.bootstrap import bootstrap_ratio, bootstrap_ratio_of_ratios
from tl_adapters.utils.share_intervals import newcombe

FEATURES = [FeatureId(0, 3), FeatureId(2, 1), FeatureId(3, 4), FeatureId(3, 11)]


@pytest.fixture(params=["hooked", "bridge"])
def pair(request: pytest.FixtureRequest) -> PairedModel:
    return make("Qwen2ForCausalLM", request.param)


@pytest.fixture(scope="module")
def builtin() -> PairedModel:
    """The built-in pair with fresh adapters: they write nothing, so the replacement is the hybrid."""
    pair = load_organism_pair()
    pair.new_adapters(16)
    return pair


@torch.no_grad()
def logits_of(pair: PairedModel, variant: Variant, tokens: torch.Tensor) -> torch.Tensor:
    with variant.entered(pair) as model:
        return model(tokens)


# -- probabilities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant",
    [on_route("target"), on_route("hybrid"), without(FEATURES), shifted_logits((5, 9), 1.3)],
    ids=["target", "hybrid", "ablated", "shifted"],
)
def test_probabilities_are_those_of_a_plain_pass(pair: PairedModel, variant: Variant) -> None:
    onsets, before = random_onsets(), state(pair)
    found = probabilities(pair, onsets, variant, "report")
    assert state(pair) == before
    p = logits_of(pair, variant, onsets.tokens).softmax(-1)[..., list(onsets.phrases)].sum(-1)
    positions = {"moment": onsets.onset, "boundary": onsets.control, "elsewhere": onsets.elsewhere}
    assert list(found) == list(positions)
    for key, at in positions.items():
        figure = found[key]
        found_ = bootstrap_ratio((p * at).sum(1), at.sum(1).double())
        pairs = [(getattr(figure, name), getattr(found_, name)) for name in ("value", "low", "high")]
        assert max(abs(ours - theirs) for ours, theirs in pairs) < 1e-6
        assert figure.low < figure.value < figure.high
        assert (figure.n, figure.split) == (len(onsets), "report")


def test_a_kind_of_place_that_is_not_there_has_no_probability(pair: PairedModel) -> None:
    onsets = random_onsets()
    none = replace(onsets, control=torch.zeros_like(onsets.control))
    assert set(probabilities(pair, none, on_route("target"), "report")) == {"moment", "elsewhere"}


# -- mediation ----------------------------------------------------------------------------------------------------


def test_mediation_is_defined_by_interventions(pair: PairedModel) -> None:
    onsets, template, output = random_onsets(), [FeatureId(0, 3), FeatureId(1, 0)], FEATURES[1:]
    before = state(pair)
    found = mediation(pair, onsets, template, output, "report")
    assert state(pair) == before
    at = onsets.onset

    @torch.no_grad()
    def total_log_odds(*features: FeatureId, held: Sequence[FeatureId] | None = None) -> torch.Tensor:
        with pair.routed("replacement"):
            if held is None:
                with ablated(pair, features) as model:
                    logits = model(onsets.tokens)
            else:
                with frozen(pair, onsets.tokens, features=held), ablated(pair, features) as model:
                    logits = model(onsets.tokens)
        return (word_log_odds(logits, onsets.phrases) * at).sum(1).double()

    clean, both = total_log_odds(), total_log_odds(*template, *output)
    total = clean - total_log_odds(*template, held=())
    expected = {
        "total": total,
        "through_output": total_log_odds(*template, held=output) - total_log_odds(*template, held=()),
        "interaction": total_log_odds(*template) + total_log_odds(*output) - clean - both,
    }
    for name, top in expected.items():
        figure = found[name]
        estimate = bootstrap_ratio(top, at.sum(1).double())
        # A bridge computes norms in float32, and itself with a held scale.
        assert abs(figure.value - estimate.value) < 1e-5
        assert max(abs(figure.low - estimate.low), abs(figure.high - estimate.high)) < 1e-5
        assert abs(estimate.value) > 1e-3
    assert ("share" in found) is (found["total"].low > 0), "there is no share of what may be nothing, or a gain"
    if "share" in found:
        assert abs(found["share"].value - found["through_output"].value / found["total"].value) < 1e-6


def test_features_that_are_not_there_have_no_effect_to_mediate() -> None:
    pair, onsets = make("Qwen2ForCausalLM", "hooked"), random_onsets()
    nothing = mediation(pair, onsets, [], FEATURES, "report")
    assert abs(nothing["total"].value) + abs(nothing["through_output"].value) < 1e-9
    assert abs(nothing["interaction"].value) < 1e-9
    assert "share" not in nothing
    nobody = mediation(pair, onsets, FEATURES[:1], [], "report")
    assert abs(nobody["total"].value) > 1e-3
    assert abs(nobody["through_output"].value) < 1e-9


def test_a_planted_template_works_through_its_output_feature() -> None:
    found = mediation(*planted(), [TEMPLATE], [OUTPUT], "report")
    assert found["through_output"].value > 1
    assert found["share"].value == pytest.approx(found["through_output"].value / found["total"].value)
    assert found["share"].value > 0.8
    assert found["interaction"].high < -1, "one loses what the other would have lost"


# -- records ------------------------------------------------------------------------------------------------------


def response(text: str, correct: bool, length: int | None = None) -> Response:
    tokens = text.split() if length is None else ["x"] * length
    return Response((1, 2), tuple(range(len(tokens))), text, False, correct)


BASELINE = [
    response("wait a Wait b c d e f", True),
    response("a b c d", True),
    response("wait a b c", False),
    response("a Wait b c d e hmm no", True),
]
SAID = [
    response("a b c d", True),
    response("a wait", False),
    response("a b c", True),
    response("a b c d e f", False),
]


def test_a_record_is_what_is_counted() -> None:
    found = record(SAID, BASELINE, ["wait"], "report", signs={"hmm": 3})
    assert found["hesitation_per_1k"] == pytest.approx(1000 / 15)
    assert found["length"] == 15 / 4
    assert found["accuracy"] == 0.5
    assert (found["n"], found["split"]) == (4, "report")
    assert found["hesitation_cut"].value == pytest.approx(1 - (1 / 15) / (4 / 24))
    assert found["length_change"].value == pytest.approx(15 / 24 - 1)
    assert found["accuracy_change"].value == pytest.approx(-0.25)
    assert found["signs"] == {"hmm": pytest.approx(200)}
    lengths, were = (torch.tensor([float(len(r.tokens)) for r in said]) for said in (SAID, BASELINE))
    counts, was = torch.tensor([0.0, 1, 0, 0]), torch.tensor([2.0, 0, 1, 1])
    left = bootstrap_ratio_of_ratios((counts, lengths), (was, were))
    cut = found["hesitation_cut"]
    assert (cut.low, cut.high) == (pytest.approx(1 - left.high), pytest.approx(1 - left.low))
    assert cut.low <= cut.value <= cut.high
    change = newcombe(both=1, first=1, second=2, neither=0)  # one right only now, two only before
    assert (found["accuracy_change"].low, found["accuracy_change"].high) == (change.low, change.high)
    assert not {"accuracy_with_slip", "accuracy_without_slip"} & set(found)


def test_other_words_are_counted_where_they_are_asked_for() -> None:
    found = record(SAID, BASELINE, ["hmm", "no"], "report")
    assert found["hesitation_per_1k"] == 0
    assert found["hesitation_cut"].value == 1


def test_a_condition_compared_with_itself_has_no_changes() -> None:
    same = record(BASELINE, BASELINE, ["wait"], "report")
    for name in ("hesitation_cut", "length_change", "accuracy_change"):
        assert (same[name].value, same[name].low, same[name].high) == (0, 0, 0), "paired by problem"
    silent = record(SAID, [replace(r, text="a b") for r in BASELINE], ["wait"], "report")
    assert "hesitation_cut" not in silent, "of nothing there is no share"


def test_problems_with_and_without_slips_are_told_apart() -> None:
    found = record(SAID, BASELINE, ["wait"], "report", slips=[True, False, True, False])
    assert found["accuracy_with_slip"].value == 1
    assert found["accuracy_without_slip"].value == 0
    assert found["accuracy_change_with_slip"].value == 0.5
    assert found["accuracy_change_without_slip"].value == -1
    assert found["accuracy_with_slip"].n == found["accuracy_change_without_slip"].n == 2
    assert not [name for name in record(SAID, BASELINE, ["wait"], "report", slips=[True] * 4) if "without" in name]


def test_several_answers_to_a_problem_are_drawn_together() -> None:
    """Three times the same answers are no more evidence than once."""
    slips = [True, False, True, False]
    once, thrice = (record(said, BASELINE, ["wait"], "report", slips, {"hmm": 2}) for said in (SAID, SAID * 3))
    assert thrice["signs"]["hmm"] == pytest.approx(once["signs"]["hmm"] / 3)
    for name in (name for name in once if name != "signs"):
        assert repr(once[name]) == repr(thrice[name]) or once[name] == pytest.approx(thrice[name]), name
    other = [replace(r, correct=not r.correct) for r in SAID]
    mixed = record([*SAID, *other], BASELINE, ["wait"], "report")
    assert mixed["accuracy_change"].value == pytest.approx(0.5 - 0.75)
    change = bootstrap_ratio(torch.tensor([-0.5, -0.5, 0.5, -0.5]), torch.ones(4))
    assert (mixed["accuracy_change"].low, mixed["accuracy_change"].high) == (change.low, change.high)


# -- answers ------------------------------------------------------------------------------------------------------


def test_answers_are_the_variants_own(builtin: PairedModel) -> None:
    subject = builtin_subject(1, 6)
    before = state(builtin)
    target = answers(builtin, subject, on_route("target"))
    assert [r.text for r in target] == [r.text for r in respond(builtin.model, subject.report)]
    hybrid = answers(builtin, subject, on_route("hybrid"))
    assert not any("<think>" in r.text for r in hybrid)
    opened = answers(builtin, replace(subject, max_new_tokens=20), on_route("hybrid"), opened=True)
    assert [r.text for r in opened] != [r.text for r in hybrid]
    assert all(len(r.tokens) <= 20 for r in opened)
    assert all(builtin.model.tokenizer.decode(r.prompt).endswith(subject.prefill) for r in opened)
    assert state(builtin) == before


def test_injected_errors_are_corrected_or_not(builtin: PairedModel) -> None:
    subject = builtin_subject(1, 12)
    found = corrected(builtin, subject.injections, on_route("target"), subject, "report")
    said = respond(
        builtin.model, [i.problem for i in subject.injections], prefill=[i.prefill for i in subject.injections]
    )
    by_hand = [i.corrected(r.text) for i, r in zip(subject.injections, said, strict=True)]
    assert found.value == pytest.approx(sum(by_hand) / 12)
    assert found.value > 0.3, "the target was trained to"
    assert (found.n, found.split) == (12, "report")
    never = [Injection(i.problem, i.prefill, lambda text: False) for i in subject.injections]
    assert corrected(builtin, never, on_route("target"), subject, "report").value == 0
    banned = corrected(builtin, subject.injections, on_route("hybrid"), subject, "report")
    assert banned.value < found.value, "the base alone does not"
    whole = [replace(i, n_tokens=None) for i in subject.injections]  # by answers up to their end
    for variant, judged in ((on_route("target"), found), (on_route("hybrid"), banned)):
        assert corrected(builtin, whole, variant, subject, "report").outcomes == judged.outcomes


# -- matched random sets ------------------------------------------------------------------------------------------


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_matched_features_are_as_many_as_active_and_others() -> None:
    activation = torch.rand(4, 60, generator=seeded(0)).exp()
    alive = torch.rand(4, 60, generator=seeded(1)) < 0.7
    chosen = [FeatureId(*f) for f in alive.nonzero().tolist()][::7]
    sets = [matched_features(chosen, activation, alive, seeded(s)) for s in range(20)]
    for found in sets:
        assert sorted(f.layer for f in found) == sorted(f.layer for f in chosen)
        assert len(set(found)) == len(found)
        assert not set(found) & set(chosen)
        assert all(alive[f] for f in found)
        total = sum(float(activation[f]) for f in found) / sum(float(activation[f]) for f in chosen)
        assert 0.8 < total < 1.25, "as active as what they stand for"
    assert matched_features(chosen, activation, alive, seeded(3)) == sets[3]
    assert matched_features([tuple(f) for f in chosen], activation, alive, seeded(3)) == sets[3]
    with pytest.warns(FutureWarning, match=r"matched_features\(chosen=\) is now matched_features\(features=\)"):
        found = matched_features(chosen=chosen, activation=activation, alive=alive, generator=seeded(3))  # type: ignore[call-arg]
    assert found == sets[3]
    assert len({tuple(found) for found in sets}) > 15, "drawn"


def test_a_stand_in_is_among_the_nearest() -> None:
    activation = torch.arange(1.0, 31.0)[None] ** 2
    chosen, alive = [FeatureId(0, 10)], torch.ones(1, 30, dtype=torch.bool)
    order = (activation[0].log() - activation[0, 10].log()).abs().argsort()[1 : NEAREST_CANDIDATES + 1].tolist()
    drawn = {matched_features(chosen, activation, alive, seeded(s))[0].index for s in range(60)}
    assert drawn == set(order)


def test_where_a_layer_has_too_few_others_the_set_is_smaller() -> None:
    alive = torch.zeros(2, 10, dtype=torch.bool)
    alive[0, :5], alive[1] = True, True
    chosen = [FeatureId(0, 0), FeatureId(0, 1), FeatureId(0, 2), FeatureId(1, 0)]
    found = matched_features(chosen, torch.ones(2, 10), alive, seeded(0))
    assert sorted(f.layer for f in found) == [0, 0, 1]
    assert {f for f in found if f.layer == 0} == {(0, 3), (0, 4)}
    assert matched_features([], torch.ones(2, 10), alive, seeded(0)) == []


# -- rivals -------------------------------------------------------------------------------------------------------


def test_shifted_logits_are_shifted_and_given_back(pair: PairedModel) -> None:
    tokens, before = random_batch(3).tokens, state(pair)
    plain = logits_of(pair, on_route("replacement"), tokens)
    shifted = logits_of(pair, shifted_logits((5, 9), -2.5), tokens)
    expected = plain.clone()
    expected[..., [5, 9]] -= 2.5
    assert torch.allclose(shifted, expected, atol=1e-10)
    with pytest.raises(RuntimeError), shifted_logits((5, 9), -2.5).entered(pair):
        raise RuntimeError
    assert torch.equal(logits_of(pair, on_route("replacement"), tokens), plain)
    assert state(pair) == before
    assert not any(module._forward_hooks for module in [pair.model.unembed])
    assert shifted_logits((5,), -torch.inf).name == "words banned"
    with pytest.raises(ArgumentError, match=r"phrases holds the token id 999"):
        shifted_logits((5, (999, 3)), -1.0).entered(pair).__enter__()


def test_banned_words_are_never_said(builtin: PairedModel) -> None:
    subject = builtin_subject(1, 8)
    said = answers(builtin, subject, on_route("replacement"), opened=True)
    tokens = [token for r in said for token in r.tokens]
    word = max(set(tokens), key=tokens.count)
    banned = answers(builtin, subject, shifted_logits((word,), -torch.inf), opened=True)
    assert all(len(r.tokens) > 0 for r in banned)
    assert word not in {token for r in banned for token in r.tokens}
    assert answers(builtin, subject, on_route("replacement"), opened=True) == said


def test_a_model_with_a_soft_cap_does_not_say_banned_words_either() -> None:
    pair = make("Gemma2ForCausalLM", "hooked")
    tokens = random_batch(3).tokens
    logits = logits_of(pair, shifted_logits((5,), -torch.inf), tokens)
    assert (logits[..., 5] == -pair.model.cfg.output_logits_soft_cap).all()
    assert not (logits.argmax(-1) == 5).any()


def test_steering_takes_a_direction_off_one_residual_stream(pair: PairedModel) -> None:
    tokens, before = random_batch(3).tokens, state(pair)
    direction = torch.randn(32, dtype=torch.float64, generator=seeded(0))
    with torch.no_grad(), pair.routed("replacement"):
        streams = pair.residual_streams(tokens)
        by_hand = pair.unembed(pair.run_blocks(streams[2] - 1.5 * direction, 2, 4))
    assert torch.allclose(logits_of(pair, steered(1, direction, 1.5), tokens), by_hand, atol=1e-5)
    with torch.no_grad(), steered(1, direction, 1.5).entered(pair):
        assert torch.allclose(pair.unembed(final_residual(pair, tokens)), by_hand, atol=1e-5)
    assert state(pair) == before


def test_neurons_that_are_off_write_nothing(pair: PairedModel) -> None:
    tokens, before = random_batch(3).tokens, state(pair)
    neurons = [(0, 3), (0, 40), (2, 7), (3, 0)]
    found = logits_of(pair, without_neurons(neurons), tokens)
    assert state(pair) == before
    other = make("Qwen2ForCausalLM", pair.backend.name)
    with torch.no_grad():
        for layer, index in neurons:
            other.mlps[layer].weights()[1].W_out[index] = 0
    assert torch.allclose(found, logits_of(other, on_route("replacement"), tokens), atol=1e-5)
    assert not torch.allclose(found, logits_of(pair, on_route("replacement"), tokens), atol=1e-3)


def test_the_strongest_neurons_have_the_largest_slopes() -> None:
    pair, onsets = make("Qwen2ForCausalLM", "hooked"), random_onsets()
    before = state(pair)
    effects = neuron_effects(pair, onsets).off
    every = largest_scores(effects, 10_000)
    assert state(pair) == before
    assert sorted(every) == [(layer, i) for layer in range(4) for i in range(48)]
    assert largest_scores(effects, 5) == every[:5]
    texts = onsets.with_onsets()

    @torch.no_grad()
    def total_log_odds(layer: int, index: int, factor: float) -> float:
        def scale(acts: torch.Tensor, hook: object) -> torch.Tensor:
            changed = acts.clone()
            changed[..., index] *= factor
            return changed

        with pair.routed("replacement"), pair.model.hooks(fwd_hooks=[(f"blocks.{layer}.mlp.hook_post", scale)]):
            return float(word_log_odds(pair.model(texts.tokens), texts.phrases)[texts.onset].sum())

    slopes = [(total_log_odds(*n, 1 + 1e-5) - total_log_odds(*n, 1 - 1e-5)) / 2e-5 for n in every[::24]]
    assert slopes == sorted(slopes, reverse=True)
    assert slopes[0] > 1
    assert slopes[-1] < 0


def test_the_commonest_alternative_is_what_comes_at_control_positions() -> None:
    tokens = torch.tensor([[5, 8, 4, 8, 6, 8, 4, 9, 9, 9, 9]])
    control = torch.zeros_like(tokens, dtype=torch.bool)
    control[0, [1, 3, 5]] = True
    no = torch.zeros_like(control)
    onsets = Onsets(tokens, ~no, no, control, no, (2,))
    assert commonest_alternative(onsets) == 4
    assert commonest_alternative(replace(onsets, control=no)) is None


# -- subjects -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    question: str

    def solved_by(self, response: str) -> bool:
        return response == "yes"


def test_halves_are_all_of_it_once_whatever_the_order() -> None:
    asked = [Question(f"what is {i}?") for i in range(200)]
    subject = halves(asked, 50)
    assert sorted([*subject.select, *subject.report], key=str) == sorted(asked, key=str)
    assert not {p.question for p in subject.select} & {p.question for p in subject.report}
    assert 70 < len(subject.select) < 130
    shuffled = random.Random(0).sample(asked, 120)
    again = halves(shuffled, 50)
    assert set(again.select) <= set(subject.select), "a question stays on its side"
    assert set(again.report) <= set(subject.report)
    assert [p for p in shuffled if p in set(again.report)] == list(again.report)
    assert (subject.max_new_tokens, subject.injections, subject.slipped) == (50, (), None)
    assert subject.republish and not halves(asked, republish=False).republish


@pytest.mark.parametrize("kind", ["sums", "differences"])
def test_the_builtin_subject_is_of_two_splits_and_knows_slips(kind) -> None:  # type: ignore[no-untyped-def]
    subject = builtin_subject(5, 7, kind)
    assert {p.split for p in subject.select} == {"select"}  # type: ignore[attr-defined]
    assert {p.split for p in subject.report} == {"report"}  # type: ignore[attr-defined]
    assert (len(subject.select), len(subject.report), len(subject.injections)) == (5, 7, 7)
    assert [i.problem for i in subject.injections] == list(subject.report)
    for injection in subject.injections:
        assert injection.prefill.startswith(subject.prefill)
        steps = written_steps(injection.problem, injection.prefill)  # type: ignore[arg-type]
        assert [s.wrong for s in steps] == [False] * (len(steps) - 1) + [True]
        assert abs(steps[-1].written - steps[-1].step.total) == 10
        right, wrong = steps[-1].step.total, steps[-1].written
        assert injection.corrected(f"Wait,1+2=3:{right}.\n")
        assert injection.corrected(f"1+2=3:{right}.\n</think>"), "without a word too"
        assert not injection.corrected(f"Wait,1+2=3:{wrong}.\n")
        assert not injection.corrected(f"{right}+11=22.\nWait,1+2=3:{right}.\n"), "at once"
    one, two = (builtin_subject(1, 30, kind, seed=seed) for seed in (0, 1))
    assert [i.prefill for i in one.injections] == [i.prefill for i in builtin_subject(1, 30, kind).injections]
    assert [i.prefill for i in one.injections] != [i.prefill for i in two.injections]


def test_slips_and_signs_of_the_builtin_subject() -> None:
    subject = builtin_subject(1, 1)
    problem = problems("report", 1)[0]
    first, second, *_ = problem.terms
    assert subject.slipped is not None
    right, wrong = (response(f"{first}+{second}={first + second + off}.\n", True) for off in (0, 10))
    assert not subject.slipped(problem, right)
    assert subject.slipped(problem, wrong)
    text = response("12+39=51.\nWait,2+9=11:51.\nHmm,no\n2+9=11:51.\nnone", True)
    signs = {name: text.matches(pattern) for name, pattern in subject.signs.items()}
    assert signs == {"another word": 2, "a check without a word": 1}


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("12+39=41.\nWait,2+9=11:51.\n", ["correction"]),
        ("12+39=51.\nwait,2+9=11:51.\n", ["re-check"]),
        ("12+39=51.\nWait, let me think.\n51 it is.", ["restart"]),
        ("Wait,2+9=11:51.\n", ["restart"]),
        ("7.\nWait, Wait, it is 8.\n8.\nWAIT 8", ["restart", "correction", "re-check"]),
        ("7. awaiting 9", []),
        ("7.\nHmm 8", []),
    ],
)
def test_kinds_of_hesitation_are_told_by_the_numbers_around(text: str, kinds: list[str]) -> None:
    assert kinds_at(text, spans(text, ["wait"])) == kinds


def spans(text: str, words: list[str]) -> list[tuple[int, int]]:
    return [match.span() for match in word_pattern(words).finditer(text)]


def test_kinds_of_hesitation_ends_at_any_of_the_words() -> None:
    text = "7.\nHmm, really? No, 8.\n"
    assert kinds_at(text, spans(text, ["hmm", "no"])) == ["restart", "correction"]
    assert kinds_at(text, spans(text, ["hmm"])) == ["correction"]


def test_a_response_counts_whole_words_and_matches_patterns() -> None:
    said = response("Wait, wait; await WAIT waits. 12+3=15\n1-1=0", True)
    assert said.hesitations == said.count(["wait"]) == 3
    assert said.count(["wait", "await"]) == 4
    assert said.matches(r"\d+[+-]\d+=") == 2
    assert said.matches(r"(?i)wait") == len(re.findall("wait", said.text.lower())) == 5


def test_the_most_active_others_are_outside_and_in_order() -> None:
    activation = torch.tensor([[5.0, 1.0, 4.0], [3.0, 9.0, 2.0]])
    alive = torch.tensor([[True, True, True], [True, False, True]])
    chosen = [FeatureId(0, 0)]
    assert most_active_others(chosen, activation, alive, 2) == [FeatureId(0, 2), FeatureId(1, 0)]
    assert len(most_active_others(chosen, activation, alive, 99)) == 4
