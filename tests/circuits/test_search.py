"""Gates, the search and the roles: against plain arithmetic, finite differences, and a circuit that was planted."""

from collections.abc import Callable
from dataclasses import replace

import jaxtyping
import pytest
import torch
from helpers.log_odds import log_odds_at, word_log_odds
from helpers.pairs import make, state
from helpers.planted_circuits import (
    N_FEATURES,
    N_VOCAB,
    OUTPUT,
    SMALL,
    TEMPLATE,
    WORD,
    everything,
    pair_with,
    planted,
    quiet_layers,
    random_onsets,
    word_direction,
)
from helpers.random_models import random_batch, random_model

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.attribution.attribute import attribute
from tl_adapters.attribution.pruning import prune
from tl_adapters.attribution.summed_influence import summed_influence
from tl_adapters.circuits import onsets as onsets_module
from tl_adapters.circuits.controls import neuron_effects
from tl_adapters.circuits.onsets import BehaviorError, Onsets, final_residual
from tl_adapters.circuits.roles import (
    MIN_EFFECT_SHARE,
    MIN_SUPPRESSION_SHARE,
    assign_roles,
    circuit_edges,
    effects_at,
    effects_on_continuation,
)
from tl_adapters.circuits.search import SearchObjective, SearchOptions, round_sizes, search_circuit
from tl_adapters.interventions.feature_edits import ablated, gated, only, patched, scaled
from tl_adapters.models.paired_model import ACTS_HOOK, PRE_ACTS_HOOK, PairedModel
from tl_adapters.utils.arguments import ArgumentError

STEP = 1e-5


COPIES, ALONE = (FeatureId(3, 7), FeatureId(3, 8)), FeatureId(3, 9)


def doubled(backend: str = "hooked") -> tuple[PairedModel, Onsets]:
    """Two copies that say the word together, and a third feature that says it where they do not fire."""
    base, layers = random_model(1, vocab_size=N_VOCAB), quiet_layers()
    with torch.no_grad():
        layers[3].W_enc[:, 8] = layers[3].W_enc[:, 7]
        layers[3].W_enc[:, 9] = -layers[3].W_enc[:, 7]
        layers[3].b_enc[[7, 8]] = -0.7
        layers[3].b_enc[9] = -1.6
        layers[3].W_dec[[7, 8]] = 6 * word_direction(base)
        layers[3].W_dec[9] = 8 * word_direction(base)
    return pair_with(base, layers, [*COPIES, ALONE], backend)


def mean_log_odds(pair: PairedModel, onsets: Onsets, at: str = "onset") -> float:
    with torch.no_grad():
        return float(log_odds_at(pair, onsets, getattr(onsets, at)).mean())


@pytest.fixture(scope="module")
def circuit() -> tuple[PairedModel, Onsets]:
    return planted()


# -- gates --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["hooked", "bridge"])
def pair(request: pytest.FixtureRequest) -> PairedModel:
    return make("Qwen2ForCausalLM", request.param)


TOKENS = random_batch(6, (9, 9)).tokens


@torch.no_grad()
def test_gates_of_one_are_the_route_itself(pair: PairedModel) -> None:
    before = state(pair)
    ones = {layer: torch.ones(24) for layer in range(4)}
    for route in ("replacement", "target+adapter"):
        with gated(pair, ones, route) as model:
            found = model(TOKENS)
        with pair.routed(route):
            assert torch.allclose(found, pair.model(TOKENS), atol=1e-10)
    assert state(pair) == before


@torch.no_grad()
def test_gates_multiply_and_zeros_leave_only_the_others(pair: PairedModel) -> None:
    features, factor = [(0, 3), (1, 0), (1, 7), (3, 11)], -1.5
    gates = {layer: torch.zeros(24) for layer in range(4)}
    for layer, index in features:
        gates[layer][index] = factor
    for bias in (False, True):
        with gated(pair, gates, decoder_bias=bias) as model:
            found = model(TOKENS)
        with only(pair, features, "replacement", factor, decoder_bias=bias) as model:
            assert torch.equal(found, model(TOKENS))
    with pair.routed("replacement"), ablated(pair, features) as model:
        without = model(TOKENS)
    gates = {layer: torch.ones(24) for layer in range(4)}
    for layer, index in features:
        gates[layer][index] = 0
    with gated(pair, gates) as model:
        assert torch.allclose(model(TOKENS), without, atol=1e-10)


@torch.no_grad()
def test_without_the_bias_gates_of_zero_are_the_hybrid(pair: PairedModel) -> None:
    nothing = {layer: torch.zeros(24) for layer in range(4)}
    with gated(pair, nothing, decoder_bias=False) as model:
        bare = model(TOKENS)
    with gated(pair, nothing) as model:
        biased = model(TOKENS)
    with pair.routed("hybrid"):
        hybrid = pair.model(TOKENS)
    assert torch.allclose(bare, hybrid, atol=1e-10)
    assert not torch.allclose(biased, hybrid, atol=1e-3)


def test_the_gradient_of_a_gate_is_its_finite_difference(pair: PairedModel) -> None:
    before = state(pair)
    gates = torch.ones(4, 24, dtype=torch.float64, requires_grad=True)

    def loss(gates: torch.Tensor) -> torch.Tensor:
        with gated(pair, dict(enumerate(gates))) as model:
            return word_log_odds(model(TOKENS), (WORD,)).sum()

    (gradient,) = torch.autograd.grad(loss(gates), gates)
    assert state(pair) == before
    strongest = gradient.abs().flatten().topk(3).indices.tolist()
    for i in strongest:
        at = (i // 24, i % 24)
        shift = torch.zeros(4, 24, dtype=torch.float64)
        shift[at] = STEP
        with torch.no_grad():
            slope = float(loss(gates + shift) - loss(gates - shift)) / (2 * STEP)
        # A bridge's norms are Hugging Face's, in float32.
        tolerance = 1e-5 if pair.backend.name == "hooked" else 5e-2
        assert abs(slope - float(gradient[at])) < tolerance * abs(slope)


# -- search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_what_says_the_word_is_found_first_and_does_all(backend: str) -> None:
    pair, onsets = doubled(backend)
    before = state(pair)
    search = search_circuit(pair, onsets, everything(pair), SMALL, progress=False)
    assert set(search.order[:3]) == {*COPIES, ALONE}
    assert len(search.order) == len(set(search.order)) == 6
    assert [a.n for a in search.objectives] == [0, 2, 4, 6]
    none, four = search.objectives[0], search.objectives[2]
    assert none.necessity > 1.5
    assert four.necessity < 0.2 * none.necessity
    assert four.sufficiency < 0.5 * none.sufficiency
    assert none.necessity > search.objectives[1].necessity > four.necessity
    assert state(pair) == before


def test_a_feature_that_works_through_another_is_necessary(circuit: tuple[PairedModel, Onsets]) -> None:
    """Alone it does nothing, so a step from nothing cannot see that it suffices; that it is needed can be seen."""
    pair, onsets = circuit
    options = replace(SMALL, sufficiency=0.0)
    search = search_circuit(pair, onsets, everything(pair), options, progress=False)
    assert set(search.order[:2]) == {TEMPLATE, OUTPUT}
    none, two = search.objectives[:2]
    assert none.necessity > 4
    assert two.necessity < 0.1 * none.necessity
    assert two.sufficiency < 0.2 * none.sufficiency
    assert two.continuation < 0.2 * none.continuation


def test_a_copy_of_what_is_chosen_waits_for_what_else_there_is() -> None:
    """Enough of one copy is added that the other has nothing left to do; by effect alone both copies come first."""
    pair, onsets = doubled()
    total = effects_at(pair, onsets).total
    assert set(strongest(total, 2)) == set(COPIES)
    options = SearchOptions(2 / (4 * N_FEATURES), 1.0, 1, strength=2.0, necessity=0, continuation=0)
    search = search_circuit(pair, onsets, everything(pair), options, progress=False)
    assert search.order[0] in COPIES
    assert search.order[1] == ALONE


def test_aims_are_what_they_say(circuit: tuple[PairedModel, Onsets]) -> None:
    """Recomputed with ablations and insertions, at every round."""
    pair, onsets = circuit
    options = replace(SMALL, strength=1.3, tokens_per_batch=40)  # several batches
    search = search_circuit(pair, onsets, everything(pair), options, progress=False)
    texts = onsets.with_onsets()
    with torch.no_grad():
        target = pair.model(texts.tokens)
    for objectives in search.objectives:
        chosen = list(search.order[: objectives.n])
        with torch.no_grad():
            with pair.routed("replacement"), ablated(pair, chosen) as model:
                without = word_log_odds(model(texts.tokens), (WORD,))[texts.onset]
            with only(pair, chosen, "replacement", 1.3) as model:
                inserted = model(texts.tokens)
        at = texts.onset | texts.control
        said, p = word_log_odds(target, (WORD,))[at].sigmoid(), word_log_odds(inserted, (WORD,))[at].sigmoid()
        entropy = -(said * p.log() + (1 - said) * (1 - p).log()).mean()
        a, b = (x.log_softmax(-1)[texts.continuation] for x in (target, inserted))
        expected = [(1 + (without + 2).exp()).log().mean(), entropy, (a.exp() * (a - b)).sum(-1).mean()]
        found = [objectives.necessity, objectives.sufficiency, objectives.continuation]
        assert torch.allclose(torch.tensor(found).double(), torch.stack(expected).double(), rtol=1e-5)


def test_a_search_is_the_same_twice_and_takes_only_what_is_alive(circuit: tuple[PairedModel, Onsets]) -> None:
    pair, onsets = circuit
    alive = everything(pair)
    alive[OUTPUT] = False
    alive[0] = False
    options = SearchOptions(share=0.2, per_round=4, tokens_per_batch=60)
    one, two = (search_circuit(pair, onsets, alive, options, progress=False) for _ in range(2))
    assert one == two
    assert len(set(one.order)) == len(one.order) == round(0.2 * int(alive.sum()))
    assert all(alive[f] for f in one.order)
    assert OUTPUT not in one.order
    whole = search_circuit(pair, onsets, alive, replace(options, share=1.0, per_round=50), progress=False)
    assert {tuple(f) for f in whole.order} == {tuple(f) for f in alive.nonzero().tolist()}
    few = torch.zeros_like(alive)
    few[TEMPLATE] = True
    assert search_circuit(pair, onsets, few, SearchOptions(), progress=False).order == (TEMPLATE,), "at least one"


def test_a_search_goes_on_beyond_the_circuit(circuit: tuple[PairedModel, Onsets]) -> None:
    pair, onsets = circuit
    small = search_circuit(pair, onsets, everything(pair), replace(SMALL, further=2.5), progress=False)
    large = search_circuit(pair, onsets, everything(pair), replace(SMALL, share=15 / (4 * N_FEATURES)), progress=False)
    assert (len(small.order), len(small.further)) == (6, 9)
    assert small.order + small.further == large.order
    assert [a.n for a in small.objectives] == [0, 2, 4, 6, 8, 10, 12, 14, 15]
    odd = search_circuit(pair, onsets, everything(pair), replace(SMALL, per_round=4, further=1.5), progress=False)
    assert [a.n for a in odd.objectives] == [0, 4, 6, 9], "the circuit is whole before more join"


def test_a_large_circuit_takes_no_more_rounds_than_allowed(circuit: tuple[PairedModel, Onsets]) -> None:
    few = SearchOptions(rounds=4)
    assert round_sizes(5_000, 7_500, few) == [500, 1_500, 3_000, 5_000, 7_000, 7_500]
    assert round_sizes(73, 110, few) == [7, 22, 44, 73, 102, 110]
    assert round_sizes(11, 11, few) == [3, 6, 9, 11], "a small circuit is searched as before"
    for size, further in ((1, 1), (13, 13), (13, 20), (120, 180), (121, 182), (40_000, 60_000)):
        for rounds in (1, 2, 7, 40):
            sizes = round_sizes(size, further, SearchOptions(rounds=rounds))
            assert sizes == sorted(set(sizes)) and size in sizes and sizes[-1] == further
            assert sizes.index(size) < rounds and len(sizes) <= 2 * rounds + 1
    pair, onsets = circuit
    options = replace(SMALL, share=20 / (4 * N_FEATURES), per_round=1)
    greedy, blocks = (
        search_circuit(pair, onsets, everything(pair), replace(options, rounds=n), progress=False) for n in (40, 4)
    )
    assert [o.n for o in blocks.objectives] == [0, 2, 6, 12, 20]
    assert blocks.order[0] == greedy.order[0] and OUTPUT in blocks.order


def test_adapters_are_given_back_as_they_were() -> None:
    pair, onsets = planted()
    parameters = list(pair.installed_adapters().parameters())
    parameters[1].requires_grad_(False)
    flags = [p.requires_grad for p in parameters]
    assert len(set(flags)) == 2
    search_circuit(pair, onsets, everything(pair), replace(SMALL, documents=1), progress=False)
    assert [p.requires_grad for p in parameters] == flags
    assert all(p.grad is None for p in parameters)
    with pytest.raises(RuntimeError):
        search_circuit(pair, onsets, everything(pair)[:, :3], SMALL, progress=False)
    assert [p.requires_grad for p in parameters] == flags


def test_only_so_many_documents_are_read(circuit: tuple[PairedModel, Onsets]) -> None:
    pair, onsets = circuit
    two = search_circuit(pair, onsets, everything(pair), replace(SMALL, documents=2), progress=False)
    first = search_circuit(pair, onsets.with_onsets(n=2), everything(pair), SMALL, progress=False)
    every = search_circuit(pair, onsets, everything(pair), SMALL, progress=False)
    assert two == first
    assert two.objectives[0] != every.objectives[0]


def test_a_round_of_the_sampled_method_reads_one_part_of_the_texts(circuit: tuple[PairedModel, Onsets]) -> None:
    pair, onsets = circuit
    whole = search_circuit(pair, onsets, everything(pair), SMALL, progress=False)
    options = replace(SMALL, method="sampled", parts=3)
    one, two = (search_circuit(pair, onsets, everything(pair), options, progress=False) for _ in range(2))
    assert one == two and OUTPUT in one.order and [o.n for o in one.objectives] == [0, 2, 4, 6]
    texts = onsets.with_onsets_and_controls(n=SMALL.documents)
    first = search_circuit(pair, texts.rows(range(0, len(texts), 3)), everything(pair), SMALL, progress=False)
    assert one.objectives[0].necessity == pytest.approx(first.objectives[0].necessity, rel=1e-9)
    assert one.order[:2] == first.order[:2] and one.objectives[0] != whole.objectives[0]
    same = search_circuit(pair, onsets, everything(pair), replace(options, parts=1), progress=False)
    assert same == whole, "with one part it is the greedy search"
    many = search_circuit(pair, onsets, everything(pair), replace(options, parts=1_000), progress=False)
    assert len(many.order) == 6, "a part for every text"


def test_the_end_of_a_sampled_search_is_measured_on_all_texts(circuit: tuple[PairedModel, Onsets]) -> None:
    pair, onsets = circuit
    every = SearchOptions(share=1.0, further=1.0, per_round=10_000, strength=1.0)
    greedy, sampled = (
        search_circuit(pair, onsets, everything(pair), replace(every, method=method), progress=False)
        for method in ("greedy", "sampled")
    )
    for name in ("necessity", "sufficiency", "continuation"):
        of_all = getattr(sampled.objectives[-1], name)
        assert of_all == pytest.approx(getattr(greedy.objectives[-1], name), rel=1e-6)


def test_graphs_rank_by_influence_on_the_word(circuit: tuple[PairedModel, Onsets]) -> None:
    pair, onsets = circuit
    search = search_circuit(pair, onsets, everything(pair), replace(SMALL, method="graphs"), progress=False)
    assert OUTPUT in search.order[:2] and len(set(search.order)) == 6 and [o.n for o in search.objectives] == [0, 6]
    row = int(onsets.onset.any(1).nonzero()[0])
    onset = int(onsets.onset[row].nonzero()[0])
    prompt, word = onsets.tokens[row, : onset + 1], int(onsets.tokens[row, onset + 1])
    graph = attribute(pair, prompt, [word], progress=False)
    kept = prune(graph)
    expected = torch.zeros(pair.n_layers, N_FEATURES, dtype=torch.float64)
    for node, (layer, _, index) in enumerate(graph.features.tolist()):
        expected[layer, index] += float(kept.influence[node]) * bool(kept.node_mask[node])
    expected /= kept.influence.sum()
    found = summed_influence(pair, [prompt.tolist()] * 2, [word] * 2)
    torch.testing.assert_close(found.double(), 2 * expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_blocks_that_are_computed_again_give_the_same(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, texts = doubled(backend)
    kept = search_circuit(pair, texts, everything(pair), SMALL, progress=False)
    roles = assign_roles(pair, texts, kept.order, everything(pair))
    before, again = state(pair), list[bool]()
    run_blocks = type(pair).run_blocks
    monkeypatch.setattr(onsets_module, "MOST_KEPT_BYTES", 0)
    monkeypatch.setattr(
        type(pair), "run_blocks", lambda *args, **how: again.append(how["recompute"]) or run_blocks(*args, **how)
    )
    assert search_circuit(pair, texts, everything(pair), SMALL, progress=False) == kept
    assert assign_roles(pair, texts, kept.order, everything(pair)) == roles
    assert set(again) == {True, False} and state(pair) == before, "again with a gradient only"


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_edges_and_neurons_are_the_same_where_blocks_are_computed_again(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, onsets = make("Qwen2ForCausalLM", backend), random_onsets()
    chosen = [FeatureId(layer, i) for layer in range(4) for i in range(8)]
    features = assign_roles(pair, onsets, chosen, torch.zeros(4, 24, dtype=torch.bool)).features
    edges, neurons = circuit_edges(pair, onsets, features), neuron_effects(pair, onsets)
    before = state(pair)
    monkeypatch.setattr(onsets_module, "MOST_KEPT_BYTES", 0)
    again = circuit_edges(pair, onsets, features)
    assert again == edges and any(edge.target for edge in edges)
    for name, found in vars(neuron_effects(pair, onsets)).items():
        assert torch.equal(found, getattr(neurons, name)), name
    assert state(pair) == before


def test_a_gradient_outside_the_interventions_is_refused_where_blocks_are_computed_again() -> None:
    pair = make("Qwen2ForCausalLM", "hooked")
    gates = torch.ones(4, 24, requires_grad=True)
    tokens = torch.tensor([[1, 2, 3]])
    with gated(pair, dict(enumerate(gates))):
        gated_stream = pair.run_blocks(pair.embed(tokens), 0, 4, recompute=True)
        torch.autograd.grad(gated_stream.sum(), gates, retain_graph=True)
    with pytest.raises(RuntimeError, match="Block 3 has other routes or hooks in the backward pass"):
        torch.autograd.grad(gated_stream.sum(), gates)


def test_nothing_to_search_is_said(circuit: tuple[PairedModel, Onsets]) -> None:
    pair, onsets = circuit
    silent = replace(onsets, onset=torch.zeros_like(onsets.onset))
    with pytest.raises(BehaviorError, match="no onset in these texts"):
        search_circuit(pair, silent, everything(pair), progress=False)
    for wrong in (
        {"share": 0.0},
        {"share": 1.5},
        {"per_round": 0},
        {"rounds": 0},
        {"strength": 0.0},
        {"documents": 0},
        {"further": 0.9},
        {"parts": 0},
    ):
        with pytest.raises(BehaviorError, match="share is above 0 and at most 1"):
            SearchOptions(**wrong)  # type: ignore[arg-type]


def test_an_unknown_method_is_named() -> None:
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ArgumentError, match="'best'; allowed: 'greedy', 'sampled', 'graphs'"):
            SearchOptions(method="best")  # type: ignore[arg-type]
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


# -- roles --------------------------------------------------------------------------------------------------------


def slope(measure: Callable[[float], float]) -> float:
    return (measure(STEP) - measure(-STEP)) / (2 * STEP)


def strongest(effects: torch.Tensor, n: int = 4) -> list[FeatureId]:
    width = effects.shape[1]
    return [FeatureId(i // width, i % width) for i in effects.abs().flatten().topk(n).indices.tolist()]


@pytest.mark.parametrize("at", ["onset", "control"])
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Gemma2ForCausalLM"])
def test_a_total_effect_is_the_slope_of_the_log_odds_in_the_features_gate(architecture: str, at: str) -> None:
    pair, onsets = make(architecture, "hooked"), random_onsets()
    effects = effects_at(pair, onsets, at, tokens_per_batch=30)
    assert abs(effects.log_odds - replacement_log_odds(pair, onsets, at)) < 1e-6

    def measure(feature: FeatureId, by: float) -> float:
        with scaled(pair, [feature], 1 + by):
            return replacement_log_odds(pair, onsets, at)

    for feature in strongest(effects.total):
        assert abs(slope(lambda by, f=feature: measure(f, by)) / float(effects.total[feature]) - 1) < 1e-4


def replacement_log_odds(pair: PairedModel, onsets: Onsets, at: str) -> float:
    with pair.routed("replacement"):
        return mean_log_odds(pair, onsets, at)


def test_a_direct_effect_is_what_the_feature_writes_there_read_by_the_unembedding() -> None:
    pair, onsets = make("Qwen2ForCausalLM", "hooked"), random_onsets()
    effects = effects_at(pair, onsets)
    with torch.no_grad(), pair.routed("replacement"), pair.recorded(ACTS_HOOK) as acts:
        residual = final_residual(pair, onsets.tokens)[onsets.onset]
    for feature in strongest(effects.direct):
        layer, index = feature
        written = acts[layer][onsets.onset][:, index, None] * pair.installed_adapters()[layer].W_dec[index]

        @torch.no_grad()
        def moved(by: float, written: torch.Tensor = written) -> float:
            return float(word_log_odds(pair.unembed(residual + by * written), onsets.phrases).mean())

        assert abs(slope(moved) / float(effects.direct[feature]) - 1) < 1e-4


def test_the_last_layer_has_direct_effects_only_and_the_others_have_more() -> None:
    effects = effects_at(make("Qwen2ForCausalLM", "hooked"), random_onsets())
    assert torch.allclose(effects.total[3], effects.direct[3], atol=1e-6)
    assert not torch.allclose(effects.total[2], effects.direct[2], atol=1e-2)


def test_activation_and_rate_are_those_of_the_positions() -> None:
    pair, onsets = make("Qwen2ForCausalLM", "hooked"), random_onsets()
    with torch.no_grad(), pair.routed("replacement"), pair.recorded(ACTS_HOOK) as acts:
        pair.model(onsets.tokens)
    for at in ("onset", "control"):
        effects = effects_at(pair, onsets, at, tokens_per_batch=20)
        texts = getattr(onsets, at)
        for layer in range(4):
            here = acts[layer][texts]
            norms = pair.installed_adapters()[layer].W_dec.norm(dim=1)
            assert torch.allclose(effects.activation[layer], (here.mean(0) * norms).float(), atol=1e-5)
            assert torch.allclose(effects.rate[layer], (here > 0).float().mean(0), atol=1e-6)


def test_an_effect_with_others_held_is_its_slope_while_they_keep_their_values() -> None:
    pair, onsets = make("Qwen2ForCausalLM", "hooked"), random_onsets()
    before = state(pair)
    held = [FeatureId(2, i) for i in range(0, 24, 2)] + [FeatureId(3, i) for i in range(0, 24, 3)]
    free, constant = effects_at(pair, onsets), effects_at(pair, onsets, constant=held)
    assert state(pair) == before
    assert torch.equal(free.direct, constant.direct)
    with torch.no_grad(), pair.routed("replacement"), pair.recorded(ACTS_HOOK) as acts:
        pair.model(onsets.tokens)
    source = dict(acts)

    def measure(feature: FeatureId, by: float) -> float:
        with patched(pair, held, source), scaled(pair, [feature], 1 + by):
            return replacement_log_odds(pair, onsets, "onset")

    differ = (free.total - constant.total)[:2]
    for feature in strongest(differ):
        found = slope(lambda by, f=feature: measure(f, by))
        assert abs(found / float(constant.total[feature]) - 1) < 1e-4
        assert abs(float(differ[feature])) > 1e-2


def test_an_effect_on_what_follows_is_the_same_by_parts_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, onsets = make("Qwen2ForCausalLM", "hooked"), random_onsets()
    whole = effects_on_continuation(pair, onsets)
    monkeypatch.setattr(type(pair), "rows_at_once", 3)
    torch.testing.assert_close(effects_on_continuation(pair, onsets), whole, rtol=1e-6, atol=1e-9)


def test_an_effect_on_what_follows_is_the_slope_of_the_log_odds_of_what_comes() -> None:
    pair, onsets = make("Qwen2ForCausalLM", "hooked"), random_onsets()
    effects = effects_on_continuation(pair, onsets, tokens_per_batch=30)
    texts = onsets.with_onsets()
    next_tokens = torch.zeros_like(texts.tokens)
    next_tokens[:, :-1] = texts.tokens[:, 1:]

    @torch.no_grad()
    def measure(by: float, feature: FeatureId) -> float:
        with pair.routed("replacement"), scaled(pair, [feature], 1 + by):
            p = pair.model(texts.tokens).softmax(-1).gather(-1, next_tokens[..., None])[..., 0][texts.continuation]
        return float((p / (1 - p)).log().mean())

    for feature in strongest(effects):
        assert abs(slope(lambda by, f=feature: measure(by, f)) / float(effects[feature]) - 1) < 1e-4


def test_a_planted_circuit_is_sorted(circuit: tuple[PairedModel, Onsets]) -> None:
    pair, onsets = circuit
    roles = assign_roles(pair, onsets, [TEMPLATE, OUTPUT], everything(pair))
    template, output = roles.features[:2]
    assert (template.id, template.role) == (TEMPLATE, "template")
    assert (output.id, output.role) == (OUTPUT, "output")
    with pair.routed("hybrid"):
        hybrid = mean_log_odds(pair, onsets)
    assert abs(roles.log_odds_gap - (replacement_log_odds(pair, onsets, "onset") - hybrid)) < 1e-5
    assert roles.log_odds_gap > 5
    direct = effects_at(pair, onsets).direct
    assert roles.threshold == MIN_EFFECT_SHARE * float(direct[everything(pair)].clamp(min=0).sum())
    assert output.direct > 0.1 * roles.log_odds_gap
    assert template.direct < roles.threshold < template.through
    edges = circuit_edges(pair, onsets, roles.features)
    word, between = (
        next(e for e in edges if (e.source, e.target) == ends) for ends in ((OUTPUT, None), (TEMPLATE, OUTPUT))
    )
    assert word.weight == output.direct
    assert between.weight > 0.1 * roles.log_odds_gap


def test_roles_are_what_the_formulas_say() -> None:
    """On a random pair, where features of every role are."""
    pair, onsets, alive = make("Qwen2ForCausalLM", "hooked"), random_onsets(), torch.ones(4, 24, dtype=torch.bool)
    alive[:, 20:] = False
    chosen = [FeatureId(layer, i) for layer in (3, 1, 0, 2) for i in range(0, 12, 2)]
    here, there = effects_at(pair, onsets), effects_at(pair, onsets, "control")
    roles = assign_roles(pair, onsets, chosen, alive)
    outputs = [f for f in chosen if here.direct[f] >= roles.threshold]
    through = here.total - effects_at(pair, onsets, constant=outputs).total
    continuation = effects_on_continuation(pair, onsets)
    assert roles.threshold == MIN_EFFECT_SHARE * float(here.direct[alive].clamp(min=0).sum())
    enough = MIN_EFFECT_SHARE * float(continuation[alive].clamp(min=0).sum())
    mine = roles.features[: len(chosen)]
    assert [f.id for f in mine] == chosen, "in the order in which they joined"
    assert {f.role for f in mine} == {"output", "template", "continuation", "other"}
    for f in mine:
        is_template, goes_on = through[f.id] >= roles.threshold, continuation[f.id] >= enough
        none = "template" if is_template else "continuation" if goes_on else "other"
        assert f.role == ("output" if f.id in outputs else none)
        assert f.continuation == float(continuation[f.id])
        assert f.direct == float(here.direct[f.id])
        assert f.total == float(here.total[f.id])
        assert f.through == (0 if f.id in outputs else float(through[f.id]))
        assert abs(f.contrast - float(here.total[f.id] - there.total[f.id])) < 1e-6
        assert f.activation == float(here.activation[f.id])
    against = torch.minimum(here.total, there.total)
    outside = [FeatureId(*f) for f in alive.nonzero().tolist() if FeatureId(*f) not in chosen]
    rest = roles.features[len(chosen) :]
    assert {f.id for f in rest} == {
        f for f in outside if against[f] <= -roles.threshold * MIN_SUPPRESSION_SHARE / MIN_EFFECT_SHARE
    }
    assert {f.role for f in rest} == {"suppress"}
    assert [float(against[f.id]) for f in rest] == sorted(float(against[f.id]) for f in rest), "strongest first"
    asked = [FeatureId(*f) for f in alive.nonzero().tolist()]
    expected = {f for f in asked if f not in outputs and here.direct[f] < roles.threshold <= through[f]}
    assert set(roles.templates) == expected
    assert expected - set(chosen), "outside of the circuit, too"
    assert [float(through[f]) for f in roles.templates] == sorted((float(through[f]) for f in expected), reverse=True)
    idle = [f for f in outside if max(abs(float(e.total[f])) for e in (here, there)) < roles.threshold / 10]
    assert set(roles.bystanders) == {f for f in idle if here.rate[f] > max(0.05, 2 * float(there.rate[f]) - 1e-9)}


def test_a_feature_that_fires_before_the_word_and_does_nothing_is_a_bystander() -> None:
    pair, onsets = planted()
    idle = FeatureId(2, 3)
    adapters = pair.installed_adapters()
    with torch.no_grad():
        adapters[2].W_enc[:, 3] = adapters[3].W_enc[:, 7]  # it reads what the template writes
        adapters[2].b_enc[3] = -1.5
        adapters[2].W_dec[3] = 0
    roles = assign_roles(pair, onsets, [TEMPLATE, OUTPUT], everything(pair))
    assert roles.bystanders[0] == idle or idle in roles.bystanders
    assert idle not in [f.id for f in roles.features]
    assert idle not in assign_roles(pair, onsets, [TEMPLATE, OUTPUT, idle], everything(pair)).bystanders
    dead = everything(pair)
    dead[idle] = False
    assert idle not in assign_roles(pair, onsets, [TEMPLATE, OUTPUT], dead).bystanders


def test_an_edge_is_a_slope_of_what_the_output_feature_reads() -> None:
    pair, onsets = make("Qwen2ForCausalLM", "hooked"), random_onsets()
    chosen = [FeatureId(layer, i) for layer in range(4) for i in range(8)]
    features = assign_roles(pair, onsets, chosen, torch.zeros(4, 24, dtype=torch.bool)).features
    edges = circuit_edges(pair, onsets, features)
    role = {f.id: f.role for f in features}
    by_id = {f.id: f for f in features}
    assert {e.source for e in edges if e.target is None} == {f for f in role if role[f] == "output"}
    between = [e for e in edges if e.target is not None]
    assert all(role[e.target] == "output" and e.source.layer < e.target.layer for e in between if e.target)
    assert not any(role[e.source] == "output" for e in between)
    with torch.no_grad(), pair.routed("replacement"), pair.recorded(ACTS_HOOK) as acts:
        pair.model(onsets.tokens)
    plain = dict(acts)

    @torch.no_grad()
    def read(source: FeatureId, target: FeatureId, by: float) -> float:
        with pair.routed("replacement"), scaled(pair, [source], 1 + by), pair.recorded(PRE_ACTS_HOOK) as pre:
            pair.model(onsets.tokens)
        fires = onsets.onset & (plain[target.layer][..., target.index] > 0)
        return float(pre[target.layer][..., target.index][fires].sum() / onsets.onset.sum())

    for edge in sorted(between, key=lambda e: -abs(e.weight))[:4]:
        source, target = edge.source, edge.target
        assert target is not None
        unit = by_id[target].direct / float(plain[target.layer][..., target.index][onsets.onset].mean())
        found = slope(lambda by, s=source, t=target: read(s, t, by)) * unit
        assert abs(found / edge.weight - 1) < 1e-4


def test_an_architecture_with_post_norms_has_a_circuit_too() -> None:
    pair, onsets = make("Gemma2ForCausalLM", "bridge", dtype=torch.float32), random_onsets()
    alive = torch.ones(4, 24, dtype=torch.bool)
    search = search_circuit(pair, onsets, alive, SearchOptions(share=0.1), progress=False)
    assert len(search.order) == 10
    roles = assign_roles(pair, onsets, search.order, alive)
    values = [v for f in roles.features for v in (f.direct, f.through, f.total, f.contrast, f.activation)]
    assert torch.tensor(values).isfinite().all()
    assert isinstance(search.objectives[-1], SearchObjective)
