"""Controls of a circuit: each is set to the circuit's own effect, write norm or harm, and at the least harm."""

from dataclasses import replace

import pytest
import torch
from helpers.pairs import make, state
from helpers.planted_circuits import random_onsets

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.circuits.control_strengths import (
    EFFECT_TOLERANCE,
    HARM_TOLERANCE,
    MAX_COEFFICIENT,
    ConditionEffect,
    TunedCondition,
    TuningTexts,
    features_of_equal_harm,
    features_of_equal_norm,
    set_controls,
    size_for_goal,
    tuned_logit_bias,
    tuned_low_rank,
    tuned_neurons,
    tuned_steering,
)
from tl_adapters.circuits.controls import (
    RELATIVE_RIDGE,
    first_features,
    inserted_in_part,
    largest_scores,
    matched_features,
    matched_order,
    most_active_others,
    neuron_effects,
    removed_in_part,
    size_for_norm,
    written_directions,
)
from tl_adapters.circuits.criteria import correction_beside_others
from tl_adapters.circuits.measurements import (
    ReplacementResiduals,
    corrected_more,
    probabilities,
)
from tl_adapters.circuits.onsets import BehaviorError, Onsets
from tl_adapters.circuits.roles import effects_at
from tl_adapters.circuits.steering import shifted_logits, steered, without_directions, without_neurons
from tl_adapters.interventions.feature_edits import InterventionError, inserted, only
from tl_adapters.interventions.variants import Variant, on_route, without
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.bootstrap import bootstrap_ratio
from tl_adapters.utils.measurement import Measurement, OutcomesMeasurement

N_LAYERS, N_FEATURES = 4, 24


@pytest.fixture(params=["hooked", "bridge"], scope="module")
def pair(request: pytest.FixtureRequest) -> PairedModel:
    return make("Qwen2ForCausalLM", request.param)


@pytest.fixture(scope="module")
def onsets() -> Onsets:
    return random_onsets()


@pytest.fixture(scope="module")
def texts(pair: PairedModel, onsets: Onsets) -> TuningTexts:
    return TuningTexts(pair, onsets)


@pytest.fixture(scope="module")
def norms(pair: PairedModel, onsets: Onsets) -> torch.Tensor:
    return effects_at(pair, onsets).activation


@pytest.fixture(scope="module")
def circuit(pair: PairedModel, onsets: Onsets) -> list[FeatureId]:
    """The six features with the largest effect on the word."""
    best = effects_at(pair, onsets).total.flatten().topk(6).indices.tolist()
    return [FeatureId(i // N_FEATURES, i % N_FEATURES) for i in best]


@pytest.fixture(scope="module")
def others(circuit: list[FeatureId], norms: torch.Tensor) -> list[FeatureId]:
    return most_active_others(circuit, norms, norms > 0, norms.numel())


def kl_elsewhere(pair: PairedModel, onsets: Onsets, variant: Variant, split: str) -> Measurement:
    return probabilities(pair, onsets, variant, split, ReplacementResiduals.read(pair, onsets))["kl_elsewhere"]


@torch.no_grad()
def logits_of(pair: PairedModel, variant: Variant, tokens: torch.Tensor) -> torch.Tensor:
    with variant.entered(pair) as model:
        return model(tokens)


# -- harm elsewhere -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant",
    [without([FeatureId(0, 3), FeatureId(3, 1)]), shifted_logits((5, 9), -2.0), on_route("hybrid")],
    ids=["ablated", "logits alone", "hybrid"],
)
def test_harm_is_the_kl_of_plain_passes_away_from_onsets(
    pair: PairedModel, onsets: Onsets, variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PairedModel, "rows_at_once", 3)  # several chunks of logits
    before = state(pair)
    found = kl_elsewhere(pair, onsets, variant, "report")
    assert state(pair) == before
    was, becomes = (
        logits_of(pair, v, onsets.tokens).log_softmax(-1).double() for v in (on_route("replacement"), variant)
    )
    at = onsets.predicting & ~onsets.onset & ~onsets.continuation
    assert torch.equal(at, onsets.away_from_onsets)
    assert bool((at & onsets.control).any()), "matched control positions are among them"
    by_document = ((was.exp() * (was - becomes)).sum(-1) * at).sum(1)
    expected = bootstrap_ratio(by_document, at.sum(1).double())
    assert (found.value, found.low, found.high) == pytest.approx(
        (expected.value, expected.low, expected.high), abs=1e-5
    )
    assert found.value > 1e-3
    assert (found.n, found.unit, found.split) == (len(onsets), "nats per token", "report")
    together = probabilities(pair, onsets, variant, "report", ReplacementResiduals.read(pair, onsets))
    assert together.pop("kl_elsewhere") == found
    assert together == probabilities(pair, onsets, variant, "report")


def test_what_changes_nothing_harms_nothing_and_a_ban_harms_without_limit(pair: PairedModel, onsets: Onsets) -> None:
    for nothing in (on_route("replacement"), without([]), removed_in_part({}), shifted_logits(onsets.phrases, 0.0)):
        figure = kl_elsewhere(pair, onsets, nothing, "report")
        assert figure.value == 0, nothing.name
    banned = kl_elsewhere(pair, onsets, shifted_logits(onsets.phrases, -torch.inf), "report")
    assert (banned.value, banned.low, banned.high) == (None, None, None)
    assert "infinite" in banned.reason


def test_texts_without_an_onset_or_without_another_place_are_refused(pair: PairedModel, onsets: Onsets) -> None:
    nowhere = torch.zeros_like(onsets.onset)
    with pytest.raises(BehaviorError, match="no onset in these texts"):
        TuningTexts(pair, replace(onsets, onset=nowhere))
    crowded = replace(onsets, onset=onsets.predicting, control=nowhere, continuation=nowhere)
    with pytest.raises(BehaviorError, match="give longer texts"):
        TuningTexts(pair, crowded)
    residuals = ReplacementResiduals.read(pair, crowded)
    assert "kl_elsewhere" not in probabilities(pair, crowded, on_route("hybrid"), "report", residuals)


# -- baselines ----------------------------------------------------------------------------------------------------


def settings(texts: TuningTexts, circuit: list[FeatureId]) -> tuple[ConditionEffect, dict[str, TunedCondition]]:
    goal = texts.measure(without(circuit))
    tuned = {"bias": tuned_logit_bias(texts, goal), "steering": tuned_steering(texts, goal)}
    return goal, tuned | {"neurons": tuned_neurons(texts, goal), "low_rank": tuned_low_rank(texts, goal)}


def test_baselines_do_what_the_circuit_does_and_say_where_they_cannot(
    pair: PairedModel, onsets: Onsets, texts: TuningTexts, circuit: list[FeatureId]
) -> None:
    before = state(pair)
    goal, found = settings(texts, circuit[:3])
    assert state(pair) == before
    effect = texts.unchanged.p_onset - goal.p_onset
    assert effect > 0.01
    for name, setting in found.items():
        missed = abs(setting.measured.p_onset - goal.p_onset)
        assert setting.reached == (missed <= EFFECT_TOLERANCE * effect), name
        assert setting.size > 0
        said = probabilities(pair, texts.onsets, setting.variant, "select")["moment"].value
        harm = kl_elsewhere(pair, texts.onsets, setting.variant, "select").value
        assert (said, harm) == pytest.approx((setting.measured.p_onset, setting.measured.kl_elsewhere), abs=1e-5), name
        record = setting.record(texts.unchanged)
        assert record["p_onset_before"] == texts.unchanged.p_onset > record["p_onset"] == setting.measured.p_onset
        assert setting.at_size is not None and setting.size <= setting.most
        assert texts.measure(setting.at_size(setting.size)) == setting.measured, "the same at the size that was chosen"
        assert texts.measure(setting.at_size(setting.size / 2)).kl_elsewhere < setting.measured.kl_elsewhere, name
    assert found["bias"].reached
    assert found["steering"].reached
    unreachable = replace(goal, p_onset=-1.0)
    nearest = tuned_neurons(texts, unreachable)
    assert not nearest.reached
    assert nearest.measured.p_onset < texts.unchanged.p_onset


def test_steering_is_the_least_harmful_of_all_that_have_the_effect(
    texts: TuningTexts, circuit: list[FeatureId]
) -> None:
    """By hand: every layer, both kinds of place, a grid of coefficients."""
    goal = texts.measure(without(circuit[:3]))
    best = tuned_steering(texts, goal)
    pair, batch = texts.pair, texts.onsets
    with torch.no_grad(), pair.routed("replacement"):
        streams = pair.residual_streams(batch.tokens)
    marks = sorted(set(batch.tokens[batch.onset].tolist()) - set(batch.phrases))
    effect, harms = texts.unchanged.p_onset - goal.p_onset, []
    for layer in range(N_LAYERS):
        direction = streams[layer + 1][batch.onset].mean(0) - streams[layer + 1][batch.control].mean(0)
        for after in (None, marks):
            for coefficient in torch.linspace(0.5, 8, 16).tolist():
                found = texts.measure(steered(layer, direction, coefficient, after))
                if texts.unchanged.p_onset - found.p_onset >= (1 - EFFECT_TOLERANCE) * effect:
                    harms.append(found.kl_elsewhere)
    assert best.measured.kl_elsewhere <= 1.1 * min(harms), "but for the tolerance of the effect"
    assert best.measured.kl_elsewhere < 0.2 * max(harms), "and not the strongest"


def test_a_tuned_bias_is_no_ban(
    pair: PairedModel, onsets: Onsets, texts: TuningTexts, circuit: list[FeatureId]
) -> None:
    bias = tuned_logit_bias(texts, texts.measure(without(circuit[:3])))
    assert 0 < bias.size < 20
    said = logits_of(pair, bias.variant, onsets.tokens).softmax(-1)[..., list(onsets.phrases)]
    banned = logits_of(pair, shifted_logits(onsets.phrases, -torch.inf), onsets.tokens).softmax(-1)
    assert float(said.min()) > 0 == float(banned[..., list(onsets.phrases)].max())


def test_baselines_of_a_circuit_without_effect_do_nothing(texts: TuningTexts) -> None:
    """A variant of the fault: where the circuit raises the word there is nothing to lower."""
    _, found = settings(texts, [])
    for setting in found.values():
        assert (setting.size, setting.reached, setting.measured) == (0.0, True, texts.unchanged)
        assert setting.variant.name == "replacement"


def test_baselines_without_control_positions(pair: PairedModel, onsets: Onsets, circuit: list[FeatureId]) -> None:
    """Moments are then held against all other places of the response."""
    texts = TuningTexts(pair, replace(onsets, control=torch.zeros_like(onsets.control)))
    goal = texts.measure(without(circuit[:3]))
    best = tuned_steering(texts, goal)
    assert best.reached
    assert best.size < MAX_COEFFICIENT
    assert logits_of(pair, best.variant, onsets.tokens).isfinite().all()


def test_steering_acts_at_chosen_tokens_only_and_in_cached_generation_too(pair: PairedModel, onsets: Onsets) -> None:
    tokens, before = onsets.tokens[:2, :5], state(pair)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    marks = [int(t) for t in tokens[0, 1:3]]
    variant = steered(1, direction, 8.0, marks)
    at = torch.isin(tokens, torch.tensor(marks))[..., None].to(pair.model.W_E.dtype)
    with torch.no_grad(), pair.routed("replacement"):
        streams = pair.residual_streams(tokens)
        by_hand = pair.unembed(pair.run_blocks(streams[2] - 8 * at * direction, 2, N_LAYERS))
    assert torch.allclose(logits_of(pair, variant, tokens), by_hand, atol=1e-5)
    everything = steered(0, direction, 8.0, list(range(61)))
    with torch.no_grad(), everything.entered(pair) as model:
        said = model.generate(
            tokens[:1], max_new_tokens=6, do_sample=False, stop_at_eos=False, prepend_bos=False, verbose=False
        )
    at_once = logits_of(pair, everything, said)[0, tokens.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(said[0, tokens.shape[1] :], at_once)
    assert state(pair) == before


def test_steering_at_tokens_that_were_not_embedded_is_refused(pair: PairedModel, onsets: Onsets) -> None:
    resid = torch.zeros(1, 3, 32, dtype=pair.model.W_E.dtype)
    refused = pytest.raises(InterventionError, match="no tokens of this shape")
    with torch.no_grad(), steered(1, torch.ones(32), 1.0, [5]).entered(pair), refused:
        pair.run_blocks(resid, 0, N_LAYERS)


def test_neurons_held_at_a_value_and_the_last_in_part(pair: PairedModel, onsets: Onsets) -> None:
    held = torch.full((N_LAYERS, 48), 0.5)
    variant = without_neurons([(0, 3), (2, 7), (2, 9)], held, last=0.25)
    with torch.no_grad(), variant.entered(pair), pair.recorded("mlp.hook_post") as after:
        pair.model(onsets.tokens)
    with torch.no_grad(), pair.routed("replacement"), pair.recorded("mlp.hook_post") as plain:
        pair.model(onsets.tokens)
    assert bool((after[0][..., 3] == 0.5).all())
    assert torch.equal(after[0][..., 4], plain[0][..., 4])
    assert len(after) == N_LAYERS
    in_part = without_neurons([(0, 9)], held, last=0.25)
    with torch.no_grad(), in_part.entered(pair), pair.recorded("mlp.hook_post") as part:
        pair.model(onsets.tokens)
    assert torch.allclose(part[0][..., 9], 0.75 * plain[0][..., 9] + 0.125, atol=1e-6)


def test_neuron_effects_are_slopes_and_what_is_written(pair: PairedModel, onsets: Onsets) -> None:
    found = neuron_effects(pair, onsets)
    with torch.no_grad(), pair.routed("replacement"), pair.recorded("mlp.hook_post") as acts:
        pair.model(onsets.with_onsets().tokens)
    at = onsets.with_onsets().away_from_onsets
    here = torch.stack([acts[layer][at] for layer in range(N_LAYERS)])
    assert torch.allclose(found.mean, here.mean(1).float(), atol=1e-5)
    rows = torch.stack([mlp.weights()[1].W_out.square().sum(-1) for mlp in pair.mlps]).detach()
    assert torch.allclose(found.written_off, (here.square().mean(1) * rows).float(), rtol=1e-3, atol=1e-6)
    spread = here.var(1, unbiased=False) * rows
    assert torch.allclose(found.written_at_mean, spread.float(), rtol=1e-2, atol=1e-5)
    texts = TuningTexts(pair, onsets)
    strongest = largest_scores(found.at_mean, 1)
    small = without_neurons(strongest, found.mean, last=1e-2)
    assert texts.measure(small).p_onset < texts.unchanged.p_onset


# -- low rank -----------------------------------------------------------------------------------------------------


def written_by_adapters(pair: PairedModel, variant: Variant, tokens: torch.Tensor) -> dict[int, torch.Tensor]:
    with torch.no_grad(), variant.entered(pair), pair.recorded("mlp.hook_adapter_out") as written:
        pair.model(tokens)
    return written


def test_adapters_write_nothing_along_removed_directions(pair: PairedModel, onsets: Onsets) -> None:
    basis, _ = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    before, plain = state(pair), written_by_adapters(pair, on_route("replacement"), onsets.tokens)
    removed = [(1, basis[:, 0]), (3, basis[:, 1]), (1, basis[:, 2]), (1, basis[:, 3])]
    found = written_by_adapters(pair, without_directions(removed, last=0.25), onsets.tokens)
    assert state(pair) == before
    assert torch.equal(found[0], plain[0])
    along = lambda written: written.double() @ basis  # noqa: E731
    assert along(found[1])[..., [0, 2]].abs().max() < 1e-5 < along(plain[1])[..., [0, 2]].abs().max()
    assert along(found[3])[..., 1].abs().max() < 1e-5
    assert torch.allclose(along(found[1])[..., 3], 0.75 * along(plain[1])[..., 3], atol=1e-5)
    assert torch.allclose(along(found[1])[..., 4:], along(plain[1])[..., 4:], atol=1e-5)
    nothing = without_directions([(layer, column) for layer in range(N_LAYERS) for column in basis.T])
    hybrid = logits_of(pair, on_route("hybrid"), onsets.tokens)
    assert torch.allclose(logits_of(pair, nothing, onsets.tokens), hybrid, atol=1e-4)
    assert torch.equal(
        logits_of(pair, without_directions([]), onsets.tokens), logits_of(pair, on_route("replacement"), onsets.tokens)
    )


def test_directions_are_those_along_which_adapters_write_most(pair: PairedModel, onsets: Onsets) -> None:
    written = written_by_adapters(pair, on_route("replacement"), onsets.tokens)
    drawn = torch.randn(32, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    trials = torch.nn.functional.normalize(drawn, dim=0)

    def energies(layer: int, at: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        return (written[layer][at].double() @ directions).square().mean(0)

    for name, order in written_directions(pair, onsets).items():
        assert [d.score for d in order] == sorted((d.score for d in order), reverse=True)
        for layer in range(N_LAYERS):
            found = [d for d in order if d.layer == layer]
            basis = torch.stack([d.direction for d in found], 1)
            assert torch.allclose(basis.T @ basis, torch.eye(len(found), dtype=basis.dtype), atol=1e-8)
            scores = [energies(layer, onsets.onset, directions) for directions in (basis[:, :1], trials)]
            if "over" in name:
                away = [energies(layer, onsets.away_from_onsets, v) for v in (basis[:, :1], trials)]
                ridge = RELATIVE_RIDGE * energies(layer, onsets.away_from_onsets, torch.eye(32).double()).mean()
                scores = [score / (other + ridge) for score, other in zip(scores, away, strict=True)]
            assert float(scores[0]) == pytest.approx(found[0].score, rel=1e-3), name
            assert bool((scores[0] > scores[1]).all()), "no other direction has a larger score"


# -- sets of features ---------------------------------------------------------------------------------------------


def test_features_in_part_are_between_none_and_all(pair: PairedModel, onsets: Onsets) -> None:
    features = [FeatureId(0, 3), FeatureId(1, 2), FeatureId(3, 4)]
    assert first_features(features, 1.5) == {features[0]: 1.0, features[1]: 0.5}
    assert first_features(features, 2) == dict.fromkeys(features[:2], 1.0)
    assert first_features(features, 4.5) == dict.fromkeys(features, 1.5)
    assert first_features([], 3) == first_features(features, 0) == {}
    for ours, plain in (
        (removed_in_part(dict.fromkeys(features, 1.0)), without(features)),
        (
            inserted_in_part(dict.fromkeys(features, 1.0), 1.7),
            Variant("in", lambda pair: inserted(pair, features, 1.7)),
        ),
        (inserted_in_part({}), Variant("nothing", lambda pair: only(pair, [], "replacement"))),
    ):
        assert torch.allclose(*(logits_of(pair, v, onsets.tokens) for v in (ours, plain)), atol=1e-6)
    with (
        torch.no_grad(),
        removed_in_part({features[0]: 0.25}).entered(pair),
        pair.recorded("mlp.adapter.hook_sae_recons") as part,
    ):
        pair.model(onsets.tokens)
    whole, none = {}, {}
    for into, variant in ((whole, on_route("replacement")), (none, without(features[:1]))):
        with torch.no_grad(), variant.entered(pair), pair.recorded("mlp.adapter.hook_sae_recons") as found:
            pair.model(onsets.tokens)
        into.update(found)
    assert torch.allclose(part[0], 0.75 * whole[0] + 0.25 * none[0], atol=1e-5)


def test_scaled_sets_write_as_much_at_the_onsets_as_the_circuit(
    texts: TuningTexts, circuit: list[FeatureId], others: list[FeatureId], norms: torch.Tensor
) -> None:
    def written(shares: dict[FeatureId, float]) -> float:
        return sum(float(norms[f]) * share for f, share in shares.items())

    whole = dict.fromkeys(circuit, 1.0)
    enlarged = features_of_equal_norm(texts, others, norms, written(whole))
    assert enlarged.shares is not None
    assert written(dict(enlarged.shares)) == pytest.approx(written(whole))
    assert enlarged.reached
    assert len(enlarged.shares) < len(others)
    assert sorted(set(enlarged.shares.values()))[1:] in ([], [1.0]), "whole, but for the last"
    few = features_of_equal_norm(texts, others[-3:], norms, written(whole))
    assert few.shares is not None
    assert written(dict(few.shares)) == pytest.approx(written(whole))
    assert set(few.shares) == set(others[-3:])
    assert len(set(few.shares.values())) == 1
    assert "times" in few.chosen
    silent = features_of_equal_norm(texts, others, torch.zeros_like(norms), 1.0)
    assert (silent.reached, silent.shares) == (False, {})
    assert size_for_norm([], norms, 1.0) is None
    assert size_for_norm(others[:2], norms, float(norms[others[0]])) == pytest.approx(1.0)


def test_sets_of_equal_harm_have_it_or_say_that_they_have_not(
    texts: TuningTexts, circuit: list[FeatureId], others: list[FeatureId]
) -> None:
    goal = texts.measure(without(circuit))
    found = features_of_equal_harm(texts, others, goal, len(circuit))
    assert found.reached
    assert abs(found.measured.kl_elsewhere - goal.kl_elsewhere) <= HARM_TOLERANCE * goal.kl_elsewhere
    too_little = features_of_equal_harm(texts, others[-1:], replace(goal, kl_elsewhere=50.0), len(circuit))
    assert not too_little.reached
    assert too_little.size > 1, "beyond its whole activation"
    small = features_of_equal_harm(texts, others, replace(goal, kl_elsewhere=1e-3), len(circuit))
    assert small.reached
    assert small.size < 2, "fewer than the circuit has"
    assert features_of_equal_harm(texts, [], goal, 4).reached is False


@pytest.mark.parametrize("n", [1, N_LAYERS * N_FEATURES], ids=["one feature", "all features"])
def test_controls_of_the_smallest_and_the_largest_circuit(
    pair: PairedModel, onsets: Onsets, texts: TuningTexts, norms: torch.Tensor, circuit: list[FeatureId], n: int
) -> None:
    """Variants of the fault: of all features there are no others, and everything says so."""
    alive, generator = torch.ones_like(norms, dtype=torch.bool), torch.Generator().manual_seed(0)
    order = (circuit + most_active_others(circuit, norms, alive, norms.numel()))[:n]
    first = matched_features(order, norms, alive, generator)
    orders = {
        "random": matched_order(order, first, norms, alive, generator),
        "others": most_active_others(order, norms, alive, norms.numel()),
    }
    found = set_controls(texts, order, orders, norms)
    assert set(found) == {
        "circuit", "random", "random_scaled", "random_equal_harm", "others", "others_scaled", "others_equal_harm",
        "logit_bias", "steering", "neurons", "low_rank",
    }  # fmt: skip
    for setting in found.values():
        assert logits_of(pair, setting.variant, onsets.tokens).isfinite().all()
    others = [name for name in found if name.startswith(("random", "others"))]
    if n == 1:
        assert all(found[name].shares for name in others)
        assert found["random"].size == found["others"].size == 1
    else:
        assert not any(found[name].reached or found[name].shares for name in others)


def test_matched_sets_are_enlarged_by_matched_sets(norms: torch.Tensor, circuit: list[FeatureId]) -> None:
    alive, generator = norms > 0, torch.Generator().manual_seed(1)
    first = matched_features(circuit, norms, alive, generator)
    order = matched_order(circuit, first, norms, alive, generator)
    assert order[: len(first)] == first
    assert len(set(order)) == len(order)
    assert not set(order) & set(circuit)
    layers = {f.layer for f in circuit}
    free = sum(int(alive[layer].sum()) for layer in layers) - sum(bool(alive[f]) for f in circuit)
    assert len(order) == free, "until the circuit's layers have no more"


# -- the search for a size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", [0.003, 0.9, 7.0, 19.5])
def test_a_size_is_found_by_doubling_and_bisection(goal: float) -> None:
    tried: list[float] = []

    def measure(size: float) -> ConditionEffect:
        tried.append(size)
        return ConditionEffect(0.0, size)

    size, found, reached = size_for_goal(measure, lambda m: m.kl_elsewhere, goal, 1.0, 32.0, 0.05 * goal)
    assert reached
    assert abs(size - goal) <= 0.05 * goal
    assert found.kl_elsewhere == size
    assert len(tried) <= 12
    assert size_for_goal(measure, lambda m: m.kl_elsewhere, 99.0, 1.0, 32.0, 1.0)[0::2] == (32.0, False)


def test_a_size_that_breaks_the_model_is_too_large_and_a_hopeless_one_ends_it() -> None:
    def measure(size: float) -> ConditionEffect:
        return ConditionEffect(0.0, size if size < 3 else float("nan"))

    size, _, reached = size_for_goal(measure, lambda m: m.kl_elsewhere, 2.5, 1.0, 32.0, 0.1)
    assert reached
    assert abs(size - 2.5) <= 0.1
    broken = ConditionEffect(0.0, float("nan"))
    assert size_for_goal(lambda size: broken, lambda m: m.kl_elsewhere, 2.5, 1.0, 32.0, 0.1)[0::2] == (0.0, False)
    tried: list[float] = []

    def tell(size: float) -> ConditionEffect:
        tried.append(size)
        return ConditionEffect(0.0, size)

    size_for_goal(tell, lambda m: m.kl_elsewhere, 9.0, 1.0, 32.0, 0.1, lambda m: m.kl_elsewhere >= 2)
    assert tried == [1.0, 2.0]


# -- injected errors against the others ---------------------------------------------------------------------------


def test_correction_is_compared_with_the_others_step_by_step() -> None:
    def outcomes(right: str) -> OutcomesMeasurement:
        return OutcomesMeasurement(
            right.count("1") / len(right), 0, 1, len(right), "share corrected", "report", outcomes=right
        )

    circuit, others = outcomes("00001100" * 8), outcomes("11001110" * 8)
    figure = corrected_more(others, circuit)
    assert figure.value == 3 / 8
    assert figure.low is not None
    assert figure.high is not None
    assert 0 < figure.low < 3 / 8 < figure.high
    assert (figure.n, figure.split) == (64, "report")
    conditions = {"circuit": circuit, "random": circuit, "others": others, "others_equal_harm": circuit}
    asked = correction_beside_others({f"replacement - {name}": condition for name, condition in conditions.items()})
    assert [(c["value"], c["reached"]) for c in asked] == [(3 / 8, True), (0.0, False)]
    assert len({c["name"] for c in asked}) == 2
    assert correction_beside_others({}) == []
