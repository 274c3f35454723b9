"""The activation functions against plain loops, their straight-through gradients, and when an adapter trains."""

from collections.abc import Callable

import pytest
import torch
from helpers.random_models import ACTIVATION_OPTIONS, random_batch, random_model, randomise

from tl_adapters.adapters.activation_functions import batch_topk, jumprelu, smallest_active, step, topk
from tl_adapters.adapters.transcoder import TranscoderAdapter, adapter_of, require_activation
from tl_adapters.config import ConfigError
from tl_adapters.data.traces import Batch, Trace
from tl_adapters.evaluation.faithfulness import measure_faithfulness
from tl_adapters.models.paired_model import PairedModel

Draw = Callable[..., torch.Tensor]


@pytest.fixture
def draw() -> Draw:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def make(activation: str, **options: object) -> PairedModel:
    models = (random_model(seed, **options) for seed in (1, 2))
    return randomise(PairedModel.from_pretrained(*models), activation=activation)


def test_jumprelu_and_its_gradients_against_a_loop(draw: Draw) -> None:
    pre, upstream = draw(3, 4, 6).requires_grad_(), draw(3, 4, 6)
    threshold = (draw(6) * 0.3).requires_grad_()  # of others, some below 0
    values, ones = jumprelu(pre, threshold, 0.7), step(pre, threshold, 0.7)
    to_pre, to_threshold = torch.autograd.grad((values * upstream).sum(), (pre, threshold))
    (step_to_threshold,) = torch.autograd.grad((ones * upstream).sum(), threshold)
    assert step(pre, threshold, 0.7).requires_grad
    assert torch.autograd.grad(step(pre, threshold, 0.7).sum(), pre, allow_unused=True)[0] is None
    expected, expected_step = torch.zeros(2, 6, dtype=torch.float64)
    for a in range(3):
        for b in range(4):
            for f in range(6):
                z, limit, g = pre[a, b, f].item(), threshold[f].item(), upstream[a, b, f].item()
                active = z > limit and z > 0
                assert values[a, b, f].item() == (z if active else 0) and ones[a, b, f].item() == float(active)
                assert to_pre[a, b, f].item() == (g if active else 0)
                if abs(z - limit) < 0.35:
                    expected[f] += -limit / 0.7 * g
                    expected_step[f] += -1 / 0.7 * g
    assert (to_threshold - expected).abs().max() < 1e-12 and expected.abs().min() > 0
    assert (step_to_threshold - expected_step).abs().max() < 1e-12


@pytest.mark.parametrize("bandwidth", [0.1, 0.4])
def test_the_straight_through_gradient_is_the_mean_s_own(bandwidth: float) -> None:
    """What cannot be differentiated token by token can on average: d/dt of E[step] and E[jumprelu] at t."""
    pre = torch.linspace(-2, 2, 200_001, dtype=torch.float64)[:, None]  # density 1/4
    threshold = torch.tensor([0.8], dtype=torch.float64, requires_grad=True)
    (of_step,) = torch.autograd.grad(step(pre, threshold, bandwidth).mean(), threshold)
    (of_values,) = torch.autograd.grad(jumprelu(pre, threshold, bandwidth).mean(), threshold)
    assert float(of_step) == pytest.approx(-1 / 4, rel=1e-3)
    assert float(of_values) == pytest.approx(-0.8 / 4, rel=1e-3)


def test_topk_against_sorting(draw: Draw) -> None:
    pre = draw(5, 7, 20)
    for k in (1, 4, 20):
        acts = topk(pre, k)
        for token, found in zip(pre.flatten(0, 1), acts.flatten(0, 1), strict=True):
            kept = sorted(range(20), key=lambda f: -float(token[f]))[:k]
            expected = [float(token[f]) if f in kept and token[f] > 0 else 0.0 for f in range(20)]
            assert found.tolist() == expected
    few = topk(draw(1, 20) - 5, 4)
    assert not few.any()


def test_batch_topk_against_sorting(draw: Draw) -> None:
    pre, real = draw(3, 4, 10), torch.ones(3, 4, dtype=torch.bool)
    real[1, 2:], real[2, 1:] = False, False
    pre[~real] += 100  # padding would win, if it were asked
    acts = batch_topk(pre, 2, real)
    largest = sorted(pre[real].flatten().tolist(), reverse=True)[: 2 * int(real.sum())]
    assert sorted(acts[acts > 0].tolist(), reverse=True) == largest
    assert torch.equal(acts[acts > 0], pre[acts > 0]) and not acts[~real].any()
    assert float(smallest_active(acts, real)) == largest[-1]
    counts = (acts > 0).sum(-1)[real]
    assert counts.float().mean() == 2 and counts.max() > 2 > counts.min()  # per token it is free
    assert torch.equal(batch_topk(pre, 10, real), torch.relu(pre) * real[..., None])  # enough for all of them
    nothing = batch_topk(-pre.abs(), 2, real)
    assert not nothing.any() and smallest_active(nothing, real) == 0


def test_equal_tokens_have_equal_activations(draw: Draw) -> None:
    pre = draw(1, 1, 10).expand(6, 1, 10)
    acts = batch_topk(pre, 2, torch.ones(6, 1, dtype=torch.bool))
    assert (acts == acts[0]).all() and (acts > 0).sum() == 12


def test_gradients_reach_what_is_active_and_nothing_else(draw: Draw) -> None:
    pre = draw(3, 4, 10).requires_grad_()
    for function in (lambda x: topk(x, 2), lambda x: batch_topk(x, 2, torch.ones(3, 4, dtype=torch.bool))):
        acts = function(pre)
        (gradient,) = torch.autograd.grad(acts.sum(), pre)
        assert torch.equal(gradient, (acts > 0).double())


@pytest.mark.parametrize("activation", ACTIVATION_OPTIONS)
@torch.no_grad()
def test_an_active_feature_s_activation_is_its_pre_activation(activation: str) -> None:
    pair, tokens = make(activation), random_batch(3).tokens
    with pair.routed("replacement"):
        _, cache = pair.model.run_with_cache(tokens)
    for layer in range(4):
        pre, acts = (cache[f"blocks.{layer}.mlp.adapter.hook_sae_acts_{which}"] for which in ("pre", "post"))
        active = acts != 0
        assert torch.equal(acts[active], pre[active]) and (acts >= 0).all()
        assert 0 < active.sum() < active.numel()
        if activation == "topk":
            assert (active.sum(-1) == 5).all()
        if activation in ("jumprelu", "batchtopk"):
            assert torch.equal(active, pre > pair.mlps[layer].adapter.threshold)


@pytest.mark.parametrize("activation", ACTIVATION_OPTIONS)
@torch.no_grad()
def test_evaluating_is_every_token_for_itself(activation: str) -> None:
    """Whatever else is in the batch, whatever train() and eval() say, cached or not."""
    pair, tokens = make(activation), random_batch(3).tokens
    with pair.routed("replacement"):
        together = pair.model(tokens)
        for module in (pair.model.train(), pair.model.eval()):
            assert torch.equal(module(tokens), together)
        alone = pair.model(tokens[:1, :5])
    assert (alone - together[:1, :5]).abs().max() < 1e-10


@torch.no_grad()
def test_batchtopk_trains_on_the_real_tokens_of_a_batch_and_only_there(batch: Batch) -> None:
    pair = make("batchtopk")
    adapters = pair.installed_adapters()
    point = "blocks.1.mlp.adapter.hook_sae_acts_post"

    def acts() -> torch.Tensor:
        with pair.routed("replacement"):
            return pair.model.run_with_cache(batch.tokens)[1][point]

    before = acts()
    with adapters.training_on(batch.real):
        inside = acts()
    with pytest.raises(RuntimeError), adapters.training_on(batch.real):
        raise RuntimeError
    assert torch.equal(acts(), before) and not torch.equal(inside, before)
    assert (inside > 0).sum() == 5 * batch.real.sum() and not inside[~batch.real].any()
    padded = torch.nn.functional.pad(batch.tokens, (0, 4)), torch.nn.functional.pad(batch.real, (0, 4))
    with adapters.training_on(padded[1]), pair.routed("replacement"):
        wider = pair.model.run_with_cache(padded[0])[1][point][:, : batch.tokens.shape[1]]
    assert torch.equal(wider > 0, inside > 0) and (wider - inside).abs().max() < 1e-12


@torch.no_grad()
def test_thresholds_follow_the_batches_and_stay_positive() -> None:
    adapter = TranscoderAdapter(8, 12, activation="batchtopk", k=3)
    assert not adapter.threshold.any() and "threshold" in adapter.state_dict()
    assert "threshold" not in dict(adapter.named_parameters())
    for value in (0.0, 2.0, 3.0):  # a batch that let nothing through, the first that did, another
        adapter.settle_threshold(torch.tensor(value), 0.1)
    expected = 2.0 + 0.1 * (3.0 - 2.0)
    assert adapter.threshold.tolist() == pytest.approx([expected] * 12)
    adapter = TranscoderAdapter(8, 12, activation="jumprelu", bandwidth=0.25)
    assert adapter.threshold.tolist() == [0.25] * 12
    adapter.threshold[3] = -0.1
    adapter.settle_threshold(None, 0.1)
    assert adapter.threshold.tolist() == [0.25] * 3 + [0.0] + [0.25] * 8


@pytest.mark.parametrize("activation", ACTIVATION_OPTIONS)
def test_faithfulness_counts_what_is_active(activation: str) -> None:
    pair, tokens = make(activation), random_batch(3, lengths=(9, 9))
    sums = measure_faithfulness(pair, [Trace(tuple(row), 3) for row in tokens.tokens.tolist()])
    per_token = sums.active_all.sum(0) / sums.tokens_all.sum()
    assert (per_token == 5).all() if activation == "topk" else ((per_token > 0) & (per_token < 24)).all()
    with torch.no_grad(), pair.routed("replacement"):
        _, cache = pair.model.run_with_cache(tokens.tokens)
    for layer in range(4):
        fired = (cache[f"blocks.{layer}.mlp.adapter.hook_sae_acts_post"] > 0).sum((0, 1))
        assert torch.equal(sums.firings[layer], fired.double())


@pytest.mark.parametrize(
    ("activation", "k", "message"),
    [
        ("gelu", None, "activation is 'gelu'; allowed is one of relu, jumprelu, topk, batchtopk"),
        ("topk", None, r"k is None for the activation 'topk'; allowed is a whole number from 1 to n_features \(12\)"),
        ("batchtopk", 13, "k is 13"),
        ("topk", 0, "k is 0"),
        ("relu", 3, "k is 3 for the activation 'relu'; allowed is None"),
    ],
)
def test_activations_that_are_not_there_are_refused(activation: str, k: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        require_activation(activation, k, 12)
    if activation != "gelu":
        with pytest.raises(ConfigError, match=message):
            TranscoderAdapter(8, 12, activation=activation, k=k)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ACTIVATION_OPTIONS)
def test_an_adapter_around_tensors_is_the_adapter(activation: str, draw: Draw) -> None:
    ours = make(activation).installed_adapters()[2]
    again = adapter_of(ours.state_dict(), ours.activation, ours.k)
    x = draw(3, 5, 32)
    assert torch.equal(again(x), ours(x))
    assert all(p.requires_grad for p in again.parameters())
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in ours.named_parameters()}
