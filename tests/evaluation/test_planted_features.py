"""A planted pair equals the base plus the planted features; these are matched, and recovered by training."""

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.random_models import ARCHITECTURES, random_batch, random_model
from helpers.skewed_traces import skewed_traces
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM, PreTrainedModel

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.adapters.metadata import AdapterMetadata
from tl_adapters.adapters.transcoder import TranscoderAdapter
from tl_adapters.attribution.relp import LinearizedModel
from tl_adapters.checkpoints.compatibility import PairMismatchError
from tl_adapters.config import LossWeights, TrainingConfig
from tl_adapters.data.traces import Trace, collate
from tl_adapters.errors import UserError
from tl_adapters.evaluation.baselines import baseline_kl, difference_directions, low_rank, top_neurons
from tl_adapters.evaluation.faithfulness import measure_faithfulness
from tl_adapters.evaluation.feature_matching import MatchingError, Share, match_features, one_to_one, seed_agreement
from tl_adapters.evaluation.planted_features import PlantedSet, PlantingError, plant_features
from tl_adapters.evaluation.planted_recovery import planted_test
from tl_adapters.interop.export import export
from tl_adapters.models.hooked_transformer import build_hooked_transformer
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.training.objective import reference_step, shared_prefix_step

TOKENS = random_batch(3).tokens[:1, :11]
N_FEATURES = 10


def random_set(seed: int = 4, layers: tuple[int, ...] = (0, 1, 2, 3), dtype: torch.dtype = torch.float64) -> AdapterSet:
    """Adapters without layer samples, every weight random."""
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for layer in layers:
        adapters[layer] = TranscoderAdapter(32, N_FEATURES, dtype=dtype)
        with torch.no_grad():
            for weight in adapters[layer].parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return AdapterSet(adapters, n_layers=4)


def formula(adapter: TranscoderAdapter, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x @ adapter.W_enc + adapter.b_enc) @ adapter.W_dec + adapter.b_dec


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() < tolerance, float((a - b).abs().max())


@torch.no_grad()
def base_plus(planted: AdapterSet, architecture: str, times: int = 1) -> torch.Tensor:
    """Logits of a plain HookedTransformer of the base whose MLPs' outputs are added to by hand."""
    model = build_hooked_transformer(random_model(1, architecture=architecture))
    for layer in planted.layer_indices:
        model.blocks[layer].mlp.register_forward_hook(
            lambda mlp, args, out, layer=layer: out + times * formula(planted[layer], args[0])
        )
    return model(TOKENS)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return random_model(1)


# -- the planted pair --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_target_is_the_base_plus_the_planted_features(architecture: str) -> None:
    planted = random_set()
    pair = PairedModel.plant(random_model(1, architecture=architecture), planted)
    expected, nothing = base_plus(planted, architecture), base_plus(planted, architecture, times=0)
    assert (expected - nothing).abs().max() > 0.1
    close(pair.model(TOKENS), expected, 1e-10)
    with pair.routed("hybrid"):
        close(pair.model(TOKENS), nothing, 1e-10)
    pair.load_adapters(random_set())  # the same weights, in memory of their own
    with pair.routed("replacement"):
        close(pair.model(TOKENS), expected, 1e-10)
    with pair.routed("target+adapter"):
        close(pair.model(TOKENS), base_plus(planted, architecture, times=2), 1e-10)
    sums = measure_faithfulness(pair, [Trace(tuple(TOKENS[0].tolist()), 3)])
    assert (
        sums.kl["hybrid"].sum() > 1e-3 and max(float(v.abs().sum()) for k, v in sums.kl.items() if k != "hybrid") < 1e-9
    )


@torch.no_grad()
def test_features_are_planted_in_a_target_that_differs_from_the_base_elsewhere_too(base: PreTrainedModel) -> None:
    planted, changed = random_set(), random_model(2)
    pair = PairedModel.plant(base, planted, target=changed)
    plain = PairedModel.from_pretrained(base, changed)
    x = torch.randn(3, 32, dtype=torch.float64)
    for layer, mlp in enumerate(pair.mlps):
        close(mlp.difference(x), plain.mlps[layer].difference(x) + formula(planted[layer], x), 1e-10)
    with pair.routed("hybrid"), plain.routed("hybrid"):
        close(pair.model(TOKENS), plain.model(TOKENS), 1e-12)
    plain.load_adapters(random_set())
    with plain.routed("target+adapter"):
        close(pair.model(TOKENS), plain.model(TOKENS), 1e-10)
    assert pair.target_id.startswith(plain.target_id) and pair.base_id == plain.base_id


@torch.no_grad()
def test_a_planted_bridge(architecture: str) -> None:
    planted = random_set()
    pair = PairedModel.plant(random_model(1, architecture=architecture), planted, backend="bridge")
    close(pair.model(TOKENS), base_plus(planted, architecture), 1e-5)
    with pair.routed("hybrid"):
        close(pair.model(TOKENS), random_model(1, architecture=architecture)(TOKENS).logits, 1e-5)
    pair.load_adapters(random_set())
    target = pair.model(TOKENS)
    with pair.routed("replacement"):
        close(pair.model(TOKENS), target, 1e-10)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@torch.no_grad()
def test_hook_points_copies_and_release(backend: str) -> None:
    base = random_model(1)
    before = {name: w.clone() for name, w in base.state_dict().items()}
    pair = PairedModel.plant(base, random_set(), backend=backend)
    logits, cache = pair.model.run_with_cache(TOKENS)
    x, acts = cache["blocks.2.mlp.hook_in"], cache["blocks.2.mlp.planted.hook_sae_acts_post"]
    ours = random_set()[2]
    close(acts, torch.relu(x @ ours.W_enc + ours.b_enc), 1e-12)
    with pair.routed("hybrid"):
        assert not any(".planted." in name for name in pair.model.run_with_cache(TOKENS)[1])
    other = copy.deepcopy(pair.model)
    close(other(TOKENS), logits, 1e-12)
    pair.planted[0].W_dec.mul_(2)
    assert (pair.model(TOKENS) - logits).abs().max() > 1e-3
    close(other(TOKENS), logits, 1e-12)
    model = pair.release()
    close(model(TOKENS), base_plus(random_set(), "Qwen2ForCausalLM", times=0), 1e-5)
    assert not any("planted" in name for name, _ in model.named_modules()) and pair.planted is None
    if backend == "hooked":
        assert not any("planted" in name for name in model.hook_dict)
        assert all(torch.equal(w, before[name]) for name, w in base.state_dict().items())
    else:
        assert not any("planted" in name for name in model._hook_registry)


@torch.no_grad()
def test_sets_of_some_layers_and_sets_that_read_normalized_inputs(base: PreTrainedModel) -> None:
    some = random_set(layers=(1, 3))
    pair = PairedModel.plant(base, some)
    close(pair.model(TOKENS), base_plus(some, "Qwen2ForCausalLM"), 1e-10)
    assert pair.mlps[0].difference(torch.randn(3, 32, dtype=torch.float64)).abs().max() == 0
    whole = AdapterSet(list(random_set()), PairedModel.from_pretrained(base, base).layer_samples)
    normalized = whole.normalized()
    assert (normalized[0].W_enc - whole[0].W_enc).abs().max() > 0.01
    close(PairedModel.plant(base, normalized).model(TOKENS), base_plus(whole, "Qwen2ForCausalLM"), 1e-10)


def test_planted_features_are_copied_without_gradients_and_fingerprinted(base: PreTrainedModel, tmp_path: Path) -> None:
    mine = random_set()
    pair = PairedModel.plant(base, mine)
    logits, plain = pair.model(TOKENS).detach(), PairedModel.from_pretrained(base, base)
    with torch.no_grad():
        mine[1].W_dec.zero_()
    close(pair.model(TOKENS).detach(), logits, 1e-15)  # the pair has its own copy
    assert not any(p.requires_grad for p in pair.planted.parameters())
    assert pair.fingerprints["base_mlps"] == plain.fingerprints["base_mlps"]
    assert pair.fingerprints["target"] != plain.fingerprints["target"] and "planted" not in plain.fingerprints
    changed = random_set()
    with torch.no_grad():
        changed[0].W_enc.add_(0.01)
    other = PairedModel.plant(base, changed)
    assert other.fingerprints["planted"] != pair.fingerprints["planted"]
    trained = pair.new_adapters(6)
    assert pair.fingerprints["planted"] in trained.metadata.target
    trained.save_pretrained(tmp_path / "set")
    again = AdapterSet.from_pretrained(tmp_path / "set")
    pair.load_adapters(again)
    for elsewhere in (plain, other):
        with pytest.raises(PairMismatchError, match=r"Plant them again: PairedModel.plant\(base, planted\)"):
            elsewhere.load_adapters(again)
    with pytest.raises(MatchingError, match="different pairs: their planted and target differ"):
        seed_agreement(pair, again, other.new_adapters(6), [])


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: AdapterSet(list(random_set())[:3]), "3 layers of width 32; the model has 4"),
        (lambda: AdapterSet([TranscoderAdapter(16, 3)] * 4), "4 layers of width 16"),
        (
            lambda: AdapterSet(list(random_set()), metadata=AdapterMetadata(writes="mlp_out")),
            "These transcoders replace the MLP",
        ),
    ],
)
def test_sets_that_do_not_fit_the_base_are_refused(made, says: str, base: PreTrainedModel) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PairMismatchError, match=says):
        PairedModel.plant(base, made())


@torch.no_grad()
def test_baselines_include_planted_features(base: PreTrainedModel) -> None:
    planted = random_set()
    pair = PairedModel.plant(base, planted)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    close(pair.mlps[1].difference(x), formula(planted[1], x), 1e-10)
    traces = skewed_traces(4)
    directions = difference_directions(pair, traces)
    kl, _ = baseline_kl(pair, [low_rank(mlp, d) for mlp, d in zip(pair.mlps, directions, strict=True)], traces)
    assert kl.abs().max() < 1e-9
    with pytest.raises(UserError, match="none of its neurons differs"):
        top_neurons(pair.mlps[0], 3)


def test_objective_and_graphs_include_planted_features(base: PreTrainedModel) -> None:
    pair = PairedModel.plant(base, random_set())
    adapters = random_set(seed=9)
    pair.load_adapters(adapters)
    batch, results = random_batch(3), []
    for step in (reference_step, shared_prefix_step):
        adapters.zero_grad()
        terms = step(pair, batch, 2, LossWeights(), 0.01)
        results.append((terms.total, [p.grad.clone() for p in adapters.parameters()]))
    close(results[0][0], results[1][0], 1e-10)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        close(a, b, 1e-10)
    assert terms.output_kl > 1e-3 and all(p.grad is None for p in pair.planted.parameters())
    plain = PairedModel.from_pretrained(base, base)  # the replacement is the same model in both
    plain.load_adapters(adapters)
    graphs = [LinearizedModel(p, TOKENS[0]) for p in (pair, plain)]
    spots, vectors = torch.tensor([10]), torch.randn(1, 32, dtype=torch.float64)
    close(*(g.rows([4] * len(spots), spots, vectors).features for g in graphs), 1e-12)


def test_exports_of_a_planted_pair(tmp_path: Path) -> None:
    hf = random_model(1, torch.float32)
    hf.save_pretrained(tmp_path / "base")
    pair = PairedModel.plant(tmp_path / "base", random_set(dtype=torch.float32))
    with torch.no_grad():
        for adapter in pair.new_adapters(6):
            adapter.W_dec.normal_()
    pair.installed_adapters().save_pretrained(tmp_path / "set")
    with pytest.raises(UserError, match="planted features, which a gated MLP cannot hold"):
        export(tmp_path / "set", "target", tmp_path / "target")
    export(tmp_path / "set", "hybrid", tmp_path / "hybrid")
    export(tmp_path / "set", "authors", tmp_path / "authors")
    with torch.no_grad():
        close(AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid")(TOKENS).logits, hf(TOKENS).logits, 1e-4)


# -- planting ----------------------------------------------------------------------------------------------------------

RATES = (0.1, 0.03, 0.01)


@pytest.fixture(scope="module")
def plant(base: PreTrainedModel) -> PlantedSet:
    return plant_features(base, skewed_traces(), per_layer=6, rates=RATES, strength=2.0)


@torch.no_grad()
def test_planted_features_have_the_recorded_rates_texts_and_norms(base: PreTrainedModel, plant: PlantedSet) -> None:
    pair = PairedModel.plant(base, plant.adapters)
    traces = skewed_traces()
    batch = collate(traces)
    _, cache = pair.model.run_with_cache(batch.tokens, names_filter=lambda name: ".mlp." in name)
    assert [f.feature for f in plant.features] == [FeatureId(layer, i) for layer in range(4) for i in range(6)]
    assert [f.rate_asked for f in plant.features[:6]] == [0.1, 0.1, 0.03, 0.03, 0.01, 0.01]
    for f in plant.features:
        layer, index = f.feature
        acts = cache[f"blocks.{layer}.mlp.planted.hook_sae_acts_post"][batch.real][:, index]
        x = cache[f"blocks.{layer}.mlp.hook_in"][batch.real]
        fires = acts > 0
        assert float(fires.double().mean()) == pytest.approx(f.rate, abs=1e-9) == pytest.approx(f.rate_asked, rel=0.11)
        adapter, (_, mlp) = plant.adapters[layer], pair.mlps[layer].weights()
        assert float((x @ adapter.W_enc[:, index]).var()) == pytest.approx(1, rel=1e-3)
        size = (mlp.neurons(x) @ mlp.W_out).square().sum(-1).mean().sqrt()
        added = (acts[fires].square().mean()).sqrt() * adapter.W_dec[index].norm()
        assert float(added) == pytest.approx(2.0 * float(size), rel=1e-6)
        assert (f.kind == "text") == (index % 2 == 0) == bool(f.tokens) == (f.purity is not None)
        if f.kind == "text":
            n, hits = len(f.tokens), []
            for trace in traces:
                hits += [trace.tokens[max(0, i - n + 1) : i + 1] == f.tokens for i in range(len(trace.tokens))]
            on = torch.tensor(hits)
            assert f.rate_asked <= float(on.double().mean()) <= 2 * f.rate_asked
            assert f.purity == pytest.approx(float(on[fires].double().mean()), abs=1e-9)
    assert min(f.purity for f in plant.features if f.kind == "text") > 0.7  # texts are on at most 1/5
    assert len({(f.feature.layer, f.tokens) for f in plant.features if f.tokens}) == 12


def test_planting_depends_on_its_seed_only_and_does_not_change_the_pair(
    base: PreTrainedModel, plant: PlantedSet
) -> None:
    pair = PairedModel.from_pretrained(base, base)
    mine = pair.new_adapters(3)
    options = dict(per_layer=6, rates=RATES, strength=2.0)
    same = plant_features(pair, skewed_traces(), **options)
    assert all(torch.equal(a, b) for a, b in zip(same.adapters.parameters(), plant.adapters.parameters(), strict=True))
    assert same.features == plant.features
    assert pair.adapters is mine and not any(route.base_mlp or route.adapter for route in pair.routes)
    other = plant_features(pair, skewed_traces(), **options, seed=1)
    assert (other.adapters[0].W_dec - plant.adapters[0].W_dec).abs().max() > 1e-3


def test_firing_rates_from_sae_lens(base: PreTrainedModel) -> None:
    synthetic = pytest.importorskip("sae_lens.synthetic")
    rates = synthetic.ZipfianFiringProbabilityConfig(max_prob=0.2, min_prob=0.02).generate(4).tolist()
    planted = plant_features(base, skewed_traces(), per_layer=8, rates=rates)
    assert [f.rate for f in planted.features[:8]] == pytest.approx([r for r in rates for _ in range(2)], rel=0.11)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rates": (0.0001,)}, r"fires 0.7 times in 6,600 tokens; give 100,000 tokens"),
        ({"rates": (0.6,)}, "rates below 0.5"),
        ({"per_layer": 0}, "per_layer is 0"),
        ({"rates": (0.45,)}, "about as frequent as 0.45"),
    ],
)
def test_options_that_cannot_be_planted_are_refused(
    options: dict[str, object], says: str, base: PreTrainedModel
) -> None:
    with pytest.raises(PlantingError, match=says):
        plant_features(base, skewed_traces(), **{"per_layer": 2, "rates": (0.1,), **options})


# -- matching ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def shuffled(plant: AdapterSet, dead: int = 0, junk: int = 0, seed: int = 0) -> AdapterSet:
    """The same features in another order and on another scale, some of them dead, with random ones added."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for adapter in plant:
        n = adapter.n_features
        order, factor = torch.randperm(n, generator=generator), 0.5 + torch.rand(n, generator=generator)
        new = TranscoderAdapter(adapter.W_enc.shape[0], n + junk, dtype=adapter.W_enc.dtype)
        for weight in new.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
        new.W_enc[:, :n], new.b_enc[:n] = adapter.W_enc[:, order] * factor, adapter.b_enc[order] * factor
        new.W_dec[:n] = adapter.W_dec[order] / factor[:, None]
        new.b_enc[:dead] = -1e6
        layers.append(new)
    return AdapterSet(layers, plant.layer_samples)


def test_the_same_features_in_another_order_are_matched(base: PreTrainedModel, plant: PlantedSet) -> None:
    pair, traces = PairedModel.plant(base, plant.adapters), skewed_traces(seed=3)
    matching = match_features(shuffled(plant.adapters, dead=1, junk=3), plant.adapters, pair, traces)
    assert len(matching.a) == 4 * 8 and len(matching.b) == 24
    assert matching.shares("a")["all"] == (20, 32) and matching.shares("b")["all"] == (20, 24)
    assert sum(s.n for name, s in matching.shares("b").items() if name != "all") == 24
    assert set(matching.shares("b")) == {"all", "1e-1", "1e-2"}
    for m in (m for m in matching.matches if m.same):
        assert min(m.correlation, m.decoder_cosine, m.encoder_cosine, m.encoder_cosine_in_covariance) > 1 - 1e-9
    swapped = match_features(plant.adapters, shuffled(plant.adapters, dead=1, junk=3), pair, traces)
    assert swapped.shares("a") == matching.shares("b") and swapped.shares("b") == matching.shares("a")
    html = matching._repr_html_()
    assert "of 32<" in html and "of 24<" in html and "decoder_cosine" in html
    frame = matching.to_pandas()
    assert frame["same"].sum() == 20 and frame["decoder_cosine"].tolist() == [
        m.decoder_cosine for m in matching.matches
    ]
    assert matching.to_dict()["shares"]["a"]["all"] == {"k": 20, "n": 32}
    assert "32 and 24 alive features" in repr(matching) and "20 are the same" in repr(matching)


@pytest.mark.parametrize("tokens_per_batch", [64, 4096])
@torch.no_grad()
def test_statistics_agree_with_their_formulas(base: PreTrainedModel, plant: PlantedSet, tokens_per_batch: int) -> None:
    pair, traces = PairedModel.plant(base, plant.adapters), skewed_traces(40, seed=3)
    theirs = AdapterSet(list(random_set()), plant.adapters.layer_samples)
    matching = match_features(theirs.normalized(), plant.adapters, pair, traces, tokens_per_batch=tokens_per_batch)
    inputs: list[list[torch.Tensor]] = [[] for _ in range(4)]
    for trace in traces:
        _, cache = pair.model.run_with_cache(torch.tensor([trace.tokens]))
        for layer in range(4):
            inputs[layer].append(cache[f"blocks.{layer}.mlp.hook_in"][0])
    assert matching.tokens == sum(len(t.tokens) for t in traces)
    for layer in range(4):
        x = torch.cat(inputs[layer])
        a, b = theirs[layer], plant.adapters[layer]
        acts_a, acts_b = (torch.relu(x @ s.W_enc + s.b_enc) for s in (a, b))
        alive_a, alive_b = ((acts > 0).sum(0) >= 10 for acts in (acts_a, acts_b))
        assert {i for (where, i) in matching.a if where == layer} == set(alive_a.nonzero()[:, 0].tolist())
        correlation = torch.corrcoef(torch.cat([acts_a, acts_b], 1).T)[:N_FEATURES, N_FEATURES:]
        cosine = torch.nn.functional.cosine_similarity
        decoder = cosine(a.W_dec[:, None], b.W_dec[None], dim=-1)
        covariance = torch.cov(x.T)
        matches = [m for m in matching.matches if m.layer == layer]
        assert len(matches) == min(int(alive_a.sum()), int(alive_b.sum()))
        for m in matches:
            assert m.correlation == pytest.approx(float(correlation[m.a, m.b]), abs=1e-9)
            assert m.decoder_cosine == pytest.approx(float(decoder[m.a, m.b]), abs=1e-9)
            ours, other = a.W_enc[:, m.a], b.W_enc[:, m.b]
            assert m.encoder_cosine == pytest.approx(float(cosine(ours, other, dim=0)), abs=1e-9)
            under = (ours @ covariance @ other) / ((ours @ covariance @ ours) * (other @ covariance @ other)).sqrt()
            assert m.encoder_cosine_in_covariance == pytest.approx(float(under), abs=1e-9)
            assert matching.a[FeatureId(layer, m.a)] == pytest.approx(float((acts_a[:, m.a] > 0).double().mean()))
        # no other assignment of the alive features has a larger sum
        score = (correlation + decoder)[alive_a][:, alive_b]
        score = score if score.shape[0] >= score.shape[1] else score.T
        ways = itertools.permutations(range(score.shape[0]), score.shape[1])
        best = max(sum(float(score[i, j]) for j, i in enumerate(way)) for way in itertools.islice(ways, 2000))
        assert sum(m.correlation + m.decoder_cosine for m in matches) >= best - 1e-9


def test_one_to_one_has_the_largest_sum() -> None:
    for seed, shape in enumerate([(4, 4), (5, 3), (3, 5)]):
        scores = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        pairs = one_to_one(scores)
        assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs) == min(shape)
        tall = scores if shape[0] >= shape[1] else scores.T
        best = max(
            sum(float(tall[i, j]) for j, i in enumerate(way))
            for way in itertools.permutations(range(tall.shape[0]), tall.shape[1])
        )
        assert sum(float(scores[i, j]) for i, j in pairs) == pytest.approx(best)


def test_one_to_one_agrees_with_sae_lens() -> None:
    synthetic = pytest.importorskip("sae_lens.synthetic")
    generator = torch.Generator().manual_seed(0)
    for n_a, n_b in ((12, 9), (9, 12)):
        a, b = (torch.randn(n, 16, generator=generator) for n in (n_a, n_b))
        cosines = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1).abs()
        ours = sum(float(cosines[i, j]) for i, j in one_to_one(cosines)) / min(n_a, n_b)
        assert ours == pytest.approx(synthetic.mean_correlation_coefficient(a, b), abs=1e-6)


@pytest.mark.parametrize(("k", "n"), [(0, 7), (8, 10), (40, 40), (3, 200)])
def test_share_intervals_agree_with_scipy(k: int, n: int) -> None:
    expected = binomtest(k, n).proportion_ci(method="exact" if k in (0, n) else "wilson")
    assert Share(k, n).interval == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert Share(k, n).value == k / n and Share(0, 0).value is None


def test_sets_of_other_shapes_are_refused(base: PreTrainedModel, plant: PlantedSet) -> None:
    pair = PairedModel.plant(base, plant.adapters)
    with pytest.raises(MatchingError, match="4 layers of width 16; the pair has 4 of width 32"):
        match_features(AdapterSet([TranscoderAdapter(16, 3)] * 4), plant.adapters, pair, skewed_traces(4))


# -- recovery ----------------------------------------------------------------------------------------------------------


def test_training_recovers_planted_features() -> None:
    base = random_model(1, torch.float32, num_hidden_layers=1)
    traces, held_out = skewed_traces(1500, seed=1), skewed_traces(200, seed=2)
    config = TrainingConfig(
        stages=("end_to_end",), n_features=12, steps=150, tokens_per_batch=256, lr=0.06, l1_weight=3e-3
    )
    plant = plant_features(base, traces[:300], per_layer=2, rates=(0.1,), strength=2.0)
    options = dict(plant=plant, kl_documents=20, progress=False)
    report = planted_test(base, traces, held_out, config, **options)
    assert report.recall["all"] == (2, 2) and report.recall_by_kind == {"text": (1, 1), "direction": (1, 1)}
    assert report.precision.k == 2 and report.precision.n == len(report.matching.a) <= 12
    assert report.faithfulness["kl_of_hybrid"].value < 0.15
    assert "KL(replacement)" in report._repr_html_() and "of 2<" in report._repr_html_()
    untrained = planted_test(base, traces, held_out, replace(config, steps=1), **options)
    assert untrained.recall["all"] == (0, 2) and untrained.faithfulness["kl_of_hybrid"].value > 0.5
    record = json.loads(json.dumps(report.to_dict()))
    assert record["recall"]["all"]["k"] == 2 and record["kl_of_hybrid"]["value"] < 0.15
    assert sum(m["correlation"] > 0.9 and m["decoder_cosine"] > 0.9 for m in record["matches"]) == 2
    assert [f["kind"] for f in record["features"]] == ["text", "direction"] and record["not_judged"] == 0
