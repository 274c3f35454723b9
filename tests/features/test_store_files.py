"""Features, circuits, graphs and stores can only be used with the adapters that they belong to."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import stores
from helpers.random_models import random_batch, random_model, randomise

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.feature_id import FeatureId, ForeignFeaturesError, OwnedFeatureId, owned
from tl_adapters.attribution.attribute import attribute
from tl_adapters.attribution.graph import AttributionGraph, GraphError
from tl_adapters.attribution.validation import ablation_effects, values_with_features
from tl_adapters.circuits.circuit import Circuit, CircuitEdge, CircuitError, CircuitFeature
from tl_adapters.circuits.onsets import Onsets
from tl_adapters.circuits.roles import circuit_edges
from tl_adapters.cli.common import feature_ids
from tl_adapters.features.collect import collect_features
from tl_adapters.features.feature import FeatureStoreError
from tl_adapters.features.store import FeatureStore
from tl_adapters.interventions.feature_edits import ablated, added, clamped, inserted, negated, patched, scaled
from tl_adapters.interventions.frozen import frozen
from tl_adapters.interventions.variants import rescaled, with_negated, with_only, without
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.pages.graph_page import write_graph
from tl_adapters.study.open_run import load_organism_pair

TOKENS = random_batch(3).tokens[:1, :11]


@cache
def made(target: int = 2, adapters: int = 5, dtype: torch.dtype = torch.float32) -> PairedModel:
    """A pair of two layers; nobody changes it."""
    models = (random_model(seed, torch.float32, num_hidden_layers=2).to(dtype) for seed in (1, target))
    pair = PairedModel.from_pretrained(*models)
    if dtype == torch.float32:
        return randomise(pair, n_features=8, seed=adapters)
    pair.load_adapters(copy.deepcopy(made(target, adapters).installed_adapters()))
    return pair


def circuit_of(pair: PairedModel) -> Circuit:
    features = tuple(
        CircuitFeature(FeatureId(layer, index), "output", *([1.0] * 6)) for layer in (0, 1) for index in (2, 5)
    )
    prints = {**pair.fingerprints, **pair.installed_adapters().fingerprints}
    edge = CircuitEdge(FeatureId(0, 2), FeatureId(1, 2), 0.5)
    return Circuit("hesitation", ("Wait",), features, 1.5, "select", prints, 8, 2, 0.1, (edge,))


INTERVENTIONS: dict[str, Callable[[PairedModel, Any], Any]] = {
    "ablated": ablated,
    "scaled": lambda pair, ids: scaled(pair, ids, 2.0),
    "clamped": lambda pair, ids: clamped(pair, ids, 1.0),
    "added": lambda pair, ids: added(pair, ids, 1.0),
    "patched": lambda pair, ids: patched(pair, ids, {layer: torch.zeros(1, 11, 8) for layer in (0, 1)}),
    "inserted": inserted,
    "negated": negated,
    "frozen": lambda pair, ids: frozen(pair, TOKENS, features=ids),
    "without": lambda pair, ids: without(ids).entered(pair),
    "with_only": lambda pair, ids: with_only(ids).entered(pair),
    "less": lambda pair, ids: with_negated(ids).entered(pair),
    "rescaled": lambda pair, ids: rescaled(ids, 2.0).entered(pair),
}
FORMS: dict[str, Callable[[Circuit], Any]] = {
    "ids": lambda circuit: circuit.ids(),
    "a tuple": lambda circuit: tuple(circuit.ids("output")),
    "a generator of features": lambda circuit: (f.id for f in circuit.features),
    "among others": lambda circuit: [FeatureId(0, 1), *sorted(set(circuit.ids()))],
    "one feature": lambda circuit: [circuit.feature((1, 5)).id],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", INTERVENTIONS)
def test_a_circuit_of_other_adapters_reaches_no_intervention(name: str, form: str) -> None:
    entered, given = INTERVENTIONS[name], FORMS[form]
    if form == "a generator of features" and name in ("without", "with_only", "less", "rescaled"):
        given = FORMS["ids"]  # a variant's name lists its features, so it takes a sequence
    with made().routed("replacement"), entered(made(), given(circuit_of(made()))):
        made().model(TOKENS)
    other = made(adapters=6)
    with (
        other.routed("replacement"),
        pytest.raises(ForeignFeaturesError, match="belongs to adapters"),
        entered(other, given(circuit_of(made()))),
    ):
        pass


def test_the_command_line_keeps_the_adapters_of_a_circuit(tmp_path: Path) -> None:
    file = circuit_of(made()).save(tmp_path / "circuit.json")
    ids = feature_ids([str(file), "1.3"])
    assert ids == [*circuit_of(made()).ids(), (1, 3)]
    with ablated(made(), tuple(ids)):
        pass
    with pytest.raises(ForeignFeaturesError), ablated(made(adapters=6), tuple(ids)):
        pass
    with pytest.raises(ForeignFeaturesError, match="belongs to adapters"):
        circuit_edges(made(adapters=6), object.__new__(Onsets), Circuit.load(file).features)


def test_owned_features_are_features() -> None:
    one = owned((1, 5), {"adapters": "a"})
    assert one == FeatureId(1, 5) == (1, 5) and hash(one) == hash((1, 5)) and {one} == {FeatureId(1, 5)}
    assert isinstance(copy.deepcopy(one), OwnedFeatureId) and repr(one) == repr(FeatureId(1, 5))
    assert torch.arange(12).reshape(2, 6)[one] == 11
    other = owned((0, 2), {"adapters": "b"})  # hides behind an equal one of the right adapters in any set
    with pytest.raises(ForeignFeaturesError, match="belongs to adapters b"):
        made().installed_adapters().require_own([*circuit_of(made()).ids(), other])
    with pytest.raises(ForeignFeaturesError, match="belongs to no adapters"):  # a neuron of a store of neurons
        made().installed_adapters().require_own([owned((1, 5), {})])


def test_a_circuit_of_the_first_release_knows_the_whole_set_only() -> None:
    circuit = circuit_of(made())
    prints = {name: circuit.fingerprints[name] for name in ("adapters", "target", "base_mlps")}
    circuit = replace(circuit, fingerprints=prints)
    circuit.require_belonging(made())
    with ablated(made(), circuit.ids()):
        pass
    with pytest.raises(ForeignFeaturesError), ablated(made(adapters=6), circuit.ids()):
        pass


def test_one_layer_of_a_set_knows_its_circuit(tmp_path: Path) -> None:
    circuit, whole = circuit_of(made()), made().installed_adapters()
    whole.save_pretrained(tmp_path / "a")
    for some in (
        AdapterSet({1: whole[1]}, whole.layer_samples, whole.metadata, 2, whole.samples),
        AdapterSet.from_pretrained(tmp_path / "a", layers=[1]),
    ):
        pair = PairedModel.from_pretrained(*(random_model(s, torch.float32, num_hidden_layers=2) for s in (1, 2)))
        pair.load_adapters(some)
        circuit.require_belonging(pair)
        with ablated(pair, [id for id in circuit.ids() if id.layer == 1]):
            pass
    with torch.no_grad():
        some[1].W_dec[0, 0] += 1
    with pytest.raises(CircuitError, match="only in one set of adapters"):
        circuit.require_belonging(pair)


def test_a_circuit_of_another_target_is_refused() -> None:
    other = made(target=3)
    same = {**other.installed_adapters().fingerprints}
    circuit = circuit_of(made())
    circuit = replace(circuit, fingerprints={**circuit.fingerprints, **same})
    with pytest.raises(CircuitError, match="target and target_embedding_and_norms have other fingerprints"):
        circuit.require_belonging(other)
    circuit_of(made()).require_belonging(made(dtype=torch.bfloat16))  # the same models, cast


def graph_of(pair: PairedModel) -> AttributionGraph:
    return attribute(pair, TOKENS[0].tolist(), [7], max_feature_nodes=20, progress=False)


def test_graphs_of_other_pairs_are_refused(tmp_path: Path) -> None:
    graph = graph_of(made())
    chosen = torch.arange(2)
    for other in (made(adapters=6), made(target=3)):
        kept = torch.ones(1, len(graph.features), dtype=torch.bool)
        for call in (
            lambda: ablation_effects(other, graph, chosen),
            lambda: values_with_features(other, graph, kept),
            lambda: write_graph(other, graph, tmp_path / "graphs", "x"),
        ):
            with pytest.raises(GraphError, match="made with another pair .the weight fingerprints of .* differ"):
                call()
    assert not (tmp_path / "graphs").exists()
    graph.save(tmp_path / "g")
    back = AttributionGraph.load(tmp_path / "g")
    assert torch.equal(ablation_effects(made(), back, chosen), ablation_effects(made(), graph, chosen))
    ablation_effects(made(dtype=torch.bfloat16), back, chosen)  # a cast of the same pair


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_kept_narrow_are_taken_apart_in_float32(dtype: torch.dtype) -> None:
    """Rounded activations do not add up, whatever the linearization."""
    pair = PairedModel.from_pretrained(*(random_model(s, torch.float32, num_hidden_layers=2) for s in (1, 2)))
    randomise(pair, n_features=8)
    adapters = pair.installed_adapters().to(dtype)
    for form in (adapters, adapters.normalized()):
        pair.load_adapters(form)
        before = {name: weight.clone() for name, weight in form.state_dict().items()}
        graph = attribute(pair, TOKENS[0].tolist(), [7], progress=False)
        assert graph.residual < 1e-5 and graph.activations.dtype == torch.float32
        after = form.state_dict()
        assert all(after[name].dtype == dtype and torch.equal(after[name], weight) for name, weight in before.items())
        narrow = attribute(pair, TOKENS[0].tolist(), [7], progress=False)
        assert torch.equal(narrow.weights, graph.weights)
        relevance = ablation_effects(pair, graph, torch.arange(len(graph.features)))
        assert relevance.isfinite().all()


def test_a_store_is_known_by_content_wherever_its_models_lie(tmp_path: Path) -> None:
    """The models may have been moved, and adapters of one layer of the set suffice; another pair is refused."""
    pair, traces = stores.random_pair(), stores.documents()
    collect = partial(collect_features, pair, folder=tmp_path / "store", options=stores.OPTIONS, progress=False)
    collect(traces[:1])
    before = pair.base_id, pair.target_id
    try:
        pair.base_id, pair.target_id = "../elsewhere/base", "/moved/target"
        assert collect(traces[:2]).documents == 2
    finally:
        pair.base_id, pair.target_id = before
    store = FeatureStore.load(tmp_path / "store")
    store.require_features_of(pair)
    whole = pair.installed_adapters()
    layer = whole.layer_indices[-1]
    some = load_organism_pair()
    some.load_adapters(
        AdapterSet({layer: whole[layer]}, whole.layer_samples, whole.metadata, whole.n_layers, whole.samples)
    )
    store.require_features_of(some)
    with ablated(some, [id for id in store.ids(0) if id.layer == layer][:3]):
        pass
    for name, message in (("target", "whose target differ from"), (f"adapters.{layer}", "one set of adapters only")):
        other = replace(store.about, fingerprints={**store.about.fingerprints, name: "0"})
        with pytest.raises(FeatureStoreError, match=message):
            FeatureStore(other, store.part, {}, store.vocabulary).require_features_of(pair)
    record = json.loads((tmp_path / "store" / "store.json").read_text())
    record["fingerprints"]["base_mlps"] = "0"
    (tmp_path / "store" / "store.json").write_text(json.dumps(record))
    with pytest.raises(FeatureStoreError, match="was collected with fingerprints .*base_mlps"):
        collect(traces[:3])


def test_a_store_of_neurons_gives_no_features_of_adapters() -> None:
    pair = stores.random_pair()
    options = dict(kind="neuron", stream="target", options=stores.OPTIONS, progress=False)
    neurons = collect_features(pair, stores.documents()[:1], **options)  # type: ignore[arg-type]
    with pytest.raises(ForeignFeaturesError, match="belongs to no adapters"), ablated(pair, neurons.ids(1)[:1]):
        pass
