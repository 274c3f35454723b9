"""What the training step is timed against computes the same gradients."""

from __future__ import annotations

import pytest
import torch
from helpers.random_models import random_model, randomise
from hf_objective import HFObjective

from tl_adapters.config import LossWeights
from tl_adapters.data.traces import Trace, collate
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.training.objective import reference_step


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_the_formulas_on_hugging_face_modules_have_the_gradients_of_the_objective(cut: int) -> None:
    options = dict(attn_implementation="sdpa")
    base, target = (random_model(seed, torch.float64, **options) for seed in (1, 2))
    for b, t in zip(base.model.layers, target.model.layers, strict=True):  # the hybrid's attention is the target's
        b.self_attn.load_state_dict(t.self_attn.state_dict())
    pair = randomise(PairedModel.from_pretrained(base, target))
    document = Trace(tuple(range(3, 20)), 4)
    expected = reference_step(pair, collate([document]), cut, LossWeights(), 0.01)
    gradients = [p.grad.clone() for adapter in pair.installed_adapters() for p in adapter.parameters()]
    pair.installed_adapters().zero_grad()
    base, target = (random_model(seed, torch.float64, **options) for seed in (1, 2))
    objective = HFObjective(base, target, list(pair.installed_adapters()))
    loss = objective.loss(torch.tensor([document.tokens]), cut, 0.01)
    loss.backward()
    # Hugging Face's norms compute in float32.
    assert float(loss.detach()) == pytest.approx(float(expected.total), rel=1e-6)
    for gradient, parameter in zip(gradients, pair.installed_adapters().parameters(), strict=True):
        assert parameter.grad is not None
        assert (parameter.grad - gradient).norm() < 1e-6 * gradient.norm()
