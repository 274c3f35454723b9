"""Recipes and baselines of the planted benchmark, and what is measured of them."""

from dataclasses import replace

import pytest
import torch
from helpers.random_models import random_model
from helpers.skewed_traces import skewed_traces
from plants.edited_neurons import edited_neurons
from plants.families import discriminants
from plants.measurement import firings, measure, representable
from plants.plant import Ground, Plant, layer_inputs
from plants.recipes import (
    Options,
    bias,
    end_to_end,
    end_to_end_whitened,
    local,
    local_options,
    local_then_end_to_end,
    low_rank,
    reduced_rank_regression,
    sae_on_difference,
)
from torch import Tensor

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.config import ConfigError, LocalConfig

LAYERS, WIDTH = 2, 8
TEXT, HELD_OUT = skewed_traces(300), skewed_traces(120, seed=1)
OPTIONS = Options(WIDTH, local=LocalConfig(steps=40, tokens_per_step=256), steps=5)


@pytest.fixture(scope="module")
def ground() -> Ground:
    base, other = (random_model(seed, torch.float32, num_hidden_layers=LAYERS) for seed in (1, 2))
    return Ground(base, TEXT, other, per_layer=2, rates=(0.1,), strength=2.0)


@pytest.fixture(scope="module")
def plant(ground: Ground) -> Plant:
    return discriminants(ground, 0)


def tokens(plant: Plant, layer: int) -> tuple[Tensor, Tensor]:
    x = layer_inputs(plant.pair, TEXT, layer)
    with torch.no_grad():
        return x, plant.pair.mlps[layer].difference(x)


def test_the_bias_is_the_mean_difference_and_no_feature_is_active(plant: Plant) -> None:
    adapters = bias(plant.pair, TEXT, OPTIONS)
    for layer, adapter in enumerate(adapters):
        x, d = tokens(plant, layer)
        torch.testing.assert_close(adapter(x), d.mean(0).expand_as(d), atol=1e-5, rtol=1e-4)
        assert not bool(adapter.encode(x).any())


def test_low_rank_is_the_best_linear_map_of_its_rank(plant: Plant) -> None:
    rank = 1  # below that of the difference, which two features make
    adapters = low_rank(plant.pair, TEXT, replace(OPTIONS, n_features=rank))
    for layer, adapter in enumerate(adapters):
        x, d = tokens(plant, layer)
        assert bool((adapter.encode(x) > 0).all())
        with_bias = torch.cat([x, torch.ones_like(x[:, :1])], 1).double()
        fitted = with_bias @ torch.linalg.lstsq(with_bias, d.double()).solution
        u, s, v = torch.linalg.svd(fitted - fitted.mean(0), full_matrices=False)
        best = fitted.mean(0) + (u[:, :rank] * s[:rank]) @ v[:rank]
        ours, theirs = (float((out - d).square().sum()) for out in (adapter(x).double(), best))
        assert theirs * (1 - 1e-6) <= ours <= theirs * 1.01
        assert float((d - fitted).square().sum()) < 0.99 * ours


def test_reduced_rank_regression_finds_an_exact_map() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 12, generator=generator) + 3
    read, write = torch.randn(12, 2, generator=generator), torch.randn(2, 12, generator=generator)
    mean_x, mean_y, a, b = reduced_rank_regression(x, x @ read @ write + 1, 2)
    torch.testing.assert_close(mean_y + (x - mean_x) @ a @ b, x @ read @ write + 1, atol=0.02, rtol=0.01)


def test_the_sae_reads_the_difference(plant: Plant) -> None:
    adapters = sae_on_difference(plant.pair, TEXT, OPTIONS)
    x, d = tokens(plant, 0)
    left = float((adapters[0](x) - d).square().sum() / d.square().sum())
    assert left < 0.6
    adapter = adapters[0]
    expected = torch.relu(d @ adapter.W_enc + adapter.b_enc)
    torch.testing.assert_close(adapter.encode(x), expected, atol=1e-4, rtol=1e-3)


def test_the_truth_is_measured_as_found_and_an_untrained_set_as_empty(plant: Plant) -> None:
    in_training = firings(plant, TEXT)
    assert set(in_training) == {FeatureId(layer, i) for layer in range(LAYERS) for i in range(2)}
    n = sum(len(trace.tokens) for trace in TEXT)
    assert all(count == pytest.approx(0.1 * n, rel=0.2) for count in in_training.values())
    end_to_end(plant.pair, TEXT, OPTIONS)
    untrained = measure(plant, plant.pair.installed_adapters(), HELD_OUT, in_training)
    assert untrained["recall"]["all"]["k"] == 0 and untrained["kl_left"]["value"] > 0.5
    adapters = plant.pair.new_adapters(2)
    with torch.no_grad():
        for ours, theirs in zip(adapters, plant.truth, strict=True):
            ours.load_state_dict(theirs.state_dict())
    found = measure(plant, adapters, HELD_OUT, in_training)
    assert found["recall"]["1e-1"] | {"k": 4, "n": 4} == found["recall"]["1e-1"]
    assert found["precision"] == {"k": 4, "n": 4} and abs(found["kl_left"]["value"]) < 1e-3
    assert found["l0"] == pytest.approx(found["true_l0"], rel=0.1)
    low, high = found["recall"]["all"]["firings_training"]
    assert low == min(in_training.values()) and high == max(in_training.values())
    rates = sorted(rate for *_, rate, _ in found["features"])
    held_out = [round(rate * found["held_out_tokens"]) for rate in rates]
    assert found["recall"]["all"]["firings_held_out"] == [held_out[0], held_out[-1]]


def test_options_of_the_local_stage_are_given_by_name() -> None:
    given = local_options(LocalConfig(), ["penalty=l1", "revisions=[0.5]", "lr=0.02"], steps=9)
    assert given == replace(LocalConfig(), penalty="l1", revisions=(0.5,), lr=0.02, steps=9)
    with pytest.raises(ConfigError, match="lr is"):
        local_options(LocalConfig(), ["lr=fast"])


def test_recipes_train_adapters_of_the_width_that_is_asked(plant: Plant) -> None:
    few = replace(OPTIONS, local=LocalConfig(steps=4, tokens_per_step=64), steps=2)
    for recipe in (local, local_then_end_to_end, end_to_end, end_to_end_whitened):
        adapters = recipe(plant.pair, TEXT, few)
        assert adapters.n_features == WIDTH and adapters.n_layers == LAYERS
        assert plant.pair.installed_adapters() is adapters


def test_what_one_relu_feature_can_represent(plant: Plant, ground: Ground) -> None:
    assert representable(plant, TEXT, HELD_OUT) == {}
    found = representable(edited_neurons(ground, 0), TEXT, HELD_OUT)
    assert 0 <= found["k"] < found["n"]
