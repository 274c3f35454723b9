"""Graphs compared with interventions in the model, and the difference between replacement and hybrid."""

from dataclasses import replace

import pytest
import torch
from helpers.pairs import make
from helpers.random_models import random_batch

from tl_adapters.attribution import validation
from tl_adapters.attribution.attribute import attribute
from tl_adapters.attribution.graph import AttributionGraph, GraphError
from tl_adapters.attribution.targets import DifferenceTarget, FeatureTarget, LogitTarget
from tl_adapters.attribution.validation import (
    FEWEST_PROMPTS,
    ablation_effects,
    compare_linearizations,
    explain_difference,
    faithfulness_curve,
    mean_over_prompts,
    rank_correlation,
    rank_correlations,
    total_effects,
    values_with_features,
)
from tl_adapters.data.traces import Trace
from tl_adapters.models.paired_model import PairedModel

TOKENS = random_batch(3).tokens[0, :11]


@pytest.fixture(scope="module")
def pair() -> PairedModel:
    return make("Qwen2ForCausalLM", "hooked")


@pytest.fixture(scope="module")
def graph(pair: PairedModel) -> AttributionGraph:
    return attribute(pair, TOKENS, [LogitTarget(7), DifferenceTarget(3, 9, 6)], progress=False)


def logits(pair: PairedModel, route: str) -> torch.Tensor:
    with torch.no_grad(), pair.routed(route):
        out = pair.model(TOKENS[None])[0]
    return out - out.mean(-1, keepdim=True)


@pytest.mark.parametrize("target", [0, 1])
def test_total_effects_are_the_solution_of_the_linear_system(graph: AttributionGraph, target: int) -> None:
    n = len(graph.features)
    matrix = torch.zeros(graph.n_nodes, graph.n_nodes, dtype=torch.float64)
    matrix[graph.edges[0], graph.edges[1]] = graph.weights
    relative = matrix[:n, :n] / graph.activations[:, None]
    expected = torch.linalg.solve(
        torch.eye(n, dtype=torch.float64) - relative.T, matrix[graph.first_target + target, :n]
    )
    assert (total_effects(graph, target) - expected).abs().max() < 1e-9
    assert (expected - matrix[graph.first_target + target, :n]).abs().max() > 1e-3  # indirect paths contribute


@pytest.mark.parametrize("target", [-1, 99])
def test_a_target_that_the_graph_does_not_have(pair: PairedModel, graph: AttributionGraph, target: int) -> None:
    for effects in (
        lambda: total_effects(graph, target),
        lambda: ablation_effects(pair, graph, torch.tensor([0]), target),
    ):
        with pytest.raises(GraphError, match=f"target_index is {target}; this graph has the targets 0 to"):
            effects()


def test_ablation_effects_agree_with_hooks(pair: PairedModel, graph: AttributionGraph) -> None:
    chosen = torch.arange(0, len(graph.features), 60)
    effects = ablation_effects(pair, graph, chosen)
    for node, effect in zip(chosen.tolist(), effects.tolist(), strict=True):
        layer, position, index = graph.features[node].tolist()

        def zero(acts: torch.Tensor, hook: object) -> torch.Tensor:
            acts = acts.clone()
            acts[0, position, index] = 0
            return acts

        with pair.model.hooks(fwd_hooks=[(f"blocks.{layer}.mlp.adapter.hook_sae_acts_post", zero)]):
            without = logits(pair, "replacement")[-1, 7]
        assert effect == pytest.approx(float(logits(pair, "replacement")[-1, 7] - without), abs=1e-8)
    other = ablation_effects(pair, graph, chosen, target_index=1)
    late = graph.features[chosen, 1] > 6
    assert (other[late].abs() < 1e-12).all() and other[~late].abs().max() > 1e-3
    assert not any(block.mlp.adapter.hook_sae_acts_post._forward_hooks for block in pair.model.blocks)


def test_curves_run_from_all_features_to_none(pair: PairedModel, graph: AttributionGraph) -> None:
    n = len(graph.features)
    effects = ablation_effects(pair, graph, torch.arange(n))
    curve = faithfulness_curve(pair, graph, effects, [0, 20, n])
    assert curve.keeping[0] == pytest.approx(0) and curve.keeping[2] == pytest.approx(1)
    assert curve.removing[0] == pytest.approx(1) and curve.removing[2] == pytest.approx(0)
    full, none = values_with_features(pair, graph, torch.stack([torch.ones(n), torch.zeros(n)]).bool())
    by_chance = faithfulness_curve(pair, graph, torch.rand(n, generator=torch.Generator().manual_seed(0)), [20])
    sign = 1 if full > none else -1
    best = faithfulness_curve(pair, graph, sign * effects, [20])
    assert best.removing[0] < by_chance.removing[0]


def test_rank_correlation() -> None:
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(a, a**3) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(a, torch.tensor([1.0, 1.0, 2.0, 2.0])) == pytest.approx(2 / 5**0.5)
    assert rank_correlation(a, torch.tensor([2.0, 1.0, 4.0, 3.0])) == pytest.approx(0.6)


def test_rank_correlations_alone_are_those_beside_the_curves(pair: PairedModel) -> None:
    alone = rank_correlations(pair, TOKENS[:5].tolist(), LogitTarget(7))
    assert alone == compare_linearizations(pair, TOKENS[:5].tolist(), LogitTarget(7))["rank_correlation"]
    assert len(set(alone.values())) == len(alone), "every linearization has its own"


def test_a_feature_that_rounding_leaves_out_of_one_graph_has_no_effect_there(
    pair: PairedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, target = TOKENS[:5].tolist(), LogitTarget(7)
    expected = rank_correlations(pair, prompt, target)
    full = attribute(pair, prompt, [target], progress=False)
    least = int(total_effects(full).abs().argmin())

    def without_one(*args: object, linearization: str, **options: object) -> AttributionGraph:
        graph = attribute(*args, linearization=linearization, **options)  # type: ignore[arg-type]
        if linearization != "gradient":
            return graph
        keep = torch.arange(graph.n_nodes) != least
        number = keep.cumsum(0) - 1
        edges = keep[graph.edges].all(0)
        return replace(
            graph, features=graph.features[keep[: len(graph.features)]], edges=number[graph.edges[:, edges]],
            activations=graph.activations[keep[: len(graph.features)]], weights=graph.weights[edges],
        )  # fmt: skip

    monkeypatch.setattr(validation, "attribute", without_one)
    found = rank_correlations(pair, prompt, target)
    assert {name: found[name] for name in ("relp", "frozen_mlp")} == {
        name: expected[name] for name in ("relp", "frozen_mlp")
    }
    assert found["gradient"] == pytest.approx(expected["gradient"], abs=0.05)


def test_a_mean_over_few_prompts_has_no_interval() -> None:
    values = torch.linspace(-0.2, 0.7, FEWEST_PROMPTS).tolist()
    enough = mean_over_prompts([*values, None])
    assert enough.value == pytest.approx(0.25)
    spread = 1.96 * torch.tensor(values).std(correction=0).item() / FEWEST_PROMPTS**0.5
    assert enough.high - enough.low == pytest.approx(2 * spread, rel=0.1)
    few = mean_over_prompts([*values[1:], None])
    assert (few.value, few.low, few.high) == (pytest.approx(0.3), None, None)
    assert few.reason == f"an interval requires {FEWEST_PROMPTS} prompts; there are {FEWEST_PROMPTS - 1}"
    assert mean_over_prompts([None]).value is None


def test_the_difference_between_replacement_and_hybrid(pair: PairedModel) -> None:
    explained = explain_difference(pair, TOKENS, LogitTarget(7), progress=False)
    assert explained.replacement == pytest.approx(float(logits(pair, "replacement")[-1, 7]), abs=1e-8)
    assert explained.hybrid == pytest.approx(float(logits(pair, "hybrid")[-1, 7]), abs=1e-8)
    parts = explained.features + explained.decoder_biases + explained.unexplained
    assert parts == pytest.approx(explained.replacement - explained.hybrid, abs=1e-8)
    row = explained.graph.edges[0] == explained.graph.first_target
    nodes = explained.graph.edges[1] < len(explained.graph.features)
    assert float(explained.graph.weights[row & nodes].sum()) == pytest.approx(explained.features, abs=1e-8)
    assert sum(list(explained.to_dict().values())[:-1]) == pytest.approx(explained.replacement, abs=1e-8)
    assert f"replacement {explained.replacement:.3g}" in repr(explained)
    assert f"{explained.features:+.3g}<" in explained._repr_html_()
    for prompt in (TOKENS[None], TOKENS.tolist(), Trace(tuple(TOKENS.tolist()), 1)):
        assert explain_difference(pair, prompt, 7, progress=False).to_dict() == explained.to_dict()
    few = explain_difference(pair, TOKENS, LogitTarget(7), max_feature_nodes=40, progress=False)
    assert few.features == pytest.approx(explained.features, abs=1e-8)  # contributions from outside the graph count too
    with pytest.raises(GraphError, match="takes no window="):
        explain_difference(pair, TOKENS, LogitTarget(7), window=4, progress=False)
    # where adapters add nothing but a bias, features explain nothing; without that, there is nothing to explain
    silent = make("Qwen2ForCausalLM", "hooked")
    for adapter in silent.installed_adapters():
        adapter.W_dec.data.zero_()
    biased = explain_difference(silent, TOKENS, LogitTarget(7), progress=False)
    assert biased.features == 0 and abs(biased.decoder_biases) > 1e-3
    for adapter in silent.installed_adapters():
        adapter.b_dec.data.zero_()
    nothing = explain_difference(silent, TOKENS, LogitTarget(7), progress=False)
    assert nothing.unexplained == pytest.approx(0, abs=1e-10) and nothing.replacement == pytest.approx(nothing.hybrid)


def test_ablation_effects_refuse_feature_targets(pair: PairedModel) -> None:
    graph = attribute(pair, TOKENS, [FeatureTarget(2, 6, 8)], progress=False)
    with pytest.raises(GraphError, match="feature 2/6, not a logit"):
        ablation_effects(pair, graph, torch.tensor([0]))
