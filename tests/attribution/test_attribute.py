"""Attribution graphs: rows add up, targets of every kind, features ranked by influence, and errors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pairs import make
from helpers.random_models import ARCHITECTURES, random_batch, random_model, randomise
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from tl_adapters import organism
from tl_adapters.attribution import attribute as attribute_module
from tl_adapters.attribution import relp
from tl_adapters.attribution.attribute import attribute, estimated_seconds
from tl_adapters.attribution.graph import AttributionGraph, GraphError
from tl_adapters.attribution.pruning import influence
from tl_adapters.attribution.relp import LinearizedModel
from tl_adapters.attribution.rows import GraphRows
from tl_adapters.attribution.targets import DifferenceTarget, FeatureTarget, LogitTarget, resolve_target
from tl_adapters.checkpoints.compatibility import PairMismatchError
from tl_adapters.data.tokens import VocabularyError
from tl_adapters.data.traces import Trace
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.arguments import ArgumentError

TOKENS = random_batch(3).tokens[0, :11]
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def pair() -> PairedModel:
    return make("Qwen2ForCausalLM", "hooked")


@pytest.fixture(scope="module")
def builtin() -> PairedModel:
    return randomise(PairedModel.from_pretrained(organism.BASE, organism.TARGET), n_features=16)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_estimated_time_counts_the_products_of_the_rows(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, n = make(architecture, "hooked"), 48
    monkeypatch.setattr(attribute_module, "seconds_of", lambda operations, device: operations)
    monkeypatch.setattr(attribute_module, "seconds_to_write", lambda n_bytes, device: 0.0)
    model = LinearizedModel(pair, random_batch(0, lengths=(n,)).tokens[0])
    layers = [4, 4, 3, 1, 1, 0]
    positions = torch.full((len(layers),), n - 1)
    vectors = torch.randn(len(layers), pair.model.cfg.d_model, dtype=model.dtype)
    with FlopCounterMode(display=False) as counted:
        model.rows(layers, positions, vectors)
    estimated = estimated_seconds(pair, n, n, layers, 64)
    assert 0.9 < estimated / counted.get_total_flops() < 1.1


def test_the_estimated_time_counts_patterns_that_are_formed_again(
    pair: PairedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attribute_module, "seconds_of", lambda operations, device: 0.0)
    monkeypatch.setattr(attribute_module, "seconds_to_write", lambda n_bytes, device: n_bytes)
    layers = [4, 3, 3, 2, 1, 0, 0]  # in batches of two they pass 4, 4, 2 and 1 layers of 4
    kept = estimated_seconds(pair, 11, 11, layers, 2)
    monkeypatch.setattr(attribute_module, "KEPT_BYTES", 0)
    monkeypatch.setattr(relp, "KEPT_BYTES", 0)
    formed: list[int] = []
    coefficients = LinearizedModel._large
    monkeypatch.setattr(LinearizedModel, "_large", lambda model, k: formed.append(k) or coefficients(model, k))
    model = LinearizedModel(pair, TOKENS)
    vectors = torch.randn(len(layers), pair.model.cfg.d_model, dtype=model.dtype)
    for start in range(0, len(layers), 2):
        some = layers[start : start + 2]
        model.rows(some, torch.zeros(len(some), dtype=torch.long), vectors[start : start + 2])
    assert estimated_seconds(pair, 11, 11, layers, 2) / kept == len(formed) / 4 == (4 + 4 + 2 + 1) / 4


def dense(graph: AttributionGraph) -> torch.Tensor:
    matrix = torch.zeros(graph.n_nodes, graph.n_nodes, dtype=graph.weights.dtype)
    matrix[graph.edges[0], graph.edges[1]] = graph.weights
    return matrix


@pytest.mark.parametrize(
    "options", [{}, {"linearization": "frozen_mlp"}, {"window": 5}, {"exclude_bos": True}], ids=str
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_row_adds_up(architecture: str, options: dict[str, object]) -> None:
    pair = make(architecture, "hooked")
    for most in (10_000, 60):
        graph = attribute(pair, TOKENS, max_feature_nodes=most, **QUIET, **options)
        assert graph.residual < 1e-10 and graph.balance.dtype == torch.float64
        value, edges, outside, constant = graph.balance.T
        assert (value - edges - outside - constant).abs().max() < 1e-10
        assert len(graph.rows) == len(graph.features) + len(graph.targets)
        sums = dense(graph).sum(1)[graph.rows]
        assert (sums - edges).abs().max() < 1e-10
        everything = not options.get("window") and not options.get("exclude_bos") and most == 10_000
        assert bool(outside.abs().max() < 1e-12) is bool(everything)
        assert len(graph.features) == (60 if most == 60 else len(graph.features))
        first = 6 if "window" in options else 1 if "exclude_bos" in options else 0
        assert int(graph.features[:, 1].min()) >= first
        assert int(graph.features[:, 1].min()) == first or most == 60
        assert len(graph.errors) == (44 if options.get("linearization") == "frozen_mlp" else 0)


def test_nodes_and_edges_are_those_of_the_linearized_model(pair: PairedModel) -> None:
    graph, model = attribute(pair, TOKENS, **QUIET), LinearizedModel(pair, TOKENS)
    assert torch.equal(graph.features, model.active)
    assert torch.equal(graph.activations, model.activations)
    matrix = dense(graph)
    for node in range(0, len(graph.features), 41):
        layer, position, index = graph.features[node].tolist()
        row = model.rows([layer], torch.tensor([position]), model.encoders[layer][:, index][None])
        assert (matrix[node, : len(graph.features)] - row.features[0]).abs().max() < 1e-12
        assert (matrix[node, graph.first_token : graph.first_target] - row.tokens[0]).abs().max() < 1e-12
    assert not matrix[graph.first_token : graph.first_target].any()


def test_targets_of_every_kind(pair: PairedModel) -> None:
    with torch.no_grad(), pair.routed("replacement"):
        logits, cache = pair.model.run_with_cache(TOKENS[None])
    probabilities = logits[0].softmax(-1)
    graph = attribute(pair, TOKENS, **QUIET)
    order = probabilities[-1].argsort(descending=True)
    enough = int((probabilities[-1][order].cumsum(0) < 0.95).sum()) + 1
    assert [t.token for t in graph.targets] == order[: min(10, enough)].tolist()
    for target in graph.targets:
        assert target.position == 10 and target.weight == pytest.approx(float(probabilities[-1, target.token]))
    given = [7, LogitTarget(3, 4), DifferenceTarget(5, 9, -2), FeatureTarget(2, 6, 8)]
    graph = attribute(pair, TOKENS, given, **QUIET)
    values = graph.balance[-4:, 0]
    centred = logits[0] - logits[0].mean(-1, keepdim=True)
    pre = cache["blocks.2.mlp.adapter.hook_sae_acts_pre"][0, 8, 6]
    expected = torch.stack([centred[-1, 7], centred[4, 3], logits[0, 9, 5] - logits[0, 9, 9], pre])
    assert (values - expected).abs().max() < 1e-10
    assert [t.position for t in graph.targets] == [10, 4, 9, 8]
    later = dense(graph)[graph.first_target + 1]
    positions = torch.cat([graph.features[:, 1], torch.arange(11)])
    assert not later[: graph.first_target][positions > 4].any()  # no contributions of later positions


def test_soft_capped_logits_are_explained_before_the_cap() -> None:
    pair = make("Gemma2ForCausalLM", "hooked")
    graph = attribute(pair, TOKENS, [3, DifferenceTarget(3, 8)], **QUIET)
    with torch.no_grad(), pair.routed("replacement"):
        capped = pair.model(TOKENS[None])[0, -1]
    raw = 3.0 * torch.atanh(capped / 3.0)
    assert float(graph.balance[-2, 0]) == pytest.approx(float(raw[3] - raw.mean()), abs=1e-8)
    assert float(graph.balance[-1, 0]) == pytest.approx(float(raw[3] - raw[8]), abs=1e-8)


def test_the_features_with_the_most_influence_are_kept(pair: PairedModel) -> None:
    whole = attribute(pair, TOKENS, [7], **QUIET)
    score = influence(whole)[: len(whole.features)]
    some = attribute(pair, TOKENS, [7], max_feature_nodes=80, batch_size=16, **QUIET)
    assert len(some.features) == 80
    best = {tuple(f.tolist()) for f in whole.features[score.topk(80).indices]}
    chosen = {tuple(f.tolist()) for f in some.features}
    assert len(best & chosen) > 64  # ranked on partial graphs: nearly the same set
    random = score[torch.randperm(len(score), generator=torch.Generator().manual_seed(0))[:80]].sum()
    numbers = {tuple(f.tolist()): i for i, f in enumerate(whole.features)}
    assert sum(float(score[numbers[f]]) for f in chosen) > 2 * float(random)


@pytest.mark.parametrize("linearization", ["relp", "frozen_mlp"])
def test_the_influence_of_rows_is_that_of_their_graph(pair: PairedModel, linearization: Any) -> None:
    """By the rows so far, in batches that mix layers, and for a feature as a target of the graph."""
    model = LinearizedModel(pair, TOKENS, linearization, 0)
    layer, position, index = model.active[len(model.active) // 2].tolist()
    targets = [LogitTarget(3), FeatureTarget(layer, index, position)]
    resolved = [resolve_target(pair, model, target, -1) for target in targets]
    rows = GraphRows(model, resolved, [""] * len(TOKENS), 3, tqdm(disable=True))
    every = torch.ones(len(model.active), dtype=torch.bool)
    for n in (0, 5, 4):
        rows.add_features(every & ~torch.tensor([column in rows.numbers for column in range(len(every))]), n)
        expected = influence(rows.graph(every))[: rows.n_columns]
        assert float(expected.sum()) > 0
        torch.testing.assert_close(rows.influence(), expected, rtol=1e-12, atol=0)


def test_gradient_graphs_do_not_add_up(pair: PairedModel) -> None:
    graph, relp = attribute(pair, TOKENS, [7], linearization="gradient", **QUIET), attribute(pair, TOKENS, [7], **QUIET)
    assert graph.about["linearisation"] == "gradient"
    assert (graph.balance[-1, 3] - relp.balance[-1, 3]).abs() > 1e-2
    assert torch.equal(graph.features, relp.features)


def test_the_batch_size_does_not_change_the_graph(pair: PairedModel) -> None:
    one, many = (attribute(pair, TOKENS, batch_size=size, **QUIET) for size in (7, 500))
    assert torch.equal(one.edges, many.edges) and torch.equal(one.rows, many.rows)
    assert (one.weights - many.weights).abs().max() < 1e-12


def test_a_saved_graph_is_loaded_unchanged(pair: PairedModel, tmp_path: Path) -> None:
    graph = attribute(pair, TOKENS, **QUIET)
    graph.save(tmp_path / "g")
    back = AttributionGraph.load(tmp_path / "g")
    assert torch.equal(back.edges, graph.edges) and torch.equal(back.weights, graph.weights)
    assert back.targets == graph.targets and back.about == graph.about and back.strings == graph.strings
    known = {**pair.fingerprints, **pair.installed_adapters().fingerprints}
    assert back.about["fingerprints"] == known and {"base_mlps", "target", "adapters", "adapters.3"} <= known.keys()
    with pytest.raises(FileExistsError, match="exists already"):
        graph.save(tmp_path / "g")
    (tmp_path / "g" / "graph.safetensors").write_bytes(b"short")
    with pytest.raises(GraphError, match="missing or damaged"):
        AttributionGraph.load(tmp_path / "g")


def test_prompts_and_targets_given_as_text(builtin: PairedModel) -> None:
    text = "<|bos|><|user|>47+85+19=?<|assistant|><think>47+85=122.\n"
    graph = attribute(builtin, text, ["Wait"], max_feature_nodes=50, **QUIET)
    assert "".join(graph.strings) == text.replace(" ", "") or len(graph.tokens) == 23
    assert graph.targets[0].label == "Wait" and graph.residual < 1e-3
    difference = attribute(builtin, text, [DifferenceTarget("Wait", "1")], max_feature_nodes=50, **QUIET)
    assert difference.targets[0].label == "'Wait' - '1'"


def test_a_prompt_ends_before_a_word(builtin: PairedModel) -> None:
    text = "<|bos|><|user|>wait 47+85+19=?<|assistant|><think>47+85=122.\nWait, 47+85=132."
    tokens = builtin.model.to_tokens(text, prepend_bos=False)[0].tolist()
    response = tokens.index(builtin.model.to_single_token("<|assistant|>")) + 1
    word = builtin.model.to_single_token("Wait")
    graph = attribute(builtin, Trace(tuple(tokens), response), at="wait", max_feature_nodes=20, **QUIET)
    assert list(graph.tokens) == tokens[: tokens.index(word)] and graph.targets[0].label == "Wait"
    likely = attribute(builtin, tokens[response:], ["Hmm"], at="Wait", max_feature_nodes=20, **QUIET)
    assert list(likely.tokens) == list(graph.tokens)[response:] and likely.targets[0].label == "Hmm"
    with pytest.raises(GraphError, match="The text does not say 'Hmm'; give one that does"):
        attribute(builtin, Trace(tuple(tokens), response), at="Hmm", **QUIET)
    with pytest.raises(VocabularyError, match="is .* tokens of this model"):
        attribute(builtin, text, at="Wait, no", **QUIET)


def test_errors_name_what_was_given(builtin: PairedModel, pair: PairedModel, tmp_path: Path) -> None:
    text = "<|bos|><|user|>47+85+19=?<|assistant|>"
    with pytest.raises(VocabularyError, match=r"'Wait,47' is \d tokens of this model \('Wait', ','.*name one of them"):
        attribute(builtin, text, ["Wait,47"], **QUIET)
    with pytest.raises(GraphError, match="The prompt has 65 tokens; the model's context is 1 to 64"):
        attribute(pair, [1] * 65, **QUIET)
    with pytest.raises(GraphError, match="The prompt has 0 tokens"):
        attribute(pair, [], **QUIET)
    with pytest.raises(GraphError, match="no position 11 in a prompt of 11"):
        attribute(pair, TOKENS, [LogitTarget(3, 11)], **QUIET)
    with pytest.raises(GraphError, match="There is no token 61"):
        attribute(pair, TOKENS, [61], **QUIET)
    with pytest.raises(GraphError, match="no feature 4/0: there are 4 layers of 24"):
        attribute(pair, TOKENS, [FeatureTarget(4, 0, 3)], **QUIET)
    with pytest.raises(GraphError, match="targets is empty"):
        attribute(pair, TOKENS, [], **QUIET)
    with pytest.raises(GraphError, match="before the window of the last 3"):
        attribute(pair, TOKENS, [LogitTarget(3, 4)], window=3, **QUIET)
    with pytest.raises(ArgumentError, match="linearization is 'lrp'; allowed: 'relp', 'frozen_mlp', 'gradient'"):
        attribute(pair, TOKENS, linearization="lrp", **QUIET)  # type: ignore[arg-type]
    for wrong in ({"max_feature_nodes": 0}, {"window": -3}, {"batch_size": 0}):
        with pytest.raises(GraphError, match=f"Got {{'{next(iter(wrong))}': .*at least 1"):
            attribute(pair, TOKENS, **wrong, **QUIET)
    untrained = PairedModel.from_pretrained(random_model(1), random_model(2))
    with pytest.raises(PairMismatchError, match="no adapters yet"):
        attribute(untrained, TOKENS, **QUIET)
    adapters = untrained.new_adapters(8, dtype=torch.float64)
    for adapter in adapters:
        adapter.b_enc.data.fill_(-1e6)
    with pytest.raises(GraphError, match="No adapter feature is active"):
        attribute(untrained, TOKENS, **QUIET)
    adapters.save_pretrained(tmp_path / "a")
    from tl_adapters.adapters.adapter_set import AdapterSet

    untrained.load_adapters(AdapterSet.from_pretrained(tmp_path / "a", layers=[0, 2]))
    with pytest.raises(PairMismatchError, match=r"no adapters of layers \[1, 3\]"):
        attribute(untrained, TOKENS, **QUIET)
