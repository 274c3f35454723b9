"""The local stage: whitened coordinates, fitted encoders, revised features, and planted features found again."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tl_adapters.adapters import active_features
from tl_adapters.adapters.active_features import ActiveFeatures
from tl_adapters.adapters.transcoder import TranscoderAdapter, unit_rows
from tl_adapters.config import LocalConfig, TrainingConfig
from tl_adapters.local_stage.encoder_fit import Encoder, fit_encoder
from tl_adapters.local_stage.feature_polish import polish_features
from tl_adapters.local_stage.feature_revision import give_birth, merge_split_features, remove_useless_features
from tl_adapters.local_stage.layer_tokens import LayerTokens
from tl_adapters.local_stage.local_layer import LocalLayer, penalty
from tl_adapters.local_stage.whitening import RunningCovariance, Whitening

D_MODEL, N_TRUE = 24, 6


class Planted(NamedTuple):
    """Inputs whose covariance is far from the identity, and a difference that sparse features make."""

    x: Tensor
    d: Tensor
    acts: Tensor
    W_dec: Tensor
    whitening: Whitening


@pytest.fixture(scope="module")
def planted() -> Planted:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(D_MODEL, D_MODEL, generator=generator) * torch.logspace(0, -2, D_MODEL)[:, None]
    x = torch.randn(20_000, D_MODEL, generator=generator) @ mixing + torch.randn(D_MODEL, generator=generator)
    inputs = RunningCovariance(D_MODEL)
    inputs.add(x)
    whitening = Whitening.of(inputs, 1e-6)
    scores = whitening(x) @ unit_rows(torch.randn(N_TRUE, D_MODEL, generator=generator)).T
    acts = torch.relu(scores - scores.quantile(0.95, dim=0))
    W_dec = 3 * unit_rows(torch.randn(N_TRUE, D_MODEL, generator=generator))
    return Planted(x, acts @ W_dec, acts, W_dec, whitening)


def layer_of(planted: Planted, n_features: int = 12, **options: object) -> LocalLayer:
    size = float(planted.d.square().sum(1).mean().sqrt())
    config = TrainingConfig(n_features=n_features, **options.pop("training", {}))  # type: ignore[arg-type]
    local = LocalConfig(**{"steps": 200, "tokens_per_step": 512, **options})  # type: ignore[arg-type]
    return LocalLayer(planted.whitening, size, config, local, torch.Generator().manual_seed(1), torch.device("cpu"))


def found(layer: LocalLayer, planted: Planted) -> int:
    """Number of planted features that one feature has, in what it reads and in what it writes."""
    with torch.no_grad():
        acts = layer.adapter.encode(planted.whitening(planted.x))
    both = torch.corrcoef(torch.cat([acts, planted.acts], 1).T)[: acts.shape[1], acts.shape[1] :].nan_to_num()
    cosines = unit_rows(layer.adapter.W_dec.detach()) @ unit_rows(planted.W_dec).T
    return int(((both > 0.9) & (cosines > 0.9)).any(0).sum())


def write_truth(layer: LocalLayer, planted: Planted) -> None:
    """Give the first features of a layer the planted ones, and silence the others."""
    x, size = planted.whitening(planted.x), layer.size
    layer.silence(torch.arange(N_TRUE, layer.adapter.n_features))
    for feature in range(N_TRUE):
        encoder = fit_encoder(x, planted.acts[:, feature], ridge=1e-8)
        assert encoder is not None
        layer.replace(feature, encoder, planted.W_dec[feature] / size)


def tokens_of(layer: LocalLayer, planted: Planted) -> LayerTokens:
    return LayerTokens(layer, *layer.coordinates(planted.x, planted.d))


def require_up_to_date(tokens: LayerTokens) -> None:
    """What the tokens keep is what their adapter computes."""
    adapter = tokens.layer.adapter
    with torch.no_grad():
        acts = adapter.encode(tokens.x)
        kept = torch.stack([tokens.activations(feature) for feature in range(adapter.n_features)], 1)
        torch.testing.assert_close(kept, acts, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(tokens.residual, tokens.d - adapter.decode(acts), atol=1e-3, rtol=1e-3)


def test_whitened_inputs_have_no_covariance_and_converted_encoders_the_same_pre_activations(planted: Planted) -> None:
    inputs = RunningCovariance(D_MODEL)
    inputs.add(planted.x)
    x = Whitening.of(inputs, 1e-12)(planted.x).double()
    torch.testing.assert_close(x.T @ x / len(x), torch.eye(D_MODEL, dtype=torch.float64), atol=1e-3, rtol=0)
    generator = torch.Generator().manual_seed(2)
    W_enc, b_enc = torch.randn(D_MODEL, 3, generator=generator), torch.randn(3, generator=generator)
    converted, bias = planted.whitening.encoder(W_enc, b_enc)
    torch.testing.assert_close(
        planted.x @ converted + bias, planted.whitening(planted.x) @ W_enc + b_enc, atol=1e-3, rtol=1e-3
    )


def test_covariance_is_that_of_all_rows_at_once(planted: Planted) -> None:
    inputs = RunningCovariance(D_MODEL)
    for part in planted.x.split(777):
        inputs.add(part)
    torch.testing.assert_close(inputs.covariance, torch.cov(planted.x.double().T, correction=0))
    torch.testing.assert_close(inputs.mean, planted.x.double().mean(0))


def test_an_encoder_is_fitted_to_the_activations_it_should_have(planted: Planted) -> None:
    x = planted.whitening(planted.x)
    encoder = fit_encoder(x, planted.acts[:, 0], ridge=1e-8, steps=20)
    assert encoder is not None
    error = torch.relu(x @ encoder.w + encoder.b) - planted.acts[:, 0]
    assert float(error.square().sum() / planted.acts[:, 0].square().sum()) < 1e-6
    assert fit_encoder(x, torch.zeros(len(x))) is None
    # An input of weight 2 counts as two inputs.
    weights = torch.ones(len(x))
    weights[:500] = 2.0
    twice = fit_encoder(x, planted.acts[:, 0] + 0.1 * (planted.acts[:, 1] > 0), weights=weights, steps=30)
    doubled = torch.cat([x, x[:500]])
    wanted = planted.acts[:, 0] + 0.1 * (planted.acts[:, 1] > 0)
    again = fit_encoder(doubled, torch.cat([wanted, wanted[:500]]), steps=30)
    assert twice is not None
    assert again is not None
    torch.testing.assert_close(twice.w, again.w, atol=1e-2, rtol=1e-2)


def test_converted_weights_compute_the_same_output(planted: Planted) -> None:
    layer = layer_of(planted)
    write_truth(layer, planted)
    adapter = TranscoderAdapter(D_MODEL, 12)
    layer.write_to(adapter)
    x, _ = layer.coordinates(planted.x, planted.d)
    torch.testing.assert_close(adapter(planted.x), layer.adapter(x) * layer.size, atol=1e-3, rtol=1e-3)
    error = (adapter(planted.x).detach() - planted.d).square().sum()
    assert float(error / planted.d.square().sum()) < 1e-4


def test_features_that_split_one_are_merged(planted: Planted) -> None:
    layer = layer_of(planted)
    write_truth(layer, planted)
    adapter = layer.adapter
    with torch.no_grad():  # feature 0 once more as two features, each with a part of its activations
        for part, share in ((N_TRUE, 0.3), (0, 0.7)):
            adapter.W_enc[:, part] = adapter.W_enc[:, 0]
            adapter.b_enc[part] = adapter.b_enc[0]
            adapter.W_dec[part] = share * planted.W_dec[0] / layer.size
    tokens = tokens_of(layer, planted)
    before, energy = float(tokens.residual.square().sum()), float(tokens.d.square().sum())
    assert merge_split_features(tokens, torch.Generator().manual_seed(3)) == 1
    require_up_to_date(tokens)
    assert float(tokens.residual.square().sum()) < max(before, 1e-3 * energy)
    assert found(layer, planted) == N_TRUE
    assert merge_split_features(tokens, torch.Generator().manual_seed(3)) == 0


def test_a_direction_that_no_feature_writes_is_born(planted: Planted) -> None:
    layer = layer_of(planted)
    write_truth(layer, planted)
    layer.silence(torch.tensor([2, 4]))
    tokens = tokens_of(layer, planted)
    assert found(layer, planted) == N_TRUE - 2
    assert give_birth(tokens, torch.Generator().manual_seed(4)) >= 2
    require_up_to_date(tokens)
    assert found(layer, planted) == N_TRUE


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_dead_features_that_compete_are_revived(planted: Planted, activation: str) -> None:
    """A birth is fitted without the competition of topk and batchtopk, and wins in it where the feature is missing."""
    layer = layer_of(planted, training={"activation": activation, "k": 2})
    write_truth(layer, planted)
    layer.silence(torch.tensor([2, 4]))
    tokens = tokens_of(layer, planted)
    before = float(tokens.residual.square().sum())
    assert found(layer, planted) == N_TRUE - 2 and not len(tokens.tokens[2]) and not len(tokens.tokens[4])
    assert give_birth(tokens, torch.Generator().manual_seed(4)) >= 2
    tokens.refresh()
    require_up_to_date(tokens)
    assert found(layer, planted) == N_TRUE
    assert float(tokens.residual.square().sum()) < 0.2 * before
    assert sum(len(active) > 0 for active in tokens.tokens) >= N_TRUE


def test_features_that_explain_nothing_are_removed(planted: Planted) -> None:
    layer = layer_of(planted)
    write_truth(layer, planted)
    generator = torch.Generator().manual_seed(5)
    layer.replace(
        8, Encoder(torch.randn(D_MODEL, generator=generator), torch.tensor(-6.0)), torch.full((D_MODEL,), 1e-3)
    )
    tokens = tokens_of(layer, planted)
    assert len(tokens.tokens[8]) > 0
    assert remove_useless_features(tokens, 3e-5) == 1
    require_up_to_date(tokens)
    assert len(tokens.tokens[8]) == 0
    assert found(layer, planted) == N_TRUE


def test_an_encoder_that_is_not_exact_is_polished(planted: Planted) -> None:
    layer = layer_of(planted)
    write_truth(layer, planted)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        columns = layer.adapter.W_enc[:, :N_TRUE]
        columns += 0.3 * columns.norm(dim=0) * unit_rows(torch.randn(N_TRUE, D_MODEL, generator=generator)).T
    tokens = tokens_of(layer, planted)
    before = float(tokens.residual.square().sum())
    assert polish_features(tokens, generator) == N_TRUE
    require_up_to_date(tokens)
    assert float(tokens.residual.square().sum()) < 0.1 * before
    assert found(layer, planted) == N_TRUE


@pytest.mark.parametrize("kind", ["l1", "tanh", "log"])
def test_penalties_have_slope_1_at_0_and_never_exceed_l1(kind: str) -> None:
    size = torch.linspace(0, 3, 100, dtype=torch.float64)[:, None].requires_grad_()
    values = penalty(size, kind)  # type: ignore[arg-type]
    (slope,) = torch.autograd.grad(values.sum(), size)
    assert float(slope[0]) == pytest.approx(1)
    assert bool((slope >= 0).all())
    assert bool((values <= size + 1e-12).all())


@pytest.mark.parametrize("kind", ["l1", "tanh", "log"])
@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk"])
def test_a_step_over_active_features_is_the_step_of_whole_products(
    planted: Planted, activation: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"activation": activation, **({"k": 1} if "topk" in activation else {})}
    layers = [layer_of(planted, 32, training=training, penalty=kind) for _ in range(2)]
    for layer in layers:
        layer.adapter.double()
    x, d = (values[:512].double() for values in layers[0].coordinates(planted.x, planted.d))
    passes = []
    for layer, density in zip(layers, (0.5, 0.0), strict=True):
        monkeypatch.setattr(active_features, "LARGEST_DENSITY", density)
        with torch.no_grad():
            layer.adapter.b_enc -= 1.0
            layer.adapter.W_dec.copy_(unit_rows(layer.adapter.W_enc.T) * torch.linspace(0.1, 1, 32)[:, None])
        terms, loss, acts = layer._loss(x, d, 0.3)
        loss.backward()
        passes.append((terms, [p.grad for p in layer.adapter.parameters()]))
        assert isinstance(acts, ActiveFeatures) == (density > 0) and 0 < float(terms.l0) < 16
    torch.testing.assert_close(*passes, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
def test_steps_lower_the_error_with_every_activation_function(planted: Planted, activation: str) -> None:
    training = {"activation": activation, **({"k": 2} if "topk" in activation else {})}
    layer = layer_of(planted, training=training, sparsity_weight=0.01)
    generator = torch.Generator().manual_seed(6)
    errors = []
    for index in range(60):
        rows = torch.randint(len(planted.x), (512,), generator=generator)
        terms = layer.step(*layer.coordinates(planted.x[rows], planted.d[rows]), index)
        errors.append(float(terms.error))
    assert sum(errors[-5:]) < 0.6 * sum(errors[:5])


def test_planted_features_are_found_again(planted: Planted) -> None:
    layer = layer_of(planted, n_features=16)
    generator = torch.Generator().manual_seed(7)
    x, d = layer.coordinates(planted.x, planted.d)
    for index in range(200):
        rows = torch.randint(len(x), (512,), generator=generator)
        layer.step(x[rows], d[rows], index)
        if index in (60, 120, 160):
            tokens = tokens_of(layer, planted)
            merge_split_features(tokens, generator)
            give_birth(tokens, generator)
    remove_useless_features(tokens_of(layer, planted), 3e-5)
    assert found(layer, planted) == N_TRUE
