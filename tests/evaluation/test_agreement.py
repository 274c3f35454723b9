"""Agreement of two adapter sets as features and as subspaces, on sets whose agreement is known."""

import pytest
import torch
from helpers.random_models import random_model
from helpers.skewed_traces import skewed_traces

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.adapters.transcoder import TranscoderAdapter
from tl_adapters.evaluation.agreement import measure_agreement
from tl_adapters.evaluation.feature_matching import target_inputs
from tl_adapters.models.paired_model import PairedModel

LAYERS, WIDTH, D_MODEL = 2, 6, 32


@pytest.fixture(scope="module")
def pair() -> PairedModel:
    base, target = (random_model(seed, num_hidden_layers=LAYERS) for seed in (1, 2))
    return PairedModel.from_pretrained(base, target)


@pytest.fixture(scope="module")
def features(pair: PairedModel) -> AdapterSet:
    """Random features that are active on a tenth to a half of the tokens."""
    generator = torch.Generator().manual_seed(0)
    layers = [TranscoderAdapter(D_MODEL, WIDTH, dtype=torch.float64) for _ in range(LAYERS)]
    inputs = [torch.cat(x) for x in zip(*target_inputs(pair, skewed_traces(40)), strict=True)]
    with torch.no_grad():
        for adapter, x in zip(layers, inputs, strict=True):
            adapter.W_enc.copy_(torch.randn(D_MODEL, WIDTH, generator=generator))
            adapter.W_dec.copy_(torch.randn(WIDTH, D_MODEL, generator=generator))
            scores = x @ adapter.W_enc
            adapter.b_enc.copy_(-torch.stack([scores[:, i].quantile(0.9 - i * 0.08) for i in range(WIDTH)]))
    return AdapterSet(layers)


def rotated(features: AdapterSet, degrees: float = 45.0) -> AdapterSet:
    """Every two neighbors read the same and write two mixtures of what they wrote: one subspace, other features."""
    c, s = torch.cos(torch.deg2rad(torch.tensor(degrees))), torch.sin(torch.deg2rad(torch.tensor(degrees)))
    layers = []
    for adapter in features:
        new = TranscoderAdapter(D_MODEL, WIDTH, dtype=torch.float64)
        with torch.no_grad():
            for i in range(0, WIDTH, 2):
                rows = torch.nn.functional.normalize(adapter.W_dec[i : i + 2], dim=1)
                new.W_dec[i], new.W_dec[i + 1] = c * rows[0] + s * rows[1], c * rows[1] - s * rows[0]
                for j in (i, i + 1):
                    new.W_enc[:, j], new.b_enc[j] = adapter.W_enc[:, i], adapter.b_enc[i]
        layers.append(new)
    return AdapterSet(layers)


def test_equal_sets_agree_fully_and_by_chance_hardly(pair: PairedModel, features: AdapterSet) -> None:
    found = measure_agreement(pair, features, features, skewed_traces(40))
    assert found.matching.shares("a")["all"] == found.in_span.agreeing == (LAYERS * WIDTH, LAYERS * WIDTH)
    assert found.in_span.of_energy == pytest.approx(1, abs=1e-3)
    assert all(share == pytest.approx(1, abs=1e-3) for share in found.in_span.of_features.values())
    assert found.matching_by_chance.shares("a")["all"].k == 0
    assert found.in_span_by_chance.agreeing.k == 0 and 0.05 < found.in_span_by_chance.of_energy < 0.7
    record = found.to_dict()
    assert record["observed"]["features"]["all"] == {"k": LAYERS * WIDTH, "n": LAYERS * WIDTH}
    assert record["chance"]["features_in_span"]["k"] == 0
    frame = found.to_pandas().set_index("measure")
    single, energy = frame.loc["single features, all alive"], frame.loc["energy in the span"]
    assert (single["agree"], single["observed"], single["by_chance"]) == (LAYERS * WIDTH, 1, 0)
    assert energy["observed"] == found.in_span.of_energy and energy["by_chance"] == found.in_span_by_chance.of_energy
    assert "100% of 12 alive features" in repr(found) and "(by chance 0%)" in repr(found)
    assert "12 of 12<" in found._repr_html_() and "by chance" in found._repr_html_()


def test_rotated_features_agree_as_subspaces_only(pair: PairedModel, features: AdapterSet) -> None:
    ours, theirs = rotated(features, 0), rotated(features, 45)
    found = measure_agreement(pair, ours, theirs, skewed_traces(40))
    assert found.matching.shares("a")["all"].k == 0 and found.matching.shares("a")["all"].n == LAYERS * WIDTH
    assert found.in_span.agreeing == (LAYERS * WIDTH, LAYERS * WIDTH)
    assert found.in_span_by_chance.of_energy < 0.8 < 0.999 < found.in_span.of_energy


@torch.no_grad()
def test_shares_in_the_span_agree_with_least_squares(pair: PairedModel, features: AdapterSet) -> None:
    generator = torch.Generator().manual_seed(3)
    other = AdapterSet([TranscoderAdapter(D_MODEL, 9, dtype=torch.float64) for _ in range(LAYERS)])
    for adapter in other:
        for weight in (adapter.W_enc, adapter.W_dec):
            weight.copy_(torch.randn(weight.shape, generator=generator))
    traces = skewed_traces(8, seed=1)
    found = measure_agreement(pair, features, other, traces, tokens_per_batch=64)
    inside, energy = 0.0, 0.0
    for layer, x in enumerate(torch.cat(x) for x in zip(*target_inputs(pair, traces), strict=True)):
        a, b = features[layer].encode(x), other[layer].encode(x)
        assert int((b > 0).sum(0).min()) >= 10
        of_layer = torch.zeros(2, WIDTH, dtype=torch.float64)
        for token in range(len(x)):
            span = other[layer].W_dec[b[token] > 0].T
            fitted = span @ torch.linalg.lstsq(span, features[layer].W_dec.T).solution
            of_layer += torch.stack([fitted.T.square().sum(1), features[layer].W_dec.square().sum(1)]) * a[token] ** 2
        for index in range(WIDTH):
            if (feature := FeatureId(layer, index)) in found.in_span.of_features:
                expected = float(of_layer[0, index] / of_layer[1, index])
                assert found.in_span.of_features[feature] == pytest.approx(expected, abs=2e-3)
                inside, energy = inside + float(of_layer[0, index]), energy + float(of_layer[1, index])
    assert found.in_span.of_energy == pytest.approx(inside / energy, abs=2e-3) and energy > 0


def test_an_empty_set_agrees_on_nothing(pair: PairedModel, features: AdapterSet) -> None:
    silent = AdapterSet([TranscoderAdapter(D_MODEL, 3, dtype=torch.float64) for _ in range(LAYERS)])
    found = measure_agreement(pair, features, silent, skewed_traces(10))
    assert found.in_span.of_features == {} and found.in_span.of_energy == 0.0
