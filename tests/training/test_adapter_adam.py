"""Adam on adapters moves every weight as torch's plain Adam does, in whatever layout, and goes on from its moments."""

import pytest
import torch
from helpers.random_models import random_model, randomise

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.config import TrainingConfig
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.training.adapter_adam import AdapterAdam

CONFIG = TrainingConfig(stages=("end_to_end",), lr=0.05)


def make(dtype: torch.dtype = torch.float64) -> AdapterSet:
    models = [random_model(seed, dtype) for seed in (1, 2)]
    return randomise(PairedModel.from_pretrained(*models)).installed_adapters()


def give_gradients(adapters: AdapterSet, step: int, accumulated: bool) -> None:
    """Random gradients, as autograd gives them: in the layout of each weight."""
    generator = torch.Generator().manual_seed(step)
    for weight in adapters.parameters():
        gradient = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        (weight * gradient).sum().backward()
        if accumulated:
            (weight * gradient).sum().backward()


def weights(adapters: AdapterSet) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in adapters.state_dict().items()}


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("largest", [1.0, 1e9])
@pytest.mark.parametrize("accumulated", [False, True])
def test_weights_move_as_by_plain_adam(accumulated: bool, largest: float, dtype: torch.dtype, rtol: float) -> None:
    """Also in float32, where the gradient is scaled within the step, and where nothing is clipped."""
    ours, theirs = make(dtype), make(dtype)
    adam = AdapterAdam(ours, CONFIG)
    plain = torch.optim.Adam(theirs.parameters(), lr=0.05, betas=(CONFIG.beta1, CONFIG.beta2), foreach=False)
    for step in range(4):
        give_gradients(ours, step, accumulated)
        give_gradients(theirs, step, accumulated)
        norm = adam.clip(largest)
        assert abs(norm - torch.nn.utils.clip_grad_norm_(theirs.parameters(), largest)) < rtol * norm
        assert 1.0 < norm < 1e9
        adam.step(0.05, None, 0.0)
        plain.step()
        plain.zero_grad()
        assert all(weight.grad is None for weight in ours.parameters())
    for name, expected in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], expected, rtol=rtol, atol=rtol / 100, msg=name)


def test_what_one_gradient_was_scaled_by_is_not_used_for_the_next() -> None:
    """A gradient that was clipped and never stepped with, as where another part of the step was not finite."""
    ours, theirs = make(torch.float32), make(torch.float32)
    adam, other = AdapterAdam(ours, CONFIG), AdapterAdam(theirs, CONFIG)
    give_gradients(ours, 0, False)
    adam.clip(1e-3)
    for adapter in ours:
        adapter.zero_grad()
    for adapters, optimizer in ((ours, adam), (theirs, other)):
        give_gradients(adapters, 1, False)
        optimizer.clip(1e9)
        optimizer.step(0.05, None, 0.0)
    for name, expected in weights(theirs).items():
        assert torch.equal(weights(ours)[name], expected), name
    assert all(torch.equal(adam.tensors()[name], value) for name, value in other.tensors().items())


def test_weights_that_were_moved_elsewhere_are_not_left_behind_in_silence() -> None:
    adapters = make()
    adam = AdapterAdam(adapters, CONFIG)
    for adapter in adapters:
        adapter.W_enc.data = adapter.W_enc.data.clone()
    give_gradients(adapters, 0, False)
    with pytest.raises(AssertionError, match="moved"):
        adam.step(0.05, None, 0.0)


def test_moments_have_the_shape_of_their_weights_and_are_gone_on_with() -> None:
    adapters = make()
    adam = AdapterAdam(adapters, CONFIG)
    for step in range(2):
        give_gradients(adapters, step, False)
        adam.step(0.05, None, 0.0)
    moments = {name: tensor.clone().contiguous() for name, tensor in adam.tensors().items()}
    for index, weight in enumerate(adapters.parameters()):
        assert moments[f"{index}.exp_avg"].shape == weight.shape
    other = make()
    other.load_state_dict(weights(adapters))
    resumed = AdapterAdam(other, CONFIG)
    resumed.restore(moments)
    for each, optimizer in ((adapters, adam), (other, resumed)):
        give_gradients(each, 2, False)
        optimizer.step(0.05, None, 0.0)
    for name, expected in weights(adapters).items():
        assert torch.equal(weights(other)[name], expected), name
