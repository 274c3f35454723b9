"""The benchmark on SAELens's synthetic data."""

from dataclasses import replace

import pytest
import synthetic
import torch
from sae_lens.synthetic import SyntheticModel

from tl_adapters.adapters.transcoder import TranscoderAdapter
from tl_adapters.data.traces import Trace, collate
from tl_adapters.local_stage.regression_data import RegressionData


@pytest.fixture(scope="module")
def model() -> SyntheticModel:
    return SyntheticModel(replace(synthetic.DATA, orthogonalization=None, seed=0))


def test_every_token_of_a_document_is_a_sample(model: SyntheticModel) -> None:
    samples = synthetic.Samples(model)
    assert isinstance(samples, RegressionData)
    ((x, wanted),) = samples.read(collate([Trace((0,) * 7, 0), Trace((0,) * 5, 0)]))
    assert x.shape == (12, synthetic.D_MODEL)
    assert torch.equal(x, wanted)


@torch.no_grad()
def test_the_true_directions_are_found_to_be_true(model: SyntheticModel) -> None:
    truth = TranscoderAdapter(synthetic.D_MODEL, synthetic.WIDTH)
    directions = model.feature_dict.feature_vectors[: synthetic.WIDTH]
    truth.W_dec.copy_(directions)
    truth.W_enc.copy_(directions.T)
    truth.b_enc.sub_(2.5)
    found = synthetic.measured(truth, model)
    assert found["mcc"] == pytest.approx(1)
    assert found["uniqueness"] == 1
    assert found["silent"] == 0


def test_a_few_steps_are_better_than_none(model: SyntheticModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "LOCAL", replace(synthetic.LOCAL, steps=25, max_tokens=4000, tokens_per_step=512))
    monkeypatch.setattr(synthetic, "EVALUATED", 3000)
    found = synthetic.measured(synthetic.local_stage(model), model)
    assert found["explained_variance"] > 0.3
    assert found["mcc"] > 0.35
