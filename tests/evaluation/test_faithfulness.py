"""Faithfulness figures compared with their formulas, computed by whole forward passes without shared prefixes."""

import pytest
import torch
from helpers.random_models import random_model

from tl_adapters.data.traces import Trace, collate
from tl_adapters.evaluation.baselines import (
    baseline_kl,
    corrected,
    difference_directions,
    low_rank,
    top_neurons,
)
from tl_adapters.evaluation.faithfulness import faithfulness_block, features_block, measure_faithfulness
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.training.kl_divergence import kl_per_token


@pytest.fixture
def traces() -> list[Trace]:
    generator = torch.Generator().manual_seed(8)
    return [Trace(tuple(torch.randint(1, 61, (n,), generator=generator).tolist()), 3) for n in (9, 6, 12, 7)]


@torch.no_grad()
def alone(pair: PairedModel, trace: Trace, route: str, **layers: object) -> torch.Tensor:
    """Per-position KL of one document, by a whole forward pass."""
    tokens = torch.tensor([trace.tokens])
    target = pair.model(tokens)
    with pair.routed(route, **layers):
        return kl_per_token(target, pair.model(tokens))[0]


@pytest.mark.parametrize("tokens_per_batch", [1, 24, 1000])
def test_every_kl_agrees_with_its_formula(pair: PairedModel, traces: list[Trace], tokens_per_batch: int) -> None:
    sums = measure_faithfulness(pair, traces, tokens_per_batch=tokens_per_batch)
    models = {"hybrid": ("hybrid", {}), "replacement": ("replacement", {})}
    for i in range(4):
        models[f"first[{i}]"] = ("replacement", {"first": i + 1})
        models[f"last[{i}]"] = ("replacement", {"last": 4 - i})
        models[f"only[{i}]"] = ("replacement", {"only": [i]})
    assert set(sums.kl) == set(models)
    for row, trace in enumerate(traces):
        n = len(trace.tokens)
        for name, (route, layers) in models.items():
            kl = alone(pair, trace, route, **layers)
            assert sums.kl[name][row] == pytest.approx(float(kl[2 : n - 1].sum()), abs=1e-9), name
            assert sums.kl_all[name][row] == pytest.approx(float(kl[: n - 1].sum()), abs=1e-9), name
        assert sums.positions[row] == n - 3 and sums.positions_all[row] == n - 1
        assert sums.tokens[row] == n - 3 and sums.tokens_all[row] == n


@torch.no_grad()
def test_nmse_l0_and_firings_agree_with_their_formulas(pair: PairedModel, traces: list[Trace]) -> None:
    sums = measure_faithfulness(pair, traces)
    frame = sums.to_pandas()
    assert frame["kl_last"][0] == pytest.approx(float(sums.kl["replacement"].sum() / sums.positions.sum()))
    assert frame["l0"].tolist() == sums.l0.tolist() and len(frame) == 4
    block = sums.to_dict("report")
    assert block["nmse"][2]["value"] == pytest.approx(frame["nmse"][1]), "the embedding has none of the four rows"
    assert f"{block['kl']['replacement']['value']:.4g}" in repr(sums)
    assert f"{block['kl']['hybrid']['value']:.3g} <" in sums._repr_html_()
    firings = torch.zeros(4, 24)
    for row, trace in enumerate(traces):
        tokens = torch.tensor([trace.tokens])
        _, target = pair.model.run_with_cache(tokens)
        with pair.routed("replacement"):
            _, replacement = pair.model.run_with_cache(tokens)
        for layer in range(4):
            acts = replacement[f"blocks.{layer}.mlp.adapter.hook_sae_acts_post"][0]
            firings[layer] += (acts > 0).sum(0)
            assert sums.active[row, layer] == (acts[3:] > 0).sum()
            a, b = (c[f"blocks.{layer}.hook_resid_post"][0] for c in (target, replacement))
            assert sums.error[row, layer + 1] == pytest.approx(float((a - b)[3:].square().sum()))
            assert sums.energy[row, layer + 1] == pytest.approx(float(a[3:].square().sum()))
            assert sums.error_all[row, layer + 1, 0] == pytest.approx(float((a - b).square().sum()))
            assert sums.error_all[row, layer + 1, 1] == pytest.approx(float((a - b)[1:].square().sum()))
    assert torch.equal(sums.firings.float(), firings)
    assert not sums.error[:, 0].any()


def test_the_faithfulness_block_of_results_json(pair: PairedModel, traces: list[Trace]) -> None:
    sums = measure_faithfulness(pair, traces)
    block = faithfulness_block(sums, "tune", seeds=(3,))
    kl = block["kl"]["replacement"]
    assert kl.value == pytest.approx(float(sums.kl["replacement"].sum() / sums.positions.sum()))
    assert kl.low <= kl.value <= kl.high and kl.split == "tune" and kl.seeds == (3,) and kl.n == 4
    assert block["kl_first"][3].value == pytest.approx(kl.value) == pytest.approx(block["kl_last"][0].value)
    assert block["partial_of_full"]["first"][3].value == pytest.approx(1)
    alive = (sums.firings >= 10).sum(1)
    assert block["dead"] == [24 - int(a) for a in alive]
    assert features_block(sums) == {"total": 96, "alive": int(alive.sum()), "tokens": 34}


# -- baselines --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_mlp_difference_is_that_of_the_two_routes(pair: PairedModel) -> None:
    x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = {}
    for route in ("target", "hybrid"):
        with pair.routed(route):
            out[route] = pair.mlps[2](x)
    torch.testing.assert_close(pair.mlps[2].difference(x), out["target"] - out["hybrid"], rtol=1e-9, atol=1e-9)


def test_with_all_neurons_or_full_rank_the_baseline_is_the_target(pair: PairedModel, traces: list[Trace]) -> None:
    all_neurons = [top_neurons(mlp, 48) for mlp in pair.mlps]
    kl, positions = baseline_kl(pair, all_neurons, traces)
    assert kl.abs().max() < 1e-9 and positions.sum() == sum(len(t.tokens) - 3 for t in traces)
    directions = difference_directions(pair, traces)
    full_rank = [low_rank(mlp, d) for mlp, d in zip(pair.mlps, directions, strict=True)]
    assert baseline_kl(pair, full_rank, traces)[0].abs().max() < 1e-9


def test_without_swapped_neurons_the_baseline_is_the_hybrid(pair: PairedModel, traces: list[Trace]) -> None:
    kl, _ = baseline_kl(pair, [top_neurons(mlp, 0) for mlp in pair.mlps], traces)
    expected = measure_faithfulness(pair, traces).kl["hybrid"]
    torch.testing.assert_close(kl, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_strongest_directions_lose_the_least(pair: PairedModel, traces: list[Trace]) -> None:
    """The strongest directions have a smaller squared error on their traces than 20 random projections."""
    mlp, batch = pair.mlps[1], collate(traces)
    _, cache = pair.model.run_with_cache(batch.tokens)
    x = cache["blocks.1.mlp.hook_in"][batch.real]
    difference = mlp.difference(x)
    lost = lambda d: (difference - low_rank(mlp, d)(x)).square().sum()  # noqa: E731
    best = lost(difference_directions(pair, traces)[1][:, :5])
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        random = torch.linalg.qr(torch.randn(32, 5, generator=generator, dtype=torch.float64))[0]
        assert best < lost(random)


@torch.no_grad()
def test_the_most_changed_neurons_are_swapped(pair: PairedModel) -> None:
    mlp = pair.mlps[0]
    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    act = lambda m: m.act_fn(x @ m.W_gate) * (x @ m.W_in)  # noqa: E731
    change = act(mlp)[0, 0, :, None] * mlp.W_out - act(mlp.base)[0, 0, :, None] * mlp.base.W_out
    top = change.norm(dim=1).topk(3).indices
    torch.testing.assert_close(top_neurons(mlp, 3)(x)[0, 0], change[top].sum(0), rtol=1e-9, atol=1e-9)


def test_the_model_is_unchanged_after_a_correction(pair: PairedModel, traces: list[Trace]) -> None:
    before = pair.model(torch.tensor([traces[0].tokens]))
    with corrected(pair, [top_neurons(mlp, 2) for mlp in pair.mlps]):
        assert all(r.base_mlp for r in pair.routes)
    assert torch.equal(before, pair.model(torch.tensor([traces[0].tokens])))
    assert not any(point._forward_hooks for point in pair.model.hook_dict.values())


def test_mlp_difference_of_equal_models_is_zero() -> None:
    pair = PairedModel.from_pretrained(random_model(2), random_model(2))
    x = torch.randn(2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert pair.mlps[0].difference(x).abs().max() == 0
