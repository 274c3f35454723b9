"""The difference of two MLPs is computed exactly enough, and what of it is only the rounding of weights is known."""

import logging
import math
from collections.abc import Callable

import pytest
import torch
from helpers.random_models import random_model
from torch import Tensor
from transformers import PreTrainedModel

from tl_adapters.config import LocalConfig, TrainingConfig
from tl_adapters.data.traces import Trace, collate
from tl_adapters.local_stage.regression_data import MLPDifferences
from tl_adapters.local_stage.signal_to_noise import SMALLEST_RATIO, SignalToNoise, signal_to_noise
from tl_adapters.local_stage.train_local import train_local
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.models.routed_mlp import MLPWeights

BF16 = torch.bfloat16


def changed(model: PreTrainedModel, by: Callable[[Tensor], Tensor], layers: range = range(4)) -> PreTrainedModel:
    """The model with other MLP weights, computed in float64 and stored in the model's dtype."""
    with torch.no_grad():
        for layer in layers:
            for weight in model.model.layers[layer].mlp.parameters():
                weight.copy_(by(weight.double()))
    return model


def noise_of(size: float, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """A relative change of every weight by normal noise."""
    generator = torch.Generator().manual_seed(seed)
    return lambda w: w * (1 + size * torch.randn(w.shape, generator=generator, dtype=torch.float64))


def energy(rows: Tensor) -> float:
    return float(rows.double().square().sum(-1).mean())


def documents(n: int = 12) -> list[Trace]:
    generator = torch.Generator().manual_seed(1)
    return [Trace(tuple(torch.randint(1, 61, (30,), generator=generator).tolist()), 3) for _ in range(n)]


@torch.no_grad()
def test_the_difference_of_bfloat16_weights_is_that_of_float64_arithmetic() -> None:
    pair = PairedModel.from_pretrained(random_model(1, BF16), changed(random_model(1, BF16), noise_of(0.01)))
    for mlp in pair.mlps:
        x = torch.randn(200, 32, generator=torch.Generator().manual_seed(2)).to(BF16)
        target, base = mlp.weights()
        exact = mlp.difference(x.double())
        assert math.sqrt(energy(mlp.difference(x) - exact) / energy(exact)) < 1e-3
        in_bfloat16 = target.neurons(x) @ target.W_out - base.neurons(x) @ base.W_out
        assert energy(in_bfloat16 - exact) > 0.05 * energy(exact)


D_MODEL, D_MLP = 64, 160


def mlp(change: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float64) -> MLPWeights:
    """An MLP whose weights were changed in float64 and then rounded to a dtype."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((D_MODEL, D_MLP), (D_MODEL, D_MLP), (D_MLP, D_MODEL))
    weights = (torch.randn(shape, generator=generator, dtype=torch.float64) * shape[0] ** -0.5 for shape in shapes)
    return MLPWeights(*(change(weight).to(dtype) for weight in weights), torch.nn.functional.silu)


def of_few_neurons(size: float) -> Callable[[Tensor], Tensor]:
    """A change of every 20th neuron; in all weights together of the relative size ``size``."""
    neurons, change = (torch.arange(D_MLP) % 20 == 0).double(), noise_of(size * 20**0.5)
    return lambda w: w + (change(w) - w) * (neurons[:, None] if len(w) == D_MLP else neurons)


def of_low_rank(size: float) -> Callable[[Tensor], Tensor]:
    """A change of rank 3."""
    generator = torch.Generator().manual_seed(5)

    def change(w: Tensor) -> Tensor:
        a, b = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in w.shape)
        return w + a @ b.T * (size * w.norm() / (a @ b.T).norm())

    return change


@pytest.mark.parametrize("size", [0.01, 0.003, 0.001, 0.0003])
@pytest.mark.parametrize("change", [noise_of, of_few_neurons, of_low_rank])
def test_the_rounding_of_weights_is_known_from_the_stored_weights(
    size: float, change: Callable[[float], Callable[[Tensor], Tensor]]
) -> None:
    x = torch.randn(500, D_MODEL, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    true = mlp(change(size)).output(x) - mlp(lambda w: w).output(x)
    target, base = mlp(change(size), BF16), mlp(lambda w: w, BF16)
    d = target.output(x) - base.output(x)
    measured = signal_to_noise(target, base, x.float(), d)
    assert measured.ratio == pytest.approx(energy(true) / energy(d - true), rel=0.35, abs=0.45)


def test_weights_that_were_stored_in_bfloat16_are_known_in_float32() -> None:
    target, base = mlp(noise_of(0.003), BF16), mlp(lambda w: w, BF16)
    x = torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(2))
    d = target.output(x) - base.output(x)
    loaded = (MLPWeights(w.W_gate.float(), w.W_in.float(), w.W_out.float(), w.act_fn) for w in (target, base))
    assert signal_to_noise(*loaded, x, d) == signal_to_noise(target, base, x, d)


@torch.no_grad()
def test_what_no_rounding_made_has_no_noise() -> None:
    pair = PairedModel.from_pretrained(random_model(1, BF16), random_model(1, BF16))
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(2))
    same = signal_to_noise(*pair.mlps[0].weights(), x, pair.mlps[0].difference(x))
    assert same == SignalToNoise(0.0, 0.0)
    assert (same.ratio, same.explainable, str(same)) == (0.0, False, "the two MLPs do not differ")
    planted = pair.new_adapters(8)
    planted[0].W_dec.fill_(1e-4)
    pair = PairedModel.plant(random_model(1, BF16), planted)
    exact = signal_to_noise(*pair.mlps[0].weights(), x, pair.mlps[0].difference(x))
    assert exact.energy > 0
    assert exact.ratio == math.inf


def test_a_layer_whose_difference_is_rounding_is_left_unexplained(caplog: pytest.LogCaptureFixture) -> None:
    target = changed(
        random_model(1, BF16), noise_of(0.0012), range(1, 2)
    )  # half a unit in the last place is 0.004 to 0.002
    pair = PairedModel.from_pretrained(random_model(1, BF16), changed(target, noise_of(0.03), range(2, 4)))
    config = TrainingConfig(n_features=8)
    local = LocalConfig(steps=20, tokens_per_step=64)
    with caplog.at_level(logging.WARNING, logger="tl_adapters"):
        adapters = train_local(pair, documents(), config, local, progress=False)
    says = [record.message for record in caplog.records if "unexplained" in record.message]
    assert len(says) == 2
    assert "layer 0 is left unexplained" in says[0] and "do not differ" in says[0]
    assert (
        "layer 1 is left unexplained" in says[1] and "of the difference of the two MLPs (signal to noise 0" in says[1]
    )
    for layer, (x, d) in enumerate(MLPDifferences(pair).read(collate(documents(2)))):
        explained = layer > 1
        assert (signal_to_noise(*pair.mlps[layer].weights(), x, d).ratio >= SMALLEST_RATIO) is explained
        acts = adapters[layer].encode(x)
        assert bool((acts > 0).any()) is explained
        assert bool((adapters[layer](x) != 0).any()) is explained
