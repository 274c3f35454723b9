"""Measurements and gradients in low precision: logits, divergences, and the refusal of float16 training."""

import math
from pathlib import Path

import pytest
import torch
from helpers.log_odds import word_log_odds
from helpers.random_models import random_batch, random_model, randomise
from torch import Tensor

from tl_adapters.circuits.onsets import Onsets, final_residual
from tl_adapters.circuits.roles import effects_at
from tl_adapters.config import LossWeights, TrainingConfig
from tl_adapters.data.traces import Trace
from tl_adapters.evaluation.faithfulness import measure_faithfulness
from tl_adapters.interventions.feature_edits import scaled
from tl_adapters.interventions.frozen import frozen
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.training.kl_divergence import kl_from_residual, kl_per_token, token_kl_from_residual
from tl_adapters.training.objective import PrecisionError, held_out_terms, reference_step, shared_prefix_step
from tl_adapters.training.trainer import Trainer
from tl_adapters.utils.precision import host_float64, linear_in_float32, wide

VOCABULARY = 50_000


@pytest.fixture(scope="module", params=["hooked", "bridge"])
def wide_pair(request: pytest.FixtureRequest) -> PairedModel:
    """A bfloat16 pair of one layer, with a vocabulary of 50,000 and logits of the size of a trained model's."""
    base, target = (random_model(s, torch.bfloat16, num_hidden_layers=1, vocab_size=VOCABULARY) for s in (1, 2))
    with torch.no_grad():
        target.lm_head.weight *= 4
    return randomise(PairedModel.from_pretrained(base, target, backend=request.param))


def residuals(pair: PairedModel, apart: float, n: int = 24) -> tuple[Tensor, Tensor]:
    """Two residual streams that differ by so much, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(n, pair.model.cfg.d_model, generator=generator) for _ in range(2))
    return x.bfloat16(), (x + apart * noise).bfloat16()


@torch.no_grad()
def exact_logits(pair: PairedModel, resid: Tensor) -> Tensor:
    """Of the same weights and of what the model's own final norm makes of the stream, in float64."""
    return pair.model.ln_final(resid[None])[0].double() @ pair.backend.unembedding().double().T


@pytest.mark.parametrize("apart", [0.003, 0.03, 0.3])
def test_a_bfloat16_models_divergences_are_those_of_float64(wide_pair: PairedModel, apart: float) -> None:
    ours, theirs = residuals(wide_pair, apart)
    exact = kl_per_token(exact_logits(wide_pair, theirs), exact_logits(wide_pair, ours))
    found = token_kl_from_residual(theirs, ours, wide_pair.unembed, rows_at_once=7)
    assert found.dtype == torch.float32
    assert ((found - exact).abs() / (1 + exact)).max() < 1e-5  # logits in bfloat16 would be 2e-3 off and more
    assert found.min() > -1e-5
    summed = kl_from_residual(theirs[None], ours[None], torch.ones(1, len(ours)).bool(), wide_pair.unembed, 7)
    assert float(summed) == pytest.approx(float(exact.mean()), abs=1e-5)


def test_its_probabilities_are_those_of_float64(wide_pair: PairedModel) -> None:
    _, resid = residuals(wide_pair, 0.0)
    found, exact = (f(resid).softmax(-1) for f in (wide_pair.unembed, lambda r: exact_logits(wide_pair, r)))
    assert (found - exact).abs().max() < 1e-5
    words = [3, 40_000]
    assert torch.allclose(
        word_log_odds(wide_pair.unembed(resid), words).double(), word_log_odds(exact.log(), words), atol=1e-3
    )


def test_hooks_on_the_unembedding_fire_and_the_module_is_as_it_was(wide_pair: PairedModel) -> None:
    _, resid = residuals(wide_pair, 0.0)
    seen: list[torch.dtype] = []
    handle = wide_pair.model.unembed.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    wide_pair.unembed(resid)
    handle.remove()
    assert seen == [torch.float32]
    with torch.no_grad():
        assert wide_pair.model(torch.tensor([[1, 2]])).dtype == torch.bfloat16  # the model itself is not changed


def test_the_gradient_through_float32_logits_is_the_exact_one() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(90, 8, generator=generator).bfloat16()
    x = torch.randn(2, 5, 8, generator=generator).requires_grad_()
    upstream = torch.randn(2, 5, 90, generator=generator)
    bias = torch.randn(90, generator=generator).bfloat16()
    out = linear_in_float32(x, weight, bias)
    assert torch.allclose(out.double(), x.double() @ weight.double().T + bias.double(), atol=1e-5)
    (grad,) = torch.autograd.grad(out, x, upstream)
    assert torch.allclose(grad.double(), upstream.double() @ weight.double(), atol=1e-5)


@pytest.mark.parametrize("n", [1, 3])
def test_a_weight_larger_than_a_slice_is_cast_in_slices(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr("tl_adapters.utils.precision.CAST_ELEMENTS", 8 * n + 1)
    weight, x = torch.randn(11, 8).bfloat16(), torch.randn(4, 8).bfloat16().requires_grad_()
    out = linear_in_float32(x, weight)
    assert torch.allclose(out, x.float() @ weight.float().T, atol=1e-5)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.dtype == torch.bfloat16 and torch.allclose(grad.float(), weight.float().sum(0).expand(4, 8), rtol=1e-2)


def test_sums_are_in_float64_on_the_cpu_and_keep_what_a_device_has() -> None:
    meta = torch.zeros(2, device="meta")
    assert wide(torch.zeros(2)).dtype == host_float64(torch.zeros(2)).dtype == torch.float64
    assert wide(meta).dtype == wide(meta.bfloat16()).dtype == torch.float32
    assert wide(meta.double()).dtype == torch.float64


# -- float16 ----------------------------------------------------------------------------------------------------------


def half(layers: int = 2) -> PairedModel:
    return PairedModel.from_pretrained(*(random_model(s, torch.float16, num_hidden_layers=layers) for s in (1, 2)))


def test_float16_is_refused_for_training_and_says_what_to_take(tmp_path: Path) -> None:
    pair, config = half(), TrainingConfig(stages=("end_to_end",), n_features=8, steps=2)
    with pytest.raises(PrecisionError, match="bfloat16.*float32"):
        Trainer(pair, [Trace((1, 2, 3, 4), 1)], config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists() and pair.adapters is None


@pytest.mark.parametrize("step", [reference_step, shared_prefix_step])
def test_the_objective_itself_refuses_float16(step: object) -> None:
    pair = half()
    pair.new_adapters(8)  # float32 adapters: the gradient comes through the model
    with pytest.raises(PrecisionError):
        step(pair, random_batch(3), 1, LossWeights(), 0.0)  # type: ignore[operator]


def test_trained_adapters_are_measured_in_float16() -> None:
    pair = half()
    pair.new_adapters(8)
    found = held_out_terms(pair, [random_batch(3)])
    assert math.isfinite(found["output_kl"]) and math.isfinite(found["nmse"])
    assert measure_faithfulness(pair, [Trace((1, 2, 3, 4, 5), 2)]).kl["replacement"].isfinite().all()


def test_bfloat16_trains(tmp_path: Path) -> None:
    pair = PairedModel.from_pretrained(*(random_model(s, torch.bfloat16, num_hidden_layers=2) for s in (1, 2)))
    config = TrainingConfig(stages=("end_to_end",), n_features=8, steps=2, log_every=1)
    losses: list[float] = []
    traces = [Trace((1, 2, 3, 4, 5, 6), 1)]
    Trainer(pair, traces, config, progress=False).run(lambda step, terms: losses.append(float(terms.total)))
    assert all(math.isfinite(loss) for loss in losses)


# -- Gemma 2's second post-norm ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("architecture", ["Gemma2ForCausalLM", "Qwen2ForCausalLM"])
def test_a_direct_effect_is_the_slope_of_the_log_odds_with_every_scale_held(architecture: str, backend: str) -> None:
    """Activation times the numeric derivative; scales of post-norms are far from 1 and differ by position."""
    pair = randomise(
        PairedModel.from_pretrained(*(random_model(s, architecture=architecture) for s in (1, 2)), backend=backend)
    )
    batch = random_batch(3, (9,))
    onset = torch.zeros_like(batch.predicting_response)
    onset[0, [4, 7]] = True
    nowhere = torch.zeros_like(onset)
    onsets = Onsets(batch.tokens, batch.predicting_response, onset, nowhere, nowhere, (5, 9))
    direct = effects_at(pair, onsets).direct

    def mean_log_odds(features: list[tuple[int, int]], factor: float, place: int) -> Tensor:
        """With every block held, so that the change is written and nothing answers; the final norm is not held."""
        held = frozen(pair, batch.tokens, layers=range(0))
        with torch.no_grad(), pair.routed("replacement"), held, scaled(pair, features, factor, [place]):
            resid = final_residual(pair, batch.tokens)[0, place]
        return word_log_odds(pair.unembed(resid[None]), onsets.phrases)[0]

    step = 1e-4
    for feature in [(layer, index) for layer in range(pair.n_layers) for index in (0, 5, 11)]:
        slopes = [
            (mean_log_odds([feature], 1 + step, place) - mean_log_odds([feature], 1 - step, place)) / (2 * step)
            for place in (4, 7)
        ]
        expected = float(torch.stack(slopes).mean())
        # Hugging Face's own norms, which a bridge runs, compute in float32.
        tolerance = 2e-3 if backend == "bridge" else 1e-5
        assert float(direct[feature]) == pytest.approx(expected, rel=tolerance, abs=tolerance)
