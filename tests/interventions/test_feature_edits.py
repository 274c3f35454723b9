"""Changed features: compared with plain arithmetic, with generate, nested, and without a trace afterwards."""

import pytest
import torch
from helpers.pairs import TOKENS, make, state
from helpers.random_models import ARCHITECTURES

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.circuits.circuit import Circuit, CircuitFeature
from tl_adapters.interventions.feature_edits import (
    InterventionError,
    ablated,
    added,
    clamped,
    inserted,
    negated,
    only,
    patched,
    scaled,
)
from tl_adapters.models.paired_model import ACTS_HOOK, PairedModel

FEATURES = [(0, 3), (1, 0), (1, 7), (3, 11)]


@pytest.fixture(params=["hooked", "bridge"])
def pair(request: pytest.FixtureRequest) -> PairedModel:
    return make("Qwen2ForCausalLM", request.param)


def activations(pair: PairedModel, route: str = "replacement") -> dict[int, torch.Tensor]:
    with pair.routed(route), pair.recorded(ACTS_HOOK) as acts, torch.no_grad():
        pair.model(TOKENS)
    return dict(acts)


@torch.no_grad()
def by_hand(pair: PairedModel, change, bias: bool, base: bool) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Logits with every adapter's output recomputed from changed activations, by a hook of the test's own."""
    adapters = pair.installed_adapters()

    def write(out: torch.Tensor, hook: object, layer: int) -> torch.Tensor:
        acts = change(latest[layer].clone(), layer)
        return acts @ adapters[layer].W_dec + (adapters[layer].b_dec if bias else 0)

    hooks = [
        (f"blocks.{i}.mlp.adapter.hook_sae_recons", lambda out, hook, i=i: write(out, hook, i))
        for i in range(pair.n_layers)
    ]
    with pair.routed("replacement" if base else "target+adapter"), pair.recorded(ACTS_HOOK) as latest:
        return pair.model.run_with_hooks(TOKENS, fwd_hooks=hooks)


def at_features(value):  # type: ignore[no-untyped-def]
    def change(acts: torch.Tensor, layer: int) -> torch.Tensor:
        index = [i for la, i in FEATURES if la == layer]
        acts[..., index] = value(acts[..., index])
        return acts

    return change


@pytest.mark.parametrize(
    ("manager", "value"),
    [
        (lambda pair: ablated(pair, FEATURES), lambda a: torch.zeros_like(a)),
        (lambda pair: scaled(pair, FEATURES, -2.5), lambda a: a * -2.5),
        (lambda pair: clamped(pair, FEATURES, 1.5), lambda a: torch.full_like(a, 1.5)),
        (lambda pair: added(pair, FEATURES, 0.7), lambda a: a + 0.7),
    ],
    ids=["ablated", "scaled", "clamped", "added"],
)
def test_an_edit_changes_the_activations_as_it_says(pair: PairedModel, manager, value) -> None:  # type: ignore[no-untyped-def]
    before = state(pair)
    with torch.no_grad(), pair.routed("replacement"), manager(pair) as model:
        found = model(TOKENS)
    assert torch.allclose(found, by_hand(pair, at_features(value), bias=True, base=True), atol=1e-8)
    with torch.no_grad(), pair.routed("replacement"):
        assert not torch.allclose(found, pair.model(TOKENS), atol=1e-4)
    assert state(pair) == before


@torch.no_grad()
def test_features_are_changed_on_a_route_without_adapters_too(pair: PairedModel) -> None:
    """A pair that was just opened is on the target, where nothing fires: the model within the block has adapters."""
    source = {layer: torch.ones(*TOKENS.shape, 24, dtype=torch.float64) for layer in range(pair.n_layers)}
    edits = [
        lambda: pair.ablated(FEATURES), lambda: pair.scaled(FEATURES, 2.0), lambda: pair.clamped(FEATURES, 1.0),
        lambda: pair.added(FEATURES, 1.0), lambda: pair.patched(FEATURES, source), lambda: pair.ablated([]),
    ]  # fmt: skip
    before = pair.routes
    for edit in edits:
        with pair.routed("replacement"), edit() as model:
            expected = model(TOKENS)
        for route in ("target", "hybrid"):
            with pair.routed(route), edit() as model:
                assert torch.equal(model(TOKENS), expected)
        with edit() as model:
            assert torch.equal(model(TOKENS), expected)
        assert pair.routes == before
    with pair.routed(first=2), edits[0]() as model:
        first = model(TOKENS)
        assert [route.adapter for route in pair.routes] == [True, True, False, False], "a partial route stays"
    assert not torch.equal(first, expected)


def test_inserted_and_negated_features_come_without_the_bias(pair: PairedModel) -> None:
    def keep(factor: float):  # type: ignore[no-untyped-def]
        def change(acts: torch.Tensor, layer: int) -> torch.Tensor:
            kept = torch.zeros_like(acts)
            index = [i for la, i in FEATURES if la == layer]
            kept[..., index] = acts[..., index] * factor
            return kept

        return change

    before = state(pair)
    with torch.no_grad(), inserted(pair, FEATURES) as model:
        found = model(TOKENS)
    assert torch.allclose(found, by_hand(pair, keep(1.0), bias=False, base=True), atol=1e-8)
    with torch.no_grad(), negated(pair, FEATURES) as model:
        found = model(TOKENS)
    assert torch.allclose(found, by_hand(pair, keep(-0.5), bias=False, base=False), atol=1e-8)
    for route, manager in (("hybrid", inserted), ("target", negated)):
        with torch.no_grad(), manager(pair, []) as model:
            nothing = model(TOKENS)
        with torch.no_grad(), pair.routed(route):
            assert torch.allclose(nothing, pair.model(TOKENS), atol=1e-8)
    every = [(layer, i) for layer in range(pair.n_layers) for i in range(pair.installed_adapters().n_features)]
    with torch.no_grad(), only(pair, every, "replacement", decoder_bias=True) as model:
        whole = model(TOKENS)
    with torch.no_grad(), pair.routed("replacement"):
        assert torch.allclose(whole, pair.model(TOKENS), atol=1e-8)
    assert state(pair) == before


def test_only_the_given_positions_are_changed(pair: PairedModel) -> None:
    plain = activations(pair)
    with clamped(pair, FEATURES, 2.0, positions=[2, 5]):
        held = activations(pair)
    index = [i for la, i in FEATURES if la == 0]
    assert (held[0][:, [2, 5]][..., index] == 2.0).all()
    others = [p for p in range(9) if p not in (2, 5)]
    assert torch.equal(held[0][:, others], plain[0][:, others])
    assert torch.equal(
        held[0][..., [i for i in range(24) if i not in index]], plain[0][..., [i for i in range(24) if i not in index]]
    )
    assert torch.allclose(held[1][:, :2], plain[1][:, :2]), "earlier positions do not change"
    with (
        pytest.raises(InterventionError, match="Position 20 is to be changed, and this pass has 9"),
        ablated(pair, FEATURES, [20]),
    ):
        activations(pair)


def test_a_run_patched_with_itself_is_itself_and_with_another_has_its_activations(pair: PairedModel) -> None:
    plain = activations(pair)
    with scaled(pair, FEATURES, 3.0):
        other = activations(pair)
    with patched(pair, FEATURES, plain):
        again = activations(pair)
    assert all(torch.equal(plain[layer], again[layer]) for layer in plain)
    with patched(pair, FEATURES, other):
        held = activations(pair)
    for layer, i in FEATURES:
        assert torch.equal(held[layer][..., i], other[layer][..., i])
    with (
        pytest.raises(InterventionError, match="same lengths"),
        patched(pair, FEATURES, {k: v[:, :4] for k, v in plain.items()}),
    ):
        activations(pair)
    with pytest.raises(InterventionError, match=r"no activations of layers \[3\]"):
        patched(pair, FEATURES, {0: plain[0], 1: plain[1]})


def test_edits_nest_and_hold_during_generation(pair: PairedModel) -> None:
    before = state(pair)
    with scaled(pair, FEATURES, 2.0), added(pair, FEATURES, 1.0):
        both = activations(pair)
    plain = activations(pair)
    for layer, i in FEATURES[:1]:
        assert torch.allclose(both[layer][..., i], plain[layer][..., i] * 2 + 1)
    options = dict(max_new_tokens=6, do_sample=False, verbose=False, stop_at_eos=False)
    if pair.backend.name == "hooked":
        options["prepend_bos"] = False
    with pair.routed("replacement"), clamped(pair, FEATURES, 8.0) as model:
        cached = model.generate(TOKENS[:1], **options)
        plainly = model.generate(TOKENS[:1], use_past_kv_cache=False, **options)
    assert torch.equal(cached, plainly)
    with pair.routed("replacement"), pytest.raises(RuntimeError), ablated(pair, FEATURES):
        raise RuntimeError
    assert state(pair) == before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_on_every_architecture_without_any_feature_nothing_changes(architecture: str) -> None:
    pair = make(architecture, "hooked")
    with torch.no_grad(), pair.routed("replacement"):
        plain = pair.model(TOKENS)
        with ablated(pair, []) as model:
            assert torch.equal(plain, model(TOKENS))
        with ablated(pair, FEATURES) as model:
            assert not torch.equal(plain, model(TOKENS))


@torch.no_grad()
def test_a_circuit_stands_for_its_promoting_features(pair: PairedModel) -> None:
    numbers = dict.fromkeys(("direct", "through", "total", "continuation", "contrast", "activation"), 1.0)
    roles = {FEATURES[0]: "output", FEATURES[2]: "template", FEATURES[3]: "suppress"}
    circuit = Circuit(
        behavior="a",
        words=(),
        features=tuple(CircuitFeature(FeatureId(*id), role, **numbers) for id, role in roles.items()),  # type: ignore[arg-type]
        strength=1.0,
        split="select",
        fingerprints=pair.installed_adapters().fingerprints,
        n_features=24,
        n_layers=4,
        threshold=0.0,
    )
    with pair.routed("replacement"):
        unchanged = pair.model(TOKENS)
        with pair.ablated([FEATURES[0], FEATURES[2]]) as model:
            expected = model(TOKENS)
        with pair.ablated(circuit) as model:
            assert torch.equal(model(TOKENS), expected)
    assert not torch.equal(unchanged, expected)


def test_features_that_do_not_exist_are_refused(pair: PairedModel) -> None:
    with (
        pytest.raises(InterventionError, match=r"no features 0\.24, 9\.0; the adapters have 24"),
        ablated(pair, [(0, 24), (9, 0)]),
    ):
        pass
